"""Bundles: entries of the cache in one file, to be carried to another machine.

A bundle is a tar archive (ustar, not compressed) whose members are entries under the names that they have in the cache,
sorted, with headers that tell their name and size only: the same entries are the same bytes. Reading takes no archive's
word for anything: it goes from header to header, and a member that is not an entry by its name, type, size, digest and
key condemns the archive.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from jitgemm import settings
from jitgemm.cache import (
    MAX_ENTRY_BYTES,
    EntryInfo,
    InvalidEntryError,
    KernelCache,
    check_spec,
    decode_named,
    default_cache,
    encode,
)
from jitgemm.cache_tools.console import (
    EnvironmentFaultError,
    NotFoundError,
    UsageError,
    print_error,
    print_json,
    printable,
)
from jitgemm.cache_upkeep import keep_bound
from jitgemm.compiler import Cubin

MAX_ENTRIES = 100_000
MAX_BUNDLE_BYTES = 8 << 30

_BLOCK = tarfile.BLOCKSIZE


class RefusedError(Exception):
    """What is wrong with an archive."""


def export(path: Path, *, keys: Collection[str] | None = None, arch: str | None = None, as_json: bool = False) -> None:
    """Write valid entries of the cache to ``path``, which appears whole or not at all.

    Args:
        path: the bundle; one that exists is replaced.
        keys: those to export, all of which must be there; default: every one.
        arch: the architecture whose entries to export; default: all.
        as_json: print one JSON object.

    Raises:
        NotFoundError: there is nothing to export, or not all of ``keys``.
        UsageError: ``path`` is no place for a file, or the bundle would be too large to be imported.
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))  # of a link, the target is replaced
    if path.exists() and not path.is_file():
        raise UsageError(f"export: {path} exists and is not a regular file")
    cache = default_cache()
    entries = _chosen(cache, keys, arch)
    digest = hashlib.sha256()
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(staged, "xb") as file:
            for block in _blocks(cache, entries):
                digest.update(block)
                file.write(block)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise
    if as_json:
        print_json(
            file=str(path), exported=len(entries), bytes=size, sha256=digest.hexdigest(), cache_dir=str(cache.directory)
        )
    else:
        print(printable(f"{len(entries)} kernels, {size / 1e6:.1f} MB in {path}; sha256 {digest.hexdigest()}"))


def import_bundle(path: Path, *, as_json: bool = False) -> None:
    """Publish the entries of a bundle in the cache, save those that it has already.

    The whole archive is checked before the first entry is published.

    Raises:
        UsageError: the archive is refused, and nothing is written.
        EnvironmentFaultError: publishing failed; what was published until then are whole entries.
    """
    cache = default_cache()
    new = kept = 0
    with _open(path) as file:
        try:
            total = sum(1 for _ in _cubins(file, cache))
        except RefusedError as error:
            raise UsageError(f"import: {path} is refused, and nothing of it is imported: {error}") from None
        file.seek(0)
        try:
            for cubin in _cubins(file, cache):  # a second time, rather than all in memory
                if cache.find(cubin.metadata.key, version=cubin.metadata.nvrtc_version, exact=True) is not None:
                    kept += 1
                else:
                    cache.publish(cubin)
                    new += 1
                    if (bound := settings.current().cache_max_bytes) is not None:
                        keep_bound(cache, bound, cubin.metadata.size)
        except (OSError, RefusedError) as error:  # the latter: it was written to meanwhile
            done = f"{new + kept} of {total} kernels of {path} are in the cache"
            raise EnvironmentFaultError(f"import: {done}, then: {error}; the same command continues") from None
    if as_json:
        print_json(file=str(path), imported=new, already_there=kept, cache_dir=str(cache.directory))
    else:
        print(printable(f"imported {new} kernels, {kept} were already there; cache {cache.directory}"))


