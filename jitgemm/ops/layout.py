"""The layout of scales that the GEMM kernels load: MN-major, TMA-aligned.

Scales handed to ``fp8_gemm_*`` in this layout spare it the transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.ops.dispatch import needs_dispatch
from jitgemm.ops.pack_scales import pack_groups, pack_planes
from jitgemm.reference import layout as reference
from jitgemm.reference.quantize import align, ceil_div
from jitgemm.settings import get_mk_alignment_for_contiguous_layout

_ALIGNMENTS = (8, 16, 32, 64, 128)
_MAX_ALIGNMENT = 65536


def get_tma_aligned_size(mn: int, element_size: int) -> int:
    """``mn`` rounded up so that so many elements of ``element_size`` bytes are a multiple of 16 bytes.

    Raises:
        ProblemError: ``mn`` is negative, or ``element_size`` does not divide 16.
    """
    if not isinstance(mn, int) or mn < 0:
        raise ProblemError(f"mn is {mn!r}; accepted is an integer, at least 0")
    if element_size not in (1, 2, 4, 8, 16):
        raise ProblemError(f"element_size is {element_size!r}; accepted is 1, 2, 4, 8 or 16 bytes")
    return reference.get_tma_aligned_size(mn, element_size)


def get_mn_major_tma_aligned_tensor(sf: Tensor) -> Tensor:
    """Scales in the layout that the GEMM kernels load; eagerly, ``sf`` itself where it is in that layout already.

    Args:
        sf: fp32 [mn, k_blocks] or [groups, mn, k_blocks], any strides.

    Returns:
        The same shape and values, with stride 1 along mn, mn rounded up to a multiple of 4 along
        k_blocks, and as much as that takes between groups.

    Raises:
        ProblemError: ``sf`` is not of that kind.
    """
    check_scales(sf)
    sf = sf.detach() if sf.requires_grad else sf
    if needs_dispatch(sf):
        # Always a copy: the address, which decides too, is not known there, and an operator can't return its input.
        result: Tensor = torch.ops.jitgemm.get_mn_major_tma_aligned_tensor(sf)
        return result
    if reference.has_mn_major_strides(sf) and sf.data_ptr() % reference.TMA_ALIGNMENT == 0:
        return sf
    return copy_to_mn_major(sf)


def get_mn_major_tma_aligned_packed_ue8m0_tensor(sf: Tensor) -> Tensor:
    """The exponents of power-of-two scales, four k_blocks to an int32, in the layout that TMA loads.

    Args:
        sf: fp32 [mn, k_blocks] or [groups, mn, k_blocks], any strides; powers of two, of which only
            the exponents are read.

    Returns:
        int32 [mn, ceil(k_blocks / 4)] or [groups, mn, ceil(k_blocks / 4)], the first k_block in the low
        byte and unused bytes zero, with stride 1 along mn, mn rounded up to a multiple of 4 along
        k_blocks, and as much as that takes between groups.

    Raises:
        ProblemError: ``sf`` is not of that kind.
    """
    check_scales(sf)
    sf = sf.detach() if sf.requires_grad else sf
    if needs_dispatch(sf):
        result: Tensor = torch.ops.jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)
        return result
    return pack_planes(sf)


def get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: Tensor,
    grouped_layout: Tensor,
    ks_cpu: Sequence[int] | None,
    gran_k: int,
    k_alignment: int | None = None,
    use_psum_layout: bool = False,
) -> Tensor:
    """The exponents of scales of groups along K, packed group by group.

    Args:
        sf: fp32 [sum of ceil(k / gran_k), mn], the groups one after the other; powers of two, of which only the
            exponents are read.
        grouped_layout: int32 [groups], each group's k; in the psum layout where each ends, which the next one follows
            at the next multiple of ``k_alignment``. Read on the host in the psum layout alone. On sf's device.
        ks_cpu: each group's k; not used in the psum layout.
        gran_k: elements of K that share a scale.
        k_alignment: by default what ``set_mk_alignment_for_contiguous_layout`` declared.
        use_psum_layout: what ``grouped_layout`` is.

    Returns:
        int32 [sum of ceil(ceil(k / gran_k) / 4), mn]: the first k_block of a group in the low byte, unused bytes zero;
        stride 1 along mn, rows padded to 16 bytes.

    Raises:
        ProblemError: an argument is not of that kind.
    """
    if not isinstance(sf, Tensor) or sf.dtype != torch.float32 or sf.dim() != 2:
        given = f"{sf.dtype} {tuple(sf.shape)}" if isinstance(sf, Tensor) else type(sf).__name__
        raise ProblemError(f"sf is {given}; accepted is torch.float32 [sum of k_blocks, mn]")
    if not isinstance(gran_k, int) or gran_k <= 0:
        raise ProblemError(f"gran_k is {gran_k!r}; accepted is a positive integer")
    if (
        not isinstance(grouped_layout, Tensor)
        or grouped_layout.dtype != torch.int32
        or grouped_layout.dim() != 1
        or not grouped_layout.is_contiguous()
        or grouped_layout.device != sf.device
    ):
        raise ProblemError(f"grouped_layout is {grouped_layout!r}; accepted is torch.int32 [groups], where sf is")
    ks, alignment = list(ks_cpu or ()), 0
    if use_psum_layout:
        alignment = get_mk_alignment_for_contiguous_layout() if k_alignment is None else k_alignment
        if not isinstance(alignment, int) or not 1 <= alignment <= _MAX_ALIGNMENT:
            raise ProblemError(f"k_alignment is {alignment!r}; accepted is an integer from 1 to {_MAX_ALIGNMENT}")
        ends = grouped_layout.tolist()
        ks = [max(end - align(start, alignment), 0) for start, end in zip([0, *ends], ends, strict=False)]
    elif grouped_layout.numel() != len(ks):
        raise ProblemError(f"ks_cpu is {ks_cpu!r}; accepted are {grouped_layout.numel()} numbers, as in grouped_layout")
    blocks = [ceil_div(k, gran_k) for k in ks]
    if any(k < 0 for k in ks) or sum(blocks) != sf.shape[0]:
        raise ProblemError(f"sf has {sf.shape[0]} rows; groups of {ks} in steps of {gran_k} have {sum(blocks)}")
    sf = sf.detach() if sf.requires_grad else sf
    if needs_dispatch(sf, grouped_layout):
        result: Tensor = torch.ops.jitgemm.pack_k_grouped_ue8m0(sf, grouped_layout, blocks, gran_k, alignment)
        return result
    return pack_groups(sf, grouped_layout, blocks, gran_k, alignment)


def transform_sf_into_required_layout(
    sf: Tensor,
    mn: int,
    k: int,
    recipe: tuple[int, int, int] | tuple[int, int],
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    psum_layout: Tensor | None = None,
) -> Tensor:
    """Scales as the FP8 GEMM kernels load them; ``sf`` itself where it is so already.

    Args:
        sf: fp32 [ceil(mn / rows of a group), ceil(k / 128)], with ``num_groups`` before that where it is given.
        mn: rows of the operand.
        k: its columns.
        recipe: what one scale covers: (1, 128) or (128, 128); or (of A, of B, 128) with ``is_sfa``.
        num_groups: experts.
        is_sfa: with a recipe of three, whether these are A's scales.
        disable_ue8m0_cast: accepted for the peer's callers; fp32 scales are never cast here.
        psum_layout: accepted for the peer's callers, who spare rows between groups by it; all are written here.

    Returns:
        For 1 x 128, what ``get_mn_major_tma_aligned_tensor`` returns; for 128 x 128, ``sf``.

    Raises:
        ProblemError: an argument is not of that kind.
    """
    check_scales(sf)
    if (len(recipe) == 3) != (is_sfa is not None):
        raise ProblemError(f"recipe is {recipe!r} and is_sfa {is_sfa!r}; accepted are three numbers with it, or two")
    gran_mn, gran_k = (recipe[0] if is_sfa in (None, True) else recipe[1]), recipe[-1]
    if (gran_mn, gran_k) not in ((1, 128), (128, 128)):
        raise ProblemError(f"recipe is {recipe!r}; accepted is 1 or 128 by 128")
    groups = () if num_groups is None else (num_groups,)
    shape = (*groups, ceil_div(mn, gran_mn), ceil_div(k, gran_k))
    if tuple(sf.shape) != shape:
        raise ProblemError(f"sf has shape {tuple(sf.shape)}; accepted is {shape} for {mn} x {k} and {recipe!r}")
    return get_mn_major_tma_aligned_tensor(sf) if gran_mn == 1 else sf


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m: int | None = None) -> int:
    """The alignment of groups that wastes the fewest rows for groups of about ``expected_m``: 8 to 128, a power of two.

    Groups of any alignment are served; without ``expected_m`` it is 128.

    Raises:
        ProblemError: ``expected_m`` is not a positive integer.
    """
    if expected_m is None:
        return _ALIGNMENTS[-1]
    if not isinstance(expected_m, int) or expected_m < 1:
        raise ProblemError(f"expected_m is {expected_m!r}; accepted is a positive integer")
    return next((alignment for alignment in _ALIGNMENTS if alignment >= expected_m), _ALIGNMENTS[-1])


@overload
def interleave_gate_up(weights: Tensor, scales: None = None) -> Tensor: ...
@overload
def interleave_gate_up(weights: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]: ...
def interleave_gate_up(weights: Tensor, scales: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Weights of gate and up, one above the other, as SwiGLU in a GEMM's epilogue wants them: 8 rows of each in turn.

    Args:
        weights: [2h, k] or [groups, 2h, k], of any type; h a multiple of 8.
        scales: of single rows, [.., 2h, k_blocks]; or of 128 x 128, [.., 2 * ceil(h / 128), k_blocks], where gate and
            up each have blocks of their own, of which the last may be a part.

    Returns:
        A copy of the weights, with scales if given: of single rows in the same order; of blocks, gate's and up's in
        turn.

    Raises:
        ProblemError: an argument is not of that kind.
    """
    rows = _gate_up_rows(weights)
    interleaved = reference.interleave_gate_up(weights, -2)
    if scales is None:
        return interleaved
    return interleaved, reference.interleave_gate_up(scales, -2, _run_of_scales(weights, scales, rows))


