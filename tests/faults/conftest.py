"""Processes to torment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import environment

WORKER = Path(__file__).with_name("worker.py")


class Worker:
    """A running ``worker.py``."""

    def __init__(self, command: str, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), command],
            env=environment(**variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == "ready\n", self.process.communicate()[1]

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """What it printed; ``stderr`` is added."""
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        return {**json.loads(out), "stderr": err}


@pytest.fixture
def start(cache_dir: Path) -> Iterator[Callable[..., Worker]]:
    """Start a worker on the test's cache; whatever still runs at the end is killed."""
    workers: list[Worker] = []

    def start(command: str, **variables: str) -> Worker:
        workers.append(Worker(command, JITGEMM_CACHE_DIR=str(cache_dir), **variables))
        return workers[-1]

    yield start
    for worker in workers:
        worker.process.kill()
        worker.process.communicate()
