"""Casts to FP8 and FP4 and back, and arithmetic of sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.ops.quantize import (
    cast_back_from_fp8,
    check_cast,
    check_packing,
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_token_cast_to_fp8,
)
from jitgemm.reference import quantize as reference
from jitgemm.reference.quantize import align, ceil_div, ceil_to_ue8m0

__all__ = [
    "align",
    "cast_back_from_fp4",
    "cast_back_from_fp8",
    "ceil_div",
    "ceil_to_ue8m0",
    "pack_ue8m0_to_int",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_custom_dims_cast_to_fp8",
    "per_token_cast_to_fp4",
    "per_token_cast_to_fp8",
    "transpose_packed_fp4",
    "unpack_ue8m0_from_int",
]


def pack_ue8m0_to_int(x: Tensor) -> Tensor:
    """The exponents of fp32 powers of two, four to an int32 along the last dimension, the first in the low byte.

    Raises:
        ProblemError: another type, a last dimension that is no multiple of 4, or a number that is no power of two.
    """
    if x.dtype != torch.float32 or x.shape[-1] % 4:
        raise ProblemError(
            f"x is {x.dtype} {tuple(x.shape)}; accepted is torch.float32 with a last dimension that 4 divides"
        )
    if (x.contiguous().view(torch.int32) & 0x807FFFFF).any():
        raise ProblemError("x holds a number that is no power of two; accepted are positive powers of two")
    return reference.pack_ue8m0(x, padding=0)


def unpack_ue8m0_from_int(packed_sf: Tensor) -> Tensor:
    """The fp32 powers of two that ``pack_ue8m0_to_int`` packed.

    Raises:
        ProblemError: another type than int32.
    """
    _check_dtype("packed_sf", packed_sf, torch.int32)
    return reference.unpack_ue8m0(packed_sf)


def per_custom_dims_cast_to_fp8(x: Tensor, dims: tuple[int, ...], use_ue8m0: bool) -> tuple[Tensor, Tensor]:
    """Cast ``x`` with one scale for each position along ``dims``, shared along all other dimensions.

    Args:
        x: bf16, fp16 or fp32, of any shape without empty dimensions.
        dims: dimensions of ``x``.
        use_ue8m0: round scales up to powers of two.

    Returns:
        E4M3 of the shape of ``x``; fp32 scales, of the sizes of ``dims`` that are not 1, in their order in ``x``.

    Raises:
        ProblemError: ``x`` is empty, or has no such dimension.
    """
    if not x.numel() or any(not -x.dim() <= dim < x.dim() for dim in dims):
        raise ProblemError(f"x has shape {tuple(x.shape)} and dims is {tuple(dims)}; accepted are dimensions of x")
    return reference.per_custom_dims_cast_to_fp8(x, tuple(dims), use_ue8m0)


def per_token_cast_to_fp4(
    x: Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """Cast each row of ``x`` to E2M1 in groups of ``gran_k`` elements; a group's largest magnitude becomes 6 or less.

    Args:
        x: [m, k], bf16, fp16 or fp32; k even.
        use_ue8m0: round scales up to powers of two.
        gran_k: elements of a group, a multiple of 16.
        use_packed_ue8m0: return exponents of the scales, as ``per_token_cast_to_fp8`` does; needs ``use_ue8m0``.

    Returns:
        int8 [m, k / 2], two codes to a byte, that of the even column in the low half; and the scales.

    Raises:
        ProblemError: an argument is not of that kind.
    """
    check_cast(x, gran_k)
    check_packing(use_ue8m0, use_packed_ue8m0)
    if x.shape[1] % 2:
        raise ProblemError(f"x has {x.shape[1]} columns; accepted is an even number")
    return reference.per_token_cast_to_fp4(x, use_ue8m0, gran_k, use_packed_ue8m0)


def cast_back_from_fp4(packed: Tensor, sf: Tensor, gran_k: int = 128, use_packed_ue8m0: bool = False) -> Tensor:
    """Undo ``per_token_cast_to_fp4``: fp32 [m, k].

    Raises:
        ProblemError: ``packed`` is not int8.
        ValueError: ``sf`` has another number of scales.
    """
    _check_dtype("packed", packed, torch.int8)
    return reference.cast_back_from_fp4(packed, sf, gran_k, use_packed_ue8m0)


def transpose_packed_fp4(a: Tensor) -> Tensor:
    """Packed E2M1 [m, k / 2] as its transpose, packed again: [k, m / 2].

    Raises:
        ProblemError: ``a`` is not an int8 matrix with an even number of rows.
    """
    _check_dtype("a", a, torch.int8)
    if a.dim() != 2 or a.shape[0] % 2:
        raise ProblemError(f"a has shape {tuple(a.shape)}; accepted is a matrix with an even number of rows")
    return reference.transpose_packed_fp4(a)


def _check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise ProblemError(f"{name} has dtype {x.dtype}; accepted is {dtype}")
