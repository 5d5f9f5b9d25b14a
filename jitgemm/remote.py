"""A cache that hosts share through fsspec: asked after a miss in the cache directory, before a compile. ::

    <url>/kernels/<key>/<NVRTC version>.jgk          the same bytes as an entry on disk

A key has a folder of its own, so that a look-up lists a few names however many kernels there are. Nobody waits longer
than the timeout: each operation has a thread, which is left behind when it takes too long. A remote that failed is left
alone for a while.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from jitgemm import settings
from jitgemm.cache import MAX_ENTRY_BYTES, InvalidEntryError, check_spec, decode_named, encode, logger
from jitgemm.compiler import Cubin
from jitgemm.errors import SettingsError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

RETRY_SECONDS = 60.0
"""How long a remote that failed is left alone."""

_PACKAGES = {"s3": ("s3fs", "remote-s3"), "gs": ("gcsfs", "remote-gs")}
"""What a scheme needs besides fsspec, and the extra that brings it."""

_OBJECT = re.compile(r".*/(?P<version>[0-9]{1,4}\.[0-9]{1,4})\.jgk", re.DOTALL)


class Remote:
    """The shared cache at one URL. Any number of threads may use it at once; nothing that it meets is raised."""

    def __init__(self, url: str, timeout: float) -> None:
        """Use ``url``, a value of ``JITGEMM_REMOTE``; no operation takes longer than ``timeout`` seconds.

        Raises:
            SettingsError: the URL's scheme needs a package that is not installed.
        """
        self.url = url
        self.timeout = timeout
        self._scheme, _, self._root = url.partition("://")
        for package, extra in (("fsspec", "remote"), *([_PACKAGES[self._scheme]] if self._scheme in _PACKAGES else [])):
            if importlib.util.find_spec(package) is None:
                raise SettingsError(
                    f"JITGEMM_REMOTE is {url!r}, which needs the package {package}; pip install 'jitgemm[{extra}]'"
                )
        self._opened: AbstractFileSystem | None = None
        self.fault: str | None = None
        """Why it failed the last time that it did."""
        self._retry_at = 0.0

    def find(
        self,
        key: str,
        *,
        version: str | None = None,
        exact: bool = False,
        loadable: Callable[[str], bool] | None = None,
    ) -> Cubin | None:
        """As ``KernelCache.find``. Also None where the remote failed, took too long, or did so a moment ago."""

        def look(files: AbstractFileSystem) -> Cubin | None:
            sizes = self._versions(files, key)
            for one in sorted(sizes, key=lambda one: (one == version, *map(int, one.split("."))), reverse=True):
                if one == version or (not exact and (loadable is None or loadable(one))):
                    cubin = self._read(files, key, one, sizes[one])
                    if cubin is not None:
                        return cubin
            return None

        return self._in_time(look)

    def publish(self, cubin: Cubin) -> bool:
        """Upload a kernel, in place of any of the same name; whether that is done."""

        def put(files: AbstractFileSystem) -> bool:
            path = self._path(cubin.metadata.key, cubin.metadata.nvrtc_version)
            if self._scheme == "file":  # elsewhere an object appears whole or not at all
                staged = f"{path}.{secrets.token_hex(8)}"
                files.pipe_file(staged, encode(cubin))
                files.mv(staged, path)
            else:
                files.pipe_file(path, encode(cubin))
            return True

        return bool(self._in_time(put))

    def ensure(self, cubin: Cubin) -> bool:
        """Upload a kernel unless the remote has a valid one of that name; whether it has one now."""
        metadata = cubin.metadata
        found = self.find(metadata.key, version=metadata.nvrtc_version, exact=True)
        return found is not None or self.publish(cubin)

    def answers(self) -> bool:
        """Whether it can be asked now; a warning or ``fault`` says why not."""
        return self._in_time(lambda files: self._versions(files, "0" * 64)) is not None

    def _path(self, key: str, version: str = "") -> str:
        return f"{self._root}/kernels/{key}" + (f"/{version}.jgk" if version else "")

    def _versions(self, files: AbstractFileSystem, key: str) -> dict[str, int]:
        """NVRTC versions that ``key`` has objects of, and their bytes."""
        # find, not ls: where there is nothing, s3fs's ls goes on to list the folder of all keys
        listed: dict[str, dict[str, Any]] = files.find(self._path(key), detail=True)
        return {
            match["version"]: int(details["size"])
            for path, details in listed.items()
            if (match := _OBJECT.fullmatch(path))
        }

    def _read(self, files: AbstractFileSystem, key: str, version: str, size: int) -> Cubin | None:
        path = self._path(key, version)
        try:
            if size > MAX_ENTRY_BYTES:
                raise InvalidEntryError("it is larger than an entry may be")
            # Bounded, whatever it has become since; and S3 has no range of an empty object.
            cubin = decode_named(files.cat_file(path, start=0, end=size) if size else b"", f"{key}.{version}.jgk")
            check_spec(cubin.metadata)
            return cubin
        except FileNotFoundError:  # removed meanwhile
            return None
        except InvalidEntryError as error:
            _refuse(f"{self._scheme}://{path}", error)
            return None

    def _in_time(self, work: Callable[[AbstractFileSystem], T]) -> T | None:
        if time.monotonic() < self._retry_at:
            return None
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work(self._open()))
            except BaseException as error:  # no cancellation of theirs may pass for one of ours
                done.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

        try:
            # Not an executor's thread: the interpreter would wait for that one at exit.
            threading.Thread(target=run, name="jitgemm-remote", daemon=True).start()
            return done.result(self.timeout)
        except Exception as error:  # fsspec's backends raise whatever their libraries do
            why = f"{type(error).__name__}: {str(error)[:300]!r}" if done.done() else f"no answer in {self.timeout:g} s"
            self._leave_alone(why)
            return None

    def _open(self) -> AbstractFileSystem:
        """The file system; also made in the operation's thread, since looking for credentials may take long."""
        if self._opened is None:
            import fsspec

            options = {"auto_mkdir": True} if self._scheme == "file" else {}
            # fsspec's cache of instances goes by thread, and one of listings would hide what other hosts upload.
            self._opened = fsspec.filesystem(
                self._scheme, skip_instance_cache=True, use_listings_cache=False, **options
            )
        return self._opened

    def _leave_alone(self, why: str) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        first, self.fault = self.fault is None, why
        if first:
            logger.warning(
                "kernel cache: the remote %s failed (%s) and is left alone for %g s at a time",
                self.url,
                why,
                RETRY_SECONDS,
            )


def default_remote() -> Remote | None:
    """The remote of ``JITGEMM_REMOTE``, if it is set.

    Raises:
        SettingsError: it needs a package that is not installed.
    """
    in_force = settings.current()
    return None if in_force.remote is None else _remote_at(in_force.remote, in_force.remote_timeout)


@functools.lru_cache(maxsize=16)
def _remote_at(url: str, timeout: float) -> Remote:
    return Remote(url, timeout)


def refused_objects() -> int:
    """How many different invalid objects this process has met at the place of a remote entry."""
    return len(_refused)


_refused: set[str] = set()


def _refuse(url: str, error: Exception) -> None:
    if url not in _refused:
        _refused.add(url)
        logger.warning("kernel cache: %s is ignored: %s", url, error)


os.register_at_fork(after_in_child=_remote_at.cache_clear)  # fsspec's file systems are of the process that made them
