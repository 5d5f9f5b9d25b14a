"""What may follow a product before it is stored, and the GEMM that does it, for all rows or for some."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.reference.gemm import OPERAND_GROUPS, products, round_to_bf16
from jitgemm.reference.layout import SCALE_BLOCK, rows_of_gate_up_blocks, split_gate_up
from jitgemm.reference.quantize import ceil_div, per_token_cast_to_fp8

Output = Tensor | tuple[Tensor, Tensor]
"""bf16 or fp32 D; or D in E4M3 with its scales, fp32 or (four exponents each) int32."""

_ROWS_AT_A_TIME = 4096


class Epilogue(NamedTuple):
    """What becomes of ``A @ B^T``: ``alpha *``, ``+ C``, ``+ bias``, SwiGLU, then rounding or quantization."""

    alpha: float | Tensor = 1.0
    """A number, or a tensor of one, or with groups of B [groups]."""
    bias: Tensor | None = None
    """[n]; with groups of B also [groups, n]."""
    swiglu: bool = False
    """``silu(gate) * up``, where B's rows are those of gate and up interleaved by ``interleave_gate_up``."""
    limit: float | None = None
    """Of SwiGLU: gate is at most this, up within plus and minus this."""
    row_weights: Tensor | None = None
    """[m], or [groups, max_m] of a masked GEMM: each row of D is multiplied by its own, after SwiGLU."""
    gran_k: int = 128
    """Elements of a row of D that share a scale, where D is quantized."""
    use_ue8m0: bool = False
    """Those scales are powers of two; packed ones always are."""

    def of_group(self, group: int) -> Epilogue:
        """The part that concerns one of the groups of B."""
        bias, weights, alpha = self.bias, self.row_weights, self.alpha
        return self._replace(
            alpha=alpha[group] if isinstance(alpha, Tensor) and alpha.numel() > 1 else alpha,
            bias=bias[group] if bias is not None and bias.dim() == 2 else bias,
            row_weights=weights[group] if weights is not None and weights.dim() == 2 else weights,
        )


PLAIN = Epilogue()


def gemm_into(
    a: Tensor,
    b: Tensor,
    d: Output,
    c: Tensor | None = None,
    *,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    recipe: str,
    epilogue: Epilogue = PLAIN,
    rows: Tensor | None = None,
    a_offset: int = 0,
    b_offset: tuple[int, int] = (0, 0),
) -> None:
    """Write ``D``, in float64 up to the last step; FP8 values and scales come from the result in fp32.

    Args:
        a: [m, k].
        b: [n, k].
        d: [m, n], or [m, n / 2] with SwiGLU; scales [m, ceil(columns / gran_k)], packed [m, ceil(that / 4)].
        c: [m, n]; may be ``d`` itself.
        a_scales: as ``gemm`` takes them.
        b_scales: as ``gemm`` takes them.
        recipe: a key of ``OPERAND_GROUPS``.
        epilogue: what follows the product.
        rows: indices of the rows to compute, in any order; no other row of A is read, nor of D written.
        a_offset: as ``gemm`` takes it.
        b_offset: as ``gemm`` takes it.

    Raises:
        ProblemError: shapes that don't fit each other, or C with SwiGLU.
    """
    m, n = a.shape[0], b.shape[0]
    data = d if isinstance(d, Tensor) else d[0]
    if a.shape[1] != b.shape[1]:
        raise ProblemError(f"b has k = {b.shape[1]}; a has k = {a.shape[1]}")
    columns = n // 2 if epilogue.swiglu else n
    for name, tensor, shape in (("d", data, (m, columns)), ("c", c, (m, n))):
        if tensor is not None and tensor.shape != shape:
            raise ProblemError(f"{name} has shape {tuple(tensor.shape)}; accepted is {shape}")
    if epilogue.swiglu and c is not None:
        raise ProblemError("c is given with SwiGLU; accepted is None")
    if epilogue.row_weights is not None and epilogue.row_weights.shape != (m,):
        raise ProblemError(f"row_weights have shape {tuple(epilogue.row_weights.shape)}; accepted is {(m,)}")
    if epilogue.bias is not None and epilogue.bias.shape != (n,):
        raise ProblemError(f"bias has shape {tuple(epilogue.bias.shape)}; accepted is {(n,)}")

    group = OPERAND_GROUPS[recipe]
    if (
        epilogue.swiglu
        and group is not None
        and group[1] is not None
        and group[1][0] == SCALE_BLOCK
        and b_scales is not None
    ):
        # Which rows share a scale is not what it is without interleaving.
        b_scales, recipe = _scales_of_interleaved_rows(b_scales, n), "fp8_1x128_1x128"
    scales_of_rows = group is not None and group[0][0] is not None
    selected = torch.arange(m, device=a.device) if rows is None else rows
    for part in torch.split(selected, _ROWS_AT_A_TIME):
        if not part.numel():
            continue
        product = torch.empty((part.numel(), n), dtype=torch.float64, device=a.device)
        for block_rows, block_columns, block in products(
            _take(a, part),
            b,
            a_scales=a_scales[part] if scales_of_rows and a_scales is not None else a_scales,
            b_scales=b_scales,
            recipe=recipe,
            a_offset=a_offset,
            b_offset=b_offset,
        ):
            product[block_rows, block_columns] = block
        _store(d, part, _finish(product, None if c is None else c[part], part, epilogue), epilogue)


