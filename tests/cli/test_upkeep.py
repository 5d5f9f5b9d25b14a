"""``verify``, ``prune``, ``clear``, ``stats`` and ``path``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from command import NARROW, Jitgemm

DAY = 86_400


@pytest.fixture(scope="module")
def several(warm: Jitgemm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a few kernels of two problems; not to be changed."""
    home = tmp_path_factory.mktemp("several")
    shutil.copytree(warm.cache, home / "cache")
    (home / "more.jsonl").write_text('{"n": 256, "k": 512, "recipe": "bf16"}\n')
    Jitgemm(home, home / "cache", dict(NARROW))("prewarm", "--shapes", home / "more.jsonl", "--device", "h200")
    return home / "cache"


@pytest.fixture
def filled(several: Path, tmp_path: Path) -> Jitgemm:
    """The command with a cache of its own that holds a few kernels, each used a day before the next."""
    shutil.copytree(several, tmp_path / "cache")
    jitgemm = Jitgemm(tmp_path, tmp_path / "cache")
    files = jitgemm.cached_files()
    assert len(files) >= 3
    now = files[0].stat().st_mtime
    for age, path in enumerate(files, start=1):
        os.utime(path, (now - age * DAY,) * 2)
    return jitgemm


def _keys(jitgemm: Jitgemm) -> list[str]:
    return [path.name[:64] for path in jitgemm.cached_files()]


def test_verify(filled: Jitgemm) -> None:
    count = len(_keys(filled))
    report = filled.json("verify")
    assert report["cache_dir"] == str(filled.cache)
    assert report["counts"] == {"ok": count, "stale": 0, "wrong key": 0, "damaged": 0}
    assert [(entry["state"], entry["reason"], entry["served"]) for entry in report["entries"]] == [
        ("ok", None, True)
    ] * count
    first, second, third = filled.cached_files()[:3]
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(third.read_bytes())
    report = filled.json("verify", code=1)
    assert report["counts"] == {"ok": count - 2, "stale": 0, "wrong key": 1, "damaged": 1}
    text = filled("verify", code=1).stdout
    assert all(part in text for part in (first.name[:12], second.name[:12], "damaged", "wrong key", f"{count} entries"))
    removed = filled.json("prune", "--damaged")["removed"]
    assert [entry["file"] for entry in removed] == [str(first), str(second)]
    assert filled.json("verify")["counts"]["ok"] == count - 2


def test_stale_entries_fail_nothing(filled: Jitgemm) -> None:
    count = len(_keys(filled))
    environment = {"JITGEMM_CACHE_DIR": str(filled.cache)}
    other = filled.home / "other"
    shutil.copytree(Path(__file__).resolve().parents[2], other, ignore=shutil.ignore_patterns(".git", "docs", "tests"))
    header = other / "templates/include/common.cuh"
    header.write_text(header.read_text() + "\n// changed\n")
    environment["PYTHONPATH"] = os.pathsep.join((str(filled.home / "decoys"), str(other)))
    report = filled.json("verify", environment=environment)
    assert report["counts"] == {"ok": 0, "stale": count, "wrong key": 0, "damaged": 0}
    assert len(filled.json("prune", "--stale", "--dry-run", environment=environment)["removed"]) == count
    assert filled.json("prune", "--stale")["removed"] == []


def test_prune(filled: Jitgemm) -> None:
    keys = _keys(filled)
    sizes = [path.stat().st_size for path in filled.cached_files()]
    dry = filled.json("prune", "--unused-for", "36h", "--dry-run")
    assert [entry["key"] for entry in dry["removed"]] == keys[:0:-1]  # the oldest first
    assert _keys(filled) == keys
    assert "would remove" in filled("prune", "--max-size", sum(sizes) - 1, "--dry-run").stdout
    report = filled.json("prune", "--max-size", sum(sizes) - 1)
    assert [entry["key"] for entry in report["removed"]] == keys[-1:]
    assert (report["entries"], report["bytes"]) == (len(keys) - 1, sum(sizes[:-1]))
    assert report["removed_bytes"] == sizes[-1]
    text = filled("prune", environment={"JITGEMM_CACHE_MAX_BYTES": "0"}).stdout
    assert text.startswith(f"removed {len(keys) - 1} kernels")
    assert _keys(filled) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), ["--max-size", "--unused-for", "--stale", "--damaged", "JITGEMM_CACHE_MAX_BYTES"]),
        (("--max-size", "many"), ["--max-size", "'many'", "500M"]),
        (("--max-size", "-1"), ["--max-size", "'-1'"]),
        (("--unused-for", "30"), ["--unused-for", "'30'", "30d"]),
        (("--unused-for", "d"), ["--unused-for", "'d'"]),
    ],
)
def test_prune_usage(filled: Jitgemm, arguments: tuple[str, ...], said: list[str]) -> None:
    done = filled("prune", *arguments, code=2)
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in said), done.stderr
    assert done.stdout == ""


