"""The sweep over configs, with a made-up clock: which candidates, what is timed how often, and the file."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from test_gemm_problem import kinds

from benchmarks import batch_invariant, sweep
from jitgemm.device import H200
from jitgemm.families.gemm import RECIPES, GemmConfig, GemmProblem
from jitgemm.heuristics.gemm import candidates, generate, illegal, predict
from jitgemm.tuning import Workload

PROBLEM = GemmProblem(256, 512, "fp8_1x128_128x128", m=3)


class Turns:
    """A clock that says one number after the other, and calls what it times."""

    def __init__(self, *times: float) -> None:
        self.turns = itertools.cycle(times)

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        return next(self.turns)

    def empty(self) -> None: ...

    def check(self) -> None: ...


@pytest.mark.parametrize("recipe", RECIPES)
def test_candidates_have_the_menu_and_are_limited(recipe: str) -> None:
    problem = GemmProblem(7168, 16384, recipe, m=64)
    menu = [config for config in candidates(problem, ()) if illegal(problem, config, H200) is None]
    offered = sweep.offered(problem, H200)
    assert offered[: len(menu)] == menu
    assert len(offered) == len(set(offered)) <= 500
    assert all(illegal(problem, config, H200) is None for config in offered)
    costs = [predict(problem, config, H200)["total"] for config in offered[len(menu) :]]
    assert costs == sorted(costs)
    everything = {*menu, *(config for config in generate(problem) if illegal(problem, config, H200) is None)}
    assert set(sweep.offered(problem, H200, limit=10_000)) == everything


def test_random_problems() -> None:
    problems = sweep.random_problems(60, 3, ["bf16", "fp8_rowwise"])
    assert problems == sweep.random_problems(60, 3, ["bf16", "fp8_rowwise"])
    assert problems != sweep.random_problems(60, 4, ["bf16", "fp8_rowwise"])
    assert Counter(problem.recipe for problem in problems) == {"bf16": 30, "fp8_rowwise": 30}
    assert all(problem.n % 32 == problem.k % 32 == 0 and problem.n * problem.k <= 2**28 for problem in problems)


def test_a_problem_is_timed_and_its_rows_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep.csv"
    configs = [GemmConfig(8, 64, 128, 12, swap_ab=True), GemmConfig(64, 64, 128, 12)]
    for problem in (PROBLEM, PROBLEM.with_m(4)):
        line = sweep.run_problem(problem, configs, H200, Turns(5.0, 6.0), out, Workload(problem, "cpu"))
        assert f"{problem.m}x256x512: best 8x64x128 s12 swap 5.00 us" in line
    known = sweep.read(out)
    assert known == {problem: {configs[0]: 5.0, configs[1]: 6.0} for problem in (PROBLEM, PROBLEM.with_m(4))}
    assert out.read_text().count("recipe") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe,m,n,config,us\n", "column 'k' is missing"),
        ("recipe,m,n,k,config,us\nbf16,1,2,3,64x64,5\n", "sweep.csv:2: config is '64x64'"),
        ("recipe,m,n,k,config,us\nbf16,1,2\n", "sweep.csv:2: "),
    ],
)
def test_files_that_are_no_sweep(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sweep.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        sweep.read(path)


def test_a_sweep_of_other_columns_beside(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    path.write_text("us,config,k,n,m,recipe,note\n7.25,64x48x128 s12 c2x1 swap,7168,576,64,fp8_rowwise,x\n")
    config = GemmConfig(64, 48, 128, 12, cluster_m=2, swap_ab=True)
    assert sweep.read(path) == {GemmProblem(576, 7168, "fp8_rowwise", 64): {config: 7.25}}


@given(kinds())
@hypothesis_settings(deadline=None, max_examples=40)
def test_workloads_of_every_kind_compute(kind: dict[str, object]) -> None:
    problem = GemmProblem(n=72, k=200, m=5, **kind)  # type: ignore[arg-type]
    work = Workload(problem, "cpu", seed=1)
    work.d.fill_(float("nan"))
    work.call(GemmConfig(64, 64, 128, 2))()
    assert bool(torch.isfinite(work.d).all())


def test_the_cost_of_the_batch_invariant_mode() -> None:
    split = GemmProblem(256, 7168, "fp8_1x128_128x128", m=2)
    same = GemmProblem(512, 256, "fp8_1x128_128x128", m=2)
    rows = [
        batch_invariant.run_shape(split, H200, Turns(3.0, 4.0, 5.0), Workload(split, "cpu")),
        batch_invariant.run_shape(same, H200, Turns(3.0, 7.0), Workload(same, "cpu")),
    ]
    assert [(row["us"], row["invariant_us"], row["cost"]) for row in rows] == [(4.0, 5.0, 1.25), (7.0, 7.0, 1.0)]
    assert rows[0]["config"] != rows[0]["invariant_config"]
    assert rows[1]["config"] == rows[1]["invariant_config"]
    lines = batch_invariant.summary(rows).splitlines()[2:]
    assert [line.split()[-5:] for line in lines] == [
        ["1.118", "1.250", "(m", "=", "2)"],
        ["1.250", "1.250", "(m", "=", "2)"],
        ["1.000", "1.000", "(m", "=", "2)"],
    ]
    assert batch_invariant.parse([]).m == [1, 16, 64, 128, 512, 2048, 4096, 8192]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("main", [sweep.main, batch_invariant.main])
def test_timing_needs_a_gpu(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 3
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_listing_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--list", "--shapes", "random", "--count", "4", "--recipes", "bf16"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
