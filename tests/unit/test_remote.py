"""The remote layer in one process: what it answers, refuses, and how long it may take."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from support import KEY, SPEC, in_forked_child, make_cubin

from jitgemm import builder, remote, settings
from jitgemm.cache import MAX_ENTRY_BYTES, KernelCache, decode, default_cache, encode
from jitgemm.cache_key import cache_key
from jitgemm.compiler import Cubin, NvrtcLibrary
from jitgemm.errors import CacheMissError, SettingsError
from jitgemm.families.base import KernelSpec
from jitgemm.remote import Remote
from jitgemm.render import KernelSource

OTHER = KernelSpec.make("transpose_scales", "sm_90a", {"tile": 16, "threads": 256})


@pytest.fixture(autouse=True)
def caught(cache_dir: Path, caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """An empty local cache, no remote that an earlier test has met, and the warnings."""
    remote._remote_at.cache_clear()
    remote._refused.clear()
    with caplog.at_level(logging.WARNING, logger="jitgemm"):
        yield caplog


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/remote"
        return
    yield "memory://remote"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for NVRTC 13.5: the keys that it compiled."""
    keys: list[str] = []

    def compile_source(source: KernelSource, spec: KernelSpec, key: str) -> Cubin:
        keys.append(key)
        return make_cubin(key)

    monkeypatch.setattr(builder, "compile_source", compile_source)
    monkeypatch.setattr(builder, "find_nvrtc", lambda: NvrtcLibrary(Path("libnvrtc.so"), (13, 5)))
    monkeypatch.setattr(builder, "_warned", set())
    return keys


def _elsewhere(url: str, cache_dir: Path) -> Any:
    """Settings of another host with a cache of its own."""
    builder.forget()
    return settings.override(cache_dir=cache_dir.with_name("elsewhere"), remote=url)


def _objects(url: str) -> list[str]:
    files, root = fsspec.core.url_to_fs(url)
    return sorted(files.find(root))


def _put(url: str, key: str, version: str, data: bytes) -> str:
    path = f"{url}/kernels/{key}/{version}.jgk"
    with fsspec.open(path, "wb", auto_mkdir=True) as file:
        file.write(data)
    return path


def test_what_one_host_compiled_another_fetches(url: str, compiled: list[str], cache_dir: Path) -> None:
    before = builder.stats()
    with settings.override(remote=url, remote_write=True):
        first = builder.build(SPEC)
    (path,) = _objects(url)
    assert path.endswith(f"/remote/kernels/{cache_key(SPEC)}/13.5.jgk")
    with _elsewhere(url, cache_dir):
        second = builder.build(SPEC)
        builder.forget()
        third = builder.build(SPEC)
    assert [built.source for built in (first, second, third)] == ["compiled", "remote", "disk"]
    assert first.cubin == second.cubin == third.cubin
    assert compiled == [cache_key(SPEC)]
    after = builder.stats()
    assert (after.remote_hits - before.remote_hits, after.misses - before.misses) == (1, 2)
    with fsspec.open(f"{url}/kernels/{cache_key(SPEC)}/13.5.jgk") as file:
        assert file.read() == KernelCache(cache_dir).path_of(cache_key(SPEC), "13.5").read_bytes()


def test_a_fetch_keeps_the_bound_of_the_cache_directory(url: str, compiled: list[str], cache_dir: Path) -> None:
    cache = KernelCache(cache_dir)
    old = cache.publish(make_cubin())
    os.utime(old, (0, 0))
    Remote(url, 10).publish(make_cubin(cache_key(SPEC)))
    with settings.override(remote=url, cache_max_bytes=1):
        assert builder.build(SPEC).source == "remote"
    assert [file.key for file in cache.files()] == [cache_key(SPEC)]


def test_nothing_is_uploaded_unless_asked(url: str, compiled: list[str]) -> None:
    with settings.override(remote=url):
        assert builder.build(SPEC).source == "compiled"
    assert _objects(url) == []


def test_forbid_fetches_and_an_absent_kernel_names_both_places(url: str, compiled: list[str], cache_dir: Path) -> None:
    Remote(url, 10).publish(make_cubin(cache_key(SPEC)))
    with settings.override(remote=url, jit="forbid"):
        assert builder.build(SPEC).source == "remote"
        with pytest.raises(CacheMissError) as caught:
            builder.build(OTHER)
    assert f"{cache_dir} or {url}" in str(caught.value)
    assert compiled == []


def test_who_may_not_compile_waits_for_nobody_who_does(compiled: list[str], tmp_path: Path, cache_dir: Path) -> None:
    url = f"file://{tmp_path}/remote"
    Remote(url, 10).publish(make_cubin(cache_key(SPEC)))
    with KernelCache(cache_dir).lock(cache_key(SPEC)), settings.override(remote=url, jit="forbid", lock_timeout=30):
        start = time.monotonic()
        assert builder.build(SPEC).source == "remote"
        assert time.monotonic() - start < 10


