"""Kernels of these tests go into one cache of the run's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jitgemm import settings


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
