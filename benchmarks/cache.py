"""What the kernel cache costs and saves: hits, many processes at one key, a preset cold and warm, verify. ::

    python -m benchmarks.cache

Needs no GPU and no network. Every figure is the median of several runs, beside its target; a target that is missed
says NO. The processes that are let go together have all imports done, and are compared with one that compiles alone.
Exit codes: 0 done, 1 a measurement failed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import first_call, harness
from benchmarks.first_call import (
    COMMAND,
    PRESET,
    ROOT,
    ChildError,
    Measurement,
    fresh,
    report,
    run_child,
    snippet,
)
from benchmarks.harness import say

measure = functools.partial(first_call.measure, unit="")  # names say what is measured in what

COLUMNS = ("measure", "value", "target", "met", "smallest", "largest", "error")
PROCESSES = 64
ENTRIES = 10_000

_SPEC = """
import os, statistics, sys, time
from jitgemm import builder
from jitgemm.device import PRESETS
from jitgemm.families.gemm import FAMILY, GemmProblem
from jitgemm.heuristics import choose_config

device = PRESETS["h200"]
problem = GemmProblem(n=7168, k=2048, recipe="fp8_1x128_128x128", m=64)
spec = FAMILY.spec(problem, choose_config(problem, device), device.arch.name)
"""

HITS = """
builder.build(spec)
times = []
for _ in range(200):
    builder.forget()
    built = builder.build(spec)
    assert built.source == "disk", built.source
    times.append(built.seconds)
print(statistics.median(times))
"""

MEMORY_HITS = """
builder.build(spec)
begin = time.perf_counter()
for _ in range(10_000):
    builder.build(spec)
print((time.perf_counter() - begin) / 10_000)
"""

WAITER = """
import filelock, jinja2
from jitgemm.cache_key import cache_key
import jitgemm.render

cache_key(spec)
print("ready", flush=True)
os.read({barrier}, 1)  # its end comes when all are let go
builder.build(spec)
print(time.monotonic(), builder.stats().compiles, flush=True)
sys.stdin.read()  # ending takes longer than all this, and would hold up those who are not served yet
"""

FILL = """
import dataclasses, hashlib, sys
from jitgemm.cache import default_cache
from jitgemm.cache_key import build_digest, cache_key
from jitgemm.compiler import Cubin, CubinMetadata, find_nvrtc
from jitgemm.families.base import KernelSpec

os.fsync = lambda descriptor: None  # what counts is reading them
image = os.urandom(32_000)
spec = KernelSpec.make("gemm", "sm_90a", dict(number=0))
metadata = CubinMetadata(
    key="", spec={{}}, kernel_name="jitgemm_gemm", arch="sm_90a", nvrtc_version=find_nvrtc().version_text,
    build=build_digest("sm_90a"), compile_seconds=0.3, registers=100, spill_bytes=0, stack_bytes=0, warnings=(),
    sha256=hashlib.sha256(image).hexdigest(), size=len(image),
)
cache = default_cache()
for number in range({count}):
    spec = KernelSpec.make("gemm", "sm_90a", {{**{{name: 128 for name in "abcdefghijkl"}}, "number": number}})
    cache.publish(Cubin(image, dataclasses.replace(metadata, key=cache_key(spec), spec=spec.to_dict())))
print(0)
"""

BOUND = """
from jitgemm.cache import default_cache

