"""The kernel cache on disk: one file per kernel, visible whole or not at all.

An entry is staged in the cache's own tree, synced, and renamed into place; it holds its own digest,
and a reader checks the very bytes that it hands on. Locks only save work: publishing is correct
without them. ::

    <directory>/kernels/<kk>/<key>.<NVRTC version>.jgk  entries, by the first two digits of their key
    <directory>/locks/<key>.lock                        one per key, holding the PID of its last owner; kept
    <directory>/staging/                                entries being written
    <directory>/clock, stats.json                       see jitgemm.cache_clock and jitgemm.cache_counts

Other directories may lie below the first as layers: they are read and never written.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jitgemm import settings
from jitgemm.cache_clock import CacheClock
from jitgemm.cache_counts import Stats, add_to_file, read_file
from jitgemm.cache_key import key_of
from jitgemm.compiler import Cubin, CubinMetadata
from jitgemm.errors import CacheError
from jitgemm.families.base import KernelSpec
from jitgemm.trust import (
    InvalidEntryError,
    check_directory,
    check_own_file,
    file_mode,
    make_directory,
    make_folder,
    open_trusted,
    read_all,
    read_trusted,
    trusted_group,
)

if TYPE_CHECKING:
    import filelock

__all__ = [
    "MAX_ENTRY_BYTES",
    "EntryInfo",
    "InvalidEntryError",
    "KernelCache",
    "WrongKeyError",
    "check_spec",
    "damaged_entries",
    "decode",
    "decode_named",
    "default_cache",
    "encode",
    "logger",
    "read_trusted",
]

logger = logging.getLogger("jitgemm")
logger.addHandler(logging.NullHandler())

_ATTEMPTS = 8  # to replace an invalid entry; one that others heal is valid at the second

MAGIC = b"JITGEMM\x02"  # the last byte is the version of the format
_HEADER = struct.Struct("<8sIQ")  # magic, bytes of metadata, bytes of payload; then both, then the digest
_DIGEST_BYTES = hashlib.sha256().digest_size
MAX_METADATA_BYTES = 64 << 10
MAX_PAYLOAD_BYTES = 64 << 20
MAX_ENTRY_BYTES = _HEADER.size + MAX_METADATA_BYTES + MAX_PAYLOAD_BYTES + _DIGEST_BYTES

_NAME = re.compile(r"(?P<key>[0-9a-f]{64})\.(?P<version>[0-9]{1,4}\.[0-9]{1,4})\.jgk")


class WrongKeyError(InvalidEntryError):
    """An entry is whole, but of another key or NVRTC version than its name says."""


class EntryFile(NamedTuple):
    """One file among the entries, not read: which it is, and its size and last use.

    ``identity`` tells it from a file that has taken its place, or has been used, since.
    """

    path: Path
    key: str
    nvrtc_version: str
    size: int
    last_used: float  # by the cache's clock
    identity: tuple[int, ...]


@dataclass(frozen=True)
class EntryInfo:
    """One file among the entries: its metadata, or why it is not valid."""

    path: Path
    key: str
    nvrtc_version: str
    size: int
    metadata: CubinMetadata | None
    problem: str | None
    wrong_key: bool = False  # whether the problem is that it is another kernel's entry


class _Layer:
    """The entries in one directory."""

    def __init__(self, directory: Path, *, shared: bool) -> None:
        self.directory = directory
        self.kernels = directory / "kernels"
        self.group: int | None = None  # whose members are trusted, once the directory exists
        self._shared = shared
        self._exists = False
        self._check()

    def check(self) -> None:
        """Refuse a directory that others can write, if it did not exist before and does now."""
        if not self._exists and self.directory.exists():
            self._check()

    def _check(self) -> None:
        status = check_directory(self.directory, shared=self._shared)
        self._exists = status is not None
        self.group = trusted_group(status) if self._shared and status else None

    def path_of(self, key: str, version: str) -> Path:
        name = f"{key}.{version}.jgk"
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"{key!r} with NVRTC {version!r} cannot name an entry of the kernel cache")
        return self.kernels / key[:2] / name

    def versions(self, key: str) -> list[str]:
        matches = (_NAME.fullmatch(name) for name in _names(self.kernels / key[:2]) if name.startswith(key))
        return [match["version"] for match in matches if match and match["key"] == key]

    def files(self) -> Iterator[EntryFile]:
        for folder in sorted(_names(self.kernels)):
            inside = self.kernels / folder
            for name in sorted(_names(inside)):
                match = _NAME.fullmatch(name)
                if match is None or not name.startswith(folder):
                    continue
                path = inside / name
                with contextlib.suppress(OSError):  # removed meanwhile
                    status = os.lstat(path)
                    found = match["key"], match["version"], status.st_size, status.st_mtime
                    yield EntryFile(path, *found, _identity(status))

    def read(self, path: Path, clock: CacheClock | None = None) -> Cubin:
        """A valid entry, which is marked as used now where a clock is given."""
        with open_trusted(path, group=self.group, with_folder=True) as (descriptor, status):
            cubin = decode_named(read_all(descriptor, status, MAX_ENTRY_BYTES), path.name)
            if clock is not None:
                clock.mark(descriptor, status)
        return cubin


class KernelCache:
    """The cache in one directory, above read-only layers. Any number of processes and threads may use it at once."""

    def __init__(self, directory: Path, layers: Sequence[Path] = (), *, shared: bool = False) -> None:
        """Use ``directory``, which is made when something is first written.

        Args:
            directory: where entries are published.
            layers: directories that are searched after it, in this order, and never written.
            shared: make files for the group of the directory, and trust its members.

        Raises:
            CacheError: someone else could put kernels there.
        """
        self.directory = directory
        self.layers = tuple(layers)
        self.clock = CacheClock(directory / "clock", shared=shared)
        self._shared = shared
        self._layers = [_Layer(one, shared=shared) for one in (directory, *layers)]
        self._own = self._layers[0]
        self._locks = directory / "locks"
        self._staging = directory / "staging"
        self._uncounted = Stats()
        _caches.add(self)

    def __str__(self) -> str:
        """The directories, as ``JITGEMM_CACHE_DIR`` lists them."""
        return os.pathsep.join(map(str, (self.directory, *self.layers)))

    def find(
        self,
        key: str,
        *,
        version: str | None = None,
        exact: bool = False,
        loadable: Callable[[str], bool] | None = None,
        use: bool = True,
    ) -> Cubin | None:
        """The kernel of ``key`` compiled by NVRTC ``version``, else the newest that is ``loadable``.

        A damaged entry counts as missing. ``exact`` accepts ``version`` only. Of equal versions, that of the first
        directory is taken. ``use`` says that the kernel is wanted for use, which is marked and counted; otherwise
        nothing is written.

        Raises:
            CacheError: someone else could put kernels into a directory, which has been made meanwhile.
        """
        for layer in self._layers:
            layer.check()
        wanted = [] if version is None else [version]
        if not exact:
            wanted += [v for v in self.versions(key) if v != version and (loadable is None or loadable(v))]
        for candidate in wanted:
            for layer in self._layers:
                cubin = self._read_valid(layer, layer.path_of(key, candidate), use)
                if cubin is not None:
                    return cubin
        return None

    def publish(self, cubin: Cubin) -> Path:
        """Make a kernel visible to everyone, whole; a valid entry of its name stays, an invalid one is replaced.

        Raises:
            CacheError: someone else could put kernels there.
            OSError: the file system refused; nothing is visible and nothing is left behind.
        """
        data = encode(cubin)
        path = self.path_of(cubin.metadata.key, cubin.metadata.nvrtc_version)
        self._make(self._staging)
        self._make(path.parent)
        self.sweep()
        now = self.clock.now()
        descriptor, staged = self._stage()
        try:
            unwritten = memoryview(data)
            while unwritten:
                unwritten = unwritten[os.write(descriptor, unwritten) :]
            os.utime(descriptor, (now, now))
            os.fsync(descriptor)
            self._put(staged, path)
        finally:
            # What goes wrong from here on costs a left-over file at most. The lock goes last, with the descriptor.
            with contextlib.suppress(OSError):
                os.unlink(staged)
            with contextlib.suppress(OSError):
                os.close(descriptor)
        with contextlib.suppress(OSError):  # the entry is visible; only its survival of a power cut is in question
            _sync_folder(path.parent)
        return path

    def lock(self, key: str) -> filelock.BaseFileLock:
        """The lock to hold while compiling ``key``. Its file stays: unlinking one in use would split its waiters.

        Raises:
            CacheError: someone else could put kernels there.
            OSError: the directory cannot be made.
        """
        import filelock

        self._make(self._locks)
        return filelock.FileLock(
            self._lock_path(key),
            mode=file_mode(shared=self._shared),
            thread_local=False,
            preserve_lock_file=True,
            on_acquired=functools.partial(_write_pid, group=self._own.group),
        )

    def is_locked(self, key: str) -> bool:
        """Whether someone holds the lock of ``key``, as far as can be told; makes no file, cheaper than to try."""
        with contextlib.suppress(OSError):  # whoever tries will learn why
            descriptor = self._open_lock(key)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(descriptor)
        return False

    def when_unlocked(self, key: str) -> threading.Event:
        """An event that is set once nobody holds the lock of ``key``; until then a daemon thread waits in the kernel.

        So any number of processes may wait without taking time from the one that compiles, and go on together: the
        thread takes the lock shared, and lets go of it at once.
        """
        free = threading.Event()

        def wait() -> None:
            with contextlib.suppress(OSError):  # whoever tries to take the lock will learn why
                descriptor = self._open_lock(key)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    fcntl.flock(descriptor, fcntl.LOCK_UN)  # not by closing it, of which a fork may have a copy
                finally:
                    os.close(descriptor)
            free.set()

        with contextlib.suppress(RuntimeError):  # no more threads: the event stays unset, and its waiter looks by time
            threading.Thread(target=wait, name="jitgemm-lock", daemon=True).start()
        return free

    def lock_holder(self, key: str) -> int | None:
        """The process that last took the lock of ``key``, if known."""
        with (
            contextlib.suppress(OSError, ValueError, InvalidEntryError),
            open_trusted(self._lock_path(key), group=self._own.group) as (descriptor, status),
        ):
            return int(read_all(descriptor, status, limit=32))
        return None

    def entries(self) -> Iterator[EntryInfo]:
        """Every entry of every directory, by key and version within each, read whole and checked."""
        for layer in self._layers:
            for file in layer.files():
                metadata = problem = None
                wrong_key = False
                try:
                    metadata = layer.read(file.path).metadata
                except FileNotFoundError:  # removed meanwhile
                    continue
                except (OSError, InvalidEntryError) as error:
                    problem, wrong_key = str(error), isinstance(error, WrongKeyError)
                yield EntryInfo(file.path, file.key, file.nvrtc_version, file.size, metadata, problem, wrong_key)

    def files(self) -> Iterator[EntryFile]:
        """Every entry of the first directory, by key and version, not read."""
        return self._own.files()

    def size(self) -> int:
        """Bytes that the entries of the first directory take; several times quicker than to list them."""
        total = 0
        for folder in _names(self._own.kernels):
            with contextlib.suppress(OSError), os.scandir(self._own.kernels / folder) as files:
                for file in files:
                    if file.name.endswith(".jgk"):
                        with contextlib.suppress(OSError):  # removed meanwhile
                            total += file.stat(follow_symlinks=False).st_size
        return total

    def remove(self, key: str, version: str | None = None) -> int:
        """Remove from the first directory the entries of ``key``, or that of an NVRTC ``version``; how many."""
        removed = 0
        for one in [version] if version is not None else self._own.versions(key):
            with contextlib.suppress(FileNotFoundError):
                self.path_of(key, one).unlink()
                removed += 1
        return removed

    def remove_file(self, file: EntryFile, *, even_if_used: bool = False) -> bool:
        """Remove an entry that ``files`` gave, if it is still that file and has not been used since; whether it was.

        Args:
            file: the entry.
            even_if_used: remove whatever has that name by now.

        Raises:
            OSError: the file system refused.
        """
        if not even_if_used and _identity_of(file.path) != file.identity:
            return False
        try:
            os.unlink(file.path)
        except FileNotFoundError:  # another prune was quicker
            return False
        return True

    def path_of(self, key: str, version: str) -> Path:
        """Where the entry of ``key`` and an NVRTC version is published.

        Raises:
            ValueError: no entry can have that name.
        """
        return self._own.path_of(key, version)

    def versions(self, key: str) -> list[str]:
        """NVRTC versions that ``key`` has entries of, newest first."""
        versions = {version for layer in self._layers for version in layer.versions(key)}
        return sorted(versions, key=lambda version: tuple(map(int, version.split("."))), reverse=True)

    def sweep(self) -> None:
        """Remove what killed writers left in staging: a file that nobody has locked. Clocks and PIDs don't matter."""
        for name in _names(self._staging):
            path = self._staging / name
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(descriptor)

    def count(self, counts: Stats) -> None:
        """Add to what ``save_counts`` will add to the directory's counts."""
        with _counting:
            self._uncounted.add(counts)

    def save_counts(self) -> None:
        """Add this process's counts to those of the directory, if it exists and can be written; never raises."""
        with _counting:
            counts, self._uncounted = self._uncounted, Stats()
        if counts != Stats() and not add_to_file(self._stats_path, counts, shared=self._shared):
            self.count(counts)

    def stats(self) -> Stats:
        """The counts of all processes that used the directory."""
        return read_file(self._stats_path, group=self._own.group)

    @property
    def _stats_path(self) -> Path:
        return self.directory / "stats.json"

    def _make(self, folder: Path) -> None:
        make_directory(self.directory, shared=self._shared)
        self._own.check()
        for one in (*reversed(folder.parents), folder):
            if one != self.directory and one.is_relative_to(self.directory):
                make_folder(one, shared=self._shared, group=self._own.group)

    def _lock_path(self, key: str) -> Path:
        return self._locks / f"{key}.lock"

    def _open_lock(self, key: str) -> int:
        return os.open(self._lock_path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)

    def _read_valid(self, layer: _Layer, path: Path, use: bool) -> Cubin | None:
        try:
            return layer.read(path, self.clock if use and layer is self._own else None)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, InvalidEntryError) as error:
            if _report(path, error) and use:
                self.count(Stats(damaged=1))
            return None

    def _stage(self) -> tuple[int, Path]:
        """Open a new staging file, locked for as long as its writer lives."""
        while True:
            path = self._staging / secrets.token_hex(16)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(OSError):  # without locks nobody sweeps, either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # else swept between open and lock
                if self._shared:
                    os.fchmod(descriptor, file_mode(shared=True))
                return descriptor, path
            os.close(descriptor)

    def _put(self, staged: Path, path: Path) -> None:
        """Rename a staged file into place, unless a valid entry is there: then the race is lost, and that one stays.

        An invalid one is replaced only if it is still the file that was found so.

        Raises:
            CacheError: it was another each time that it was looked at.
        """
        for _ in range(_ATTEMPTS):
            standing = _identity_of(path)
            if standing is not None and self._is_valid(path):
                return
            if _identity_of(path) == standing:
                os.replace(staged, path)
                return
        raise CacheError(f"{path} is replaced by others all the time")

    def _is_valid(self, path: Path) -> bool:
        try:
            self._own.read(path)
        except (OSError, InvalidEntryError):
            return False
        return True


