"""Casts to FP8 E4M3 with one fp32 scale per group of elements, and back.

A group's scale is its largest magnitude, at least 1e-4, times the fp32 reciprocal of 448 (the largest E4M3 value);
its elements are multiplied by the scale's reciprocal in fp32 and rounded to nearest even. With
``use_ue8m0`` the scale is rounded up to a power of two.

The bits are those of DeepGEMM's casts on CUDA tensors, where torch divides by a constant in that way.

Every function is written so that its last, partial group counts as if padded with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4
"""Groups with smaller magnitudes get the scale of this one, so that no scale is zero."""

Group = tuple[int | None, int | None]
"""Rows and columns that share one scale; None means all of them."""


def ceil_div(x: int, y: int) -> int:
    """``x / y``, rounded up."""
    return (x + y - 1) // y


def align(x: int, y: int) -> int:
    """``x``, rounded up to a multiple of ``y``."""
    return ceil_div(x, y) * y


def ceil_to_ue8m0(x: Tensor) -> Tensor:
    """The magnitudes of ``x`` rounded up to powers of two from 2^-126 to 2^127, as fp32.

    What exceeds 2^127, Inf and NaN included, becomes 2^127.
    """
    bits = x.abs().float().view(torch.int32)
    exponent = (bits >> 23) + (bits & 0x7FFFFF).ne(0).to(torch.int32)
    return (exponent.clamp(1, 254) << 23).view(torch.float32)


def pack_ue8m0(sf: Tensor, padding: int) -> Tensor:
    """The exponents of fp32 powers of two, four to an int32 along the last dimension, the first in the low byte.

    Bytes past the end of the last dimension hold ``padding``. Signs and mantissas are dropped.
    """
    exponents = (sf.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    missing = -sf.shape[-1] % 4
    return torch.nn.functional.pad(exponents, (0, missing), value=padding).view(torch.int32)


def unpack_ue8m0(packed: Tensor) -> Tensor:
    """Reverse ``pack_ue8m0``, padding included: four fp32 powers of two per int32."""
    return (packed.contiguous().view(torch.uint8).to(torch.int32) << 23).view(torch.float32)


def per_token_cast_to_fp8(
    x: Tensor, use_ue8m0: bool = False, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """E4M3 ``x`` [m, k] and scales [m, ceil(k / gran_k)] of groups of 1 x gran_k.

    With ``use_packed_ue8m0`` the scales are int32 [m, ceil(that / 4)], four exponents each; unused
    bytes hold the exponent of 1.
    """
    m, k = x.shape
    groups = _padded(x, 1, gran_k).view(m, ceil_div(k, gran_k), gran_k)
    values, sf = _cast_groups(groups, (2,), use_ue8m0)
    values, sf = values.view(m, align(k, gran_k))[:, :k].contiguous(), sf.squeeze(2)
    return values, pack_ue8m0(sf, padding=127) if use_packed_ue8m0 else sf


def per_channel_cast_to_fp8(x: Tensor, use_ue8m0: bool = False, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """E4M3 ``x`` [k, n] and scales [ceil(k / gran_k), n] of groups of gran_k x 1."""
    k, n = x.shape
    groups = _padded(x, gran_k, 1).view(ceil_div(k, gran_k), gran_k, n)
    values, sf = _cast_groups(groups, (1,), use_ue8m0)
    return values.view(align(k, gran_k), n)[:k].contiguous(), sf.squeeze(1)


def per_block_cast_to_fp8(x: Tensor, use_ue8m0: bool = False, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """E4M3 ``x`` [n, k] and scales [ceil(n / gran_k), ceil(k / gran_k)] of groups of gran_k x gran_k."""
    n, k = x.shape
    groups = _padded(x, gran_k, gran_k).view(ceil_div(n, gran_k), gran_k, ceil_div(k, gran_k), gran_k)
    values, sf = _cast_groups(groups, (1, 3), use_ue8m0)
    return values.view(align(n, gran_k), align(k, gran_k))[:n, :k].contiguous(), sf.squeeze((1, 3))


def dequantize(x: Tensor, scales: Tensor, group: Group, dtype: torch.dtype = torch.float32) -> Tensor:
    """``x`` [rows, columns] times its scales, one for each ``group``; float64 holds the products exactly.

    Raises:
        ValueError: ``scales`` is not [ceil(rows / group rows), ceil(columns / group columns)].
    """
    expected = tuple(1 if size is None else ceil_div(extent, size) for extent, size in zip(x.shape, group, strict=True))
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"scales have shape {tuple(scales.shape)}; groups of {group} in {tuple(x.shape)} are {expected}"
        )
    scales = scales.to(dtype)
    for dim, size in enumerate(group):
        if size is not None and size > 1:
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, x.shape[dim])
    return x.to(dtype) * scales


def cast_back_from_fp8(
    x: Tensor, sf: Tensor, group: Group = (1, 128), use_packed_ue8m0: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Undo a cast; ``group`` is (1, gran_k) per token, (gran_k, 1) per channel, (gran_k, gran_k) per block."""
    if use_packed_ue8m0:
        sf = unpack_ue8m0(sf)
        if group[1] is not None:
            sf = sf[:, : ceil_div(x.shape[1], group[1])]
    return dequantize(x, sf, group, dtype)


def _padded(x: Tensor, row_multiple: int, column_multiple: int) -> Tensor:
    rows, columns = -x.shape[0] % row_multiple, -x.shape[1] % column_multiple
    return torch.nn.functional.pad(x, (0, columns, 0, rows)) if rows or columns else x.contiguous()


def _cast_groups(groups: Tensor, dims: tuple[int, ...], use_ue8m0: bool) -> tuple[Tensor, Tensor]:
    """E4M3 values and scales, where ``dims`` of ``groups`` run within a group; the scales keep them, with size 1."""
    amax = groups.abs().float().amax(dim=dims, keepdim=True).clamp(min=SMALLEST_AMAX)
    sf = amax * amax.new_tensor(1 / E4M3_MAX)
    if use_ue8m0:
        sf = ceil_to_ue8m0(sf)
    scaled = groups * (1.0 / sf)
    if use_ue8m0:
        # An fp32 scale of Inf has made an Inf a NaN already. E4M3 has no Inf, and what torch casts it to depends on
        # its version.
        scaled = scaled.masked_fill(scaled.isinf(), float("nan"))
    return scaled.to(torch.float8_e4m3fn), sf
