"""Worker processes that build kernels: spawned, replaced when they die, stopped without a trace."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from jitgemm import settings
from jitgemm.families import KernelSpec

BUILDS_PER_WORKER = 200
"""A worker retires after so many, so that what NVRTC may leak stays bounded."""

STOP_SECONDS = 5.0
"""How long a stopped worker may take to finish its kernel before it is killed."""


@dataclass(frozen=True)
class Outcome:
    """What became of one kernel; ``error`` is None where it is in the cache now."""

    compiled: bool = False
    fetched: bool = False
    seconds: float = 0.0
    registers: int | None = None
    spill_bytes: int | None = None
    error: str | None = None


Outcomes = Generator[tuple[int, Outcome], None, None]


def build_all(specs: Sequence[KernelSpec], jobs: int, overrides: Mapping[str, Any]) -> Outcomes:
    """Build ``specs`` in up to ``jobs`` processes; yields (index, outcome) as each is done.

    When the iteration ends early (Ctrl-C, an exception), workers finish the kernel at hand, so
    that nothing half-done stays behind; one that takes too long is killed.

    Args:
        specs: the kernels.
        jobs: how many processes.
        overrides: settings of the workers, by field name.
    """
    waiting = iter(enumerate(specs))
    workers: list[_Worker] = []

    def feed(worker: _Worker | None) -> None:
        """Give the next kernel to ``worker``, or to a new one; without a next one, let it go."""
        item = next(waiting, None)
        if item is None or (worker is not None and worker.builds >= BUILDS_PER_WORKER):
            if worker is not None:
                worker.close()
            worker = None
        if item is not None:
            if worker is None:
                worker = _Worker(overrides)
                workers.append(worker)
            worker.give(*item)

    try:
        for _ in range(min(jobs, len(specs))):
            feed(None)
        while busy := [worker for worker in workers if worker.index is not None]:
            ready = wait([worker.connection for worker in busy])
            for worker in busy:
                if worker.connection in ready:
                    index, outcome = worker.take()
                    feed(worker if worker.alive else None)
                    yield index, outcome
    finally:
        _stop(workers)


class _Worker:
    """The parent's side of one process: at most one kernel at a time."""

    def __init__(self, overrides: Mapping[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs, dict(overrides)), daemon=True)
        self.builds = 0
        self.index: int | None = None
        self.alive = True
        # Ctrl-C goes to the whole process group. A child inherits the blocked signal and never sees it: the
        # parent alone decides. multiprocessing unblocks the signal where it starts its tracker, so that comes first.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def give(self, index: int, spec: KernelSpec) -> None:
        self.index = index
        self.builds += 1
        with contextlib.suppress(OSError):  # it died idle; take() sees the end of the pipe and says so
            self.connection.send(spec)

    def take(self) -> tuple[int, Outcome]:
        assert self.index is not None
        index, self.index = self.index, None
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, OSError):
            self.close()
            self.process.join(STOP_SECONDS)
            outcome = Outcome(error=f"the worker process died ({_death(self.process.exitcode)})")
        return index, outcome

    def close(self) -> None:
        """Let the process end once it is done with its kernel."""
        self.alive = False
        self.connection.close()


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"signal {-exitcode}, {signal.strsignal(-exitcode)}"
    return f"exit code {exitcode}"


def _stop(workers: Sequence[_Worker]) -> None:
    try:
        for worker in workers:
            worker.close()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
    finally:  # also at a second Ctrl-C
        for worker in workers:
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()


class _Messages(logging.Handler):
    """Keeps the warnings of one build, which would garble the parent's progress bar."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _work(connection: Connection, overrides: Mapping[str, Any]) -> None:
    messages = _Messages()
    logger = logging.getLogger("jitgemm")
    logger.addHandler(messages)
    logger.propagate = False
    with settings.override(**overrides):
        while True:
            try:
                spec: KernelSpec = connection.recv()
                messages.texts.clear()
                connection.send(_build(spec, messages))
            except (EOFError, OSError):  # the parent let go, or is gone
                return


def _build(spec: KernelSpec, messages: _Messages) -> Outcome:
    start = time.perf_counter()
    try:
        from jitgemm.builder import build, find_cached
        from jitgemm.cache_tools.inspect import known

        built = build(spec)
        stored = find_cached(spec) is not None
    except Exception as error:  # one kernel's failure is a line of the report
        return Outcome(seconds=time.perf_counter() - start, error=f"{type(error).__name__}: {error}")
    metadata = built.cubin.metadata
    return Outcome(
        compiled=built.source == "compiled",
        fetched=built.source == "remote",
        seconds=time.perf_counter() - start,
        registers=known(metadata.registers),
        spill_bytes=known(metadata.spill_bytes),
        error=None if stored else "; ".join(["built, but not stored in the cache", *messages.texts]),
    )
