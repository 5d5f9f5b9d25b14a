"""The fastest of many calls, with a made-up clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from jitgemm.timing import measure


class Clock:
    """Says what a table holds for each call, and counts."""

    def __init__(self, times: dict[object, float]) -> None:
        self.times, self.calls = times, Counter[object]()

    def __call__(self, call: Callable[[], object]) -> float:
        name = call()
        self.calls[name] += 1
        return self.times[name]

    def empty(self) -> None: ...

    def check(self) -> None: ...


def test_hopeless_calls_drop_out_and_the_best_are_timed_again() -> None:
    times: dict[object, float] = {f"c{i}": 10.0 + i for i in range(10)} | {"slow": 31.0, "chosen": 29.0}
    clock = Clock(times)
    calls = {str(name): lambda name=name: name for name in times}
    result, errors = measure(calls, clock, keep=["chosen", "slow"], finalists=5, samples=200)
    assert {name: measured.us for name, measured in result.items()} == times
    assert errors == {}
    assert clock.calls["slow"] == result["slow"].samples == 2
    assert result["c9"].samples == 10
    assert clock.calls["c9"] == 12
    again = [name for name, measured in result.items() if measured.samples == 200]
    assert again == [*(f"c{i}" for i in range(5)), "chosen"]


def test_luck_does_not_win() -> None:
    """A call that looked fast and was not timed again counts as slower than the best that was."""
    lucky = iter([5.0] * 2 + [20.0] * 10)  # fast in the pilots only
    drifting = iter([10.0] * 12 + [30.0] * 9)  # slower when it is timed again
    steady = iter([11.0] * 12)
    calls = {"lucky": lambda: next(lucky), "drifting": lambda: next(drifting), "steady": lambda: next(steady)}
    clock = Clock({value: value for value in (5.0, 10.0, 11.0, 20.0, 30.0)})
    result, _ = measure(calls, clock, keep=[], finalists=1, samples=9)
    assert result["drifting"] == (30.0, 9)
    assert result["steady"].us == pytest.approx(30.0)
    assert min(result, key=lambda name: result[name].us) == "drifting"


def test_calls_that_fail_are_left_out() -> None:
    def fail() -> object:
        raise ValueError("broken")

    result, errors = measure(
        {"good": lambda: "good", "bad": fail}, Clock({"good": 100.0}), keep=["bad"], finalists=3, samples=7
    )
    assert result == {"good": (100.0, 7)}
    assert errors == {"bad": "ValueError: broken"}
    assert measure({"bad": fail}, Clock({}), keep=[], finalists=3, samples=7) == ({}, errors)


def test_a_lost_gpu_ends_it() -> None:
    class Lost(Clock):
        def check(self) -> None:
            raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error"):
        measure({"unknown": lambda: "unknown"}, Lost({}), keep=[], finalists=1, samples=1)