begin = time.perf_counter()
assert default_cache().size() > 0
print(time.perf_counter() - begin)
"""


def hits(samples: int) -> Iterator[Measurement]:
    """One kernel again and again, from disk and from memory."""
    with fresh() as cache:
        yield measure("a hit on disk, s", 0.001, samples, functools.partial(snippet, _SPEC + HITS, cache))
        yield measure("a hit in memory, s", 0.00001, samples, functools.partial(snippet, _SPEC + MEMORY_HITS, cache))


def release_together(count: int, cache: Path) -> float:
    """Seconds until the last of ``count`` processes has the kernel, from when all were let go.

    Raises:
        ChildError: one failed, or not exactly one compiled.
    """
    barrier, release = os.pipe()
    command = (sys.executable, "-c", _SPEC + WAITER.format(barrier=barrier))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JITGEMM_CACHE_DIR": str(cache)}
    waiters = []
    for _ in range(count):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        waiters.append(subprocess.Popen(command, env=environment, pass_fds=[barrier], **pipes))
    lines = [waiter.stdout for waiter in waiters]
    for line in lines:
        line.readline()  # it is ready
    os.close(barrier)
    begin = time.monotonic()
    os.close(release)
    answers = [line.readline().split() for line in lines]
    for waiter in waiters:
        waiter.communicate(timeout=60)
    if sum(len(answer) == 2 and answer[1] == "1" for answer in answers) != 1 or not all(answers):
        raise ChildError(f"not one compile: {answers}"[:300])
    return max(float(end) for end, _ in answers) - begin


def together(samples: int) -> Iterator[Measurement]:
    """One process and many at a cold key, in turn."""
    alone: list[float] = []
    many: list[float] = []

    def ratio() -> float:
        for times, count in ((alone, 1), (many, PROCESSES)):
            with fresh() as cache:
                times.append(release_together(count, cache))
        return many[-1] / alone[-1]

    whole = measure(f"{PROCESSES} processes at a cold key, over one alone, ratio", 1.5, samples, ratio)
    if alone and many:
        yield Measurement("one process at a cold key, s", None, tuple(alone))
        yield Measurement(f"{PROCESSES} processes at a cold key until the last is served, s", None, tuple(many))
    yield whole


def preset(samples: int) -> Iterator[Measurement]:
    """The whole preset by the command, cold with one and two processes, and warm."""
    rates: dict[int, list[float]] = {}

    def prewarm(cache: Path, jobs: int) -> float:
        begin = time.perf_counter()
        report = json.loads(run_child((*COMMAND, "prewarm", "--preset", PRESET, "--jobs", str(jobs), "--json"), cache))
        seconds = time.perf_counter() - begin
        if report["built"]:
            rates.setdefault(jobs, []).append(report["built"] / seconds)
        return seconds

    def cold(jobs: int) -> float:
        with fresh() as cache:
            return prewarm(cache, jobs)

    for jobs in (1, 2):
        yield measure(f"{PRESET} cold, --jobs {jobs}, s", None, samples, functools.partial(cold, jobs))
        yield Measurement(f"kernels per second, --jobs {jobs}", None, tuple(rates.get(jobs, ())))
    with fresh() as cache:
        measure("  filling a cache", None, 1, functools.partial(prewarm, cache, 2))
        yield measure(f"{PRESET} warm, s", None, samples, functools.partial(prewarm, cache, 2))


def large(samples: int) -> Iterator[Measurement]:
    """A cache with many entries."""

    def verify() -> float:
        begin = time.perf_counter()
        counts = json.loads(run_child((*COMMAND, "verify", "--json"), cache))["counts"]
        if counts["ok"] < ENTRIES:
            raise ChildError(f"verify: {counts}")
        return time.perf_counter() - begin

    with fresh() as cache:
        measure(f"  filling a cache with {ENTRIES} entries", None, 1, lambda: snippet(_FILL, cache))
        yield measure(f"jitgemm verify, {ENTRIES} entries, s", 10.0, samples, verify)
        yield measure(f"a hit on disk among {ENTRIES} entries, s", 0.001, samples, lambda: snippet(_SPEC + HITS, cache))
        yield measure(f"look at the bound, {ENTRIES} entries, s", None, samples, lambda: snippet(_BOUND, cache))


_FILL = "import os\n" + FILL.format(count=ENTRIES)
_BOUND = "import time\n" + BOUND


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=harness.positive, default=5, help="runs for each figure (default 5)")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = parse(arguments)
    load = os.getloadavg()[0]
    say(f"python {sys.version.split()[0]}, {len(os.sched_getaffinity(0))} cores, load {load:.1f} before")
    measured = [result for part in (hits, together, preset, large) for result in part(options.samples)]
    return report(measured, options.out, COLUMNS)


if __name__ == "__main__":
    raise SystemExit(main())