def test_nothing_is_fetched_while_a_graph_is_captured(url: str, compiled: list[str], cache_dir: Path) -> None:
    Remote(url, 10).publish(make_cubin(cache_key(SPEC)))
    with settings.override(remote=url):
        with pytest.raises(CacheMissError, match="a CUDA graph is being captured"):
            builder.build(SPEC, capturing=True)
        assert not cache_dir.exists()
        assert builder.build(SPEC).source == "remote"
        assert builder.build(SPEC, capturing=True).source == "memory"


def test_warn_warns_of_compiles_only(url: str, compiled: list[str], caught: pytest.LogCaptureFixture) -> None:
    Remote(url, 10).publish(make_cubin(cache_key(SPEC)))
    with settings.override(remote=url, jit="warn"):
        builder.build(SPEC)
        assert caught.records == []
        builder.build(OTHER)
    (record,) = caught.records
    assert cache_key(OTHER) in record.getMessage()


def test_the_exact_version_then_the_newest_that_loads(url: str) -> None:
    shared = Remote(url, 10)
    for version in ("12.9", "13.2", "13.10"):
        shared.publish(make_cubin(KEY, version))

    def found(**how: Any) -> str | None:
        cubin = shared.find(KEY, **how)
        return cubin and cubin.metadata.nvrtc_version

    assert found(version="12.9") == "12.9"
    assert found(version="13.5") == "13.10"
    assert found() == "13.10"
    assert found(version="13.5", loadable=lambda version: version.startswith("12")) == "12.9"
    assert found(version="13.2", exact=True) == "13.2"
    assert found(version="13.5", exact=True) is None
    assert found(loadable=lambda version: False) is None


def _damaged() -> dict[str, bytes]:
    cubin = make_cubin(cache_key(SPEC))
    whole = encode(cubin)
    lying = Cubin(cubin.image, dataclasses.replace(cubin.metadata, spec=OTHER.to_dict()))
    return {
        "empty": b"",
        "truncated": whole[:-1],
        "longer": whole + b"\0",
        "a page of HTML": b"<html>403</html>" * 10,
        **{f"flipped at {at}": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (3, 9, 60, -40, -1)},
        "another key": encode(make_cubin(KEY)),
        "another version": encode(make_cubin(cache_key(SPEC), "13.4")),
        "another kernel's spec": encode(lying),
    }


@pytest.mark.parametrize("kind", _damaged())
def test_a_damaged_or_foreign_object_is_refused_counted_and_replaced(
    url: str, compiled: list[str], caught: pytest.LogCaptureFixture, kind: str
) -> None:
    path = _put(url, cache_key(SPEC), "13.5", _damaged()[kind])
    with settings.override(remote=url, jit="forbid"):
        for _ in range(2):
            with pytest.raises(CacheMissError):
                builder.build(SPEC)
    with settings.override(remote=url, remote_write=True):
        assert builder.build(SPEC).source == "compiled"
    assert builder.stats().remote_damaged == default_cache().stats().remote_damaged == 1
    (record,) = caught.records
    assert path in record.getMessage()
    with fsspec.open(path) as file:
        assert decode(file.read()) == make_cubin(cache_key(SPEC))


def test_an_older_valid_object_serves_where_the_newest_is_damaged(url: str) -> None:
    shared = Remote(url, 10)
    shared.publish(make_cubin(KEY, "12.9"))
    _put(url, KEY, "13.5", b"damaged")
    assert shared.find(KEY, version="13.5") == make_cubin(KEY, "12.9")


def test_an_object_larger_than_any_entry_is_not_even_read(tmp_path: Path, caught: pytest.LogCaptureFixture) -> None:
    url = f"file://{tmp_path}/remote"
    os.truncate(_put(url, KEY, "13.5", b"").removeprefix("file://"), MAX_ENTRY_BYTES + 1)
    assert Remote(url, 10).find(KEY) is None
    (record,) = caught.records
    assert "larger than an entry may be" in record.getMessage()


def test_other_names_among_the_objects_are_passed_over(url: str) -> None:
    for version in ("latest", "13.5.jgk.0123456789abcdef", "v13.5", "13.5.1", "deeper/13.5"):
        _put(url, KEY, version, encode(make_cubin(KEY)))
    assert Remote(url, 10).find(KEY) is None


