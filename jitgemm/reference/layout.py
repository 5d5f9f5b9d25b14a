"""The MN-major, TMA-aligned layout of scales that the GEMM kernels load.

Scales [mn, k_blocks] or [groups, mn, k_blocks] keep their shape; mn gets stride 1, and each
k_block starts at a multiple of 16 bytes. What lies between mn and its aligned size is unspecified.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jitgemm.reference.quantize import align, ceil_div, pack_ue8m0

TMA_ALIGNMENT = 16
"""Bytes; of addresses and of all strides but the innermost."""


def get_tma_aligned_size(mn: int, element_size: int) -> int:
    """``mn`` rounded up so that so many elements of ``element_size`` bytes are a multiple of 16 bytes."""
    return align(mn, TMA_ALIGNMENT // element_size)


def mn_major_strides(shape: Sequence[int], element_size: int) -> tuple[int, ...]:
    """Strides of scales of ``shape`` in the layout."""
    aligned_mn = get_tma_aligned_size(shape[-2], element_size)
    return (aligned_mn * shape[-1], 1, aligned_mn)[-len(shape) :]


def has_mn_major_strides(sf: Tensor) -> bool:
    """Whether the strides of ``sf`` are those of the layout; a single group may have any group stride."""
    strides = mn_major_strides(sf.shape, sf.element_size())
    return sf.stride()[-2:] == strides[-2:] and (sf.dim() == 2 or sf.shape[0] == 1 or sf.stride(0) == strides[0])


def empty_mn_major(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor in the layout, its storage padded to the aligned size throughout."""
    strides = mn_major_strides(shape, dtype.itemsize)
    size = strides[-1] * shape[-1] * (shape[0] if len(shape) == 3 else 1)
    return torch.empty(size, dtype=dtype, device=device).as_strided(tuple(shape), strides)


def get_mn_major_tma_aligned_tensor(sf: Tensor) -> Tensor:
    """A copy of ``sf`` in the layout."""
    return empty_mn_major(sf.shape, sf.dtype, sf.device).copy_(sf)


def packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of scales of ``shape`` once packed four to an int32 along k."""
    return (*shape[:-1], ceil_div(shape[-1], 4))


def get_mn_major_tma_aligned_packed_ue8m0_tensor(sf: Tensor) -> Tensor:
    """The exponents of ``sf``, four k_blocks to an int32 (unused bytes zero), in the layout."""
    return empty_mn_major(packed_shape(sf.shape), torch.int32, sf.device).copy_(pack_ue8m0(sf, padding=0))
