"""GEMM as float64 computes it from exactly dequantized operands, and how far a result may be from that."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.families.gemm import FP4_RECIPES
from jitgemm.reference.quantize import Group, ceil_div, dequantize, scale_shape

D_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

SCALE_GROUPS: dict[str, tuple[Group, Group] | None] = {
    "fp8_1x128_128x128": ((1, 128), (128, 128)),
    "fp8_1x128_1x128": ((1, 128), (1, 128)),
    "fp8_rowwise": ((1, None), (1, None)),
    "fp8_tensorwise": ((None, None), (None, None)),
    "bf16": None,
}
"""Recipe -> what shares one scale in A [m, k] and in B [n, k]; None where there are no scales."""

OPERAND_GROUPS: dict[str, tuple[Group, Group | None] | None] = {
    **SCALE_GROUPS,
    **{name: ((1, recipe.a_group), None) for name, recipe in FP4_RECIPES.items()},
}
"""The same with FP4, whose B are plain numbers here: ``jitgemm.reference.fp4.dequantize_fp4`` gives them."""

LAYOUTS = ("nt", "nn", "tn", "tt")

# The float64 copies are made for so many rows at a time, which bounds their memory whatever the problem.
_CHUNK_ELEMENTS = 1 << 24
_CHUNK_ROWS = 4096
_ROW_MULTIPLE = 128


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    recipe: str,
    layout: str = "nt",
    d_dtype: str = "bf16",
    a_offset: int = 0,
    b_offset: tuple[int, int] = (0, 0),
) -> Tensor:
    """``D = A @ B^T (+ C)`` [m, n]: the product of the exactly dequantized operands in float64, rounded once.

    Args:
        a: [m, k], or [k, m] where the layout's first letter is ``t``.
        b: [n, k] where the layout's second letter is ``t``, else [k, n].
        c: added to the product; [m, n].
        a_scales: fp32; [m, ceil(k / 128)], [m] or [m, 1] (rowwise), or one element (tensorwise).
        b_scales: fp32; [ceil(n / 128), ceil(k / 128)], [n, ceil(k / 128)], [n] or [n, 1], or one element.
        recipe: a key of ``OPERAND_GROUPS``.
        layout: ``nt``, ``nn``, ``tn`` or ``tt``.
        d_dtype: ``bf16`` or ``fp32``.
        a_offset: elements of k between the start of A's first scale group and A, where A was cut from a larger
            matrix inside a group; its scales then begin with that group's.
        b_offset: the same for B, along n and k.

    Raises:
        ProblemError: an unknown recipe, layout or output type, or shapes that don't fit each other.
    """
    _check_choice("recipe", recipe, OPERAND_GROUPS)
    _check_choice("layout", layout, LAYOUTS)
    _check_choice("d_dtype", d_dtype, D_DTYPES)
    if layout[0] == "t":
        a = a.mT
    if layout[1] == "n":
        b = b.mT
    m, n = a.shape[0], b.shape[0]
    if a.shape[1] != b.shape[1]:
        raise ProblemError(f"b has k = {b.shape[1]} in layout {layout}; a has k = {a.shape[1]}")
    if c is not None and c.shape != (m, n):
        raise ProblemError(f"c has shape {tuple(c.shape)}; accepted is {(m, n)}")
    d = torch.empty((m, n), dtype=D_DTYPES[d_dtype], device=a.device)
    for rows, columns, block in products(
        a, b, a_scales=a_scales, b_scales=b_scales, recipe=recipe, a_offset=a_offset, b_offset=b_offset
    ):
        if c is not None:
            block += c[rows, columns]
        d[rows, columns] = round_to_bf16(block) if d_dtype == "bf16" else block
    return d


def products(
    a: Tensor,
    b: Tensor,
    *,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    recipe: str,
    a_offset: int = 0,
    b_offset: tuple[int, int] = (0, 0),
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The blocks of ``A @ B^T`` in float64, each with its rows and columns.

    Args are those of ``gemm``, with A [m, k] and B [n, k].

    Raises:
        ProblemError: scales that don't fit the operands.
    """
    a_group, b_group = OPERAND_GROUPS[recipe] or (None, None)
    for columns in _chunks(b):
        b_part = _operand("b", b, b_scales, b_group, columns, b_offset)
        for rows in _chunks(a):
            yield rows, columns, _operand("a", a, a_scales, a_group, rows, (0, a_offset)) @ b_part.mT


def round_to_bf16(x: Tensor) -> Tensor:
    """Float64 to the nearest bf16, ties to even.

    ``x.to(torch.bfloat16)`` rounds twice, through fp32. Here the step through fp32 rounds to odd:
    an inexact result keeps a last bit of 1, so that the step to bf16 can't mistake it for a tie.
    """
    single = x.to(torch.float32)
    bits = single.view(torch.int32)
    error = single.to(torch.float64).abs() - x.abs()  # NaN for Inf and NaN, which need no correction
    bits = torch.where((error < 0) & (bits & 1 == 0), bits + 1, bits)
    bits = torch.where((error > 0) & (bits & 1 == 0), bits - 1, bits)
    return bits.view(torch.float32).to(torch.bfloat16)


class Errors(NamedTuple):
    """Distance of a result from the reference, or a bound on it."""

    cosine: float
    """``1 - 2<x,y> / (<x,x> + <y,y>)``."""
    frobenius: float
    """``|x - y| / |y|``, where y is the reference."""

    def within(self, bounds: Errors) -> bool:
        """Whether both are below ``bounds``; NaN is not."""
        return self.cosine < bounds.cosine and self.frobenius < bounds.frobenius


