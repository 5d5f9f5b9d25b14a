"""The FP8 casts, against E4M3's definition and a brute-force oracle in numpy."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

import jitgemm
from jitgemm.errors import ProblemError
from jitgemm.reference.quantize import (
    align,
    cast_back_from_fp8,
    ceil_div,
    ceil_to_ue8m0,
    dequantize,
    pack_ue8m0,
    unpack_ue8m0,
)

Cast = Callable[..., tuple[Tensor, Tensor]]

CASTS: dict[str, tuple[Cast, Callable[[int], tuple[int, int]]]] = {
    "per_token": (jitgemm.per_token_cast_to_fp8, lambda gran: (1, gran)),
    "per_channel": (jitgemm.per_channel_cast_to_fp8, lambda gran: (gran, 1)),
    "per_block": (jitgemm.per_block_cast_to_fp8, lambda gran: (gran, gran)),
}
OPERATORS = {name: getattr(torch.ops.jitgemm, f"{name}_cast_to_fp8").default for name in CASTS}


def e4m3_value(code: int) -> float:
    """The definition: 1 sign, 4 exponent (bias 7) and 3 mantissa bits; all ones is NaN, there is no Inf."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


MAGNITUDES = np.array([e4m3_value(code) for code in range(127)])  # of codes 0 to 126, ascending


