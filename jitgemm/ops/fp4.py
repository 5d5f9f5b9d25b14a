"""FP4 weights for ``fp8_fp4_gemm_nt`` and its grouped forms: prepared once, or the same values in FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.families.gemm import FP4, FP4_RECIPES
from jitgemm.ops.checks import pair
from jitgemm.ops.dispatch import needs_dispatch
from jitgemm.ops.layout import unpack_ue8m0
from jitgemm.reference import fp4 as reference
from jitgemm.reference.fp4 import PACKED_BYTES
from jitgemm.reference.quantize import ceil_div

FP4_DTYPES = tuple(
    getattr(torch, name) for name in ("int8", "uint8", "float4_e2m1fn_x2") if getattr(torch, name, None) is not None
)
"""Types of tensors that hold two E2M1 codes a byte."""

_SCALE_DTYPES = tuple(
    getattr(torch, name)
    for name in ("uint8", "float8_e8m0fnu", "int32", "float32")
    if getattr(torch, name, None) is not None
)
_PACKED_SCALES = 4  # in an int32


class PreparedWeights(NamedTuple):
    """FP4 weights in the kernels' layout: two tensors, to be saved and loaded as any.

    Args:
        data: uint8 ``[..., ceil(n/64), ceil(k/128) * 4352]``; see ``jitgemm.reference.fp4``.
        units: fp32 ``[..., n]``.
        k: elements of a row.
        version: of the layout.
    """

    data: Tensor
    units: Tensor
    k: int
    version: int = reference.PACKED_VERSION


def prepare_fp4_weights(weights: Tensor, scales: Tensor) -> PreparedWeights:
    """MXFP4 weights in the layout that the kernels take; ``restore_fp4_weights`` reverses it.

    Layout and formats: OCP Microscaling Formats 1.0, as checkpoints store them. All values are kept, but for groups
    whose scales are more than 2^241 below the largest of their row, which become zero. A NaN scale makes its row NaN.

    Args:
        weights: int8, uint8 or float4_e2m1fn_x2 ``[n, k/2]`` or ``[groups, n, k/2]``: E2M1, two to a byte, the even
            column's in the low half.
        scales: of 32 elements of a row, ``[n, ceil(k/32)]`` or ``[groups, n, ceil(k/32)]``: UE8M0 as uint8 or
            float8_e8m0fnu, or fp32 powers of two, which are checked on the host; or UE8M0 packed four to an int32,
            the first in the low byte, ``[.., n, ceil(k/128)]``; any strides.

    Raises:
        ProblemError: an argument is not of that kind.
    """
    _check(weights, scales)
    packed, exponents = weights.detach().view(torch.uint8), _exponents(scales.detach(), 2 * weights.shape[-1])
    if needs_dispatch(weights, scales):
        data, units = torch.ops.jitgemm.prepare_fp4_weights(packed, exponents)
    else:
        data, units = pack(packed, exponents)
    return PreparedWeights(data, units, 2 * weights.shape[-1])


def restore_fp4_weights(prepared: PreparedWeights) -> tuple[Tensor, Tensor]:
    """Weights as int8 ``[..., n, k/2]`` and UE8M0 scales as uint8 ``[..., n, ceil(k/32)]`` of the same values.

    Of rows with a NaN scale all scales become NaN; those of groups of zeros may differ from what was prepared.

    Raises:
        ProblemError: ``prepared`` is not what ``prepare_fp4_weights`` returned.
    """
    check_prepared(prepared)
    return reference.unpack(prepared.data, prepared.units, prepared.k)


def mxfp4_to_fp8(weights: Tensor, scales: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same values as e4m3 ``[..., n, k]`` with fp32 scales ``[..., n, ceil(k/128)]`` (recipe ``fp8_1x128_1x128``).

    None where that would not be exact: scales within a row's 128 of K that are more than 2^11 apart (groups of zeros
    apart), a NaN scale, or one below 2^-120. The answer waits for the device.

    Args:
        weights: as ``prepare_fp4_weights`` takes them.
        scales: likewise.

    Raises:
        ProblemError: an argument is not of that kind.
    """
    _check(weights, scales)
    exponents = _exponents(scales.detach(), 2 * weights.shape[-1])
    return reference.to_fp8(weights.detach().view(torch.uint8), exponents)


