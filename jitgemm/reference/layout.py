"""The MN-major, TMA-aligned layout of scales that the GEMM kernels load.

Scales [mn, k_blocks] or [groups, mn, k_blocks] keep their shape; mn gets stride 1, and each
k_block starts at a multiple of 16 bytes. What lies between mn and its aligned size is unspecified.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.reference.fp4 import exponents_to_float
from jitgemm.reference.quantize import align, ceil_div, pack_ue8m0, packed_exponents

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


def empty_packed(sf: Tensor) -> Tensor:
    """An uninitialized tensor for ``sf`` once packed four to an int32 along k."""
    return empty_mn_major((*sf.shape[:-1], ceil_div(sf.shape[-1], 4)), torch.int32, sf.device)


def get_mn_major_tma_aligned_packed_ue8m0_tensor(sf: Tensor) -> Tensor:
    """The exponents of ``sf``, four k_blocks to an int32 (unused bytes zero), in the layout."""
    return empty_packed(sf).copy_(pack_ue8m0(sf, padding=0))


def empty_packed_groups(sf: Tensor, blocks: Sequence[int]) -> Tensor:
    """An uninitialized tensor for ``sf`` [sum of blocks, mn] once packed along K within each group."""
    words = sum(ceil_div(count, 4) for count in blocks)
    return empty_mn_major((sf.shape[1], words), torch.int32, sf.device).mT


def get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf: Tensor, blocks: Sequence[int]) -> Tensor:
    """The exponents of ``sf`` [sum of blocks, mn], packed along K within each group, rows padded to 16 bytes."""
    output, start = empty_packed_groups(sf, blocks), 0
    for part in torch.split(sf, list(blocks)):
        packed = pack_ue8m0(part.mT, padding=0).mT
        output[start : start + packed.shape[0]] = packed
        start += packed.shape[0]
    return output


def unpack_ue8m0_to_mn_major(sf: Tensor, k_blocks: int) -> Tensor:
    """The first ``k_blocks`` scales that each row of ``sf`` holds, four UE8M0 to an int32, as fp32 in the layout."""
    exponents = packed_exponents(sf)[..., :k_blocks]
    output = empty_mn_major(exponents.shape, torch.float32, sf.device)
    return output.copy_(exponents_to_float(exponents))


GATE_UP_RUN = 8
"""Rows of gate, then as many of up, in interleaved weights: the columns of D that one MMA core matrix spans."""

SCALE_BLOCK = 128
"""Rows that share a scale, in scales of blocks."""


def interleave_gate_up(x: Tensor, dim: int, run: int = GATE_UP_RUN) -> Tensor:
    """A copy of ``x``, whose first half along ``dim`` is gate's and second half up's, in alternating runs.

    With runs of 8, for weights of any type, scales of single rows and biases; with runs of 1, for scales of blocks
    (``rows_of_gate_up_blocks`` says which rows they then belong to).

    Raises:
        ProblemError: the extent of ``dim`` is no multiple of two runs.
    """
    dim = _check_gate_up(x, dim, run)
    halves = torch.unflatten(as_bytes(x), dim, (2, -1, run)).transpose(dim, dim + 1)
    return halves.flatten(dim, dim + 2).clone(memory_format=torch.contiguous_format).view(x.dtype)


def deinterleave_gate_up(x: Tensor, dim: int, run: int = GATE_UP_RUN) -> Tensor:
    """Reverse ``interleave_gate_up``.

    Raises:
        ProblemError: the extent of ``dim`` is no multiple of two runs.
    """
    return torch.cat([as_bytes(half) for half in split_gate_up(x, dim, run)], dim).view(x.dtype)


def split_gate_up(x: Tensor, dim: int, run: int = GATE_UP_RUN) -> tuple[Tensor, Tensor]:
    """Gate and up of interleaved ``x``.

    Raises:
        ProblemError: the extent of ``dim`` is no multiple of two runs.
    """
    dim = _check_gate_up(x, dim, run)
    gate, up = torch.unflatten(as_bytes(x), dim, (-1, 2, run)).unbind(dim + 1)
    return gate.flatten(dim, dim + 1).view(x.dtype), up.flatten(dim, dim + 1).view(x.dtype)


def rows_of_gate_up_blocks(sf: Tensor) -> Tensor:
    """Scales of blocks of interleaved weights, [2 * blocks, k_blocks], one for each row: [2 * blocks * 128, k_blocks].

    Scales 2i and 2i + 1 belong to gate and up among the rows from 256i on.
    """
    blocks, k_blocks = sf.shape
    of_pairs = torch.unflatten(sf, 0, (blocks // 2, 1, 2, 1))
    return of_pairs.expand(-1, SCALE_BLOCK // GATE_UP_RUN, -1, GATE_UP_RUN, -1).reshape(-1, k_blocks)


def slice_scales(sf: Tensor, dim: int, start: int, size: int, gran: int = SCALE_BLOCK) -> tuple[Tensor, int]:
    """The scales of ``size`` elements from ``start`` on along ``dim``, where ``gran`` elements share one.

    Returns:
        The scales, from that of the group which holds element ``start``, and how many elements of it lie before.
    """
    first, last = start // gran, ceil_div(start + size, gran)
    return sf.narrow(dim, first, last - first), start % gran


def _check_gate_up(x: Tensor, dim: int, run: int) -> int:
    if x.shape[dim] % (2 * run):
        raise ProblemError(f"gate and up have {x.shape[dim]} rows; accepted is a multiple of {2 * run}")
    return dim % x.dim()


def as_bytes(x: Tensor) -> Tensor:
    """FP8 as integers: not every operation is there for every FP8 type."""
    return x.view(torch.uint8) if x.element_size() == 1 else x
