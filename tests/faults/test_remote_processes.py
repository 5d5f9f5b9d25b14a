"""The remote layer and processes: one fetch per host, and nothing that waits for a server that does not answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3 import s3_environment
from support import SPEC, make_cubin

from jitgemm.cache_key import cache_key
from jitgemm.remote import Remote

Start = Callable[..., Any]


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port where connections are accepted and nothing is ever answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def _run(workers: list[Any]) -> list[dict[str, Any]]:
    for worker in workers:
        worker.wait_until_ready()
    for worker in workers:
        worker.go()
    return [worker.result() for worker in workers]


def test_one_process_of_a_host_fetches_for_all(start: Start, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    Remote(url, 10).publish(make_cubin(cache_key(SPEC)))
    results = _run([start("build", JITGEMM_REMOTE=url, JITGEMM_REMOTE_TIMEOUT="30") for _ in range(8)])
    assert [result["compiles"] for result in results] == [0] * 8
    assert sorted(result["source"] for result in results) == ["disk"] * 7 + ["remote"]
    assert {result["stderr"] for result in results} == {""}


def test_a_deaf_server_holds_up_neither_the_call_nor_the_exit(start: Start, deaf_port: int) -> None:
    environment = s3_environment(deaf_port)
    worker = start(
        "build", JITGEMM_REMOTE="s3://bucket", JITGEMM_REMOTE_WRITE="1", JITGEMM_REMOTE_TIMEOUT="1", **environment
    )
    worker.wait_until_ready()
    began = time.monotonic()
    worker.go()
    result = worker.result()
    assert time.monotonic() - began < 15  # the S3 client itself would go on for minutes
    assert result["source"] == "compiled"
    assert result["stderr"].count("\n") == 1
    assert "s3://bucket failed (no answer in 1 s)" in result["stderr"]
