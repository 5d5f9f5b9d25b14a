"""The kernel cache on disk: one file per kernel, visible whole or not at all.

An entry is staged in the cache's own tree, synced, and renamed into place; it holds its own digest,
and a reader checks the very bytes that it hands on. Locks only save work: publishing is correct
without them. ::

    <directory>/kernels/<key>.<NVRTC version>.jgk    entries
    <directory>/locks/<key>.lock                     one per key, holding the PID of its last owner; kept
    <directory>/staging/                             entries being written
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jitgemm import settings
from jitgemm.compiler import Cubin, CubinMetadata
from jitgemm.errors import CacheError

if TYPE_CHECKING:
    import filelock

logger = logging.getLogger("jitgemm")
logger.addHandler(logging.NullHandler())

MAGIC = b"JITGEMM\x01"  # the last byte is the version of the format
_HEADER = struct.Struct("<8sIQ")  # magic, bytes of metadata, bytes of payload; then both, then the digest
_DIGEST_BYTES = hashlib.sha256().digest_size
MAX_METADATA_BYTES = 64 << 10
MAX_PAYLOAD_BYTES = 64 << 20
MAX_ENTRY_BYTES = _HEADER.size + MAX_METADATA_BYTES + MAX_PAYLOAD_BYTES + _DIGEST_BYTES

_NAME = re.compile(r"(?P<key>[0-9a-f]{64})\.(?P<version>[0-9]{1,4}\.[0-9]{1,4})\.jgk")


class InvalidEntryError(CacheError):
    """A file at the place of an entry is not a whole, untampered entry of that name."""


@dataclass(frozen=True)
class EntryInfo:
    """One file among the entries: its metadata, or why it is not valid."""

    path: Path
    key: str
    nvrtc_version: str
    size: int
    metadata: CubinMetadata | None
    problem: str | None


class KernelCache:
    """The cache in one directory. Any number of processes and threads may use it at once."""

    def __init__(self, directory: Path) -> None:
        """Use ``directory``, which is made when something is first written.

        Raises:
            CacheError: someone else could put kernels there.
        """
        self.directory = directory
        self._kernels = directory / "kernels"
        self._locks = directory / "locks"
        self._staging = directory / "staging"
        _check_owner(directory)

    def find(
        self,
        key: str,
        *,
        version: str | None = None,
        exact: bool = False,
        loadable: Callable[[str], bool] | None = None,
    ) -> Cubin | None:
        """The kernel of ``key`` compiled by NVRTC ``version``, else the newest that is ``loadable``.

        A damaged entry counts as missing. ``exact`` accepts ``version`` only.
        """
        if version is not None:
            cubin = self._read_valid(self.path_of(key, version))
            if cubin is not None or exact:
                return cubin
        for other in self.versions(key):
            if other != version and (loadable is None or loadable(other)):
                cubin = self._read_valid(self.path_of(key, other))
                if cubin is not None:
                    return cubin
        return None

    def publish(self, cubin: Cubin) -> Path:
        """Make a kernel visible to everyone, whole, in place of any entry of the same name.

        Raises:
            OSError: the file system refused; nothing is visible and nothing is left behind.
        """
        data = encode(cubin)
        path = self.path_of(cubin.metadata.key, cubin.metadata.nvrtc_version)
        for folder in (self._kernels, self._staging):
            self._make(folder)
        self._sweep()
        descriptor, staged = self._stage()
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
                os.replace(staged, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(staged)
            raise
        with contextlib.suppress(OSError):  # the entry is visible; only its survival of a power cut is in question
            _sync_folder(self._kernels)
        return path

    def lock(self, key: str) -> filelock.BaseFileLock:
        """The lock to hold while compiling ``key``. Its file stays: unlinking one in use would split its waiters.

        Raises:
            OSError: the directory cannot be made.
        """
        import filelock

        self._make(self._locks)
        return filelock.FileLock(
            self._lock_path(key), mode=0o600, thread_local=False, preserve_lock_file=True, on_acquired=_write_pid
        )

    def lock_holder(self, key: str) -> int | None:
        """The process that last took the lock of ``key``, if known."""
        try:
            return int(read_trusted(self._lock_path(key), limit=32))
        except (OSError, ValueError, InvalidEntryError):
            return None

    def entries(self) -> Iterator[EntryInfo]:
        """Every entry by key and version, read whole and checked."""
        for name in sorted(_names(self._kernels)):
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            path = self._kernels / name
            try:
                size = path.lstat().st_size
                metadata, problem = self._read(path).metadata, None
            except FileNotFoundError:  # removed meanwhile
                continue
            except (OSError, InvalidEntryError) as error:
                metadata, problem = None, str(error)
            yield EntryInfo(path, match["key"], match["version"], size, metadata, problem)

    def remove(self, key: str, version: str | None = None) -> int:
        """Remove the entries of ``key``, or the one of an NVRTC ``version``; how many there were."""
        removed = 0
        for one in [version] if version is not None else self.versions(key):
            with contextlib.suppress(FileNotFoundError):
                self.path_of(key, one).unlink()
                removed += 1
        return removed

    def path_of(self, key: str, version: str) -> Path:
        """Where the entry of ``key`` and an NVRTC version is, or would be.

        Raises:
            ValueError: no entry can have that name.
        """
        name = f"{key}.{version}.jgk"
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"{key!r} with NVRTC {version!r} cannot name an entry of the kernel cache")
        return self._kernels / name

    def _make(self, folder: Path) -> None:
        for one in (self.directory, folder):  # mkdir gives its mode to the last folder only
            one.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _lock_path(self, key: str) -> Path:
        return self._locks / f"{key}.lock"

    def versions(self, key: str) -> list[str]:
        """NVRTC versions that ``key`` has entries of, newest first."""
        matches = (_NAME.fullmatch(name) for name in _names(self._kernels) if name.startswith(key))
        versions = [match["version"] for match in matches if match and match["key"] == key]
        return sorted(versions, key=lambda version: tuple(map(int, version.split("."))), reverse=True)

    def _read_valid(self, path: Path) -> Cubin | None:
        try:
            return self._read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, InvalidEntryError) as error:
            _report(path, error)
            return None

    def _read(self, path: Path) -> Cubin:
        cubin = decode(read_trusted(path, limit=MAX_ENTRY_BYTES))
        if path.name != f"{cubin.metadata.key}.{cubin.metadata.nvrtc_version}.jgk":
            raise InvalidEntryError("it holds the kernel of another entry")
        return cubin

    def _stage(self) -> tuple[int, Path]:
        """Open a new staging file, locked for as long as its writer lives."""
        while True:
            path = self._staging / secrets.token_hex(16)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(OSError):  # without locks nobody sweeps, either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # else swept between open and lock
                return descriptor, path
            os.close(descriptor)

    def _sweep(self) -> None:
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


def default_cache() -> KernelCache:
    """The cache of ``JITGEMM_CACHE_DIR``, else the one in the user's cache directory.

    Raises:
        CacheError: someone else could put kernels there.
    """
    return _cache_in(settings.current().cache_dir or _user_directory())


@functools.lru_cache(maxsize=16)
def _cache_in(directory: Path) -> KernelCache:
    return KernelCache(directory)


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


def _report(path: Path, error: Exception) -> None:
    """Warn of a file once, however often a waiter polls it."""
    try:
        status = path.lstat()
    except OSError:
        return
    identity = (str(path), status.st_ino, status.st_ctime_ns)
    if identity not in _reported:
        _reported.add(identity)
        logger.warning("kernel cache: %s is ignored: %s", path, error)


def _check_owner(directory: Path) -> None:
    try:
        status = directory.stat()
    except OSError:  # made later, or unusable, which shows when it is used
        return
    if status.st_uid not in (os.geteuid(), 0):
        raise CacheError(
            f"the kernel cache {directory} belongs to user {status.st_uid}, who could put any code there; "
            f"take it over with: chown -R {os.geteuid()} '{directory}', or set JITGEMM_CACHE_DIR"
        )
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise CacheError(
            f"the kernel cache {directory} can be written by everyone, who could put any code there; "
            f"close it with: chmod o-w '{directory}', or set JITGEMM_CACHE_DIR"
        )


def read_trusted(path: Path, limit: int) -> bytes:
    """Content of a regular file that only its trusted owner could have written; follows no link, never blocks.

    Raises:
        InvalidEntryError: it is not such a file, or larger than ``limit`` bytes.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidEntryError("it is not a regular file")
        if status.st_uid not in (os.geteuid(), 0):
            raise InvalidEntryError(f"it belongs to user {status.st_uid}")
        if status.st_size > limit:
            raise InvalidEntryError("it is larger than an entry may be")
        return file.read(limit + 1)


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


def _write_pid(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
