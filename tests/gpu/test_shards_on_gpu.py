"""Shards of tensor parallelism on a GPU: scale blocks of 128 that are parts, against what CPU tensors give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import jitgemm
from jitgemm import Epilogue, settings
from jitgemm.testing import calc_diff

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GROUPS = 3
SHAPES = [(192, 352), (136, 720), (72, 48)]
M = [4, 100]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    settings.reload()


def rows(*shape: int) -> tuple[Tensor, Tensor]:
    values, scales = jitgemm.per_token_cast_to_fp8(torch.randn(shape).flatten(0, -2))
    return values.view(shape), scales.view(*shape[:-1], -1)


def blocks(n: int, k: int) -> tuple[Tensor, Tensor]:
    """Weights whose blocks differ in magnitude, so that another block's scale makes another product."""
    sizes = torch.exp2(torch.randint(-6, 7, (GROUPS, n // 32 + 1, k // 32 + 1)))
    x = torch.randn(GROUPS, n, k) * sizes.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :n, :k]
    cast = [jitgemm.per_block_cast_to_fp8(part) for part in x]
    return torch.stack([data for data, _ in cast]), torch.stack([scales for _, scales in cast])


def moved(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.cuda()
    if isinstance(x, tuple):
        parts = [moved(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def same(call: Callable[..., None], d: Tensor, *operands: Any) -> None:
    """The call's D is NaN, here and there, but for what the CPU's call left alone."""
    on_gpu = d.cuda()
    call(d, *operands)
    call(on_gpu, *moved(operands))
    found, written = on_gpu.cpu(), ~d.isnan()
    assert torch.equal(written, ~found.isnan())
    assert calc_diff(found[written], d[written]) < (1e-5 if d.dtype == torch.bfloat16 else 1e-6)


def poisoned(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", M)
def test_dense_and_grouped(m: int, n: int, k: int) -> None:
    a, b, bias = rows(GROUPS, m, k), blocks(n, k), torch.randn(GROUPS, n)
    one = (a[0][0], a[1][0]), (b[0][0], b[1][0])
    for dtype in (torch.bfloat16, torch.float32):
        same(lambda d, x, w: jitgemm.fp8_gemm_nt(x, w, d), poisoned(m, n, dtype=dtype), *one)
    same(lambda d, x, w, v: jitgemm.fp8_gemm_nt(x, w, d, epilogue=Epilogue(bias=v)), poisoned(m, n), *one, bias[0])
    counts = torch.tensor([m, m // 2, 0], dtype=torch.int32)

    def masked(d: Tensor, x: Any, w: Any, layout: Tensor, v: Tensor | None = None) -> None:
        epilogue = None if v is None else Epilogue(bias=v)
        jitgemm.m_grouped_fp8_gemm_nt_masked(x, w, d, layout, m, epilogue=epilogue)

    same(masked, poisoned(GROUPS, m, n), a, b, counts)
    same(masked, poisoned(GROUPS, m, n), a, b, counts, bias)
    flat = a[0].flatten(0, 1), a[1].flatten(0, 1)
    with settings.override(mk_alignment=m):
        for layout, psum in (
            (torch.arange(GROUPS).repeat_interleave(m), False),
            (torch.arange(1, GROUPS + 1) * m, True),
        ):
            same(
                lambda d, x, w, v, psum=psum: jitgemm.m_grouped_fp8_gemm_nt_contiguous(
                    x, w, d, v, use_psum_layout=psum
                ),
                poisoned(GROUPS * m, n),
                *(flat, b, layout.int()),
            )


@pytest.mark.parametrize(("n", "k"), [(192, 352), (72, 96)])
@pytest.mark.parametrize("m", M)
def test_mxfp4_weights(m: int, n: int, k: int) -> None:
    a, scales = rows(GROUPS, m, k), torch.randint(119, 125, (GROUPS, n, k // 32)).byte()
    b = jitgemm.prepare_fp4_weights(torch.randint(-128, 128, (GROUPS, n, k // 2)).to(torch.int8), scales)
    counts = torch.tensor([m, m // 2, 0], dtype=torch.int32)
    same(
        lambda d, x, w, layout: jitgemm.m_grouped_fp8_fp4_gemm_nt_masked(x, w, d, layout, m),
        *(poisoned(GROUPS, m, n), a, b, counts),
    )
    one = b._replace(data=b.data[0], units=b.units[0])
    same(lambda d, x, w: jitgemm.fp8_fp4_gemm_nt(x, w, d), poisoned(m, n), (a[0][0], a[1][0]), one)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_batches_heads_and_gradients(n: int, k: int) -> None:
    m = 40
    b = blocks(n, k)
    same(lambda d, x, w: jitgemm.fp8_einsum("bhr,hdr->bhd", x, w, d), poisoned(m, GROUPS, n), rows(m, GROUPS, k), b)
    half = n // 2
    same(
        lambda d, x, w: jitgemm.fp8_gemm_nt_skip_head_mid(x, w, d, (half // 2, 32, half - half // 2)),
        *(poisoned(m, n + 2 * 32), rows(m, k), (b[0][0], b[1][0])),
    )
    ks = [k, 0, 96]
    operands = []
    for mn in (64, n):
        cast = [jitgemm.per_channel_cast_to_fp8(torch.randn(size, mn)) for size in ks if size]
        data, scales = (torch.cat(parts) for parts in zip(*cast, strict=True))
        operands.append((data, scales))
    same(
        lambda d, x, w, counts: jitgemm.k_grouped_fp8_gemm_tn_contiguous(x, w, d, ks, counts),
        *(poisoned(3, 64, n, dtype=torch.float32), *operands, torch.tensor(ks, dtype=torch.int32)),
    )


@pytest.mark.parametrize("start", [0, 192, 384, 352])
@pytest.mark.parametrize("m", M)
def test_shards_that_begin_within_a_block(start: int, m: int) -> None:
    n, k = 192, 352
    data, scales, before = jitgemm.shard_weights(*blocks(704, k), -2, start, n)
    counts = torch.tensor([m, m // 2, 0], dtype=torch.int32)
    same(
        lambda d, x, w, layout: jitgemm.m_grouped_fp8_gemm_nt_masked(x, w, d, layout, m),
        *(poisoned(GROUPS, m, before + n), rows(GROUPS, m, k), (data, scales), counts),
    )
    weights = blocks(n, 768)
    data, scales, before = jitgemm.shard_weights(weights[0][0], weights[1][0], -1, start, k)
    x = torch.zeros(m, before + k)
    x[:, before:] = torch.randn(m, k)
    same(
        lambda d, x, w: jitgemm.fp8_gemm_nt(x, w, d),
        *(poisoned(m, n), jitgemm.per_token_cast_to_fp8(x), (data, scales)),
    )