def _chosen(cache: KernelCache, keys: Collection[str] | None, arch: str | None) -> list[EntryInfo]:
    chosen: dict[str, EntryInfo] = {}
    for entry in cache.entries():
        if keys is not None and entry.key not in keys:
            continue
        if entry.metadata is None:
            print_error(f"export: {entry.path} is left out: {entry.problem}")
        elif arch is None or entry.metadata.arch == arch:
            chosen.setdefault(entry.path.name, entry)
    if keys is not None and (missing := len(set(keys) - {entry.key for entry in chosen.values()})):
        raise NotFoundError(f"export: {missing} of {len(keys)} kernels are not in {cache}; prewarm it first")
    if not chosen:
        raise NotFoundError(f"export: {cache} has no kernel{f' for {arch}' if arch else ''}")
    if len(chosen) > MAX_ENTRIES or sum(entry.size + 2 * _BLOCK for entry in chosen.values()) > MAX_BUNDLE_BYTES:
        raise UsageError(f"export: {len(chosen)} kernels are too many for a bundle; choose with --preset or --shapes")
    return [entry for _, entry in sorted(chosen.items())]


def _blocks(cache: KernelCache, entries: Collection[EntryInfo]) -> Iterator[bytes]:
    for entry in entries:
        cubin = cache.find(entry.key, version=entry.nvrtc_version, exact=True)
        if cubin is None:
            raise NotFoundError(f"export: kernel {entry.key} was removed meanwhile")
        data = encode(cubin)
        header = tarfile.TarInfo(entry.path.name)  # of user 0, mode 0644, time 0
        header.size = len(data)
        yield header.tobuf(tarfile.USTAR_FORMAT)
        yield data + bytes(-len(data) % _BLOCK)
    yield bytes(2 * _BLOCK)


def _open(path: Path) -> BinaryIO:
    """Open a bundle; nothing but a regular file, which alone can be read twice and has an end."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UsageError(f"import: {path} is not a regular file")
    return file


def _cubins(file: BinaryIO, cache: KernelCache) -> Iterator[Cubin]:
    """The entries of an archive that nobody vouches for, one by one.

    Raises:
        RefusedError: something in it is not as in a bundle.
    """
    if os.fstat(file.fileno()).st_size > MAX_BUNDLE_BYTES:
        raise RefusedError(f"it is larger than {MAX_BUNDLE_BYTES >> 30} GiB")
    seen: set[str] = set()
    while any(block := file.read(_BLOCK)):
        member = _member(block, cache)
        if member.name in seen:
            raise RefusedError(f"{member.name!r} comes twice")
        seen.add(member.name)
        if len(seen) > MAX_ENTRIES:
            raise RefusedError(f"it has more than {MAX_ENTRIES} members")
        try:
            cubin = decode_named(file.read(member.size), member.name)
            check_spec(cubin.metadata)
        except InvalidEntryError as error:
            raise RefusedError(f"{member.name!r} is not a valid entry: {error}") from None
        if any(file.read(-member.size % _BLOCK)):
            raise RefusedError(f"{member.name!r} is followed by what is no padding")
        yield cubin
    if len(block) < _BLOCK:
        raise RefusedError("it is truncated")
    if not seen:
        raise RefusedError("it holds no kernels")
    rest = file.read(tarfile.RECORDSIZE)  # to which some fill up the end with zeros
    if any(rest) or len(rest) == tarfile.RECORDSIZE:
        raise RefusedError("it goes on after its end")


def _member(block: bytes, cache: KernelCache) -> tarfile.TarInfo:
    """A member's header, which may only be that of a plain file of an entry's name and size."""
    try:
        member = tarfile.TarInfo.frombuf(block, "ascii", "backslashreplace")
    except (tarfile.HeaderError, ValueError) as error:
        raise RefusedError(f"it is not a tar archive, or damaged: {error}") from None
    key, _, version = member.name.removesuffix(".jgk").partition(".")
    try:
        named = cache.path_of(key, version).name
    except ValueError:
        named = None
    if member.name != named:
        raise RefusedError(f"{member.name!r} is not the name of an entry")
    if member.type != tarfile.REGTYPE:
        raise RefusedError(f"{member.name!r} is not a regular file")
    if not 0 < member.size <= MAX_ENTRY_BYTES:
        raise RefusedError(f"{member.name!r} has {member.size} bytes; an entry has at most {MAX_ENTRY_BYTES}")
    return member
