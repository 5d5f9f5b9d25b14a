"""Measure configs on the GPU at hand, and keep what wins in a tuned table; or check what a table holds."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jitgemm.cache_tools.console import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EnvironmentFaultError,
    print_error,
    print_table,
    printable,
)
from jitgemm.cache_tools.prewarm import progress_bar, require_tools
from jitgemm.cache_tools.problems import NamedProblem
from jitgemm.device import Device

if TYPE_CHECKING:
    from jitgemm.families import KernelSpec
    from jitgemm.families.gemm import GemmProblem
    from jitgemm.heuristics.tuned import Entry, Run
    from jitgemm.tuning import Measure


@dataclass(frozen=True)
class Gpu:
    """The GPU at hand: the preset that stands for it, what else decides its times, and a clock."""

    device: Device
    run: Run
    measure: Measure


def open_gpu() -> Gpu:
    """Make ready to measure on torch's current device.

    Raises:
        EnvironmentFaultError: there is none, or no kernels for it, or no torch.
    """
    try:
        import torch

        from jitgemm.errors import ProblemError
        from jitgemm.plan import device_facts
        from jitgemm.tuning import GpuMeasure, current_run
    except ImportError as error:
        raise EnvironmentFaultError(f"tune measures on a GPU and needs torch: {error}") from None
    if not torch.cuda.is_available():
        raise EnvironmentFaultError("tune measures on a GPU, and there is no CUDA device here")
    try:
        device = device_facts(torch.cuda.current_device())[0]
    except ProblemError as error:
        raise EnvironmentFaultError(f"tune: {error}") from None
    return Gpu(device, current_run(), GpuMeasure())


@dataclass
class Tuned:
    """One problem, and what is known of it now."""

    named: NamedProblem
    entries: dict[int, Entry] = field(default_factory=dict)
    measured: int = 0  # anchors, in this run
    failed: int = 0

    @property
    def gain(self) -> float:
        """Geometric mean of the margins."""
        logs = [math.log(entry.margin) for entry in self.entries.values()]
        return math.exp(sum(logs) / len(logs)) if logs else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The problem's entry in the JSON report."""
        return {
            "problem": self.named.problem.to_dict(),
            "layer": self.named.layer,
            "measured": self.measured,
            "failed": self.failed,
            "gain": round(self.gain, 4),
            "entries": [entry_to_dict(self.entries[m]) for m in sorted(self.entries)],
        }


def entry_to_dict(entry: Entry) -> dict[str, Any]:
    """An entry of a table in a JSON report."""
    return {
        "m": entry.m,
        "config": str(entry.config),
        "us": entry.us,
        "model_config": str(entry.model_config),
        "model_us": entry.model_us,
        "margin": round(entry.margin, 4),
        "date": entry.run.date,
    }


@dataclass
class Report:
    """What was tuned, and where it is."""

    problems: list[Tuned]
    table: Path
    device: Device
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0 where all that was asked is in the table now."""
        if self.interrupted:
            return EXIT_INTERRUPTED
        return EXIT_FAILED if any(problem.failed for problem in self.problems) else 0

    def to_dict(self) -> dict[str, Any]:
        """The JSON report, without its schema."""
        return {
            "table": str(self.table),
            "device": self.device.name,
            "seconds": round(self.seconds, 3),
            "interrupted": self.interrupted,
            "problems": [problem.to_dict() for problem in self.problems],
        }


def tune(
    problems: Sequence[NamedProblem],
    gpu: Gpu,
    table: Path,
    *,
    ms: Sequence[int] = (),
    candidates: int | None = None,
    force: bool = False,
    jobs: int = 1,
    progress: bool = False,
) -> Report:
    """Measure what a table lacks of some problems; each is saved when it is done.

    Args:
        problems: without their m.
        gpu: where to measure.
        table: file to add to.
        ms: values of m to tune for; none: all.
        candidates: configs to time at each anchor; None: the tuner's default.
        force: also what the table has from the same circumstances.
        jobs: processes that compile.
        progress: whether to show bars on stderr.

    Raises:
        EnvironmentFaultError: something has to be built, and there is no NVRTC or no place to put it.
        OSError: the table can't be written.
    """
    from jitgemm.heuristics import tuned
    from jitgemm.heuristics.serving import ANCHORS, serving_anchors
    from jitgemm.tuning import CANDIDATES, specs, tune_problem

    start = time.perf_counter()
    count = candidates or CANDIDATES
    anchors = sorted({anchor for m in ms for anchor in serving_anchors(m)}) or list(ANCHORS)
    known = _known(table, gpu.device)
    report = Report([Tuned(named) for named in problems], table, gpu.device)
    todo: list[tuple[Tuned, list[int]]] = []
    for one in report.problems:
        one.entries = {m: e for m, e in known.get(one.named.dense, {}).items() if m in anchors}
        kept = set() if force else {m for m, entry in one.entries.items() if not entry.run.differences(gpu.run)}
        if missing := [m for m in anchors if m not in kept]:
            todo.append((one, missing))
    try:
        with progress_bar("choosing", "problems", len(todo), shown=progress) as advance:
            needed: dict[KernelSpec, None] = {}
            for one, missing in todo:
                needed |= dict.fromkeys(specs(one.named.dense, missing, gpu.device, count))
                advance()
        _build(list(needed), jobs, progress)
        with progress_bar("tuning", "anchors", sum(len(missing) for _, missing in todo), shown=progress) as advance:
            for one, missing in todo:
                found = tune_problem(one.named.dense, missing, gpu.device, gpu.run, gpu.measure, count, advance)
                with tuned.lock(table):
                    tuned.update(table, gpu.device, one.named.dense, found)
                one.entries |= found
                one.measured, one.failed = len(found), len(missing) - len(found)
    except KeyboardInterrupt:
        report.interrupted = True
    report.seconds = time.perf_counter() - start
    return report


def _known(table: Path, device: Device) -> dict[GemmProblem, dict[int, Entry]]:
    from jitgemm.errors import CacheError
    from jitgemm.heuristics import tuned

    with contextlib.suppress(FileNotFoundError, CacheError, tuned.TableError):  # the last two: it is begun anew
        return tuned.read_table(table, device).problems()
    return {}


def _build(specs: Sequence[KernelSpec], jobs: int, progress: bool) -> None:
    """Build what the cache lacks; a kernel that fails is left out when it is measured."""
    from jitgemm.builder import find_cached
    from jitgemm.cache import default_cache
    from jitgemm.cache_tools.workers import build_all

    missing = [spec for spec in specs if find_cached(spec) is None]
    if not missing:
        return
    directory = default_cache().directory
    require_tools(directory)
    with (
        progress_bar("building", "kernels", len(missing), shown=progress) as advance,
        contextlib.closing(build_all(missing, jobs, {"cache_dir": directory, "jit": "allow"})) as outcomes,
    ):
        for _ in outcomes:
            advance()


def print_report(report: Report) -> None:
    """A row for each problem."""

    def row(one: Tuned) -> tuple[object, ...]:
        problem, best = one.named.dense, max(one.entries.values(), key=lambda e: e.margin, default=None)
        changed = [entry for entry in one.entries.values() if entry.config != entry.model_config]
        recipe = problem.recipe if problem.layout == "nt" else f"{problem.recipe} {problem.layout}"
        return (
            *(one.named.layer, problem.n, problem.k, recipe, problem.d_dtype),
            *(len(one.entries), one.measured, len(changed), f"{one.gain:.3f}"),
            "" if best is None else f"{best.margin:.3f} (m = {best.m})",
        )

    print_table(
        ["layer", ">n", ">k", "recipe", "D", ">anchors", ">measured", ">changed", ">gain", ">best"],
        map(row, report.problems),
    )
    measured = sum(one.measured for one in report.problems)
    print(f"measured {measured} anchors in {report.seconds:.1f} s; table {printable(report.table)}")
    if failed := sum(one.failed for one in report.problems):
        print_error(f"{failed} anchors could not be measured")
    if report.interrupted:
        print_error("interrupted; what was saved stays, the same command continues")


# -- Checking.


@dataclass(frozen=True)
class Checked:
    """One entry, and why it is stale; it holds where there is no reason."""

    table: Path
    problem: GemmProblem
    entry: Entry
    reasons: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """The entry's place in the JSON report."""
        where = {"table": str(self.table), "problem": self.problem.to_dict()}
        return {**where, **entry_to_dict(self.entry), "stale": list(self.reasons)}


