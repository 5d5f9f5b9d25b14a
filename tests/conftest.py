"""Fixtures for every folder of tests; being here also lets the tests import ``support``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jitgemm import builder, settings


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty kernel cache, nothing in memory, and no settings but that directory."""
    for name in os.environ:
        if name.startswith(settings.PREFIX):
            monkeypatch.delenv(name)
    directory = tmp_path / "cache"
    monkeypatch.setenv("JITGEMM_CACHE_DIR", str(directory))
    settings.reload()
    builder.forget()
    yield directory
    monkeypatch.undo()
    settings.reload()
