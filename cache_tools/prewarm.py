"""Fill the cache with every kernel that the calls of some problems can need."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jitgemm import settings
from jitgemm.cache_tools.console import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EnvironmentFaultError,
    print_error,
    print_table,
    printable,
)
from jitgemm.cache_tools.inspect import SHORT_KEY
from jitgemm.cache_tools.problems import NamedProblem
from jitgemm.cache_tools.storage import write_fault
from jitgemm.device import Device
from jitgemm.families import KernelSpec, family_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from jitgemm.cache import KernelCache
    from jitgemm.problem import Problem

HIT, FETCHED, BUILT, FAILED, MISSING = "hit", "fetched", "built", "failed", "missing"

Mode = Literal["build", "complete", "check", "dry run"]
"""Build; build, then look all up again; say whether all is there; say what is needed."""


@dataclass
class Kernel:
    """One kernel of the set, who needs it, and what became of it."""

    spec: KernelSpec
    key: str
    problems: set[NamedProblem]
    state: str = MISSING
    seconds: float = 0.0
    registers: int | None = None
    spill_bytes: int | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The kernel's entry in the JSON report."""
        return {
            "key": self.key,
            "config": family_of(self.spec).describe(self.spec),
            "spec": self.spec.to_dict(),
            "state": self.state,
            "seconds": round(self.seconds, 3),
            "registers": self.registers,
            "spill_bytes": self.spill_bytes,
            "error": self.error,
        }


@dataclass
class Report:
    """The whole set, in the order of problems and devices."""

    problems: Sequence[NamedProblem]
    kernels: Sequence[Kernel]
    cache: KernelCache
    mode: Mode = "build"
    interrupted: bool = False
    not_uploaded: Sequence[Kernel] = ()  # of what is in the cache and was to be in the remote layer too
    seconds: float = 0.0
    notes: Sequence[str] = ()

    def in_state(self, state: str) -> list[Kernel]:
        """The kernels of one state."""
        return [kernel for kernel in self.kernels if kernel.state == state]

    @property
    def exit_code(self) -> int:
        """0 where all that was asked is in the cache now (a dry run asks nothing)."""
        if self.interrupted:
            return EXIT_INTERRUPTED
        incomplete = self.in_state(MISSING) and self.mode != "dry run"
        return EXIT_FAILED if incomplete or self.in_state(FAILED) or self.not_uploaded else 0

    def to_dict(self) -> dict[str, Any]:
        """The JSON report, without its schema."""
        return {
            "needed": len(self.kernels),
            "hits": len(self.in_state(HIT)),
            "fetched": len(self.in_state(FETCHED)),
            "built": len(self.in_state(BUILT)),
            "failed": len(self.in_state(FAILED)),
            "missing": len(self.in_state(MISSING)),
            "seconds": round(self.seconds, 3),
            "dry_run": self.mode == "dry run",
            "interrupted": self.interrupted,
            "not_uploaded": len(self.not_uploaded),
            "cache_dir": str(self.cache.directory),
            "notes": list(self.notes),
            "kernels": [kernel.to_dict() for kernel in self.kernels],
        }


def prewarm(
    problems: Sequence[NamedProblem], devices: Sequence[Device], *, jobs: int, mode: Mode, progress: bool
) -> Report:
    """Build what the cache lacks of the kernels that ``problems`` can need on ``devices``, or say what that is.

    Raises:
        EnvironmentFaultError: there is something to build, and no NVRTC or no place to put it.
        SettingsError: ``JITGEMM_REMOTE`` needs a package that is not installed.
    """
    from jitgemm.cache import default_cache

    start = time.perf_counter()
    cache = default_cache()
    with progress_bar("choosing", "problems", len(problems) * len(devices), shown=progress) as advance:
        kernels = _needed(problems, devices, advance)
    for kernel in kernels:
        _look_up(kernel, HIT)
    report = Report(problems, kernels, cache, mode)
    missing = report.in_state(MISSING)
    if missing and mode in ("build", "complete"):
        require_tools(cache.directory)
        with progress_bar("building", "kernels", len(missing), shown=progress) as advance:
            try:
                _build(missing, jobs, cache.directory, advance)
            except KeyboardInterrupt:
                report.interrupted = True
    if mode == "complete":
        for kernel in kernels:  # what was there, or built, may have been removed meanwhile
            if kernel.state != FAILED:
                _look_up(kernel, kernel.state)
    if mode in ("build", "complete") and not report.interrupted:
        report.not_uploaded = _complete_remote(kernels, progress)
    report.seconds = time.perf_counter() - start
    return report


