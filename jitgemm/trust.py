"""Files and directories that nobody else could have written, and how ours are made.

Trusted are this user and root; in a cache that is shared explicitly, the members of its directory's group too. What
others may write, by its mode, is theirs as much as what they own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from jitgemm.errors import CacheError


class InvalidEntryError(CacheError):
    """A file at the place of an entry is not a whole, untampered entry of that name."""


@contextlib.contextmanager
def open_trusted(
    path: Path, *, group: int | None = None, with_folder: bool = False
) -> Iterator[tuple[int, os.stat_result]]:
    """Open a regular file that only someone trusted could have written; follows no link, never blocks.

    Args:
        path: the file.
        group: the group whose members are trusted too, if any.
        with_folder: whether its folder must be trusted too, and no link.

    Raises:
        InvalidEntryError: it is not such a file.
        OSError: it cannot be opened.
    """
    if with_folder:
        _check_folder(path.parent, group)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        check_file(status, group)
        yield descriptor, status
    finally:
        os.close(descriptor)


def check_file(status: os.stat_result, group: int | None = None) -> None:
    """Check an open file by its ``fstat``.

    Raises:
        InvalidEntryError: it is not a regular file, or someone else could have written it.
    """
    if not stat.S_ISREG(status.st_mode):
        raise InvalidEntryError("it is not a regular file")
    if fault := _fault(status, group):
        raise InvalidEntryError(f"it {fault}")


def check_own_file(status: os.stat_result, group: int | None = None) -> None:
    """Check an open file that is about to be written, by its ``fstat``.

    Raises:
        InvalidEntryError: it is not a trusted regular file, or is also one of another name.
    """
    check_file(status, group)
    if status.st_nlink > 1:
        raise InvalidEntryError("it has a second name")


def read_trusted(path: Path, limit: int) -> bytes:
    """Content of a regular file that only this user or root could have written; follows no link, never blocks.

    Raises:
        InvalidEntryError: it is not such a file, or larger than ``limit`` bytes.
        OSError: it cannot be read.
    """
    with open_trusted(path) as (descriptor, status):
        return read_all(descriptor, status, limit)


def read_all(descriptor: int, status: os.stat_result, limit: int) -> bytes:
    """The content of an open file.

    Raises:
        InvalidEntryError: it is larger than ``limit`` bytes.
        OSError: it cannot be read.
    """
    if status.st_size > limit:
        raise InvalidEntryError("it is larger than an entry may be")
    with open(descriptor, "rb", closefd=False) as file:
        return file.read(limit + 1)


def check_directory(directory: Path, *, shared: bool = False) -> os.stat_result | None:
    """Check that nobody else can put files into a directory, or another directory in its place.

    Args:
        directory: an absolute path; what does not exist of it yet is not checked.
        shared: trust the members of the directory's group.

    Returns:
        The directory's status, or None if it does not exist or cannot be reached.

    Raises:
        CacheError: somebody can; the message has the command that closes it.
    """
    found = _status(directory)
    group = trusted_group(found) if shared and found else None
    real = Path(os.path.realpath(directory))
    for path in dict.fromkeys((directory, *directory.parents, real, *real.parents)):
        status = _status(path)
        if status is None or not stat.S_ISDIR(status.st_mode):  # nothing can be put there
            continue
        what = f"the kernel cache {directory}" if path == directory else f"{path}, above the kernel cache {directory},"
        if not _is_trusted(status, group) and not (path != directory and _is_unmapped_root(status)):
            raise CacheError(
                f"{what} belongs to user {status.st_uid}, who could put any code there; take it over with: "
                f"chown {'-R ' if path == directory else ''}{os.geteuid()} '{path}', or set JITGEMM_CACHE_DIR"
            )
        # The sticky bit keeps others from moving what we own. It does not keep them from making files, which where the
        # group is inherited would pass for its members'.
        sticky = status.st_mode & stat.S_ISVTX and not (shared and path in (directory, real))
        if status.st_mode & stat.S_IWOTH and not sticky:
            raise CacheError(
                f"{what} can be written by everyone, who could put any code there; "
                f"close it with: chmod o-w '{path}', or set JITGEMM_CACHE_DIR"
            )
    return found


def trusted_group(status: os.stat_result) -> int | None:
    """The group of a shared cache's directory, if this process is a member of it."""
    return status.st_gid if status.st_gid in (os.getegid(), *os.getgroups()) else None


def make_directory(directory: Path, *, shared: bool) -> None:
    """Make the directory of a cache, ours alone or its group's, unless it exists; what exists must still be checked.

    Raises:
        OSError: it cannot be made.
    """
    for ancestor in reversed(directory.parents):
        if not ancestor.exists():
            with contextlib.suppress(FileExistsError):
                # Members of a shared cache's group must get through; whether others may is for the umask to say.
                os.mkdir(ancestor, 0o755 if shared else 0o700)
    _make(directory, shared=shared)


def make_folder(path: Path, *, shared: bool, group: int | None) -> None:
    """Make a folder of a cache, ours alone or its group's; one that exists must be no link, and of someone trusted.

    Args:
        path: the folder.
        shared: whether to make it for its group.
        group: the group whose members are trusted, if any.

    Raises:
        InvalidEntryError: someone else can put files there.
        OSError: it cannot be made, or something else is there.
    """
    if not _make(path, shared=shared):
        _check_folder(path, group)


def _check_folder(path: Path, group: int | None) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{path} is not a folder")
    if fault := _fault(status, group):
        raise InvalidEntryError(f"{path} {fault}")


def _make(path: Path, *, shared: bool) -> bool:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return False
    if shared:  # by chmod, which heeds no umask; what is made inside inherits the group
        os.chmod(path, 0o2770)
    return True


def file_mode(*, shared: bool) -> int:
    """The mode of files that are made in a cache."""
    return 0o660 if shared else 0o600


def _is_trusted(status: os.stat_result, group: int | None) -> bool:
    return status.st_uid in (os.geteuid(), 0) or (group is not None and status.st_gid == group)


def _fault(status: os.stat_result, group: int | None) -> str | None:
    """Why someone who is not trusted could have written a file, or could put one into a folder."""
    if not _is_trusted(status, group):
        return f"belongs to user {status.st_uid}"
    mode = stat.S_IMODE(status.st_mode)
    if mode & stat.S_IWOTH:
        return f"can be written by everyone (mode {mode:04o})"
    if mode & stat.S_IWGRP and status.st_gid != group:
        return f"can be written by group {status.st_gid} (mode {mode:04o})"
    return None


def _is_unmapped_root(status: os.stat_result) -> bool:
    """Whether it belongs to someone without a name here, as all that is root's does in a container without root."""
    return status.st_uid == _overflow_uid()


@functools.cache
def _overflow_uid() -> int | None:
    """What the kernel shows in place of users that this user namespace does not have; None in the first one."""
    try:
        first, _, count = Path("/proc/self/uid_map").read_text().split()[:3]
        unmapped = int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return None
    return None if (int(first), int(count)) == (0, 2**32 - 1) else unmapped


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # made later, or unusable, which shows when it is used
        return None
