"""FP4 weights for ``fp8_fp4_gemm_nt`` and its grouped forms: prepared once, or the same values in FP8."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.families.fp4 import EXPAND_FP4, EXPAND_THREADS, FORMATS, PACK_FP4, UNPACK_SCALES, UNPACK_THREADS
from jitgemm.families.gemm import (
    FP4,
    FP4_RECIPES,
    MMA_M,
    NVFP4_GROUP,
    SCALE_GROUP,
    WARPGROUP,
    GemmProblem,
    packed_bytes,
)
from jitgemm.families.small_problem import SmallProblem
from jitgemm.ops.checks import pair
from jitgemm.ops.dispatch import needs_dispatch
from jitgemm.ops.plain import ALIGNMENT, Call, Gpu, on_gpu, plan_of, record_if_asked
from jitgemm.plan import raw_stream
from jitgemm.reference import fp4 as reference
from jitgemm.reference.layout import empty_mn_major, get_tma_aligned_size, unpack_ue8m0_to_mn_major
from jitgemm.reference.quantize import ceil_div, packed_exponents

FP4_DTYPES = tuple(
    getattr(torch, name) for name in ("int8", "uint8", "float4_e2m1fn_x2") if getattr(torch, name, None) is not None
)
"""Types of tensors that hold two E2M1 codes a byte."""

_SCALE_DTYPES = tuple(
    getattr(torch, name)
    for name in ("uint8", "float8_e8m0fnu", "int32", "float32", "float8_e4m3fn")
    if getattr(torch, name, None) is not None
)
_PACKED_SCALES = 4  # in an int32


class PreparedWeights(NamedTuple):
    """FP4 weights in the kernels' layout: two tensors, to be saved and loaded as any.

    Args:
        data: uint8 ``[..., ceil(n/64), ceil(k/128) * 4352]``, of NVFP4 4608; see ``jitgemm.reference.fp4``.
        units: fp32 ``[..., n]``.
        k: elements of a row.
        version: of the layout.
        group: elements of a row that share a scale: 32 of MXFP4, 16 of NVFP4.
    """

    data: Tensor
    units: Tensor
    k: int
    version: int = reference.PACKED_VERSION
    group: int = reference.GROUP


def prepare_fp4_weights(weights: Tensor, scales: Tensor, global_scale: Tensor | float | None = None) -> PreparedWeights:
    """MXFP4 or NVFP4 weights in the layout that the kernels take; ``restore_fp4_weights`` reverses it.

    Formats: OCP Microscaling Formats 1.0 (MXFP4), and E2M1 with UE4M3 scales of 16 and an FP32 one (NVFP4), as
    checkpoints store them. All values are kept, but for groups of MXFP4 whose scales are more than 2^241 below the
    largest of their row, which become zero. A NaN scale makes its row NaN.

    Args:
        weights: int8, uint8 or float4_e2m1fn_x2 ``[n, k/2]`` or ``[groups, n, k/2]``: E2M1, two to a byte, the even
            column's in the low half.
        scales: of 32 elements of a row, ``[n, ceil(k/32)]`` or ``[groups, n, ceil(k/32)]``: UE8M0 as uint8 or
            float8_e8m0fnu, or fp32 powers of two, which are checked on the host; or UE8M0 packed four to an int32,
            the first in the low byte, ``[.., n, ceil(k/128)]``; any strides. With NVFP4 float8_e4m3fn
            ``[.., n, ceil(k/16)]`` in the order of the weights, signs are not read.
        global_scale: of NVFP4, what all else is multiplied by (default 1): a number or an fp32 tensor of one, one for
            each group ``[groups]``, or one for each row ``[.., n]``.

    Raises:
        ProblemError: an argument is not of that kind.
    """
    _check(weights, scales)
    k, packed = 2 * weights.shape[-1], weights.detach().view(torch.uint8)
    dispatched = needs_dispatch(weights, scales, global_scale if isinstance(global_scale, Tensor) else None)
    if scales.dtype == torch.float8_e4m3fn:
        given = packed, scales.detach(), _of_rows(global_scale, weights)
        prepare = torch.ops.jitgemm.prepare_nvfp4_weights if dispatched else pack_nvfp4
        data, units = prepare(*given)
        return PreparedWeights(data, units, k, group=NVFP4_GROUP)
    if global_scale is not None:
        raise ProblemError(f"global_scale is given with scales of {scales.dtype}; accepted is None, but for NVFP4")
    exponents = _exponents(scales.detach(), k)
    data, units = (torch.ops.jitgemm.prepare_fp4_weights if dispatched else pack)(packed, exponents)
    return PreparedWeights(data, units, k)


def restore_fp4_weights(prepared: PreparedWeights) -> tuple[Tensor, ...]:
    """Weights as int8 ``[..., n, k/2]`` and scales of the same values, as ``prepare_fp4_weights`` takes them.

    Scales of MXFP4 are UE8M0 as uint8 ``[..., n, ceil(k/32)]``; those of NVFP4 float8_e4m3fn ``[..., n, ceil(k/16)]``,
    and a third tensor has the fp32 scale of each row ``[..., n]``. Of rows with a NaN scale all scales become NaN;
    those of groups of zeros may differ from what was prepared.

    Raises:
        ProblemError: ``prepared`` is not what ``prepare_fp4_weights`` returned.
    """
    check_prepared(prepared)
    data, units, k, _, group = prepared
    return reference.unpack_nvfp4(data, units, k) if group == NVFP4_GROUP else reference.unpack(data, units, k)


def mxfp4_to_fp8(weights: Tensor, scales: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same values as e4m3 ``[..., n, k]`` with fp32 scales ``[..., n, ceil(k/128)]`` (recipe ``fp8_1x128_1x128``).

    None where that would not be exact: scales within a row's 128 of K that are more than 2^11 apart (groups of zeros
    apart), a NaN scale, or one below 2^-120. The answer waits for the device.

    Args:
        weights: as ``prepare_fp4_weights`` takes them.
        scales: likewise, of MXFP4.

    Raises:
        ProblemError: an argument is not of that kind.
    """
    _check(weights, scales)
    if scales.dtype == torch.float8_e4m3fn:
        raise ProblemError("scales are those of NVFP4; accepted is MXFP4: FP8 does not hold products with such scales")
    exponents = _exponents(scales.detach(), 2 * weights.shape[-1])
    return reference.to_fp8(weights.detach().view(torch.uint8), exponents)


