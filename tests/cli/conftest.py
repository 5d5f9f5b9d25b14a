"""The command with an empty cache, and with a filled one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import NARROW, TINY, Jitgemm


@pytest.fixture
def jitgemm(tmp_path: Path) -> Jitgemm:
    """The command with an empty cache."""
    return Jitgemm(tmp_path, tmp_path / "cache")


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A shapes file with one small problem."""
    path = tmp_path / "tiny.jsonl"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Jitgemm:
    """The command with the kernels of the small problem in its cache; not to be changed."""
    home = tmp_path_factory.mktemp("warm")
    command = Jitgemm(home, home / "cache", dict(NARROW))
    (home / "tiny.jsonl").write_text(TINY)
    command("prewarm", "--shapes", home / "tiny.jsonl", "--device", "h200")
    return command


@pytest.fixture
def filled(warm: Jitgemm, tmp_path: Path) -> Jitgemm:
    """The command with a copy of that cache, to be changed."""
    shutil.copytree(warm.cache, tmp_path / "cache", ignore=shutil.ignore_patterns("staging"))
    return Jitgemm(tmp_path, tmp_path / "cache", dict(NARROW))
