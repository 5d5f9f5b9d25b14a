"""How the benchmarks race, prewarm, print and write.

Calls are timed as ``jitgemm.timing`` says. Contenders take turns, and the median of each counts. An empty kernel
takes part and is reported, not subtracted.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from jitgemm.builder import build
from jitgemm.device import PRESETS
from jitgemm.families import KernelSpec, family_of
from jitgemm.families.gemm import FAMILY, GemmProblem
from jitgemm.heuristics import choose_config, enumerate_specs
from jitgemm.timing import Call, CudaTimer, Timer, error_text, interleave

EMPTY = "empty"
"""The contender that launches a kernel which does nothing."""

SHORT_US, SHORT_SAMPLES, SAMPLES = 20.0, 100, 30
_PILOTS = 5


@dataclass(frozen=True)
class Timing:
    """What a race says of one contender: its median, or the text of its error."""

    median_us: float | None
    samples: int = 0
    error: str | None = None


def race(contenders: Mapping[str, Call], samples: int | None = None, timer: Timer | None = None) -> dict[str, Timing]:
    """Time contenders in turn (A B A B); ``EMPTY`` joins them.

    Args:
        contenders: calls by name. One that raises drops out, and its error is its result.
        samples: of each; by default 100 where one takes less than 20 us, else 30.
        timer: by default a new ``CudaTimer``.

    Raises:
        RuntimeError: the GPU failed, and can't go on in this process.
    """
    timer = timer or CudaTimer()
    running = {EMPTY: timer.empty, **contenders}
    errors: dict[str, str] = {}
    pilots = interleave(running, _PILOTS, timer, errors)
    if samples is None:
        fastest = min((min(times) for name, times in pilots.items() if name != EMPTY), default=math.inf)
        samples = SHORT_SAMPLES if fastest < SHORT_US else SAMPLES
    times = interleave(running, samples, timer, errors)
    timings = {name: Timing(statistics.median(taken), len(taken)) for name, taken in times.items()}
    timings.update({name: Timing(None, error=error) for name, error in errors.items()})
    return {name: timings[name] for name in (EMPTY, *contenders)}


# -- Prewarm: the kernels that a benchmark needs, built in parallel before anything is timed.


def kernels_of(problem: GemmProblem, device_name: str) -> tuple[KernelSpec, ...]:
    """The kernels of a problem on a device preset: of any m, or for its own m only."""
    device = PRESETS[device_name]
    if problem.m is None:
        return enumerate_specs(problem, device)
    spec = FAMILY.spec(problem, choose_config(problem, device), device.arch.name)
    return (spec, *_helpers(problem, device.arch.name))


def _helpers(problem: GemmProblem, arch: str) -> tuple[KernelSpec, ...]:
    from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES

    traits = problem.traits
    return (TRANSPOSE_SCALES.spec(arch),) if "row_k" in (traits.a_scales, traits.b_scales) else ()


def prewarm(problems: Sequence[GemmProblem], jobs: int, device_name: str | None = None) -> list[str]:
    """Build the kernels of problems into the cache; says how it went and returns what failed."""
    device_name = device_name or preset_name()
    begin = time.monotonic()
    with spawn_pool(jobs) as pool:
        wanted = sorted(set(problems), key=str)
        # Chunks of neighbours: those that differ in m alone share most of the work of choosing.
        listed = pool.map(kernels_of, wanted, [device_name] * len(wanted), chunksize=8)
        specs = list(dict.fromkeys(spec for specs in listed for spec in specs))
    say(f"prewarm: {len(wanted)} problems need {len(specs)} kernels, {time.monotonic() - begin:.1f} s")
    return build_all(specs, jobs)


def build_all(specs: Sequence[KernelSpec], jobs: int) -> list[str]:
    """Build kernels into the cache; says how it went and returns what failed."""
    begin = time.monotonic()
    with spawn_pool(jobs) as pool:
        failures = [failure for failure in pool.map(_build, specs) if failure is not None]
    say(f"build: {len(specs)} kernels, {len(failures)} failed, {time.monotonic() - begin:.1f} s")
    for failure in failures:
        say(f"  {failure}")
    return failures


def _build(spec: KernelSpec) -> str | None:
    try:
        build(spec)
    except Exception as error:
        return f"{family_of(spec).describe(spec)}: {error_text(error)}"
    return None


def preset_name() -> str:
    """The device preset that stands for the current GPU."""
    from jitgemm.plan import device_facts

    return device_facts(torch.cuda.current_device())[0].name


def spawn_pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that share nothing with this one."""
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


# -- Output.


class CsvLog:
    """Rows that reach the file at once, so that an aborted run leaves what it had; no path, no file."""

    def __init__(self, path: Path | None, columns: Sequence[str]) -> None:
        self._file = None if path is None else path.open("w", newline="")
        self._writer = None if self._file is None else csv.DictWriter(self._file, columns)
        if self._writer is not None:
            self._writer.writeheader()

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row; floats with six digits, None as nothing."""
        if self._writer is not None and self._file is not None:
            self._writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
            self._file.flush()

    def __enter__(self) -> CsvLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    numeric = [all(_is_number(row[i]) for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        parts = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True))
        return "  ".join(parts).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, cells)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == "-"
    return True


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def geomean(values: Sequence[float]) -> float | None:
    """The geometric mean; None of nothing."""
    return statistics.geometric_mean(values) if values else None


def say(text: str) -> None:
    """Print progress, past any buffer."""
    print(text, flush=True)


def machine() -> str:
    """One line on what the numbers were measured on."""
    parts = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        parts = [f"{properties.name} ({properties.multi_processor_count} SMs)", f"CUDA {torch.version.cuda}", *parts]
    return ", ".join(parts)


def require_gpu() -> None:
    """Leave with exit code 3 where there is no GPU."""
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU", file=sys.stderr)
        raise SystemExit(3)


def add_jobs_option(parser: argparse.ArgumentParser) -> None:
    """``--jobs``: processes that build kernels."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--jobs", type=positive, default=min(14, cores), help="processes that build (default %(default)s)"
    )


def positive(text: str) -> int:
    """A positive integer, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def layer(text: str) -> tuple[int, int]:
    """``N,K``, for argparse."""
    n, _, k = text.partition(",")
    return positive(n), positive(k)