def check(
    tables: Sequence[Path], problems: Sequence[NamedProblem] | None, gpu: Gpu, *, progress: bool = False
) -> list[Checked]:
    """Measure the entries of tables again, or those of some problems.

    Raises:
        JitGemmError: a table is damaged, or not one of this GPU.
    """
    from jitgemm.heuristics import tuned
    from jitgemm.tuning import stale

    wanted = None if problems is None else {named.dense for named in problems}
    entries = [
        (path, problem, of_problem[m])
        for path in tables
        if path.exists()
        for problem, of_problem in tuned.read_table(path, gpu.device).problems().items()
        if wanted is None or problem in wanted
        for m in sorted(of_problem)
    ]
    checked = []
    with progress_bar("checking", "entries", len(entries), shown=progress) as advance:
        for path, problem, entry in entries:
            checked.append(Checked(path, problem, entry, stale(problem, entry, gpu.device, gpu.run, gpu.measure)))
            advance()
    return checked


def print_checked(checked: Sequence[Checked], tables: Sequence[Path]) -> None:
    """The stale entries, grouped by what is wrong with them."""
    reasons: dict[str, list[Checked]] = {}
    for one in checked:
        for reason in one.reasons:
            reasons.setdefault(reason, []).append(one)
    if reasons:
        print_table(
            [">entries", "stale because", "such as"],
            [
                (len(of_reason), reason, f"{_shown(of_reason[0].problem)} at m = {of_reason[0].entry.m}")
                for reason, of_reason in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
            ],
        )
    stale = sum(bool(one.reasons) for one in checked)
    print(f"{stale} of {len(checked)} entries are stale; {', '.join(printable(path) for path in tables)}")


def _shown(problem: GemmProblem) -> str:
    return f"{problem.n} x {problem.k}, {problem.recipe} {problem.layout}"


def run(
    problems: Sequence[NamedProblem] | None,
    *,
    out: Path | None,
    check_only: bool,
    show: Callable[..., None] | None = None,
    **options: Any,
) -> int:
    """Tune or check, and report; the exit code.

    Args:
        problems: what to tune; None, when checking: all entries.
        out: the table; None: the user's (when checking: and the shipped one).
        check_only: measure what is there, and change nothing.
        show: prints the report as JSON.
        options: of ``tune``.
    """
    from jitgemm.heuristics import tuned

    gpu = open_gpu()
    progress = sys.stderr.isatty()
    if check_only:
        tables = [out] if out else [tuned.user_path(gpu.device), *tuned.shipped_paths(gpu.device)]
        checked = check(tables, problems, gpu, progress=progress)
        stale = any(one.reasons for one in checked)
        if show:
            show(stale=stale, entries=[one.to_dict() for one in checked])
        else:
            print_checked(checked, tables)
        return EXIT_FAILED if stale else 0
    report = tune(problems or (), gpu, out or tuned.user_path(gpu.device), progress=progress, **options)
    if show:
        show(**report.to_dict())
    else:
        print_report(report)
    return report.exit_code
