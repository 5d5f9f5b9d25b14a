"""The batched products around attention, one GEMM for each head."""

from __future__ import annotations

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.reference.epilogue import gemm_into
from jitgemm.reference.gemm import gemm, round_to_bf16

EXPRESSIONS = ("bhr,hdr->bhd", "bhd,hdr->bhr", "bhd,bhr->hdr", "bmk,bnk->mn")
FP8_EXPRESSIONS = EXPRESSIONS[:3]

_BATCH_ELEMENTS = 1 << 24
"""Elements of each operand that are in float64 at a time, where a batch is summed over."""


def einsum(expr: str, a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None) -> None:
    """``d = einsum(expr, a, b) (+ c)`` in float64, rounded once; bf16 operands of any strides.

    Raises:
        ProblemError: another expression, or shapes that don't fit it.
    """
    _check(expr, EXPRESSIONS, a, b, d, c)
    if expr == "bmk,bnk->mn":
        _sum_over_batch(a, b, d, c)
        return
    for head in range(d.shape[0] if expr.endswith("hdr") else d.shape[1]):
        a_head, b_head, d_head, c_head = _of_head(expr, head, a, b, d, c)
        gemm_into(a_head, b_head, d_head, c_head, recipe="bf16")


def fp8_einsum(
    expr: str,
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    c: Tensor | None = None,
    *,
    recipe: str = "fp8_1x128_128x128",
) -> None:
    """The same for FP8 operands with scales, shaped like the operands but for groups of 128.

    For ``bhr,hdr->bhd``: a's [b, h, r / 128], b's [h, d / 128, r / 128] or, with single rows, [h, d, r / 128]; for
    ``bhd,hdr->bhr``: a's [b, h, d / 128], b's [h, d / 128, r / 128] or [h, d / 128, r]; for ``bhd,bhr->hdr``, with
    scales of single rows only: [b / 128, h, d] and [b / 128, h, r]. Divisions round up.

    Raises:
        ProblemError: another expression or recipe, or shapes that don't fit it.
    """
    (a_data, a_scales), (b_data, b_scales) = a, b
    _check(expr, FP8_EXPRESSIONS, a_data, b_data, d, c)
    accepted = ("fp8_1x128_1x128",) if expr.endswith("hdr") else ("fp8_1x128_128x128", "fp8_1x128_1x128")
    if recipe not in accepted:
        raise ProblemError(f"recipe is {recipe!r}; {expr} accepts {', '.join(accepted)}")
    for name, scales in (("a", a_scales), ("b", b_scales)):
        if scales.dim() != 3:
            raise ProblemError(f"{name}'s scales have shape {tuple(scales.shape)}; accepted are 3 dimensions")
    for head in range(d.shape[0] if expr.endswith("hdr") else d.shape[1]):
        a_head, b_head, d_head, c_head = _of_head(expr, head, a_data, b_data, d, c)
        a_head_scales, b_head_scales, _, _ = _of_head(expr, head, a_scales, b_scales, d, None)
        gemm_into(a_head, b_head, d_head, c_head, a_scales=a_head_scales, b_scales=b_head_scales, recipe=recipe)


def fp8_gemm_nt_skip_head_mid(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    head_splits: tuple[int, int, int],
    *,
    recipe: str = "fp8_1x128_128x128",
) -> None:
    """``A @ B^T`` [m, heads * (left + right)], written to D with ``mid`` columns in each head that stay as they are.

    Args:
        a: [m, k] and its scales.
        b: [n, k] and its scales.
        d: bf16 or fp32 [m, heads * (left + mid + right)].
        head_splits: left, mid and right columns of a head.
        recipe: a key of ``SCALE_GROUPS``.

    Raises:
        ProblemError: sizes that don't fit each other.
    """
    left, mid, right = head_splits
    n = b[0].shape[0]
    if left < 0 or mid < 0 or right < 0 or left + right == 0 or n % (left + right):
        raise ProblemError(f"head_splits is {tuple(head_splits)}; accepted are left + right that divide n = {n}")
    heads = n // (left + right)
    shape = (a[0].shape[0], heads * (left + mid + right))
    if d.shape != shape:
        raise ProblemError(f"d has shape {tuple(d.shape)}; accepted is {shape}")
    d_dtype = "bf16" if d.dtype == torch.bfloat16 else "fp32"
    product = gemm(a[0], b[0], a_scales=a[1], b_scales=b[1], recipe=recipe, d_dtype=d_dtype)
    of_heads = torch.unflatten(d, 1, (heads, left + mid + right))
    result = torch.unflatten(product, 1, (heads, left + right))
    of_heads[..., :left] = result[..., :left]
    of_heads[..., left + mid :] = result[..., left:]


def _sum_over_batch(a: Tensor, b: Tensor, d: Tensor, c: Tensor | None) -> None:
    total = torch.zeros(d.shape, dtype=torch.float64, device=d.device) if c is None else c.to(torch.float64)
    step = max(_BATCH_ELEMENTS // max(a[:1].numel(), b[:1].numel(), 1), 1)
    for x, y in zip(torch.split(a, step), torch.split(b, step), strict=True):
        total = total + torch.bmm(x.to(torch.float64), y.to(torch.float64).mT).sum(0)
    d.copy_(round_to_bf16(total) if d.dtype == torch.bfloat16 else total)


def _of_head(
    expr: str, head: int, a: Tensor, b: Tensor, d: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One head's A [m, k], B [n, k], D and C [m, n]."""
    if expr == "bhd,bhr->hdr":
        return a[:, head].mT, b[:, head].mT, d[head], None if c is None else c[head]
    b_head = b[head] if expr == "bhr,hdr->bhd" else b[head].mT
    return a[:, head], b_head, d[:, head], None if c is None else c[:, head]


def _check(expr: str, accepted: tuple[str, ...], a: Tensor, b: Tensor, d: Tensor, c: Tensor | None) -> None:
    if expr not in accepted:
        raise ProblemError(f"expr is {expr!r}; accepted is {', '.join(accepted)}")
    inputs, output = expr.split("->")
    sizes: dict[str, int] = {}
    for name, letters, tensor in zip("abdc", (*inputs.split(","), output, output), (a, b, d, c), strict=True):
        if tensor is None:
            continue
        if tensor.dim() != len(letters):
            raise ProblemError(f"{name} has shape {tuple(tensor.shape)}; {expr} accepts [{', '.join(letters)}]")
        for letter, size in zip(letters, tensor.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ProblemError(f"{name} has {letter} = {size} in {expr}; accepted is {sizes[letter]}")