class Stuck(fsspec.AbstractFileSystem):
    """A file system that answers nothing until released."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__(skip_instance_cache=True)
        self.act = act
        self.calls = 0

    def find(self, path: str, **how: Any) -> dict[str, Any]:
        self.calls += 1
        self.act()
        return {}

    def pipe_file(self, path: str, value: bytes, **how: Any) -> None:
        self.calls += 1
        self.act()


def _broken(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> Stuck:
    files = Stuck(act)
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme, **options: files)
    return files


def test_a_remote_that_hangs_costs_one_timeout_and_one_warning(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, caught: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    def hang() -> None:
        release.wait(60)

    files = _broken(monkeypatch, hang)
    with settings.override(remote="memory://stuck", remote_write=True, remote_timeout=0.3):
        start = time.monotonic()
        assert builder.build(SPEC).source == "compiled"  # neither the look-up nor the upload is waited for again
        assert builder.build(OTHER).source == "compiled"
        assert 0.3 <= time.monotonic() - start < 0.3 + 5
    assert files.calls == 1
    (record,) = caught.records
    assert "memory://stuck" in record.getMessage()
    assert "no answer in 0.3 s" in record.getMessage()
    release.set()


def test_a_remote_that_fails_is_tried_again_later_with_no_further_warning(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, caught: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise PermissionError("Access\x1b[31mDenied\n" + "x" * 10_000)

    files = _broken(monkeypatch, fail)
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.2)
    with settings.override(remote="memory://closed"):
        builder.build(SPEC)
        builder.build(OTHER)
        assert files.calls == 1
        time.sleep(0.2)
        files.act = lambda: None
        builder.build(KernelSpec.make("transpose_scales", "sm_90a", {"tile": 8, "threads": 256}))
        assert files.calls == 2
    (record,) = caught.records
    assert "PermissionError" in record.getMessage()
    assert record.getMessage().isprintable()
    assert len(record.getMessage()) < 1000


def test_an_upload_that_fails_loses_nothing(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, cache_dir: Path, caught: pytest.LogCaptureFixture
) -> None:
    calls = iter([None, OSError("read-only")])

    def act() -> None:
        error = next(calls)
        if error is not None:
            raise error

    _broken(monkeypatch, act)
    with settings.override(remote="memory://read-only", remote_write=True):
        assert builder.build(SPEC).source == "compiled"
    assert KernelCache(cache_dir).find(cache_key(SPEC)) is not None
    (record,) = caught.records
    assert "read-only" in record.getMessage()


def test_a_local_cache_that_cannot_be_written_still_gets_kernels(url: str, compiled: list[str], tmp_path: Path) -> None:
    Remote(url, 10).publish(make_cubin(cache_key(SPEC)))
    (tmp_path / "file").write_text("in the way")
    with settings.override(cache_dir=tmp_path / "file/cache", remote=url):
        assert builder.build(SPEC).source == "remote"
        assert builder.build(SPEC).source == "memory"
    assert compiled == []


def test_ensure_uploads_what_is_missing_or_damaged_only(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    shared, cubin = Remote(url, 10), make_cubin()
    assert shared.ensure(cubin)
    (path,) = map(Path, _objects(url))
    inode = path.stat().st_ino
    assert shared.ensure(cubin)
    assert path.stat().st_ino == inode
    path.write_bytes(b"damaged")
    assert shared.ensure(cubin)
    assert decode(path.read_bytes()) == cubin
    assert _objects(url) == [str(path)]  # nothing staged is left


def test_an_upload_to_a_directory_that_is_killed_halfway_shows_nothing(
    tmp_path: Path, caught: pytest.LogCaptureFixture
) -> None:
    url, cubin = f"file://{tmp_path}/remote", make_cubin()

    def write_half(self: LocalFileSystem, path: str, value: bytes) -> None:
        Path(path).parent.mkdir(parents=True)
        Path(path).write_bytes(value[: len(value) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        LocalFileSystem.pipe_file = write_half
        Remote(url, 10).publish(cubin)

    assert in_forked_child(child) == -signal.SIGKILL
    assert len(_objects(url)) == 1
    shared = Remote(url, 10)
    assert shared.find(KEY) is None
    assert caught.records == []
    assert shared.publish(cubin)
    assert shared.find(KEY) == cubin


def test_a_forked_child_opens_the_remote_anew(compiled: list[str], tmp_path: Path, cache_dir: Path) -> None:
    url = f"file://{tmp_path}/remote"
    with settings.override(remote=url, remote_write=True):
        builder.build(SPEC)
        parents = remote.default_remote()

        def child() -> None:
            assert remote.default_remote() is not parents
            with _elsewhere(url, cache_dir):
                assert builder.build(SPEC).source == "remote"

        assert in_forked_child(child) == 0


def test_a_missing_package_is_an_error_that_names_the_extra(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gcsfs" else object())
    with settings.override(remote="gs://bucket/jitgemm"), pytest.raises(SettingsError) as caught:
        builder.build(SPEC)
    assert all(part in str(caught.value) for part in ("gs://bucket/jitgemm", "gcsfs", "jitgemm[remote-gs]"))
    assert compiled == []


def test_a_remote_is_not_opened_before_it_is_needed(url: str, compiled: list[str], cache_dir: Path) -> None:
    KernelCache(cache_dir).publish(make_cubin(cache_key(SPEC)))
    with settings.override(remote="gs://bucket"):  # gcsfs is not even there
        assert builder.build(SPEC).source == "disk"
        assert builder.find_cached(OTHER) is None  # a question about the files here
