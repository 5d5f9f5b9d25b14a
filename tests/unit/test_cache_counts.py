from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
from support import SPEC, in_forked_child, in_processes

import jitgemm
from jitgemm import builder, cache_counts
from jitgemm.cache import KernelCache, default_cache
from jitgemm.cache_counts import Stats, add_to_file, read_file


def test_counts_of_many_processes_add_up(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"

    def work(index: int) -> bool:
        return all(add_to_file(path, Stats(disk_hits=1, misses=2, compile_seconds=0.5)) for _ in range(20))

    assert all(in_processes(16, work))
    assert read_file(path) == Stats(disk_hits=320, misses=640, compile_seconds=160.0)
    assert json.loads(path.read_text())["disk_hits"] == 320
    assert path.stat().st_size == 1024


def test_the_largest_counts_fit_into_the_file(tmp_path: Path) -> None:
    largest = Stats(**{name: type(value)(9e17) for name, value in vars(Stats()).items()})
    assert add_to_file(tmp_path / "stats.json", largest)
    assert read_file(tmp_path / "stats.json") == largest
    assert (tmp_path / "stats.json").stat().st_size == 1024


def test_who_cannot_have_the_lock_keeps_its_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_counts, "_PATIENCE_SECONDS", 0.02)
    cache = KernelCache(tmp_path)
    cache.count(Stats(misses=1))
    with (tmp_path / "stats.json").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache.save_counts()
        assert cache.stats() == Stats()
    cache.save_counts()
    cache.save_counts()
    assert cache.stats() == Stats(misses=1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff" * 512,
        b"[" * 100_000,
        b'{"misses": -1, "compiles": "x", "other": 1}',
        b'{"misses": NaN}',
    ],
)
def test_a_damaged_file_counts_as_zeros(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stats.json"
    path.write_bytes(content)
    assert read_file(path) == Stats()
    assert add_to_file(path, Stats(misses=1))
    assert read_file(path) == Stats(misses=1)


def test_no_directory_is_made_for_counts(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "cache")
    cache.count(Stats(misses=1))
    cache.save_counts()
    assert not cache.directory.exists()


def test_a_directory_knows_what_it_was_asked_by_all(cache_dir: Path) -> None:
    def work(index: int) -> Any:
        built = builder.build(SPEC)
        default_cache().save_counts()  # as a process does at its end
        return built.source

    sources = in_processes(4, work)
    counts = default_cache().stats()
    assert counts.compiles == sources.count("compiled") == 1
    assert counts.misses >= 1
    assert counts.misses + counts.disk_hits == 4
    assert counts.lock_waits == counts.misses - 1
    assert counts.compile_seconds > 0
    assert (counts.memory_hits, counts.damaged, counts.publish_failures) == (0, 0, 0)
    (file,) = default_cache().files()
    file.path.write_bytes(b"")
    in_processes(1, work)
    assert default_cache().stats().damaged == 1


def test_a_fork_does_not_count_what_its_parent_will(cache_dir: Path) -> None:
    default_cache().count(Stats(misses=5))
    cache_dir.mkdir(mode=0o700)
    assert in_forked_child(lambda: default_cache().save_counts()) == 0
    assert not (cache_dir / "stats.json").exists()
    default_cache().save_counts()
    assert default_cache().stats().misses == 5


def test_a_process_knows_its_own(cache_dir: Path) -> None:
    before = jitgemm.cache_stats()
    builder.build(SPEC)
    builder.build(SPEC)
    after = jitgemm.cache_stats()
    assert (after.compiles - before.compiles, after.memory_hits - before.memory_hits) == (1, 1)
    assert after.compile_seconds > before.compile_seconds
    assert os.path.exists(cache_dir / "stats.json")