def nearest_code(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to the even code, by comparing distances; finite values only."""
    magnitude = np.abs(values.astype(np.float64))
    above = np.searchsorted(MAGNITUDES, magnitude).clip(1, 126)
    below = above - 1
    to_below, to_above = magnitude - MAGNITUDES[below], MAGNITUDES[above] - magnitude
    code = np.where(to_below < to_above, below, above)
    code = np.where(to_below == to_above, np.where(below % 2 == 0, below, above), code)
    return np.where(np.signbit(values), code | 0x80, code).astype(np.uint8)


def oracle(x: Tensor, group: tuple[int, int], use_ue8m0: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales, one group at a time."""
    values = x.float().numpy()
    rows, columns = values.shape
    codes = np.zeros((rows, columns), np.uint8)
    scales = np.zeros((ceil_div(rows, group[0]), ceil_div(columns, group[1])), np.float32)
    for i, j in np.ndindex(*scales.shape):
        where = (slice(i * group[0], (i + 1) * group[0]), slice(j * group[1], (j + 1) * group[1]))
        amax = np.abs(values[where]).max(initial=np.float32(1e-4))
        scale = np.float32(amax) * (np.float32(1) / np.float32(448))
        if use_ue8m0:
            mantissa, exponent = np.frexp(scale)  # mantissa in [0.5, 1)
            scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
        codes[where] = nearest_code(values[where] * (np.float32(1) / scale))
        scales[i, j] = scale
    return codes, scales


def assert_same(result: tuple[Tensor, Tensor], expected: tuple[np.ndarray, np.ndarray]) -> None:
    values, sf = result
    assert values.dtype == torch.float8_e4m3fn and values.is_contiguous()
    assert sf.dtype == torch.float32 and sf.is_contiguous()
    np.testing.assert_array_equal(sf.numpy(), expected[1])
    np.testing.assert_array_equal(values.view(torch.uint8).numpy(), expected[0])


def test_every_e4m3_code_dequantizes_to_its_definition() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    expected = torch.tensor([e4m3_value(code) for code in range(256)], dtype=torch.float64).view(2, 128)
    one = torch.ones(2, 1)
    torch.testing.assert_close(
        dequantize(codes, one, (1, 128), torch.float64), expected, rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(cast_back_from_fp8(codes, one), expected.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CASTS)
def test_every_representable_value_is_kept(name: str) -> None:
    cast, _ = CASTS[name]
    codes = torch.tensor([*range(127), *range(128, 255)], dtype=torch.uint8)
    x = codes.view(torch.float8_e4m3fn).float().reshape(2, 127)
    x = torch.cat([x, torch.full((2, 1), 448.0)], dim=1)  # makes the scale 1
    if name == "per_channel":
        x = x.T
    values, sf = cast(x)
    assert (sf == 1).all()
    torch.testing.assert_close(values.float(), x, rtol=0, atol=0)
    assert (torch.signbit(values.float()) == torch.signbit(x)).all()  # -0 too


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_at_and_around_every_midpoint(sign: float) -> None:
    middle = ((MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2).astype(np.float32)  # exact, subnormals included
    below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1000))
    even = [code if code % 2 == 0 else code + 1 for code in range(126)]
    for x, expected in [(below, range(126)), (middle, even), (above, range(1, 127))]:
        row = torch.from_numpy(np.concatenate([sign * x, [448, 0]]).astype(np.float32))[None]
        values, sf = jitgemm.per_token_cast_to_fp8(row)
        assert sf.item() == 1
        codes = values.view(torch.uint8)[0, :126]
        assert codes.tolist() == [code | (0x80 if sign < 0 else 0) for code in expected]


def test_underflow_goes_to_signed_zero() -> None:
    x = torch.tensor([[448.0, 2.0**-10, -(2.0**-10), 2.0**-11, -1e-30] + [0.0] * 123])
    values, _ = jitgemm.per_token_cast_to_fp8(x)
    assert values.view(torch.uint8)[0, :5].tolist() == [0x7E, 0x00, 0x80, 0x00, 0x80]


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("name", CASTS)
def test_largest_element_never_leaves_the_format(name: str, use_ue8m0: bool) -> None:
    # amax * (1 / (amax / 448)) may exceed 448 by its rounding errors; it must still become 448.
    cast, _ = CASTS[name]
    amax = torch.cat([torch.rand(4000, dtype=torch.float64).mul(76).sub(38).exp2().float(), torch.tensor([3.4028e38])])
    x = torch.zeros(16, amax.numel()) if name == "per_channel" else torch.zeros(amax.numel(), 16)
    x = x + (amax if name == "per_channel" else amax[:, None])
    values, _ = cast(x, use_ue8m0, 16)
    assert values.float().isfinite().all()
    if not use_ue8m0:
        exact = values.float() if name == "per_token" else values.float().T if name == "per_channel" else None
        assert exact is None or (exact[amax >= 1e-4] == 448).all()


@given(
    name=st.sampled_from(sorted(CASTS)),
    shape=st.tuples(st.integers(0, 70), st.integers(1, 300)),
    gran=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    use_ue8m0=st.booleans(),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=120, deadline=None)
def test_casts_equal_the_oracle(
    name: str, shape: tuple[int, int], gran: int, dtype: torch.dtype, use_ue8m0: bool, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.randn(shape, generator=generator).mul(spread).exp()
    x = (torch.randn(shape, generator=generator) * magnitude).clamp(-60000, 60000).to(dtype)
    x[torch.rand(shape, generator=generator) < 0.1] = 0
    cast, group = CASTS[name]
    assert_same(cast(x, use_ue8m0, gran), oracle(x, group(gran), use_ue8m0))


@pytest.mark.parametrize("name", CASTS)
def test_strided_inputs_are_read_in_place_of_copies(name: str) -> None:
    cast, group = CASTS[name]
    base = torch.randn(300, 400, dtype=torch.bfloat16)
    for x in (base.T, base[3:, 5:], base[::2, ::3], base[:1].expand(150, 400), base[0:0]):
        before = x.clone()
        assert_same(cast(x), oracle(x, group(128), False))
        assert torch.equal(x, before)


def test_zero_rows_get_the_smallest_scale() -> None:
    values, sf = jitgemm.per_token_cast_to_fp8(torch.zeros(3, 256, dtype=torch.bfloat16))
    assert (sf == float(np.float32(1e-4) * (np.float32(1) / np.float32(448)))).all()
    assert (values.view(torch.uint8) == 0).all()


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("shape", [(0, 256), (0, 100), (200, 0), (0, 0)])
def test_empty_inputs(name: str, shape: tuple[int, int]) -> None:
    cast, group = CASTS[name]
    values, sf = cast(torch.empty(shape))
    assert values.shape == shape
    assert sf.shape == tuple(ceil_div(extent, size) for extent, size in zip(shape, group(128), strict=True))


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_casting_back_is_within_half_a_step(name: str, use_ue8m0: bool) -> None:
    cast, group = CASTS[name]
    x = torch.randn(200, 333) * torch.randn(200, 333).exp()
    values, sf = cast(x, use_ue8m0)
    back = cast_back_from_fp8(values, sf, group(128))
    scale = dequantize(torch.ones_like(x), sf, group(128))
    # Half a step of a normal value is 2^-4 of it, of a subnormal 2^-10 of the scale; 1e-6 for the fp32 products.
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, scale / 1024) * (1 + 1e-6)).all()