def _look_up(kernel: Kernel, state: str) -> None:
    """Put a kernel that the cache has into ``state``."""
    from jitgemm.builder import find_cached
    from jitgemm.cache_tools.inspect import known

    cubin = find_cached(kernel.spec)
    kernel.state = state if cubin is not None else MISSING
    if cubin is not None:
        kernel.registers = known(cubin.metadata.registers)
        kernel.spill_bytes = known(cubin.metadata.spill_bytes)


def print_report(report: Report) -> None:
    """The closing table: a row for each problem, then the totals; failures go to stderr."""
    states = {"cached": HIT}
    if report.in_state(FETCHED):
        states["fetched"] = FETCHED
    if report.mode != "check":
        states["built"] = BUILT
    if report.in_state(FAILED):
        states["failed"] = FAILED
    missing = report.in_state(MISSING) if report.mode in ("check", "complete") else []
    if missing:
        states["missing"] = MISSING

    from jitgemm.families.batched import BatchedProblem
    from jitgemm.families.gemm import GemmProblem
    from jitgemm.families.grouped import GroupedProblem

    def row(label: str, kernels: Sequence[Kernel], problem: Problem | None = None) -> tuple[object, ...]:
        counts = [len(kernels), *(sum(kernel.state == state for kernel in kernels) for state in states.values())]
        if problem is None:
            return (label, None, None, None, None, *counts)
        if not isinstance(problem, (GemmProblem, GroupedProblem, BatchedProblem)):  # only n matters, if anything
            return (label, getattr(problem, "n", None), None, str(problem), None, *counts)
        recipe = problem.recipe if problem.layout == "nt" else f"{problem.recipe} {problem.layout}"
        if not isinstance(problem, GemmProblem):
            recipe = f"{problem.groups} groups {problem.kind}, {recipe}"
        return (label, problem.n, problem.k, recipe, problem.d_dtype, *counts)

    print_table(
        ["layer", ">n", ">k", "recipe", "D", ">needed", *(f">{name}" for name in states)],
        [
            row(named.layer, [kernel for kernel in report.kernels if named in kernel.problems], named.problem)
            for named in report.problems
        ],
        total=row("together", report.kernels),
    )
    if missing:
        print_table(
            ["missing", "kernel", "arch"],
            [
                (kernel.key[:SHORT_KEY], family_of(kernel.spec).describe(kernel.spec), kernel.spec.arch)
                for kernel in missing
            ],
        )
    for note in report.notes:
        print(printable(f"note: {note}"))
    print(_summary(report))
    if spilling := sum(1 for kernel in report.kernels if kernel.spill_bytes):
        print(f"{spilling} kernels spill registers")
    failures: dict[str, list[Kernel]] = {}
    for kernel in report.in_state(FAILED):
        failures.setdefault(_headline(kernel.error or ""), []).append(kernel)
    for headline, kernels in failures.items():
        example = kernels[0]
        description = family_of(example.spec).describe(example.spec)
        print_error(f"{len(kernels)} failed, such as {description} ({example.key[:SHORT_KEY]}): {headline}")
    if report.not_uploaded:
        print_error(f"{len(report.not_uploaded)} kernels are in the cache, but not in {settings.current().remote}")
    if report.interrupted:
        print_error(f"interrupted; {len(report.in_state(MISSING))} kernels are not built, the same command continues")
    elif missing:
        print_error(f"{len(missing)} of {len(report.kernels)} kernels are not in the cache {report.cache}")