def error_measures(actual: Tensor, expected: Tensor) -> Errors:
    """Measure ``actual`` against ``expected`` in float64; a NaN or an Inf in either gives NaN or Inf.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"actual has shape {tuple(actual.shape)}; expected has {tuple(expected.shape)}")
    if expected.dim() < 2:
        actual, expected = actual.reshape(1, -1), expected.reshape(1, -1)
    sums = torch.zeros(3, dtype=torch.float64, device=expected.device)
    for rows in _chunks(expected):
        x, y = actual[rows].to(torch.float64), expected[rows].to(torch.float64)
        sums += torch.stack([(x - y).square().sum(), x.square().sum(), y.square().sum()])
    difference, xx, yy = sums.tolist()
    # <x,x> - 2<x,y> + <y,y> as |x - y|^2: nothing cancels.
    return Errors(_ratio(difference, xx + yy), _ratio(difference, yy) ** 0.5)


_FP8_BOUNDS = {"bf16": Errors(1e-5, 3e-3), "fp32": Errors(1e-6, 1e-3)}
_BF16_BOUNDS = {"bf16": Errors(1e-5, 3e-3), "fp32": Errors(1e-8, 1e-4)}
# Provisional, until measured: the tensor cores keep about 14 bits of a sum, here over all of K.
_FAST_ACCUM_BOUNDS = Errors(2e-4, 3e-2)


def tolerance(recipe: str, d_dtype: str, fast_accum: bool = False) -> Errors:
    """What a kernel's result must stay below; ``fast_accum`` (FP8 without promotion of partial sums) has its own bound.

    Raises:
        ProblemError: an unknown recipe or output type.
    """
    _check_choice("recipe", recipe, OPERAND_GROUPS)
    _check_choice("d_dtype", d_dtype, D_DTYPES)
    if fast_accum:
        return _FAST_ACCUM_BOUNDS
    return (_BF16_BOUNDS if recipe == "bf16" else _FP8_BOUNDS)[d_dtype]


def check_close(
    actual: Tensor, expected: Tensor, *, recipe: str, d_dtype: str, fast_accum: bool = False, what: str = "D"
) -> Errors:
    """The errors of ``actual``, a kernel's ``d_dtype`` result called ``what``, once found within ``tolerance``.

    Raises:
        AssertionError: another shape or dtype, or an error that is not below its bound; says where it is worst.
    """
    bounds = tolerance(recipe, d_dtype, fast_accum)
    if actual.shape != expected.shape:
        raise AssertionError(f"{what} has shape {tuple(actual.shape)}; expected is {tuple(expected.shape)}")
    if actual.dtype != D_DTYPES[d_dtype]:
        raise AssertionError(f"{what} has dtype {actual.dtype}; expected is {D_DTYPES[d_dtype]}")
    errors = error_measures(actual, expected)
    if errors.within(bounds):
        return errors

    distance = (actual.to(torch.float64) - expected.to(torch.float64)).abs().nan_to_num(nan=float("inf"))
    worst = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
    raise AssertionError(
        f"{what} {tuple(actual.shape)} of {recipe}{' with fast_accum' if fast_accum else ''} is not close:"
        f" cosine error {errors.cosine:.3g} (bound {bounds.cosine:g}),"
        f" Frobenius error {errors.frobenius:.3g} (bound {bounds.frobenius:g});"
        f" {int((~actual.isfinite()).sum())} elements not finite, expected {int((~expected.isfinite()).sum())};"
        f" worst at {worst}: {actual[worst].item():g}, expected {expected[worst].item():g}"
    )


def _operand(
    name: str, x: Tensor, scales: Tensor | None, group: Group | None, rows: slice, offset: tuple[int, int]
) -> Tensor:
    """Rows of an operand, dequantized to float64."""
    if group is None:
        if scales is not None:
            raise ProblemError(f"{name}_scales are given; bf16 operands have none")
        return x[rows].to(torch.float64)
    if scales is None:
        raise ProblemError(f"{name}_scales are None; fp8 operands need scales")
    if group[0] is None:
        if scales.numel() != 1:
            raise ProblemError(f"{name}_scales have shape {tuple(scales.shape)}; accepted is one element")
        scales = scales.reshape(1, 1)
    else:
        if group[1] is None and scales.dim() == 1:
            scales = scales[:, None]
        expected = scale_shape(x.shape, group, offset)
        if tuple(scales.shape) != expected:
            raise ProblemError(f"{name}_scales have shape {tuple(scales.shape)}; accepted is {expected}")
        start, stop = offset[0] + rows.start, offset[0] + rows.stop
        scales = scales[start // group[0] : ceil_div(stop, group[0])]
        offset = start % group[0], offset[1]
    return dequantize(x[rows], scales, group, torch.float64, offset)


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of ``x`` that keep to the limits above."""
    rows = x.shape[0]
    step = min(_CHUNK_ELEMENTS // max(x[:1].numel(), 1), _CHUNK_ROWS)
    step = max(step // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _ratio(numerator: float, denominator: float) -> float:
    if denominator == 0:
        return 0.0 if numerator == 0 else float("inf")
    return numerator / denominator


def _check_choice(name: str, value: str, accepted: Collection[str]) -> None:
    if value not in accepted:
        raise ProblemError(f"{name} is {value!r}; accepted is {', '.join(accepted)}")
