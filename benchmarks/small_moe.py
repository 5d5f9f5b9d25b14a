"""Cases of ``benchmarks.small``: hyper-connections and what lies around the GEMMs of experts."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import jitgemm
from benchmarks import small_work
from benchmarks.harness import Call
from benchmarks.small_work import CHAINS_US, PHASES_US, ROWS_US, Case, Work, normal
from jitgemm.reference import hyper_connections as hc
from jitgemm.reference import moe

MODELS = ((4096, 256), (7168, 384))  # width, experts
PRENORM_SHAPES = [(m, k) for k in (28672, 7680, 7168, 16384) for m in (13, 137, 4096, 8192)]
TOPK, ALIGNMENT = 6, 128
BF16 = torch.bfloat16


def close(found: Any, expected: Any, rtol: float = 2e-3, atol: float = 2e-2) -> bool:
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    scale = 2**-7 if not isinstance(found, tuple) and found.dtype == torch.bfloat16 else rtol
    return all(
        torch.allclose(a.double(), b.double(), rtol=max(scale, 2**-7 if a.dtype == torch.bfloat16 else 0), atol=atol)
        for a, b in pairs
    )


# -- What one would write in torch.


def torch_split(mixes: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pre = torch.sigmoid(mixes[:, :4] * scale[0] + base[:4]) + 1e-6
    post = 2 * torch.sigmoid(mixes[:, 4:8] * scale[1] + base[4:8])
    comb = (mixes[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4).softmax(-1) + 1e-6
    comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    for _ in range(19):
        comb = comb / (comb.sum(-1, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    return pre, post, comb


def torch_prenorm(a: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    a = a.float()
    return a @ fn.T, a.square().sum(-1)


def torch_pre(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    product, squares = torch_prenorm(x.flatten(1), fn)
    mixes = product * torch.rsqrt(squares / fn.shape[1] + 1e-6).unsqueeze(1)
    pre, post, comb = torch_split(mixes, scale, base)
    return (pre.unsqueeze(-1) * x.float()).sum(1).bfloat16(), post, comb


def torch_head(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    product, squares = torch_prenorm(x.flatten(1), fn)
    pre = torch.sigmoid(product * torch.rsqrt(squares / fn.shape[1] + 1e-6).unsqueeze(1) * scale + base) + 1e-6
    return (pre.unsqueeze(-1) * x.float()).sum(1).bfloat16()


def torch_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    mixed = (comb.unsqueeze(-1) * residual.float().unsqueeze(2)).sum(1)
    return (post.unsqueeze(-1) * x.float().unsqueeze(1) + mixed).bfloat16()


def torch_topk(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = functional.softplus(logits).sqrt()
    indices = (scores + bias).topk(TOPK, -1).indices
    weights = scores.gather(1, indices)
    return indices.int(), weights / weights.sum(-1, keepdim=True).clamp(min=1e-20) * 1.5


def torch_gate(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch_topk(x.float() @ weight.float().T, bias)


def torch_combine(y: Tensor, pos: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    rows = y[pos.clamp(min=0)].float() * (weights * (pos >= 0)).unsqueeze(-1)
    return (rows.sum(1) + shared.float()).bfloat16()


def torch_permute(x: Tensor, to_item: Tensor) -> Tensor:
    return x[(to_item // TOPK).clamp(min=0)]


def torch_permutation(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sorting, as one would: without padding, which needs the counts."""
    order = indices.flatten().sort(stable=True).indices
    return order, torch.bincount(indices.flatten(), minlength=experts)


# -- Cases.


