"""The wide sweep: its problems, its grid of kernels, how timing narrows down, and what is kept of the file."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest

from benchmarks import sweep, wide
from jitgemm.device import H200
from jitgemm.families.gemm import GemmConfig, GemmProblem
from jitgemm.heuristics.gemm import candidates, illegal, predict

RECIPE = "fp8_1x128_128x128"
CONFIGS = [GemmConfig.from_text(f"64x{n}x128 s4") for n in (32, 48, 64, 80)]


class Clock:
    """Calls are configs' times; the clock reads them and counts."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def __call__(self, call: object) -> float:
        self.asked.append(call())  # type: ignore[operator]
        return self.asked[-1]

    def empty(self) -> None: ...

    def check(self) -> None: ...


def test_problems_are_many_and_repeatable() -> None:
    found = wide.problems(300, 1, ["bf16", RECIPE])
    assert found == wide.problems(300, 1, ["bf16", RECIPE]) != wide.problems(300, 2, ["bf16", RECIPE])
    assert [problem.recipe for problem in found[:4]] == ["bf16", RECIPE] * 2
    assert all(p.n % 64 == p.k % 64 == 0 and 1 <= (p.m or 0) <= wide.MAX_M for p in found)
    assert sum((p.m or 0) <= 128 for p in found) > 100
    assert 100 < sum((p.n, p.k) in wide.layers() for p in found) < 250


@pytest.mark.parametrize("recipe", ["bf16", RECIPE])
def test_the_grid_has_the_menu_and_kernels_that_can_be_built(recipe: str) -> None:
    grid = wide.grid(recipe, H200)
    assert set(candidates(GemmProblem(1, 1, recipe), ())) <= set(grid)
    assert 200 < len(grid) == len(set(grid)) < 400
    assert all(illegal(GemmProblem(2**20, 2**20, recipe, 1), config, H200) is None for config in grid)


def test_what_the_model_thinks_hopeless_is_not_timed() -> None:
    problem = GemmProblem(4096, 7168, RECIPE, m=16)
    found = wide.hopeful(problem, wide.grid(RECIPE, H200), H200)
    costs = [predict(problem, config, H200)["total"] for config in found]
    assert costs == sorted(costs)
    assert 10 < len(found) <= wide.MOST
    assert costs[-1] <= wide.FAR * costs[0]


def test_timing_narrows_down_to_the_best() -> None:
    clock = Clock()
    times = dict(zip(CONFIGS, (10.0, 10.5, 12.0, 30.0), strict=True))
    found = wide.narrow({config: lambda us=us: us for config, us in times.items()}, clock)  # type: ignore[misc]
    assert {config: set(taken) for config, taken in found.items()} == {c: {us} for c, us in times.items()}
    assert [len(found[config]) for config in CONFIGS] == [16, 16, 8, 1]
    assert clock.asked[:4] == [10.0, 10.5, 12.0, 30.0]


def test_a_file_is_trimmed(tmp_path: Path) -> None:
    menu = [str(config) for config in candidates(GemmProblem(1, 1, RECIPE), ())][:2]
    configs = [menu[0], "64x56x128 s4", "64x104x128 s4", menu[1]]
    rows = [
        dict(zip(sweep.COLUMNS, (RECIPE, "3", "256", "512", config, us, "4"), strict=True))
        for config, us in zip(configs, ("14.0", "10.0", "11.0", "16.0"), strict=True)
    ]
    sweep.append(tmp_path / "wide.csv", [list(row.values()) for row in rows])
    assert wide.main(["--trim", str(tmp_path / "wide.csv"), "--out", str(tmp_path / "kept.csv")]) == 0
    with (tmp_path / "kept.csv").open() as file:
        assert [row["config"] for row in csv.DictReader(file)] == [configs[1], menu[0]]
    (measured,) = sweep.read(tmp_path / "kept.csv").values()
    assert list(itertools.chain(measured.values())) == [10.0, 14.0]
