"""The pool of processes, with kernels that fail and workers that die."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from jitgemm.cache_tools import workers
from jitgemm.cache_tools.workers import Outcome, build_all
from jitgemm.families import KernelSpec


def transposes(count: int) -> list[KernelSpec]:
    """Small kernels that differ."""
    return [KernelSpec.make("transpose_scales", "sm_90a", {"tile": 32, "threads": 32 * (i + 1)}) for i in range(count)]


def _results(specs: list[KernelSpec], jobs: int, cache: Path) -> list[Outcome]:
    return [outcome for _, outcome in sorted(build_all(specs, jobs, {"cache_dir": cache}), key=lambda item: item[0])]


def test_every_kernel_is_reported_once(tmp_path: Path) -> None:
    results = _results(transposes(5), 2, tmp_path / "cache")
    assert [(r.compiled, r.error) for r in results] == [(True, None)] * 5
    again = _results(transposes(5), 8, tmp_path / "cache")
    assert [(r.compiled, r.error) for r in again] == [(False, None)] * 5
    assert [r.registers for r in again] == [r.registers for r in results]


def test_a_failed_kernel_is_a_result(tmp_path: Path) -> None:
    good = transposes(2)
    absent = KernelSpec.make("absent", "sm_90a", {})
    broken = KernelSpec.make("transpose_scales", "sm_90a", {"tile": "}", "threads": 32})
    results = _results([absent, good[0], broken, good[1]], 2, tmp_path / "cache")
    assert [r.error is None for r in results] == [False, True, False, True]
    assert "'absent'" in str(results[0].error)
    assert "CompileError" in str(results[2].error)
    assert "error:" in str(results[2].error)  # NVRTC's log is there
    assert len(list((tmp_path / "cache").rglob("*.jgk"))) == 2


def test_a_dead_worker_is_replaced(tmp_path: Path) -> None:
    specs = transposes(6)
    outcomes = {}
    started: list[workers._Worker] = []
    original = workers._Worker.__init__

    def remember(self: workers._Worker, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[arg-type]
        started.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers._Worker, "__init__", remember)
        for index, outcome in build_all(specs, 1, {"cache_dir": tmp_path / "cache"}):
            outcomes[index] = outcome
            if len(outcomes) == 1:
                pid = started[0].process.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
    assert sorted(outcomes) == list(range(6))
    failed = [outcome for outcome in outcomes.values() if outcome.error]
    assert len(failed) == 1
    assert "signal 9" in str(failed[0].error)
    assert len(started) == 2


def test_workers_retire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BUILDS_PER_WORKER", 2)
    results = _results(transposes(5), 1, tmp_path / "cache")
    assert [r.error for r in results] == [None] * 5


def test_leaving_early_stops_the_workers(tmp_path: Path) -> None:
    import multiprocessing

    with contextlib.closing(build_all(transposes(20), 2, {"cache_dir": tmp_path / "cache"})) as outcomes:
        next(outcomes)
    assert multiprocessing.active_children() == []
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


def test_nothing_to_build(tmp_path: Path) -> None:
    assert list(build_all([], 4, {"cache_dir": tmp_path})) == []
