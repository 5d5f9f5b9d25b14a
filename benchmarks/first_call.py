"""What is waited for once: the import, a compile, the first call, a preset's prewarm, ``jitgemm list``. ::

    python -m benchmarks.first_call

Every figure is the median of several fresh processes, beside its target. The first calls need a GPU, the rest does
not. A first call is timed until it returns, with the library imported, the CUDA context made and the scales prepared
(by torch, so that nothing of ours has run yet); "cold" has an empty kernel cache, "warm" the one that a process
before it left. A target that is missed says NO. Exit codes: 0 done, 1 a measurement failed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import CsvLog, say

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("measure", "seconds", "target_s", "met", "smallest", "largest", "error")
PRESET = "deepseek-v3"
COMMAND = (sys.executable, "-m", "jitgemm.cache_tools.cli")
_TIMEOUT_S = 600

IMPORT = """
import time
begin = time.perf_counter()
import jitgemm
print(time.perf_counter() - begin)
"""

COMPILE = """
import time
from jitgemm.builder import build
from jitgemm.device import PRESETS
from jitgemm.families.gemm import FAMILY, GemmProblem
from jitgemm.heuristics import choose_config

device = PRESETS["h200"]
problem = GemmProblem(n=7168, k=2048, recipe="{recipe}", m={m})
spec = FAMILY.spec(problem, choose_config(problem, device), device.arch.name)
begin = time.perf_counter()
built = build(spec)
print(time.perf_counter() - begin)
assert built.source == "compiled", built.source
"""

CHOOSE = """
import time
from jitgemm.device import PRESETS
from jitgemm.families.gemm import GemmProblem
from jitgemm.heuristics import choose_config

begin = time.perf_counter()
choose_config(GemmProblem(n=7168, k=2048, recipe="fp8_1x128_128x128", m=64), PRESETS["h200"])
print(time.perf_counter() - begin)
"""

FIRST_CALL = """
import time
import torch
from {library} import {function} as gemm
from benchmarks.operands import quantize, random_matrix
from jitgemm.reference.layout import get_mn_major_tma_aligned_tensor

generator = torch.Generator("cuda").manual_seed(0)
operands = quantize("{recipe}", random_matrix(64, 2048, generator), random_matrix(7168, 2048, generator))
a, b = operands.a, operands.b
if operands.a_scales is not None:
    a, b = (a, get_mn_major_tma_aligned_tensor(operands.a_scales)), (b, operands.b_scales)
d = torch.empty((64, 7168), dtype=torch.bfloat16, device="cuda")
torch.cuda.synchronize()
begin = time.perf_counter()
gemm(a, b, d)
print(time.perf_counter() - begin)
torch.cuda.synchronize()
"""


@dataclass(frozen=True)
class Measurement:
    """Seconds of several processes, or why there are none."""

    name: str
    target_s: float | None
    seconds: tuple[float, ...] = ()
    error: str = ""

    def row(self) -> tuple[object, ...]:
        """A row of the CSV."""
        if not self.seconds:
            return (self.name, None, self.target_s, "", None, None, self.error)
        median = statistics.median(self.seconds)
        met = "" if self.target_s is None else "yes" if median <= self.target_s else "NO"
        return (self.name, median, self.target_s, met, min(self.seconds), max(self.seconds), "")


class ChildError(Exception):
    """A process that failed; the message is the last line that it wrote."""


def run_child(command: Sequence[str], cache: Path, variables: Mapping[str, str] | None = None) -> str:
    """Run a process in the checkout with its own kernel cache; what it printed.

    Raises:
        ChildError: it failed.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "JITGEMM_CACHE_DIR": str(cache), **(variables or {})}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise ChildError(f"exit code {done.returncode}: {lines[-1]}"[:300])
    return done.stdout


def snippet(code: str, cache: Path, variables: Mapping[str, str] | None = None) -> float:
    """Run Python code whose last line of output is a number of seconds.

    Raises:
        ChildError: it failed.
    """
    return float(run_child((sys.executable, "-c", code), cache, variables).split()[-1])


def measure(
    name: str, target_s: float | None, samples: int, sample: Callable[[], float], unit: str = " s"
) -> Measurement:
    """Take samples; the first failure ends it."""
    try:
        result = Measurement(name, target_s, tuple(sample() for _ in range(samples)))
    except (ChildError, subprocess.TimeoutExpired) as error:
        result = Measurement(name, target_s, error=harness.error_text(error))
    say(f"{name}: {result.error or f'{statistics.median(result.seconds):.4g}{unit}'}")
    return result


