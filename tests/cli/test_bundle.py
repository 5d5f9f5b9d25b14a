"""``jitgemm export`` and ``jitgemm import`` between caches."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from command import NARROW, Jitgemm
from support import make_cubin

from jitgemm.cache import KernelCache

NEEDED = ("--shapes", "tiny.jsonl", "--device", "h200")


@pytest.fixture
def bundle(warm: Jitgemm, tmp_path: Path) -> Path:
    path = tmp_path / "kernels.tar"
    warm("export", path)
    return path


@pytest.fixture
def other(warm: Jitgemm, tmp_path: Path) -> Jitgemm:
    """Another machine: the same problem, an empty cache, no NVRTC."""
    home = tmp_path / "other"
    home.mkdir()
    shutil.copy(warm.home / "tiny.jsonl", home)
    return Jitgemm(home, home / "cache", {**NARROW, "JITGEMM_NVRTC": "/no/libnvrtc.so"})


def test_a_bundle_carries_a_cache_to_another_machine(warm: Jitgemm, other: Jitgemm, tmp_path: Path) -> None:
    path = tmp_path / "kernels.tar"
    exported = warm.json("export", path)
    assert exported["exported"] == len(warm.cached_files()) > 0
    assert exported["bytes"] == path.stat().st_size
    assert exported["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    imported = other.json("import", path)
    assert (imported["imported"], imported["already_there"]) == (exported["exported"], 0)
    assert [file.read_bytes() for file in other.cached_files()] == [file.read_bytes() for file in warm.cached_files()]
    report = other.json("prewarm", *NEEDED, environment={"JITGEMM_JIT": "forbid"})
    assert report["hits"] == report["needed"] > 0
    assert other.json("import", path)["already_there"] == exported["exported"]


def test_an_import_keeps_the_bound(other: Jitgemm, bundle: Path) -> None:
    cache = KernelCache(other.cache)
    old = cache.publish(make_cubin())
    os.utime(old, (0, 0))
    imported = other.json("import", bundle, environment={"JITGEMM_CACHE_MAX_BYTES": "1"})["imported"]
    assert not old.exists()
    assert len(other.cached_files()) == imported > 0  # which are in use


def test_the_same_entries_are_the_same_bytes(warm: Jitgemm, other: Jitgemm, bundle: Path, tmp_path: Path) -> None:
    content = bundle.read_bytes()
    other("import", bundle)
    for number, file in enumerate(reversed(other.cached_files())):
        os.utime(file, (number, number))
        file.chmod(0o640)
    again = tmp_path / "again.tar"
    other("export", again)
    other("export", bundle)  # in place of the one that is there
    assert again.read_bytes() == bundle.read_bytes() == content
    with tarfile.open(bundle) as archive:  # any tar program shows what is in it
        assert archive.getnames() == sorted(file.name for file in warm.cached_files())
        assert {(one.mtime, one.uid, one.gid, one.uname, one.gname, one.mode) for one in archive} == {
            (0, 0, 0, "", "", 0o644)
        }


def test_an_export_may_be_narrowed(warm: Jitgemm, tmp_path: Path) -> None:
    path, count = tmp_path / "some.tar", len(warm.cached_files())
    assert warm.json("export", path, *NEEDED)["exported"] == count
    assert warm.json("export", path, "--arch", "sm_90a")["exported"] == count
    one = warm.json("prewarm", *NEEDED)["kernels"][0]["key"]
    few = Jitgemm(tmp_path, tmp_path / "cache", dict(NARROW))
    (file,) = [file for file in warm.cached_files() if file.name.startswith(one)]
    copy = few.cache / file.relative_to(warm.cache)
    copy.parent.mkdir(parents=True)
    shutil.copy(file, copy)
    shutil.copy(warm.home / "tiny.jsonl", tmp_path)
    assert few.json("export", path)["exported"] == 1
    done = few("export", tmp_path / "all.tar", *NEEDED, code=1)
    assert f"{count - 1} of {count} kernels are not in {few.cache}" in done.stderr
    assert not (tmp_path / "all.tar").exists()


def test_a_damaged_entry_is_left_out_with_a_word(warm: Jitgemm, other: Jitgemm, bundle: Path, tmp_path: Path) -> None:
    other("import", bundle)
    damaged, *whole = other.cached_files()
    damaged.write_bytes(b"damaged")
    done = other("export", tmp_path / "rest.tar")
    assert done.stderr == f"jitgemm: export: {damaged} is left out: it is truncated\n"
    with tarfile.open(tmp_path / "rest.tar") as archive:
        assert archive.getnames() == [file.name for file in whole]


def test_errors_are_one_line(other: Jitgemm, warm: Jitgemm, bundle: Path, tmp_path: Path) -> None:
    def error(*arguments: object, code: int) -> str:
        done = other(*arguments, code=code)
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        return done.stderr

    path = tmp_path / "no.tar"
    assert f"{other.cache} has no kernel" in error("export", path, code=1)
    assert "--preset and --shapes" in error("export", path, "--shapes", "tiny.jsonl", "--preset", "deepseek-v3", code=2)
    assert "--device" in error("export", path, "--device", "h200", code=2)
    assert "does not exist" in error("import", path, code=2)
    assert "directory" in error("import", tmp_path, code=2)
    hostile = tmp_path / "hostile.tar"
    with tarfile.open(hostile, "w") as archive:
        archive.add(bundle, arcname="../\x1b[31m/etc/passwd")
    refused = error("import", hostile, code=2)
    assert "is refused" in refused
    assert refused.strip().isprintable()
    assert not path.exists()
    assert not other.cache.exists()
    (other.home / "file").write_text("in the way")
    assert "Not a directory" in error("import", bundle, "--cache-dir", "file/cache", code=3)


def test_a_bundle_that_cannot_be_written_leaves_nothing(warm: Jitgemm, tmp_path: Path) -> None:
    done = warm("export", tmp_path / "absent/kernels.tar", code=3)
    assert "No such file or directory" in done.stderr
    target = tmp_path / "kernels.tar"
    target.write_bytes(b"an older one")
    link = tmp_path / "link.tar"
    link.symlink_to(target)
    warm("export", link)
    assert link.is_symlink()
    assert target.read_bytes() != b"an older one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.tar", "link.tar"]
