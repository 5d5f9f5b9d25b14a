"""Dense GEMM: ``D = A @ B^T (+ C)`` for FP8 and BF16, under the peer's names and argument order."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from jitgemm import settings
from jitgemm.device import SM90A, Device
from jitgemm.errors import ProblemError
from jitgemm.families.gemm import (
    EXPANDED,
    FAMILY,
    FP4_RECIPES,
    GATE_UP_RUN,
    LAYOUTS,
    RECIPES,
    SCALE_GROUP,
    GemmConfig,
    GemmProblem,
    recipe_traits,
    scale_blocks,
)
from jitgemm.families.gemm_launch import STEPS_OFFSET, GemmGeometry, Matrix, ScaleStrides
from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES
from jitgemm.heuristics import chooser, prepare
from jitgemm.heuristics.expansion import Expansion, expanded, expansion, far, workspace_shape
from jitgemm.kernel import load
from jitgemm.nvtx import in_range
from jitgemm.ops.checks import Scaled, check_apart, check_tensors, extent, pair
from jitgemm.ops.dispatch import are_plain, dispatch_modes, function_modes, needs_dispatch
from jitgemm.ops.epilogue import Epilogue, Steps, check_steps, check_steps_apart, pack, steps_of
from jitgemm.ops.fp4 import PreparedWeights, dequantized, expander, is_fp4, operands, packed_shape
from jitgemm.ops.layout import copy_to_mn_major, fp4_note
from jitgemm.plan import BOUND_LAUNCHES, Sizes, Table, current_device, device_facts, matcher, raw_stream
from jitgemm.record import record
from jitgemm.reference import epilogue as epilogue_reference
from jitgemm.reference import gemm as reference
from jitgemm.reference.layout import get_tma_aligned_size
from jitgemm.render import template_digest
from jitgemm.settings import Settings

_D_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_ALIGNMENT = 16  # bytes: TMA's, of addresses and row strides
_GPU = "cuda"  # the type of the devices that kernels run on

# The peer's (rows of A, rows of B, K) per scale.
_PEER_RECIPES = {(1, 128, 128): "fp8_1x128_128x128", (1, 1, 128): "fp8_1x128_1x128"}


class Operation(NamedTuple):
    """What a call asks for beyond its tensors; one object each, in ``_OPERATIONS``."""

    recipe: str
    layout: str
    fast_accum: bool


_OPERATIONS = {
    (recipe, layout, fast_accum): Operation(recipe, layout, fast_accum)
    for recipe, layout, fast_accum in itertools.product((*RECIPES, *FP4_RECIPES), LAYOUTS, (False, True))
}
_FP8 = _OPERATIONS["fp8_1x128_128x128", "nt", False]
_FP4 = {recipe: _OPERATIONS[recipe, "nt", False] for recipe in FP4_RECIPES}
_BF16_NT, _BF16_NN, _BF16_TN, _BF16_TT = (_OPERATIONS["bf16", layout, False] for layout in LAYOUTS)


def fp8_gemm_nt(
    a: Scaled,
    b: Scaled,
    d: Tensor,
    c: Tensor | None = None,
    recipe: str | tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "",
    disable_ue8m0_cast: bool = False,
    *,
    fast_accum: bool = False,
    epilogue: Epilogue | None = None,
) -> None:
    """``d = a @ b.T (+ c)`` with e4m3 operands and fp32 scales.

    Partial sums are promoted to FP32 registers every 128 of K.

    Args:
        a: e4m3 ``[m, k]``, K contiguous, and its scales.
        b: e4m3 ``[n, k]``, K contiguous, and its scales.
        d: output, bf16 or fp32 ``[m, n]``, n contiguous, any row stride.
        c: added to the product; ``[m, n]`` of d's dtype, may be ``d`` itself.
        recipe: what one scale covers:
            ``"fp8_1x128_128x128"`` (default; the peer's ``(1, 128, 128)``): a's scales ``[m, ceil(k/128)]``, b's
            ``[ceil(n/128), ceil(k/128)]``;
            ``"fp8_1x128_1x128"`` (the peer's ``(1, 1, 128)``): b's scales ``[n, ceil(k/128)]``;
            ``"fp8_rowwise"``: ``[m]`` or ``[m, 1]``, and ``[n]`` or ``[n, 1]``;
            ``"fp8_tensorwise"``: one element each.
            Scales of rows and 128 of K are read fastest MN-major (``get_mn_major_tma_aligned_tensor``); others
            are transposed first.
        recipe_a: the peer's way to give a's part of the recipe, ``(1, 128)``.
        recipe_b: and b's, ``(128, 128)`` or ``(1, 128)``.
        compiled_dims: accepted for the peer's callers; sizes are always run-time values here.
        disable_ue8m0_cast: accepted for the peer's callers; fp32 scales are never cast here.
        fast_accum: keep partial sums in the tensor cores' accumulator, which has fewer bits (row-wise and
            tensor-wise recipes only).
        epilogue: what else becomes of the product. With it d may be a pair of e4m3 ``[m, n]`` and scales
            (``empty_quantized``), and has ``n / 2`` columns with SwiGLU; in both cases there is no c.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    operation = _FP8
    if recipe is not None or recipe_a is not None or recipe_b is not None or fast_accum is not False:
        if not isinstance(fast_accum, bool):
            raise ProblemError(f"fast_accum is {fast_accum!r}; accepted is a boolean")
        operation = _OPERATIONS[_recipe_name(recipe, recipe_a, recipe_b), "nt", fast_accum]
    if type(a) is not tuple or type(b) is not tuple or len(a) != 2 or len(b) != 2:
        a, b = pair("a", a), pair("b", b)
    a_data, a_scales = a
    b_data, b_scales = b
    if epilogue is not None:
        _launch_with_epilogue(a_data, a_scales, b_data, b_scales, d, c, operation, epilogue)
        return
    if not _launch_again(a_data, a_scales, b_data, b_scales, d, c, operation):
        _launch(a_data, a_scales, b_data, b_scales, d, c, operation)


def fp8_gemm_nn(
    a: Scaled,
    b: Scaled,
    d: Tensor,
    c: Tensor | None = None,
    recipe: str | tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "",
    disable_ue8m0_cast: bool = False,
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d = a @ b (+ c)``: b ``[k, n]`` with scales ``[ceil(k/128), ceil(n/128)]``; else as ``fp8_gemm_nt``.

    The tensor cores read FP8 along K: an operand whose contiguous dimension is another is copied by each call.
    """
    given = (recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)
    fp8_gemm_nt(a, _transposed("b", b), d, c, *given, epilogue=epilogue)


def fp8_gemm_tn(
    a: Scaled,
    b: Scaled,
    d: Tensor,
    c: Tensor | None = None,
    recipe: str | tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "",
    disable_ue8m0_cast: bool = False,
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d = a.T @ b (+ c)``: a ``[k, m]`` with scales ``[ceil(k/128), m]``, b as in ``fp8_gemm_nn``."""
    given = (recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)
    fp8_gemm_nt(_transposed("a", a), _transposed("b", b), d, c, *given, epilogue=epilogue)


def fp8_gemm_tt(
    a: Scaled,
    b: Scaled,
    d: Tensor,
    c: Tensor | None = None,
    recipe: str | tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "",
    disable_ue8m0_cast: bool = False,
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d = a.T @ b.T (+ c)``: a as in ``fp8_gemm_tn``, b as in ``fp8_gemm_nt``."""
    given = (recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)
    fp8_gemm_nt(_transposed("a", a), b, d, c, *given, epilogue=epilogue)


def fp8_fp4_gemm_nt(
    a: Scaled,
    b: PreparedWeights | Scaled,
    d: Tensor,
    c: Tensor | None = None,
    recipe: str | tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "",
    disable_ue8m0_cast: bool = False,
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d = a @ b.T (+ c)`` with e4m3 A and FP4 B, which stays 4 bit in memory; or with FP8 B, as ``fp8_gemm_nt``.

    For many rows, and without c, MXFP4 B may be expanded to FP8 first, in n * k bytes of torch's allocator
    (``JITGEMM_EXPAND_FP4``).

    Args:
        a: e4m3 ``[m, k]``, K contiguous, and scales of 128 or of 32 of a row: fp32 ``[m, ceil(k/128)]`` or
            ``[m, ceil(k/32)]``, as ``fp8_gemm_nt`` takes them; or UE8M0, four to an int32, the first in the low byte,
            ``[m, ceil(k/512)]`` or ``[m, ceil(k/128)]``, which a small kernel unpacks first.
            With NVFP4 B scales are of 128.
        b: what ``prepare_fp4_weights`` made of MXFP4 or NVFP4 ``[n, k]``; or its arguments, packed E2M1 ``[n, k/2]``
            and scales (and of NVFP4 a global one), which each call then packs first: that reads and writes all weights.
        d: output, bf16 or fp32 ``[m, n]``, n contiguous, any row stride.
        c: added to the product; ``[m, n]`` of d's dtype, may be ``d`` itself.
        recipe: with FP4 B what the tensors make it, such as ``"fp8_1x128_fp4_1x32"``, or none; else as ``fp8_gemm_nt``
            takes it.
        recipe_a: the peer's way to say what a scale of a covers, ``(1, 128)`` or ``(1, 32)``; without it the number of
            scales says so, and is that of 128 where both would fit.
        recipe_b: and of b, ``(1, 32)`` for MXFP4, ``(1, 16)`` for NVFP4.
        compiled_dims: accepted for the peer's callers; sizes are always run-time values here.
        disable_ue8m0_cast: accepted for the peer's callers; fp32 scales are never cast here.
        epilogue: as ``fp8_gemm_nt`` takes it.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    if not is_fp4(b):
        given = (recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)
        fp8_gemm_nt(a, cast("Scaled", b), d, c, *given, epilogue=epilogue)
        return
    a_data, a_scales, b_data, units, name = operands(a, b, recipe, recipe_a, recipe_b)
    operation = _FP4[name]
    if epilogue is not None:
        _launch_with_epilogue(a_data, a_scales, b_data, units, d, c, operation, epilogue)
        return
    if not _launch_again(a_data, a_scales, b_data, units, d, c, operation):
        _launch(a_data, a_scales, b_data, units, d, c, operation)


# The peer's names for operands of either type; in these layouts FP8 ones only.
fp8_fp4_gemm_nn, fp8_fp4_gemm_tn, fp8_fp4_gemm_tt = fp8_gemm_nn, fp8_gemm_tn, fp8_gemm_tt


def _transposed(name: str, operand: Any) -> Scaled:
    """An operand that is stored with K first, as ``fp8_gemm_nt`` takes it."""
    data, scales = pair(name, operand)
    parts = {name: data, f"{name}_scales": scales}
    check_tensors(**parts)
    for part, tensor in parts.items():
        if tensor.dim() > 2 or (tensor is data and tensor.dim() < 2):
            raise ProblemError(f"{part} has {tensor.dim()} dimensions; accepted is 2")
    data = data.t()
    if data.stride(1) != 1 and data.dtype == torch.float8_e4m3fn:
        rows, k = data.shape
        copy = torch.empty((rows, get_tma_aligned_size(k, 1)), dtype=torch.uint8, device=data.device)[:, :k]
        data = copy.copy_(data.view(torch.uint8)).view(data.dtype)
    return data, scales.t()


def bf16_gemm_nt(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    c: Tensor | None = None,
    compiled_dims: str = "",
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d = a @ b.T (+ c)``: a ``[m, k]``, b ``[n, k]``, both bf16.

    Args:
        a: row stride a multiple of 16 bytes; either dimension may be the contiguous one, and is read in place.
        b: the same.
        d: output, bf16 or fp32 ``[m, n]``, n contiguous, any row stride.
        c: added to the product; ``[m, n]`` of d's dtype, may be ``d`` itself.
        compiled_dims: accepted for the peer's callers; sizes are always run-time values here.
        epilogue: as ``fp8_gemm_nt`` takes it.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    if epilogue is not None:
        _launch_with_epilogue(a, None, b, None, d, c, _BF16_NT, epilogue)
        return
    if not _launch_again(a, None, b, None, d, c, _BF16_NT):
        _launch(a, None, b, None, d, c, _BF16_NT)


def bf16_gemm_nn(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    c: Tensor | None = None,
    compiled_dims: str = "",
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d = a @ b (+ c)``: a ``[m, k]``, b ``[k, n]``; else as ``bf16_gemm_nt``."""
    if epilogue is not None:
        _launch_with_epilogue(a, None, b, None, d, c, _BF16_NN, epilogue)
        return
    if not _launch_again(a, None, b, None, d, c, _BF16_NN):
        _launch(a, None, b, None, d, c, _BF16_NN)


def bf16_gemm_tn(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    c: Tensor | None = None,
    compiled_dims: str = "",
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d = a.T @ b (+ c)``: a ``[k, m]``, b ``[k, n]``; else as ``bf16_gemm_nt``."""
    if epilogue is not None:
        _launch_with_epilogue(a, None, b, None, d, c, _BF16_TN, epilogue)
        return
    if not _launch_again(a, None, b, None, d, c, _BF16_TN):
        _launch(a, None, b, None, d, c, _BF16_TN)


def bf16_gemm_tt(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    c: Tensor | None = None,
    compiled_dims: str = "",
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d = a.T @ b.T (+ c)``: a ``[k, m]``, b ``[n, k]``; else as ``bf16_gemm_nt``."""
    if epilogue is not None:
        _launch_with_epilogue(a, None, b, None, d, c, _BF16_TT, epilogue)
        return
    if not _launch_again(a, None, b, None, d, c, _BF16_TT):
        _launch(a, None, b, None, d, c, _BF16_TT)


def _recipe_name(recipe: object, recipe_a: object, recipe_b: object) -> str:
    if recipe is None:
        if recipe_a is None and recipe_b is None:
            return "fp8_1x128_128x128"
        recipe_a, recipe_b = (tuple(given) if isinstance(given, list) else given for given in (recipe_a, recipe_b))
        for name, given, accepted in (
            ("recipe_a", recipe_a, ((1, 128),)),
            ("recipe_b", recipe_b, ((128, 128), (1, 128))),
        ):
            if given is not None and given not in accepted:
                raise ProblemError(f"{name} is {given!r}; accepted are {', '.join(map(str, accepted))}")
        return "fp8_1x128_1x128" if recipe_b == (1, 128) else "fp8_1x128_128x128"
    if isinstance(recipe, str) and recipe in RECIPES and RECIPES[recipe].is_fp8:
        return recipe
    for peer_recipe, name in _PEER_RECIPES.items():
        if recipe == peer_recipe or recipe == list(peer_recipe):
            return name
    names = ", ".join(name for name, facts in RECIPES.items() if facts.is_fp8)
    raise ProblemError(f"recipe is {recipe!r}; accepted are {names}, (1, 128, 128) and (1, 1, 128)")


_Recent = tuple[Operation, Settings, int, Callable[..., bool], tuple[int, ...], Callable[[], int], Any]
"""A call that may be repeated: what it asked for, the settings, the device, a function that says whether tensors are
like its own, the stream and addresses, the launch of these, and the plan. A plain tuple is the fastest to take apart.
"""

_recent: Table[int, _Recent] = Table(4096)
"""The last call with some B, by the tensor's ``id``: a guess, for another tensor may have that id by now."""


def _launch_again(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    operation: Operation,
) -> bool:
    """Launch as the last call with ``b`` did, if all that plans are keyed by is the same; whether it was.

    The host time of a call is spent here: see benchmarks/host_time.py before adding to it.
    """
    if is_dynamo_compiling() or dispatch_modes() or function_modes():
        return False
    recent = _recent.get(id(b))
    if recent is None:
        return False
    known_operation, known_settings, device, match, known_addresses, run, plan = recent
    if known_operation is not operation or known_settings is not settings.current() or device != current_device():
        return False
    try:
        if c is None:
            same = match(a, b, d) if a_scales is None else match(a, a_scales, b, b_scales, d)
        else:
            same = match(a, b, d, c) if a_scales is None else match(a, a_scales, b, b_scales, d, c)
    except TypeError:  # another number of tensors
        return False
    if not same:
        return False
    addresses = (
        raw_stream(device),
        a.data_ptr(),
        0 if a_scales is None else a_scales.data_ptr(),
        b.data_ptr(),
        0 if b_scales is None else b_scales.data_ptr(),
        d.data_ptr(),
        0 if c is None else c.data_ptr(),
    )
    if addresses != known_addresses:
        if (addresses[2] | addresses[4]) % _ALIGNMENT:  # scales that are copied first, if the kernel loads them by TMA
            return False
        run = plan.bound.get(addresses) or plan.bind(addresses)
        _recent.put(id(b), (operation, known_settings, device, match, addresses, run, plan))
    status = run()
    if status:
        plan.retry(run, status)
    return True


def _launch(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    operation: Operation,
) -> None:
    """A call that is not like the one before it, or that must go through torch's dispatcher."""
    if not needs_dispatch(a, a_scales, b, b_scales, d, c):
        _run(a, a_scales, b, b_scales, d, c, operation)
        return
    _check_tensors(a=a, a_scales=a_scales, b=b, b_scales=b_scales, d=d, c=c)
    in_place = c is d
    recipe, layout, fast_accum = operation
    torch.ops.jitgemm.gemm(a, a_scales, b, b_scales, d, None if in_place else c, in_place, recipe, layout, fast_accum)


def _launch_with_epilogue(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Any,
    c: Tensor | None,
    operation: Operation,
    epilogue: Epilogue,
) -> None:
    steps, d = steps_of(epilogue, d)
    _check_tensors(a=a, a_scales=a_scales, b=b, b_scales=b_scales, d=d, c=c)
    if not needs_dispatch(a, a_scales, b, b_scales, d, c, *steps.tensors().values()):
        _run_with_epilogue(a, a_scales, b, b_scales, d, c, operation, steps)
        return
    in_place = c is d
    torch.ops.jitgemm.gemm_with_epilogue(
        a, a_scales, b, b_scales, d, None if in_place else c, in_place, *operation, *steps
    )


def _run_with_epilogue(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    operation: Operation,
    steps: Steps,
) -> None:
    in_force = settings.current()
    key = (
        operation, in_force.generation, steps.key(),
        a.shape, a.stride(), a.dtype, a.device, b.shape, b.stride(), b.dtype, b.device,
        d.shape, d.stride(), d.dtype, d.device,
        None if a_scales is None else _scales_key(a_scales),
        None if b_scales is None else _scales_key(b_scales),
        None if c is None else (c.shape, c.stride(), c.dtype, c.device),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.put(key, _make_plan(a, a_scales, b, b_scales, d, c, operation, in_force, steps))
    plan(a, a_scales, b, b_scales, d, c, steps)


_plans: Table[Any, Any] = Table(4096)


def forget_plans() -> None:
    """Make plans anew, with configs chosen anew."""
    _plans.clear()
    _recent.clear()


os.register_at_fork(after_in_child=forget_plans)  # a child whose parent used CUDA is told so where it loads a kernel


def _run(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    operation: Operation,
) -> None:
    """Find or make the plan of a call and launch it; CPU tensors go to the reference."""
    in_force = settings.current()
    recent = _recent.get(id(b))
    if recent is not None and recent[0] is operation and recent[1] is in_force:
        of_any_m = recent[-1].of_any_m
        plan = None if of_any_m is None else of_any_m.find(a, a_scales, b, b_scales, d, c)
        if plan is not None:
            plan(a, a_scales, b, b_scales, d, c)
            return
    try:
        key = (
            operation, in_force.generation,
            a.shape, a.stride(), a.dtype, a.device, b.shape, b.stride(), b.dtype, b.device,
            d.shape, d.stride(), d.dtype, d.device,
            None if a_scales is None else _scales_key(a_scales),
            None if b_scales is None else _scales_key(b_scales),
            None if c is None else (c.shape, c.stride(), c.dtype, c.device),
        )  # fmt: skip
    except AttributeError:
        _check_tensors(a=a, a_scales=a_scales, b=b, b_scales=b_scales, d=d, c=c)
        raise
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.put(key, _make_plan(a, a_scales, b, b_scales, d, c, operation, in_force))
    plan(a, a_scales, b, b_scales, d, c)


def _scales_key(scales: Tensor) -> tuple[object, ...]:
    # Its alignment decides whether TMA reads the tensor in place or a copy with other strides.
    return scales.shape, scales.stride(), scales.dtype, scales.device, scales.data_ptr() % _ALIGNMENT


class _GemmPlan:
    """A checked problem with its kernel and geometry.

    Args:
        operation: what is computed.
        in_force: the settings that it was made under.
        extents: of the tensors, for the checks of their addresses.
        geometry: of the launch.
        transposes: whether a's and b's scales are copied first.
        device: ordinal.
        range_name: of the NVTX range around launches; None: there is none.
    """

    def __init__(
        self,
        operation: Operation,
        in_force: Settings,
        extents: _Extents,
        geometry: GemmGeometry,
        transposes: tuple[bool, bool],
        device: int,
        range_name: str | None,
    ) -> None:
        self._operation, self._settings, self._device = operation, in_force, device
        self._extents, self._geometry, self._transposes = extents, geometry, transposes
        self._range = range_name
        self.bound: Table[tuple[int, ...], Callable[[], int]] = Table(BOUND_LAUNCHES)
        self.retry = geometry.launch.retry
        self.of_any_m: _PlansOfAnyM | None = None

    def __call__(
        self, a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor | None, d: Tensor, c: Tensor | None
    ) -> None:
        device = self._device
        if current_device() != device:
            with torch.cuda.device(device):
                return self(a, a_scales, b, b_scales, d, c)
        tensors = tuple(tensor for tensor in (a, a_scales, b, b_scales, d, c) if tensor is not None)
        repeatable = not any(self._transposes) and are_plain(*tensors)
        if any(self._transposes):
            self._extents.check(*_addresses(a, a_scales, b, b_scales, d, c))
            a_scales, b_scales = (
                copy_to_mn_major(scales) if transpose and scales is not None else scales
                for scales, transpose in zip((a_scales, b_scales), self._transposes, strict=True)
            )
        addresses = (raw_stream(device), *_addresses(a, a_scales, b, b_scales, d, c))
        run = self.bound.get(addresses) or self.bind(addresses)
        if repeatable:
            _recent.put(id(b), (self._operation, self._settings, device, matcher(tensors), addresses, run, self))
        status = run()
        if status:
            self.retry(run, status)
        return None

    def bind(self, addresses: tuple[int, ...]) -> Callable[[], int]:
        """The launch on a stream, whose handle comes first, with tensors at the addresses that follow.

        Raises:
            ProblemError: TMA can't start at an address, or d overlaps an input.
            DriverError: the driver refuses a tensor map.
        """
        stream, a, a_scales, b, b_scales, d, c = addresses
        if not any(self._transposes):  # else checked with the caller's scales, which reach farther than their copies
            self._extents.check(a, a_scales, b, b_scales, d, c)
        arguments = self._geometry.bind(a, a_scales, b, b_scales, d, c)
        run = self._geometry.launch.prepare(arguments, stream)
        return self.bound.put(addresses, run if self._range is None else in_range(self._range, run))


class _PlansOfAnyM:
    """Plans of calls that differ in m, and in what goes with it, alone.

    All that is checked of a call's tensors then holds for each if it holds for one, but for what ``find`` checks. That
    is so from m = 2 on (with one row the stride between rows means nothing) and for an A that is contiguous along k.

    Args:
        plan_of: makes a plan for an m.
        operands: of one of the calls.
        tensors: the tensors of that call.
    """

    def __init__(
        self, plan_of: Callable[[int, ScaleStrides, _Extents], _AnyPlan], operands: _Operands, tensors: list[Tensor]
    ) -> None:
        self._plan_of, self._operands = plan_of, operands
        self._plans: Table[tuple[int, int], _AnyPlan] = Table(4096)
        self._granularity = granularity = operands.problem.traits.a_scales
        sizes: Sizes = [list(tensor.shape) for tensor in tensors]
        strides: Sizes = [list(tensor.stride()) for tensor in tensors]
        outputs = range(2 if granularity == "none" else 4, len(tensors))
        for index in (0, *outputs, *((1,) if granularity in ("row", "row_k") else ())):
            sizes[index][0] = None
        if granularity == "row_k":
            strides[1][1] = None
        self._match = matcher(tensors, sizes, strides)

    def find(
        self, a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor | None, d: Tensor, c: Tensor | None
    ) -> _AnyPlan | None:
        """The plan for these tensors, or None where they differ in more than m."""
        try:
            if c is None:
                same = self._match(a, b, d) if a_scales is None else self._match(a, a_scales, b, b_scales, d)
            else:
                same = self._match(a, b, d, c) if a_scales is None else self._match(a, a_scales, b, b_scales, d, c)
        except TypeError:  # another number of tensors
            return None
        m = a.shape[0] if same else 0
        if m < 2 or d.shape[0] != m or (c is not None and c.shape[0] != m):
            return None
        strides = self._operands.a_scales
        if a_scales is not None and b_scales is not None:
            if (a_scales.data_ptr() | b_scales.data_ptr()) % _ALIGNMENT:  # a copy may be needed
                return None
            if self._granularity in ("row", "row_k") and a_scales.shape[0] != m:
                return None
            if self._granularity == "row_k":
                k_blocks = a_scales.shape[1]
                strides = ScaleStrides(1, a_scales.stride(1) if k_blocks > 1 else get_tma_aligned_size(m, 4))
                if not _loads_in_place(strides, m, k_blocks):
                    return None
        key = m, strides.k
        plan = self._plans.get(key)
        if plan is None:
            extents = self._operands.extents_of(m, a_scales)
            plan = self._plans.put(key, self._plan_of(m, strides, extents))
            plan.of_any_m = self
        return plan


def _addresses(
    a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor | None, d: Tensor, c: Tensor | None
) -> tuple[int, int, int, int, int, int]:
    return (
        a.data_ptr(),
        0 if a_scales is None else a_scales.data_ptr(),
        b.data_ptr(),
        0 if b_scales is None else b_scales.data_ptr(),
        d.data_ptr(),
        0 if c is None else c.data_ptr(),
    )


class _ReferencePlan:
    """The same on the CPU: the reference computes."""

    def __init__(self, extents: _Extents, recipe: str, layout: str, d_dtype: str) -> None:
        self._extents = extents
        self._arguments: dict[str, Any] = {"recipe": recipe, "layout": layout, "d_dtype": d_dtype}
        self._fp4_group = recipe_traits(recipe).fp4_group

    @torch.no_grad()
    def __call__(
        self, a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor | None, d: Tensor, c: Tensor | None
    ) -> None:
        self._extents.check_overlap(*_addresses(a, a_scales, b, b_scales, d, c))
        if self._fp4_group and b_scales is not None:
            b, b_scales = dequantized(b, b_scales, a.shape[1], self._fp4_group), None
        d.copy_(reference.gemm(a, b, c, a_scales=a_scales, b_scales=b_scales, **self._arguments))


class _FusedPlan:
    """A checked problem that has an epilogue, with its kernel and geometry."""

    def __init__(
        self,
        extents: _Extents,
        geometry: GemmGeometry,
        transposes: tuple[bool, bool],
        device: int,
        range_name: str | None,
    ) -> None:
        self._extents, self._geometry, self._transposes, self._device = extents, geometry, transposes, device
        self._range = range_name
        self._bound: Table[tuple[Any, ...], Callable[[], int]] = Table(BOUND_LAUNCHES)

    def __call__(
        self,
        a: Tensor,
        a_scales: Tensor | None,
        b: Tensor,
        b_scales: Tensor | None,
        d: Tensor,
        c: Tensor | None,
        steps: Steps,
    ) -> None:
        if current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(a, a_scales, b, b_scales, d, c, steps)
        inputs = {"a": a, "a_scales": a_scales, "b": b, "b_scales": b_scales}
        given = _addresses(a, a_scales, b, b_scales, d, c)
        copied_a, copied_b = (
            copy_to_mn_major(scales) if transpose and scales is not None else scales
            for scales, transpose in zip((a_scales, b_scales), self._transposes, strict=True)
        )
        packed = pack(steps)
        key = (raw_stream(self._device), *_addresses(a, copied_a, b, copied_b, d, c), packed, *given)
        run = self._bound.get(key)
        if run is None:
            self._extents.check(*given)
            check_steps_apart(steps, d, inputs)
            arguments = self._geometry.bind(*key[1:7])
            ctypes.memmove(arguments.address + STEPS_OFFSET, packed, len(packed))
            run = self._geometry.launch.prepare(arguments, key[0])
            self._bound.put(key, run if self._range is None else in_range(self._range, run))
        status = run()
        if status:
            self._geometry.launch.retry(run, status)
        return None


class _ExpandedPlan:
    """A checked problem with many rows and without C, whose MXFP4 weights become e5m2 in memory first.

    Where scales of weights lie too far apart for that, which only the device knows, the product is wrong: then the last
    launch computes all anew, from packed weights. Else it ends at once.

    Args:
        operation: what is computed.
        in_force: the settings that it was made under.
        extents: of the tensors, for the checks of their addresses.
        expand: the first launch: from packed weights to expanded ones.
        product: of these.
        remainder: of packed weights that can't be expanded.
        transposes: whether a's scales are copied first.
        device: ordinal.
        range_name: of the NVTX range around launches; None: there is none.
    """

    def __init__(
        self,
        operation: Operation,
        in_force: Settings,
        extents: _Extents,
        expand: Callable[[Tensor], Tensor],
        product: GemmGeometry,
        remainder: GemmGeometry,
        transposes: bool,
        device: int,
        range_name: str | None,
    ) -> None:
        self._operation, self._settings, self._device = operation, in_force, device
        self._extents, self._expand, self._geometries = extents, expand, (product, remainder)
        self._transposes, self._range = transposes, range_name
        self._bound: Table[tuple[Any, ...], Callable[[], int]] = Table(BOUND_LAUNCHES)
        self.of_any_m: _PlansOfAnyM | None = None

    def __call__(
        self,
        a: Tensor,
        a_scales: Tensor,
        b: Tensor,
        b_scales: Tensor,
        d: Tensor,
        c: None,
        steps: Steps | None = None,
    ) -> None:
        if current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(a, a_scales, b, b_scales, d, c, steps)
        self._extents.check(*_addresses(a, a_scales, b, b_scales, d, c))
        if steps is not None:
            check_steps_apart(steps, d, {"a": a, "a_scales": a_scales, "b": b, "b_scales": b_scales})
        packed = b"" if steps is None else pack(steps)
        stream = raw_stream(self._device)
        if self._transposes:
            a_scales = copy_to_mn_major(a_scales)
        for index, weights in enumerate((self._expand(b), b)):
            geometry = self._geometries[index]
            key = (index, packed, stream, *_addresses(a, a_scales, weights, b_scales, d, c))
            run = self._bound.get(key)
            if run is None:
                arguments = geometry.bind(*key[3:])
                ctypes.memmove(arguments.address + STEPS_OFFSET, packed, len(packed))
                run = geometry.launch.prepare(arguments, stream)
                self._bound.put(key, run if self._range is None else in_range(self._range, run))
            status = run()
            if status:
                geometry.launch.retry(run, status)
        if self.of_any_m is not None:  # for calls with other m; none is like this one, whose workspace may move
            _recent.put(id(b), (self._operation, self._settings, self._device, _like_none, (), _no_launch, self))
        return None


def _like_none(*_: object) -> bool:
    return False


def _no_launch() -> int:
    raise AssertionError("a call that is like none is repeated")


_AnyPlan = _GemmPlan | _ExpandedPlan


class _FusedReferencePlan:
    """The same on the CPU: the reference computes."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation

    @torch.no_grad()
    def __call__(
        self,
        a: Tensor,
        a_scales: Tensor | None,
        b: Tensor,
        b_scales: Tensor | None,
        d: Tensor,
        c: Tensor | None,
        steps: Steps,
    ) -> None:
        check_steps_apart(steps, d, {"a": a, "a_scales": a_scales, "b": b, "b_scales": b_scales})
        recipe, layout, _ = self._operation
        fp4_group = recipe_traits(recipe).fp4_group
        if fp4_group and b_scales is not None:
            b, b_scales = dequantized(b, b_scales, a.shape[1], fp4_group), None
        epilogue_reference.gemm_into(
            a if layout[0] == "n" else a.mT,
            b if layout[1] == "t" else b.mT,
            d if steps.d_scales is None else (d, steps.d_scales),
            c,
            a_scales=a_scales,
            b_scales=b_scales,
            recipe=recipe,
            epilogue=steps.reference(),
        )


class _EmptyPlan:
    """m or n is 0: nothing to do."""

    def __call__(self, *_: object) -> None:
        return None


class _WithoutProduct:
    """k is 0: D is C, or zero."""

    def __init__(self, extents: _Extents) -> None:
        self._extents = extents

    def __call__(
        self, a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor | None, d: Tensor, c: Tensor | None
    ) -> None:
        self._extents.check_overlap(*_addresses(a, a_scales, b, b_scales, d, c))
        if c is None:
            d.zero_()
        elif c is not d:
            d.copy_(c)


_INPUTS = ("a", "a_scales", "b", "b_scales", "c")


class _Extents(NamedTuple):
    """How far a call's tensors reach: what their addresses are checked with."""

    lengths: tuple[int, ...]  # bytes, of _INPUTS
    d_length: int
    c_may_be_d: bool

    def check(self, a: int, a_scales: int, b: int, b_scales: int, d: int, c: int) -> None:
        """Check that TMA can start at the operands' addresses, and ``check_overlap``.

        Raises:
            ProblemError: it can't.
        """
        if (a | b) % _ALIGNMENT:
            name, address = ("a", a) if a % _ALIGNMENT else ("b", b)
            raise ProblemError(
                f"{name} starts at address {address:#x}; accepted is a multiple of {_ALIGNMENT} bytes (TMA)"
            )
        self.check_overlap(a, a_scales, b, b_scales, d, c)

    def check_overlap(self, a: int, a_scales: int, b: int, b_scales: int, d: int, c: int) -> None:
        """Check that the output lies apart from the inputs; 0 stands for an input that is not there.

        Raises:
            ProblemError: d overlaps an input, and is not c itself.
        """
        lengths = self.lengths[:-1] if c == d and self.c_may_be_d else self.lengths  # without that of c, the last
        check_apart("d", d, self.d_length, zip(_INPUTS, (a, a_scales, b, b_scales, c), lengths, strict=False))


class _Operands:
    """Checks everything about a call's tensors but their addresses, and keeps what the addresses are checked with.

    Raises:
        ProblemError: a tensor is not what the recipe and layout ask for.
    """

    def __init__(
        self,
        a: Tensor,
        a_scales: Tensor | None,
        b: Tensor,
        b_scales: Tensor | None,
        d: Tensor,
        c: Tensor | None,
        operation: Operation,
        steps: Steps | None = None,
    ) -> None:
        recipe, layout, fast_accum = operation
        _check_tensors(a=a, a_scales=a_scales, b=b, b_scales=b_scales, d=d, c=c)
        traits = recipe_traits(recipe)
        operand_dtype = torch.float8_e4m3fn if traits.is_fp8 else torch.bfloat16
        for name, tensor, dtype in (("a", a, operand_dtype), ("b", b, torch.uint8 if traits.fp4_b else operand_dtype)):
            if tensor.dtype != dtype:
                raise ProblemError(
                    f"{name} has dtype {tensor.dtype}; recipe {recipe} accepts {dtype}{fp4_note(tensor)}"
                )
        if steps is None and d.dtype not in _D_DTYPES:
            raise ProblemError(f"d has dtype {d.dtype}; accepted are torch.bfloat16 and torch.float32")
        for name, tensor in (("a", a), ("b", b), ("d", d)) if c is None else (("a", a), ("b", b), ("d", d), ("c", c)):
            if tensor.dim() != 2:
                raise ProblemError(f"{name} has {tensor.dim()} dimensions; accepted is 2")
            if tensor.device != d.device:
                raise ProblemError(f"{name} is on {tensor.device} and d on {d.device}; accepted is one device for all")

        a_rows = _Rows("a", a, transposed=layout[0] == "t")
        b_rows: Any = (
            _PackedRows(b, b_scales, a_rows.k, traits.fp4_group) if traits.fp4_b else _Rows("b", b, layout[1] == "n")
        )
        m, k, n = a_rows.mn, a_rows.k, b_rows.mn
        if b_rows.k != k:
            raise ProblemError(
                f"a {tuple(a.shape)} and b {tuple(b.shape)} in layout {layout} have k {k} and {b_rows.k};"
                " they must agree"
            )
        self.a, self.b = a_rows, b_rows
        self.d_columns = columns = n if steps is None else n // steps.gated
        self.is_empty = min(n, k) == 0
        self.problem = GemmProblem(
            n=max(n, 1 if steps is None or steps.gated == 1 else 2 * GATE_UP_RUN),
            k=max(k, 1),
            recipe=recipe,
            m=m,
            layout=("n" if a_rows.k_major else "t") + ("t" if b_rows.k_major else "n"),
            d_dtype=_D_DTYPES[d.dtype] if steps is None else check_steps(steps, d, n, None, False),
            fast_accum=fast_accum,
            epilogue=None if steps is None else steps.name,
        )
        if c is not None and (columns != n or self.problem.quantizes):
            raise ProblemError("c is given with SwiGLU or a quantized d; accepted is None")
        for name, output in (("d", d),) if c is None else (("d", d), ("c", c)):
            if tuple(output.shape) != (m, columns):
                gated = " with SwiGLU" if columns != n else ""
                raise ProblemError(f"{name} has shape {tuple(output.shape)}; a and b make it {(m, columns)}{gated}")
            if output.stride(1) != 1 and columns > 1:
                raise ProblemError(f"{name} has strides {output.stride()}; accepted is stride 1 along n")
        if c is not None and c.dtype != d.dtype:
            raise ProblemError(f"c has dtype {c.dtype} and d {d.dtype}; they must agree")
        if m > 1 and d.stride(0) < columns:
            raise ProblemError(f"d has strides {d.stride()}; its rows of {columns} elements overlap")
        self.d_row_stride = d.stride(0) if m > 1 else max(columns, d.stride(0))
        self.c_row_stride = 0 if c is None else c.stride(0) if m > 1 else self.d_row_stride
        self.device = d.device

        k_blocks = -(-k // SCALE_GROUP)
        a_blocks, b_blocks = -(-k // traits.a_group), scale_blocks(n, self.problem.gated)
        self.a_scales = _check_scales("a_scales", a_scales, traits.a_scales, (m, a_blocks), 0, recipe, d)
        self.b_scales = _check_scales("b_scales", b_scales, traits.b_scales, (n, k_blocks), b_blocks, recipe, d)
        self.scales_by_tma = (traits.a_scales == "row_k", traits.b_scales == "row_k")

        size, d_size = operand_dtype.itemsize, d.element_size()
        lengths = (
            extent(a) * size,
            extent(a_scales) * 4,
            extent(b) * size,
            extent(b_scales) * 4,
            extent(c) * d_size,
        )
        self.extents = _Extents(lengths, extent(d) * d_size, self.c_row_stride == self.d_row_stride)
        self._sizes = size, d_size

    def extents_of(self, m: int, a_scales: Tensor | None) -> _Extents:
        """The extents for another m; both are at least 2, and A is contiguous along k."""
        size, d_size = self._sizes
        _, _, b, b_scales, c = self.extents.lengths
        n, last = self.problem.n, m - 1
        lengths = (
            (last * self.a.matrix().row_stride + self.problem.k) * size,
            extent(a_scales) * 4,
            b,
            b_scales,
            c and (last * self.c_row_stride + n) * d_size,
        )
        return _Extents(lengths, (last * self.d_row_stride + n) * d_size, self.extents.c_may_be_d)

    def check_for_tma(self) -> None:
        """Check that TMA can address A and B.

        Raises:
            ProblemError: it can't.
        """
        for rows in (self.a, self.b):
            rows.check_for_tma()
        if self.problem.traits.is_fp8 and self.problem.layout != "nt":
            raise ProblemError("a and b must have stride 1 along k: FP8 operands are K-major")


class _Rows:
    """A or B as ``mn`` rows of ``k`` elements, whichever of the two is contiguous."""

    def __init__(self, name: str, tensor: Tensor, transposed: bool) -> None:
        self.name = name
        sizes, strides = list(tensor.shape), list(tensor.stride())
        if transposed:
            sizes.reverse()
            strides.reverse()
        self.mn, self.k = sizes
        self._mn_stride, self._k_stride = strides
        self._itemsize = tensor.element_size()
        k_unit, mn_unit = self._k_stride == 1 or self.k == 1, self._mn_stride == 1 or self.mn <= 1
        if k_unit and mn_unit:  # a vector fits both: take the layout that was named
            self.k_major = not transposed
        else:
            self.k_major = k_unit
        self._unit = k_unit or mn_unit
        self._tensor = tuple(tensor.shape), tensor.stride()

    def check_for_tma(self) -> None:
        """Check contiguity and the row stride.

        Raises:
            ProblemError: TMA can't address the operand.
        """
        shown = "{} has shape {} and strides {}"
        if not self._unit:
            raise ProblemError(f"{shown.format(self.name, *self._tensor)}; accepted is stride 1 along one of them")
        stride, rows, width = self._row_stride()
        if rows > 1 and (stride * self._itemsize % _ALIGNMENT or stride < width):
            raise ProblemError(
                f"{shown.format(self.name, *self._tensor)}; TMA needs rows that don't overlap and start a multiple of"
                f" {_ALIGNMENT} bytes ({_ALIGNMENT // self._itemsize} elements) apart"
            )

    def matrix(self) -> Matrix:
        """The operand as stored."""
        stride, rows, width = self._row_stride()
        if rows <= 1:  # its stride is never used, but TMA wants a legal one
            stride = get_tma_aligned_size(width, self._itemsize)
        return Matrix(rows=rows, columns=width, row_stride=stride)

    def _row_stride(self) -> tuple[int, int, int]:
        if self.k_major:
            return self._mn_stride, self.mn, self.k
        return self._k_stride, self.k, self.mn


class _PackedRows:
    """B as ``mn`` rows of ``k`` FP4 weights, prepared."""

    k_major = True

    def __init__(self, data: Tensor, units: Tensor | None, k: int, group: int) -> None:
        if units is None or units.dim() != 1 or units.shape[0] < 1:
            given = None if units is None else tuple(units.shape)
            raise ProblemError(f"b's units have shape {given}; accepted is (n,)")
        self.mn, self.k = units.shape[0], k
        wanted = packed_shape(units.shape, k, group)
        if tuple(data.shape) != wanted or not data.is_contiguous():
            raise ProblemError(
                f"b's data has shape {tuple(data.shape)} and strides {data.stride()}; n {self.mn} and k {k} make it"
                f" {wanted}, contiguous"
            )

    def check_for_tma(self) -> None:
        """Any that is contiguous will do."""

    def matrix(self) -> Matrix:
        """The operand as it is meant; it is stored otherwise."""
        return Matrix(self.mn, self.k, self.k)


def _check_tensors(**tensors: object) -> None:
    optional = ("a_scales", "b_scales", "c")
    check_tensors(**{name: tensor for name, tensor in tensors.items() if tensor is not None or name not in optional})


def _check_scales(
    name: str, scales: Tensor | None, granularity: str, of_rows: tuple[int, int], blocks: int, recipe: str, d: Tensor
) -> ScaleStrides:
    """Check one operand's scales, of rows and 128 of K or of as many blocks along the rows; return their strides."""
    mn, k_blocks = of_rows
    if granularity == "none":
        return ScaleStrides(0, 0)
    if scales is None:
        raise ProblemError(f"{name} is missing; recipe {recipe} needs scales")
    if scales.dtype != torch.float32:
        raise ProblemError(f"{name} has dtype {scales.dtype}; accepted is torch.float32")
    if scales.device != d.device:
        raise ProblemError(f"{name} is on {scales.device} and d on {d.device}; accepted is one device for all")
    if extent(scales) >= 2**31:
        raise ProblemError(f"{name} spans {extent(scales)} elements; accepted are less than 2**31")
    shape = tuple(scales.shape)
    if granularity == "tensor":
        if scales.numel() != 1:
            raise ProblemError(f"{name} has shape {shape}; recipe {recipe} accepts one element")
        return ScaleStrides(0, 0)
    if granularity == "row":
        if shape not in ((mn,), (mn, 1)):
            raise ProblemError(f"{name} has shape {shape}; recipe {recipe} accepts {(mn,)} or {(mn, 1)}")
        return ScaleStrides(scales.stride(0), 0)
    wanted = of_rows if granularity == "row_k" else (blocks, k_blocks)
    if shape != wanted:
        raise ProblemError(f"{name} has shape {shape}; recipe {recipe} accepts {wanted}")
    return ScaleStrides(scales.stride(0), scales.stride(1))


def _loads_in_place(strides: ScaleStrides, mn: int, k_blocks: int) -> bool:
    """Whether TMA can load scales of rows and 128 of K as they are: MN-major, aligned steps along K."""
    return (strides.mn == 1 or mn == 1) and (k_blocks == 1 or (strides.k >= mn and strides.k % 4 == 0))


def _make_plan(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    operation: Operation,
    in_force: Settings,
    steps: Steps | None = None,
) -> Any:
    operands = _Operands(a, a_scales, b, b_scales, d, c, operation, steps)
    problem = operands.problem
    kind = d.device.type
    if kind not in (_GPU, "cpu"):
        raise ProblemError(f"d is on {d.device}; accepted are CUDA and CPU tensors")
    if operands.is_empty:  # of which there is neither a kernel nor a problem to record
        if problem.m == 0 or operands.b.mn == 0:
            return _EmptyPlan()
        return _WithoutProduct(operands.extents) if steps is None else _FusedReferencePlan(operation)
    if kind == _GPU:
        operands.check_for_tma()
    if in_force.record is not None:
        record(in_force.record, problem)
    if kind != _GPU and steps is not None:
        return _FusedReferencePlan(operation)
    if kind != _GPU:
        return _ReferencePlan(operands.extents, operation.recipe, operation.layout, problem.d_dtype)
    if problem.m == 0:
        return _EmptyPlan()
    assert problem.m is not None
    strides, transposes = [operands.a_scales, operands.b_scales], [False, False]
    groups = problem.traits.a_group, SCALE_GROUP
    for index, mn in enumerate((problem.m, problem.n)):
        scales = (a_scales, b_scales)[index]
        if scales is None or not operands.scales_by_tma[index]:
            continue
        k_blocks = -(-problem.k // groups[index])
        aligned = scales.data_ptr() % _ALIGNMENT == 0
        transposes[index] = not (aligned and _loads_in_place(strides[index], mn, k_blocks))
        if transposes[index] or k_blocks == 1:
            strides[index] = ScaleStrides(1, get_tma_aligned_size(mn, 4))
    ordinal = d.get_device()
    device, num_sms = device_facts(ordinal)

    chosen = None if in_force.autotune and steps is None else chooser(problem, device, in_force)

    def choose(m: int) -> GemmConfig:
        if chosen is None:
            _autotune(problem.with_m(m), device, ordinal)
        return (chosen or chooser(problem, device, in_force))(m)

    @functools.cache
    def geometry_of(config: GemmConfig, problem: GemmProblem = problem) -> GemmGeometry:
        return GemmGeometry(
            problem,
            config,
            load(FAMILY.spec(problem, config, device.arch.name), ordinal, operands.problem),
            a=operands.a.matrix(),
            b=_expanded_matrix(problem) if problem.traits is EXPANDED else operands.b.matrix(),
            d=Matrix(operands.a.mn, operands.d_columns, operands.d_row_stride),
            c_row_stride=operands.c_row_stride,
            a_scales=strides[0],
            b_scales=strides[1],
            num_sms=min(num_sms, in_force.num_sms or num_sms),
            pdl=in_force.pdl,
        )

    def range_name(m: int, config: GemmConfig) -> str | None:
        if not in_force.nvtx:
            return None
        kernel = FAMILY.describe(FAMILY.spec(problem, config, device.arch.name))
        return f"jitgemm {kernel} m={m} n={problem.n} k={problem.k}"

    # Plans outlive the tensors of the call that they are made for, and hold none.
    may_expand, on_device = problem.traits.fp4_b and c is None, d.new_empty(0)

    def expansion_at(m: int) -> Expansion | None:
        return expansion(problem.with_m(m), device, in_force) if may_expand else None

    def expanded_plan(m: int, chosen: Expansion, a_scales: ScaleStrides, extents: _Extents) -> _ExpandedPlan:
        product = geometry_of(chosen.product, expanded(problem)).with_m(m, a_scales)
        remainder = geometry_of(chosen.far, far(problem)).with_m(m, a_scales)
        name = None
        if in_force.nvtx:
            name = f"jitgemm {problem.recipe}, expanded, m={m} n={problem.n} k={problem.k}"
        return _ExpandedPlan(
            operation, in_force, extents, expander(problem, on_device), product, remainder, transposes[0], ordinal, name
        )

    def plan_of(m: int, a_scales: ScaleStrides, extents: _Extents) -> _AnyPlan:
        config, many = choose(m), expansion_at(m)
        if many is not None:
            return expanded_plan(m, many, a_scales, extents)
        geometry = geometry_of(config).with_m(m, a_scales)
        return _GemmPlan(operation, in_force, extents, geometry, (False, False), ordinal, range_name(m, config))

    if any(transposes):  # here, where it is known what for
        load(TRANSPOSE_SCALES.spec(device.arch.name), ordinal, problem)
    config, copied, many = choose(problem.m), (transposes[0], transposes[1]), expansion_at(problem.m)
    plan: _AnyPlan
    if many is not None:
        plan = expanded_plan(problem.m, many, strides[0], operands.extents)
    else:
        geometry, name = geometry_of(config), range_name(problem.m, config)
        if steps is not None:
            return _FusedPlan(operands.extents, geometry, copied, ordinal, name)
        plan = _GemmPlan(operation, in_force, operands.extents, geometry, copied, ordinal, name)
    if steps is not None:
        return plan
    tensors = [tensor for tensor in (a, a_scales, b, b_scales, d, c) if tensor is not None]
    rows_of_k = operation.layout[0] == "n" and problem.a_major == "k"
    if problem.m > 1 and rows_of_k and not any(transposes) and are_plain(*tensors):
        plan.of_any_m = _PlansOfAnyM(plan_of, operands, tensors)
    return plan


def _expanded_matrix(problem: GemmProblem) -> Matrix:
    _, columns = workspace_shape(problem.n, problem.k)
    return Matrix(problem.n, columns, columns)


def _autotune(problem: GemmProblem, device: Device, ordinal: int) -> None:
    from jitgemm.tuning import autotune  # which imports this module

    with torch.cuda.device(ordinal):
        autotune(problem, device)


def _gemm_operator(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    accumulate: bool,
    recipe: str,
    layout: str,
    fast_accum: bool,
) -> None:
    operation, c = _OPERATIONS[recipe, layout, fast_accum], d if accumulate else c
    if not _launch_again(a, a_scales, b, b_scales, d, c, operation):
        _run(a, a_scales, b, b_scales, d, c, operation)


def _gemm_fake(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    accumulate: bool,
    recipe: str,
    layout: str,
    fast_accum: bool,
) -> None:
    for name, tensor in (("a", a), ("b", b), ("d", d)) if c is None else (("a", a), ("b", b), ("d", d), ("c", c)):
        if tensor.dim() != 2:
            raise ProblemError(f"{name} has {tensor.dim()} dimensions; accepted is 2")


# Not by ``torch.library.custom_op``, which would pass every call through two more layers of Python.
torch.library.define(
    "jitgemm::gemm",
    "(Tensor a, Tensor? a_scales, Tensor b, Tensor? b_scales, Tensor(d!) d, Tensor? c, bool accumulate,"
    " str recipe, str layout, bool fast_accum) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("jitgemm::gemm", ("cpu", "cuda"), _gemm_operator)
torch.library.register_fake("jitgemm::gemm", _gemm_fake)


def _gemm_with_epilogue_operator(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    accumulate: bool,
    recipe: str,
    layout: str,
    fast_accum: bool,
    *steps: Any,
) -> None:
    operation, c = _OPERATIONS[recipe, layout, fast_accum], d if accumulate else c
    _run_with_epilogue(a, a_scales, b, b_scales, d, c, operation, Steps(*steps))


def _gemm_with_epilogue_fake(
    a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor | None, d: Tensor, c: Tensor | None, *_: Any
) -> None:
    for name, tensor in (("a", a), ("b", b), ("d", d)) if c is None else (("a", a), ("b", b), ("d", d), ("c", c)):
        if tensor.dim() != 2:
            raise ProblemError(f"{name} has {tensor.dim()} dimensions; accepted is 2")


torch.library.define(
    "jitgemm::gemm_with_epilogue",
    "(Tensor a, Tensor? a_scales, Tensor b, Tensor? b_scales, Tensor(d!) d, Tensor? c, bool accumulate, str recipe,"
    " str layout, bool fast_accum, Tensor? alpha, float alpha_value, Tensor? bias, bool swiglu, float? limit,"
    " Tensor? row_weights, Tensor(e!)? d_scales) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("jitgemm::gemm_with_epilogue", ("cpu", "cuda"), _gemm_with_epilogue_operator)
torch.library.register_fake("jitgemm::gemm_with_epilogue", _gemm_with_epilogue_fake)

# What every first call of the usual kinds needs is better waited for here, where torch is imported, than there.
for _operation in (_FP8, _BF16_NT):
    prepare(GemmProblem(1, 1, _operation.recipe), SM90A)
template_digest()