def pack(packed: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.pack``, group by group, which bounds its memory."""
    if packed.dim() == 2:
        return reference.pack(packed, exponents)
    parts = [reference.pack(*group) for group in zip(packed, exponents, strict=True)]
    return torch.stack([data for data, _ in parts]), torch.stack([units for _, units in parts])


def pack_fake(packed: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors as ``pack`` returns them."""
    *lead, n, half = packed.shape
    width = ceil_div(2 * half, 128) * PACKED_BYTES
    return (
        packed.new_empty((*lead, ceil_div(n, 64), width), dtype=torch.uint8),
        packed.new_empty((*lead, n), dtype=torch.float32),
    )


def is_fp4(b: Any) -> bool:
    """Whether B of a call is FP4, prepared or not."""
    if isinstance(b, PreparedWeights):
        return True
    return isinstance(b, (tuple, list)) and len(b) == 2 and getattr(b[0], "dtype", None) in FP4_DTYPES


def prepared_b(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """``data`` and ``units`` of B, prepared now if it is not.

    Raises:
        ProblemError: it is not FP4 weights with the k of ``a``.
    """
    if not isinstance(b, PreparedWeights):
        b = prepare_fp4_weights(b[0], b[1])
    k = a.shape[-1] if isinstance(a, Tensor) and a.dim() else None
    if k is not None and b.k != k:
        raise ProblemError(f"a {tuple(a.shape)} and b have k {k} and {b.k}; they must agree")
    if b.version != reference.PACKED_VERSION:
        raise ProblemError(
            f"b has layout version {b.version}; accepted is {reference.PACKED_VERSION}: prepare the weights anew"
        )
    return b.data, b.units


def activations(a: Any, recipe_a: tuple[int, int] | None) -> tuple[Tensor, Tensor, str]:
    """A of a call with FP4 weights: e4m3, fp32 scales, and the recipe that these make.

    Args:
        a: e4m3 and its scales of 128 or 32 of K: fp32, or UE8M0 packed four to an int32, which are unpacked now.
        recipe_a: ``(1, 128)``, ``(1, 32)``, or None: what the number of scales says, 128 where both would fit.

    Raises:
        ProblemError: there is another number of scales, or packed ones of other rows.
    """
    data, scales = pair("a", a)
    if not isinstance(data, Tensor) or not isinstance(scales, Tensor) or not data.dim() or not scales.dim():
        return data, scales, FP4  # refused where all is checked
    k, found, is_packed = data.shape[-1], scales.shape[-1], scales.dtype == torch.int32
    wanted = []
    for group in _RECIPES if recipe_a is None else recipe_a[1:]:
        count = ceil_div(k, group)
        wanted.append(ceil_div(count, _PACKED_SCALES) if is_packed else count)
        if found == wanted[-1]:
            return data, _unpacked(data, scales, count) if is_packed else scales, _RECIPES[group]
    accepted = " or ".join(str((*data.shape[:-1], number)) for number in wanted)
    raise ProblemError(f"a_scales has shape {tuple(scales.shape)}; a {tuple(data.shape)} makes it {accepted}")


_RECIPES = {recipe.a_group: name for name, recipe in FP4_RECIPES.items()}


def recipe_of(data: Tensor, scales: Tensor) -> str:
    """The recipe that A makes, as ``activations`` left it; some recipe where it makes none."""
    k, found = (tensor.shape[-1] if tensor.dim() else 0 for tensor in (data, scales))
    return next((name for group, name in _RECIPES.items() if found == ceil_div(k, group)), FP4)


def _unpacked(data: Tensor, scales: Tensor, count: int) -> Tensor:
    if scales.shape[:-1] != data.shape[:-1] or scales.dim() not in (2, 3):
        raise ProblemError(f"a_scales has shape {tuple(scales.shape)}; a has rows {tuple(data.shape[:-1])}")
    if scales.device != data.device:
        raise ProblemError(f"a_scales is on {scales.device} and a on {data.device}; accepted is one device for all")
    unpack: Callable[[Tensor, int], Tensor] = (
        torch.ops.jitgemm.unpack_ue8m0 if needs_dispatch(data, scales) else unpack_ue8m0
    )
    return unpack(scales.detach(), count)


def check_prepared(prepared: PreparedWeights) -> None:
    """Check that tensors are as ``prepare_fp4_weights`` returns them.

    Raises:
        ProblemError: they are not.
    """
    if not isinstance(prepared, PreparedWeights):
        raise ProblemError(f"prepared is {type(prepared).__name__}; accepted is PreparedWeights")
    data, units, k, version = prepared
    if version != reference.PACKED_VERSION:
        raise ProblemError(f"prepared has layout version {version}; accepted is {reference.PACKED_VERSION}")
    if data.dtype != torch.uint8 or units.dtype != torch.float32:
        raise ProblemError(f"data and units are {data.dtype} and {units.dtype}; accepted is torch.uint8, torch.float32")
    wanted = packed_shape(units.shape, k)
    if tuple(data.shape) != wanted:
        raise ProblemError(f"data has shape {tuple(data.shape)}; units {tuple(units.shape)} and k {k} make it {wanted}")


def packed_shape(units: torch.Size, k: int) -> tuple[int, ...]:
    """The shape of ``data``."""
    return (*units[:-1], ceil_div(units[-1], 64), ceil_div(k, 128) * PACKED_BYTES)


def _check(weights: object, scales: object) -> None:
    for name, tensor, dtypes in (("weights", weights, FP4_DTYPES), ("scales", scales, _SCALE_DTYPES)):
        if not isinstance(tensor, Tensor):
            raise ProblemError(f"{name} is {type(tensor).__name__}; accepted is a torch.Tensor")
        if tensor.dtype not in dtypes:
            raise ProblemError(f"{name} has dtype {tensor.dtype}; accepted is {', '.join(map(str, dtypes))}")
        if tensor.dim() not in (2, 3) or 0 in tensor.shape:
            raise ProblemError(f"{name} has shape {tuple(tensor.shape)}; accepted is a matrix, or one for each group")
    assert isinstance(weights, Tensor) and isinstance(scales, Tensor)
    each = reference.GROUP * (_PACKED_SCALES if scales.dtype == torch.int32 else 1)
    wanted = (*weights.shape[:-1], ceil_div(2 * weights.shape[-1], each))
    if tuple(scales.shape) != wanted:
        raise ProblemError(
            f"scales have shape {tuple(scales.shape)}; weights {tuple(weights.shape)} make it {wanted}: one for {each}"
        )
    if scales.device != weights.device:
        raise ProblemError(f"scales are on {scales.device} and weights on {weights.device}; accepted is one device")


def _exponents(scales: Tensor, k: int) -> Tensor:
    """The exponents of checked scales, one for 32 of K."""
    if scales.dtype == torch.int32:
        return scales.contiguous().view(torch.uint8)[..., : ceil_div(k, reference.GROUP)]
    return reference.ue8m0_to_exponents(scales)
