"""Whatever stands at the place of an entry: a miss and a recompile, never a crash or a wrong kernel."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import NOBODY, SPEC, in_forked_child

from jitgemm import builder, settings
from jitgemm.cache import default_cache
from jitgemm.cache_key import cache_key
from jitgemm.compiler import Cubin, find_nvrtc
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


def test_a_full_disk_costs_the_entry_and_not_the_kernel(cache_dir: Path) -> None:
    assert _compiled_in_a_child_with_limit(resource.RLIMIT_FSIZE, 4096) == 0
    assert default_cache().find(cache_key(SPEC)) is None
    assert os.listdir(cache_dir / "staging") == []


def test_no_file_descriptors_cost_the_entry_and_not_the_kernel(cache_dir: Path) -> None:
    assert _compiled_in_a_child_with_limit(resource.RLIMIT_NOFILE, 0) == 0
    assert default_cache().find(cache_key(SPEC)) is None
