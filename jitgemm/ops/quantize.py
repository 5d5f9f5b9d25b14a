"""Casts to FP8 E4M3 with scales, as ``fp8_gemm_*`` takes them.

They run as torch operations on tensors of any device; none is differentiable. A NaN makes its
group's scale and all its elements NaN, an Inf its group's scale Inf; with ``use_ue8m0`` the scale is
2^127 instead and only the NaN and Inf elements are NaN. Either way, what depends on them shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.ops.dispatch import needs_dispatch
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
    return reference.per_token_cast_to_fp8(x, use_ue8m0, gran_k, use_packed_ue8m0)


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
    return reference.per_channel_cast_to_fp8(x, use_ue8m0, gran_k)


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
    return reference.per_block_cast_to_fp8(x, use_ue8m0, gran_k)


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
