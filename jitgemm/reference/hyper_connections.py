"""Hyper-connections in plain torch: four residual streams, mixed before and after each sublayer.

Everything is computed in FP64 and rounded once, to the dtype of the output. The function is that of DeepSeek-V4's
published inference code (manifold-constrained hyper-connections).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

HC_MULT = 4
"""Residual streams."""
MIX_WIDTH = (2 + HC_MULT) * HC_MULT
"""Numbers that mix a token's streams: 4 into the sublayer, 4 out of it, 4 x 4 among the streams."""


@torch.no_grad()
def hc_split_sinkhorn(
    mixes: Tensor, scale: Tensor, base: Tensor, iterations: int, eps: float, post_mult: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``jitgemm.hc_split_sinkhorn``."""
    pre, post, comb = _split_sinkhorn(mixes.double(), scale.double(), base.double(), iterations, eps, post_mult)
    return pre.float(), post.float(), comb.float()


@torch.no_grad()
def hc_prenorm_gemm(a: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    """``a @ fn.T`` and the rows' sums of squares, FP32."""
    a, fn = a.double(), fn.double()
    return (a @ fn.T).float(), a.square().sum(-1).float()


def split_ranges(k: int, num_splits: int) -> list[tuple[int, int]]:
    """The part of K that each split sums: whole blocks of 64, of which the first splits get one more."""
    blocks = -(-k // 64)
    each, more = divmod(blocks, num_splits)
    starts = [split * each + min(split, more) for split in range(num_splits + 1)]
    return [(min(k, 64 * start), min(k, 64 * end)) for start, end in itertools.pairwise(starts)]


@torch.no_grad()
def hc_pre(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
    post_mult: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``jitgemm.hc_pre``."""
    mixes = _normed_mixes(x, fn, norm_eps)
    pre, post, comb = _split_sinkhorn(mixes, scale.double(), base.double(), iterations, eps, post_mult)
    return _weighted_sum(pre, x), post.float(), comb.float()


@torch.no_grad()
def hc_head(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, eps: float) -> Tensor:
    """``jitgemm.hc_head``."""
    mixes = _normed_mixes(x, fn, norm_eps)
    return _weighted_sum(torch.sigmoid(mixes * scale.double() + base.double()) + eps, x)


@torch.no_grad()
def hc_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """``jitgemm.hc_post``."""
    mixed = torch.einsum("tjk,tjd->tkd", comb.double(), residual.double())
    return (post.double().unsqueeze(-1) * x.double().unsqueeze(1) + mixed).float().to(residual.dtype)


def _split_sinkhorn(
    mixes: Tensor, scale: Tensor, base: Tensor, iterations: int, eps: float, post_mult: float
) -> tuple[Tensor, Tensor, Tensor]:
    scales = scale.repeat_interleave(torch.tensor([HC_MULT, HC_MULT, HC_MULT**2], device=scale.device))
    mixes = mixes * scales + base
    pre, post, logits = mixes[..., :HC_MULT], mixes[..., HC_MULT : 2 * HC_MULT], mixes[..., 2 * HC_MULT :]
    comb = logits.reshape(*mixes.shape[:-1], HC_MULT, HC_MULT).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return torch.sigmoid(pre) + eps, post_mult * torch.sigmoid(post), comb


def _normed_mixes(x: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    flat = x.flatten(1).double()
    return (flat @ fn.double().T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def _weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    return _to_bf16((weights.unsqueeze(-1) * x.double()).sum(1))


def _to_bf16(x: Tensor) -> Tensor:
    return x.float().bfloat16()
