"""Scenarios 13 to 19: damaged entries, full disks, compile errors, read-only directories.

Whatever stands at the place of an entry: a miss and a recompile, never a crash or a wrong kernel.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import KEY, NOBODY, SPEC, in_forked_child, in_processes, make_cubin, warnings_of

from jitgemm import builder, settings
from jitgemm.cache import KernelCache, default_cache, logger
from jitgemm.cache_key import cache_key
from jitgemm.compiler import Cubin, find_nvrtc
from jitgemm.errors import CacheError, CompileError
from jitgemm.families.base import KernelSpec

OTHER = KernelSpec.make("transpose_scales", "sm_90a", {"tile": 16, "threads": 256})


@pytest.fixture
def entry(cache_dir: Path) -> Path:
    """A valid entry, made by the real compiler and no longer in memory."""
    builder.build(SPEC)
    builder.forget()
    return default_cache().path_of(cache_key(SPEC), find_nvrtc().version_text)


def _flip(position: Callable[[bytes], int]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position(bytes(data))] ^= 4
        path.write_bytes(data)

    return damage


def _truncate(length: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, length(path.stat().st_size))


def _swap_for_symlink(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name("elsewhere")))


def _swap_for_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _swap_for_entry_of_another_key(path: Path) -> None:
    builder.build(OTHER)
    builder.forget()
    shutil.copyfile(default_cache().path_of(cache_key(OTHER), find_nvrtc().version_text), path)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_flip(lambda data: 0), id="magic"),
        pytest.param(_flip(lambda data: 8), id="length of metadata"),
        pytest.param(_flip(lambda data: 18), id="length of payload"),
        pytest.param(_flip(lambda data: data.index(b'"registers": ') + 13), id="metadata"),
        pytest.param(_flip(lambda data: data.index(b"\x7fELF") + 5000), id="payload"),
        pytest.param(_flip(lambda data: len(data) - 1), id="digest"),
        pytest.param(_truncate(lambda size: 0), id="empty"),
        pytest.param(_truncate(lambda size: 10), id="half a header"),
        pytest.param(_truncate(lambda size: size // 2), id="half a payload"),
        pytest.param(_truncate(lambda size: size - 1), id="last byte missing"),
        pytest.param(_truncate(lambda size: size + 4096), id="zeros appended"),
        pytest.param(_swap_for_symlink, id="symlink to the valid entry"),
        pytest.param(_swap_for_fifo, id="fifo"),
        pytest.param(_swap_for_entry_of_another_key, id="valid entry of another key"),
    ],
)
def test_a_damaged_entry_is_recompiled_and_healed(entry: Path, damage: Callable[[Path], None]) -> None:
    """Scenarios 13, 14, 29 and 30."""
    whole = default_cache().find(cache_key(SPEC))
    damage(entry)
    before = builder.stats()
    built = builder.build(SPEC)
    after = builder.stats()
    assert built.source == "compiled"
    assert whole is not None
    assert built.cubin.image == whole.image
    assert after.damaged - before.damaged == 1
    assert after.compiles - before.compiles >= 1
    builder.forget()
    assert builder.build(SPEC).source == "disk"


def test_a_folder_in_the_place_of_an_entry_is_left_alone(entry: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry.unlink()
    (entry / "content").mkdir(parents=True)
    assert builder.build(SPEC).source == "compiled"
    assert builder.build(SPEC).source == "memory"
    assert (entry / "content").is_dir()
    assert os.listdir(entry.parents[2] / "staging") == []


@pytest.fixture
def shared_dir(cache_dir: Path) -> Iterator[Path]:
    """A cache directory that other users can reach; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with settings.override(cache_dir=folder):
            yield Path(folder)


def test_a_read_only_directory_serves_hits_and_takes_nothing(shared_dir: Path) -> None:
    """Scenario 19."""
    builder.build(SPEC)
    builder.forget()
    for path in shared_dir.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    shared_dir.chmod(0o555)
    before = sorted((path, path.stat().st_mtime_ns) for path in shared_dir.rglob("*"))

    def child() -> None:
        assert builder.build(SPEC).source == "disk"
        assert builder.build(OTHER).source == "compiled"
        assert builder.build(OTHER).source == "memory"

    assert in_forked_child(child, user=NOBODY if os.geteuid() == 0 else None) == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in shared_dir.rglob("*")) == before
    shared_dir.chmod(0o755)


def _compiled_in_a_child_with_limit(limit: int, soft: int) -> int:
    cubins: list[Cubin] = [builder.build(OTHER).cubin]  # NVRTC has opened its files

    def child() -> None:
        resource.setrlimit(limit, (soft, resource.getrlimit(limit)[1]))
        assert builder.build(SPEC).source == "compiled"
        assert builder.build(SPEC).source == "memory"
        assert builder.build(OTHER).cubin == cubins[0]

    return in_forked_child(child)


def test_a_file_size_limit_costs_the_entry_and_not_the_kernel(cache_dir: Path) -> None:
    """Scenario 16: a write that fails half-way."""
    assert _compiled_in_a_child_with_limit(resource.RLIMIT_FSIZE, 4096) == 0
    assert default_cache().find(cache_key(SPEC)) is None
    assert os.listdir(cache_dir / "staging") == []


