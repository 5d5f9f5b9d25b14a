"""Callbacks on misses, compiles and loads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from support import SPEC, in_forked_child, make_cubin

import jitgemm
from jitgemm import builder, driver, hooks, kernel
from jitgemm.cache_key import cache_key
from jitgemm.compiler import Cubin
from jitgemm.errors import CacheMissError, CompileError, DriverError, SettingsError
from jitgemm.families.base import KernelSpec
from jitgemm.hooks import KernelEvent
from jitgemm.render import KernelSource

pytestmark = pytest.mark.usefixtures("cache_dir")

EVERYTHING = ("miss", "compile", "load")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[KernelEvent]]:
    """What the hooks were told; compiling takes 50 ms and no NVRTC."""

    def compile_source(source: KernelSource, spec: KernelSpec, key: str) -> Cubin:
        time.sleep(0.05)
        return make_cubin(key)

    monkeypatch.setattr(builder, "compile_source", compile_source)
    told: list[KernelEvent] = []
    added = [jitgemm.add_hook(event, told.append) for event in EVERYTHING]
    yield told
    for hook in added:
        hook.remove()
    assert not any(hooks._hooks.values())


def test_a_miss_then_a_compile_then_silence(events: list[KernelEvent]) -> None:
    builder.build(SPEC)
    miss, compiled = events
    assert (miss.event, miss.seconds) == ("miss", 0.0)
    assert compiled.event == "compile"
    assert 0.05 <= compiled.seconds < 5
    for event in events:
        assert (event.key, event.arch, event.source, event.device) == (cache_key(SPEC), "sm_90a", None, None)
        assert event.kernel == "transpose_scales fp32 32x32"
    builder.build(SPEC)
    builder.forget()
    builder.build(SPEC)  # from disk
    assert len(events) == 2


def test_a_forbidden_compile_is_a_miss(events: list[KernelEvent]) -> None:
    with jitgemm.override(jit="forbid"), pytest.raises(CacheMissError):
        builder.build(SPEC)
    assert [event.event for event in events] == ["miss"]


def test_a_failed_compile_is_none(events: list[KernelEvent], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Cubin:
        raise CompileError("the log")

    monkeypatch.setattr(builder, "compile_source", fail)
    with pytest.raises(CompileError):
        builder.build(SPEC)
    assert [event.event for event in events] == ["miss"]


def test_threads_that_wait_tell_nothing(events: list[KernelEvent]) -> None:
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        builder.build(SPEC)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.event for event in events] == ["miss", "compile"]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that take any kernel."""
    monkeypatch.setattr(kernel, "_kernels", {})
    monkeypatch.setattr(driver, "load_kernel", lambda *_: (object(), 1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.usefixtures("devices")
def test_a_load_tells_where_the_kernel_came_from(events: list[KernelEvent]) -> None:
    kernel.load(SPEC, 0)
    kernel.load(SPEC, 0)  # it is there
    kernel.load(SPEC, 1)
    assert [event.event for event in events] == ["miss", "compile", "load", "load"]
    assert [(event.source, event.device) for event in events[2:]] == [("compiled", 0), ("memory", 1)]
    assert events[2].seconds >= 0.05 > events[3].seconds


@pytest.mark.usefixtures("devices")
def test_a_fork_of_a_process_that_loaded_kernels_loads_none(events: list[KernelEvent]) -> None:
    kernel.load(SPEC, 0)

    def child() -> None:
        for device in (0, 1):
            with pytest.raises(DriverError, match=r"fork.*spawn"):
                kernel.load(SPEC, device)

    assert in_forked_child(child) == 0
    kernel.load(SPEC, 1)
    assert [event.event for event in events] == ["miss", "compile", "load", "load"]


@pytest.mark.usefixtures("devices")
def test_a_fork_of_a_process_that_loaded_none_loads_its_own(events: list[KernelEvent]) -> None:
    def child() -> None:
        assert kernel.load(SPEC, 0).device == 0

    assert in_forked_child(child) == 0
    assert events == []  # of this process


@pytest.mark.usefixtures("devices")
def test_a_load_is_a_range_where_asked(events: list[KernelEvent], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("end"))
    kernel.load(SPEC, 0)
    assert told == []
    with jitgemm.override(nvtx=True):
        kernel.load(SPEC, 1)
    assert told == ["jitgemm load transpose_scales fp32 32x32", "end"]


@pytest.mark.usefixtures("devices")
def test_a_hook_that_raises_breaks_nothing_and_is_logged_once(
    events: list[KernelEvent], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: KernelEvent) -> None:
        raise ZeroDivisionError(event.event)

    added = [jitgemm.add_hook(event, broken) for event in EVERYTHING]
    with caplog.at_level(logging.WARNING, logger="jitgemm"):
        for device in range(3):
            kernel.load(SPEC, device)
    for hook in added:
        hook.remove()
    assert [event.event for event in events] == ["miss", "compile", "load", "load", "load"]
    assert [record.getMessage().split("'")[1] for record in caplog.records] == list(EVERYTHING)
    assert all(record.exc_info for record in caplog.records)


def test_a_hook_may_build_another_kernel_and_remove_itself(events: list[KernelEvent]) -> None:
    other = KernelSpec.make("transpose_scales", "sm_90a", {"tile": 16, "threads": 256})

    def once(event: KernelEvent) -> None:
        hook.remove()
        builder.build(other)

    hook = jitgemm.add_hook("compile", once)
    builder.build(SPEC)
    hook.remove()  # again
    assert [event.event for event in events] == ["miss", "compile", "miss", "compile"]


def test_bad_arguments() -> None:
    with pytest.raises(SettingsError, match="event is 'hit'; accepted are miss, compile, load"):
        jitgemm.add_hook("hit", print)
    with pytest.raises(SettingsError, match="callback is str"):
        jitgemm.add_hook("miss", "print")  # type: ignore[arg-type]
