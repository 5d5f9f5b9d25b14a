"""How calls on a GPU are timed, by the tuner and by the benchmarks.

A timed call has the L2 flushed before it, by reading (dirty lines of a flush by writing would be written back in
the timed region), then a kernel that sleeps until the host has enqueued everything, then an event, the call, an
event. Calls that are compared take turns.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

Call = Callable[[], object]

_cuda: Any = torch.cuda  # whose stubs lack types

FLUSH_BYTES = 512 << 20
_ATTEMPTS = 8
_MAX_SLEEP_CYCLES = 4_000_000  # 2 ms
_PILOTS, _HOPELESS = 2, 3.0
_SHORT_US, _SHORT_SAMPLES, _SAMPLES = 50.0, 10, 5


class Timer(Protocol):
    """Times one call on the GPU, in microseconds."""

    def __call__(self, call: Call) -> float:
        """The time of one call."""

    def empty(self) -> None:
        """Launch a kernel that does nothing."""

    def check(self) -> None:
        """Raise what the GPU has failed with, if anything."""


class CudaTimer:
    """Times one call on the current GPU and stream, from a clean L2 and with the host's time hidden."""

    def __init__(self) -> None:
        self._buffer = torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self._sink = torch.empty((), dtype=torch.int32, device="cuda")
        self._sleep_cycles = 120_000  # 60 us; grows where it does not suffice
        self.exposed = 0  # samples that include host time, for all that was tried
        self._start, self._end = (_cuda.Event(enable_timing=True) for _ in range(2))
        begin = time.monotonic()
        while time.monotonic() - begin < 0.5:  # until the clocks are up
            self._flush()
            torch.cuda.synchronize()

    def __call__(self, call: Call) -> float:
        """The time of one call."""
        for attempt in range(_ATTEMPTS):
            self._flush()
            _cuda._sleep(self._sleep_cycles)
            self._start.record()
            call()
            self._end.record()
            hidden = not self._start.query()  # the GPU has not got there: nothing that follows waited for the host
            self._end.synchronize()
            if hidden:
                break
            if attempt:  # once may be a hiccup of the host
                self._sleep_cycles = min(2 * self._sleep_cycles, _MAX_SLEEP_CYCLES)
        else:
            self.exposed += 1
        return float(self._start.elapsed_time(self._end)) * 1e3

    def empty(self) -> None:
        """Launch a kernel that does nothing."""
        _cuda._sleep(0)

    def check(self) -> None:
        """Raise what the GPU has failed with, if anything."""
        torch.cuda.synchronize()

    def _flush(self) -> None:
        torch.amax(self._buffer, 0, out=self._sink)


def interleave(running: dict[str, Call], count: int, timer: Timer, errors: dict[str, str]) -> dict[str, list[float]]:
    """Time calls in turn (A B A B), ``count`` times each.

    Args:
        running: calls by name; one that raises is removed.
        count: rounds.
        timer: the clock.
        errors: gets the error's text of each that raised.

    Returns:
        Times in microseconds by name, of those that never raised.

    Raises:
        RuntimeError: the GPU failed, and can't go on in this process.
    """
    times: dict[str, list[float]] = {name: [] for name in running}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(count):
            for name, call in list(running.items()):
                try:
                    times[name].append(timer(call))
                except Exception as error:
                    timer.check()
                    errors[name] = error_text(error)
                    del running[name], times[name]
    finally:
        if collecting:
            gc.enable()
    return times


class Measured(NamedTuple):
    """The median time of a call, of so many."""

    us: float
    samples: int


def measure(
    calls: Mapping[str, Call], timer: Timer, *, keep: Sequence[str], finalists: int, samples: int
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Find the fastest of many calls: all are timed a few times in turn, the best again, more often.

    Those that take three times as long as the best drop out after two rounds. A few samples of many calls make some
    look fast by chance: what was not timed again counts as slower than the best of what was.

    Args:
        calls: by name.
        timer: the clock.
        keep: calls that are timed with the best at the end, unless they dropped out.
        finalists: how many are timed again beside these.
        samples: times that each of them is timed again.

    Returns:
        Times by name, and the error's text of each call that failed.

    Raises:
        RuntimeError: the GPU failed, and can't go on in this process.
    """
    errors: dict[str, str] = {}
    running = dict(calls)
    times = interleave(running, _PILOTS, timer, errors)
    best = min((min(taken) for taken in times.values()), default=0.0)
    running = {name: call for name, call in running.items() if min(times[name]) <= _HOPELESS * best}
    times.update(interleave(running, _SHORT_SAMPLES if best < _SHORT_US else _SAMPLES, timer, errors))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    again = sorted(running, key=lambda name: (medians[name], name))[:finalists]
    again += [name for name in keep if name in running and name not in again]
    finals = interleave({name: running[name] for name in again}, samples, timer, errors)
    times.update(finals)
    result = {n: Measured(statistics.median(t), len(t)) for n, t in times.items() if n not in errors}
    fastest = math.nextafter(min((result[name].us for name in finals), default=0.0), math.inf)
    return {n: t if n in finals else t._replace(us=max(t.us, fastest)) for n, t in result.items()}, errors


def error_text(error: BaseException) -> str:
    """One line on an exception."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
