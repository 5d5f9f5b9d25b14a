"""Shards of tensor parallelism whose scale blocks of 128 are parts, at the end and at the beginning, in all operations.

On CPU tensors, against products of dequantized operands in float64, which know nothing of shards.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jitgemm
from jitgemm import Epilogue, settings
from jitgemm.errors import ProblemError
from jitgemm.testing import calc_diff

GROUPS, M = 2, 16
N, K = 192, 352
BLOCK = (128, 128)


def rows(*shape: int) -> tuple[Tensor, Tensor]:
    values, scales = jitgemm.per_token_cast_to_fp8(torch.randn(shape).flatten(0, -2))
    return values.view(shape), scales.view(*shape[:-1], -1)


def blocks(groups: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Weights whose blocks differ in magnitude, so that another block's scale makes another product."""
    x = (
        torch.randn(groups, n, k)
        * torch.exp2(torch.randint(-6, 7, (groups, n // 32 + 1, k // 32 + 1)))
        .repeat_interleave(32, 1)
        .repeat_interleave(32, 2)[:, :n, :k]
    )
    cast = [jitgemm.per_block_cast_to_fp8(part) for part in x]
    return torch.stack([data for data, _ in cast]), torch.stack([scales for _, scales in cast])


def exact(operand: tuple[Tensor, Tensor], group: tuple[int, int] = (1, 128)) -> Tensor:
    data, scales = (x.reshape(-1, *x.shape[-2:]) for x in operand)
    values = [jitgemm.cast_back_from_fp8(d, s, group).double() for d, s in zip(data, scales, strict=True)]
    return torch.stack(values).view(operand[0].shape)


def right(d: Tensor, expected: Tensor) -> None:
    assert calc_diff(d, expected) < (1e-5 if d.dtype == torch.bfloat16 else 1e-10)


# -- The last block is a part.


@pytest.mark.parametrize("with_bias", [False, True])
def test_dense_and_grouped(with_bias: bool) -> None:
    a, b = rows(GROUPS, M, K), blocks(GROUPS, N, K)
    assert b[1].shape == (GROUPS, 2, 3)
    bias = torch.randn(N) if with_bias else None
    given: dict[str, Any] = {} if bias is None else {"epilogue": Epilogue(bias=bias)}
    expected = exact(a) @ exact(b, BLOCK).mT + (0 if bias is None else bias)
    for group in range(GROUPS):
        d = torch.full((M, N), torch.nan)
        jitgemm.fp8_gemm_nt((a[0][group], a[1][group]), (b[0][group], b[1][group]), d, **given)
        right(d, expected[group])
    given = {} if bias is None else {"epilogue": Epilogue(bias=bias.expand(GROUPS, N).contiguous())}
    d = torch.full((GROUPS, M, N), torch.nan)
    jitgemm.m_grouped_fp8_gemm_nt_masked(a, b, d, torch.full((GROUPS,), M, dtype=torch.int32), M, **given)
    right(d, expected)
    flat: tuple[Tensor, Tensor] = a[0].flatten(0, 1), a[1].flatten(0, 1)
    with settings.override(mk_alignment=M):
        for layout, psum in (
            (torch.arange(GROUPS).repeat_interleave(M), False),
            (torch.arange(1, GROUPS + 1) * M, True),
        ):
            d = torch.full((GROUPS * M, N), torch.nan)
            jitgemm.m_grouped_fp8_gemm_nt_contiguous(flat, b, d, layout.int(), use_psum_layout=psum, **given)
            right(d.view(GROUPS, M, N), expected)


def test_mxfp4_weights() -> None:
    a, scales = rows(GROUPS, M, K), torch.randint(119, 125, (GROUPS, N, K // 32)).byte()
    packed = torch.randint(-128, 128, (GROUPS, N, K // 2)).to(torch.int8)
    exponents = torch.exp2(scales.float() - 127)
    weights = torch.stack(
        [jitgemm.cast_back_from_fp4(p, s, 32) for p, s in zip(packed, exponents, strict=True)]
    ).double()
    b = jitgemm.prepare_fp4_weights(packed, scales)
    d = torch.full((GROUPS, M, N), torch.nan)
    counts = torch.full((GROUPS,), M, dtype=torch.int32)
    jitgemm.m_grouped_fp8_fp4_gemm_nt_masked(a, b, d, counts, M)
    right(d, exact(a) @ weights.mT)
    one = torch.full((M, N), torch.nan)
    jitgemm.fp8_fp4_gemm_nt((a[0][0], a[1][0]), b._replace(data=b.data[0], units=b.units[0]), one)
    right(one, exact(a)[0] @ weights[0].mT)
    # Columns 352 to 703 of more: groups of 32 begin there, whatever those of a are.
    wide = torch.randint(-128, 128, (N, K)).to(torch.int8), torch.randint(119, 125, (N, K // 16)).byte()
    part = wide[0][:, K // 2 :], wide[1][:, K // 32 :]
    jitgemm.fp8_fp4_gemm_nt((a[0][0], a[1][0]), (part[0].contiguous(), part[1].contiguous()), one)
    right(
        one,
        exact(a)[0] @ jitgemm.cast_back_from_fp4(*wide[:1], torch.exp2(wide[1].float() - 127), 32)[:, K:].double().T,
    )


def test_batches_and_heads() -> None:
    x, y = rows(M, GROUPS, K), blocks(GROUPS, N, K)
    z = torch.full((M, GROUPS, N), torch.nan)
    jitgemm.fp8_einsum("bhr,hdr->bhd", x, y, z)
    right(z, torch.einsum("bhr,hdr->bhd", exact(x), exact(y, BLOCK)))
    d = torch.zeros(M, N + 2 * 32)
    jitgemm.fp8_gemm_nt_skip_head_mid((x[0][:, 0], x[1][:, 0]), (y[0][0], y[1][0]), d, (64, 32, 32))
    expected = (exact(x)[:, 0] @ exact(y, BLOCK)[0].T).view(M, 2, 96)
    right(d.view(M, 2, 128)[:, :, :64], expected[:, :, :64])
    right(d.view(M, 2, 128)[:, :, 96:], expected[:, :, 64:])


def test_gradients_of_a_shard_s_weights() -> None:
    ks = [352, 0, 96]
    counts, d = torch.tensor(ks, dtype=torch.int32), torch.full((3, M, N), torch.nan)
    operands, values = [], []
    for mn in (M, N):
        cast = [jitgemm.per_channel_cast_to_fp8(torch.randn(k, mn)) for k in ks if k]
        data, scales = (torch.cat(parts) for parts in zip(*cast, strict=True))
        operands.append((data, scales))
        values.append([jitgemm.cast_back_from_fp8(*part, (128, 1)).double() for part in cast])
    jitgemm.k_grouped_fp8_gemm_tn_contiguous(*operands, d, ks, counts)
    expected = torch.zeros(3, M, N).double()
    expected[0], expected[2] = (one.T @ other for one, other in zip(*values, strict=True))
    right(d, expected)


# -- The first block is a part.

WHOLE = 704  # of which shards of 192 begin at 0, 192 (64 within a block), 384 and 512


@pytest.mark.parametrize("start", [0, 192, 384, 512, 72])
@pytest.mark.parametrize("of_rows", [False, True])
def test_shards_along_n(start: int, of_rows: bool) -> None:
    weights = blocks(GROUPS, WHOLE, K)
    if of_rows:
        weights = rows(GROUPS, WHOLE, K)
    expected_b = exact(weights, (1, 128) if of_rows else BLOCK)[:, start : start + N]
    data, scales, before = jitgemm.shard_weights(*weights, -2, start, N)
    assert before == (0 if of_rows else start % 128) and data.shape == (GROUPS, before + N, K)
    a = rows(GROUPS, M, K)
    expected = exact(a) @ expected_b.mT
    for group in range(GROUPS):
        d = torch.full((M, before + N), torch.nan)
        recipe = (1, 1, 128) if of_rows else (1, 128, 128)
        jitgemm.fp8_gemm_nt((a[0][group], a[1][group]), (data[group], scales[group]), d, recipe=recipe)
        right(d[:, before:], expected[group])
        assert not d[:, :before].any()
    if not of_rows:
        d = torch.full((GROUPS, M, before + N), torch.nan)
        jitgemm.m_grouped_fp8_gemm_nt_masked(a, (data, scales), d, torch.full((GROUPS,), M, dtype=torch.int32), M)
        right(d[..., before:], expected)


@pytest.mark.parametrize("start", [0, 352, 96])
@pytest.mark.parametrize("of_rows", [False, True])
def test_shards_along_k(start: int, of_rows: bool) -> None:
    weights = rows(1, N, WHOLE) if of_rows else blocks(1, N, WHOLE)
    whole = exact(weights, (1, 128) if of_rows else BLOCK)[0]
    data, scales, before = jitgemm.shard_weights(weights[0][0], weights[1][0], -1, start, K)
    assert before == start % 128 and data.shape == (N, before + K)
    x = torch.zeros(M, before + K)
    x[:, before:] = torch.randn(M, K)
    a, d = jitgemm.per_token_cast_to_fp8(x), torch.full((M, N), torch.nan)
    jitgemm.fp8_gemm_nt(a, (data, scales), d, recipe=(1, 1, 128) if of_rows else (1, 128, 128))
    right(d, exact(a)[:, before:] @ whole[:, start : start + K].T)


@pytest.mark.parametrize("start", [0, 192, 352])
def test_a_shard_s_layer_of_experts(start: int) -> None:
    """Gate and up cut along n, down along k at the same place: zeros of the one meet zeros of the other."""
    gate, up, down = blocks(GROUPS, WHOLE, K), blocks(GROUPS, WHOLE, K), blocks(GROUPS, 128, WHOLE)
    parts = [jitgemm.shard_weights(*weights, -2, start, N) for weights in (gate, up)]
    before, inner = parts[0][2], parts[0][2] + N
    w13 = jitgemm.interleave_gate_up(*(torch.cat([one[i], other[i]], 1) for one, other in [parts] for i in range(2)))
    w2, w2_scales, _ = jitgemm.shard_weights(*down, -1, start, N)
    a, counts = rows(GROUPS, M, K), torch.full((GROUPS,), M, dtype=torch.int32)
    h, d = jitgemm.empty_quantized((GROUPS, M, inner), device="cpu"), torch.full((GROUPS, M, 128), torch.nan)
    jitgemm.m_grouped_fp8_gemm_nt_masked(a, w13, h, counts, M, epilogue=Epilogue(swiglu=True))
    jitgemm.m_grouped_fp8_gemm_nt_masked(h, (w2, w2_scales), d, counts, M)
    gates, ups = (exact(a) @ exact(w, BLOCK)[:, start : start + N].mT for w in (gate, up))
    middle = exact(h)
    assert not middle[..., :before].any()
    assert calc_diff(middle[..., before:], gates / (1 + (-gates).exp()) * ups) < 1e-3
    right(d, middle[..., before:] @ exact(down, BLOCK)[..., start : start + N].mT)


def test_what_is_no_part_is_refused() -> None:
    data, scales = torch.ones(256, 384), torch.ones(2, 3)
    for message, arguments in (
        ("weights have shape", (data[0], scales, -1, 0, 1)),
        (r"scales have shape \(3, 2\); accepted is \(256, 3\) or \(2, 3\)", (data, scales.T, -1, 0, 1)),
        ("dim is 0; accepted is -2", (data, scales, 0, 0, 1)),
        ("start is 200 and size 57; accepted is a part of 256", (data, scales, -2, 200, 57)),
        ("start is -1", (data, scales, -1, -1, 5)),
        ("size 0", (data, scales, -1, 0, 0)),
    ):
        with pytest.raises(ProblemError, match=message):
            jitgemm.shard_weights(*arguments)
