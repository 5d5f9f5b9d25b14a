"""From a ``KernelSpec`` to its cubin: memory, disk, the remote layer, then one compile per host."""

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
from jitgemm.cache_key import cache_key
from jitgemm.compiler import Cubin, compile_source, driver_accepts, find_nvrtc
from jitgemm.errors import CacheError, CacheMissError, CompileError
from jitgemm.families.base import KernelSpec
from jitgemm.remote import Remote, default_remote, refused_objects
from jitgemm.settings import Settings

if TYPE_CHECKING:
    import filelock

MEMORY_ENTRIES = 1024
"""Kernels that the table in memory keeps; the oldest leave first."""

_POLL_SECONDS = (0.001, 0.02)  # between looks at a lock that another process holds: at first, and at most

Source = Literal["memory", "disk", "remote", "compiled"]


@dataclass(frozen=True)
class Built:
    """A kernel's machine code, where it came from, and how long that took."""

    cubin: Cubin
    source: Source
    seconds: float


@dataclass
class Stats:
    """What this process has asked for so far, and how it was served."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0  # of memory and disk
    remote_hits: int = 0
    remote_damaged: int = 0  # invalid objects met in the remote layer
    compiles: int = 0
    damaged: int = 0  # invalid entries met on disk


@dataclass(frozen=True)
class _Place:
    """A kernel and the settings that decide where it may come from."""

    spec: KernelSpec
    cache_dir: Path | None
    nvrtc: Path | None
    exact_nvrtc: bool


_guard = threading.Lock()
_memory: dict[_Place, Cubin] = {}
_pending: dict[_Place, Future[Cubin]] = {}
_stats = Stats()
_warned: set[Path] = set()


def build(spec: KernelSpec, capturing: bool = False) -> Built:
    """The cubin of ``spec``: from memory, from disk, fetched from the remote layer, or compiled here; then published.

    Any number of threads and processes that ask at once cause one fetch or compile. ``capturing`` says that a CUDA
    graph is being captured, which is no time for either.

    Raises:
        CacheMissError: it would have to be compiled, and ``JITGEMM_JIT`` is ``forbid`` or a graph is being captured.
        CompileError: NVRTC is missing or rejected the kernel. Failures are not remembered.
        CacheError: the cache directory is not safe to use.
        SettingsError: ``JITGEMM_REMOTE`` needs a package that is not installed.
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
        return dataclasses.replace(_stats, damaged=damaged_entries(), remote_damaged=refused_objects())


def forget() -> None:
    """Empty the table in memory, so that the next look-up goes to the disk."""
    with _guard:
        _memory.clear()


def _from_disk_or_compiled(spec: KernelSpec, in_force: Settings, capturing: bool) -> tuple[Cubin, Source]:
    cache, key = default_cache(), cache_key(spec)
    find = _finder(cache, key, in_force)
    cubin = find()
    with _guard:
        _stats.disk_hits += cubin is not None
        _stats.misses += cubin is None
    if cubin is not None:
        return cubin, "disk"
    remote = None if capturing else default_remote()
    if remote is None and (in_force.jit == "forbid" or capturing):
        raise _miss(spec, key, str(cache.directory), in_force)
    return _compile_once(spec, key, cache, find, in_force, remote)


def _miss(spec: KernelSpec, key: str, where: str, in_force: Settings) -> CacheMissError:
    why = "JITGEMM_JIT is 'forbid'" if in_force.jit == "forbid" else "a CUDA graph is being captured"
    return CacheMissError(
        f"kernel {key} ({_describe(spec)}) is not in the cache {where} and {why}; "
        f"build it with: jitgemm prewarm --arch {spec.arch} --shapes FILE (or --preset NAME)"
    )


def _compile_once(
    spec: KernelSpec,
    key: str,
    cache: KernelCache,
    find: Callable[[], Cubin | None],
    in_force: Settings,
    remote: Remote | None,
) -> tuple[Cubin, Source]:
    """Compile the kernel, unless another process publishes it first or the remote layer has it."""
    from jitgemm.render import render

    forbidden = in_force.jit == "forbid"
    with contextlib.ExitStack() as held:
        # One process asks the remote for all. Who may not compile asks for itself: if the remote is dead, nobody will
        # publish anything, and each would sit through the timeouts of those before it.
        cubin = None if forbidden else _take_turn(held, cache, key, find, in_force.lock_timeout)
        if cubin is not None:
            return cubin, "disk"
        if remote is not None:
            version, exact = _nvrtc_in_use(in_force), in_force.exact_nvrtc
            cubin = remote.find(key, version=version, exact=exact, loadable=_loadable)
            if cubin is None and forbidden:
                raise _miss(spec, key, f"{cache.directory} or {remote.url}", in_force)
        source: Source = "remote" if cubin is not None else "compiled"
        if cubin is None:
            if in_force.jit == "warn":
                logger.warning(
                    "kernel %s (%s) is not in the cache %s: compiling it", key, _describe(spec), cache.directory
                )
            cubin = compile_source(render(spec), spec, key)
        with _guard:
            _stats.remote_hits += source == "remote"
            _stats.compiles += source == "compiled"
        try:
            cache.publish(cubin)
        except (OSError, CacheError) as error:
            _warn_once(cache, error)
    if remote is not None and source == "compiled" and in_force.remote_write:
        remote.publish(cubin)  # the lock is free: nobody waits for this but the caller
    return cubin, source


def _take_turn(
    held: contextlib.ExitStack, cache: KernelCache, key: str, find: Callable[[], Cubin | None], timeout: float
) -> Cubin | None:
    """Wait until ``key`` is published, which is returned, or is this process's to compile, which is None.

    The lock is left to ``held``. There is none if the file system has no locks, or if its holder took too long.
    """
    import filelock

    deadline = time.monotonic() + timeout
    pause, longest = _POLL_SECONDS
    try:
        lock = cache.lock(key)
        while True:
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(timeout=0)
                held.callback(_release, lock)
                return find()  # it may have been published since the first look
            cubin = find()  # all waiters at once, rather than one by one as the lock goes round
            if cubin is not None:
                return cubin
            if time.monotonic() >= deadline:
                break
            time.sleep(pause)
            pause = min(2 * pause, longest)
    except (OSError, NotImplementedError) as error:
        _warn_once(cache, error)
        return None
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
