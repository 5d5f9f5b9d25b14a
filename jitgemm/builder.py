"""From a ``KernelSpec`` to its cubin: memory, then disk, then one compile per host. Used by calls and by prewarm."""

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
from jitgemm.cache_key import cache_key
from jitgemm.compiler import Cubin, compile_source, driver_accepts, find_nvrtc
from jitgemm.errors import CacheError, CacheMissError, CompileError
from jitgemm.families.base import KernelSpec
from jitgemm.problem import Problem
from jitgemm.settings import Settings

if TYPE_CHECKING:
    import filelock

MEMORY_ENTRIES = 1024
"""Kernels that the table in memory keeps; the oldest leave first."""

_POLL_SECONDS = (0.001, 0.02)  # between looks at a lock that another process holds: at first, and at most

Source = Literal["memory", "disk", "compiled"]


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
    misses: int = 0
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


def build(spec: KernelSpec, capturing: bool = False, problem: Problem | None = None) -> Built:
    """The cubin of ``spec``: from memory, from disk, or compiled here and published.

    Any number of threads and processes that ask at once cause one compile. ``capturing`` says that a CUDA graph is
    being captured, which is no time to compile. ``problem`` is what the kernel is needed for: messages then give the
    command that prewarms it.

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
    return _finder(default_cache(), cache_key(spec), settings.current())()


def stats() -> Stats:
    """A copy of this process's counts."""
    with _guard:
        return dataclasses.replace(_stats, damaged=damaged_entries())


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
    with _guard:
        _stats.disk_hits += cubin is not None
        _stats.misses += cubin is None
    if cubin is not None:
        return cubin, "disk"
    hooks.emit("miss", spec)
    if in_force.jit == "forbid" or capturing:
        why = "JITGEMM_JIT is 'forbid'" if in_force.jit == "forbid" else "a CUDA graph is being captured"
        raise CacheMissError(
            f"kernel {key} ({_describe(spec)}) is not in the cache {cache.directory} and {why}; "
            f"build it with: {_prewarm_command(spec, problem, in_force)}"
        )
    return _compile_once(spec, key, cache, find, in_force.lock_timeout)


def _compile_once(
    spec: KernelSpec, key: str, cache: KernelCache, find: Callable[[], Cubin | None], timeout: float
) -> tuple[Cubin, Source]:
    from jitgemm.render import render

    with contextlib.ExitStack() as held:
        cubin = _take_turn(held, cache, key, find, timeout)
        if cubin is not None:
            return cubin, "disk"
        cubin = compile_source(render(spec), spec, key)
        with _guard:
            _stats.compiles += 1
        try:
            cache.publish(cubin)
        except (OSError, CacheError) as error:
            _warn_once(cache, error)
    return cubin, "compiled"


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


def _tell_of_compile(spec: KernelSpec, built: Built, in_force: Settings, problem: Problem | None) -> None:
    hooks.emit("compile", spec, built.seconds)
    if in_force.jit == "warn":
        logger.warning(
            "kernel %s (%s) was not in the cache %s: compiled in %.2f s; build it ahead with: %s",
            built.cubin.metadata.key,
            _describe(spec),
            default_cache().directory,
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