@contextmanager
def fresh() -> Iterator[Path]:
    """An empty directory for a kernel cache."""
    with tempfile.TemporaryDirectory(prefix="jitgemm-benchmark-") as directory:
        yield Path(directory)


# -- What is measured.


def without_gpu(samples: int) -> Iterator[Measurement]:
    """Import, choice of a config, and compiles of one kernel."""
    yield measure("import jitgemm", 0.05, samples, functools.partial(_in_fresh_cache, IMPORT))
    yield measure("choose_config, first of a problem", None, samples, functools.partial(_in_fresh_cache, CHOOSE))
    for recipe, m in (("fp8_1x128_128x128", 64), ("fp8_1x128_128x128", 4096), ("bf16", 64), ("bf16", 4096)):
        compile_one = functools.partial(_in_fresh_cache, COMPILE.format(recipe=recipe, m=m))
        yield measure(f"compile one kernel, {recipe}, m {m}", 0.5, samples, compile_one)


def preset_and_list(samples: int, jobs: int, cache: Path) -> Iterator[Measurement]:
    """Prewarm of a whole preset into an empty cache, once, and ``jitgemm list`` of it."""
    kernels: list[float] = []

    def prewarm() -> float:
        begin = time.perf_counter()
        command = (*COMMAND, "prewarm", "--preset", PRESET, "--jobs", str(jobs), "--json")
        report = json.loads(run_child(command, cache))
        kernels.extend(kernel["seconds"] for kernel in report["kernels"] if kernel["state"] == "built")
        return time.perf_counter() - begin

    def list_entries() -> float:
        begin = time.perf_counter()
        run_child((*COMMAND, "list"), cache)
        return time.perf_counter() - begin

    whole = measure(f"prewarm {PRESET}, {jobs} processes", 60.0, 1, prewarm)
    yield whole
    if kernels:
        yield Measurement(f"one of its {len(kernels)} kernels, {jobs} at a time", 0.5, tuple(kernels))
    yield measure("jitgemm list, whole process", 0.4, samples, list_entries)


def with_gpu(samples: int, with_peers: bool) -> Iterator[Measurement]:
    """First calls, from a cold and a warm cache on disk."""
    libraries: dict[str, tuple[str, float | None, float | None]] = {"jitgemm": ("JITGEMM_CACHE_DIR", 0.5, 0.002)}
    if with_peers:
        libraries["deep_gemm"] = ("DG_JIT_CACHE_DIR", None, None)
    for library, (variable, cold_target, warm_target) in libraries.items():
        for function, recipe in (("fp8_gemm_nt", "fp8_1x128_128x128"), ("bf16_gemm_nt", "bf16")):
            code = FIRST_CALL.format(library=library, function=function, recipe=recipe)
            cold = functools.partial(_in_fresh_cache, code, variable)
            yield measure(f"first call, cold: {library}.{function}", cold_target, samples, cold)
            with fresh() as cache:
                warm = functools.partial(snippet, code, cache, {variable: str(cache)})
                measure(f"  filling a cache: {library}.{function}", None, 1, warm)
                yield measure(f"first call, warm: {library}.{function}", warm_target, samples, warm)


def _in_fresh_cache(code: str, variable: str = "JITGEMM_CACHE_DIR") -> float:
    with fresh() as cache:
        return snippet(code, cache, {variable: str(cache)})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_call", description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=harness.positive, default=5, help="processes for each figure (default 5)")
    parser.add_argument("--no-preset", action="store_true", help="without the prewarm of a whole preset")
    parser.add_argument("--no-gpu", action="store_true", help="without the first calls")
    parser.add_argument("--no-peers", action="store_true", help="without DeepGEMM's first calls")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    harness.add_jobs_option(parser)
    return parser.parse_args(arguments)


def report(measured: Sequence[Measurement], out: Path | None, columns: Sequence[str] = COLUMNS) -> int:
    """Print what was measured, and write it to a CSV file if one is given; the exit code."""
    with CsvLog(out, columns) as log:
        for result in measured:
            log.write(dict(zip(columns, result.row(), strict=True)))
    print()
    print(harness.table(columns, (result.row() for result in measured)))
    return int(any(result.error for result in measured))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    import torch

    options = parse(arguments)
    say(f"{harness.machine()}, {len(os.sched_getaffinity(0))} cores")
    measured = list(without_gpu(options.samples))
    if not options.no_preset:
        with fresh() as cache:
            measured += preset_and_list(options.samples, options.jobs, cache)
    if not options.no_gpu and torch.cuda.is_available():
        measured += with_gpu(options.samples, not options.no_peers)
    elif not options.no_gpu:
        say("first calls: skipped, there is no GPU")
    return report(measured, options.out)


if __name__ == "__main__":
    raise SystemExit(main())
