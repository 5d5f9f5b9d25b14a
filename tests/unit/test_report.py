"""The report on the dense race: its classes and targets, its text and its plots, from CSVs."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, sweep
from benchmarks.regret import Regret
from benchmarks.shapes import OTHER_LAYERS, OTHER_MS, dense_shapes
from jitgemm import settings
from jitgemm.device import PRESETS
from jitgemm.families.gemm import GemmConfig, GemmProblem
from jitgemm.heuristics import choose_config
from jitgemm.heuristics.serving import ANCHORS

MEASURED = Path(__file__).parents[2] / "docs" / "performance" / "dense_h200.csv"
FP8 = "fp8_1x128_128x128"
PNG = b"\x89PNG\r\n\x1a\n"


def row(
    m: int, n: int = 576, k: int = 7168, recipe: str = FP8, ratio: float | None = 1.5, **more: Any
) -> dict[str, Any]:
    """A shape where we take 10 us, and the floor is 9."""
    peer = None if ratio is None else 10 * ratio
    sizes = {"m": m, "n": n, "k": k, "recipe": recipe}
    times = {"ours_us": 10.0, "best_peer_us": peer, "deepgemm_us": peer, "floor_us": 9.0}
    return {**sizes, **times, "best_peer": "deepgemm", "ratio": ratio, **more}


def loss(recipe: str, us: float, choice: float) -> Regret:
    config = GemmConfig.from_text("64x64x128 s12")
    return Regret(GemmProblem(576, 7168, recipe, 64), config, config, us, menu=choice, model=1.0, limit=1.0)


def others() -> list[dict[str, Any]]:
    return [row(m, n, k, recipe) for recipe in (FP8, "bf16") for m in OTHER_MS for n, k in OTHER_LAYERS]


@pytest.mark.parametrize("recipe", [FP8, "bf16"])
def test_every_shape_is_in_one_class(recipe: str) -> None:
    for shape in dense_shapes():
        assert sum(bool(target.members([row(shape.m, shape.n, shape.k, recipe)])) for target in report.TARGETS) == 1
    found = report.verdicts(others())
    assert [(verdict.target.name, verdict.rows) for verdict in found] == [
        *(("FP8, other shapes, m <= 128", 24), ("BF16, other shapes, m <= 128", 24)),
        *(("FP8, other shapes, m > 128", 32), ("BF16, other shapes, m > 128", 32)),
    ]


@pytest.mark.parametrize(
    ("rows", "met"),
    [
        ([row(1), row(16)], True),
        ([row(1, ratio=1.22), row(16, ratio=1.22)], True),
        ([row(1, ratio=1.21), row(16, ratio=1.21)], False),  # the geomean
        ([row(1), row(16, ratio=1.02)], False),  # one shape
        ([row(1), row(16, floor_us=8.0, ours_us=10.0)], False),  # too far from the floor
        ([row(1), row(16, ratio=None)], False),  # a peer is missing
        ([row(1), row(16, ratio=None, ours_us=None)], False),  # ours is
        ([row(512, ratio=1.19), row(512, 2112, ratio=1.19)], True),
        ([row(512), row(512, 2112, ratio=0.99)], False),
        ([row(8192, ratio=1.11, floor_us=1.0)], True),
        ([row(8192, ratio=1.09)], False),
        ([row(64, recipe="bf16", ratio=1.09, floor_us=1.0)], True),
        ([row(512, recipe="bf16", ratio=1.04)], False),
        ([row(7, ratio=0.98)], True),  # asks for the floor only, and nothing below 0.97
        ([row(7, ratio=0.96)], False),
        ([row(7, floor_us=8.0)], False),
        ([row(777, ratio=1.06, floor_us=1.0)], True),
        ([row(777, ratio=1.04)], False),
    ],
)
def test_targets(rows: list[dict[str, Any]], met: bool) -> None:
    (verdict,) = report.verdicts(rows)
    assert verdict.met == met
    assert verdict.cells()[-1] == ("yes" if met else "no")


def test_summary() -> None:
    rows = [row(1, ratio=2.0), row(16, ratio=0.5), row(64, ratio=None)]
    line = report.summary(rows).splitlines()[-1]
    assert [cell.strip() for cell in line.split("  ") if cell] == [
        *("FP8, m <= 128", "2/3", "1.000 (>= 1.22)", "0.500 (>= 1.03)"),
        *("16x576x7168 (deepgemm)", "1.111 (<= 1.14)", "no"),
    ]


def test_reads_what_was_measured() -> None:
    rows = report.read_rows(MEASURED)
    assert len(rows) == 112
    first = next(csv.DictReader(MEASURED.open(newline="")))
    assert (rows[0]["m"], rows[0]["ours_us"], rows[0]["best_peer"]) == (1, float(first["ours_us"]), first["best_peer"])
    assert rows[0]["cublaslt_blockwise_us"] is None
    assert {(report.label(row), report.listed(row)) for row in rows} == {("FP8", True), ("BF16", True)}
    assert [verdict.rows for verdict in report.verdicts(rows)] == [28, 7, 21, 28, 28]


def test_report_from_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(MEASURED), str(tmp_path / "out")]) == 0
    images = ["over_floor_bf16.png", "over_floor_fp8.png", "ratio.png", "roofline.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*images, "report.md"])
    for image in images:
        assert (tmp_path / "out" / image).read_bytes().startswith(PNG)
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(f"]({image})" in text for image in images)
    assert "| FP8, m <= 128 | 28/28 |" in text
    row = next(csv.DictReader(MEASURED.open(newline="")))
    ours, peer, ratio = float(row["ours_us"]), float(row["best_peer_us"]), float(row["ratio"])
    assert f"| FP8 | 1x2112x7168 | {ours:.2f} | {peer:.2f} | {row['best_peer']} | {ratio:.3f} | 8.32 |" in text
    assert "FP8, m <= 128" in capsys.readouterr().out


def test_docs_show_what_was_measured() -> None:
    """After a new race: the command of docs/performance.md that writes the report.

    Its table also goes into docs/performance.md.
    """
    folder = MEASURED.parent
    text = (folder / "report.md").read_text()
    images = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert text == report.markdown(report.read_rows(MEASURED), MEASURED.name, images)
    page = (folder.parent / "performance.md").read_text()
    for image in images:
        assert f"](performance/{image})" in page
        assert (folder / image).read_bytes().startswith(PNG)
    table = [line for line in text.split("## Shapes")[0].splitlines() if line.startswith("|")]
    assert "\n".join(table) in page


def test_report_with_gaps_other_shapes_and_tuned_configs(tmp_path: Path) -> None:
    rows = [row(1, measured="on a Tuesday"), row(16, ratio=None, ours_us=None), row(16, 2112), *others()]
    regrets = [loss(FP8, 10.2, 1.02), loss("bf16", 20.0, 1.0)]
    names = [path.name for path in report.write(rows, tmp_path, "rows.csv", regrets)]
    assert names == [
        *("report.md", "roofline.png", "over_floor_fp8.png", "ratio.png"),
        *("roofline_other.png", "over_floor_fp8_other.png", "over_floor_bf16_other.png", "ratio_other.png"),
        "tuned.png",
    ]
    text = (tmp_path / "report.md").read_text()
    assert "Rows: rows.csv." in text
    assert text.count("on a Tuesday") == 1
    assert "| FP8 | 16x576x7168 | - | - | deepgemm | - | 9.00 | - |" in text


def test_report_where_nothing_ran(tmp_path: Path) -> None:
    rows = [row(1, ratio=None, ours_us=None, best_peer=None)]
    assert [path.name for path in report.write(rows, tmp_path, "rows.csv")] == ["report.md"]


def test_choices_of_a_sweep(tmp_path: Path) -> None:
    with settings.override(tuned=False):
        chosen = choose_config(GemmProblem(576, 7168, FP8, 64), PRESETS["h200"])
        unlimited = choose_config(GemmProblem(576, 7168, FP8, 64), PRESETS["h200"], len(ANCHORS))
    other = dataclasses.replace(chosen, stages=chosen.stages - 1)
    path = tmp_path / "sweep.csv"
    times = [(64, unlimited, 10.0), (64, chosen, 10.5), (64, other, 9.5), (8, other, 9.5)]
    lines = [f"{FP8},{m},576,7168,{config},{us},200" for m, config, us in times]
    path.write_text("\n".join(["recipe,m,n,k,config,us,samples", *lines, ""]))
    (found,) = report.regrets_of(sweep.read(path), "h200")
    assert (found.problem.m, found.us, found.choice) == (64, 10.5, pytest.approx(10.5 / 9.5))
    assert report.main([str(MEASURED), str(tmp_path), "--sweep", str(path)]) == 0
    assert (tmp_path / "tuned.png").read_bytes().startswith(PNG)


def test_plots_show_what_was_measured() -> None:
    """The points of the figures are the CSV's."""
    rows = [row for row in report.read_rows(MEASURED) if report.label(row) == "FP8"]
    (axes,) = report._roofline({"FP8": rows}, "").axes
    ours = next(points for points in axes.collections if points.get_label() == "jitgemm")
    expected = [report.shape_of(row).flops / row["ours_us"] / 1e6 for row in rows]
    assert ours.get_offsets()[:, 1].tolist() == pytest.approx(expected)

    panels = {axes.get_title(): axes for axes in report._over_floor(rows, "").axes}
    (line,) = [line for line in panels["n = 576, k = 7168"].lines if line.get_label() == "DeepGEMM"]
    wanted = {row["m"]: row["deepgemm_us"] / row["floor_us"] for row in rows if row["n"] == 576}
    assert dict(line.get_xydata().tolist()) == pytest.approx(wanted)

    grid, bar = report._ratio({"FP8": rows}, "").axes
    assert len(grid.texts) == 56
    assert len(grid.patches) == sum(row["ratio"] < _each(row["m"]) for row in rows)
    assert "ratio" in bar.get_ylabel()

    (axes,) = report._tuned([loss(FP8, 11.0, 1.1)]).axes
    assert axes.collections[0].get_offsets().tolist() == [[pytest.approx(10.0), 1.1]]


def _each(m: int) -> float:
    return 1.03 if m <= 128 else 1.0 if m == 512 else 0.98


def test_bad_csvs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.csv"
    path.write_text("m,n\n1,2\n")
    for arguments, message in (
        ([str(path), "out"], "has no column k, recipe, ours_us"),
        ([str(tmp_path / "missing.csv"), "out"], "No such file"),
        ([str(MEASURED), "out", "--sweep", str(MEASURED)], "column 'us' is missing"),
    ):
        with pytest.raises(SystemExit) as exit_:
            report.main(arguments)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


def test_says_what_plots_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install '\.\[report\]'"):
        report.main([str(MEASURED), str(tmp_path)])
