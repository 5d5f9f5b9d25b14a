from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import SPEC, in_forked_child, make_cubin

from jitgemm import builder, settings
from jitgemm.cache import KernelCache, default_cache
from jitgemm.cache_key import cache_key
from jitgemm.compiler import Cubin, NvrtcLibrary
from jitgemm.errors import CacheMissError, CompileError
from jitgemm.families.base import KernelSpec
from jitgemm.families.gemm import GemmProblem
from jitgemm.render import KernelSource

pytestmark = pytest.mark.usefixtures("cache_dir")


class Compiler:
    """Stands for NVRTC: counts, takes its time, and may fail."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self.error: BaseException | None = None
        self.version = (13, 5)

    def __call__(self, source: KernelSource, spec: KernelSpec, key: str) -> Cubin:
        self.count += 1
        error = self.error
        time.sleep(self.seconds)
        if error is not None:
            raise error
        return make_cubin(key, "{}.{}".format(*self.version))

    def find(self) -> NvrtcLibrary:
        return NvrtcLibrary(Path("libnvrtc.so"), self.version)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    compiler = Compiler()
    monkeypatch.setattr(builder, "compile_source", compiler)
    monkeypatch.setattr(builder, "find_nvrtc", compiler.find)
    monkeypatch.setattr(builder, "_warned", set())
    return compiler


@pytest.fixture(autouse=True)
def caught(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, logger="jitgemm"):
        yield caplog


def test_compiled_once_then_from_memory_then_from_disk(compiler: Compiler) -> None:
    before = builder.stats()
    first, second = builder.build(SPEC), builder.build(SPEC)
    builder.forget()
    third = builder.build(SPEC)
    assert [built.source for built in (first, second, third)] == ["compiled", "memory", "disk"]
    assert first.cubin == second.cubin == third.cubin
    assert compiler.count == 1
    after = builder.stats()
    assert after.memory_hits - before.memory_hits == 1
    assert after.disk_hits - before.disk_hits == 1
    assert after.misses - before.misses == 1
    assert after.compiles - before.compiles == 1


def test_find_cached_compiles_and_writes_nothing(compiler: Compiler, cache_dir: Path) -> None:
    assert builder.find_cached(SPEC) is None
    assert not cache_dir.exists()
    built = builder.build(SPEC)
    assert builder.find_cached(SPEC) == built.cubin
    assert compiler.count == 1


def test_many_threads_cause_one_compile(compiler: Compiler) -> None:
    compiler.seconds = 0.05
    barrier = threading.Barrier(64)
    built: list[builder.Built] = []

    def ask() -> None:
        barrier.wait()
        built.append(builder.build(SPEC))

    _run([threading.Thread(target=ask) for _ in range(64)])
    assert compiler.count == 1
    assert len(built) == 64
    assert len({id(one.cubin) for one in built}) == 1


def _run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_failure_reaches_every_waiter_and_is_not_remembered(compiler: Compiler) -> None:
    compiler.seconds, compiler.error = 0.1, CompileError("the log")
    failures: list[str] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        try:
            builder.build(SPEC)
        except CompileError as error:
            failures.append(str(error))

    _run([threading.Thread(target=ask) for _ in range(8)])
    assert failures == ["the log"] * 8
    assert compiler.count == 1  # the waiters did not try again, one by one
    compiler.error = None
    assert builder.build(SPEC).source == "compiled"


def test_a_waiter_takes_over_from_an_interrupted_thread(compiler: Compiler) -> None:
    compiler.seconds, compiler.error = 0.2, KeyboardInterrupt()
    outcomes: list[str] = []

    def ask() -> None:
        try:
            outcomes.append(builder.build(SPEC).source)
        except KeyboardInterrupt:
            outcomes.append("interrupted")

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    while compiler.count == 0:
        time.sleep(0.001)
    compiler.error = None
    threads[1].start()
    for thread in threads:
        thread.join()
    assert outcomes == ["interrupted", "compiled"]


def test_forbid_raises_with_the_key_and_the_command(compiler: Compiler, cache_dir: Path) -> None:
    with settings.override(jit="forbid"), pytest.raises(CacheMissError) as caught:
        builder.build(SPEC)
    message = str(caught.value)
    assert all(part in message for part in (cache_key(SPEC), "jitgemm prewarm", "sm_90a", str(cache_dir)))
    assert compiler.count == 0
    assert not cache_dir.exists()
    builder.build(SPEC)
    with settings.override(jit="forbid"):
        assert builder.build(SPEC).source == "memory"
        builder.forget()
        assert builder.build(SPEC).source == "disk"


def test_nothing_is_compiled_while_a_graph_is_captured(compiler: Compiler) -> None:
    with pytest.raises(CacheMissError, match=r"a CUDA graph is being captured; build it with: jitgemm prewarm"):
        builder.build(SPEC, capturing=True)
    assert compiler.count == 0
    builder.build(SPEC)
    assert builder.build(SPEC, capturing=True).source == "memory"
    builder.forget()
    assert builder.build(SPEC, capturing=True).source == "disk"


def test_a_thread_that_waited_for_a_capturing_one_compiles(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    looking, waiting = threading.Event(), threading.Event()
    find = KernelCache.find

    def slow_find(self: KernelCache, *args: object, **more: object) -> Cubin | None:
        if threading.current_thread().name == "capturing":
            looking.set()
            assert waiting.wait(10)
            time.sleep(0.05)
        return find(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(KernelCache, "find", slow_find)
    refused: list[CacheMissError] = []

    def capture() -> None:
        try:
            builder.build(SPEC, capturing=True)
        except CacheMissError as error:
            refused.append(error)

    thread = threading.Thread(target=capture, name="capturing")
    thread.start()
    assert looking.wait(10)
    waiting.set()
    assert builder.build(SPEC).source == "compiled"
    thread.join(10)
    assert len(refused) == 1


def test_warn_compiles_with_one_warning(compiler: Compiler, cache_dir: Path, caught: pytest.LogCaptureFixture) -> None:
    compiler.seconds = 0.06
    with settings.override(jit="warn"):
        assert builder.build(SPEC).source == "compiled"
        builder.build(SPEC)
    (record,) = caught.records
    message = record.getMessage()
    assert all(part in message for part in (cache_key(SPEC), "transpose_scales", str(cache_dir)))
    (seconds,) = re.findall(r"compiled in ([0-9.]+) s;", message)
    assert 0.06 <= float(seconds) < 5


def test_messages_give_the_command_that_prewarms_the_problem(
    compiler: Compiler, caught: pytest.LogCaptureFixture
) -> None:
    problem = GemmProblem(256, 512, "bf16", m=7, d_dtype="fp32")
    with settings.override(jit="forbid"), pytest.raises(CacheMissError) as refused:
        builder.build(SPEC, problem=problem)
    with settings.override(jit="warn", config="64x48x128 s12 c2x1", batch_invariant=True, num_sms=7):
        builder.build(SPEC, problem=problem)
    variables = ["JITGEMM_CONFIG=64x48x128 s12 c2x1", "JITGEMM_BATCH_INVARIANT=1"]  # which decide on the kernels
    for message, before in ((str(refused.value), []), (caught.records[0].getMessage(), variables)):
        *start, text = shlex.split(message.partition("with: ")[2])
        assert start == [*before, "jitgemm", "prewarm", "--arch", "sm_90a", "--problem"]
        assert GemmProblem.from_dict(json.loads(text)) == problem.without_m()


def test_a_cache_of_another_nvrtc_serves_unless_exact_is_demanded(compiler: Compiler) -> None:
    compiler.version = (12, 9)
    builder.build(SPEC)
    compiler.version = (13, 5)
    builder.forget()
    assert builder.build(SPEC).cubin.metadata.nvrtc_version == "12.9"
    with settings.override(exact_nvrtc=True):
        built = builder.build(SPEC)  # the one in memory does not do
        assert (built.source, built.cubin.metadata.nvrtc_version) == ("compiled", "13.5")
    builder.forget()
    assert builder.build(SPEC).cubin.metadata.nvrtc_version == "13.5"
    assert compiler.count == 2


def test_a_kernel_too_new_for_the_driver_is_passed_over(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    builder.build(SPEC)
    builder.forget()
    compiler.version = (12, 9)
    monkeypatch.setattr("jitgemm.compiler.driver_version", lambda: (12, 4))
    built = builder.build(SPEC)
    assert (built.source, built.cubin.metadata.nvrtc_version) == ("compiled", "12.9")


def test_a_filled_cache_serves_without_nvrtc(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> NvrtcLibrary:
        raise CompileError("no NVRTC library was found")

    builder.build(SPEC)
    builder.forget()
    monkeypatch.setattr(builder, "find_nvrtc", none)
    assert builder.build(SPEC).source == "disk"
    with settings.override(exact_nvrtc=True), pytest.raises(CompileError, match="no NVRTC"):
        builder.build(SPEC)


def test_each_cache_directory_is_filled_for_itself(compiler: Compiler, tmp_path: Path) -> None:
    builder.build(SPEC)
    with settings.override(cache_dir=tmp_path / "second"):
        assert builder.build(SPEC).source == "compiled"
        assert default_cache().find(cache_key(SPEC)) is not None
    assert builder.build(SPEC).source == "memory"


def test_the_table_in_memory_is_bounded(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "MEMORY_ENTRIES", 2)
    specs = [KernelSpec.make("transpose_scales", "sm_90a", {"tile": tile, "threads": 256}) for tile in (8, 16, 32)]
    for spec in specs:
        builder.build(spec)
    assert [builder.build(spec).source for spec in (specs[2], specs[1], specs[0])] == ["memory", "memory", "disk"]


def test_a_directory_that_cannot_be_made_costs_one_warning(
    compiler: Compiler, tmp_path: Path, caught: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    other = KernelSpec.make("transpose_scales", "sm_90a", {"tile": 16, "threads": 256})
    with settings.override(cache_dir=tmp_path / "file/cache"):
        assert builder.build(SPEC).source == "compiled"
        assert builder.build(SPEC).source == "memory"
        assert builder.build(other).source == "compiled"
    (record,) = caught.records
    assert str(tmp_path / "file/cache") in record.getMessage()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_costs_one_warning(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, caught: pytest.LogCaptureFixture, code: int
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert builder.build(SPEC).source == "compiled"
    builder.forget()
    assert builder.build(SPEC).source == "disk"
    (record,) = caught.records
    assert os.strerror(code) in record.getMessage()


def test_a_lock_that_is_held_too_long_costs_a_private_compile(
    compiler: Compiler, cache_dir: Path, caught: pytest.LogCaptureFixture
) -> None:
    with KernelCache(cache_dir).lock(cache_key(SPEC)), settings.override(lock_timeout=0.05):
        assert builder.build(SPEC).source == "compiled"
    (record,) = caught.records
    assert f"process {os.getpid()} has held its lock" in record.getMessage()


def test_a_forked_child_works_whatever_other_threads_were_doing(compiler: Compiler) -> None:
    compiler.seconds = 0.3
    thread = threading.Thread(target=builder.build, args=(SPEC,))
    thread.start()
    while compiler.count == 0:
        time.sleep(0.001)

    def child() -> None:
        compiler.seconds = 0.0
        assert builder.build(SPEC).cubin == builder.build(SPEC).cubin

    assert in_forked_child(child) == 0
    thread.join()
    assert builder.build(SPEC).source == "memory"