def _summary(report: Report) -> str:
    needed, hits, missing = len(report.kernels), len(report.in_state(HIT)), len(report.in_state(MISSING))
    where = f"{report.seconds:.1f} s; cache {printable(report.cache)}"
    if report.mode == "check":
        return f"{hits} of {needed} kernels cached, {missing} missing; {where}"
    verb, count = ("would build", missing) if report.mode == "dry run" else ("built", len(report.in_state(BUILT)))
    fetched = f" {len(report.in_state(FETCHED))} fetched," if report.in_state(FETCHED) else ""
    failed = len(report.in_state(FAILED))
    return f"{verb} {count} of {needed} kernels, {hits} already cached,{fetched} {failed} failed; {where}"


def _headline(error: str) -> str:
    """An error's first line and, where a compiler's log follows, the log's first error; --json has it all."""
    first, *log = error.splitlines() or [""]
    return " ".join([first, *(line.strip() for line in log if "error" in line)][:2])


def _needed(problems: Iterable[NamedProblem], devices: Sequence[Device], advance: Callable[[], None]) -> list[Kernel]:
    from jitgemm import heuristics
    from jitgemm.cache_key import cache_key

    users: dict[KernelSpec, set[NamedProblem]] = {}
    for named in problems:
        for device in devices:
            for spec in heuristics.enumerate_specs(named.problem, device):
                users.setdefault(spec, set()).add(named)
            advance()
    return [Kernel(spec, cache_key(spec), askers) for spec, askers in users.items()]


def require_tools(directory: Path) -> None:
    """Say once, before any worker starts, what all of them would fail for.

    Raises:
        EnvironmentFaultError: the cache can't be written.
        CompileError: there is no NVRTC, and no remote layer that answers.
        SettingsError: ``JITGEMM_REMOTE`` needs a package that is not installed.
    """
    from jitgemm.compiler import find_nvrtc
    from jitgemm.remote import default_remote

    remote = default_remote()
    if remote is None or not remote.answers():
        find_nvrtc()
    if fault := write_fault(directory):
        raise EnvironmentFaultError(f"the cache directory {directory} cannot be written: {fault}")


def _build(kernels: Sequence[Kernel], jobs: int, directory: Path, advance: Callable[[], None]) -> None:
    from jitgemm.cache_tools.workers import build_all

    with contextlib.closing(
        build_all([kernel.spec for kernel in kernels], jobs, {"cache_dir": directory, "jit": "allow"})
    ) as outcomes:
        for index, outcome in outcomes:
            kernel = kernels[index]
            kernel.seconds, kernel.error = outcome.seconds, outcome.error
            kernel.registers, kernel.spill_bytes = outcome.registers, outcome.spill_bytes
            done = BUILT if outcome.compiled else FETCHED if outcome.fetched else HIT
            kernel.state = FAILED if outcome.error else done
            advance()


def _complete_remote(kernels: Sequence[Kernel], progress: bool) -> list[Kernel]:
    """Upload what the remote layer lacks of the kernels in the cache, if it is to be written; those it still lacks."""
    from jitgemm.builder import find_cached
    from jitgemm.remote import default_remote

    remote = default_remote() if settings.current().remote_write else None
    if remote is None:
        return []
    lacking = []
    cached = [kernel for kernel in kernels if kernel.state in (HIT, BUILT)]
    with progress_bar("uploading", "kernels", len(cached), shown=progress) as advance:
        for kernel in cached:
            cubin = find_cached(kernel.spec)
            if cubin is None or not remote.ensure(cubin):
                lacking.append(kernel)
            advance()
    return lacking


@contextlib.contextmanager
def progress_bar(verb: str, unit: str, total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr; yields what advances it by one."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} {unit}/s" if task.speed else f"- {unit}/s")

    with Progress(
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=Console(file=sys.stderr),
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
