"""``jitgemm tune`` on a made-up GPU, and what ``explain`` says of its table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Jitgemm

from jitgemm import tuning
from jitgemm.cache_tools import cli
from jitgemm.cache_tools import tune as work
from jitgemm.device import H200
from jitgemm.families.gemm import GemmConfig, GemmProblem
from jitgemm.heuristics import choose_config, enumerate_specs, tuned
from jitgemm.heuristics.gemm import predict
from jitgemm.heuristics.serving import ANCHORS
from jitgemm.heuristics.tuned import Run

pytestmark = pytest.mark.usefixtures("no_shipped_table")

RUN = Run("NVIDIA H200", 132, "0.1.0", "ab" * 32, "13.5", "13.0", "2.11.0", "2026-11-21")
PROBLEM = GemmProblem(576, 7168, "fp8_1x128_128x128")
LINE = '{"layer": "kv_a", "n": 576, "k": 7168, "recipe": "fp8_1x128_128x128"}\n'


class FakeGpu:
    """The second best prediction is a tenth faster than its prediction, all else as predicted."""

    def __init__(self) -> None:
        self.run, self.asked, self.factor = RUN, [], 0.9
        self.interrupt_after: int | None = None

    def measure(
        self, problem: GemmProblem, configs: Sequence[GemmConfig], keep: Sequence[GemmConfig]
    ) -> Mapping[GemmConfig, float]:
        if self.interrupt_after is not None and len(self.asked) >= self.interrupt_after:
            raise KeyboardInterrupt
        self.asked.append((problem.n, problem.m))
        second = tuning.candidates(problem, H200)[1]
        return {c: predict(problem, c, H200)["total"] * (self.factor if c == second else 1.0) for c in configs}


@pytest.fixture
def gpu(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    fake = FakeGpu()
    monkeypatch.setattr(work, "open_gpu", lambda: work.Gpu(H200, fake.run, fake.measure))
    monkeypatch.setattr(work, "_build", lambda specs, jobs, progress: None)
    tuned.forget()
    yield fake
    tuned.forget()


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    path = tmp_path / "shapes.jsonl"
    path.write_text(LINE)
    return path


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run([*map(str, arguments), "--json"]) == code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_what_wins_goes_into_the_table_and_calls_get_it(
    gpu: FakeGpu, shapes: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = tuning.candidates(PROBLEM.with_m(64), H200)[1]
    before = choose_config(PROBLEM.with_m(64), H200)
    answer = run_json(capsys, "tune", "--shapes", shapes, "--m", 64, "--m", 100)
    (problem,) = answer["problems"]
    assert [entry["m"] for entry in problem["entries"]] == [64, 96, 128, 192]
    assert (problem["layer"], problem["measured"], problem["failed"]) == ("kv_a", 4, 0)
    entry = problem["entries"][0]
    assert (entry["config"], entry["model_config"]) == (str(expected), str(before))
    assert entry["margin"] > 1.05
    assert answer["table"] == str(cache_dir / "tuned" / "h200.jsonl")
    assert choose_config(PROBLEM.with_m(64), H200) == expected

    options = ("--m", 64, "--n", 576, "--k", 7168, "--recipe", PROBLEM.recipe)
    said = run_json(capsys, "explain", *options)
    assert said["winner"] == expected.to_dict()
    assert said["tuned"] == {**entry, "table": answer["table"]}
    assert cli.run(["explain", *map(str, options)]) == 0
    text = capsys.readouterr().out
    assert f"tuned: at m = 64 it took {entry['us']:.2f} us, the model's choice {before}" in text
    assert "NVIDIA H200, 2026-11-21" in text
    assert f"{expected}  <- winner" in text
    assert run_json(capsys, "explain", "--m", 4096, *options[2:])["tuned"] is None


def test_prewarm_builds_what_the_table_chose(gpu: FakeGpu, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tune", "--shapes", str(shapes)]) == 0
    answer = run_json(capsys, "prewarm", "--shapes", shapes, "--device", "h200", "--dry-run")
    specs = {json.dumps(kernel["spec"], sort_keys=True) for kernel in answer["kernels"]}
    assert specs == {json.dumps(spec.to_dict(), sort_keys=True) for spec in enumerate_specs(PROBLEM, H200)}
    assert answer["needed"] <= 13  # with the transform of scales
    chosen = {str(choose_config(PROBLEM.with_m(m), H200)) for m in range(1, 17000, 13)}
    assert chosen <= {kernel["config"].partition("bf16 ")[2] for kernel in answer["kernels"]}


def test_the_same_command_continues(gpu: FakeGpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = tmp_path / "two.jsonl"
    shapes.write_text(LINE + LINE.replace("576", "2112"))
    gpu.interrupt_after = 3
    interrupted = run_json(capsys, "tune", "--shapes", shapes, "--m", 64, "--m", 128, code=130)
    assert interrupted["interrupted"]
    assert [problem["measured"] for problem in interrupted["problems"]] == [2, 0]
    gpu.interrupt_after = None
    gpu.asked.clear()
    finished = run_json(capsys, "tune", "--shapes", shapes, "--m", 64, "--m", 128)
    assert gpu.asked == [(2112, 64), (2112, 128)]
    assert [(len(p["entries"]), p["measured"]) for p in finished["problems"]] == [(2, 0), (2, 2)]
    gpu.asked.clear()
    assert cli.run(["tune", "--shapes", str(shapes), "--m", "64", "--force"]) == 0
    assert gpu.asked == [(576, 64), (2112, 64)]
    gpu.run = dataclasses.replace(RUN, driver="14.0")
    assert cli.run(["tune", "--shapes", str(shapes), "--m", "64"]) == 0
    assert len(gpu.asked) == 4  # what was measured under other circumstances is measured again


def test_all_anchors_by_default_and_a_table_elsewhere(
    gpu: FakeGpu, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shipped" / "h200.jsonl"
    assert cli.run(["tune", "--shapes", str(shapes), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "kv_a" in printed
    assert f"table {out}" in printed
    assert set(tuned.read_table(out, H200).problems()[PROBLEM]) == set(ANCHORS)
    assert not tuned.user_path(H200).exists()


def test_check_reports_what_is_stale(gpu: FakeGpu, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tune", "--shapes", str(shapes), "--m", "64"]) == 0
    before = tuned.user_path(H200).read_bytes()
    answer = run_json(capsys, "tune", "--check")
    assert not answer["stale"]
    assert [(entry["m"], entry["stale"]) for entry in answer["entries"]] == [(64, [])]

    gpu.factor = 1.2
    assert run_json(capsys, "tune", "--check", code=1)["stale"]
    assert cli.run(["tune", "--check", "--shapes", str(shapes)]) == 1
    printed = capsys.readouterr().out
    assert "it no longer wins" in printed
    assert "1 of 1 entries are stale" in printed
    gpu.factor = 0.9
    gpu.run = dataclasses.replace(RUN, templates="cd" * 32)
    (entry,) = run_json(capsys, "tune", "--check", code=1)["entries"]
    assert entry["stale"] == ["templates abababababab, now cdcdcdcdcdcd"]
    assert run_json(capsys, "tune", "--check", "--problem", LINE, code=1)["entries"]
    assert tuned.user_path(H200).read_bytes() == before

    tuned.user_path(H200).write_text("no table\n")
    assert cli.run(["tune", "--check"]) == 1
    assert "first line" in capsys.readouterr().err


def test_anchors_that_cannot_be_measured_are_failures(
    gpu: FakeGpu, shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(work, "open_gpu", lambda: work.Gpu(H200, RUN, lambda problem, configs, keep: {}))
    assert cli.run(["tune", "--shapes", str(shapes), "--m", "64"]) == 1
    assert "1 anchors could not be measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--preset", "nothing"],
        ["--preset", "deepseek-v3", "--shapes", "x"],
        ["--preset", "deepseek-v3", "--m", "0"],
        ["--problem", '{"kind": "m_grouped_masked", "groups": 4, "n": 64, "k": 64, "recipe": "bf16"}'],
    ],
)
def test_usage(gpu: FakeGpu, arguments: list[str]) -> None:
    assert cli.run(["tune", *arguments]) == 2
    assert gpu.asked == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tune", "--preset", "deepseek-v3"]) == 3
    assert "no CUDA device" in capsys.readouterr().err


def test_explain_reads_the_table_of_another_cache(
    gpu: FakeGpu, shapes: Path, jitgemm: Jitgemm, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command in a process of its own, which imports no torch."""
    assert cli.run(["tune", "--shapes", str(shapes), "--m", "64", "--cache-dir", str(jitgemm.cache)]) == 0
    answer = jitgemm.json("explain", "--m", 64, "--n", 576, "--k", 7168, "--recipe", PROBLEM.recipe)
    assert answer["tuned"]["table"] == str(jitgemm.cache / "tuned" / "h200.jsonl")
    assert answer["winner"] == tuning.candidates(PROBLEM.with_m(64), H200)[1].to_dict()
