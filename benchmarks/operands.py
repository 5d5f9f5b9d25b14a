"""Random operands of every recipe, views of them with poison around, and what the products should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import jitgemm
from jitgemm.reference import gemm as reference
from jitgemm.reference.layout import get_tma_aligned_size
from jitgemm.reference.quantize import E4M3_MAX, SMALLEST_AMAX, Group, ceil_div

D_DTYPES = reference.D_DTYPES

# A NaN of each type, as bits: poison for what must be written, or must not be read, or must not be touched.
_POISON = {1: (torch.uint8, 0x7F), 2: (torch.int16, 0x7FA5), 4: (torch.int32, 0x7FA5A5A5)}


@dataclass(frozen=True)
class Operands:
    """A [m, k] and B [n, k] with their scales."""

    recipe: str
    a: Tensor
    a_scales: Tensor | None
    b: Tensor
    b_scales: Tensor | None

    def product(self, d_dtype: str, rows: Tensor | None = None, c: Tensor | None = None) -> Tensor:
        """``A @ B^T (+ C)`` in float64, rounded once; only some rows if given (they depend on no other row of A)."""
        a, a_scales = self.a, self.a_scales
        if rows is not None:
            if a_scales is not None and a_scales.numel() > 1:
                a_scales = a_scales[rows]
            a, c = _take(a, rows), None if c is None else c[rows]
        return reference.gemm(
            a, self.b, c, a_scales=a_scales, b_scales=self.b_scales, recipe=self.recipe, d_dtype=d_dtype
        )


def random_matrix(rows: int, columns: int, generator: torch.Generator, spread: bool = False) -> Tensor:
    """Normally distributed bf16; ``spread`` gives each row and 128 columns another magnitude, from 0.5 to 2."""
    device = generator.device
    x = torch.randn((rows, columns), dtype=torch.bfloat16, device=device, generator=generator)
    if spread:
        magnitudes = torch.rand((rows, ceil_div(columns, 128)), device=device, generator=generator) * 1.5 + 0.5
        x *= magnitudes.repeat_interleave(128, 1)[:, :columns]
    return x


def quantize(recipe: str, a: Tensor, b: Tensor) -> Operands:
    """Matrices cast as a recipe wants them; scales row-major."""
    groups = reference.SCALE_GROUPS[recipe]
    if groups is None:
        return Operands(recipe, a, None, b, None)
    (a, a_scales), (b, b_scales) = _cast(a, groups[0]), _cast(b, groups[1])
    return Operands(recipe, a, a_scales, b, b_scales)


def _cast(x: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    if group == (1, 128):
        return jitgemm.per_token_cast_to_fp8(x)
    if group == (128, 128):
        return jitgemm.per_block_cast_to_fp8(x)
    amax = x.abs().amax(dim=1, keepdim=True) if group[0] == 1 else x.abs().amax()
    scales = amax.float().clamp(min=SMALLEST_AMAX) / E4M3_MAX
    return (x.float() / scales).to(torch.float8_e4m3fn), scales if group[0] == 1 else scales.reshape(1)


def sample_rows(m: int, generator: torch.Generator, count: int = 256, last: int = 128) -> Tensor:
    """Indices of random rows, and of the last ones, where a tile may be cut."""
    drawn = torch.randperm(m, device=generator.device, generator=generator)[:count]
    tail = torch.arange(max(m - last, 0), m, device=generator.device)
    return torch.cat([drawn, tail]).unique()


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor of NaN."""
    bits, value = _POISON[dtype.itemsize]
    return torch.full(tuple(shape), value, dtype=bits, device=device).view(dtype)


class Embedded:
    """A matrix with poison around: a row above and below, and margins at the sides."""

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, margin: tuple[int, int], unit: int = 1
    ) -> None:
        """Make room for a matrix, all poison.

        Args:
            shape: of the matrix.
            dtype: of its elements.
            device: where it is.
            margin: elements before and after each row.
            unit: the row stride is a multiple of so many elements.
        """
        rows, columns = shape
        before, after = margin
        width = ceil_div(before + columns + after, unit) * unit
        self._parent = poisoned((rows + 2, width), dtype, device)
        self._columns = slice(before, before + columns)
        self.view = self._parent[1:-1, self._columns]

    def fill(self, x: Tensor) -> Tensor:
        """Copy ``x`` into the matrix, which is returned."""
        bits = _POISON[x.dtype.itemsize][0]
        self.view.view(bits).copy_(x.view(bits))
        return self.view

    def intact(self) -> bool:
        """Whether all around the matrix is as it was."""
        bits, value = _POISON[self._parent.dtype.itemsize]
        whole = self._parent.view(bits)
        around = (whole[0], whole[-1], whole[:, : self._columns.start], whole[:, self._columns.stop :])
        return all(bool((part == value).all()) for part in around)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    bits = _POISON[x.dtype.itemsize][0]
    return torch.equal(x.contiguous().view(bits), y.contiguous().view(bits))


def lay_out_scales(scales: Tensor, how: str) -> Tensor:
    """Scales [mn, groups] (or fewer dimensions) laid out as a ``Case`` says, with poison where nothing must be read."""
    if scales.numel() == 1:
        return scales
    if how == "row_major" or (scales.shape[1] == 1 and how != "strided"):
        return scales.contiguous()
    if how == "strided":
        rows, columns = scales.shape
        return Embedded((rows, columns), scales.dtype, scales.device, (3, 2)).fill(scales)
    mn, groups = scales.shape
    stride = get_tma_aligned_size(mn, 4)
    offset = 1 if how == "mn_major_shifted" else 0
    storage = poisoned((stride * groups + offset,), scales.dtype, scales.device)
    return storage.as_strided((mn, groups), (1, stride), offset).copy_(scales)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of a matrix; indexing does not serve every FP8 type on every device."""
    return x.view(torch.uint8)[rows].view(x.dtype)
