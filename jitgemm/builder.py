"""From a ``KernelSpec`` to its cubin: memory, disk, the remote layer, then one compile per host."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jitgemm import hooks, settings
from jitgemm.cache import KernelCache, damaged_entries, default_cache, logger
from jitgemm.cache_counts import Stats
from jitgemm.cache_key import cache_key
from jitgemm.compiler import Cubin, compile_source, driver_accepts, driver_version, find_nvrtc, version_text
from jitgemm.errors import CacheError, CacheMissError, CompileError
from jitgemm.families.base import KernelSpec
from jitgemm.problem import Problem
from jitgemm.remote import Remote, default_remote, refused_objects
from jitgemm.settings import Settings

if TYPE_CHECKING:
    import filelock

MEMORY_ENTRIES = 1024
"""Kernels that the table in memory keeps; the oldest leave first."""

_LOOK_SECONDS = 0.1
"""How often who waits for a lock looks for the entry, which may be there though the lock is not free yet."""

_RETRY_SECONDS = 0.002

Source = Literal["memory", "disk", "remote", "compiled"]


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


def build(spec: KernelSpec, capturing: bool = False, problem: Problem | None = None) -> Built:
    """The cubin of ``spec``: from memory, from disk, fetched from the remote layer, or compiled here; then published.

    Any number of threads and processes that ask at once cause one fetch or compile. ``capturing`` says that a CUDA
    graph is being captured, which is no time for either. ``problem`` is what the kernel is needed for: messages then
    give the command that prewarms it.

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
        cubin, source = _from_disk_or_compiled(spec, in_force, capturing, problem)
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
    built = Built(cubin, source, time.perf_counter() - start)
    if source == "compiled":
        _tell_of_compile(spec, built, in_force, problem)
    return built


def find_cached(spec: KernelSpec) -> Cubin | None:
    """The cubin of ``spec`` if the cache on disk has it; nothing is compiled or written."""
    return _finder(default_cache(), cache_key(spec), settings.current(), use=False)()


def stats() -> Stats:
    """A copy of this process's counts."""
    with _guard:
        return dataclasses.replace(_stats, damaged=damaged_entries(), remote_damaged=refused_objects())


cache_stats = stats
"""Its public name."""


def forget() -> None:
    """Empty the table in memory, so that the next look-up goes to the disk."""
    with _guard:
        _memory.clear()


def _from_disk_or_compiled(
    spec: KernelSpec, in_force: Settings, capturing: bool, problem: Problem | None
) -> tuple[Cubin, Source]:
    cache, key = default_cache(), cache_key(spec)
    find = _finder(cache, key, in_force)
    cubin = find()
    _count(cache, Stats(disk_hits=1) if cubin is not None else Stats(misses=1))
    if cubin is not None:
        return cubin, "disk"
    hooks.emit("miss", spec)
    remote = None if capturing else default_remote()

    def missing() -> CacheMissError:
        why = "JITGEMM_JIT is 'forbid'" if in_force.jit == "forbid" else "a CUDA graph is being captured"
        where = f"{cache}{_unloadable(cache, key)}" + (f" or {remote.url}" if remote else "")
        return CacheMissError(
            f"kernel {key} ({_describe(spec)}) is not in the cache {where} and {why}; "
            f"build it with: {_prewarm_command(spec, problem, in_force)}"
        )

    if remote is None and (in_force.jit == "forbid" or capturing):
        raise missing()
    cubin, source = _compile_once(spec, key, cache, find, in_force, remote, missing)
    if source == "compiled":  # beside which this takes nothing; who waited must not wait for the counts, too
        cache.save_counts()
    return cubin, source


def _compile_once(
    spec: KernelSpec,
    key: str,
    cache: KernelCache,
    find: Callable[[], Cubin | None],
    in_force: Settings,
    remote: Remote | None,
    missing: Callable[[], CacheMissError],
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
            version, exact, refused = _nvrtc_in_use(in_force), in_force.exact_nvrtc, refused_objects()
            cubin = remote.find(key, version=version, exact=exact, loadable=_loadable)
            cache.count(Stats(remote_damaged=refused_objects() - refused))
            if cubin is None and forbidden:
                raise missing()
        source: Source = "remote" if cubin is not None else "compiled"
        if cubin is not None:
            _count(cache, Stats(remote_hits=1))
        else:
            cubin = compile_source(render(spec), spec, key)
            _count(cache, Stats(compiles=1, compile_seconds=cubin.metadata.compile_seconds))
        try:
            cache.publish(cubin)
        except (OSError, CacheError) as error:
            _count(cache, Stats(publish_failures=1))
            _warn_once(cache, error)
    if in_force.cache_max_bytes is not None:
        _keep_bound(cache, in_force.cache_max_bytes, cubin.metadata.size)
    if remote is not None and source == "compiled" and in_force.remote_write:
        remote.publish(cubin)  # the lock is free: nobody waits for this but the caller
    return cubin, source


def _keep_bound(cache: KernelCache, max_bytes: int, published: int) -> None:
    from jitgemm.cache_upkeep import keep_bound

    try:
        keep_bound(cache, max_bytes, published)
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


def _finder(cache: KernelCache, key: str, in_force: Settings, *, use: bool = True) -> Callable[[], Cubin | None]:
    def find() -> Cubin | None:
        # Which NVRTC is in use matters only where there is a choice, and looking for it takes longer than a hit.
        choice = in_force.exact_nvrtc or len(cache.versions(key)) > 1
        version = _nvrtc_in_use(in_force) if choice else None
        return cache.find(key, version=version, exact=in_force.exact_nvrtc, loadable=_loadable, use=use)

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


def _tell_of_compile(spec: KernelSpec, built: Built, in_force: Settings, problem: Problem | None) -> None:
    hooks.emit("compile", spec, built.seconds)
    if in_force.jit == "warn":
        logger.warning(
            "kernel %s (%s) was not in the cache %s: compiled in %.2f s; build it ahead with: %s",
            built.cubin.metadata.key,
            _describe(spec),
            default_cache(),
            built.seconds,
            _prewarm_command(spec, problem, in_force),
        )


def _prewarm_command(spec: KernelSpec, problem: Problem | None, in_force: Settings) -> str:
    variables = [f"{name}={shlex.quote(value)}" for name, value in settings.choosing_variables(in_force).items()]
    what = "--shapes FILE (or --preset NAME)"
    if problem is not None:
        what = f"--problem {shlex.quote(json.dumps(problem.without_m().to_dict()))}"
    return " ".join([*variables, f"jitgemm prewarm --arch {spec.arch} {what}"])


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
