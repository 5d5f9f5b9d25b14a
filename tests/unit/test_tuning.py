"""Tuning with made-up times: what is measured, what is kept, what is stale, and autotuning's manners."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

import jitgemm
from jitgemm import settings, tuning
from jitgemm.device import H200
from jitgemm.errors import ProblemError
from jitgemm.families.gemm import GemmConfig, GemmProblem
from jitgemm.heuristics import choose_config, enumerate_configs, tuned
from jitgemm.heuristics.gemm import MAX_KERNELS, illegal, predict
from jitgemm.heuristics.serving import ANCHORS, serving_anchors
from jitgemm.heuristics.tuned import Entry, Run
from jitgemm.tuning import model_choice, stale, tune_problem

pytestmark = pytest.mark.usefixtures("no_shipped_table")

RUN = Run("NVIDIA H200", 132, "0.1.0", "ab" * 32, "13.5", "13.0", "2.11.0", "2026-11-21")
PROBLEM = GemmProblem(576, 7168, "fp8_1x128_128x128")


@pytest.fixture(autouse=True)
def no_tables(cache_dir: Path) -> Iterator[None]:
    tuned.forget()
    tuning._tried.clear()
    yield
    tuned.forget()
    tuning._tried.clear()


@functools.lru_cache(maxsize=1000)
def offered(problem: GemmProblem) -> list[GemmConfig]:
    return tuning.candidates(problem, H200)


class Gpu:
    """Times that are the model's, but for what a test gives; remembers what was asked."""

    def __init__(self, factors: Mapping[GemmConfig, float] | None = None, broken: Sequence[GemmConfig] = ()) -> None:
        self.factors, self.broken = dict(factors or {}), broken
        self.asked: list[tuple[int | None, int]] = []

    def __call__(
        self, problem: GemmProblem, configs: Sequence[GemmConfig], keep: Sequence[GemmConfig]
    ) -> dict[GemmConfig, float]:
        assert len(set(configs)) == len(configs)
        assert set(keep) <= set(configs)
        self.asked.append((problem.m, len(configs)))
        return {config: self.us(problem, config) for config in configs if config not in self.broken}

    def us(self, problem: GemmProblem, config: GemmConfig) -> float:
        return predict(problem, config, H200)["total"] * self.factors.get(config, 1.0)


# -- What is measured.


@pytest.mark.parametrize("m", [1, 64, 4096])
def test_candidates_are_the_models_choice_and_the_best_predictions(m: int) -> None:
    at = PROBLEM.with_m(m)
    found = tuning.candidates(at, H200, 24)
    assert found[0] == model_choice(at, H200)
    assert 1 < len(found) == len(set(found)) <= 24
    costs = [predict(at, config, H200)["total"] for config in found]
    assert max(costs[1:]) <= 1.25 * min(costs)
    assert all(illegal(at, config, H200) is None for config in found)
    assert tuning.candidates(at, H200, 1) == found[:1]


def test_settings_of_the_user_do_not_matter() -> None:
    plain = offered(PROBLEM.with_m(64))
    with settings.override(tile_m=128, split_k=1, batch_invariant=True):
        assert tuning.candidates(PROBLEM.with_m(64), H200) == plain
        work = tuning.Workload(GemmProblem(72, 200, "bf16", m=5), "cpu")
        work.d.fill_(float("nan"))
        work.call(plain[0])()
        assert bool(work.d.isfinite().all())


def test_serving_anchors() -> None:
    assert [serving_anchors(m) for m in (1, 2, 8, 100, 16384, 10**6)] == [
        (1,), (1, 8, 16), (8,), (64, 96, 128, 192), (16384,), (8192, 16384)
    ]  # fmt: skip


# -- What is kept.


def test_where_the_model_is_right_its_choice_is_kept() -> None:
    with settings.override(tuned=False):
        chosen = {m: choose_config(PROBLEM.with_m(m), H200) for m in (1, 64, 4096)}
    entries = tune_problem(PROBLEM, (1, 64, 4096), H200, RUN, Gpu(dict.fromkeys(chosen.values(), 0.5)))
    assert {m: one.config for m, one in entries.items()} == chosen
    assert all(one.margin == 1 and one.config == one.model_config and one.run == RUN for one in entries.values())