def test_ceil_to_ue8m0_of_special_values() -> None:
    tiny = 2.0**-126
    just_above_1 = float(np.nextafter(np.float32(1), np.float32(2)))
    cases = {
        0.0: tiny,
        1e-45: tiny,
        tiny: tiny,
        tiny * 1.5: 2 * tiny,
        0.75: 1.0,
        1.0: 1.0,
        just_above_1: 2.0,
        -3.0: 4.0,
    }
    cases |= dict.fromkeys([2.0**127, 1.5 * 2.0**127, float("inf"), float("nan")], 2.0**127)
    assert ceil_to_ue8m0(torch.tensor(list(cases))).tolist() == list(cases.values())


@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_ceil_to_ue8m0_is_the_least_power_of_two_not_below(x: float) -> None:
    rounded = ceil_to_ue8m0(torch.tensor([x])).item()
    mantissa, _ = np.frexp(rounded)
    assert mantissa == 0.5 and rounded / 2 < x <= rounded


@pytest.mark.parametrize(("groups", "words"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2)])
def test_packed_scales_are_the_exponents_in_order(groups: int, words: int) -> None:
    x = torch.randn(7, groups * 32 - 3)
    values, sf = jitgemm.per_token_cast_to_fp8(x, True, 32)
    packed_values, packed = jitgemm.per_token_cast_to_fp8(x, True, 32, True)
    assert torch.equal(values.view(torch.uint8), packed_values.view(torch.uint8))
    assert packed.dtype == torch.int32 and packed.shape == (7, words) and packed.is_contiguous()
    for row in range(7):
        exponents = [127 + int(np.log2(value)) for value in sf[row].tolist()]
        exponents += [127] * (words * 4 - groups)
        assert packed[row].numpy().tobytes() == bytes(exponents)
    assert torch.equal(unpack_ue8m0(packed)[:, :groups], sf)
    assert torch.equal(
        cast_back_from_fp8(packed_values, packed, (1, 32), use_packed_ue8m0=True),
        cast_back_from_fp8(values, sf, (1, 32)),
    )


def test_pack_reverses_for_every_exponent() -> None:
    sf = torch.tensor([2.0**exponent for exponent in range(-126, 128)] + [1.0, 1.0]).view(64, 4)
    assert torch.equal(unpack_ue8m0(pack_ue8m0(sf, 0)), sf)
    assert torch.equal(unpack_ue8m0(pack_ue8m0(sf.T, 0)), sf.T)


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_poison_their_group_only(bad: float, use_ue8m0: bool) -> None:
    x = torch.randn(3, 384)
    clean = cast_back_from_fp8(*jitgemm.per_token_cast_to_fp8(x, use_ue8m0))
    x[1, 200] = bad
    values, sf = jitgemm.per_token_cast_to_fp8(x, use_ue8m0)
    back = cast_back_from_fp8(values, sf)
    assert values.float()[1, 200].isnan()
    assert back[1, 200].isnan()
    if use_ue8m0:
        assert sf[1, 1] == 2.0**127
        assert back[1, 128:256].isnan().sum() == 1
    else:
        assert not sf[1, 1].isfinite()
        assert back[1, 128:256].isnan().all()
    back[1, 128:256] = clean[1, 128:256]
    assert torch.equal(back, clean)


def test_dequantize_is_exact_in_float64() -> None:
    values = torch.tensor([[240.0, -0.013671875]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1 + 2.0**-23]])
    assert dequantize(values, scale, (1, 128), torch.float64).tolist() == [
        [240 * (1 + 2.0**-23), values.double()[0, 1].item() * (1 + 2.0**-23)]
    ]


def test_dequantize_refuses_other_scale_shapes_and_keeps_its_input() -> None:
    x = torch.ones(4, 200)
    assert (dequantize(x, torch.full((4, 2), 3.0), (1, 128)) == 3).all()
    assert (x == 1).all()
    with pytest.raises(ValueError, match=r"scales have shape \(4, 1\).*are \(4, 2\)"):
        dequantize(x, torch.ones(4, 1), (1, 128))


