"""The remote layer on an S3 server: what is asked, what is refused, and what a failure looks like."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from s3 import s3_environment, s3_server
from support import KEY, SPEC, in_forked_child, make_cubin

from jitgemm import builder, remote, settings
from jitgemm.cache_key import cache_key
from jitgemm.remote import Remote

URL = "s3://bucket/a prefix"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def shared(port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Remote]:
    """The remote, empty."""
    for name, value in s3_environment(port).items():
        monkeypatch.setenv(name, value)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    if files.find("bucket"):
        files.rm("bucket/*", recursive=True)
    remote._remote_at.cache_clear()
    remote._refused.clear()
    with caplog.at_level(logging.INFO):
        yield Remote(URL, 30)


@pytest.fixture
def requests(shared: Remote, caplog: pytest.LogCaptureFixture) -> Callable[[Callable[[], Any]], list[str]]:
    """The requests that the server logs during an action."""

    def during(action: Callable[[], Any]) -> list[str]:
        caplog.clear()
        action()
        lines = [record.getMessage() for record in caplog.records if record.name == "werkzeug"]
        return [match[1] for line in lines if (match := re.search(r"((?:GET|HEAD|PUT|POST|DELETE) \S+)", line))]

    return during


def test_a_look_up_is_a_listing_of_its_own_key_and_one_read(
    shared: Remote, requests: Callable[[Callable[[], Any]], list[str]]
) -> None:
    others = [f"{number:064x}" for number in range(20)]
    for key in (KEY, *others):
        assert shared.publish(make_cubin(key))
    assert requests(lambda: shared.publish(make_cubin(KEY))) == [f"PUT /bucket/a%20prefix/kernels/{KEY}/13.5.jgk"]

    listing, read = requests(lambda: shared.find(KEY, version="13.5"))
    assert f"prefix=a%20prefix/kernels/{KEY}/&" in listing
    assert read == f"GET /bucket/a%20prefix/kernels/{KEY}/13.5.jgk"

    missed = requests(lambda: shared.find("f" * 64))
    assert 1 <= len(missed) <= 3  # s3fs asks twice more before it believes that a folder is empty
    assert all(f"kernels/{'f' * 64}" in request for request in missed)  # and never lists the folder of all keys


def test_a_kernel_comes_back_as_it_was(shared: Remote) -> None:
    assert shared.find(KEY) is None
    cubin = make_cubin(image=bytes(range(256)) * 400)
    assert shared.publish(cubin)
    assert shared.find(KEY) == cubin
    assert shared.ensure(cubin)


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-1], lambda data: data[:50] + b"\0" + data[51:]]
)
def test_a_damaged_object_is_refused_and_replaced(
    shared: Remote, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    shared.publish(make_cubin())
    files, path = fsspec.core.url_to_fs(f"{URL}/kernels/{KEY}/13.5.jgk", skip_instance_cache=True)
    files.pipe_file(path, damage(files.cat_file(path)))
    for _ in range(2):
        assert shared.find(KEY) is None
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{URL}/kernels/{KEY}/13.5.jgk is ignored" in warning
    assert shared.ensure(make_cubin())
    assert shared.find(KEY) == make_cubin()


def test_a_forked_child_uses_the_remote_that_its_parent_used(shared: Remote, cache_dir: Path) -> None:
    cubin = make_cubin(cache_key(SPEC))
    shared.publish(cubin)
    with settings.override(remote=URL, remote_timeout=30, jit="forbid"):
        assert builder.build(SPEC).source == "remote"

        def child() -> None:
            builder.forget()
            with settings.override(cache_dir=f"{cache_dir}-of-child"):
                assert builder.build(SPEC).source == "remote"

        assert in_forked_child(child) == 0


@pytest.mark.parametrize("url", ["s3://no-such-bucket/x", "s3://bucket/x"], ids=["no bucket", "no server"])
def test_a_remote_that_is_not_there_costs_one_warning(
    shared: Remote, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    if url == "s3://bucket/x":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    absent = Remote(url, 1)
    for key in (KEY, "f" * 64):
        assert absent.find(key) is None
    assert not absent.publish(make_cubin())
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"the remote {url} failed" in warning
