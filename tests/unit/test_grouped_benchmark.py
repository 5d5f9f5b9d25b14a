"""benchmarks.grouped without a GPU: its shapes and floors, its operands and its rows."""

from __future__ import annotations

import pytest

import jitgemm
from benchmarks import grouped
from benchmarks.grouped import COLUMNS, Inputs, Shape, floor_us, make_row, parse, shapes_of, summary


def test_floors_are_those_of_the_targets() -> None:
    # of groups, n x k and m in the table of the peer's times
    for groups, n, k, m, us in ((4, 4096, 7168, 1, 34.4 / 1.07), (32, 6144, 7168, 1024, 1999.9 / 1.18)):
        assert floor_us(Shape("masked", "fp8", m, n, k, groups)) == pytest.approx(us, rel=0.01)


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
@pytest.mark.parametrize("case", grouped.CASES)
def test_operands_are_right_and_wrong_results_are_noticed(case: str, recipe: str) -> None:
    inputs = Inputs(Shape(case, recipe, 5, 136, 256, 3), device="cpu")
    d = inputs.output()
    inputs.call_of(jitgemm, d)()
    inputs.check("jitgemm", d)
    others = d[~inputs.used]
    assert bool(others.isnan().all() if case == "masked" else (others == 0).all())
    d[(2, 4) if case == "masked" else 2 * 128 + 4] *= 1.5
    with pytest.raises(ArithmeticError, match="wrong result"):
        inputs.check("jitgemm", d)


def test_rows_and_summary() -> None:
    shapes = shapes_of(parse(["--cases", "masked", "--groups", "4", "--layers", "4096,7168", "--m", "1", "192"]))
    rows = [make_row(shape, "config", {"jitgemm": 20.0, "deepgemm": 25.0}, {}, 30) for shape in shapes]
    rows += [make_row(shapes[0], "config", {"jitgemm": 20.0}, {"deepgemm": "ImportError"}, 30)]
    assert {*rows[0], "measured"} == set(COLUMNS)
    assert rows[0]["ratio"] == 1.25
    assert rows[2]["ratio"] is None
    text = summary(rows)
    assert "masked fp8_1x128_128x128, m 1 to 64" in text
    assert "1.250" in text
