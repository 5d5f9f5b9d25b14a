"""Casts to FP8 E4M3 with scales, as ``fp8_gemm_*`` takes them.

None is differentiable. On CUDA tensors kernels compute, for groups of 16, 32, 64 and 128; for others, and on CPU
tensors, torch operations with the same bits. A NaN makes its
group's scale and all its elements NaN, an Inf its group's scale Inf; with ``use_ue8m0`` the scale is
2^127 instead and only the NaN and Inf elements are NaN. Either way, what depends on them shows it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.families.rowwise import GROUPS
from jitgemm.ops.dispatch import needs_dispatch
from jitgemm.ops.rowwise import cast_rows
from jitgemm.ops.rowwise_launch import Quantizer, on_gpu, operation_of, tell
from jitgemm.ops.tiles_launch import cast_back_tiles, cast_tiles, tell_tiles
from jitgemm.reference import quantize as reference

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_GRAN_MULTIPLE = 16


def per_token_cast_to_fp8(
    x: Tensor, use_ue8m0: bool = False, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """Cast each row of ``x`` in groups of ``gran_k`` elements (an activation, or weights scaled 1 x 128).

    Args:
        x: [m, k], bf16, fp16 or fp32, any strides; k need not be a multiple of ``gran_k``.
        use_ue8m0: round scales up to powers of two.
        gran_k: elements of a group, a multiple of 16.
        use_packed_ue8m0: return the exponents of the scales, four to an int32 along k, the first in
            the low byte, unused bytes holding the exponent of 1; needs ``use_ue8m0``.

    Returns:
        E4M3 [m, k], and fp32 scales [m, ceil(k / gran_k)] or int32 [m, ceil(that / 4)].

    Raises:
        ProblemError: an argument is not of that kind.
    """
    check_cast(x, gran_k)
    check_packing(use_ue8m0, use_packed_ue8m0)
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x):
        result: tuple[Tensor, Tensor] = torch.ops.jitgemm.per_token_cast_to_fp8(x, use_ue8m0, gran_k, use_packed_ue8m0)
        return result
    return per_token(x, use_ue8m0, gran_k, use_packed_ue8m0)


def per_channel_cast_to_fp8(x: Tensor, use_ue8m0: bool = False, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """Cast each column of ``x`` in groups of ``gran_k`` rows.

    Args:
        x: [k, n], bf16, fp16 or fp32, any strides; k need not be a multiple of ``gran_k``.
        use_ue8m0: round scales up to powers of two.
        gran_k: elements of a group, a multiple of 16.

    Returns:
        E4M3 [k, n] and fp32 scales [ceil(k / gran_k), n].

    Raises:
        ProblemError: an argument is not of that kind.
    """
    check_cast(x, gran_k)
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x):
        result: tuple[Tensor, Tensor] = torch.ops.jitgemm.per_channel_cast_to_fp8(x, use_ue8m0, gran_k)
        return result
    return per_channel(x, use_ue8m0, gran_k)


def per_block_cast_to_fp8(x: Tensor, use_ue8m0: bool = False, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """Cast ``x`` in blocks of ``gran_k`` x ``gran_k`` elements (weights).

    Args:
        x: [n, k], bf16, fp16 or fp32, any strides; neither need be a multiple of ``gran_k``.
        use_ue8m0: round scales up to powers of two.
        gran_k: rows and columns of a block, a multiple of 16.

    Returns:
        E4M3 [n, k] and fp32 scales [ceil(n / gran_k), ceil(k / gran_k)].

    Raises:
        ProblemError: an argument is not of that kind.
    """
    check_cast(x, gran_k)
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x):
        result: tuple[Tensor, Tensor] = torch.ops.jitgemm.per_block_cast_to_fp8(x, use_ue8m0, gran_k)
        return result
    return per_block(x, use_ue8m0, gran_k)


def cast_back_from_fp8(
    x: Tensor,
    sf: Tensor,
    gran_k: int | tuple[int | None, int | None] = 128,
    use_packed_ue8m0: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Undo a cast: elements times their scales, in fp32, rounded once.

    Args:
        x: E4M3 [rows, columns], any strides.
        sf: fp32 [ceil(rows / group rows), ceil(columns / group columns)], any strides; or, packed, int32 with a
            quarter of the columns, rounded up.
        gran_k: columns of a row that share a scale, for casts per token; else rows and columns that do, None for all:
            (gran_k, 1) per channel, (gran_k, gran_k) per block.
        use_packed_ue8m0: the scales are exponents, four to an int32 along the columns.
        dtype: of the result: bf16, fp16 or fp32.

    Returns:
        [rows, columns].

    Raises:
        ProblemError: an argument is not of that kind.
    """
    group = (1, gran_k) if isinstance(gran_k, int) else gran_k
    rows, columns = check_cast_back(x, sf, group, use_packed_ue8m0, dtype)
    x, sf = x.detach() if x.requires_grad else x, sf.detach() if sf.requires_grad else sf
    if needs_dispatch(x, sf):
        result: Tensor = torch.ops.jitgemm.cast_back_from_fp8(x, sf, rows, columns, use_packed_ue8m0, dtype)
        return result
    return cast_back(x, sf, rows, columns, use_packed_ue8m0, dtype)


# -- Where a call is computed. Arguments are checked.


