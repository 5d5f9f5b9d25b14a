"""``jitgemm.prewarm`` in one process."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import make_cubin

import jitgemm
from jitgemm import builder, prewarming, settings
from jitgemm.cache import KernelCache, default_cache
from jitgemm.cache_key import cache_key
from jitgemm.compiler import Cubin
from jitgemm.device import H20, H200
from jitgemm.errors import CompileError, ProblemError
from jitgemm.families import KernelSpec, family_of
from jitgemm.families.gemm import GemmProblem
from jitgemm.families.grouped import GroupedProblem
from jitgemm.heuristics import enumerate_specs
from jitgemm.render import KernelSource

PROBLEM = GemmProblem(256, 512, "fp8_1x128_128x128")
ENTRY = {"n": 256, "k": 512, "recipe": "fp8_1x128_128x128", "layer": "tiny", "m": 3}


class Compiler:
    """Stands for NVRTC; notes what it compiled, and refuses what it is told to."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.refused: set[str] = set()
        self.running = self.most = 0
        self.seconds = 0.0
        self._lock = threading.Lock()

    def __call__(self, source: KernelSource, spec: KernelSpec, key: str) -> Cubin:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.seconds)
        with self._lock:
            self.running -= 1
            self.compiled.append(key)
        if key in self.refused:
            raise CompileError("the log")
        return make_cubin(key)


@pytest.fixture
def compiler(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    compiler = Compiler()
    monkeypatch.setattr(builder, "compile_source", compiler)
    yield compiler


def test_everything_that_calls_can_need_is_ready(compiler: Compiler) -> None:
    specs = enumerate_specs(PROBLEM, H200)
    done = jitgemm.prewarm([ENTRY, PROBLEM.with_m(8)], devices=["h200"])
    assert (done.kernels, done.compiled) == (len(specs), len(specs))
    assert done.seconds > 0
    assert sorted(compiler.compiled) == sorted(map(cache_key, specs))
    with settings.override(jit="forbid"):
        assert {builder.build(spec).source for spec in specs} == {"memory"}
        builder.forget()
        assert {builder.build(spec).source for spec in specs} == {"disk"}
        builder.forget()
        again = jitgemm.prewarm([PROBLEM], devices=["h200"])  # nothing to forbid
    assert (again.kernels, again.compiled) == (len(specs), 0)
    everywhere = jitgemm.prewarm([PROBLEM])  # without a GPU, for all chips
    assert everywhere.kernels >= len({*specs, *enumerate_specs(PROBLEM, H20)})


def test_grouped_problems(compiler: Compiler) -> None:
    problem = GroupedProblem(256, 512, "fp8_1x128_128x128", 4, "psum", m=3, alignment=1)
    specs = enumerate_specs(problem, H200)
    assert any("any-row" in family_of(spec).describe(spec) for spec in specs)
    assert jitgemm.prewarm([problem, problem.to_dict()], devices=["h200"]).compiled == len(specs)
    assert sorted(compiler.compiled) == sorted(map(cache_key, specs))


def test_a_shapes_file(compiler: Compiler, tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    with settings.override(record=path):
        from jitgemm.record import record

        record(path, PROBLEM)
    assert jitgemm.prewarm(path, devices=["h200"]).kernels == len(enumerate_specs(PROBLEM, H200))
    path.write_text("[]\n")
    with pytest.raises(ProblemError, match=r"shapes\.jsonl:1: a list"):
        jitgemm.prewarm(str(path))


def test_compilers_run_side_by_side(compiler: Compiler) -> None:
    compiler.seconds = 0.05
    with settings.override(tile_m=64):
        jitgemm.prewarm([PROBLEM], devices=["h200"], jobs=3)
        specs = enumerate_specs(PROBLEM, H200)  # the settings in force count in every thread
    assert sorted(compiler.compiled) == sorted(map(cache_key, specs))
    assert compiler.most == min(3, len(specs))


def test_one_failure_does_not_stop_the_others(compiler: Compiler) -> None:
    specs = enumerate_specs(PROBLEM, H200)
    compiler.refused = {cache_key(specs[1])}
    with pytest.raises(CompileError, match=rf"1 of {len(specs)} kernels failed, such as fp8.*: the log"):
        jitgemm.prewarm([PROBLEM], devices=["h200"], jobs=2)
    assert {spec for spec in specs if builder.find_cached(spec) is None} == {specs[1]}


def test_what_others_compile_is_left_for_later(compiler: Compiler, cache_dir: Path) -> None:
    """While another process holds a kernel, the rest is built; then that one is waited for."""
    specs = enumerate_specs(PROBLEM, H200)
    cache, key = KernelCache(cache_dir), cache_key(specs[0])
    lock = cache.lock(key)
    lock.acquire()
    assert cache.is_locked(key)

    def publish_at_last() -> None:
        while len(compiler.compiled) < len(specs) - 1:
            time.sleep(0.002)
        cache.publish(make_cubin(key))
        lock.release()

    other = threading.Thread(target=publish_at_last)
    other.start()
    done = jitgemm.prewarm([PROBLEM], devices=["h200"], jobs=1)
    other.join()
    assert done.compiled == len(specs) - 1
    assert key not in compiler.compiled


def test_whether_a_key_is_locked(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = default_cache()
    assert not cache.is_locked("0" * 64)
    assert not cache_dir.exists()
    with cache.lock("0" * 64):
        assert cache.is_locked("0" * 64)
    assert not cache.is_locked("0" * 64)

    def refuse(*_: object) -> None:
        raise OSError(38, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not cache.is_locked("0" * 64)


def test_an_interrupt_leaves_the_rest(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(spec: KernelSpec) -> builder.Built:
        raise KeyboardInterrupt

    monkeypatch.setattr(prewarming, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jitgemm.prewarm([PROBLEM], devices=["h200"], jobs=1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jitgemm-prewarm")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"problems": [{"n": 256, "k": 512}]}, "recipe"),
        ({"problems": [17]}, "a problem is int"),
        ({"problems": {"n": 256, "k": 512, "recipe": "bf16"}}, "a problem is str"),
        ({"problems": "/nowhere/shapes.jsonl"}, "/nowhere/shapes.jsonl: No such file"),
        ({"problems": [], "devices": ["h300"]}, r"devices is \['h300'\]; accepted is a list of h200"),
        ({"problems": [], "devices": "h200"}, "devices is 'h200'; accepted is a list"),
        ({"problems": [], "jobs": 0}, "jobs is 0; accepted is an integer from 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        jitgemm.prewarm(**arguments)
