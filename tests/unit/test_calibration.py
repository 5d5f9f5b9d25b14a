"""Regret and calibration on made-up measurements: the model's own predictions, with other constants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import calibrate, regret, sweep
from jitgemm.device import H200
from jitgemm.families.gemm import GemmConfig, GemmProblem
from jitgemm.heuristics import choose_config, gemm, sm90a
from jitgemm.heuristics.gemm import candidates, illegal, predict
from jitgemm.heuristics.serving import ANCHORS

pytestmark = pytest.mark.usefixtures("no_shipped_table")

PROBLEMS = [
    GemmProblem(n, k, recipe, m)
    for recipe in ("fp8_1x128_128x128", "bf16")
    for n, k in ((576, 7168), (7168, 2048))
    for m in (1, 100, 512, 4096)
]


@pytest.fixture(autouse=True)
def same_constants_afterwards(cache_dir: Path) -> Iterator[None]:
    before = calibrate.constants()
    yield
    calibrate.put(before)


def legal(problem: GemmProblem) -> list[GemmConfig]:
    return [config for config in candidates(problem, ()) if illegal(problem, config, H200) is None]


def measure(problem: GemmProblem) -> dict[GemmConfig, float]:
    return {config: predict(problem, config, H200)["total"] for config in legal(problem)}


def write(path: Path, data: dict[GemmProblem, dict[GemmConfig, float]]) -> Path:
    for problem, measured in data.items():
        key = (problem.recipe, problem.m, problem.n, problem.k)
        sweep.append(path, [(*key, config, us, 10) for config, us in measured.items()])
    return path


def test_a_perfect_model_loses_nothing_but_by_the_limit() -> None:
    for problem in PROBLEMS:
        found = regret.regret(problem, measure(problem), H200)
        assert found is not None
        assert (found.menu, found.model) == (1, 1)
        assert found.choice == found.limit >= 1
        assert found.chosen == choose_config(problem, H200)
    tight = [regret.regret(problem, measure(problem), H200, limit=2) for problem in PROBLEMS]
    assert max(found.limit for found in tight if found is not None) > 1


def test_losses_are_told_apart() -> None:
    problem = PROBLEMS[0]
    measured = measure(problem)
    chosen = choose_config(problem, H200, limit=len(ANCHORS))
    second = next(config for config in measured if config != chosen)
    off_menu = GemmConfig(64, 56, 128, 4)
    assert off_menu not in candidates(problem, ())
    measured = dict.fromkeys(measured, 12.0) | {chosen: 11.0, second: 10.0, off_menu: 8.0}
    found = regret.regret(problem, measured, H200, limit=len(ANCHORS))
    assert found is not None
    assert (found.best, found.us) == (off_menu, 11.0)
    assert (found.menu, found.model, found.limit) == (10 / 8, 11 / 10, 1)
    assert found.choice == pytest.approx(11 / 8)


def test_what_was_not_measured_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = PROBLEMS[0]
    partial = measure(problem)
    del partial[choose_config(problem, H200)]
    assert regret.regret(problem, partial, H200) is None
    path = write(tmp_path / "sweep.csv", {problem: partial, PROBLEMS[1]: measure(PROBLEMS[1])})
    assert regret.main([str(path), "--by-shape"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 problems are left out" in printed
    assert "100x576x7168" in printed
    limits = [line.split()[0] for line in printed.split("gained\n")[1].splitlines()[1:12]]
    assert limits == [str(limit) for limit in range(6, 17)]


def test_the_fit_finds_other_constants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = calibrate.constants()
    calibrate.put(before | {"LAUNCH_US": (6.0,), "EPILOGUE_CYCLES": (900.0,)})
    path = write(tmp_path / "sweep.csv", {problem: measure(problem) for problem in PROBLEMS})
    calibrate.put(before)
    data = calibrate.rows(sweep.read(path), H200)
    assert sum(weight for *_, weight in data) == pytest.approx(len(PROBLEMS))
    error = calibrate.error(data, H200)
    assert calibrate.main([str(path), "--evaluations", "600"]) == 0
    assert calibrate.error(data, H200) < error / 4
    printed = capsys.readouterr().out
    pasted: dict[str, object] = {}
    exec(printed.rpartition("\n\n")[2], pasted)
    assert {name for name in pasted if name.isupper()} == set(before)
    assert pasted["LAUNCH_US"] == pytest.approx(sm90a.LAUNCH_US, rel=1e-3) != before["LAUNCH_US"][0]
    assert isinstance(pasted["REDUCTION_US"], tuple)


def test_constants_that_are_put_are_used_and_put_back() -> None:
    problem, config = PROBLEMS[0], legal(PROBLEMS[0])[0]
    before, us = calibrate.constants(), predict(problem, config, H200)["total"]
    calibrate.put(before | {"EPILOGUE_CYCLES": (1e5,)})
    assert predict(problem, config, H200)["total"] > us + 10
    calibrate.put(before)
    assert predict(problem, config, H200)["total"] == us
    assert calibrate.constants() == before
    assert not set(calibrate.MEASURED) & set(before)
    assert all(hasattr(sm90a, name) for name in calibrate.MEASURED)


def test_a_menu_serves_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow, other = (GemmConfig(64, width, 128, 4) for width in (64, 72, 80))
    wide = GemmConfig(8, 64, 128, 12, split_k=2, swap_ab=True)
    data = {
        PROBLEMS[0]: {fast: 5.0, slow: 10.0, other: 7.0},
        PROBLEMS[1]: {fast: 9.0, slow: 20.0, other: 9.5, wide: 3.0},
        PROBLEMS[2]: {fast: 9.0, other: 8.0},
    }
    assert calibrate.menu(data, 1) == [fast]
    assert calibrate.menu(data, 2) == [fast, wide]
    assert calibrate.menu(data, 9) == [fast, wide, other, slow]
    assert calibrate.main([str(write(tmp_path / "sweep.csv", data)), "--menu", "3"]) == 0
    headline, entries = capsys.readouterr().out.splitlines()
    assert headline == "FP8: 3 configs, geomean over the best 1.0000"
    assert entries.strip() == "8x64 s12 k2 swap, 64x64 s4, 64x80 s4"
    assert {gemm._parse(entry, 128) for entry in entries.split(",")} == {fast, wide, other}


def test_a_correction_that_was_planted_is_found(tmp_path: Path) -> None:
    sweep_of = {problem: dict(measure(problem)) for problem in PROBLEMS}
    menus = {problem: set(candidates(problem, ())) for problem in PROBLEMS}
    planted = next(c for c in sorted(menus[PROBLEMS[0]]) if all(c in sweep_of[p] for p in PROBLEMS if p.promotes))
    known = calibrate.corrections(sweep_of, H200)[True]
    for problem in PROBLEMS:
        if problem.promotes:
            sweep_of[problem] = {c: us * (0.8 if c == planted else 1) for c, us in sweep_of[problem].items()}
    found = calibrate.corrections(sweep_of, H200)[True]
    assert found[planted] < 0.95 * known[planted]
    text = calibrate.as_menu([planted], {planted: 0.934})
    assert text.endswith(" *0.93")
    assert calibrate.as_menu([planted]) == text[:-6]
