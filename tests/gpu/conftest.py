"""Kernels of these tests go into one cache of the run's own; workers share the processor's cores."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from jitgemm import settings


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """References that run on the CPU take all cores otherwise, in every worker of pytest-xdist."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    directory = tmp_path_factory.getbasetemp()
    if directory.name.startswith("popen-"):  # a worker of pytest-xdist has its own folder in the run's
        directory = directory.parent
    with pytest.MonkeyPatch.context() as patch:  # not override(): threads must see it too
        patch.setenv("JITGEMM_CACHE_DIR", str(directory / "kernels"))
        settings.reload()
        yield
    settings.reload()
