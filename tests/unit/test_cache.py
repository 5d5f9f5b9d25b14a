from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import KEY, NOBODY, environment, make_cubin

from jitgemm import cache as module
from jitgemm.cache import InvalidEntryError, KernelCache, damaged_entries, decode, default_cache, encode
from jitgemm.compiler import Cubin
from jitgemm.errors import CacheError

OTHER_KEY = "f" * 64


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "cache")


# The bytes of an entry


def test_an_entry_round_trips() -> None:
    cubin = make_cubin()
    assert decode(encode(cubin)) == cubin


def test_every_flipped_bit_is_noticed() -> None:
    data = bytearray(encode(make_cubin()))
    for position in range(len(data)):
        for bit in (1, 16, 128):
            data[position] ^= bit
            with pytest.raises(InvalidEntryError):
                decode(bytes(data))
            data[position] ^= bit


def test_every_truncation_and_any_tail_is_noticed() -> None:
    data = encode(make_cubin())
    for length in range(len(data)):
        with pytest.raises(InvalidEntryError):
            decode(data[:length])
    with pytest.raises(InvalidEntryError):
        decode(data + b"\0")


def _entry(metadata: bytes, payload: bytes) -> bytes:
    """An entry with a right digest over whatever it holds."""
    body = module._HEADER.pack(module.MAGIC, len(metadata), len(payload)) + metadata + payload
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    "metadata",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"1" * 60_000,
        json.dumps({**make_cubin().metadata.to_dict(), "kernel_name": "\x1b]0;title\x07"}).encode(),
        json.dumps({**make_cubin().metadata.to_dict(), "warnings": ["\ud800"]}).encode(),
    ],
    ids=lambda data: data[:12].decode(errors="replace"),
)
def test_malicious_metadata_is_refused(metadata: bytes) -> None:
    with pytest.raises(InvalidEntryError):
        decode(_entry(metadata, make_cubin().image))


def test_metadata_is_bound_to_the_payload() -> None:
    cubin = make_cubin()
    metadata = json.dumps(cubin.metadata.to_dict()).encode()
    assert decode(_entry(metadata, cubin.image)) == cubin
    with pytest.raises(InvalidEntryError, match="another kernel"):
        decode(_entry(metadata, cubin.image[::-1]))


def test_a_kernel_too_large_is_refused_before_anything_is_written(cache: KernelCache) -> None:
    with pytest.raises(CacheError, match="too large"):
        cache.publish(make_cubin(image=bytes(module.MAX_PAYLOAD_BYTES + 1)))
    assert not cache.directory.exists()


# Look-up


def test_what_was_published_is_found(cache: KernelCache) -> None:
    assert cache.find(KEY) is None
    cubin = make_cubin()
    path = cache.publish(cubin)
    assert path == cache.path_of(KEY, "13.5")
    assert cache.find(KEY) == cubin
    assert cache.find(OTHER_KEY) is None
    assert os.listdir(cache.directory / "staging") == []


def test_looking_up_writes_nothing(cache: KernelCache) -> None:
    assert cache.find(KEY, version="13.5") is None
    assert cache.lock_holder(KEY) is None
    assert list(cache.entries()) == []
    assert cache.remove(KEY) == 0
    assert not cache.directory.exists()


def test_the_exact_version_first_then_the_newest_that_can_be_loaded(cache: KernelCache) -> None:
    for version in ("12.9", "13.2", "13.10"):
        cache.publish(make_cubin(version=version))

    def version_found(**options: Any) -> str | None:
        cubin = cache.find(KEY, **options)
        return None if cubin is None else cubin.metadata.nvrtc_version

    assert version_found() == "13.10"  # by number, not by text
    assert version_found(version="13.2") == "13.2"
    assert version_found(version="13.7") == "13.10"
    assert version_found(version="13.7", exact=True) is None
    assert version_found(version="12.9", exact=True) == "12.9"
    assert version_found(loadable=lambda version: version.startswith("12.")) == "12.9"
    assert version_found(version="13.7", loadable=lambda version: False) is None