def test_no_file_descriptors_cost_the_entry_and_not_the_kernel(cache_dir: Path) -> None:
    """Scenario 16: EMFILE."""
    assert _compiled_in_a_child_with_limit(resource.RLIMIT_NOFILE, 0) == 0
    assert default_cache().find(cache_key(SPEC)) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few blocks."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k,mode=0700", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a file system here; the limit on file sizes stands for it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_the_entry_and_not_the_kernel(cache_dir: Path, small_disk: Path) -> None:
    """Scenario 16: ENOSPC from a disk that really is full."""
    with settings.override(cache_dir=small_disk), warnings_of(logger) as texts:
        (small_disk / "ballast").write_bytes(bytes(32 << 10))
        assert builder.build(SPEC).source == "compiled"
        assert builder.build(SPEC).source == "memory"
        assert builder.build(OTHER).source == "compiled"
        assert list(default_cache().entries()) == []
        assert os.listdir(small_disk / "staging") == []
        (text,) = texts
        assert os.strerror(errno.ENOSPC) in text
        (small_disk / "ballast").unlink()
        builder.forget()
        assert builder.build(SPEC).source == "compiled"
        builder.forget()
        assert builder.build(SPEC).source == "disk"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_quota_costs_the_entry_and_not_the_kernel(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Scenario 16: EDQUOT, at whichever step the file system tells it."""
    failures = builder.stats().publish_failures

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(builder, "_warned", set())
    monkeypatch.setattr(os, call, refuse)
    with warnings_of(logger) as texts:
        assert builder.build(SPEC).source == "compiled"
        assert builder.build(SPEC).source == "memory"
    monkeypatch.undo()
    (text,) = texts
    assert os.strerror(errno.EDQUOT) in text
    assert builder.stats().publish_failures == failures + 1
    assert list(KernelCache(cache_dir).entries()) == []
    assert os.listdir(cache_dir / "staging") == []


def test_an_invalid_entry_that_was_healed_meanwhile_is_not_replaced(entry: Path) -> None:
    """Scenario 15: found invalid, compiled again, and by then another process has put a valid one there."""
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1])
    compile_source = builder.compile_source

    def compile_while_another_heals(*arguments: Any) -> Cubin:
        cubin = compile_source(*arguments)
        healed = entry.with_name("healed")
        healed.write_bytes(whole)
        healed.rename(entry)
        return cubin

    builder.compile_source = compile_while_another_heals
    try:
        assert builder.build(SPEC).source == "compiled"
        inode = entry.stat().st_ino
    finally:
        builder.compile_source = compile_source
    assert entry.read_bytes() == whole
    builder.forget()
    assert builder.build(SPEC).source == "disk"
    assert entry.stat().st_ino == inode


def test_a_file_that_changes_between_judgement_and_replacement_is_judged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 15, at the narrowest: the invalid file gives way to a valid one just after it was read."""
    cache = KernelCache(tmp_path / "cache")
    path = cache.publish(make_cubin())
    whole = path.read_bytes()
    path.write_bytes(b"damaged")
    is_valid = KernelCache._is_valid
    judged: list[bool] = []

    def heal_after(self: KernelCache, at: Path) -> bool:
        judged.append(is_valid(self, at))
        if len(judged) == 1:
            path.with_name("healed").write_bytes(whole)
            path.with_name("healed").rename(path)
        return judged[-1]

    monkeypatch.setattr(KernelCache, "_is_valid", heal_after)
    cache.publish(make_cubin(image=b"compiled again"))
    assert judged == [False, True]
    assert cache.find(KEY) == make_cubin()


def test_a_file_that_others_replace_all_the_time_is_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario 15: a publish ends, whatever others do."""
    cache = KernelCache(tmp_path / "cache")
    path = cache.publish(make_cubin())
    path.write_bytes(b"damaged")
    judged: list[Path] = []

    def damage_again(self: KernelCache, at: Path) -> bool:
        judged.append(at)
        path.with_name("other").write_bytes(b"damaged" * len(judged))
        path.with_name("other").rename(path)
        return False

    monkeypatch.setattr(KernelCache, "_is_valid", damage_again)
    with pytest.raises(CacheError, match=f"{path} is replaced by others all the time"):
        cache.publish(make_cubin())
    assert len(judged) < 20
    assert list((tmp_path / "cache/staging").iterdir()) == []


def test_staging_is_always_on_the_file_system_of_the_entries(cache_dir: Path) -> None:
    """Scenario 17: staging that leads elsewhere is refused, not followed."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        cache_dir.mkdir(mode=0o700)
        (cache_dir / "staging").symlink_to(elsewhere)
        assert builder.build(SPEC).source == "compiled"
        assert os.listdir(elsewhere) == []
        assert list(KernelCache(cache_dir).entries()) == []
        (cache_dir / "staging").unlink()
    builder.forget()
    builder.build(SPEC)
    assert (cache_dir / "staging").stat().st_dev == (cache_dir / "kernels").stat().st_dev


def test_a_compile_error_is_raised_whole_never_kept_and_not_met_by_all_at_once(cache_dir: Path) -> None:
    """Scenario 18: processes that wait for a kernel that fails try it one after another, not together."""
    broken = KernelSpec.make("transpose_scales", "sm_90a", {"tile": "undeclared", "threads": 256})

    def build(index: int) -> dict[str, Any]:
        compile_source = builder.compile_source
        times: list[float] = []

        def timed(*arguments: Any) -> Cubin:
            times.append(time.monotonic())
            try:
                return compile_source(*arguments)
            finally:
                times.append(time.monotonic())

        builder.compile_source = timed
        try:
            builder.build(broken)
        except CompileError as error:
            return {"log": str(error), "times": times}
        raise AssertionError("it compiled")

    results = in_processes(4, build)
    for result in results:
        assert 'identifier "undeclared" is undefined' in result["log"]
        assert "transpose_scales.cu(" in result["log"]  # NVRTC's own lines
    spans = sorted(result["times"] for result in results)
    assert all(len(span) == 2 for span in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert not (cache_dir / "kernels").exists()
