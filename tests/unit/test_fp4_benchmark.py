"""benchmarks.fp4 without a GPU: its shapes and floors, its operands and its rows."""

from __future__ import annotations

import pytest

from benchmarks import fp4, fp4_formats
from benchmarks.fp4 import COLUMNS, OURS, OURS_FP8, Inputs, Shape, config_of, floor_us, make_row, needed, parse, summary


def test_floors() -> None:
    assert floor_us(Shape("dense", 1, 7168, 16384)) == pytest.approx(4.8 + 7168 * 16384 * 0.53125 / 4.3e6)
    assert floor_us(Shape("dense", 4096, 4096, 7168)) == pytest.approx(3.6 + 2 * 4096 * 4096 * 7168 / 1.7e9)


@pytest.mark.parametrize("shape", [Shape("dense", 5, 136, 256), Shape("masked", 5, 136, 256, 3)], ids=str)
@pytest.mark.parametrize("name", [OURS, OURS_FP8])
def test_operands_are_right_and_wrong_results_are_noticed(shape: Shape, name: str) -> None:
    inputs = Inputs(shape, device="cpu")
    d = inputs.output()
    inputs.call_of(name, d)()
    inputs.check(name, d)
    d[(2, slice(0, 5)) if shape.case == "masked" else slice(None)] *= 4
    with pytest.raises(ArithmeticError, match="wrong result"):
        inputs.check(name, d)


def test_rows_and_summary() -> None:
    shapes = fp4.shapes_of(parse(["--cases", "dense", "--layers", "4096,7168", "--m", "1", "512"]))
    medians = {"jitgemm": 10.0, "humming": 14.0, "deepgemm": 12.5, "ours_fp8": 12.0}
    rows = [make_row(shape, config_of(shape, "h200"), medians, {}, 30) for shape in shapes]
    rows.append(make_row(shapes[0], "config", {"jitgemm": 10.0}, {"humming": "ImportError"}, 30))
    assert {*rows[0], "measured"} == set(COLUMNS)
    assert (rows[0]["best_peer"], rows[0]["ratio"], rows[2]["ratio"]) == ("deepgemm", 1.25, None)
    text = summary(rows)
    assert "dense, m 1 to 64" in text and "1.250" in text and "1.200" in text


def test_kernels_of_all_shapes_are_known_before() -> None:
    for shape in fp4.shapes_of(parse(["--m", "1", "4096", "--groups", "8"])):
        expands = config_of(shape, "h200").startswith("expanded ")
        assert expands == (shape.case == "dense" and shape.m == 4096)
        assert len(set(needed(shape, "h200"))) == (4 if expands else 2)


@pytest.mark.parametrize("name", fp4_formats.CONTENDERS)
def test_every_format_is_right(name: str) -> None:
    fp4_formats.Case(5, 136, 256, "cpu").check(name)()


def test_shapes_of_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert fp4_formats.main(["--list", "--m", "7", "--layers", "72,160"]) == 0
    assert capsys.readouterr().out.split()[-3:] == ["7", "72", "160"]
