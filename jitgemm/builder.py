"""From a ``KernelSpec`` to its cubin: memory, then disk, then one compile per host. Used by calls and by prewarm."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jitgemm import settings
from jitgemm.cache import KernelCache, damaged_entries, default_cache, logger
from jitgemm.cache_counts import Stats
from jitgemm.cache_key import cache_key
from jitgemm.compiler import Cubin, compile_source, driver_accepts, driver_version, find_nvrtc, version_text
from jitgemm.errors import CacheError, CacheMissError, CompileError
from jitgemm.families.base import KernelSpec
from jitgemm.settings import Settings

if TYPE_CHECKING:
    import filelock

MEMORY_ENTRIES = 1024
"""Kernels that the table in memory keeps; the oldest leave first."""

_LOOK_SECONDS = 0.1
"""How often who waits for a lock looks for the entry, which may be there though the lock is not free yet."""

_RETRY_SECONDS = 0.002

Source = Literal["memory", "disk", "compiled"]


@dataclass(frozen=True)
class Built:
    """A kernel's machine code, where it came from, and how long that took."""

    cubin: Cubin
    source: Source
    seconds: float


@dataclass(frozen=True)
class _Place:
    """A kernel and the settings that decide where it may come from."""

    spec: KernelSpec
    cache_dir: tuple[Path, ...] | None
    nvrtc: Path | None
    exact_nvrtc: bool


_guard = threading.Lock()
_memory: dict[_Place, Cubin] = {}
_pending: dict[_Place, Future[Cubin]] = {}
_stats = Stats()
_warned: set[Path] = set()


def build(spec: KernelSpec, capturing: bool = False) -> Built:
    """The cubin of ``spec``: from memory, from disk, or compiled here and published.

    Any number of threads and processes that ask at once cause one compile. ``capturing`` says that a CUDA graph is
    being captured, which is no time to compile.

    Raises:
        CacheMissError: it would have to be compiled, and ``JITGEMM_JIT`` is ``forbid`` or a graph is being captured.
        CompileError: NVRTC is missing or rejected the kernel. Failures are not remembered.
        CacheError: the cache directory is not safe to use.
    """
    start = time.perf_counter()
    in_force = settings.current()
    place = _Place(spec, in_force.cache_dir, in_force.nvrtc, in_force.exact_nvrtc)
    while True:
        with _guard:
            cubin = _memory.get(place)
            if cubin is not None:
                _stats.memory_hits += 1
                return Built(cubin, "memory", time.perf_counter() - start)
            pending = _pending.get(place)
            if pending is None:
                mine = _pending[place] = Future()
                break
        with contextlib.suppress(CancelledError):  # its thread was interrupted: try again, maybe as the one who works
            return Built(pending.result(), "memory", time.perf_counter() - start)
    try:
        cubin, source = _from_disk_or_compiled(spec, in_force, capturing)
    except BaseException as error:
        with _guard:
            del _pending[place]
        if isinstance(error, Exception) and not capturing:
            mine.set_exception(error)
        else:
            mine.cancel()  # the others may do what this thread may not
        raise
    with _guard:
        _remember(place, cubin)
        del _pending[place]
    mine.set_result(cubin)
    return Built(cubin, source, time.perf_counter() - start)


def find_cached(spec: KernelSpec) -> Cubin | None:
    """The cubin of ``spec`` if the cache on disk has it; nothing is compiled or written."""
    return _finder(default_cache(), cache_key(spec), settings.current())()


def stats() -> Stats:
    """A copy of this process's counts."""
    with _guard:
        return dataclasses.replace(_stats, damaged=damaged_entries())


cache_stats = stats
"""Its public name."""


def forget() -> None:
    """Empty the table in memory, so that the next look-up goes to the disk."""
    with _guard:
        _memory.clear()


def _from_disk_or_compiled(spec: KernelSpec, in_force: Settings, capturing: bool) -> tuple[Cubin, Source]:
    cache, key = default_cache(), cache_key(spec)
    find = _finder(cache, key, in_force)
    cubin = find()
    _count(cache, Stats(disk_hits=1) if cubin is not None else Stats(misses=1))
    if cubin is not None:
        return cubin, "disk"
    if in_force.jit == "forbid" or capturing:
        why = "JITGEMM_JIT is 'forbid'" if in_force.jit == "forbid" else "a CUDA graph is being captured"
        where = f"{cache.directory}{_unloadable(cache, key)}"
        raise CacheMissError(
            f"kernel {key} ({_describe(spec)}) is not in the cache {where} and {why}; "
            f"build it with: jitgemm prewarm --arch {spec.arch} --shapes FILE (or --preset NAME)"
        )
    if in_force.jit == "warn":
        logger.warning("kernel %s (%s) is not in the cache %s: compiling it", key, _describe(spec), cache.directory)
    cubin, source = _compile_once(spec, key, cache, find, in_force)
    if source == "compiled":  # beside which this takes nothing; who waited must not wait for the counts, too
        cache.save_counts()
    return cubin, source