def test_a_damaged_entry_does_not_hide_another_version(cache: KernelCache) -> None:
    cache.publish(make_cubin(version="12.9"))
    cache.publish(make_cubin(version="13.5")).write_bytes(b"")
    found = cache.find(KEY, version="13.5")
    assert found is not None
    assert found.metadata.nvrtc_version == "12.9"


def test_a_damaged_entry_is_counted_and_reported_once(cache: KernelCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.publish(make_cubin()).write_bytes(b"JITGEMM")
    before = damaged_entries()
    for _ in range(3):
        assert cache.find(KEY, version="13.5") is None
    assert damaged_entries() == before + 1
    (record,) = caplog.records
    assert str(cache.path_of(KEY, "13.5")) in record.getMessage()
    assert "truncated" in record.getMessage()


def test_publishing_heals_a_damaged_entry(cache: KernelCache) -> None:
    cache.publish(make_cubin()).write_bytes(b"")
    cache.publish(make_cubin())
    assert cache.find(KEY) == make_cubin()


def test_an_entry_under_another_name_is_refused(cache: KernelCache) -> None:
    data = cache.publish(make_cubin()).read_bytes()
    cache.path_of(OTHER_KEY, "13.5").parent.mkdir()
    cache.path_of(OTHER_KEY, "13.5").write_bytes(data)
    cache.path_of(KEY, "13.6").write_bytes(data)
    assert cache.find(OTHER_KEY) is None
    assert cache.find(KEY, version="13.6", exact=True) is None


@pytest.mark.parametrize(
    ("key", "version"),
    [
        ("../" * 21 + "a", "13.5"),
        (KEY.upper(), "13.5"),
        (KEY[1:], "13.5"),
        (KEY + "\n", "13.5"),
        (KEY, "13"),
        (KEY, "../13.5"),
        (KEY, "13.5.jgk"),
        ("", ""),
    ],
)
def test_only_keys_and_versions_can_name_an_entry(cache: KernelCache, key: str, version: str) -> None:
    with pytest.raises(ValueError, match="cannot name an entry"):
        cache.path_of(key, version)


# What may stand at the place of an entry


def _symlink(path: Path, real: Path) -> None:
    path.symlink_to(real)


def _fifo(path: Path, real: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path, real: Path) -> None:
    path.mkdir()


def _sparse(path: Path, real: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("place", [_symlink, _fifo, _folder, _sparse])
def test_only_a_regular_file_of_a_sane_size_is_read(cache: KernelCache, place: Callable[[Path, Path], None]) -> None:
    path = cache.publish(make_cubin())
    real = path.rename(cache.directory / "valid entry")
    place(path, real)
    assert cache.find(KEY, version="13.5") is None
    (entry,) = cache.entries()
    assert entry.metadata is None
    assert entry.problem


def test_publishing_replaces_a_symlink_and_leaves_its_target(cache: KernelCache, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("content")
    path = cache.publish(make_cubin())
    path.unlink()
    path.symlink_to(target)
    cache.publish(make_cubin())
    assert not path.is_symlink()
    assert target.read_text() == "content"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_an_entry_of_another_user_is_refused(cache: KernelCache) -> None:
    os.chown(cache.publish(make_cubin()), NOBODY, NOBODY)
    assert cache.find(KEY) is None


# Directories


def test_files_and_folders_are_private(cache: KernelCache) -> None:
    previous = os.umask(0)
    try:
        path = cache.publish(make_cubin())
        with cache.lock(KEY):
            pass
    finally:
        os.umask(previous)
    modes = {str(p.relative_to(cache.directory)): stat.S_IMODE(p.stat().st_mode) for p in cache.directory.rglob("*")}
    assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700
    assert modes.pop(str(path.relative_to(cache.directory))) == 0o600
    assert modes.pop(f"locks/{KEY}.lock") == 0o600
    assert modes.pop("clock") == 0o600
    assert modes == {"kernels": 0o700, f"kernels/{KEY[:2]}": 0o700, "locks": 0o700, "staging": 0o700}


def test_a_directory_that_everyone_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(CacheError, match="chmod o-w"):
        KernelCache(tmp_path / "open")
    (tmp_path / "open").chmod(0o1777)  # nobody removes or replaces what others own there
    KernelCache(tmp_path / "open")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give directories away")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, NOBODY)
    with pytest.raises(CacheError, match=f"belongs to user {NOBODY}.*chown"):
        KernelCache(tmp_path)


def test_the_default_is_the_setting(cache_dir: Path) -> None:
    assert default_cache().directory == cache_dir
    assert default_cache() is default_cache()


def _default_directory(**variables: str) -> str:
    """The default directory of a process with exactly these variables, and a user that no passwd file knows."""
    code = "import logging; logging.basicConfig(); from jitgemm import cache; print(cache.default_cache().directory)"
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.getuid = lambda: 4242; {code}"],
        env={"PYTHONPATH": environment()["PYTHONPATH"], **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "no home directory" in done.stderr or variables
    return done.stdout.strip()


def test_the_default_is_below_the_users_cache_directory(tmp_path: Path) -> None:
    assert _default_directory(HOME=str(tmp_path)) == str(tmp_path / ".cache/jitgemm")
    assert _default_directory(HOME="/nowhere", XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "jitgemm")
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_the_fallback_is_fixed_and_stated() -> None:
    assert _default_directory() == "/tmp/jitgemm-4242"


# Housekeeping


def test_entries_are_listed_with_what_is_known_of_them(cache: KernelCache) -> None:
    cache.publish(make_cubin(OTHER_KEY))
    path = cache.publish(make_cubin())
    cache.publish(make_cubin(version="12.9")).write_bytes(b"?" * 100)
    (path.parent / "notes.txt").write_text("not an entry")
    first, second, third = cache.entries()
    assert (first.key, first.nvrtc_version, first.metadata, first.size) == (KEY, "12.9", None, 100)
    assert first.problem
    assert (second.path, second.size, second.problem) == (path, path.stat().st_size, None)
    assert second.metadata == make_cubin().metadata
    assert third.key == OTHER_KEY


def test_removing(cache: KernelCache) -> None:
    for version in ("12.9", "13.5"):
        cache.publish(make_cubin(version=version))
    assert cache.remove(KEY, "13.5") == 1
    assert cache.remove(KEY, "13.5") == 0
    cache.publish(make_cubin(version="13.5"))
    assert cache.remove(KEY) == 2
    assert cache.find(KEY) is None


def test_the_lock_names_its_holder_and_its_file_stays(cache: KernelCache) -> None:
    with cache.lock(KEY):
        assert cache.lock_holder(KEY) == os.getpid()
    assert (cache.directory / "locks" / f"{KEY}.lock").exists()


def test_publishing_sweeps_what_dead_writers_left_and_spares_the_living(cache: KernelCache) -> None:
    cache.publish(make_cubin())
    dead = cache.directory / "staging/dead"
    dead.write_bytes(b"half an ent")
    descriptor, living = cache._stage()
    cache.publish(make_cubin())
    assert not dead.exists()
    assert living.exists()
    os.close(descriptor)
    cache.publish(make_cubin())
    assert not living.exists()


def test_a_failed_publish_leaves_nothing(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        cache.publish(make_cubin())
    assert [path.name for path in cache.directory.rglob("*") if path.is_file()] == ["clock"]


def test_nothing_is_logged_to_a_terminal_by_default() -> None:
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("jitgemm").handlers)


def test_equal_cubins_are_equal_files() -> None:
    one: Cubin = make_cubin()
    assert encode(one) == encode(decode(encode(one)))
