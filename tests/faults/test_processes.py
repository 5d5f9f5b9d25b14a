"""Scenarios 1 and 3 to 11: many processes and threads at one key, some of which die, stop or fork."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import KEY, SPEC, in_forked_child, in_processes, make_cubin, warnings_of

from jitgemm import builder, settings
from jitgemm import cache as module
from jitgemm.cache import KernelCache, default_cache, logger
from jitgemm.cache_key import cache_key
from jitgemm.cache_upkeep import clear, prune
from jitgemm.compiler import Cubin
from jitgemm.families.base import KernelSpec

Start = Callable[..., Any]
OTHER = KernelSpec.make("transpose_scales", "sm_90a", {"tile": 16, "threads": 256})


def _race(start: Start, count: int) -> list[dict[str, Any]]:
    workers = [start("build") for _ in range(count)]
    for worker in workers:
        worker.wait_until_ready()
    for worker in workers:
        worker.go()
    return [worker.result() for worker in workers]


def _build(index: int) -> dict[str, Any]:
    with warnings_of(logger) as texts:
        built = builder.build(SPEC)
    stats = builder.stats()
    return {
        "source": built.source,
        "sha256": built.cubin.metadata.sha256,
        "compiles": stats.compiles,
        "lock_waits": stats.lock_waits,
        "warnings": texts,
    }


def test_64_processes_on_a_cold_cache_cause_one_compile(cache_dir: Path) -> None:
    """Scenario 1."""
    before = builder.stats().compiles
    results = in_processes(64, _build)
    assert sum(result["compiles"] - before for result in results) == 1
    assert sorted(result["source"] for result in results) == ["compiled"] + ["disk"] * 63
    assert len({result["sha256"] for result in results}) == 1
    assert not any(result["warnings"] for result in results)
    (entry,) = KernelCache(cache_dir).entries()
    assert entry.metadata is not None
    assert entry.metadata.sha256 == results[0]["sha256"]


def test_new_processes_on_a_cold_cache_cause_one_compile(start: Start, cache_dir: Path) -> None:
    """Scenario 1, with nothing imported yet."""
    results = _race(start, 6)
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


def test_a_lost_race_to_publish_changes_nothing(tmp_path: Path) -> None:
    """Scenario 3: the winner's entry stays, and the loser has its own bytes."""
    cache = KernelCache(tmp_path / "cache")
    path = cache.publish(make_cubin())
    winner = path.stat().st_ino
    cache.publish(make_cubin(image=b"the loser's"))
    assert path.stat().st_ino == winner
    assert cache.find(KEY) == make_cubin()
    assert os.listdir(cache.directory / "staging") == []


def test_all_who_compile_privately_publish_and_use_their_own(start: Start, cache_dir: Path) -> None:
    """Scenario 3: eight at once, because someone sits on the lock; none reads what another published."""
    holder = start("hold")
    holder.wait_until_ready()

    def build(index: int) -> dict[str, Any]:
        compiled: list[bytes] = []
        compile_source = builder.compile_source

        def compile_once(*arguments: Any) -> Cubin:
            cubin = compile_source(*arguments)
            KernelCache.find = None  # type: ignore[assignment, method-assign]
            compiled.append(cubin.image)
            return cubin

        builder.compile_source = compile_once
        with settings.override(lock_timeout=0):
            built = builder.build(SPEC)
        return {"own": built.cubin.image == compiled[0], "source": built.source}

    results = in_processes(8, build)
    assert results == [{"own": True, "source": "compiled"}] * 8
    (entry,) = KernelCache(cache_dir).entries()
    assert entry.problem is None
    assert os.listdir(cache_dir / "staging") == []


