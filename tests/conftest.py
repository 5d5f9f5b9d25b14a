"""Fixtures for every folder of tests; being here also lets the tests import ``support``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jitgemm import builder, settings
from jitgemm.errors import ProblemError
from jitgemm.heuristics import tuned


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


@pytest.fixture
def no_shipped_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No tuned table but those that a test writes."""
    monkeypatch.setattr(tuned, "shipped_paths", lambda device: [])
    tuned.forget()
    yield
    monkeypatch.undo()
    tuned.forget()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where none of the GPUs that have kernels is there."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _no_gpu() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str | None:
    import torch

    from jitgemm.plan import device_facts

    if not torch.cuda.is_available():
        return "no GPU here"
    try:
        device_facts(torch.cuda.current_device())
    except ProblemError as error:
        return str(error)
    return None
