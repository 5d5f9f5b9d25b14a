"""What keeps a cache in order: verify, prune, clear. Every function may run beside any number of readers and writers.

Removing an entry takes nothing from who has it open, and costs whoever wants it later a compile. Lock files stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jitgemm import settings
from jitgemm.cache import EntryFile, EntryInfo, KernelCache, WrongKeyError, check_spec
from jitgemm.cache_key import build_digest
from jitgemm.compiler import driver_accepts, driver_version, find_nvrtc, version_text
from jitgemm.errors import CompileError

MOMENT_SECONDS = 10.0
"""An entry that was used or published so recently counts as in use, and stays."""

_BOUND_STEPS = 64
_unseen: dict[Path, int] = {}  # bytes published in a directory since it was looked at last; threads may lose a few

State = Literal["ok", "stale", "wrong key", "damaged"]


@dataclass(frozen=True)
class Verdict:
    """What is to be said of an entry.

    ``stale``: other templates, generators or options made it, or another NVRTC than the one in use here.
    ``served``: whether look-ups here can still answer with it, as they do with an entry that only its NVRTC makes stale
    while there is no better one.
    """

    entry: EntryInfo
    state: State
    reason: str | None = None
    served: bool = False


@dataclass(frozen=True)
class Removal:
    """An entry that prune took, or would take, and why."""

    file: EntryFile
    reason: str


@dataclass
class Pruned:
    """What a prune did: entries removed, and the count and bytes of those that are left."""

    removed: list[Removal] = field(default_factory=list)
    entries: int = 0
    bytes: int = 0


def verify(cache: KernelCache) -> Iterator[Verdict]:
    """Read every entry of every directory and say what it is worth here."""
    version: str | None = None
    with contextlib.suppress(CompileError):  # without an NVRTC no version is the one in use
        version = find_nvrtc().version_text
    for entry in cache.entries():
        yield _verdict(cache, entry, version)


def _verdict(cache: KernelCache, entry: EntryInfo, version: str | None) -> Verdict:
    metadata = entry.metadata
    if metadata is None:
        return Verdict(entry, "wrong key" if entry.wrong_key else "damaged", entry.problem)
    try:
        check_spec(metadata)
    except WrongKeyError as error:
        return Verdict(entry, "wrong key", str(error))
    if metadata.build != build_digest(metadata.arch):
        return Verdict(entry, "stale", "the templates, or what generates from them, are others now")
    number = tuple(map(int, entry.nvrtc_version.split(".")))
    driver = driver_version()
    if driver is not None and not driver_accepts((number[0], number[1])):
        reason = f"NVRTC {entry.nvrtc_version} is too new for the CUDA {version_text(driver)} driver"
        return Verdict(entry, "stale", reason)
    if version in (None, entry.nvrtc_version):
        return Verdict(entry, "ok", served=True)
    best = not settings.current().exact_nvrtc and version not in cache.versions(entry.key)
    reason = f"NVRTC {entry.nvrtc_version} compiled it, and {version} is in use here"
    return Verdict(entry, "stale", reason, served=best)


def prune(
    cache: KernelCache,
    *,
    max_bytes: int | None = None,
    unused_seconds: float | None = None,
    stale: bool = False,
    damaged: bool = False,
    dry_run: bool = False,
) -> Pruned:
    """Remove entries of the first directory, and what killed writers left there.

    Entries used within ``MOMENT_SECONDS`` stay, unless they are damaged. Ages are those of the cache's own clock, which
    leaves out jumps of the system's.

    Args:
        cache: the cache.
        max_bytes: remove the least recently used until the entries take no more than this.
        unused_seconds: remove those that have not been used for so long.
        stale: remove those that look-ups here can no longer answer with.
        damaged: remove those that are not valid, or are under a wrong key.
        dry_run: only say what would be removed.
    """
    if not dry_run:
        cache.sweep()
    now = cache.clock.now()
    files = {file.path: file for file in cache.files()}
    in_use = {path for path, file in files.items() if 0 <= now - file.last_used < MOMENT_SECONDS}
    reasons: dict[EntryFile, str] = {}
    if stale or damaged:
        for verdict in verify(cache):
            file = files.get(verdict.entry.path)
            if file is None:
                continue
            broken = verdict.state in ("damaged", "wrong key")
            if (broken and damaged) or (
                stale and verdict.state == "stale" and not verdict.served and file.path not in in_use
            ):
                reasons[file] = verdict.reason or verdict.state
    candidates = sorted(
        (file for file in files.values() if file.path not in in_use and file not in reasons),
        key=lambda file: (file.last_used, file.path),
    )
    total = sum(file.size for file in files.values() if file not in reasons)
    for file in candidates:
        if unused_seconds is not None and now - file.last_used > unused_seconds:
            reasons[file] = f"not used for {(now - file.last_used) / 86_400:.1f} days"
        elif max_bytes is not None and total > max_bytes:
            reasons[file] = "least recently used"
        else:
            continue
        total -= file.size
    removed = [Removal(file, reason) for file, reason in reasons.items() if dry_run or cache.remove_file(file)]
    # What others removed or published meanwhile counts as it is now.
    left = list(cache.files()) if removed and not dry_run else [file for file in files.values() if file not in reasons]
    return Pruned(removed, len(left), sum(file.size for file in left))


def keep_bound(cache: KernelCache, max_bytes: int, published: int) -> None:
    """Prune the cache to ``max_bytes`` once it is larger, after this process has published so many more bytes.

    To look takes time for every entry. So a process looks when it first publishes, and then whenever it has published
    another 64th of the bound, for which a prune makes room.

    Raises:
        OSError: the file system refused.
    """
    step = max_bytes // _BOUND_STEPS
    unseen = _unseen.get(cache.directory, step) + published
    _unseen[cache.directory] = 0 if unseen >= step else unseen
    if unseen >= step and cache.size() > max_bytes:
        prune(cache, max_bytes=max_bytes - step)


def clear(cache: KernelCache) -> Pruned:
    """Remove every entry of the first directory, and what killed writers left there."""
    cache.sweep()
    removed = [Removal(file, "clear") for file in cache.files() if cache.remove_file(file, even_if_used=True)]
    left = list(cache.files())
    return Pruned(removed, len(left), sum(file.size for file in left))
