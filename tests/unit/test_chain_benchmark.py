"""The benchmark of chained calls, on the CPU: modes, checks and rows, with a made-up clock and without graphs."""

from __future__ import annotations

import csv
import sys
import types
from collections.abc import Callable, Iterator, Sequence

import pytest

import jitgemm
from benchmarks import chain, dense
from benchmarks.chain import MODES, PEER, Mode
from benchmarks.harness import CsvLog
from benchmarks.shapes import LAYERS, Shape

SHAPES = [Shape(4, 256, 128), Shape(4, 128, 256), Shape(4, 256, 128)]
Call = Callable[[], object]


class Clock:
    """Makes each call, and finds that it takes ``us``."""

    def __init__(self, us: float) -> None:
        self.us = us

    def __call__(self, call: Call) -> float:
        call()
        return self.us

    def empty(self) -> None:
        pass

    def check(self) -> None:
        pass


def together(calls: Sequence[Call]) -> Call:
    """What stands for a graph."""
    return lambda: [call() for call in calls]


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the libraries are told, while DeepGEMM is a copy of ours."""
    told: list[str] = []
    peer = types.ModuleType("deep_gemm")
    for name in ("fp8_gemm_nt", "bf16_gemm_nt", "get_mn_major_tma_aligned_tensor"):
        setattr(peer, name, getattr(jitgemm, name))
    for module, function in ((peer, "set_pdl"), (jitgemm, "set_pdl")):
        label = f"{module.__name__}.{function}"
        monkeypatch.setattr(module, function, lambda on, label=label: told.append(f"{label}({on})"), raising=False)
    monkeypatch.setitem(sys.modules, "deep_gemm", peer)
    yield told


def run(recipe: str, capture: Callable[[Sequence[Call]], Call] = together) -> list[dict[str, object]]:
    inputs = [dense.Inputs(shape, seed, device="cpu") for seed, shape in enumerate(SHAPES)]
    return chain.run_chain(recipe, inputs, {"warm": Clock(80.0), "flushed": Clock(90.0)}, 2, 20, capture)


def test_the_chain_is_eight_of_the_layers() -> None:
    assert len(chain.LAYERS) == 8
    assert set(chain.LAYERS) == set(LAYERS)
    weights = sum(n * k for n, k in chain.LAYERS)
    assert 4 * 60e6 < weights < 300e6


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_all_modes_run(recipe: str, switched: list[str]) -> None:
    rows = run(recipe)
    assert [(row["library"], row["pdl"], row["l2"]) for row in rows] == [
        (mode.library, int(mode.pdl), l2) for l2 in ("warm", "flushed") for mode in MODES[recipe]
    ]
    assert [row["error"] for row in rows] == [""] * len(rows)
    assert {(row["l2"], row["us"], row["of_peer"], row["samples"], row["replays"]) for row in rows} == {
        ("warm", 80.0, 1.0, 2, 20),
        ("flushed", 90.0, 1.0, 2, 1),
    }
    assert [row["case"] for row in rows if row["target"] is not None] == [
        f"{dense.NAMES[recipe]}/m=4/jitgemm pdl/{l2}" for l2 in ("warm", "flushed")
    ]


def test_a_mode_is_on_while_its_calls_are_captured(switched: list[str]) -> None:
    seen: list[list[str]] = []

    def capture(calls: Sequence[Call]) -> Call:
        seen.append(switched.copy())
        switched.clear()
        return together(calls)

    run("fp8", capture)
    off = {"deep_gemm": ["deep_gemm.set_pdl(False)"]}
    off["jitgemm"] = ["jitgemm.set_pdl(False)"]
    assert seen == [
        off["deep_gemm"],
        [*off["deep_gemm"], "deep_gemm.set_pdl(True)"],
        [*off["deep_gemm"], *off["jitgemm"]],
        [*off["jitgemm"], "jitgemm.set_pdl(True)"],
    ]
    assert switched == off["jitgemm"]


def test_wrong_results_and_failures_are_not_timed(switched: list[str]) -> None:
    turns = iter(range(len(MODES["fp8"])))

    def capture(calls: Sequence[Call]) -> Call:
        turn = next(turns)
        if turn == 1:
            raise RuntimeError("no capture")
        return together(calls[:-1] if turn == 3 else calls)  # a result that stays NaN

    rows = run("fp8", capture)
    errors = {(row["library"], row["pdl"]): row["error"] for row in rows if row["us"] is None}
    assert errors.keys() == {("deepgemm", 1), ("jitgemm", 1)}
    assert errors["deepgemm", 1] == "RuntimeError: no capture"
    assert str(errors["jitgemm", 1]).startswith("ArithmeticError: wrong result")
    assert all(row["of_peer"] is None for row in rows)


def test_rows_are_written_and_summed_up(switched: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = [{**row, "measured": "on a Tuesday"} for row in run("fp8")]
    path = tmp_path_factory.mktemp("chain") / "chain.csv"
    with CsvLog(path, chain.COLUMNS) as log:
        for row in rows:
            assert row.keys() == set(chain.COLUMNS)
            log.write(row)
    assert len(list(csv.DictReader(path.open()))) == len(rows) == 8
    lines = chain.summary(rows).splitlines()
    assert lines[0].split("  ")[0] == "recipe"
    judged = next(line for line in lines if "jitgemm pdl  " in line)
    assert judged.split()[-6:-1] == ["80", "1", "90", "1", "0.85"]


def test_mode_names() -> None:
    assert str(PEER) == "deepgemm pdl"
    assert str(Mode("jitgemm", True)) == "jitgemm pdl"
    assert str(Mode("cublas")) == "cublas"