def encode(cubin: Cubin) -> bytes:
    """The bytes of an entry."""
    metadata = json.dumps(cubin.metadata.to_dict(), sort_keys=True).encode()
    if len(metadata) > MAX_METADATA_BYTES or len(cubin.image) > MAX_PAYLOAD_BYTES:
        raise CacheError(f"kernel {cubin.metadata.key} is too large for a cache entry")
    body = _HEADER.pack(MAGIC, len(metadata), len(cubin.image)) + metadata + cubin.image
    return body + hashlib.sha256(body).digest()


def decode(data: bytes) -> Cubin:
    """Reverse ``encode`` on bytes that nobody vouches for.

    Raises:
        InvalidEntryError: they are not those of a whole, unaltered entry.
    """
    if len(data) < _HEADER.size + _DIGEST_BYTES:
        raise InvalidEntryError("it is truncated")
    magic, metadata_bytes, payload_bytes = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise InvalidEntryError("it does not begin like an entry of this version")
    if metadata_bytes > MAX_METADATA_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise InvalidEntryError("its header asks for more than an entry may have")
    if len(data) != _HEADER.size + metadata_bytes + payload_bytes + _DIGEST_BYTES:
        raise InvalidEntryError("its length is not what its header says")
    if hashlib.sha256(memoryview(data)[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
        raise InvalidEntryError("its digest does not match its content")
    payload = _HEADER.size + metadata_bytes
    try:
        fields = json.loads(data[_HEADER.size : payload])
        metadata = CubinMetadata.from_dict(fields if isinstance(fields, dict) else {})
    except (ValueError, RecursionError) as error:
        raise InvalidEntryError(f"its metadata is not valid: {error}") from None
    image = data[payload:-_DIGEST_BYTES]
    if metadata.size != len(image) or metadata.sha256 != hashlib.sha256(image).hexdigest():
        raise InvalidEntryError("its metadata belongs to another kernel")
    return Cubin(image, metadata)


def decode_named(data: bytes, name: str) -> Cubin:
    """``decode`` of the content of an entry's file.

    Raises:
        InvalidEntryError: it is not valid, or is the entry of another key or NVRTC version than its name says.
    """
    cubin = decode(data)
    if name != f"{cubin.metadata.key}.{cubin.metadata.nvrtc_version}.jgk":
        raise WrongKeyError("it holds the kernel of another entry")
    return cubin


def check_spec(metadata: CubinMetadata) -> None:
    """Check that the spec of an entry is that of its key.

    Raises:
        WrongKeyError: it is another kernel's.
    """
    spec = KernelSpec.from_dict(metadata.spec)
    if metadata.arch != spec.arch or key_of(spec, metadata.build) != metadata.key:
        raise WrongKeyError("its spec does not give its key")


def default_cache() -> KernelCache:
    """The cache of ``JITGEMM_CACHE_DIR``, else the one in the user's cache directory.

    Raises:
        CacheError: someone else could put kernels there.
    """
    in_force = settings.current()
    return _cache_in(in_force.cache_dir or (_user_directory(),), in_force.cache_group)


@functools.lru_cache(maxsize=16)
def _cache_in(directories: tuple[Path, ...], shared: bool) -> KernelCache:
    return KernelCache(directories[0], directories[1:], shared=shared)


@functools.cache
def _user_directory() -> Path:
    import platformdirs

    with contextlib.suppress(RuntimeError):  # without a home, platformdirs raises this or gives a relative path
        directory = platformdirs.user_cache_path("jitgemm")
        if directory.is_absolute():  # never resolve against the working directory
            return directory
    fallback = Path(f"/tmp/jitgemm-{os.getuid()}")
    logger.warning("kernel cache: this user has no home directory; using %s (JITGEMM_CACHE_DIR sets another)", fallback)
    return fallback


def damaged_entries() -> int:
    """How many different invalid files this process has met at the place of an entry."""
    return len(_reported)


_reported: set[tuple[str, int, int]] = set()


def _report(path: Path, error: Exception) -> bool:
    """Warn of a file once, however often a waiter polls it; whether it is a new one."""
    try:
        status = path.lstat()
    except OSError:
        return False
    identity = (str(path), status.st_ino, status.st_ctime_ns)
    if identity in _reported:
        return False
    _reported.add(identity)
    logger.warning("kernel cache: %s is ignored: %s", path, error)
    return True


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _identity_of(path: Path) -> tuple[int, ...] | None:
    try:
        return _identity(path.lstat())
    except OSError:
        return None


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_pid(descriptor: int, group: int | None) -> None:
    check_own_file(os.fstat(descriptor), group)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)


_counting = threading.Lock()
_caches: weakref.WeakSet[KernelCache] = weakref.WeakSet()


@atexit.register
def _save_counts() -> None:
    for cache in list(_caches):
        cache.save_counts()


def _reset_after_fork() -> None:
    """What the parent has counted, it saves itself."""
    global _counting
    _counting = threading.Lock()
    for cache in list(_caches):
        cache._uncounted = Stats()


os.register_at_fork(after_in_child=_reset_after_fork)
