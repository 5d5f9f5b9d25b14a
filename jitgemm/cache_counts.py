"""Counts of what a cache was asked for: of this process, and in a file of the directory of all processes.

A process adds its counts to the file when it has compiled, and when it ends: a hit never waits for that. The file has a
fixed size and is replaced in place under a lock; a process that cannot have the lock at once tries for half a second.
Counts of a process that is killed are lost, save those from before its last compile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from jitgemm.errors import CacheError
from jitgemm.trust import check_own_file, file_mode, open_trusted

_BYTES = 1024
_PATIENCE_SECONDS = 0.5


@dataclass
class Stats:
    """What was asked for so far, and how it was served."""

    memory_hits: int = 0  # not counted in a directory, which they never reach
    disk_hits: int = 0
    misses: int = 0
    remote_hits: int = 0
    remote_damaged: int = 0  # invalid objects met in the remote layer
    compiles: int = 0
    compile_seconds: float = 0.0
    damaged: int = 0  # invalid entries met on disk
    lock_waits: int = 0  # kernels that another process was compiling
    lock_wait_seconds: float = 0.0
    publish_failures: int = 0  # compiled kernels that could not be stored

    def add(self, other: Stats) -> None:
        """Add the counts of ``other``."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def to_dict(self) -> dict[str, int | float]:
        """The counts by name, seconds to the microsecond."""
        return {name: round(value, 6) for name, value in dataclasses.asdict(self).items()}


def add_to_file(path: Path, counts: Stats, *, shared: bool = False) -> bool:
    """Add to the counts in a file, which is made in a directory that exists; whether that could be done."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, file_mode(shared=False))
    except OSError:
        return False
    try:
        status = os.fstat(descriptor)
        check_own_file(status, status.st_gid if shared else None)
        if shared and status.st_uid == os.geteuid():
            os.fchmod(descriptor, file_mode(shared=True))
        if not _lock(descriptor):
            return False
        total = _parse(os.pread(descriptor, _BYTES, 0))
        total.add(counts)
        os.pwrite(descriptor, json.dumps(total.to_dict()).encode().ljust(_BYTES - 1) + b"\n", 0)
        return True
    except (OSError, CacheError):
        return False
    finally:
        os.close(descriptor)


def read_file(path: Path, *, group: int | None = None) -> Stats:
    """The counts in a file; zeros where there is none, or none that can be believed."""
    with contextlib.suppress(OSError, CacheError), open_trusted(path, group=group) as (descriptor, _):
        return _parse(os.pread(descriptor, _BYTES, 0))
    return Stats()


def _lock(descriptor: int) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)


def _parse(data: bytes) -> Stats:
    counts = Stats()
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        for name, value in json.loads(data).items():
            if name in vars(counts) and type(value) in (int, float) and 0 <= value < 1e18:
                setattr(counts, name, type(getattr(counts, name))(value))
    return counts