def test_clear(filled: Jitgemm) -> None:
    count = len(_keys(filled))
    assert filled("clear").stdout.startswith(f"removed {count} kernels")
    assert _keys(filled) == []
    assert filled.json("clear")["removed"] == []


def test_stats(filled: Jitgemm, shapes: Path) -> None:
    before = filled.json("stats")
    count = len(_keys(filled))
    assert before["entries"] == before["counts"]["compiles"] == before["counts"]["misses"] == count
    assert before["bytes"] == sum(path.stat().st_size for path in filled.cached_files())
    assert before["counts"]["compile_seconds"] > 0
    text = filled("stats", environment={"JITGEMM_CACHE_MAX_BYTES": "1G"}).stdout
    assert all(name in text for name in before["counts"])
    assert filled.json("stats", environment={"JITGEMM_CACHE_MAX_BYTES": "1G"})["max_bytes"] == 1 << 30


def test_path(jitgemm: Jitgemm) -> None:
    assert jitgemm("path").stdout == f"{jitgemm.cache}\n"
    listed = {"JITGEMM_CACHE_DIR": f"{jitgemm.cache}:/image/cache"}
    assert jitgemm("path", environment=listed).stdout == f"{jitgemm.cache}\n"
    assert jitgemm.json("path", environment=listed)["layers"] == ["/image/cache"]
    assert jitgemm.json("path", "--cache-dir", "a:b")["layers"] == [str(jitgemm.home / "b")]
    assert "--cache-dir" in jitgemm("path", "--cache-dir", "a:", code=2).stderr
    assert not jitgemm.cache.exists()


def test_a_layer_below_is_listed_verified_and_left_alone(filled: Jitgemm, tmp_path: Path) -> None:
    environment = {"JITGEMM_CACHE_DIR": f"{tmp_path / 'mine'}:{filled.cache}"}
    keys = _keys(filled)
    assert [entry["key"] for entry in filled.json("list", environment=environment)["entries"]] == keys
    assert filled.json("verify", environment=environment)["counts"]["ok"] == len(keys)
    for command in ("list", "verify"):
        assert filled(command, environment=environment).stdout.endswith(f" in {environment['JITGEMM_CACHE_DIR']}\n")
    assert filled.json("show", keys[0], environment=environment)["key"] == keys[0]
    assert filled.json("doctor", environment=environment)["cache"]["layers"] == [str(filled.cache)]
    assert filled.json("stats", environment=environment)["entries"] == 0
    bundle = tmp_path / "kernels.tar"
    assert filled.json("export", bundle, environment=environment)["exported"] == len(keys)
    assert filled.json("import", bundle, environment=environment)["already_there"] == len(keys)
    assert environment["JITGEMM_CACHE_DIR"] in filled("show", "f" * 64, code=1, environment=environment).stderr
    for command in (("prune", "--max-size", "0"), ("clear",)):
        assert filled.json(*command, environment=environment)["removed"] == []
    assert _keys(filled) == keys
    assert not (tmp_path / "mine").exists()


def test_a_directory_that_cannot_be_changed_is_one_line(filled: Jitgemm) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may remove from any directory")
    folders = [path for path in filled.cache.rglob("*") if path.is_dir()]
    for folder in folders:
        folder.chmod(0o500)
    try:
        assert filled("prune", "--max-size", "0", code=3).stderr.count("\n") == 1
    finally:
        for folder in folders:
            folder.chmod(0o700)
