"""Quantizers, SwiGLU, RMSNorm and rotary embedding on CPU tensors: formats, worked values, arguments, operators."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import jitgemm
from jitgemm import settings
from jitgemm.device import PRESETS
from jitgemm.errors import ProblemError
from jitgemm.families import rowwise, tiles
from jitgemm.families.rowwise import RowwiseProblem
from jitgemm.families.tiles import TileProblem
from jitgemm.heuristics import enumerate_specs
from jitgemm.heuristics import rowwise as heuristics
from jitgemm.ops.rowwise_launch import E8M0, in_rows, rows_of
from jitgemm.reference import rowwise as reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    return mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = [e4m3(code) for code in range(127)]


def nearest(x: float, magnitudes: list[float], ties: str) -> int:
    """The code of the nearest magnitude, by exact arithmetic."""
    distances = [abs(Fraction(abs(x)) - Fraction(m)) for m in magnitudes]
    best = [code for code, distance in enumerate(distances) if distance == min(distances)]
    if len(best) == 1:
        return best[0]
    return {"even": next(code for code in best if code % 2 == 0), "away": best[1], "zero": best[0]}[ties]


# -- Formats.


@pytest.mark.parametrize("ties", ["even", "away", "zero"])
def test_e2m1_at_and_around_every_midpoint(ties: str) -> None:
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    grid = np.concatenate([np.arange(0, 8, 1 / 64, dtype=np.float32), E2M1, [7.0, 1e30, np.inf, 1e-45]])
    x = np.concatenate([middles, np.nextafter(middles, 0), np.nextafter(middles, 9), grid]).astype(np.float32)
    codes = reference.round_to_e2m1(torch.from_numpy(x), ties)
    assert codes.tolist() == [nearest(min(float(v), 6.0), E2M1, ties) for v in x]
    negative = reference.round_to_e2m1(torch.from_numpy(-x[x > 0]), ties)
    assert torch.equal(negative & 7, codes[torch.from_numpy(x > 0)])
    assert bool(((negative >> 3 == 1) | ((negative & 7 == 0) & (ties == "zero"))).all())


def test_the_ties_of_the_specification() -> None:
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    for ties, values in (
        ("even", [0, 1, 1, 2, 2, 4, 4]),
        ("zero", [0, 0.5, 1, 1.5, 2, 3, 4]),
        ("away", [0.5, 1, 1.5, 2, 3, 4, 6]),
    ):
        assert reference.e2m1_to_float(reference.round_to_e2m1(middles, ties)).tolist() == values


def test_signs_of_zeros() -> None:
    x = torch.tensor([-0.0, -0.1, 0.0])
    assert reference.round_to_e2m1(x, "even").tolist() == [8, 8, 0]
    assert reference.round_to_e2m1(x, "away").tolist() == [0, 8, 0]
    assert reference.round_to_e2m1(x, "zero").tolist() == [0, 0, 0]


def test_every_code_decodes_to_its_definition_and_back() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert reference.e2m1_to_float(codes).tolist() == [*E2M1, *(-x for x in E2M1)]
    assert torch.equal(reference.round_to_e2m1(reference.e2m1_to_float(codes)), codes)
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    assert torch.equal(reference.round_to_e4m3(reference.e4m3_to_float(codes)), codes)
    special = torch.tensor([math.nan, math.inf, -math.inf, 464.0, 1e9, -1e9])
    assert reference.round_to_e4m3(special).tolist() == [0x7F, 0x7E, 0xFE, 0x7E, 0x7E, 0xFE]


def test_nibbles_hold_the_even_column_low() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
    packed = reference.pack_nibbles(codes)
    assert packed[0, 0] == 0x10 and packed[1, 3] == 0xFE
    assert torch.equal(reference.unpack_nibbles(packed), codes)


# -- Quantizers.


def group(values: list[float], size: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.tensor([values + [0.0] * (size - len(values))], dtype=dtype)


@pytest.mark.parametrize("power", range(-30, 30, 7))
def test_scales_of_exact_powers(power: int) -> None:
    """448 * 2^k has the scale 2^k; what is just above, the next one."""
    x = group([448.0 * 2.0**power], 32)
    assert jitgemm.act_quant(x, 32, "ue8m0")[1].item() == (2.0**power if 448 * 2.0**power >= 1e-4 else 2.0**-22)
    if power > -12:
        above = torch.nextafter(x, torch.full_like(x, math.inf))
        assert jitgemm.act_quant(above, 32, "ue8m0")[1].item() == 2.0 ** (power + 1)
        assert jitgemm.act_quant(group([1.75 * 2.0**power], 32), 32, "ue8m0")[1].item() == 2.0 ** (power - 8)
    for size, call in ((32, jitgemm.fp4_act_quant),):
        packed, scales = call(group([6 * 2.0**power], size))
        assert scales.view(torch.uint8).item() == 127 + power and packed[0, 0] & 0xF == 7


def test_powers_of_two_do_not_depend_on_how_the_quotient_is_rounded() -> None:
    amax = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(BF16).float()
    for largest in (448.0, 6.0):
        by_reciprocal = reference.ceil_to_ue8m0(amax * torch.tensor(1 / largest))
        assert torch.equal(by_reciprocal, reference.ceil_to_ue8m0(amax / torch.tensor(largest)))


def test_zero_groups() -> None:
    x = torch.zeros(1, 128, dtype=BF16)
    codes, scales = jitgemm.act_quant(x, scale_fmt="ue8m0")
    assert scales.item() == 2.0**-22 and not codes.view(torch.uint8).any()
    assert jitgemm.act_quant(x)[1].item() == float(np.float32(1e-4) * np.float32(1 / 448))
    packed, exponents = jitgemm.fp4_act_quant(x)
    assert exponents.view(torch.uint8).tolist() == [[1] * 4] and not packed.any()
    assert jitgemm.int8_act_quant(x)[1].item() == float(np.float32(1e-12))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_e4m3_equals_an_exact_oracle(dtype: torch.dtype, scale_fmt: str | None) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(4, 128, generator=generator) * torch.randn(4, 128, generator=generator).mul(3).exp()).to(dtype)
    codes, scales = jitgemm.act_quant(x, 64, scale_fmt)
    for i, j in np.ndindex(4, 2):
        part = x[i, 64 * j : 64 * j + 64].float().numpy()
        scale = np.float32(max(np.abs(part).max(), np.float32(1e-4))) * np.float32(1 / 448)
        if scale_fmt:
            mantissa, exponent = math.frexp(scale)
            scale = np.float32(2.0 ** (exponent - (mantissa == 0.5)))
        assert scales[i, j].item() == scale
        expected = [nearest(min(abs(float(q)), 448.0), E4M3, "even") for q in part / scale]
        assert (codes.view(torch.uint8)[i, 64 * j : 64 * j + 64] & 0x7F).tolist() == expected


def test_int8_rounds_halves_to_even() -> None:
    codes, scales = jitgemm.int8_act_quant(group([127.0, 0.5, 1.5, 2.5, -0.5, -3.5, -127.0], 32), 32)
    assert scales.item() == 1 and codes[0, :7].tolist() == [127, 0, 2, 2, 0, -4, -127]
    x = torch.randn(7, 256, dtype=FP16)
    codes, scales = jitgemm.int8_act_quant(x)
    assert scales.stride() == (1, 7)
    back = codes.float() * scales.repeat_interleave(128, 1)
    assert bool(((back - x.float()).abs() <= scales.repeat_interleave(128, 1) * 0.5001).all())


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_int8_rows_equal_an_exact_oracle(dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, 200) * torch.tensor([1e-6, 1.0, 300.0])[:, None]
    x[0, 1] = 0
    x = x.to(dtype)
    codes, scales = jitgemm.per_token_cast_to_int8(x)
    assert (codes.shape, scales.shape) == ((6, 3, 200), (6, 3, 1))
    for row, found, scale in zip(x.view(-1, 200), codes.view(-1, 200), scales.flatten(), strict=True):
        part = row.float().numpy()
        inverse = np.float32(127) / max(np.abs(part).max(), np.float32(1e-4))
        assert scale.item() == np.float32(1) / inverse
        assert found.tolist() == np.rint(part * inverse).tolist()  # which rounds halves to even
    halves = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -3.5, -127.0]])
    codes, scales = jitgemm.per_token_cast_to_int8(halves)
    assert scales.item() == 1 and codes[0].tolist() == [127, 0, 2, 2, 0, -4, -127]


def test_a_norm_before_int8_is_two_functions_in_one() -> None:
    x, weight = torch.randn(5, 200, dtype=BF16), torch.randn(200, dtype=BF16)
    values, codes, scales = jitgemm.rms_norm_cast_to_int8(x, weight)
    assert torch.equal(values, jitgemm.rms_norm(x, weight))
    for found, expected in zip((codes, scales), jitgemm.per_token_cast_to_int8(values), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("amax", "scale"),
    [(1e-4, 0.0), (6 * 2.0**-10, 0.0), (6.1 * 2.0**-10, 2.0**-9), (6.0, 1.0), (2688.0, 448.0)]
    + [(a, 448.0) for a in (2700.0, 2784.0, 2800.0, 2880.0, 2976.0, 3000.0, 4000.0, 1e30)],
)  # fmt: skip
def test_nvfp4_scales(amax: float, scale: float) -> None:
    packed, scales = jitgemm.nvfp4_act_quant(group([amax, -amax, amax / 3], 16))
    assert scales.float().item() == scale
    codes = reference.unpack_nibbles(packed)[0, :3].tolist()
    expected = (
        [0.0, 0.0, 0.0] if scale == 0 else [min(amax / scale, 6.0), min(amax / scale, 6), min(amax / 3 / scale, 6)]
    )
    assert [code & 7 for code in codes] == [nearest(float(np.float32(x)), E2M1, "even") for x in expected]
    assert (codes[1] >> 3 == 1) == (scale > 0)


def test_nvfp4_scales_round_to_nearest_at_every_midpoint() -> None:
    middles = (np.array(E4M3[1:]) + np.array(E4M3[:-1])) / 2  # a / 6 is exact for a = 6 * middle
    amax = torch.from_numpy((6 * middles).astype(np.float32))
    x = torch.zeros(len(amax), 16)
    x[:, 0] = amax
    codes = jitgemm.nvfp4_act_quant(x)[1].view(torch.uint8)[:, 0]
    assert codes.tolist() == [nearest(float(m), E4M3, "even") for m in middles]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_group_and_nowhere_else(bad: float) -> None:
    x = torch.randn(2, 256)
    x[1, 130] = bad
    clean = x.clone()
    clean[1, 130] = 1.0
    for call, back in (
        (lambda y: jitgemm.act_quant(y), lambda c, s: c.float() * s.repeat_interleave(128, 1)),
        (lambda y: jitgemm.act_quant(y, scale_fmt="ue8m0"), lambda c, s: c.float() * s.repeat_interleave(128, 1)),
        (lambda y: jitgemm.int8_act_quant(y), lambda c, s: c.float() * s.repeat_interleave(128, 1)),
        (
            lambda y: jitgemm.per_token_cast_to_int8(y.view(4, 128)),
            lambda c, s: (c.float() * s).view(2, 256),
        ),
        (
            lambda y: jitgemm.fp4_act_quant(y),
            lambda c, s: reference.e2m1_to_float(reference.unpack_nibbles(c)) * s.float().repeat_interleave(32, 1),
        ),
        (
            lambda y: jitgemm.nvfp4_act_quant(y),
            lambda c, s: reference.e2m1_to_float(reference.unpack_nibbles(c)) * s.float().repeat_interleave(16, 1),
        ),
    ):
        values, others = back(*call(x)), back(*call(clean))
        assert not values[1, 130].isfinite()
        assert torch.equal(values[:, :128], others[:, :128]) and torch.equal(values[0], others[0])


def test_layouts_and_types_of_scales_hold_the_same_numbers() -> None:
    x = torch.randn(7, 640, dtype=BF16)
    codes, expected = jitgemm.act_quant(x, 128, "ue8m0")
    for layout, stride in (("row_major", (5, 1)), ("col_major", (1, 7)), ("mn_major_tma_aligned", (1, 8))):
        other, scales = jitgemm.act_quant(x, 128, "ue8m0", scale_layout=layout)
        assert torch.equal(other.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(scales, expected) and scales.stride() == stride
        exponents = jitgemm.act_quant(x, 128, "ue8m0", E8M0, scale_layout=layout)[1]
        assert exponents.shape == (7, 5) and torch.equal(exponents.view(torch.uint8), reference.ue8m0_codes(expected))
        words = jitgemm.act_quant(x, 128, "ue8m0", torch.int32, scale_layout=layout)[1]
        assert words.shape == (7, 2)
        assert torch.equal(words[:, 1], reference.ue8m0_codes(expected)[:, 4].int())
    plain = jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(expected)
    assert torch.equal(jitgemm.act_quant(x, 128, "ue8m0", torch.int32, scale_layout="mn_major_tma_aligned")[1], plain)


def test_in_place_is_the_round_trip() -> None:
    base = torch.randn(5, 512, dtype=BF16)
    x, before = base[:, :448], base.clone()
    codes, scales = jitgemm.act_quant(x, 64, "ue8m0")
    assert jitgemm.act_quant(x, 64, "ue8m0", inplace=True) is x
    assert torch.equal(x, (codes.float() * scales.repeat_interleave(64, 1)).to(BF16))
    assert torch.equal(base[:, 448:], before[:, 448:])
    y = before[:, :64].contiguous()
    jitgemm.fp4_act_quant(y, inplace=True)
    packed, exponents = jitgemm.fp4_act_quant(before[:, :64])
    spread = (exponents.view(torch.uint8).int() << 23).view(FP32).repeat_interleave(32, 1)
    assert torch.equal(y, (reference.e2m1_to_float(reference.unpack_nibbles(packed)) * spread).to(BF16))


# -- RMSNorm, SwiGLU, RoPE.


@pytest.mark.parametrize("n", [1, 7, 128, 1536, 7168])
def test_rms_norm_is_near_float64(n: int) -> None:
    x, weight = torch.randn(3, n, dtype=BF16), torch.randn(n, dtype=BF16)
    x[1] = 0
    exact = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    torch.testing.assert_close(jitgemm.rms_norm(x, weight).double(), exact, rtol=2**-8, atol=1e-30)
    torch.testing.assert_close(jitgemm.rms_norm(x.float(), weight).double(), exact, rtol=3e-6, atol=1e-30)
    assert not jitgemm.rms_norm(x, weight)[1].any()


def test_normalized_rows_are_what_is_quantized() -> None:
    x, weight = torch.randn(3, 384, dtype=BF16), torch.randn(384)
    y, codes, scales = jitgemm.rms_norm_act_quant(x, weight)
    assert torch.equal(y, jitgemm.rms_norm(x, weight))
    expected_codes, expected_scales = jitgemm.act_quant(y, scale_fmt="ue8m0")
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    assert torch.equal(scales, expected_scales)


def test_swiglu_values() -> None:
    gate = torch.tensor([0.0, 1.0, 20.0, -100.0, 3.0, math.nan, -math.inf])
    up = torch.tensor([5.0, 2.0, -30.0, 1.0, 40.0, 1.0, 1.0])
    x = torch.cat([gate, up])[None]
    result = jitgemm.swiglu(x, torch.tensor([0.5]), 10.0)[0]
    clamped = 10 / (1 + math.exp(-10))
    expected = [0, 0.5 * 2 / (1 + math.exp(-1)), 0.5 * clamped * -10, 0.0, 0.5 * 3 / (1 + math.exp(-3)) * 10]
    torch.testing.assert_close(result[:5], torch.tensor(expected), rtol=1e-6, atol=1e-40)
    assert result[5:].isnan().all()
    for off in (None, 0):
        torch.testing.assert_close(
            jitgemm.swiglu(x, limit=off)[0, 2].item(), -600 / (1 + math.exp(-20)), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("round_first", [False, True])
def test_swiglu_is_quantized_before_or_after_rounding(round_first: bool) -> None:
    x = torch.randn(6, 512, dtype=BF16) * 4
    values = reference.swiglu(x, None, 10.0)
    expected = jitgemm.act_quant(values.to(BF16) if round_first else values, 128, "ue8m0")
    for a, b in zip(jitgemm.swiglu_act_quant(x, limit=10.0, round_first=round_first), expected, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_yarn_of_the_specification() -> None:
    plain = 160000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    yarn = reference.rope_frequencies(64, 160000.0, 16.0).double()
    ramp = ((torch.arange(32, dtype=torch.float64) - 15) / 10).clamp(0, 1)  # low 15, high 25
    torch.testing.assert_close(yarn, plain * (1 - ramp) + plain / 16 * ramp, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        reference.rope_frequencies(64, 10000.0).double(),
        10000.0 ** (-torch.arange(32).double() / 32),
        rtol=1e-6,
        atol=0,
    )


def test_rope_turns_pairs_and_back() -> None:
    x = torch.randn(4, 2, 128)
    positions, table = torch.tensor([0, 1, 7, 2000]), jitgemm.rope_cos_sin(2001)
    y = jitgemm.head_norm_rope(x, positions, table, norm=False)
    assert torch.equal(y[..., :64], x[..., :64]) and torch.equal(y[0], x[0])
    frequencies = 10000.0 ** (-torch.arange(32).double() / 32)
    pairs = torch.view_as_complex(x[..., 64:].double().unflatten(-1, (32, 2)))
    turned = pairs * torch.polar(torch.ones(4, 1, 32).double(), positions[:, None, None] * frequencies)
    torch.testing.assert_close(y[..., 64:].double(), torch.view_as_real(turned).flatten(-2), rtol=0, atol=2e-3)
    back = jitgemm.head_norm_rope(y, positions, table, norm=False, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_a_position_that_the_table_lacks_is_nan() -> None:
    y = jitgemm.head_norm_rope(torch.ones(3, 1, 128), torch.tensor([-1, 5, 4]), jitgemm.rope_cos_sin(5))
    assert y[:2, :, 64:].isnan().all() and y[2].isfinite().all() and y[..., :64].isfinite().all()


def test_heads_are_normalized_alone_and_what_is_not_rotated_is_quantized() -> None:
    x, weight = torch.randn(3, 4, 512, dtype=BF16), torch.randn(512, dtype=BF16)
    positions, table = torch.arange(3), jitgemm.rope_cos_sin(3)
    normed = jitgemm.head_norm_rope(x, positions, table, weight)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    torch.testing.assert_close(normed[..., :448].double(), exact[..., :448], rtol=2**-8, atol=0)
    y = jitgemm.head_norm_rope(x, positions, table, weight, nope_block_size=64)
    assert torch.equal(y[..., 448:], normed[..., 448:])
    nope = normed[..., :448].reshape(-1, 448).contiguous()
    assert torch.equal(y[..., :448].reshape(-1, 448), jitgemm.act_quant(nope, 64, "ue8m0", inplace=True))
    codes, scales = jitgemm.head_norm_rope_act_quant(x, positions, table, weight)
    expected = jitgemm.act_quant(normed.flatten(1), 128, "ue8m0")
    assert torch.equal(codes.view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(scales, expected[1])


# -- Arguments.

X = torch.ones(4, 256, dtype=BF16)
HEADS, POSITIONS, TABLE = torch.ones(4, 2, 128, dtype=BF16), torch.arange(4), torch.ones(8, 64)


def stage(**other: Any) -> None:
    arguments = {
        "x": X, "topk_ids": torch.zeros(4, 6, dtype=torch.int64), "topk_weights": torch.zeros(4, 6),
        "x_fp4": torch.zeros(4, 128, dtype=torch.uint8), "x_sf": torch.zeros(4, 4, dtype=torch.int32),
        "topk_ids_out": torch.zeros(4, 6, dtype=torch.int64), "topk_weights_out": torch.zeros(4, 6),
    }  # fmt: skip
    jitgemm.stage_nvfp4(**{**arguments, **other})


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: jitgemm.act_quant(None), "x is NoneType; accepted is a torch.Tensor"),
    (lambda: jitgemm.act_quant(X.double()), "x has dtype torch.float64; accepted is torch.bfloat16"),
    (lambda: jitgemm.act_quant(X[:, :100]), "100 columns are no multiple of 128"),
    (lambda: jitgemm.act_quant(X, 48), "block_size is 48; accepted are 16, 32, 64, 128"),
    (lambda: jitgemm.act_quant(X, scale_fmt="e8m0"), "scale_fmt is 'e8m0'; accepted are None and 'ue8m0'"),
    (lambda: jitgemm.act_quant(X, scale_dtype=torch.int32), "scale_dtype is torch.int32; accepted are torch.float32"),
    (lambda: jitgemm.act_quant(X, scale_layout="tma"), "scale_layout is 'tma'; accepted are row_major"),
    (lambda: jitgemm.act_quant(X.view(2, 2, 256), scale_layout="col_major"), "x has 3 dimensions"),
    (lambda: jitgemm.act_quant(X.t(), 16, inplace=True), "no multiple of 16"),
    (lambda: jitgemm.act_quant(torch.ones(128, 4).t(), inplace=True), "x has strides .* accepted in place"),
    (lambda: jitgemm.act_quant(torch.ones(1, 128, requires_grad=True), inplace=True), "x requires a gradient"),
    (lambda: jitgemm.act_quant(X.to_sparse()), "x has layout torch.sparse_coo"),
    (lambda: jitgemm.int8_act_quant(X, 0), "block_size is 0"),
    (lambda: jitgemm.per_token_cast_to_int8(X[:, :0]), "x has 0 columns; accepted are 1 to 32768"),
    (lambda: jitgemm.per_token_cast_to_int8(torch.ones(1, 32769)), "x has 32769 columns; accepted are 1 to 32768"),
    (lambda: jitgemm.per_token_cast_to_int8(X.int()), "x has dtype torch.int32"),
    (lambda: jitgemm.rms_norm_cast_to_int8(X, torch.ones(255)), r"weight has shape \(255,\); accepted is \(256,\)"),
    (lambda: jitgemm.fp4_act_quant(X, ties="up"), "ties is 'up'; accepted are even, away, zero"),
    (lambda: jitgemm.fp4_act_quant(X, scale_dtype=FP32), "scale_dtype is torch.float32"),
    (lambda: jitgemm.nvfp4_act_quant(X[:, :8]), "8 columns are no multiple of 16"),
    (lambda: stage(x=torch.ones(4, 64, dtype=BF16)), "n a multiple of 128"),
    (lambda: stage(topk_ids=torch.zeros(4, 6)), "topk_ids has dtype torch.float32; accepted is torch.int32"),
    (lambda: stage(topk_weights=torch.zeros(4, 5)), r"topk_weights has shape \(4, 5\); accepted is \(4, 6\)"),
    (lambda: stage(x_sf=torch.zeros(4, 2, dtype=torch.int32)), r"x_sf has shape \(4, 2\); accepted is \(4, 4\)"),
    (lambda: stage(x_fp4=torch.zeros(128, 4, dtype=torch.uint8).t()), "x_fp4 has strides"),
    (lambda: jitgemm.swiglu(torch.ones(4, 3)), r"x has shape \(4, 3\); accepted is \[m, 2n\]"),
    (lambda: jitgemm.swiglu(X, torch.ones(3)), r"weights has shape \(3,\); accepted is \(4,\)"),
    (lambda: jitgemm.swiglu(X, torch.ones(4, dtype=BF16)), "weights has dtype torch.bfloat16"),
    (lambda: jitgemm.swiglu(X, torch.ones(8)[::2]), "weights has strides"),
    (lambda: jitgemm.swiglu(X, limit=-1), "limit is -1; accepted is a positive number"),
    (lambda: jitgemm.swiglu_act_quant(X[:, :64]), "32 columns are no multiple of 128"),
    (lambda: jitgemm.rms_norm(X, torch.ones(255)), r"weight has shape \(255,\); accepted is \(256,\)"),
    (lambda: jitgemm.rms_norm(X, torch.ones(256), math.nan), "eps is nan"),
    (lambda: jitgemm.rms_norm(torch.ones(1, 40000), torch.ones(40000)), "x has 40000 columns; accepted are 1 to 32768"),
    (lambda: jitgemm.head_norm_rope(X, POSITIONS, TABLE), r"accepted is \[tokens, heads, n\]"),
    (lambda: jitgemm.head_norm_rope(HEADS, POSITIONS[:3], TABLE), r"positions has shape \(3,\)"),
    (lambda: jitgemm.head_norm_rope(HEADS, POSITIONS.float(), TABLE), "positions has dtype torch.float32"),
    (lambda: jitgemm.head_norm_rope(HEADS, POSITIONS, TABLE.to(BF16)), "cos_sin has dtype torch.bfloat16"),
    (lambda: jitgemm.head_norm_rope(HEADS, POSITIONS, torch.ones(8, 136)), r"cos_sin has shape \(8, 136\)"),
    (lambda: jitgemm.head_norm_rope(HEADS, POSITIONS, TABLE, torch.ones(128), norm=False), "weight is given with norm"),
    (lambda: jitgemm.head_norm_rope(HEADS, POSITIONS, torch.ones(8, 56), nope_block_size=64), "divisors of 72"),
    (lambda: jitgemm.head_norm_rope_act_quant(HEADS, POSITIONS, TABLE, scale_dtype=torch.int32), "a multiple of 512"),
    (lambda: jitgemm.cast_back_from_fp8(X, torch.ones(4, 2)), "x has dtype torch.bfloat16; accepted is torch.float8"),
    (lambda: jitgemm.cast_back_from_fp8(jitgemm.act_quant(X)[0], torch.ones(4, 3)), r"groups of .* are \(4, 2\)"),
    (lambda: jitgemm.cast_back_from_fp8(jitgemm.act_quant(X)[0], torch.ones(4, 2), (1, 0)), r"group is \(1, 0\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        call()


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "act_quant": lambda x: jitgemm.act_quant(x, 128, "ue8m0", torch.int32),
    "int8_act_quant": lambda x: jitgemm.int8_act_quant(x),
    "per_token_cast_to_int8": lambda x: jitgemm.per_token_cast_to_int8(x),
    "rms_norm_cast_to_int8": lambda x: jitgemm.rms_norm_cast_to_int8(x, torch.ones(x.shape[1])),
    "fp4_act_quant": lambda x: jitgemm.fp4_act_quant(x),
    "nvfp4_act_quant": lambda x: jitgemm.nvfp4_act_quant(x),
    "swiglu": lambda x: jitgemm.swiglu(x, None, 10.0),
    "swiglu_act_quant": lambda x: jitgemm.swiglu_act_quant(x, scale_layout="mn_major_tma_aligned"),
    "rms_norm": lambda x: jitgemm.rms_norm(x, torch.ones(x.shape[1])),
    "rms_norm_act_quant": lambda x: jitgemm.rms_norm_act_quant(x, torch.ones(x.shape[1])),
    "head_norm_rope": lambda x: jitgemm.head_norm_rope(
        x.view(-1, 2, 128), torch.arange(x.shape[0]), torch.ones(9, 64), nope_block_size=64
    ),
    "head_norm_rope_act_quant": lambda x: jitgemm.head_norm_rope_act_quant(
        x.view(-1, 2, 128), torch.arange(x.shape[0]), torch.ones(9, 64), norm=False, inverse=True
    ),
    "per_token_cast_to_fp8": lambda x: jitgemm.per_token_cast_to_fp8(x),
    "cast_back_from_fp8": lambda x: jitgemm.cast_back_from_fp8(x.to(torch.float8_e4m3fn), torch.ones(x.shape[0], 2)),
}


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_show_shape_dtype_and_strides(name: str) -> None:
    for m in (5, 0):
        real = as_tuple(CALLS[name](torch.randn(m, 256, dtype=BF16)))
        with FakeTensorMode():
            fake = as_tuple(CALLS[name](torch.randn(m, 256, dtype=BF16)))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("name", CALLS)
def test_functions_compile_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()  # or the next of these is one recompile too many of one function
    compiled = torch.compile(lambda x: CALLS[name](x * 2), backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 256, dtype=BF16)
    for a, b in zip(as_tuple(compiled(x)), as_tuple(CALLS[name](x * 2)), strict=True):
        a, b = (t.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for t in (a, b))
        assert torch.equal(a, b)


def test_operators_pass_opcheck() -> None:
    x = torch.randn(5, 256, dtype=BF16)
    ops = torch.ops.jitgemm
    fp8 = (128, "ue8m0", torch.float32, "mn_major_tma_aligned")
    rope = (HEADS, POSITIONS, TABLE, None, True, False, 1e-6)
    for operator, arguments in (
        (ops.act_quant, (x, *fp8)),
        (ops.act_quant_, (x.clone(), 64, False)),
        (ops.fp4_act_quant_, (x.clone(), 32, "even")),
        (ops.int8_act_quant, (x, 128, "col_major")),
        (ops.per_token_cast_to_int8, (x,)),
        (ops.rms_norm_cast_to_int8, (x, torch.ones(256), 1e-6)),
        (ops.swiglu_act_quant, (x, None, 10.0, *fp8, False)),
        (ops.rms_norm_act_quant, (x, torch.ones(256), 1e-6, *fp8)),
        (ops.head_norm_rope, (*rope, 64)),
        (ops.head_norm_rope_act_quant, (*rope, *fp8)),
        (
            ops.stage_nvfp4,
            (
                X, torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4, 6), torch.zeros(4, 128, dtype=torch.uint8),
                torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4, 6), "even",
            ),
        ),
    ):  # fmt: skip
        torch.library.opcheck(operator.default, arguments)


def test_in_place_functions_compile() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        jitgemm.act_quant(y, 64, "ue8m0", inplace=True)
        return jitgemm.fp4_act_quant(y, inplace=True)

    x = torch.randn(5, 256, dtype=BF16)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), function(x))


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_differentiable(name: str) -> None:
    results = as_tuple(CALLS[name](torch.randn(4, 256, requires_grad=True)))
    assert not any(result.requires_grad for result in results)


def test_rows_of_views() -> None:
    x = torch.zeros(4, 6, 32)
    assert rows_of(x) == (24, 32)
    assert rows_of(x[..., :16]) == (24, 32)
    assert rows_of(x[:, :3]) is None
    assert rows_of(x[:, :1]) == (4, 192)
    assert rows_of(x[1, 2]) == (1, 32)
    assert in_rows(x[:, :3]).is_contiguous() and in_rows(x[..., :16]) is not None


# -- Problems and configs.

PROBLEMS = [
    RowwiseProblem("cast", n, dtype=dtype, format=format, scales=scales, group=group)
    for n in (8, 128, 200, 4096, 7168, 16384)
    for dtype in ("bf16", "fp32")
    for format, scales, group in (("e4m3", "ue8m0", 128), ("e2m1", "ue4m3", 16))
] + [
    RowwiseProblem(op, n, dtype=dtype, norm=norm)
    for op, norm in (("rms_norm", "bf16"), ("rope", "plain"), ("rope", "none"), ("swiglu", "none"))
    for n in (8, 128, 512, 1536, 4096, 7168, 32768)
    for dtype in ("bf16", "fp32")
]  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p} {p.n}")
def test_configs_cover_the_row(problem: RowwiseProblem) -> None:
    device = PRESETS["h200"]
    for config in heuristics.enumerate_configs(problem):
        threads = config.threads_per_row
        assert threads & (threads - 1) == 0 and 8 <= threads <= 1024
        assert 32 <= threads * config.rows <= 1024 and 1 <= config.chunks <= 8
        if problem.norm == "none":
            assert threads <= 32  # a tile's columns need no other warp
        else:
            assert config.columns >= rowwise.scale_columns(problem)
        assert config.width == 8 or problem.n % config.width == 0
        if problem.group:
            assert threads * config.width >= problem.group >= config.width
    problems = [RowwiseProblem(**{**vars(problem), "m": m}) for m in (1, 64, 4096, 65536)]
    chosen = {heuristics.choose_config(with_m, device) for with_m in problems}
    assert chosen <= set(heuristics.enumerate_configs(problem))
    assert len(enumerate_specs(problem, device)) <= 2


def test_problems_survive_a_shapes_file() -> None:
    for problem in PROBLEMS:
        assert RowwiseProblem.from_dict(json.loads(json.dumps(problem.to_dict()))) == problem
    tile = TileProblem("per_block", "pow2", 128, 128)
    assert TileProblem.from_dict(json.loads(json.dumps(tile.to_dict()))) == tile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "sort"}, "op is 'sort'; accepted are cast"),
        ({"n": 0}, "n is 0; accepted is an integer from 1"),
        ({"group": 48}, "group is 48"),
        ({"scales": "ue4m3"}, "scales is 'ue4m3'; e4m3 accepts fp32"),
        ({"dtype": "fp64"}, "dtype is 'fp64'"),
        ({"aligned": 1}, "aligned is 1; accepted is a boolean"),
        ({"norm": "bf16", "n": 40000}, "n is 40000; cast accepts at most 32768 columns"),
        ({"m": -1}, "m is -1"),
        ({"width": 3}, "unknown field 'width'"),
        ({"kind": "gemm"}, "kind is 'gemm'; accepted is rowwise"),
    ],
)
def test_bad_problems(change: dict[str, Any], message: str) -> None:
    good = {"kind": "rowwise", "op": "cast", "n": 4096, "format": "e4m3", "scales": "pow2", "group": 128}
    with pytest.raises(ProblemError, match=message):
        RowwiseProblem.from_dict({**good, **change})
    with pytest.raises(ProblemError, match="field 'n' is missing"):
        RowwiseProblem.from_dict({"kind": "rowwise", "op": "cast"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "sort"}, "op is 'sort'"),
        ({"scales": "fp32"}, "scales is 'fp32'; per_block accepts"),
        ({"group_columns": 64}, "groups are 128x64; per_block accepts 16x16, 32x32, 64x64, 128x128"),
        ({"group_rows": -1}, "group_rows is -1"),
        ({"size": 1}, "unknown field 'size'"),
    ],
)
def test_bad_tile_problems(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        TileProblem.from_dict({**TileProblem("per_block", "pow2", 128, 128).to_dict(), **change})


def test_calls_are_recorded(tmp_path: Path) -> None:
    file = tmp_path / "shapes.jsonl"
    with settings.override(record=file):
        jitgemm.act_quant(X)
        jitgemm.swiglu_act_quant(X, limit=10.0)
        jitgemm.rms_norm_act_quant(X, torch.ones(256, dtype=BF16))
        jitgemm.head_norm_rope(HEADS, POSITIONS, TABLE, nope_block_size=64)
        jitgemm.per_block_cast_to_fp8(X)
        stage()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["op"] for line in lines] == ["cast", "swiglu", "rms_norm", "rope", "per_block", "cast"]
    problems = [{rowwise.KIND: RowwiseProblem, tiles.KIND: TileProblem}[x["kind"]].from_dict(x) for x in lines]
    assert problems[0] == RowwiseProblem("cast", 256, format="e4m3", scales="fp32", group=128)
    assert problems[2].values and problems[2].norm == "bf16" and problems[3].round_trip and problems[5].stage
    for problem in problems:
        assert enumerate_specs(problem, PRESETS["h200"])