def test_what_gains_little_is_noise_and_what_gains_much_wins() -> None:
    at = PROBLEM.with_m(64)
    chosen, rival = offered(at)[0], offered(at)[5]
    equal = predict(at, chosen, H200)["total"] / predict(at, rival, H200)["total"]
    others = dict.fromkeys(offered(at), 2.0) | {chosen: 1.0}
    for gain, winner in ((0.003, chosen), (0.05, rival)):
        gpu = Gpu(others | {rival: equal / (1 + gain)})
        one = tune_problem(at, (64,), H200, RUN, gpu)[64]
        assert one.config == winner
        assert one.model_config == chosen
        assert one.margin == pytest.approx(1 + gain if winner == rival else 1, abs=1e-3)
        assert gpu.asked == [(64, len(offered(at)))]


def test_all_anchors_together_have_few_kernels_and_calls_get_them() -> None:
    """Each anchor has a favourite of its own, so that the limit binds."""

    class Picky(Gpu):
        def us(self, problem: GemmProblem, config: GemmConfig) -> float:
            place = offered(problem).index(config) if config in offered(problem) else 3
            return super().us(problem, config) * (0.8 if place == ANCHORS.index(problem.m or 0) % 7 + 1 else 1.0)

    gpu, steps = Picky(), []
    entries = tune_problem(PROBLEM, ANCHORS, H200, RUN, gpu, advance=lambda: steps.append(1))
    assert set(entries) == set(ANCHORS)
    assert len(steps) == len(ANCHORS)
    configs = {one.config for one in entries.values()}
    assert len(configs) <= MAX_KERNELS
    assert len(gpu.asked) > len(ANCHORS)  # where the favourite was dropped, all that are kept were measured
    for m, one in entries.items():
        assert one.us == round(gpu.us(PROBLEM.with_m(m), one.config), 3)
        assert one.us <= min(gpu.us(PROBLEM.with_m(m), c) for c in configs if illegal(PROBLEM, c, H200) is None) * 1.006
    path = tuned.user_path(H200)
    with tuned.lock(path):
        tuned.update(path, H200, PROBLEM, entries)
    assert set(enumerate_configs(PROBLEM, H200)) == configs
    assert all(choose_config(PROBLEM.with_m(m), H200) == one.config for m, one in entries.items())


def test_what_cannot_run_is_left_out() -> None:
    at = PROBLEM.with_m(64)
    found = offered(at)
    entries = tune_problem(PROBLEM, (64,), H200, RUN, Gpu({found[2]: 0.5}, broken=[found[2]]))
    assert entries[64].config != found[2]
    assert tune_problem(PROBLEM, (64,), H200, RUN, Gpu(broken=[found[0]])) == {}
    assert tune_problem(PROBLEM, (64,), H200, RUN, Gpu(broken=found)) == {}


def test_specs_are_all_that_is_measured() -> None:
    specs = tuning.specs(PROBLEM, (64, 96), H200, 5)
    configs = {c for m in (64, 96) for c in tuning.candidates(PROBLEM.with_m(m), H200, 5)}
    assert len(specs) == len(set(specs)) == len(configs)


# -- What is stale.


def test_entries_grow_stale() -> None:
    at = PROBLEM.with_m(64)
    chosen, rival = offered(at)[:2]
    one = Entry(64, rival, 9.0, chosen, 10.0, RUN)
    equal = predict(at, chosen, H200)["total"] / predict(at, rival, H200)["total"]
    assert stale(PROBLEM, one, H200, RUN, Gpu({rival: equal})) == []
    assert stale(PROBLEM, one, H200, RUN, Gpu({rival: equal * 1.01})) == []
    (lost,) = stale(PROBLEM, one, H200, RUN, Gpu({rival: equal * 1.05}))
    assert "no longer wins" in lost
    assert str(chosen) in lost
    (broken,) = stale(PROBLEM, one, H200, RUN, Gpu(broken=[rival]))
    assert "can't run" in broken
    today = dataclasses.replace(RUN, templates="cd" * 32, torch="2.12.0", date="2027-01-01")
    assert stale(PROBLEM, one, H200, today, Gpu({rival: equal})) == [
        "templates abababababab, now cdcdcdcdcdcd",
        "torch 2.11.0, now 2.12.0",
    ]
    assert stale(PROBLEM, dataclasses.replace(one, m=65), H200, RUN, Gpu()) == ["m = 65 is no anchor of this version"]
    gpu = Gpu()
    assert stale(PROBLEM, dataclasses.replace(one, config=chosen), H200, RUN, gpu) == []
    assert gpu.asked == []  # there is nothing to compare