def test_a_stale_negative_look_up_costs_a_compile(cache_dir: Path) -> None:
    """Scenario 4: this process does not see what is there, as an NFS client may not for a while."""
    whole = builder.build(SPEC).cubin
    builder.forget()

    def child() -> None:
        KernelCache.find = lambda self, *args, **more: None  # type: ignore[method-assign]
        built = builder.build(SPEC)
        assert built.source == "compiled"
        assert built.cubin.image == whole.image

    assert in_forked_child(child) == 0
    assert builder.build(SPEC).source == "disk"


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EBUSY, errno.ENOENT])
@pytest.mark.parametrize("step", ["unlink", "close", "fsync of the folder", "unlock"])
def test_failures_of_the_clean_up_after_a_publish_are_ignored(cache_dir: Path, step: str, code: int) -> None:
    """Scenario 5."""

    def child() -> None:
        published = False
        replace, unlink, close, flock = os.replace, os.unlink, os.close, fcntl.flock

        def refuse(*arguments: Any) -> Any:
            raise OSError(code, os.strerror(code))

        def replace_then_fail(*arguments: Any) -> None:
            nonlocal published
            replace(*arguments)
            published = True
            if step == "fsync of the folder":
                module._sync_folder = refuse

        def close_once(descriptor: int) -> None:
            close(descriptor)
            if step == "close" and published:
                os.close = close
                refuse()

        def unlock(descriptor: int, operation: int) -> None:
            flock(descriptor, operation)
            if step == "unlock" and operation == fcntl.LOCK_UN:
                refuse()

        os.replace, os.close, fcntl.flock = replace_then_fail, close_once, unlock
        os.unlink = refuse if step == "unlink" else unlink  # type: ignore[assignment]
        with warnings_of(logger) as texts:
            assert builder.build(SPEC).source == "compiled"
        assert published
        assert texts == []

    assert in_forked_child(child) == 0
    assert builder.build(SPEC).source == "disk"


def test_64_threads_cause_one_compile(cache_dir: Path) -> None:
    """Scenario 6."""
    before = builder.stats().compiles
    barrier = threading.Barrier(64)
    images: list[bytes] = []

    def ask() -> None:
        barrier.wait()
        images.append(builder.build(SPEC).cubin.image)

    threads = [threading.Thread(target=ask) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builder.stats().compiles - before == 1
    assert len(images) == 64
    assert len(set(images)) == 1


def test_a_waiter_goes_on_when_the_holder_is_killed(start: Start) -> None:
    """Scenario 7."""
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
    """Scenario 8."""
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
    """Scenarios 7 and 12."""
    victim, heir = start("build"), start("build")
    victim.wait_until_ready()
    heir.wait_until_ready()
    victim.go()
    time.sleep(moment)
    victim.process.send_signal(signal.SIGKILL)
    victim.process.wait()
    heir.go()
    assert heir.result()["stderr"] == ""


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_without_locks_everyone_publishes_after_one_warning(cache_dir: Path, code: int) -> None:
    """Scenario 9."""

    def build(index: int) -> dict[str, Any]:
        def refuse(*arguments: object) -> None:
            raise OSError(code, os.strerror(code))

        fcntl.flock = refuse
        return _build(index)

    results = in_processes(4, build)
    assert {result["source"] for result in results} <= {"compiled", "disk"}
    assert len({result["sha256"] for result in results}) == 1
    for result in results:
        if result["source"] == "compiled":
            (text,) = result["warnings"]
            assert os.strerror(code) in text
    (entry,) = KernelCache(cache_dir).entries()
    assert entry.problem is None


def test_lock_files_outlive_prune_and_clear(start: Start, cache_dir: Path) -> None:
    """Scenario 10: whoever comes later waits at the same file as who holds it now."""
    holder = start("hold")
    holder.wait_until_ready()
    path = cache_dir / "locks" / f"{cache_key(SPEC)}.lock"
    before = path.stat().st_ino
    cache = default_cache()
    prune(cache, max_bytes=0, unused_seconds=0, stale=True, damaged=True)
    clear(cache)
    assert path.stat().st_ino == before
    with settings.override(lock_timeout=0), warnings_of(logger) as texts:
        assert builder.build(SPEC).source == "compiled"
    assert f"process {holder.process.pid} has held its lock" in texts[0]


def test_a_fork_while_a_thread_compiles_leaves_parent_and_child_working(cache_dir: Path) -> None:
    """Scenario 11: the lock is the parent's, and stays so; with NVRTC loaded, the child compiles."""
    compiling, go_on = threading.Event(), threading.Event()
    compile_source = builder.compile_source

    def slow(*arguments: Any) -> Cubin:
        compiling.set()
        assert go_on.wait(30)
        return compile_source(*arguments)

    builder.compile_source = slow
    try:
        thread = threading.Thread(target=builder.build, args=(SPEC,))
        thread.start()
        assert compiling.wait(30)
    finally:
        builder.compile_source = compile_source

    def child() -> None:
        assert builder.build(OTHER).source == "compiled"
        with settings.override(lock_timeout=0), warnings_of(logger) as texts:
            assert builder.build(SPEC).source == "compiled"
        assert f"process {os.getppid()} has held its lock" in texts[0]

    assert in_forked_child(child) == 0
    go_on.set()
    thread.join()
    assert builder.build(SPEC).source == "memory"
    builder.forget()
    assert in_forked_child(lambda: _expect(builder.build(SPEC).source == "disk")) == 0


def _expect(condition: bool) -> None:
    assert condition