def test_integer_helpers() -> None:
    assert [ceil_div(x, 4) for x in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [align(x, 4) for x in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_signatures_follow_the_peer() -> None:
    names = ["x", "use_ue8m0", "gran_k", "use_packed_ue8m0"]
    assert list(inspect.signature(jitgemm.per_token_cast_to_fp8).parameters) == names
    assert list(inspect.signature(jitgemm.per_channel_cast_to_fp8).parameters) == names[:3]
    assert list(inspect.signature(jitgemm.per_block_cast_to_fp8).parameters) == names[:3]


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize(
    ("x", "gran", "message"),
    [
        (np.ones((2, 128), np.float32), 128, "x is ndarray; accepted is a torch.Tensor"),
        (None, 128, "x is NoneType"),
        (torch.ones(2, 128, dtype=torch.float64), 128, "x has dtype torch.float64; accepted is torch.bfloat16"),
        (torch.ones(2, 128, dtype=torch.int32), 128, "x has dtype torch.int32"),
        (torch.ones(128), 128, "x has 1 dimensions"),
        (torch.ones(1, 2, 128), 128, "x has 3 dimensions"),
        (torch.ones(2, 128).to_sparse(), 128, "layout torch.sparse_coo"),
        (torch.ones(2, 128), 0, "gran_k is 0; accepted is a positive multiple of 16"),
        (torch.ones(2, 128), -16, "gran_k is -16"),
        (torch.ones(2, 128), 24, "gran_k is 24"),
        (torch.ones(2, 128), 128.0, "gran_k is 128.0"),
    ],
)
def test_bad_arguments(name: str, x: object, gran: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        CASTS[name][0](x, False, gran)


def test_packing_needs_powers_of_two() -> None:
    with pytest.raises(ProblemError, match="use_packed_ue8m0 is True with use_ue8m0=False"):
        jitgemm.per_token_cast_to_fp8(torch.ones(2, 128), False, 128, True)


@pytest.mark.parametrize("name", CASTS)
def test_casts_are_not_differentiable(name: str) -> None:
    values, sf = CASTS[name][0](torch.randn(4, 128, requires_grad=True))
    assert not values.requires_grad and not sf.requires_grad


OPERATOR_ARGUMENTS = [
    pytest.param(name, x, arguments, id=f"{name}-{tuple(x.shape)}-{arguments}")
    for name in CASTS
    for x, arguments in [
        (torch.randn(5, 300, dtype=torch.bfloat16), (False, 128)),
        (torch.randn(300, 64).T, (True, 16)),
        (torch.randn(0, 128), (True, 32)),
    ]
]


@pytest.mark.parametrize(("name", "x", "arguments"), OPERATOR_ARGUMENTS)
def test_operators_pass_opcheck(name: str, x: Tensor, arguments: tuple[bool, int]) -> None:
    for extra in [(False,), (arguments[0],)] if name == "per_token" else [()]:
        torch.library.opcheck(OPERATORS[name], (x, *arguments, *extra))


@pytest.mark.parametrize("name", CASTS)
def test_operators_check_their_arguments(name: str) -> None:
    extra = (False,) if name == "per_token" else ()
    with pytest.raises(ProblemError, match="gran_k is 24"):
        OPERATORS[name](torch.ones(2, 128), False, 24, *extra)
    with FakeTensorMode(), pytest.raises(ProblemError, match="gran_k is 24"):
        OPERATORS[name](torch.ones(2, 128), False, 24, *extra)


@pytest.mark.parametrize("dynamic", [False, True])
def test_casts_compile_without_graph_breaks(dynamic: bool) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        x = x * 2
        packed = jitgemm.per_token_cast_to_fp8(x, True, 32, True)
        block = jitgemm.per_block_cast_to_fp8(x=x, gran_k=64)
        channel = jitgemm.per_channel_cast_to_fp8(x)
        return *jitgemm.per_token_cast_to_fp8(x), *packed, *block, *channel

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (40, 56):
        x = torch.randn(rows, 200, requires_grad=True)
        for actual, expected in zip(compiled(x), function(x), strict=True):
            assert actual.dtype == expected.dtype and not actual.requires_grad
            assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("name", CASTS)
def test_fake_tensors_show_shape_dtype_and_strides(name: str) -> None:
    cast, _ = CASTS[name]
    real = cast(torch.randn(300, 200), True)
    with FakeTensorMode() as mode:
        fake = cast(torch.randn(300, 200), True)
        converted = cast(mode.from_tensor(torch.randn(300, 200)), True)
    for a, b, c in zip(real, fake, converted, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) == (c.shape, c.dtype, c.stride())
