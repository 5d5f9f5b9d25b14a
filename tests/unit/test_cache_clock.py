from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from jitgemm.cache_clock import GRAIN, LARGEST_STEP, CacheClock

START = 1_000_000_000.0


class System:
    """A system clock that a test sets."""

    def __init__(self) -> None:
        self.now = START

    def time(self) -> float:
        return self.now


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    system = System()
    monkeypatch.setattr(time, "time", system.time)
    return system


@pytest.fixture
def clock(tmp_path: Path, system: System) -> CacheClock:
    clock = CacheClock(tmp_path / "clock")
    assert clock.now() == START
    return clock


def test_it_goes_with_the_systems(clock: CacheClock, system: System, tmp_path: Path) -> None:
    for step in (0.5, 100.0, 86_400.0, LARGEST_STEP):
        system.now += step
        assert clock.now() == pytest.approx(system.now)
        assert CacheClock(tmp_path / "clock").now() == pytest.approx(system.now)  # another process


@pytest.mark.parametrize("jump", [365 * 86_400.0, -365 * 86_400.0, LARGEST_STEP + 1])
def test_a_jump_does_not_count(clock: CacheClock, system: System, jump: float) -> None:
    system.now += jump
    assert clock.now() == START
    system.now += 100
    assert clock.now() == START + 100
    system.now -= jump
    assert clock.now() == START + 100
    system.now += 100
    assert clock.now() == START + 200


def test_clients_whose_clocks_differ_do_not_make_it_run(clock: CacheClock, system: System) -> None:
    for _ in range(1000):
        system.now += 3600.0  # of the one that is an hour ahead
        clock.now()
        system.now -= 3600.0 - GRAIN
        clock.now()
    assert clock.now() <= system.now + 3600.0


def test_small_steps_are_not_lost(clock: CacheClock, system: System) -> None:
    for _ in range(100):
        system.now += GRAIN / 4
        clock.now()
    assert clock.now() == pytest.approx(system.now)


@pytest.mark.parametrize("content", [b"", b"x" * 42, b"nan nan\n", b"1e300 1e300\n", b"\xff" * 1000])
def test_a_damaged_file_begins_anew(clock: CacheClock, system: System, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "clock").write_bytes(content)
    assert clock.now() == START
    system.now += 10
    assert clock.now() == START + 10


def test_without_a_file_it_is_the_systems(tmp_path: Path, system: System) -> None:
    assert CacheClock(tmp_path / "missing/clock").now() == START
    assert not (tmp_path / "missing").exists()


def test_marking_is_coarse_and_never_fails(clock: CacheClock, system: System, tmp_path: Path) -> None:
    path = tmp_path / "entry"
    path.touch()
    os.utime(path, (START - 100, START - 100))

    def mark() -> float:
        with path.open("rb") as file:
            clock.mark(file.fileno(), os.fstat(file.fileno()))
        return path.stat().st_mtime

    assert mark() == START
    system.now += GRAIN / 2
    assert mark() == START
    system.now += GRAIN
    assert mark() == pytest.approx(system.now)
    clock.mark(-1, os.stat_result([0] * 10))  # a file system that refuses
