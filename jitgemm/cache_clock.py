"""The clock by which the entries of a cache age: the system's, without its jumps.

A system clock may be a year off for a while, or differ between the clients of a shared directory; what it says must
neither age all entries at once nor keep them for ever. So the cache counts the time itself, in a small file: it goes on
with the system's clock, stands still where that one goes back a little, and leaves out jumps of more than a week. (So
it leaves out weeks in which nobody used the cache, too.) An entry's modification time is its last use by this clock.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from jitgemm.errors import CacheError
from jitgemm.trust import check_own_file, file_mode

LARGEST_STEP = 7 * 86_400.0
"""Seconds; a larger difference between two uses is a jump, which does not count."""

GRAIN = 2.0
"""Seconds; uses that follow each other more closely are marked once."""

_FORMAT = b"%020.6f %020.6f\n"  # what the system's clock said last, and this clock then
_BYTES = len(_FORMAT % (0, 0))


class CacheClock:
    """The clock in one file, which any number of processes may use at once."""

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        """Use ``path``, which is made when the clock is first asked; ``shared``: writable for its group."""
        self._path = path
        self._shared = shared

    def now(self) -> float:
        """Seconds since the epoch, roughly; the system's time where the file cannot be used."""
        system = time.time()
        with contextlib.suppress(OSError, CacheError):
            descriptor = self._open()
            try:
                return self._advance(descriptor, system)
            finally:
                os.close(descriptor)
        return system

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with contextlib.suppress(FileNotFoundError):
            return os.open(self._path, flags)
        descriptor = os.open(self._path, flags | os.O_CREAT, file_mode(shared=False))
        if self._shared:
            with contextlib.suppress(OSError):  # of another member, who made it just now
                os.fchmod(descriptor, file_mode(shared=True))
        return descriptor

    def _advance(self, descriptor: int, system: float) -> float:
        status = os.fstat(descriptor)
        check_own_file(status, status.st_gid if self._shared else None)
        content = os.pread(descriptor, _BYTES, 0)
        try:
            last, here = map(float, content.split())
            if not (len(content) == _BYTES and 0 <= last < 1e11 and 0 <= here < 1e11):  # also refuses nan
                raise ValueError
        except ValueError:  # new, or damaged
            last = here = system
            content = b""
        step = system - last
        if abs(step) > LARGEST_STEP:
            last = system
        elif step > 0:
            here += step
            last = system
        if not content or abs(step) >= GRAIN:
            os.pwrite(descriptor, _FORMAT % (last, here), 0)
        return here

    def mark(self, descriptor: int, status: os.stat_result) -> None:
        """Note that an open entry is used now; where that is not allowed, nothing happens.

        Args:
            descriptor: the open file.
            status: its status.
        """
        now = self.now()
        if abs(now - status.st_mtime) < GRAIN:
            return
        try:
            os.utime(descriptor, (now, now))
        except PermissionError:  # a member of the group may not set a time, only touch
            with contextlib.suppress(OSError):
                os.utime(descriptor)
        except OSError:
            pass
