"""Casts to FP8 E4M3 with one fp32 scale per group of elements, and back.

A group's scale is its largest magnitude, at least 1e-4, times the fp32 reciprocal of 448 (the largest E4M3 value);
its elements are multiplied by the scale's reciprocal in fp32 and rounded to nearest even. With
``use_ue8m0`` the scale is rounded up to a power of two.

The bits are those of DeepGEMM's casts on CUDA tensors, where torch divides by a constant in that way.

Every function is written so that its last, partial group counts as if padded with zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
    exponents = torch.nn.functional.pad(exponents, (0, -sf.shape[-1] % 4), value=padding)
    # Flat, because a dimension of size 1 may have any stride.
    return exponents.flatten().view(torch.int32).view(*sf.shape[:-1], exponents.shape[-1] // 4)


def unpack_ue8m0(packed: Tensor) -> Tensor:
    """Reverse ``pack_ue8m0``, padding included: four fp32 powers of two per int32."""
    return (packed_exponents(packed).to(torch.int32) << 23).view(torch.float32)


def packed_exponents(packed: Tensor) -> Tensor:
    """The exponents that int32 hold, padding included: uint8, four times as many in the last dimension."""
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=packed.device)
    return (packed[..., None] >> shifts & 0xFF).to(torch.uint8).flatten(-2)


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


def per_custom_dims_cast_to_fp8(x: Tensor, dims: tuple[int, ...], use_ue8m0: bool) -> tuple[Tensor, Tensor]:
    """E4M3 ``x`` and one scale for each position along ``dims``: all that differ in other dimensions alone share it."""
    kept = {dim % x.dim() for dim in dims}
    within = tuple(dim for dim in range(x.dim()) if dim not in kept)
    values, sf = _cast_groups(x[..., None], (*within, x.dim()), use_ue8m0)  # to reduce no dimension means to reduce all
    return values.squeeze(-1), sf.squeeze()


def per_token_cast_to_fp4(
    x: Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """E2M1 ``x`` [m, k], two to a byte, int8 [m, k / 2], and scales as ``per_token_cast_to_fp8`` returns them.

    An even column's code is in the low half of its byte. Codes are rounded to nearest even; zeros have no sign.
    """
    m, k = x.shape
    groups = _padded(x, 1, gran_k).view(m, ceil_div(k, gran_k), gran_k)
    sf = groups.abs().float().amax(dim=2, keepdim=True).clamp(min=SMALLEST_AMAX) / E2M1_MAX
    if use_ue8m0:
        sf = ceil_to_ue8m0(sf)
    codes = _e2m1_codes(groups * (1.0 / sf)).view(m, align(k, gran_k))[:, :k]
    sf = sf.squeeze(2)
    return pack_nibbles(codes), pack_ue8m0(sf, padding=127) if use_packed_ue8m0 else sf


def cast_back_from_fp4(packed: Tensor, sf: Tensor, gran_k: int = 128, use_packed_ue8m0: bool = False) -> Tensor:
    """Undo ``per_token_cast_to_fp4``: fp32 [m, k]."""
    codes = unpack_nibbles(packed)
    values = torch.tensor(E2M1_VALUES + tuple(-value for value in E2M1_VALUES), device=packed.device)[codes.int()]
    return cast_back_from_fp8(values, sf, (1, gran_k), use_packed_ue8m0)


def transpose_packed_fp4(a: Tensor) -> Tensor:
    """Packed E2M1 [m, k / 2] as its transpose [k, m / 2]."""
    return pack_nibbles(unpack_nibbles(a).T)


E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _e2m1_codes(x: Tensor) -> Tensor:
    """The nearest E2M1 codes, as uint8; NaN becomes 6, for E2M1 has none."""
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for below, (low, high) in enumerate(itertools.pairwise(E2M1_VALUES)):
        middle = (low + high) / 2
        code += ~(magnitude <= middle) if below % 2 == 0 else ~(magnitude < middle)  # a tie goes to the even code
    return code | ((x < 0) & (code != 0)).to(torch.uint8) << 3


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes as uint8, two to a byte of an int8 along the last dimension, the even one in the low half."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).contiguous().view(torch.int8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Reverse ``pack_nibbles``."""
    data = packed.contiguous().view(torch.uint8)
    return torch.stack([data & 0xF, data >> 4], -1).flatten(-2)


def dequantize(
    x: Tensor, scales: Tensor, group: Group, dtype: torch.dtype = torch.float32, offset: tuple[int, int] = (0, 0)
) -> Tensor:
    """``x`` [rows, columns] times its scales, one for each ``group``; float64 holds the products exactly.

    ``offset`` is how many rows and columns of the first group lie before ``x``, a part cut from a larger matrix.

    Raises:
        ValueError: ``scales`` is not [ceil((offset + rows) / group rows), ceil((offset + columns) / group columns)].
    """
    expected = scale_shape(x.shape, group, offset)
    if tuple(scales.shape) != expected:
        cut = f" from {offset} on" if any(offset) else ""
        raise ValueError(
            f"scales have shape {tuple(scales.shape)}; groups of {group} in {tuple(x.shape)}{cut} are {expected}"
        )
    scales = scales.to(dtype)
    for dim, (size, start) in enumerate(zip(group, offset, strict=True)):
        if size is not None and size > 1:
            scales = scales.repeat_interleave(size, dim).narrow(dim, start, x.shape[dim])
    return x.to(dtype) * scales


def scale_shape(shape: Sequence[int], group: Group, offset: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """How many scales a matrix of ``shape`` has, whose first group begins ``offset`` before it."""
    rows, columns = (
        1 if size is None else ceil_div(start + extent, size)
        for extent, size, start in zip(shape, group, offset, strict=True)
    )
    return rows, columns


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
