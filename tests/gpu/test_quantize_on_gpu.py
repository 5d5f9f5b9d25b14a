"""The casts on CUDA tensors: the definition, element by element, and what CPU tensors get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jitgemm
from benchmarks.operands import same_bits
from jitgemm.reference import quantize as reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda", 0)
# cast, and the group that shares a scale for a granularity
CASTS: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[int, int]]]] = {
    "per_token": (jitgemm.per_token_cast_to_fp8, lambda gran: (1, gran)),
    "per_channel": (jitgemm.per_channel_cast_to_fp8, lambda gran: (gran, 1)),
    "per_block": (jitgemm.per_block_cast_to_fp8, lambda gran: (gran, gran)),
}
SHAPES = [(1, 1), (1, 7168), (5, 200), (128, 128), (129, 130), (300, 1000)]


def values(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes over many binades, zeros and whole zero groups among them."""
    generator = torch.Generator(DEVICE).manual_seed(m + n)
    x = torch.randn((m, n), device=DEVICE, generator=generator)
    x *= torch.randint(-8, 9, (m, n), device=DEVICE, generator=generator).float().exp2()
    x[torch.rand((m, n), device=DEVICE, generator=generator) < 0.1] = 0
    x[: m // 2, : n // 3] *= 1e-6
    return x.to(dtype)


def spread(sf: Tensor, group: tuple[int, int], shape: torch.Size) -> Tensor:
    """Each element's scale."""
    wide = sf.repeat_interleave(group[0], 0).repeat_interleave(group[1], 1)
    return wide[: shape[0], : shape[1]]


def group_amax(x: Tensor, group: tuple[int, int]) -> Tensor:
    rows, columns = (-(-size // step) for size, step in zip(x.shape, group, strict=True))
    padded = torch.zeros(rows * group[0], columns * group[1])
    padded[: x.shape[0], : x.shape[1]] = x.abs().float()
    return padded.view(rows, group[0], columns, group[1]).amax(dim=(1, 3))


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASTS)
def test_casts_follow_their_definition(name: str, shape: tuple[int, int], dtype: torch.dtype, use_ue8m0: bool) -> None:
    cast, group_of = CASTS[name]
    for gran in (128, 32):
        x = values(*shape, dtype)
        y, sf = cast(x, use_ue8m0, gran)
        assert (y.shape, y.dtype, y.device) == (x.shape, torch.float8_e4m3fn, x.device)
        assert sf.dtype == torch.float32
        y, sf, x = y.cpu(), sf.cpu(), x.cpu()
        exact = group_amax(x, group_of(gran)).clamp(min=reference.SMALLEST_AMAX).double() / reference.E4M3_MAX
        assert sf.shape == exact.shape
        if use_ue8m0:
            assert bool((sf.view(torch.int32) & 0x7FFFFF == 0).all())
            assert bool((sf.double() >= exact * (1 - 2**-22)).all())
            assert bool((sf.double() < exact * 2 * (1 + 2**-22)).all())
        else:  # torch divides by a constant through its fp32 reciprocal on a GPU
            assert bool(((sf.double() - exact).abs() <= exact * 2**-22).all())
        scaled = x.float() * spread(1.0 / sf, group_of(gran), x.shape)
        assert same_bits(y, scaled.to(torch.float8_e4m3fn))


@pytest.mark.parametrize("name", CASTS)
def test_strided_tensors(name: str) -> None:
    cast, _ = CASTS[name]
    base = values(200, 600, torch.bfloat16)
    for view in (base.t(), base[::2, 3:], base[:, ::3], base[5:6].expand(9, 600)):
        for actual, expected in zip(cast(view), cast(view.contiguous()), strict=True):
            assert same_bits(actual, expected)


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_nan_and_inf_as_on_the_cpu(name: str, bad: float, use_ue8m0: bool) -> None:
    cast, _ = CASTS[name]
    x = values(150, 300, torch.bfloat16)
    x[140, 290] = bad
    (y, sf), (y_cpu, sf_cpu) = cast(x, use_ue8m0), cast(x.cpu(), use_ue8m0)
    assert torch.equal(y.float().isnan().cpu(), y_cpu.float().isnan())
    assert torch.equal(sf.isfinite().cpu(), sf_cpu.isfinite())
    assert bool(y.float().isnan().any())


def test_packed_scales_hold_the_exponents() -> None:
    x = values(33, 1000, torch.bfloat16)
    y, sf = jitgemm.per_token_cast_to_fp8(x, True)
    packed_y, packed = jitgemm.per_token_cast_to_fp8(x, True, 128, True)
    assert same_bits(packed_y, y)
    assert packed.dtype == torch.int32
    assert torch.equal(reference.unpack_ue8m0(packed)[:, : sf.shape[1]], sf)


def test_the_current_stream_and_graphs() -> None:
    x, new = values(65, 512, torch.bfloat16), values(65, 512, torch.bfloat16).flip(0)
    expected = jitgemm.per_token_cast_to_fp8(new)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(new)
        actual = jitgemm.per_token_cast_to_fp8(x)
    stream.synchronize()
    assert same_bits(actual[0], expected[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = jitgemm.per_token_cast_to_fp8(x)
    x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert bool((actual[0].float() == 0).all())


def test_results_are_what_the_gemm_takes() -> None:
    a, b = values(40, 512, torch.bfloat16), values(96, 512, torch.bfloat16)
    d = torch.empty(40, 96, dtype=torch.bfloat16, device=DEVICE)
    (qa, sa), (qb, sb) = jitgemm.per_token_cast_to_fp8(a), jitgemm.per_block_cast_to_fp8(b)
    jitgemm.fp8_gemm_nt((qa, sa), (qb, sb), d)
    exact = (
        reference.dequantize(qa, sa, (1, 128), torch.float64)
        @ reference.dequantize(qb, sb, (128, 128), torch.float64).T
    )
    assert float((d.double() - exact).norm() / exact.norm()) < 3e-3