# -- The public function, and autotuning.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_needs_a_gpu() -> None:
    with pytest.raises(ProblemError, match="no CUDA device"):
        jitgemm.tune(576, 7168)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU on which the second best prediction is twice as fast, and no compiler."""

    class Fast(Gpu):
        def us(self, problem: GemmProblem, config: GemmConfig) -> float:
            return super().us(problem, config) * (0.5 if config == offered(problem)[1] else 1.0)

    gpu = Fast()
    monkeypatch.setattr(tuning, "GpuMeasure", lambda: gpu)
    monkeypatch.setattr(tuning, "current_run", lambda: RUN)
    monkeypatch.setattr(tuning, "_build_in_threads", lambda specs: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "device_facts", lambda ordinal: (H200, 132))
    return gpu


def test_tune_saves_what_wins(fake_gpu: Gpu) -> None:
    entries = jitgemm.tune(576, 7168, m=[100, 128])
    assert set(entries) == {64, 96, 128, 192}
    expected = offered(PROBLEM.with_m(128))[1]
    assert entries[128].config == expected == choose_config(PROBLEM.with_m(128), H200)
    assert tuned.read_table(tuned.user_path(H200), H200).problems() == {PROBLEM: entries}
    assert set(jitgemm.tune(576, 7168, m=8)) == {8}
    assert set(tuned.read_table(tuned.user_path(H200), H200).problems()[PROBLEM]) == {8, 64, 96, 128, 192}
    for bad in ({"m": -1}, {"recipe": "fp4"}, {"m": "many"}):
        with pytest.raises(ProblemError):
            jitgemm.tune(**{"n": 576, "k": 7168, **bad})  # type: ignore[arg-type]


def test_autotune_measures_what_serves_a_call_once(fake_gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        tuning.autotune(PROBLEM.with_m(100), H200)
    assert [m for m, _ in fake_gpu.asked] == [64, 96, 128, 192]
    tuning.autotune(PROBLEM.with_m(128), H200)
    assert len(fake_gpu.asked) == 4
    tuning.autotune(PROBLEM.with_m(129), H200)
    assert [m for m, _ in fake_gpu.asked][4:] == [256]
    assert choose_config(PROBLEM.with_m(96), H200) == offered(PROBLEM.with_m(96))[1]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "576 x 7168, fp8_1x128_128x128 nt, at m = 64, 96, 128, 192" in lines[0]
    assert str(tuned.user_path(H200)) in lines[0]
    # Another process finds the table.
    tuning._tried.clear()
    tuned.forget()
    tuning.autotune(PROBLEM.with_m(100), H200)
    assert len(fake_gpu.asked) == 5


@pytest.mark.parametrize("forced", [{"tile_m": 64}, {"batch_invariant": True}, {"tuned": False}])
def test_autotune_leaves_alone_what_tables_do_not_serve(fake_gpu: Gpu, forced: dict[str, object]) -> None:
    with settings.override(**forced):
        tuning.autotune(PROBLEM.with_m(64), H200)
    assert fake_gpu.asked == []


def test_autotune_waits_until_after_a_capture(fake_gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tuning.autotune(PROBLEM.with_m(64), H200)
    assert fake_gpu.asked == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning.autotune(PROBLEM.with_m(64), H200)
    assert fake_gpu.asked != []


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("out of memory"), OSError("read-only file system")])
def test_autotune_that_fails_lets_the_model_choose(
    fake_gpu: Gpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: object) -> Entry:
        raise error

    monkeypatch.setattr(tuning, "tune_problem", fail)
    with caplog.at_level(logging.WARNING, "jitgemm"):
        for _ in range(2):
            tuning.autotune(PROBLEM.with_m(64), H200)
    assert choose_config(PROBLEM.with_m(64), H200) == model_choice(PROBLEM.with_m(64), H200)
    assert len(caplog.records) == 1
    assert str(error) in caplog.text
