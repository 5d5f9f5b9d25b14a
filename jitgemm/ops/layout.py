"""The layout of scales that the GEMM kernels load: MN-major, TMA-aligned.

Scales handed to ``fp8_gemm_*`` in this layout spare it the transform.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.ops.dispatch import needs_dispatch
from jitgemm.reference import layout as reference


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
    return reference.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf)


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