def _scales_of_interleaved_rows(b_scales: Tensor, n: int) -> Tensor:
    blocks = 2 * ceil_div(n // 2, SCALE_BLOCK)
    if b_scales.shape[0] != blocks:
        raise ProblemError(
            f"b has {n} interleaved rows and scales {tuple(b_scales.shape)}; accepted are {blocks} scales of 128 x 128,"
            " gate's and up's in turn, along n"
        )
    return rows_of_gate_up_blocks(b_scales)[:n]


def swiglu(gate: Tensor, up: Tensor, limit: float | None = None) -> Tensor:
    """``silu(gate) * up``; gate is first clamped to at most ``limit``, up to plus and minus it. NaN stays NaN."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate) * up


def _finish(x: Tensor, c: Tensor | None, rows: Tensor, epilogue: Epilogue) -> Tensor:
    if isinstance(epilogue.alpha, Tensor):
        x = x * epilogue.alpha.to(torch.float64).reshape(())
    elif epilogue.alpha != 1.0:
        x = x * epilogue.alpha
    if c is not None:
        x = x + c
    if epilogue.bias is not None:
        x = x + epilogue.bias.to(torch.float64)
    if epilogue.swiglu:
        x = swiglu(*split_gate_up(x, 1), epilogue.limit)
    if epilogue.row_weights is not None:
        x = x * epilogue.row_weights[rows, None].to(torch.float64)
    return x


def _store(d: Output, rows: Tensor, x: Tensor, epilogue: Epilogue) -> None:
    if isinstance(d, Tensor):
        d[rows] = round_to_bf16(x) if d.dtype == torch.bfloat16 else x.to(d.dtype)
        return
    values, scales = d
    packed = scales.dtype == torch.int32
    expected = ceil_div(x.shape[1], epilogue.gran_k)
    expected = ceil_div(expected, 4) if packed else expected
    if scales.shape != (values.shape[0], expected):
        raise ProblemError(
            f"d's scales have shape {tuple(scales.shape)}; accepted is {(values.shape[0], expected)}"
            f" for {x.shape[1]} columns in groups of {epilogue.gran_k}"
        )
    quantized = per_token_cast_to_fp8(x.to(torch.float32), epilogue.use_ue8m0 or packed, epilogue.gran_k, packed)
    values.view(torch.uint8)[rows] = quantized[0].view(torch.uint8)
    scales[rows] = quantized[1]


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``x``; indexing is not there for every FP8 type, so bytes are taken."""
    return x.view(torch.uint8)[rows].view(x.dtype) if x.element_size() == 1 else x[rows]
