"""A remote layer that ``jitgemm prewarm`` fills in one place and reads in another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import NARROW, Jitgemm
from s3 import s3_environment, s3_server

PREWARM = ("prewarm", "--shapes", "tiny.jsonl", "--device", "h200")


@pytest.fixture
def empty(warm: Jitgemm, tmp_path: Path) -> Jitgemm:
    """Another host: the same problem, nothing in the cache, no NVRTC."""
    shutil.copy(warm.home / "tiny.jsonl", tmp_path)
    return Jitgemm(tmp_path, tmp_path / "cache", {**NARROW, "JITGEMM_NVRTC": "/no/libnvrtc.so"})


def test_filled_by_a_prewarm_and_read_by_another(warm: Jitgemm, empty: Jitgemm) -> None:
    with s3_server() as port:
        remote = {"JITGEMM_REMOTE": "s3://bucket/ci", "JITGEMM_REMOTE_TIMEOUT": "30", **s3_environment(port)}
        filled = warm.json(*PREWARM, environment={**remote, "JITGEMM_REMOTE_WRITE": "1"})
        assert (filled["hits"], filled["not_uploaded"]) == (filled["needed"], 0)
        fetched = empty.json(*PREWARM, environment=remote)
    assert (fetched["fetched"], fetched["built"], fetched["failed"]) == (filled["needed"], 0, 0)
    assert {kernel["state"] for kernel in fetched["kernels"]} == {"fetched"}
    assert [path.read_bytes() for path in empty.cached_files()] == [path.read_bytes() for path in warm.cached_files()]
    again = empty(*PREWARM)
    assert f"{filled['needed']} already cached" in again.stdout


def test_what_a_prewarm_builds_is_uploaded_too(jitgemm: Jitgemm, shapes: Path) -> None:
    remote = jitgemm.home / "remote"
    environment = {
        "JITGEMM_CONFIG": "64x128x128 s4",
        "JITGEMM_REMOTE": f"file://{remote}",
        "JITGEMM_REMOTE_WRITE": "1",
        "JITGEMM_REMOTE_TIMEOUT": "30",
    }
    report = jitgemm.json("prewarm", "--shapes", shapes, "--device", "h200", environment=environment)
    assert report["built"] == report["needed"] > 0
    assert {path.parent.name: path.read_bytes() for path in remote.rglob("*.jgk")} == {
        path.name.split(".")[0]: path.read_bytes() for path in jitgemm.cached_files()
    }
    shutil.rmtree(jitgemm.cache)
    done = jitgemm("prewarm", "--shapes", shapes, "--device", "h200", environment=environment)
    assert f"{report['needed']} fetched" in done.stdout


def test_a_remote_that_cannot_be_filled_is_a_failure(warm: Jitgemm, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    environment = {"JITGEMM_REMOTE": f"file://{tmp_path}/file/remote", "JITGEMM_REMOTE_WRITE": "1"}
    done = warm(*PREWARM, code=1, environment=environment)
    warning, summary = done.stderr.splitlines()
    assert f"warning: kernel cache: the remote file://{tmp_path}/file/remote failed" in warning
    assert summary.endswith(f"kernels are in the cache, but not in file://{tmp_path}/file/remote")


def test_a_remote_that_does_not_answer_is_said_once(empty: Jitgemm) -> None:
    nowhere = {**s3_environment(9), "JITGEMM_REMOTE": "s3://bucket", "JITGEMM_REMOTE_TIMEOUT": "0.5"}
    warning, error = empty(*PREWARM, code=3, environment=nowhere).stderr.splitlines()
    assert "warning: kernel cache: the remote s3://bucket failed" in warning
    assert "/no/libnvrtc.so" in error  # what could still have been done about it


def test_prewarm_of_a_remote_whose_package_is_missing(jitgemm: Jitgemm, shapes: Path) -> None:
    (jitgemm.home / "decoys" / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'gcsfs' else find(name, *more)\n"
    )
    done = jitgemm("prewarm", "--shapes", shapes, code=3, environment={"JITGEMM_REMOTE": "gs://bucket"})
    assert done.stderr.count("\n") == 1
    assert "gcsfs" in done.stderr
    assert "jitgemm[remote-gs]" in done.stderr
    assert not jitgemm.cache.exists()


def test_doctor_asks_the_remote(warm: Jitgemm, tmp_path: Path) -> None:
    remote = f"file://{tmp_path}/remote"
    assert warm.json("doctor", environment={"JITGEMM_REMOTE": remote})["cache"]["remote_answers"] is True
    nowhere = {**s3_environment(9), "JITGEMM_REMOTE": "s3://bucket", "JITGEMM_REMOTE_TIMEOUT": "0.5"}
    report = warm.json("doctor", code=3, environment=nowhere)
    assert report["cache"]["remote_answers"] is False
    assert any("the remote s3://bucket failed" in problem for problem in report["problems"])
