"""Routing of a mixture of experts in plain torch: gate, permutation of rows to experts, combination."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SCORES = ("sqrtsoftplus", "sigmoid", "softmax")
LAYOUTS = ("contiguous", "psum", "masked")
SUM_FLOOR = 1e-20
"""Least sum that routing weights are divided by."""


def scores_of(logits: Tensor, function: str) -> Tensor:
    """An expert's score for a token."""
    if function == "sqrtsoftplus":
        return functional.softplus(logits).sqrt()
    return logits.sigmoid() if function == "sigmoid" else logits.softmax(-1)


@torch.no_grad()
def topk_gate(
    logits: Tensor,
    bias: Tensor | None,
    topk: int,
    scores: str,
    route_scale: float,
    tid2eid: Tensor | None,
    input_ids: Tensor | None,
    mask: Tensor | None,
    index_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``jitgemm.topk_gate``, scores in FP64."""
    score = scores_of(logits.double(), scores)
    if tid2eid is not None and input_ids is not None:
        ids = input_ids.long()
        known = (ids >= 0) & (ids < tid2eid.shape[0])
        indices = tid2eid[torch.where(known, ids, 0)].long()
        indices = torch.where(known.unsqueeze(1) & (indices >= 0) & (indices < logits.shape[1]), indices, -1)
    else:
        key = score if bias is None else score + bias.double()
        # Stable: of equal keys the smaller index first. A NaN counts as the greatest.
        indices = key.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    if mask is not None:
        indices = torch.where(mask.unsqueeze(1), indices, -1)
    chosen = indices >= 0
    weights = torch.where(chosen, score.gather(1, indices.clamp(min=0)), 0.0)
    if scores != "softmax":
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=SUM_FLOOR)
    return indices.to(index_dtype).contiguous(), torch.where(chosen, weights * route_scale, 0.0).float()


class Mapping(NamedTuple):
    """``jitgemm.MoePermutation`` without what the caller knows."""

    grouped_layout: Tensor
    token_topk_to_pos: Tensor
    pos_to_token_topk: Tensor
    row_weights: Tensor | None


def num_rows(items: int, experts: int, layout: str, alignment: int, max_m: int) -> int:
    """Rows that so many choices of experts can take at most."""
    if layout == "masked":
        return experts * max_m
    return (items + min(experts, items) * (alignment - 1)) // alignment * alignment


@torch.no_grad()
def moe_permutation(
    topk_indices: Tensor,
    topk_weights: Tensor | None,
    experts: int,
    layout: str,
    alignment: int,
    max_m: int,
    first_expert: int,
) -> Mapping:
    """``jitgemm.moe_permutation``."""
    device = topk_indices.device
    local = topk_indices.flatten().long() - first_expert
    local = torch.where((local >= 0) & (local < experts), local, experts)
    order = local.sort(stable=True).indices
    counts = torch.bincount(local, minlength=experts + 1)[:experts]
    rank = torch.empty_like(local)
    first = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    rank[order] = torch.arange(len(local), device=device) - first[local[order]]
    if layout == "masked":
        starts = torch.arange(experts, device=device) * max_m
    else:
        aligned = (counts + alignment - 1) // alignment * alignment
        starts = aligned.cumsum(0) - aligned
    valid = local < experts
    if layout == "masked":
        valid &= rank < max_m
    pos = torch.where(valid, torch.cat((starts, starts.new_zeros(1)))[local] + rank, -1)
    rows = num_rows(len(local), experts, layout, alignment, max_m)
    of_row = torch.full((rows,), -1, dtype=torch.int32, device=device)
    of_row[pos[valid]] = torch.arange(len(local), dtype=torch.int32, device=device)[valid]
    if layout == "contiguous":
        grouped = torch.full((rows,), -1, dtype=torch.int32, device=device)
        grouped[pos[valid]] = local[valid].int()
    else:
        grouped = (starts + counts if layout == "psum" else counts.clamp(max=max_m)).int()
    weights = None
    if topk_weights is not None:
        weights = torch.zeros(rows, dtype=torch.float32, device=device)
        weights[pos[valid]] = topk_weights.flatten()[valid]
    return Mapping(grouped, pos.int().view(topk_indices.shape), of_row, weights)


@torch.no_grad()
def moe_permute(x: Tensor, token_topk_to_pos: Tensor, out: Tensor) -> None:
    """Copy each token's row (or scales) to its rows of ``out`` ``[rows, ...]``."""
    tokens, slots = (token_topk_to_pos >= 0).nonzero(as_tuple=True)
    out[token_topk_to_pos[tokens, slots].long()] = x[tokens]


@torch.no_grad()
def moe_combine(y: Tensor, token_topk_to_pos: Tensor, weights: Tensor | None, shared: Tensor | None) -> Tensor:
    """``jitgemm.moe_combine``: sums in FP64, rounded once."""
    tokens, topk = token_topk_to_pos.shape
    total = torch.zeros((tokens, y.shape[1]), dtype=torch.float64, device=y.device)
    for slot in range(topk):
        pos = token_topk_to_pos[:, slot].long()
        taken = ((pos >= 0) & (pos < len(y))).unsqueeze(1)
        rows = torch.where(taken, y[pos.clamp(0, len(y) - 1)].double(), 0.0) if len(y) else 0.0
        factor = 1.0 if weights is None else weights[:, slot : slot + 1].double()
        total += torch.where(taken, rows * factor, 0.0)
    if shared is not None:
        total += shared.double()
    return total.float().bfloat16()