@overload
def deinterleave_gate_up(weights: Tensor, scales: None = None) -> Tensor: ...
@overload
def deinterleave_gate_up(weights: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]: ...
def deinterleave_gate_up(weights: Tensor, scales: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Reverse ``interleave_gate_up``.

    Raises:
        ProblemError: an argument is not of that kind.
    """
    rows = _gate_up_rows(weights)
    stacked = reference.deinterleave_gate_up(weights, -2)
    if scales is None:
        return stacked
    return stacked, reference.deinterleave_gate_up(scales, -2, _run_of_scales(weights, scales, rows))


def shard_weights(weights: Tensor, scales: Tensor, dim: int, start: int, size: int) -> tuple[Tensor, Tensor, int]:
    """Cut rows or columns out of weights with scales, also where a block of 128 x 128 is cut in two.

    To kernels, blocks of scales begin with the operand. Where the cut begins within one, zeros take the place of what
    comes before it in that block, ``start % 128`` elements, and the scales are those of the blocks as they were:
    products are exact. As rows of b, the zeros make as many columns of d zero, its first. As columns they meet as many
    columns of a, its first, which must hold zeros too. So if gate and up are cut along n, and down along k at the same
    place, d of the one is a of the other (an epilogue's bias must be zero there).

    Args:
        weights: ``[n, k]`` or ``[groups, n, k]``, of any type.
        scales: of blocks, ``[.., ceil(n / 128), ceil(k / 128)]``, or of single rows, ``[.., n, ceil(k / 128)]``.
        dim: -2 to cut rows (n), -1 to cut columns (k).
        start: the first row or column.
        size: how many.

    Returns:
        Copies of both, and how many zeros come first.

    Raises:
        ProblemError: an argument is not of that kind.
    """
    if weights.dim() not in (2, 3):
        raise ProblemError(f"weights have shape {tuple(weights.shape)}; accepted is [n, k] or [groups, n, k]")
    rows, k = weights.shape[-2:]
    k_blocks = ceil_div(k, reference.SCALE_BLOCK)
    accepted = [(*weights.shape[:-2], count, k_blocks) for count in (rows, ceil_div(rows, reference.SCALE_BLOCK))]
    if tuple(scales.shape) not in accepted:
        raise ProblemError(f"scales have shape {tuple(scales.shape)}; accepted is {accepted[0]} or {accepted[1]}")
    if dim not in (-2, -1):
        raise ProblemError(f"dim is {dim!r}; accepted is -2 (n) or -1 (k)")
    if not (isinstance(start, int) and isinstance(size, int) and 0 <= start < start + size <= weights.shape[dim]):
        raise ProblemError(f"start is {start!r} and size {size!r}; accepted is a part of {weights.shape[dim]}")
    of_rows = dim == -2 and scales.shape[-2] == rows
    sf, before = reference.slice_scales(scales, dim, start, size, 1 if of_rows else reference.SCALE_BLOCK)
    shape = list(weights.shape)
    shape[dim] = before + size
    shard = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
    source, target = (reference.as_bytes(x) for x in (weights, shard))
    target.narrow(dim, before, size).copy_(source.narrow(dim, start, size))
    return shard, sf.clone(memory_format=torch.contiguous_format), before


def _gate_up_rows(weights: Tensor) -> int:
    if weights.dim() not in (2, 3):
        raise ProblemError(f"weights have shape {tuple(weights.shape)}; accepted is [2h, k] or [groups, 2h, k]")
    return weights.shape[-2]


def _run_of_scales(weights: Tensor, scales: Tensor, rows: int) -> int:
    """Scales of gate, then as many of up: those of a run's rows, or one of a block.

    Raises:
        ProblemError: they fit neither.
    """
    k_blocks = ceil_div(weights.shape[-1], reference.SCALE_BLOCK)
    counts = rows, 2 * ceil_div(rows // 2, reference.SCALE_BLOCK)
    accepted = [(*weights.shape[:-2], count, k_blocks) for count in counts]
    if tuple(scales.shape) not in accepted:
        raise ProblemError(f"scales have shape {tuple(scales.shape)}; accepted is {accepted[0]} or {accepted[1]}")
    return reference.GATE_UP_RUN if scales.shape[-2] == rows else 1


def check_scales(sf: object) -> None:
    """Check the argument of the layout functions.

    Raises:
        ProblemError: it is not accepted.
    """
    if not isinstance(sf, Tensor):
        raise ProblemError(f"sf is {type(sf).__name__}; accepted is a torch.Tensor")
    if sf.dtype != torch.float32:
        raise ProblemError(f"sf has dtype {sf.dtype}; accepted is torch.float32")
    if sf.dim() not in (2, 3) or sf.layout != torch.strided:
        raise ProblemError(
            f"sf has {sf.dim()} dimensions and layout {sf.layout};"
            " accepted is strided [mn, k_blocks] or [groups, mn, k_blocks]"
        )


def copy_to_mn_major(sf: Tensor) -> Tensor:
    """A copy of checked scales in the layout."""
    return _transpose_on_device(sf) if sf.is_cuda else reference.get_mn_major_tma_aligned_tensor(sf)


def _transpose_on_device(sf: Tensor) -> Tensor:
    """The same by our kernel, on the current stream of the device of ``sf``."""
    from jitgemm.families.transpose_scales import launch  # the CUDA path only: CPU tensors need no driver

    output = reference.empty_mn_major(sf.shape, sf.dtype, sf.device)
    if sf.numel():
        with torch.cuda.device(sf.device):
            launch(sf.shape, sf.stride(), sf.data_ptr(), output.data_ptr(), sf.device.index)
    return output


def fp4_note(operand: Tensor) -> str:
    """What an error adds for an operand that looks like packed FP4, which the peer takes on other chips."""
    packed = (torch.int8, torch.uint8, getattr(torch, "float4_e2m1fn_x2", None))
    return " (packed FP4 is accepted as b of the fp8_fp4 functions, nt)" if operand.dtype in packed else ""
