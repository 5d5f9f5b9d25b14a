"""The float64 reference and its error measures, against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import jitgemm
from jitgemm.errors import ProblemError
from jitgemm.reference import gemm as reference
from jitgemm.reference.gemm import Errors, check_close, error_measures, gemm, round_to_bf16, tolerance

FP8_RECIPES = ("fp8_1x128_128x128", "fp8_1x128_1x128", "fp8_rowwise", "fp8_tensorwise")


def fp8(*shape: int) -> Tensor:
    return torch.randn(shape).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)


def scales_of(recipe: str, m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    k_groups = -(-k // 128)
    shapes = {
        "fp8_1x128_128x128": ((m, k_groups), (-(-n // 128), k_groups)),
        "fp8_1x128_1x128": ((m, k_groups), (n, k_groups)),
        "fp8_rowwise": ((m,), (n, 1)),
        "fp8_tensorwise": ((), (1, 1)),
    }[recipe]
    return torch.rand(shapes[0]) + 0.5, torch.rand(shapes[1]) + 0.5


def scale_at(recipe: str, scales: Tensor, row: int, k: int, rows_per_scale: int) -> float:
    if recipe == "fp8_tensorwise":
        return scales.item()
    if recipe == "fp8_rowwise":
        return scales.reshape(-1)[row].item()
    return scales[row // rows_per_scale, k // 128].item()


def exact_d(recipe: str, a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor) -> list[list[Fraction]]:
    """The product in exact rational arithmetic, one element at a time; a [m, k], b [n, k]."""
    (m, k), n = a.shape, b.shape[0]
    b_rows = 128 if recipe == "fp8_1x128_128x128" else 1
    a_exact = [
        [Fraction(a[i, j].item()) * Fraction(scale_at(recipe, a_scales, i, j, 1)) for j in range(k)] for i in range(m)
    ]
    b_exact = [
        [Fraction(b[i, j].item()) * Fraction(scale_at(recipe, b_scales, i, j, b_rows)) for j in range(k)]
        for i in range(n)
    ]
    return [
        [sum((x * y for x, y in zip(row, column, strict=True)), Fraction()) for column in b_exact] for row in a_exact
    ]


@pytest.mark.parametrize("recipe", FP8_RECIPES)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 5, 1), (2, 131, 130), (1, 2, 257)])
def test_scaled_products_equal_exact_arithmetic(recipe: str, m: int, n: int, k: int) -> None:
    a, b = fp8(m, k), fp8(n, k)
    a_scales, b_scales = scales_of(recipe, m, n, k)
    expected = torch.tensor([[float(x) for x in row] for row in exact_d(recipe, a, b, a_scales, b_scales)]).double()
    d = gemm(a, b, a_scales=a_scales, b_scales=b_scales, recipe=recipe, d_dtype="fp32")
    assert d.dtype == torch.float32
    # float64 sums differ from exact ones far below fp32's last bit, save where terms cancel.
    torch.testing.assert_close(d.double(), expected, rtol=2.0**-23, atol=1e-7)


@pytest.mark.parametrize("layout", reference.LAYOUTS)
@pytest.mark.parametrize("with_c", [False, True])
def test_layouts_of_integers_are_exact(layout: str, with_c: bool) -> None:
    m, n, k = 7, 9, 33
    a, b = torch.randint(-8, 9, (m, k)), torch.randint(-8, 9, (n, k))
    c = torch.randint(-8, 9, (m, n)).bfloat16() if with_c else None
    expected = (a[:, None] * b[None]).sum(2) + (c.long() if c is not None else 0)
    a = (a.T.contiguous() if layout[0] == "t" else a).bfloat16()
    b = (b if layout[1] == "t" else b.T.contiguous()).bfloat16()
    assert torch.equal(gemm(a, b, c, recipe="bf16", layout=layout, d_dtype="fp32").long(), expected)


@pytest.mark.parametrize("recipe", [*FP8_RECIPES, "bf16"])
@pytest.mark.parametrize("layout", reference.LAYOUTS)
def test_chunks_change_nothing(recipe: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m, n, k = 300, 500, 140
    a, b, c = fp8(m, k), fp8(n, k), torch.randn(m, n)
    a_scales, b_scales = (None, None) if recipe == "bf16" else scales_of(recipe, m, n, k)
    if layout[0] == "t":
        a = a.view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)
    if layout[1] == "n":
        b = b.view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)
    if recipe == "bf16":
        a, b = a.bfloat16(), b.bfloat16()

    def run() -> Tensor:
        return gemm(a, b, c, a_scales=a_scales, b_scales=b_scales, recipe=recipe, layout=layout, d_dtype="fp32")

    whole = run()
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1)  # 128 rows at a time
    torch.testing.assert_close(run(), whole, rtol=1e-6, atol=1e-6)


def test_strided_operands_and_scales() -> None:
    a, b = torch.randn(20, 300).bfloat16()[::2, 7:140], torch.randn(140, 30).bfloat16().T[:, 7:]
    assert torch.equal(gemm(a, b, recipe="bf16"), gemm(a.contiguous(), b.contiguous(), recipe="bf16"))
    x, y = fp8(7, 300), fp8(9, 300)
    a_scales, b_scales = scales_of("fp8_1x128_1x128", 7, 9, 300)
    plain = gemm(x, y, a_scales=a_scales, b_scales=b_scales, recipe="fp8_1x128_1x128")
    mn_major = jitgemm.get_mn_major_tma_aligned_tensor(a_scales)
    assert torch.equal(gemm(x, y, a_scales=mn_major, b_scales=b_scales, recipe="fp8_1x128_1x128"), plain)


@pytest.mark.parametrize("d_dtype", ["bf16", "fp32"])
def test_no_rows(d_dtype: str) -> None:
    d = gemm(torch.empty(0, 16).bfloat16(), torch.randn(5, 16).bfloat16(), recipe="bf16", d_dtype=d_dtype)
    assert d.shape == (0, 5) and d.dtype == reference.D_DTYPES[d_dtype]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["a", "b", "c", "a_scales", "b_scales"])
def test_nan_and_inf_reach_exactly_what_depends_on_them(where: str, bad: float) -> None:
    m, n, k = 6, 300, 260
    operands = {"a": torch.ones(m, k), "b": torch.ones(n, k), "c": torch.ones(m, n)}
    operands["a_scales"], operands["b_scales"] = torch.ones(m, 3), torch.ones(3, 3)
    position = {"a": (2, 259), "b": (2, 131), "c": (2, 7), "a_scales": (2, 1), "b_scales": (1, 2)}[where]
    if where in ("a", "b"):
        bad = float("nan")  # E4M3 has no Inf
    operands[where][position] = bad
    reached = torch.zeros(m, n, dtype=torch.bool)
    rows, columns = {
        "a": (slice(2, 3), slice(None)),
        "b": (slice(None), slice(2, 3)),
        "c": (slice(2, 3), slice(7, 8)),
        "a_scales": (slice(2, 3), slice(None)),
        "b_scales": (slice(None), slice(128, 256)),
    }[where]
    reached[rows, columns] = True
    d = gemm(
        operands["a"].to(torch.float8_e4m3fn),
        operands["b"].to(torch.float8_e4m3fn),
        operands["c"],
        a_scales=operands["a_scales"],
        b_scales=operands["b_scales"],
        recipe="fp8_1x128_128x128",
    )
    assert torch.equal(~d.isfinite(), reached)
    assert torch.equal(d.isnan(), reached if bad != bad else torch.zeros_like(reached))
    assert (d[~reached] == torch.tensor(float(k + 1)).bfloat16()).all()


def test_zero_times_inf_is_nan() -> None:
    a, b = torch.ones(2, 4).bfloat16(), torch.ones(3, 4).bfloat16()
    a[0, 1], b[1, 1], b[2, 1] = float("inf"), 0, -1
    d = gemm(a, b, recipe="bf16")
    assert d[0, 0] == float("inf") and d[0, 1].isnan() and d[0, 2] == -float("inf")
    assert d[1].tolist() == [4, 3, 2]


def nearest_bf16(x: Fraction) -> float:
    """Round by searching all bf16 values, ties to the even code."""
    code = int(np.searchsorted(BF16_VALUES, float(abs(x)), side="right"))
    candidates = range(max(code - 2, 0), min(code + 2, len(BF16_VALUES)))
    best = min(candidates, key=lambda c: (abs(Fraction(float(BF16_VALUES[c])) - abs(x)), c % 2))
    return float(BF16_VALUES[best]) * (-1 if x < 0 else 1)


BF16_VALUES = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)


@given(st.integers(0x0000, 0x7F7E), st.sampled_from([1, -1]), st.integers(-3, 3), st.integers(20, 60))
@settings(max_examples=400, deadline=None)
def test_bf16_is_rounded_once(code: int, sign: int, offset: int, distance: int) -> None:
    # On, and a hair beside, the middle between two bf16 values; rounding to fp32 first would lose the hair.
    low, high = BF16_VALUES[code], BF16_VALUES[code + 1]
    x = sign * (low + (high - low) * (0.5 + offset * 2.0**-distance))
    assert round_to_bf16(torch.tensor([x], dtype=torch.float64)).item() == nearest_bf16(Fraction(float(x)))


@given(st.floats(-3e38, 3e38))
@settings(max_examples=300, deadline=None)
def test_bf16_of_any_float64(x: float) -> None:
    assert round_to_bf16(torch.tensor([x], dtype=torch.float64)).item() == nearest_bf16(Fraction(x))


def test_bf16_of_special_values() -> None:
    inf = float("inf")
    x = torch.tensor([inf, -inf, 1e300, -1e300, 3.4e38, 1e-300, -1e-300, 0.0, -0.0, float("nan")], dtype=torch.float64)
    rounded = round_to_bf16(x)
    assert rounded[:9].tolist() == [inf, -inf, inf, -inf, inf, 0, 0, 0, 0]
    assert torch.signbit(rounded[:9]).tolist() == [False, True, False, True, False, False, True, False, True]
    assert rounded[9].isnan()


def test_the_gemm_rounds_once() -> None:
    # 1 + 2^-8 is the middle between two bf16 values, and 2^-30 is lost in fp32 beside it.
    a = torch.tensor([[1.0, 2.0**-8, 2.0**-30]]).bfloat16()
    b = torch.ones(1, 3).bfloat16()
    assert gemm(a, b, recipe="bf16").item() == 1 + 2.0**-7
    assert gemm(a[:, :2], b[:, :2], recipe="bf16").item() == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "fp4"}, "recipe is 'fp4'; accepted is fp8_1x128_128x128, "),
        ({"layout": "xy"}, "layout is 'xy'; accepted is nt, nn, tn, tt"),
        ({"d_dtype": "fp16"}, "d_dtype is 'fp16'; accepted is bf16, fp32"),
        ({"b": torch.ones(5, 300)}, "b has k = 300 in layout nt; a has k = 200"),
        ({"c": torch.ones(4, 5)}, r"c has shape \(4, 5\); accepted is \(3, 5\)"),
        ({"a_scales": None}, "a_scales are None"),
        ({"a_scales": torch.ones(3, 1)}, r"a_scales have shape \(3, 1\); accepted is \(3, 2\)"),
        ({"a_scales": torch.ones(3)}, r"a_scales have shape \(3,\)"),
        ({"b_scales": torch.ones(5, 2)}, r"b_scales have shape \(5, 2\); accepted is \(1, 2\)"),
        ({"recipe": "fp8_rowwise"}, r"b_scales have shape \(1, 2\); accepted is \(5, 1\)"),
        ({"recipe": "fp8_tensorwise"}, r"b_scales have shape \(1, 2\); accepted is one element"),
        ({"recipe": "bf16"}, "b_scales are given; bf16 operands have none"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "a": torch.ones(3, 200),
        "b": torch.ones(5, 200),
        "c": None,
        "a_scales": torch.ones(3, 2),
        "b_scales": torch.ones(1, 2),
        "recipe": "fp8_1x128_128x128",
    }
    with pytest.raises(ProblemError, match=message):
        gemm(**(arguments | changes))  # type: ignore[arg-type]


@given(st.integers(1, 40), st.floats(1e-6, 1e3), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_error_measures_equal_their_definitions(size: int, noise: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    y = generator.standard_normal((size, 3))
    x = y + noise * generator.standard_normal((size, 3))
    errors = error_measures(torch.from_numpy(x), torch.from_numpy(y))
    cosine = 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum())
    assert errors.cosine == pytest.approx(cosine, rel=1e-6, abs=1e-14)
    assert errors.frobenius == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-9)


def test_error_measures_of_chunks_and_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(700, 5).bfloat16(), torch.randn(700, 5)
    whole = error_measures(x, y)
    assert error_measures(x.flatten(), y.flatten()) == pytest.approx(whole)
    assert error_measures(x.view(7, 100, 5), y.view(7, 100, 5)) == pytest.approx(whole)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1)
    assert error_measures(x, y) == pytest.approx(whole)
    assert error_measures(x[0, 0], x[0, 0]) == (0, 0)


def test_error_measures_of_zeros_and_nothing() -> None:
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    assert error_measures(zero, zero) == (0, 0)
    assert error_measures(one, zero) == (1, float("inf"))
    assert error_measures(zero, one) == (1, 1)
    assert error_measures(torch.empty(0, 3), torch.empty(0, 3)) == (0, 0)
    with pytest.raises(ValueError, match=r"actual has shape \(2, 2\); expected has \(2, 1\)"):
        error_measures(zero, torch.zeros(2, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_never_pass(bad: float) -> None:
    good = torch.ones(3, 3)
    poisoned = good.clone()
    poisoned[1, 1] = bad
    anything = Errors(float("inf"), float("inf"))
    assert not error_measures(poisoned, good).within(anything)
    assert not error_measures(good, poisoned).within(anything)
    assert not error_measures(poisoned, poisoned).within(anything)


def test_tolerances_are_those_of_the_design() -> None:
    for recipe in FP8_RECIPES:
        assert tolerance(recipe, "bf16") == (1e-5, 3e-3)
        assert tolerance(recipe, "fp32") == (1e-6, 1e-3)
        assert tolerance(recipe, "bf16", fast_accum=True) == tolerance(recipe, "fp32", fast_accum=True) == (2e-4, 3e-2)
    assert tolerance("bf16", "bf16") == (1e-5, 3e-3)
    assert tolerance("bf16", "fp32") == (1e-8, 1e-4)
    with pytest.raises(ProblemError, match="recipe is 'fp4'"):
        tolerance("fp4", "bf16")
    with pytest.raises(ProblemError, match="d_dtype is 'fp64'"):
        tolerance("bf16", "fp64")


def test_check_close_tells_what_is_wrong() -> None:
    expected = torch.randn(20, 30)
    close = expected * (1 + 1e-5)
    assert check_close(close, expected, recipe="bf16", d_dtype="fp32").frobenius == pytest.approx(1e-5, rel=1e-2)
    wrong = expected.clone()
    wrong[3, 4] += 7
    with pytest.raises(AssertionError, match=r"D \(20, 30\) of bf16 is not close: .*worst at \(3, 4\): "):
        check_close(wrong, expected, recipe="bf16", d_dtype="fp32")
    wrong[5, 6] = float("nan")
    with pytest.raises(AssertionError, match=r"1 elements not finite, expected 0; worst at \(5, 6\): nan"):
        check_close(wrong, expected, recipe="bf16", d_dtype="fp32")
    with pytest.raises(AssertionError, match=r"out has shape \(1,\); expected is \(20, 30\)"):
        check_close(torch.ones(1), expected, recipe="bf16", d_dtype="fp32", what="out")
    with pytest.raises(AssertionError, match=r"dtype torch.float32; expected is torch.bfloat16"):
        check_close(close, expected, recipe="bf16", d_dtype="bf16")


def test_the_bounds_separate_right_from_wrong_kernels() -> None:
    # What a right kernel does (fp32 sums of scaled groups, one rounding to bf16) passes; one lost K element fails.
    m, n, k = 64, 96, 512
    a, a_scales = jitgemm.per_token_cast_to_fp8(torch.randn(m, k))
    b, b_scales = jitgemm.per_block_cast_to_fp8(torch.randn(n, k))
    a_float, b_float = a.float(), b.float()
    d = torch.zeros(m, n)
    for group in range(k // 128):
        part = slice(group * 128, group * 128 + 128)
        d += a_float[:, part] @ b_float[:, part].T * a_scales[:, group, None] * b_scales[0, group]
    for d_dtype, dtype in reference.D_DTYPES.items():
        expected = gemm(a, b, a_scales=a_scales, b_scales=b_scales, recipe="fp8_1x128_128x128", d_dtype=d_dtype)
        check_close(d.to(dtype), expected, recipe="fp8_1x128_128x128", d_dtype=d_dtype)
        lost = d - a_float[:, :1] @ b_float[:, :1].T * a_scales[:, :1] * b_scales[0, 0]
        with pytest.raises(AssertionError, match="is not close"):
            check_close(lost.to(dtype), expected, recipe="fp8_1x128_128x128", d_dtype=d_dtype)
