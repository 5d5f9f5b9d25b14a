"""benchmarks.grouped without a GPU: its shapes and floors, its operands and its rows."""

from __future__ import annotations

from types import SimpleNamespace

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


def test_calls_have_the_names_and_arguments_of_the_peer() -> None:
    called = []

    def masked(a: object, b: object, d: object, masked_m: object, expected_m: int, recipe: object = None) -> None:
        called.append(("masked", expected_m))

    def contiguous(a: object, b: object, d: object, grouped_layout: object, use_psum_layout: bool = False) -> None:
        called.append(("contiguous", use_psum_layout))

    peer = SimpleNamespace(  # those of sgl-deep-gemm 0.1.5
        fp8_m_grouped_gemm_nt_masked=masked,
        bf16_m_grouped_gemm_nt_masked=masked,
        m_grouped_fp8_gemm_nt_contiguous=contiguous,
        m_grouped_bf16_gemm_nt_contiguous=contiguous,
    )
    for recipe in grouped.NAMES:
        for case in grouped.CASES:
            inputs = Inputs(Shape(case, recipe, 5, 128, 128, 2), device="cpu")
            inputs.call_of(peer, inputs.output())()
    assert called == [("masked", 5), ("contiguous", False), ("contiguous", True)] * 2


def test_a_peer_that_lacks_something_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def call(shape: Shape) -> str | None:
        tried.append(shape.case)
        return "AttributeError: no such function" if shape.case == "psum" else None

    class Pool:
        def __init__(self, jobs: int) -> None:
            self.map = map

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *args: object) -> None: ...

    monkeypatch.setattr(grouped, "_call_peer", call)
    monkeypatch.setattr(grouped.harness, "spawn_pool", Pool)
    for name in ("require_gpu", "preset_name"):
        monkeypatch.setattr(grouped.harness, name, lambda: "H200")
    monkeypatch.setattr(grouped, "provenance", lambda: "now")
    monkeypatch.setattr(grouped.harness, "build_all", lambda *_: pytest.fail("built"))
    assert grouped.main(["--cases", "masked", "psum", "--m", "128", "--layers", "4096,7168"]) == 4
    assert tried == ["masked", "psum"]
    assert "psum fp8_1x128_128x128: AttributeError: no such function" in capsys.readouterr().out


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
