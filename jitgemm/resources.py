"""How many kernels this machine can compile at once: by its cores and its memory, or what of them we may use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

BYTES_PER_JOB = 256 << 20
"""Memory to count on for one compiler: 120 MB were measured, with room for larger kernels."""


def compile_jobs(root: Path = Path("/")) -> int:
    """Compilers that may run at once: one a core, as far as memory and control groups allow; at least 1.

    Args:
        root: of the file system that has ``proc`` and ``sys``.
    """
    jobs = len(os.sched_getaffinity(0))
    for limit in (_available(root), *_group_memory(root)):
        jobs = min(jobs, limit // BYTES_PER_JOB)
    for quota in _group_cores(root):
        jobs = min(jobs, round(quota))
    return max(1, jobs)


def _available(root: Path) -> int:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 62


def _group_memory(root: Path) -> Iterator[int]:
    """Bytes that this process's control group, and each above it, may still take."""
    for version, folder in _groups(root):
        limit, use = ("memory.max", "memory.current") if version == 2 else _VERSION_1
        with contextlib.suppress(OSError, ValueError):  # no limit reads "max"; no controller, no file
            most, used = (int((folder / name).read_text()) for name in (limit, use))
            # The kernel gives back what it caches of files before it kills anyone.
            cached = next((line for line in _lines(folder / "memory.stat") if line.startswith("inactive_file ")), "0 0")
            yield max(0, most - used + int(cached.split()[1]))


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _group_cores(root: Path) -> Iterator[float]:
    """Cores' worth of time that this process's control group, and each above it, may take."""
    for version, folder in _groups(root):
        with contextlib.suppress(OSError, ValueError):
            if version == 2:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:  # version 1 says -1 where there is none
                yield quota / period


def _groups(root: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of this process's control groups, and of those above them."""
    mount = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        names = [name for name in controllers.split(",") if name in ("memory", "cpu")]
        if controllers and not names:
            continue
        for top in [mount / name for name in names] or [mount]:
            folder = top / path.lstrip("/")
            # In a container the path may be that of the host, which is not mounted: then the top is the group.
            for one in (folder, *folder.parents):
                yield (1 if names else 2), one
                if one == top:
                    break


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