def per_token(x: Tensor, use_ue8m0: bool, gran_k: int, use_packed_ue8m0: bool) -> tuple[Tensor, Tensor]:
    """``per_token_cast_to_fp8``."""
    if gran_k not in GROUPS or not x.shape[1]:
        return reference.per_token_cast_to_fp8(x, use_ue8m0, gran_k, use_packed_ue8m0)
    quantizer = _per_token_quantizer(use_ue8m0, gran_k, use_packed_ue8m0)
    if on_gpu(x):
        return cast_rows(x, quantizer)
    tell(operation_of("cast", quantizer), x, x.shape[1])
    return reference.per_token_cast_to_fp8(x, use_ue8m0, gran_k, use_packed_ue8m0)


@functools.cache
def _per_token_quantizer(use_ue8m0: bool, gran_k: int, use_packed_ue8m0: bool) -> Quantizer:
    scales = "ue8m0" if use_packed_ue8m0 else "pow2" if use_ue8m0 else "fp32_reciprocal"
    return Quantizer("e4m3", scales, gran_k, packed=use_packed_ue8m0, padding=127)


def per_channel(x: Tensor, use_ue8m0: bool, gran_k: int) -> tuple[Tensor, Tensor]:
    """``per_channel_cast_to_fp8``."""
    if gran_k in GROUPS and x.numel():
        if on_gpu(x):
            return cast_tiles("per_channel", x, use_ue8m0, gran_k)
        tell_tiles("per_channel", x, use_ue8m0, gran_k)
    return reference.per_channel_cast_to_fp8(x, use_ue8m0, gran_k)


def per_block(x: Tensor, use_ue8m0: bool, gran_k: int) -> tuple[Tensor, Tensor]:
    """``per_block_cast_to_fp8``."""
    if gran_k in GROUPS and x.numel():
        if on_gpu(x):
            return cast_tiles("per_block", x, use_ue8m0, gran_k)
        tell_tiles("per_block", x, use_ue8m0, gran_k)
    return reference.per_block_cast_to_fp8(x, use_ue8m0, gran_k)


def cast_back(x: Tensor, sf: Tensor, rows: int, columns: int, use_packed_ue8m0: bool, dtype: torch.dtype) -> Tensor:
    """``cast_back_from_fp8``; 0 stands for all rows or columns."""
    if on_gpu(x):
        return cast_back_tiles(x, sf, rows, columns, use_packed_ue8m0, dtype)
    return reference.cast_back_from_fp8(x, sf, (rows or None, columns or None), use_packed_ue8m0).to(dtype).contiguous()


def check_cast_back(x: object, sf: object, group: object, use_packed_ue8m0: bool, dtype: object) -> tuple[int, int]:
    """Check the arguments of ``cast_back_from_fp8``; the group, with 0 for None.

    Raises:
        ProblemError: one is not accepted.
    """
    for name, tensor, accepted in (
        ("x", x, torch.float8_e4m3fn),
        ("sf", sf, torch.int32 if use_packed_ue8m0 else torch.float32),
    ):
        if not isinstance(tensor, Tensor):
            raise ProblemError(f"{name} is {type(tensor).__name__}; accepted is a torch.Tensor")
        if tensor.dtype != accepted:
            raise ProblemError(f"{name} has dtype {tensor.dtype}; accepted is {accepted}")
        if tensor.dim() != 2 or tensor.layout != torch.strided:
            raise ProblemError(f"{name} has {tensor.dim()} dimensions; accepted is a strided matrix")
    assert isinstance(x, Tensor) and isinstance(sf, Tensor)
    if sf.device != x.device:
        raise ProblemError(f"sf is on {sf.device} and x on {x.device}; accepted is one device for both")
    if dtype not in _DTYPES:
        raise ProblemError(f"dtype is {dtype}; accepted is {', '.join(map(str, _DTYPES))}")
    if not isinstance(group, (tuple, list)) or len(group) != 2:
        raise ProblemError(f"group is {group!r}; accepted are two sizes, of rows and columns")
    for size in group:
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ProblemError(f"group is {group!r}; accepted are positive integers and None")
    expected = [1 if size is None else reference.ceil_div(n, size) for n, size in zip(x.shape, group, strict=True)]
    if use_packed_ue8m0:
        expected[1] = reference.ceil_div(expected[1], 4)
    if list(sf.shape) != expected:
        raise ProblemError(
            f"sf has shape {tuple(sf.shape)}; groups of {group} in {tuple(x.shape)} are {tuple(expected)}"
        )
    return group[0] or 0, group[1] or 0


def check_cast(x: object, gran_k: object) -> None:
    """Check the arguments that the casts share.

    Raises:
        ProblemError: one is not accepted.
    """
    if not isinstance(x, Tensor):
        raise ProblemError(f"x is {type(x).__name__}; accepted is a torch.Tensor")
    if x.dtype not in _DTYPES:
        raise ProblemError(f"x has dtype {x.dtype}; accepted is {', '.join(map(str, _DTYPES))}")
    if x.dim() != 2 or x.layout != torch.strided:
        raise ProblemError(f"x has {x.dim()} dimensions and layout {x.layout}; accepted is a strided matrix")
    if not isinstance(gran_k, int) or gran_k <= 0 or gran_k % _GRAN_MULTIPLE:
        raise ProblemError(f"gran_k is {gran_k!r}; accepted is a positive multiple of {_GRAN_MULTIPLE}")


def check_packing(use_ue8m0: bool, use_packed_ue8m0: bool) -> None:
    """Check that scales to pack are powers of two.

    Raises:
        ProblemError: they are not.
    """
    if use_packed_ue8m0 and not use_ue8m0:
        raise ProblemError("use_packed_ue8m0 is True with use_ue8m0=False; only powers of two can be packed")
