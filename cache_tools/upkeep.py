"""The commands that keep a cache in order: verify, prune, clear, stats, path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from jitgemm import settings
from jitgemm.cache import default_cache
from jitgemm.cache_tools.console import EXIT_FAILED, UsageError, print_json, print_table, printable
from jitgemm.cache_tools.inspect import SHORT_KEY
from jitgemm.cache_upkeep import Pruned, State, Verdict
from jitgemm.cache_upkeep import clear as remove_all
from jitgemm.cache_upkeep import prune as remove_some
from jitgemm.cache_upkeep import verify as examine

_MEANINGS: Mapping[str, str] = {
    "memory_hits": "served from this process's memory",
    "disk_hits": "served from disk",
    "misses": "not on disk when asked for",
    "remote_hits": "kernels fetched from the remote layer",
    "remote_damaged": "invalid objects met in the remote layer",
    "compiles": "compiled",
    "compile_seconds": "seconds spent compiling",
    "damaged": "invalid entries met",
    "lock_waits": "waits for another process that compiled the same",
    "lock_wait_seconds": "seconds spent waiting",
    "publish_failures": "compiled, but not stored",
}


def verify(*, as_json: bool) -> int:
    """Check every entry; the exit code is 1 if one is damaged or under a wrong key."""
    cache = default_cache()
    verdicts = list(examine(cache))
    counts = Counter(verdict.state for verdict in verdicts)
    states = {state: counts[state] for state in get_args(State)}
    if as_json:
        print_json(cache_dir=str(cache.directory), counts=states, entries=[_verdict_to_dict(v) for v in verdicts])
    else:
        if bad := [verdict for verdict in verdicts if verdict.state != "ok"]:
            print_table(
                ["key", "nvrtc", "state", "because", "directory"],
                [
                    (v.entry.key[:SHORT_KEY], v.entry.nvrtc_version, v.state, v.reason, v.entry.path.parents[2])
                    for v in bad
                ],
            )
        summary = ", ".join(f"{count} {state}" for state, count in states.items())
        print(printable(f"{len(verdicts)} entries: {summary}; in {cache}"))
    return EXIT_FAILED if counts["damaged"] or counts["wrong key"] else 0


def prune(
    *,
    max_bytes: int | None,
    unused_seconds: float | None,
    stale: bool,
    damaged: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove entries of the cache by some criteria and say what went.

    Raises:
        UsageError: there is no criterion.
    """
    bound = settings.current().cache_max_bytes if max_bytes is None else max_bytes
    if bound is None and unused_seconds is None and not stale and not damaged:
        raise UsageError(
            "prune: wants at least one of --max-size (or JITGEMM_CACHE_MAX_BYTES), --unused-for, --stale and --damaged"
        )
    cache = default_cache()
    pruned = remove_some(
        cache, max_bytes=bound, unused_seconds=unused_seconds, stale=stale, damaged=damaged, dry_run=dry_run
    )
    _print_pruned(pruned, cache.directory, dry_run=dry_run, as_json=as_json)


def clear(*, as_json: bool) -> None:
    """Remove every entry of the cache and say how many there were."""
    cache = default_cache()
    _print_pruned(remove_all(cache), cache.directory, dry_run=False, as_json=as_json)


def stats(*, as_json: bool) -> None:
    """Print what all processes have asked the cache for, and what it holds."""
    cache = default_cache()
    files = list(cache.files())
    size, bound = sum(file.size for file in files), settings.current().cache_max_bytes
    counts = cache.stats().to_dict()
    del counts["memory_hits"]  # a process's own matter
    if as_json:
        print_json(cache_dir=str(cache.directory), entries=len(files), bytes=size, max_bytes=bound, counts=counts)
        return
    print_table(
        ["count", ">", ""],
        [
            (name, f"{value:.1f}" if isinstance(value, float) else value, _MEANINGS[name])
            for name, value in counts.items()
        ],
    )
    limit = "" if bound is None else f" of {bound / 1e6:.1f}"
    print(printable(f"{len(files)} kernels, {size / 1e6:.1f}{limit} MB in {cache.directory}"))


def path(*, as_json: bool) -> None:
    """Print where kernels are stored."""
    cache = default_cache()
    if as_json:
        print_json(cache_dir=str(cache.directory), layers=[str(layer) for layer in cache.layers])
    else:
        print(printable(cache.directory))


def _print_pruned(pruned: Pruned, directory: Path, *, dry_run: bool, as_json: bool) -> None:
    size = sum(removal.file.size for removal in pruned.removed)
    if as_json:
        print_json(
            cache_dir=str(directory),
            dry_run=dry_run,
            removed=[
                {
                    "key": removal.file.key,
                    "nvrtc": removal.file.nvrtc_version,
                    "file": str(removal.file.path),
                    "bytes": removal.file.size,
                    "reason": printable(removal.reason),
                }
                for removal in pruned.removed
            ],
            removed_bytes=size,
            entries=pruned.entries,
            bytes=pruned.bytes,
        )
        return
    if dry_run and pruned.removed:
        print_table(
            ["key", "nvrtc", ">bytes", "because"],
            [(r.file.key[:SHORT_KEY], r.file.nvrtc_version, r.file.size, r.reason) for r in pruned.removed],
        )
    verb = "would remove" if dry_run else "removed"
    print(
        printable(
            f"{verb} {len(pruned.removed)} kernels, {size / 1e6:.1f} MB; "
            f"{pruned.entries} left, {pruned.bytes / 1e6:.1f} MB in {directory}"
        )
    )


def _verdict_to_dict(verdict: Verdict) -> dict[str, Any]:
    return {
        "key": verdict.entry.key,
        "nvrtc": verdict.entry.nvrtc_version,
        "file": str(verdict.entry.path),
        "bytes": verdict.entry.size,
        "state": verdict.state,
        "reason": verdict.reason,
        "served": verdict.served,
    }