def pack(packed: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.pack``, on a GPU by a kernel, else group by group, which bounds its memory."""
    return _pack("mxfp4", reference.pack, packed, exponents)


def pack_nvfp4(packed: Tensor, scales: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.pack_nvfp4``, likewise."""
    return _pack("nvfp4", reference.pack_nvfp4, packed, scales, units)


def _pack(
    format: str, of_group: Callable[..., tuple[Tensor, Tensor]], packed: Tensor, scales: Tensor, *units: Tensor
) -> tuple[Tensor, Tensor]:
    if packed.stride(-1) != 1 and packed.shape[-1] > 1:
        packed = packed.contiguous()
    steps = packed.data_ptr(), packed.stride(-2), packed.stride(0)
    aligned = not any(step % ALIGNMENT for step in steps)

    def make() -> Call:
        gpu, problem = on_gpu(packed), SmallProblem.make("prepare_fp4_weights", format=format)
        record_if_asked(problem)
        if not gpu:
            return functools.partial(_each_group, of_group)
        rows, k = torch.Size(packed.shape[:-1]), 2 * packed.shape[-1]
        shape = packed_shape(rows, k, FORMATS[format])
        where, groups = Gpu(packed, problem), math.prod(rows[:-1])
        launch = where.launch(
            PACK_FP4,
            PACK_FP4.spec(where.arch, format=format),
            (shape[-2], groups),
            weights_group_stride=packed.stride(0),
            weights_row_stride=packed.stride(-2),
            scales_group_stride=scales.stride(0),
            scales_row_stride=scales.stride(-2),
            scales_stride=scales.stride(-1),
            rows=rows[-1],
            k=k,
            aligned=aligned,
        )

        def call(packed: Tensor, scales: Tensor, *units: Tensor) -> tuple[Tensor, Tensor]:
            out = packed.new_empty(shape, dtype=torch.uint8), packed.new_empty(rows, dtype=torch.float32)
            given = *(packed, scales), *(units or (None,)), *out
            launch(raw_stream(where.ordinal), *(0 if tensor is None else tensor.data_ptr() for tensor in given))
            return out

        return where.here(call)

    tensors = packed, scales, *units
    result: tuple[Tensor, Tensor] = plan_of(f"pack_{format}", tensors, (aligned,), make)(*tensors)
    return result


def _each_group(pack: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    if tensors[0].dim() == 2:
        return pack(*tensors)
    parts = [pack(*group) for group in zip(*tensors, strict=True)]
    return torch.stack([data for data, _ in parts]), torch.stack([units for _, units in parts])


def expander(problem: GemmProblem, on: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that expands MXFP4 weights as the kernels that multiply them do.

    It takes ``data`` of ``PreparedWeights``, of one matrix, and returns new e5m2 ``[64 * tiles, 128 * k_blocks]``:
    codes times 2^(exponent - 114). Multiplied by ``units`` they are the weights, but for rows with negative units.
    Behind the weights' rows and columns are zeros.

    Args:
        problem: whose weights they are.
        on: a tensor on the GPU.
    """
    tiles, k_blocks = ceil_div(problem.n, MMA_M), ceil_div(problem.k, SCALE_GROUP)
    where, blocks = Gpu(on, problem), tiles * k_blocks
    grid = (ceil_div(blocks, EXPAND_THREADS // WARPGROUP),)
    launch = where.launch(EXPAND_FP4, EXPAND_FP4.spec(where.arch), grid, k_blocks=k_blocks, blocks=blocks)
    shape = tiles * MMA_M, k_blocks * SCALE_GROUP

    def expand(data: Tensor) -> Tensor:
        output = data.new_empty(shape, dtype=torch.float8_e5m2)
        launch(raw_stream(where.ordinal), data.data_ptr(), output.data_ptr())
        return output

    return expand


def unpack_ue8m0(sf: Tensor, k_blocks: int) -> Tensor:
    """The first ``k_blocks`` scales of each row as fp32, MN-major and TMA-aligned.

    Args:
        sf: int32 ``[mn, ceil(k_blocks / 4)]`` or ``[groups, mn, ceil(k_blocks / 4)]``, any strides: UE8M0, the first in
            the low byte.
        k_blocks: scales of a row.
    """

    def make() -> Call:
        if not on_gpu(sf):
            return lambda sf: unpack_ue8m0_to_mn_major(sf, k_blocks)
        planes, mn, words = (1, *sf.shape)[-3:]
        if not sf.numel():
            return lambda sf: empty_mn_major((*sf.shape[:-1], k_blocks), torch.float32, sf.device)
        where, blocks = Gpu(sf, SmallProblem.make("unpack_ue8m0")), ceil_div(mn, UNPACK_THREADS)
        launch = where.launch(
            UNPACK_SCALES,
            UNPACK_SCALES.spec(where.arch),
            (planes * blocks, words),
            plane_stride=sf.stride(0),
            mn_stride=sf.stride(-2),
            k_stride=sf.stride(-1),
            mn=mn,
            mn_aligned=get_tma_aligned_size(mn, 4),
            k_blocks=k_blocks,
            blocks_of_plane=blocks,
        )

        def call(sf: Tensor) -> Tensor:
            output = empty_mn_major((*sf.shape[:-1], k_blocks), torch.float32, sf.device)
            launch(raw_stream(where.ordinal), sf.data_ptr(), output.data_ptr())
            return output

        return where.here(call)

    result: Tensor = plan_of("unpack_ue8m0", (sf,), (k_blocks,), make)(sf)
    return result


def pack_fake(packed: Tensor, scales: Tensor, units: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tensors as ``pack`` returns them, and with units ``pack_nvfp4``."""
    rows = torch.Size(packed.shape[:-1])
    shape = packed_shape(rows, 2 * packed.shape[-1], reference.GROUP if units is None else NVFP4_GROUP)
    return packed.new_empty(shape, dtype=torch.uint8), packed.new_empty(rows, dtype=torch.float32)


def is_fp4(b: Any) -> bool:
    """Whether B of a call is FP4, prepared or not."""
    if isinstance(b, PreparedWeights):
        return True
    return isinstance(b, (tuple, list)) and len(b) in (2, 3) and getattr(b[0], "dtype", None) in FP4_DTYPES


_RECIPES = {
    group: [(facts.a_group, name) for name, facts in FP4_RECIPES.items() if facts.fp4_group == group]
    for group in FORMATS.values()
}
"""Elements that share a scale of B -> elements that share one of A, and the recipe."""


def operands(
    a: Any, b: Any, recipe: object, recipe_a: object, recipe_b: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    """A and its scales, data and units of B, of a call whose B is FP4, and the recipe that they make.

    Args:
        a: e4m3 and its scales of 128 or 32 of K: fp32, or UE8M0 packed four to an int32, which are unpacked now.
        b: prepared weights, or the arguments of ``prepare_fp4_weights``, which they are handed to now.
        recipe: a name in ``FP4_RECIPES``, or None: what the tensors are. Where a's scales could be of 128 or of 32,
            they are of 128.
        recipe_a: what a scale of a covers, or None.
        recipe_b: and of b.

    Raises:
        ProblemError: the tensors make no recipe, or another one than is named.
    """
    if not isinstance(b, PreparedWeights):
        b = prepare_fp4_weights(*b)
    b_data, units, b_k, version, group = b
    if version != reference.PACKED_VERSION or group not in _RECIPES:
        raise ProblemError(
            f"b has layout version {version} and scales of {group}; accepted is version {reference.PACKED_VERSION} and"
            f" {' or '.join(map(str, _RECIPES))}: prepare the weights anew"
        )
    recipes = _RECIPES[group]
    if recipe is not None or recipe_a is not None or recipe_b is not None:
        recipes = _named(recipes, group, recipe, recipe_a, recipe_b)
    data, scales = pair("a", a)
    if not isinstance(data, Tensor) or not isinstance(scales, Tensor) or not data.dim() or not scales.dim():
        return data, scales, b_data, units, recipes[0][1]  # refused where all is checked
    k, found, is_packed = data.shape[-1], scales.shape[-1], scales.dtype is torch.int32
    if b_k != k:
        raise ProblemError(f"a {tuple(data.shape)} and b have k {k} and {b_k}; they must agree")
    for a_group, name in recipes:
        if found == _scales_of_row(k, a_group, is_packed):
            scales = _unpacked(data, scales, ceil_div(k, a_group)) if is_packed else scales
            return data, scales, b_data, units, name
    wanted = dict.fromkeys(_scales_of_row(k, a_group, is_packed) for a_group, _ in recipes)
    accepted = " or ".join(str((*data.shape[:-1], number)) for number in wanted)
    raise ProblemError(f"a_scales has shape {tuple(scales.shape)}; a {tuple(data.shape)} makes it {accepted}")


def _scales_of_row(k: int, group: int, is_packed: bool) -> int:
    """Scales of a row, or int32 that they are packed in."""
    count = -(-k // group)
    return -(-count // _PACKED_SCALES) if is_packed else count


def _named(
    recipes: list[tuple[int, str]], group: int, recipe: object, recipe_a: object, recipe_b: object
) -> list[tuple[int, str]]:
    """Those of the recipes that a call's arguments allow."""
    for argument, given, meaning in (
        ("recipe", recipe, lambda _, name: name),
        ("recipe_a", recipe_a, lambda a_group, _: (1, a_group)),
        ("recipe_b", recipe_b, lambda *_: (1, group)),
    ):
        if given is None:
            continue
        given = tuple(given) if isinstance(given, list) else given
        allowed = [one for one in recipes if meaning(*one) == given]
        if not allowed:
            accepted = " or ".join(dict.fromkeys(repr(meaning(*one)) for one in recipes))
            raise ProblemError(
                f"{argument} is {given!r}; with FP4 weights and scales of {group} accepted is {accepted}"
            )
        recipes = allowed
    return recipes


def recipe_of(data: Tensor, scales: Tensor, packed: Tensor) -> str:
    """The recipe that ``operands`` found, by A, its scales and prepared weights; some recipe where they make none."""
    k, found, width = (tensor.shape[-1] if tensor.dim() else 0 for tensor in (data, scales, packed))
    for name, facts in FP4_RECIPES.items():
        if found == ceil_div(k, facts.a_group) and width == ceil_div(k, SCALE_GROUP) * packed_bytes(facts.fp4_group):
            return name
    return FP4


def dequantized(data: Tensor, units: Tensor, k: int, group: int) -> Tensor:
    """The values of prepared weights, in float64."""
    if group == NVFP4_GROUP:
        return reference.dequantize_nvfp4(*reference.unpack_nvfp4(data, units, k))
    return reference.dequantize_fp4(*reference.unpack(data, units, k))


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
    data, units, k, version, group = prepared
    if group not in (reference.GROUP, NVFP4_GROUP):
        raise ProblemError(f"prepared has group {group!r}; accepted is {reference.GROUP} or {NVFP4_GROUP}")
    if version != reference.PACKED_VERSION:
        raise ProblemError(f"prepared has layout version {version}; accepted is {reference.PACKED_VERSION}")
    if data.dtype != torch.uint8 or units.dtype != torch.float32:
        raise ProblemError(f"data and units are {data.dtype} and {units.dtype}; accepted is torch.uint8, torch.float32")
    wanted = packed_shape(units.shape, k, group)
    if tuple(data.shape) != wanted:
        raise ProblemError(f"data has shape {tuple(data.shape)}; units {tuple(units.shape)} and k {k} make it {wanted}")


def packed_shape(units: torch.Size, k: int, group: int) -> tuple[int, ...]:
    """The shape of ``data``."""
    return (*units[:-1], ceil_div(units[-1], MMA_M), ceil_div(k, SCALE_GROUP) * packed_bytes(group))


def _check(weights: object, scales: object) -> None:
    for name, tensor, dtypes in (("weights", weights, FP4_DTYPES), ("scales", scales, _SCALE_DTYPES)):
        if not isinstance(tensor, Tensor):
            raise ProblemError(f"{name} is {type(tensor).__name__}; accepted is a torch.Tensor")
        if tensor.dtype not in dtypes:
            raise ProblemError(f"{name} has dtype {tensor.dtype}; accepted is {', '.join(map(str, dtypes))}")
        if tensor.dim() not in (2, 3) or 0 in tensor.shape:
            raise ProblemError(f"{name} has shape {tuple(tensor.shape)}; accepted is a matrix, or one for each group")
    assert isinstance(weights, Tensor) and isinstance(scales, Tensor)
    each = NVFP4_GROUP if scales.dtype == torch.float8_e4m3fn else reference.GROUP
    each *= _PACKED_SCALES if scales.dtype == torch.int32 else 1
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
        return packed_exponents(scales)[..., : ceil_div(k, reference.GROUP)]
    return reference.ue8m0_to_exponents(scales)


def _of_rows(global_scale: Tensor | float | None, weights: Tensor) -> Tensor:
    """The fp32 scale of NVFP4 weights as one for each row."""
    rows = weights.shape[:-1]
    if global_scale is None or (isinstance(global_scale, (int, float)) and not isinstance(global_scale, bool)):
        value = 1.0 if global_scale is None else float(global_scale)
        return torch.full(rows, value, dtype=torch.float32, device=weights.device)
    if not isinstance(global_scale, Tensor) or global_scale.dtype != torch.float32:
        given = global_scale.dtype if isinstance(global_scale, Tensor) else type(global_scale).__name__
        raise ProblemError(f"global_scale is {given}; accepted is a number or a torch.float32 tensor")
    if global_scale.device != weights.device:
        raise ProblemError(
            f"global_scale is on {global_scale.device} and weights on {weights.device}; accepted is one device"
        )
    one = global_scale.detach()
    if one.numel() == 1:
        return one.reshape(()).expand(rows).contiguous()
    if one.shape == rows[:-1]:
        return one[..., None].expand(rows).contiguous()
    if one.shape != rows:
        raise ProblemError(
            f"global_scale has shape {tuple(one.shape)}; accepted is one number, one for each group or {tuple(rows)}"
        )
    return one.clone()  # not the caller's memory