def _compile_once(
    spec: KernelSpec, key: str, cache: KernelCache, find: Callable[[], Cubin | None], in_force: Settings
) -> tuple[Cubin, Source]:
    from jitgemm.render import render

    with contextlib.ExitStack() as held:
        cubin = _take_turn(held, cache, key, find, in_force.lock_timeout)
        if cubin is not None:
            return cubin, "disk"
        cubin = compile_source(render(spec), spec, key)
        _count(cache, Stats(compiles=1, compile_seconds=cubin.metadata.compile_seconds))
        try:
            cache.publish(cubin)
        except (OSError, CacheError) as error:
            _count(cache, Stats(publish_failures=1))
            _warn_once(cache, error)
    if in_force.cache_max_bytes is not None:
        _keep_bound(cache, in_force.cache_max_bytes)
    return cubin, "compiled"


def _keep_bound(cache: KernelCache, max_bytes: int) -> None:
    from jitgemm.cache_upkeep import prune

    try:
        if cache.size() > max_bytes:
            prune(cache, max_bytes=max_bytes)
    except OSError as error:
        _warn_once(cache, error)


def _take_turn(
    held: contextlib.ExitStack, cache: KernelCache, key: str, find: Callable[[], Cubin | None], timeout: float
) -> Cubin | None:
    """Wait until ``key`` is published, which is returned, or is this process's to compile, which is None.

    The lock is left to ``held``. There is none if the file system has no locks, or if its holder took too long.
    """
    import filelock

    start = time.monotonic()
    free: threading.Event | None = None
    try:
        while True:
            if not cache.is_locked(key):
                with contextlib.suppress(filelock.Timeout):
                    lock = cache.lock(key)
                    lock.acquire(timeout=0)
                    held.callback(_release, lock)
                    return find()  # it may have been published since the first look
                time.sleep(_RETRY_SECONDS)  # somebody was quicker, or was just looking whether it is free
            remaining = start + timeout - time.monotonic()
            if remaining <= 0:
                break
            if free is None or free.is_set():
                free = cache.when_unlocked(key)
            free.wait(min(remaining, _LOOK_SECONDS))
            # All waiters look at once, rather than one by one as the lock goes round.
            cubin = find() if cache.versions(key) else None
            if cubin is not None:
                return cubin
    except (OSError, NotImplementedError, CacheError) as error:
        _warn_once(cache, error)
        return None
    finally:
        if free is not None:
            _count(cache, Stats(lock_waits=1, lock_wait_seconds=time.monotonic() - start))
    logger.warning(
        "kernel %s: process %s has held its lock for more than %g s; compiling it here too",
        key,
        cache.lock_holder(key) or "(unknown)",
        timeout,
    )
    return None


def _release(lock: filelock.BaseFileLock) -> None:
    with contextlib.suppress(OSError):  # the kernel is built: nothing that goes wrong now may lose it
        lock.release()


def _finder(cache: KernelCache, key: str, in_force: Settings) -> Callable[[], Cubin | None]:
    def find() -> Cubin | None:
        # Which NVRTC is in use matters only where there is a choice, and looking for it takes longer than a hit.
        choice = in_force.exact_nvrtc or len(cache.versions(key)) > 1
        version = _nvrtc_in_use(in_force) if choice else None
        return cache.find(key, version=version, exact=in_force.exact_nvrtc, loadable=_loadable)

    return find


def _nvrtc_in_use(in_force: Settings) -> str | None:
    try:
        return find_nvrtc().version_text
    except CompileError:
        if in_force.exact_nvrtc:
            raise
        return None  # a cache that was filled elsewhere serves without any NVRTC


def _loadable(version: str) -> bool:
    major, minor = map(int, version.split("."))
    return driver_accepts((major, minor))


def _unloadable(cache: KernelCache, key: str) -> str:
    """What to say of entries that are there and of no use here."""
    driver = driver_version()
    too_new = [version for version in cache.versions(key) if not _loadable(version)]
    if driver is None or not too_new:
        return ""
    return f" (save as compiled by NVRTC {', '.join(too_new)}, too new for the CUDA {version_text(driver)} driver)"


def _count(cache: KernelCache, counts: Stats) -> None:
    with _guard:
        _stats.add(counts)
    cache.count(counts)


def _remember(place: _Place, cubin: Cubin) -> None:
    if len(_memory) >= MEMORY_ENTRIES:
        del _memory[next(iter(_memory))]
    _memory[place] = cubin


def _describe(spec: KernelSpec) -> str:
    from jitgemm.families import family_of

    return family_of(spec).describe(spec)


def _warn_once(cache: KernelCache, error: Exception) -> None:
    with _guard:
        first = cache.directory not in _warned
        _warned.add(cache.directory)
    if first:
        logger.warning(
            "kernel cache: %s cannot be used in full (%s); kernels may be compiled more than once",
            cache.directory,
            error,
        )


def _reset_after_fork() -> None:
    """A forked child has no other threads: nothing is pending, and nobody holds the guard."""
    global _guard
    _guard = threading.Lock()
    _pending.clear()


os.register_at_fork(after_in_child=_reset_after_fork)