def hc_inputs(tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fn = normal(24, 4 * width) / math.sqrt(4 * width)
    return normal(tokens, 4, width, dtype=BF16), fn, normal(3), normal(24)


def prenorm(m: int, k: int, splits: int) -> Work:
    a, fn = normal(m, k, dtype=BF16), normal(24, k)
    d, squares = normal(splits, m, 24), normal(splits, m)

    def ours() -> None:
        jitgemm.tf32_hc_prenorm_gemm(a, fn, d, squares, splits)

    def right() -> bool:
        ours()
        expected = hc.hc_prenorm_gemm(a, fn)
        sums = squares.sum(0)
        # TF32 rounds each term by up to 2^-12 of it: five standard deviations of their sum.
        return close(d.sum(0), expected[0], atol=5 * 2**-12 * k**0.5) and close(sums.log(), expected[1].log(), 1e-5, 0)

    moved = 2 * a.numel() + 4 * fn.numel() + 100 * m
    return Work(ours, right, torch_prenorm, (a, fn), moved, deepgemm(a, fn))


def split(tokens: int, width: int, experts: int) -> Work:
    arguments = normal(tokens, 24), normal(3), normal(24)
    return Work(
        lambda: jitgemm.hc_split_sinkhorn(*arguments),
        lambda: close(jitgemm.hc_split_sinkhorn(*arguments), hc.hc_split_sinkhorn(*arguments, 20, 1e-6, 2.0)),
        *(torch_split, arguments, tokens * 192),
    )


def pre(tokens: int, width: int, experts: int) -> Work:
    arguments = hc_inputs(tokens, width)
    return Work(
        lambda: jitgemm.hc_pre(*arguments),
        lambda: close(jitgemm.hc_pre(*arguments), hc.hc_pre(*arguments, 1e-6, 1e-6, 20, 2.0)),
        *(torch_pre, arguments, tokens * (10 * width + 80) + 4 * arguments[1].numel()),
    )


def head(tokens: int, width: int, experts: int) -> Work:
    x, fn, scale, base = hc_inputs(tokens, width)
    arguments = x, fn[:4], scale[:1], base[:4]
    return Work(
        lambda: jitgemm.hc_head(*arguments),
        lambda: close(jitgemm.hc_head(*arguments), hc.hc_head(*arguments, 1e-6, 1e-6)),
        *(torch_head, arguments, tokens * 10 * width + 16 * 4 * width),
    )


def post(tokens: int, width: int, experts: int) -> Work:
    inputs = hc_inputs(tokens, width)
    arguments = normal(tokens, width, dtype=BF16), inputs[0], *jitgemm.hc_pre(*inputs)[1:]
    return Work(
        lambda: jitgemm.hc_post(*arguments),
        lambda: close(jitgemm.hc_post(*arguments), hc.hc_post(*arguments)),
        *(torch_post, arguments, tokens * (18 * width + 80)),
    )


def routing(tokens: int, width: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A gate's input, weight and bias."""
    weight = normal(experts, width, dtype=BF16) / math.sqrt(width)
    return normal(tokens, width, dtype=BF16), weight, normal(experts)


def reference_topk(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return moe.topk_gate(logits, bias, TOPK, "sqrtsoftplus", 1.5, None, None, None, torch.int32)


def topk_gate(tokens: int, width: int, experts: int) -> Work:
    x, weight, bias = routing(tokens, width, experts)
    arguments = x.float() @ weight.float().T, bias
    return Work(
        lambda: jitgemm.topk_gate(*arguments, TOPK, route_scale=1.5),
        lambda: close(jitgemm.topk_gate(*arguments, TOPK, route_scale=1.5)[1], reference_topk(*arguments)[1]),
        *(torch_topk, arguments, tokens * (4 * experts + 8 * TOPK)),
    )


def gate(tokens: int, width: int, experts: int) -> Work:
    arguments = x, weight, bias = routing(tokens, width, experts)

    def right() -> bool:
        expected = reference_topk((x.double() @ weight.double().T).float(), bias)[1]
        return close(jitgemm.moe_gate(*arguments, TOPK, route_scale=1.5)[1], expected, 1e-2)

    return Work(
        *(lambda: jitgemm.moe_gate(*arguments, TOPK, route_scale=1.5), right, torch_gate, arguments),
        moved=tokens * (2 * width + 8 * TOPK) + experts * 2 * width,
    )


def choices(tokens: int, width: int, experts: int) -> tuple[Tensor, Tensor]:
    """Random tokens' experts and weights."""
    return reference_topk(normal(tokens, experts), normal(experts) / 4)


def permutation(tokens: int, width: int, experts: int) -> Work:
    indices, weights = choices(tokens, width, experts)

    def ours() -> jitgemm.MoePermutation:
        return jitgemm.moe_permutation(indices, experts, weights, layout="psum", alignment=ALIGNMENT)

    def right() -> bool:
        expected = moe.moe_permutation(indices, weights, experts, "psum", ALIGNMENT, 0, 0)
        return all(torch.equal(a, b) for a, b in zip(ours()[:4], expected, strict=True))

    rows = moe.num_rows(tokens * TOPK, experts, "psum", ALIGNMENT, 0)
    in_torch = partial(torch_permutation, experts=experts)
    return Work(ours, right, in_torch, (indices,), tokens * TOPK * 12 + rows * 8)


def permute(tokens: int, width: int, experts: int) -> Work:
    x = normal(tokens, width, dtype=BF16)
    made = jitgemm.moe_permutation(choices(tokens, width, experts)[0], experts, layout="psum", alignment=ALIGNMENT)
    exists = made.pos_to_token_topk >= 0
    items = made.pos_to_token_topk[exists]
    return Work(
        lambda: jitgemm.moe_permute(x, made),
        lambda: torch.equal(jitgemm.moe_permute(x, made)[0][exists], x[items // TOPK]),
        *(torch_permute, (x, items), tokens * 2 * width * (1 + TOPK)),
    )


def combine(tokens: int, width: int, experts: int) -> Work:
    indices, weights = choices(tokens, width, experts)
    pos = jitgemm.moe_permutation(indices, experts, layout="psum", alignment=ALIGNMENT).token_topk_to_pos
    rows = moe.num_rows(tokens * TOPK, experts, "psum", ALIGNMENT, 0)
    arguments = normal(rows, width, dtype=BF16), pos, weights, normal(tokens, width, dtype=BF16)
    return Work(
        lambda: jitgemm.moe_combine(*arguments),
        lambda: close(jitgemm.moe_combine(*arguments), moe.moe_combine(*arguments)),
        *(torch_combine, arguments, tokens * 2 * width * (TOPK + 2)),
    )


NAMES = (
    *("hc_prenorm", "hc_split_sinkhorn", "hc_pre", "hc_head", "hc_post"),
    *("topk_gate", "moe_gate", "moe_permutation", "moe_permute", "moe_combine"),
)


def layer_cases(tokens: int, width: int, experts: int) -> Iterator[Case]:
    """Those of a layer with so many tokens."""
    rows = moe.num_rows(tokens * TOPK, experts, "psum", ALIGNMENT, 0)
    for name, make, n, k, groups, recipe, slack in (
        ("hc_split_sinkhorn", split, 24, 24, 1, "fp32", CHAINS_US),
        ("hc_pre", pre, width, 4 * width, 1, "bf16", CHAINS_US),
        ("hc_head", head, width, 4 * width, 1, "bf16", PHASES_US),
        ("hc_post", post, 4 * width, width, 1, "bf16", ROWS_US),
        ("topk_gate", topk_gate, TOPK, experts, experts, "fp32", CHAINS_US),
        ("moe_gate", gate, TOPK, width, experts, "bf16", CHAINS_US),
        ("moe_permutation", permutation, TOPK, rows, experts, "int32", PHASES_US),
        ("moe_permute", permute, width, width, experts, "bf16", ROWS_US),
        ("moe_combine", combine, width, width, experts, "bf16", ROWS_US),
    ):
        yield Case(name, tokens, n, k, groups, recipe, slack, partial(make, tokens, width, experts))


def cases(ms: Sequence[int], num_splits: Sequence[int] = ()) -> Iterator[Case]:
    """Those of both models for so many tokens; the prenorm GEMM at its own shapes."""
    for m, k in PRENORM_SHAPES:
        for splits in num_splits or (jitgemm.get_hc_prenorm_num_splits(m, k),):
            yield Case("hc_prenorm", m, 24, k, 1, f"tf32 splits {splits}", PHASES_US, partial(prenorm, m, k, splits))
    for width, experts in MODELS:
        for m in ms:
            yield from layer_cases(m, width, experts)


def deepgemm(a: Tensor, fn: Tensor) -> dict[str, Call]:
    if small_work.DEVICE != "cuda" or importlib.util.find_spec("deep_gemm") is None:
        return {}
    import deep_gemm

    def call(splits: int | None) -> Call:
        leading = () if splits is None else (splits,)
        d, squares = normal(*leading, a.shape[0], 24), normal(*leading, a.shape[0])
        return lambda: deep_gemm.tf32_hc_prenorm_gemm(a, fn, d, squares, splits)

    return {"deepgemm": call(None), "deepgemm_16": call(16)}
