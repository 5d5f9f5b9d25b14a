from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jitgemm.cache import KernelCache

Start = Callable[..., Any]
PROCESSES = 24


def _race(start: Start, count: int) -> list[dict[str, Any]]:
    workers = [start("build") for _ in range(count)]
    for worker in workers:
        worker.wait_until_ready()
    for worker in workers:
        worker.go()
    return [worker.result() for worker in workers]


def test_processes_on_a_cold_cache_cause_one_compile(start: Start, cache_dir: Path) -> None:
    results = _race(start, PROCESSES)
    assert sum(result["compiles"] for result in results) == 1
    assert len({result["sha256"] for result in results}) == 1
    assert all(result["stderr"] == "" for result in results)
    (entry,) = KernelCache(cache_dir).entries()
    assert entry.metadata is not None
    assert entry.metadata.sha256 == results[0]["sha256"]
    assert os.listdir(cache_dir / "staging") == []
    warm = _race(start, 1)[0]
    assert warm["source"] == "disk"
    assert warm["imported"] == []  # a hit neither renders nor locks


def test_a_waiter_goes_on_when_the_holder_is_killed(start: Start) -> None:
    holder, waiter = start("hold"), start("build", JITGEMM_LOCK_TIMEOUT="3600")
    holder.wait_until_ready()
    waiter.wait_until_ready()
    waiter.go()
    time.sleep(0.5)
    assert waiter.process.poll() is None
    holder.process.send_signal(signal.SIGKILL)
    result = waiter.result()
    assert result["source"] == "compiled"
    assert result["stderr"] == ""


def test_waiters_are_served_when_the_entry_appears_though_the_lock_is_held(start: Start) -> None:
    """Nobody has to wait for a lock that is handed round, or whose holder hangs after publishing."""
    holder = start("hold")
    holder.wait_until_ready()
    waiters = [start("build", JITGEMM_LOCK_TIMEOUT="3600") for _ in range(3)]
    private = start("build", JITGEMM_LOCK_TIMEOUT="0")
    for worker in (*waiters, private):
        worker.wait_until_ready()
    for waiter in waiters:
        waiter.go()
    private.go()
    assert private.result()["source"] == "compiled"
    assert [waiter.result()["source"] for waiter in waiters] == ["disk"] * 3


def test_a_stopped_holder_costs_a_bounded_wait_and_a_warning_that_names_it(start: Start) -> None:
    holder, waiter = start("hold"), start("build", JITGEMM_LOCK_TIMEOUT="0.3")
    holder.wait_until_ready()
    holder.process.send_signal(signal.SIGSTOP)
    waiter.wait_until_ready()
    waiter.go()
    result = waiter.result()
    assert result["source"] == "compiled"
    assert result["stderr"].count("\n") == 1
    assert f"process {holder.process.pid} " in result["stderr"]


@pytest.mark.parametrize("moment", [0.0, 0.05, 0.1, 0.2])
def test_a_builder_killed_at_any_moment_leaves_the_key_buildable(start: Start, moment: float) -> None:
    victim, heir = start("build"), start("build")
    victim.wait_until_ready()
    heir.wait_until_ready()
    victim.go()
    time.sleep(moment)
    victim.process.send_signal(signal.SIGKILL)
    victim.process.wait()
    heir.go()
    assert heir.result()["stderr"] == ""
