"""Grouped GEMM along m: rows of several experts, each multiplied by weights of its own, under the peer's names.

Launches do not depend on how many rows the groups have: nothing waits for the device, and a captured call serves any.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from jitgemm import settings
from jitgemm.errors import ProblemError
from jitgemm.families.gemm import SCALE_GROUP, recipe_traits, scale_blocks
from jitgemm.families.grouped import FAMILY, MAX_GROUPS, GroupedProblem
from jitgemm.families.grouped_launch import STEPS_OFFSET, GroupedGeometry, Stack
from jitgemm.heuristics.grouped import chooser
from jitgemm.kernel import load
from jitgemm.nvtx import in_range
from jitgemm.ops.checks import Scaled, check_apart, check_tensors, extent, integer_of, pair, span_of
from jitgemm.ops.dispatch import needs_dispatch
from jitgemm.ops.epilogue import Epilogue, Steps, check_steps, check_steps_apart, pack, steps_of
from jitgemm.ops.fp4 import PreparedWeights, dequantized, is_fp4, operands, packed_shape, recipe_of
from jitgemm.ops.layout import copy_to_mn_major, fp4_note
from jitgemm.plan import BOUND_LAUNCHES, Table, current_device, device_facts, raw_stream
from jitgemm.record import record
from jitgemm.reference.layout import get_tma_aligned_size
from jitgemm.settings import Settings

_D_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_ALIGNMENT = 16  # bytes: TMA's, of addresses and strides
_MAX_ROWS = 2**30  # of A, masked of one group
_GPU = "cuda"  # the type of the devices that kernels run on
_FP8 = "fp8_1x128_128x128"
_PEER_RECIPE = (1, 128, 128)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Scaled,
    b: Scaled,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: str | tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d[row] = a[row] @ b[group of the row].T`` with e4m3 operands and fp32 scales; groups lie one after another.

    A group starts at a multiple of ``get_mk_alignment_for_contiguous_layout()`` rows. Rows of no group cost nothing.

    Args:
        a: e4m3 ``[m, k]``, K contiguous, and scales ``[m, ceil(k/128)]``, read fastest MN-major
            (``get_mn_major_tma_aligned_tensor``).
        b: e4m3 ``[groups, n, k]``, K contiguous, and scales ``[groups, ceil(n/128), ceil(k/128)]``.
        d: output, bf16 or fp32 ``[m, n]``, n contiguous; rows of no group become zeros.
        grouped_layout: int32 ``[m]``, each row's group; what is none, such as -1, is padding. In the psum layout int32
            ``[groups]``, where each group ends; the next starts at the next multiple of the alignment.
        recipe: what one scale covers, ``"fp8_1x128_128x128"`` or the peer's ``(1, 128, 128)``.
        recipe_a: the peer's way to give a's part of the recipe, ``(1, 128)``.
        recipe_b: and b's, ``(128, 128)``.
        compiled_dims: accepted for the peer's callers; sizes are always run-time values here.
        disable_ue8m0_cast: accepted for the peer's callers; fp32 scales are never cast here.
        use_psum_layout: what ``grouped_layout`` is.
        ensure_zero_padding: in the psum layout, whether d's rows of no group become zeros, or are left alone.
        expected_m_for_psum_layout: rows of a group to choose a kernel for; by default m over the groups.
        epilogue: what else becomes of the product. With it d may be a pair of e4m3 ``[m, n]`` and scales
            (``empty_quantized``), and has ``n / 2`` columns with SwiGLU.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    _check_recipe(recipe, recipe_a, recipe_b)
    kind = _contiguous(use_psum_layout)
    (a_data, a_scales), (b_data, b_scales) = pair("a", a), pair("b", b)
    _call(
        a_data,
        a_scales,
        b_data,
        b_scales,
        d,
        grouped_layout,
        kind,
        expected_m_for_psum_layout,
        ensure_zero_padding,
        epilogue,
    )


def m_grouped_fp8_gemm_nn_contiguous(
    a: Scaled,
    b: Scaled,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: str | tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d[row] = a[row] @ b[group of the row]``: b ``[groups, k, n]``, scales ``[groups, ceil(k/128), ceil(n/128)]``.

    K is the contiguous dimension of b all the same, as the tensor cores want it; else as the ``nt`` function.
    """
    b_data, b_scales = pair("b", b)
    check_tensors(b=b_data, b_scales=b_scales)
    for name, tensor in (("b", b_data), ("b_scales", b_scales)):
        if tensor.dim() != 3:
            raise ProblemError(f"{name} has {tensor.dim()} dimensions; accepted is 3")
    m_grouped_fp8_gemm_nt_contiguous(
        a,
        (b_data.transpose(1, 2), b_scales.transpose(1, 2)),
        d,
        grouped_layout,
        *(recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast, use_psum_layout, ensure_zero_padding),
        epilogue=epilogue,
    )


def m_grouped_fp8_gemm_nt_masked(
    a: Scaled,
    b: Scaled,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    recipe: str | tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d[group, row] = a[group, row] @ b[group].T`` for the first ``masked_m[group]`` rows of each group.

    Args:
        a: e4m3 ``[groups, max_m, k]``, K contiguous, and scales ``[groups, max_m, ceil(k/128)]``, read fastest
            MN-major.
        b: e4m3 ``[groups, n, k]``, K contiguous, and scales ``[groups, ceil(n/128), ceil(k/128)]``.
        d: output, bf16 or fp32 ``[groups, max_m, n]``, n contiguous; other rows are left alone.
        masked_m: int32 ``[groups]``, read on the device; what is negative counts as 0, what exceeds max_m as max_m.
        expected_m: rows of a group to choose a kernel for; results don't depend on it.
        epilogue: as ``m_grouped_fp8_gemm_nt_contiguous`` takes it.
        recipe: what one scale covers, ``"fp8_1x128_128x128"`` or the peer's ``(1, 128, 128)``.
        recipe_a: the peer's way to give a's part of the recipe, ``(1, 128)``.
        recipe_b: and b's, ``(128, 128)``.
        compiled_dims: accepted for the peer's callers; sizes are always run-time values here.
        disable_ue8m0_cast: accepted for the peer's callers; fp32 scales are never cast here.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    _check_recipe(recipe, recipe_a, recipe_b)
    (a_data, a_scales), (b_data, b_scales) = pair("a", a), pair("b", b)
    expected_m = _expected("expected_m", expected_m)
    _call(a_data, a_scales, b_data, b_scales, d, masked_m, "masked", expected_m, False, epilogue)


def m_grouped_fp8_fp4_gemm_nt_contiguous(
    a: Scaled,
    b: PreparedWeights | Scaled,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: str | tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``m_grouped_fp8_gemm_nt_contiguous`` with MXFP4 or NVFP4 B, which stays 4 bit in memory; or FP8 B.

    Args:
        a: as there, with scales of 128 or of 32 of K, fp32 or packed UE8M0, as ``fp8_fp4_gemm_nt`` takes them.
        b: what ``prepare_fp4_weights`` made of ``[groups, n, k]``, or its arguments, which each call then packs first.
        d: as there; so are the arguments that follow, but for:
        grouped_layout: as there.
        recipe: with FP4 B none.
        recipe_a: the peer's way to say what a scale of a covers, ``(1, 128)`` or ``(1, 32)``.
        recipe_b: and of b, ``(1, 32)`` for MXFP4, ``(1, 16)`` for NVFP4.
        compiled_dims: as there.
        disable_ue8m0_cast: as there.
        use_psum_layout: as there.
        ensure_zero_padding: as there.
        expected_m_for_psum_layout: as there.
        epilogue: as there.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    if not is_fp4(b):
        m_grouped_fp8_gemm_nt_contiguous(
            *(a, cast("Scaled", b), d, grouped_layout, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast),
            *(use_psum_layout, ensure_zero_padding, expected_m_for_psum_layout),
            epilogue=epilogue,
        )
        return
    kind = _contiguous(use_psum_layout)
    a_data, a_scales, data, units, _ = operands(a, b, recipe, recipe_a, recipe_b)
    given = (kind, expected_m_for_psum_layout, ensure_zero_padding, epilogue)
    _call(a_data, a_scales, data, units, d, grouped_layout, *given)


def m_grouped_fp8_fp4_gemm_nt_masked(
    a: Scaled,
    b: PreparedWeights | Scaled,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    recipe: str | tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``m_grouped_fp8_gemm_nt_masked`` with MXFP4 or NVFP4 B, which stays 4 bit in memory; or FP8 B.

    Args:
        a: as there, with scales of 128 or of 32 of K, fp32 or packed UE8M0, as ``fp8_fp4_gemm_nt`` takes them.
        b: what ``prepare_fp4_weights`` made of ``[groups, n, k]``, or its arguments, which each call then packs first.
        d: as there.
        masked_m: as there.
        expected_m: as there.
        recipe: with FP4 B none.
        recipe_a: the peer's way to say what a scale of a covers, ``(1, 128)`` or ``(1, 32)``.
        recipe_b: and of b, ``(1, 32)`` for MXFP4, ``(1, 16)`` for NVFP4.
        compiled_dims: as there.
        disable_ue8m0_cast: as there.
        epilogue: as there.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    if not is_fp4(b):
        m_grouped_fp8_gemm_nt_masked(
            *(a, cast("Scaled", b), d, masked_m, expected_m),
            *(recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast),
            epilogue=epilogue,
        )
        return
    expected_m = _expected("expected_m", expected_m)
    a_data, a_scales, data, units, _ = operands(a, b, recipe, recipe_a, recipe_b)
    _call(a_data, a_scales, data, units, d, masked_m, "masked", expected_m, False, epilogue)


# Other names of the peer: for operands of either type, of which FP8 ones only are accepted here, and older ones.
m_grouped_fp8_fp4_gemm_nn_contiguous = m_grouped_fp8_gemm_nn_contiguous
fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked


def m_grouped_bf16_gemm_nt_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    grouped_layout: Tensor,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d[row] = a[row] @ b[group of the row].T``: a ``[m, k]``, b ``[groups, n, k]``, both bf16.

    Either dimension of b may be the contiguous one; else as ``m_grouped_fp8_gemm_nt_contiguous``.
    """
    _call(
        *(a, None, b, None, d, grouped_layout),
        *(_contiguous(use_psum_layout), expected_m_for_psum_layout, ensure_zero_padding, epilogue),
    )


def m_grouped_bf16_gemm_nn_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    grouped_layout: Tensor,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d[row] = a[row] @ b[group of the row]``: b ``[groups, k, n]``; else as the ``nt`` function."""
    check_tensors(b=b)
    if b.dim() != 3:
        raise ProblemError(f"b has {b.dim()} dimensions; accepted is 3")
    m_grouped_bf16_gemm_nt_contiguous(
        *(a, b.transpose(1, 2), d, grouped_layout, compiled_dims, use_psum_layout, ensure_zero_padding),
        epilogue=epilogue,
    )


def m_grouped_bf16_gemm_nt_masked(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    compiled_dims: str = "nk",
    *,
    epilogue: Epilogue | None = None,
) -> None:
    """``d[group, row] = a[group, row] @ b[group].T`` for the first ``masked_m[group]`` rows of each group, in bf16.

    As ``m_grouped_fp8_gemm_nt_masked``; either dimension of b may be the contiguous one.
    """
    expected_m = _expected("expected_m", expected_m)
    _call(a, None, b, None, d, masked_m, "masked", expected_m, False, epilogue)


bf16_m_grouped_gemm_nt_masked = m_grouped_bf16_gemm_nt_masked


def _contiguous(use_psum_layout: object) -> str:
    if not isinstance(use_psum_layout, bool):
        raise ProblemError(f"use_psum_layout is {use_psum_layout!r}; accepted is a boolean")
    return "psum" if use_psum_layout else "contiguous"


def _check_recipe(recipe: object, recipe_a: object, recipe_b: object) -> None:
    for name, given, accepted in (
        ("recipe", recipe, (_FP8, _PEER_RECIPE)),
        ("recipe_a", recipe_a, ((1, 128),)),
        ("recipe_b", recipe_b, ((128, 128),)),
    ):
        given = tuple(given) if isinstance(given, list) else given
        if given is not None and given not in accepted:
            raise ProblemError(f"{name} is {given!r}; grouped GEMMs accept {' and '.join(map(str, accepted))}")


def _expected(name: str, expected_m: Any) -> int:
    """A number of rows."""
    number = integer_of(expected_m)
    if number is None or not 0 <= number < 2**31:
        raise ProblemError(f"{name} is {expected_m!r}; accepted is an integer from 0 to 2**31 - 1")
    return number


def _call(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    layout: Tensor,
    kind: str,
    expected_m: int | None,
    zero_padding: bool,
    epilogue: Epilogue | None = None,
) -> None:
    steps = None
    if epilogue is not None:
        steps, d = steps_of(epilogue, d)
    if expected_m is not None and kind != "masked":
        expected_m = _expected("expected_m_for_psum_layout", expected_m)
    if not isinstance(zero_padding, bool):
        raise ProblemError(f"ensure_zero_padding is {zero_padding!r}; accepted is a boolean")
    of_steps = () if steps is None else steps.tensors().values()
    if needs_dispatch(a, a_scales, b, b_scales, d, layout, *of_steps):
        named: dict[str, object] = {"a": a, "b": b, "d": d, _layout_name(kind): layout}
        check_tensors(**named, **({} if a_scales is None else {"a_scales": a_scales, "b_scales": b_scales}))
        arguments = (a, a_scales, b, b_scales, d, layout, kind, expected_m, zero_padding)
        if steps is None:
            torch.ops.jitgemm.m_grouped_gemm(*arguments)
        else:
            torch.ops.jitgemm.m_grouped_gemm_with_epilogue(*arguments, *steps)
        return
    _run(a, a_scales, b, b_scales, d, layout, kind, expected_m, zero_padding, steps)


_plans: Table[Any, Any] = Table(4096)
os.register_at_fork(after_in_child=_plans.clear)  # a child whose parent used CUDA is told so where it loads a kernel


def _run(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    layout: Tensor,
    kind: str,
    expected_m: int | None,
    zero_padding: bool,
    steps: Steps | None = None,
) -> None:
    """Find or make the plan of a call and launch it; CPU tensors go to the reference."""
    in_force = settings.current()
    try:
        key = (
            kind, expected_m, zero_padding, in_force.generation, None if steps is None else steps.key(),
            a.shape, a.stride(), a.dtype, a.device, b.shape, b.stride(), b.dtype, b.device,
            d.shape, d.stride(), d.dtype, d.device, layout.shape, layout.stride(), layout.dtype, layout.device,
            None if a_scales is None else (a_scales.shape, a_scales.stride(), a_scales.dtype, a_scales.device,
                                           a_scales.data_ptr() % _ALIGNMENT),
            None if b_scales is None else (b_scales.shape, b_scales.stride(), b_scales.dtype, b_scales.device),
        )  # fmt: skip
    except AttributeError:
        named: dict[str, object] = {"a": a, "b": b, "d": d, _layout_name(kind): layout}
        check_tensors(**named, **({} if a_scales is None else {"a_scales": a_scales, "b_scales": b_scales}))
        raise
    plan = _plans.get(key)
    if plan is None:
        operands = _Operands(a, a_scales, b, b_scales, d, layout, kind, expected_m, in_force.mk_alignment, steps)
        made = _make_plan(operands, a_scales, in_force, zero_padding)
        plan = _plans.put(key, _CheckedPlan(operands, made) if in_force.debug else made)
    plan(a, a_scales, b, b_scales, d, layout, steps)


def _layout_name(kind: str) -> str:
    return "masked_m" if kind == "masked" else "grouped_layout"


class _Operands:
    """Checks everything about a call's tensors but their addresses.

    Raises:
        ProblemError: a tensor is not what is asked for.
    """

    def __init__(
        self,
        a: Tensor,
        a_scales: Tensor | None,
        b: Tensor,
        b_scales: Tensor | None,
        d: Tensor,
        layout: Tensor,
        kind: str,
        expected_m: int | None,
        alignment: int,
        steps: Steps | None = None,
    ) -> None:
        name = _layout_name(kind)
        named: dict[str, Any] = {"a": a, "b": b, "d": d, name: layout}
        recipe = "bf16"
        if a_scales is not None or b_scales is not None:
            named |= {"a_scales": a_scales, "b_scales": b_scales}
            recipe = _FP8
        check_tensors(**named)
        fp4 = recipe == _FP8 and b.dtype == torch.uint8
        if fp4:
            recipe = recipe_of(a, named["a_scales"], b)
        plain = recipe == "bf16"
        dtype = torch.bfloat16 if plain else torch.float8_e4m3fn
        d_dtypes = tuple(_D_DTYPES) if steps is None else (d.dtype,)  # with an epilogue: checked with its tensors
        dtypes = {"a": (dtype,), "b": (torch.uint8 if fp4 else dtype,), "d": d_dtypes, name: (torch.int32,)}
        masked = kind == "masked"
        ranks = {"a": 2 + masked, "b": 3, "d": 2 + masked, name: 1, "a_scales": 2 + masked, "b_scales": 3 - fp4}
        for key, tensor in named.items():
            accepted = dtypes.get(key, (torch.float32,))
            if tensor.dtype not in accepted:
                note = fp4_note(tensor) if key in ("a", "b") and not plain else ""
                raise ProblemError(
                    f"{key} has dtype {tensor.dtype}; accepted is {' or '.join(map(str, accepted))}{note}"
                )
            if tensor.dim() != ranks[key]:
                raise ProblemError(f"{key} has {tensor.dim()} dimensions; accepted is {ranks[key]}")
            if tensor.device != d.device:
                raise ProblemError(f"{key} is on {tensor.device} and d on {d.device}; accepted is one device for all")
        groups, n, k = b.shape
        if b_scales is not None and fp4:
            n, k = b_scales.shape[1], a.shape[-1]
        rows = a.shape[-2]
        traits, k_blocks = recipe_traits(recipe), -(-k // SCALE_GROUP)
        if min(n, k) < 1 or not 1 <= groups <= MAX_GROUPS:
            raise ProblemError(f"b has shape {tuple(b.shape)}; accepted is 1 to {MAX_GROUPS} groups, n >= 1 and k >= 1")
        if rows >= _MAX_ROWS:
            raise ProblemError(f"a has shape {tuple(a.shape)}; accepted are less than {_MAX_ROWS} rows")
        stacked, columns = (groups,) * masked, n if steps is None else n // steps.gated
        shapes = {
            "a": (*stacked, rows, k),
            "d": (*stacked, rows, columns),
            name: (rows,) if kind == "contiguous" else (groups,),
            "a_scales": (*stacked, rows, -(-k // traits.a_group)),
            "b_scales": (groups, scale_blocks(n, 1 if steps is None else steps.gated), k_blocks),
        }
        if b_scales is not None and fp4:
            shapes |= {"b_scales": (groups, n), "b": packed_shape(b_scales.shape, k, traits.fp4_group)}
            if not b.is_contiguous():
                raise ProblemError(f"b has strides {b.stride()}; accepted is a contiguous tensor")
        for key, shape in shapes.items():
            if key in named and tuple(named[key].shape) != shape:
                raise ProblemError(
                    f"{key} has shape {tuple(named[key].shape)}; b {tuple(b.shape)} and {rows} rows of a make it"
                    f" {shape}"
                )
        if not layout.is_contiguous():
            raise ProblemError(f"{name} has strides {layout.stride()}; accepted is a contiguous tensor")
        if d.stride(-1) != 1 and columns > 1:
            raise ProblemError(f"d has strides {d.stride()}; accepted is stride 1 along n")
        if (rows > 1 and d.stride(-2) < columns) or (masked and groups > 1 and d.stride(0) < extent(d[0])):
            raise ProblemError(f"d has strides {d.stride()}; its rows of {columns} elements overlap")
        for key in ("a_scales", "b_scales"):
            if key in named and extent(named[key]) >= 2**31:
                raise ProblemError(f"{key} spans {extent(named[key])} elements; accepted are less than 2**31")
        k_major = b.stride(2) == 1 or k == 1 or fp4
        expected = -(-rows // groups) if expected_m is None else expected_m
        self.problem = GroupedProblem(
            n=n,
            k=k,
            recipe=recipe,
            groups=groups,
            kind=kind,
            m=max(1, min(expected, rows)),
            layout="nt" if k_major or not plain else "nn",
            d_dtype=_D_DTYPES[d.dtype] if steps is None else check_steps(steps, d, n, groups, masked),
            alignment=alignment,
            epilogue=None if steps is None else steps.name,
        )
        self.rows, self.masked, self.device = rows, masked, d.device
        self._tensors = {key: (tuple(t.shape), t.stride(), t.element_size()) for key, t in named.items()}
        self.lengths = {key: span_of(t) for key, t in named.items()}
        self.layout_name = name

    def stack(self, name: str) -> Stack:
        """An operand as it is stored.

        Raises:
            ProblemError: TMA can't address it.
        """
        shape, strides, size = self._tensors[name]
        if name == "b" and self.problem.layout == "nn":
            shape, strides = (shape[0], shape[2], shape[1]), (strides[0], strides[2], strides[1])
        if len(shape) == 2:
            shape, strides = (1, *shape), (0, *strides)
        groups, rows, columns = shape
        group_stride, row_stride, column_stride = strides
        if name != "d":  # d is stored without TMA where that can't
            shown = f"{name} has shape {self._tensors[name][0]} and strides {self._tensors[name][1]}"
            if column_stride != 1 and columns > 1:
                raise ProblemError(f"{shown}; accepted is stride 1 along k" + " or n" * (name == "b"))
            if rows > 1 and (row_stride * size % _ALIGNMENT or row_stride < columns):
                raise ProblemError(
                    f"{shown}; TMA needs rows that don't overlap and start a multiple of {_ALIGNMENT} bytes apart"
                )
        if rows <= 1:  # a stride that is never used, but must be legal
            row_stride = get_tma_aligned_size(columns, size)
        if groups <= 1:
            group_stride = get_tma_aligned_size(rows * row_stride, size)
        elif name != "d" and (group_stride * size % _ALIGNMENT or group_stride < 0):
            raise ProblemError(f"{shown}; TMA needs groups that start a multiple of {_ALIGNMENT} bytes apart")
        return Stack(rows, columns, row_stride, groups, group_stride)

    def scales_in_place(self, aligned: bool) -> bool:
        """Whether TMA can load a's scales as they are: MN-major, with aligned steps along K and from group to group."""
        shape, strides, _ = self._tensors["a_scales"]
        rows, k_blocks = shape[-2:]
        steps = [strides[-1]] if k_blocks > 1 else []
        steps += [strides[0]] if len(shape) == 3 and shape[0] > 1 else []
        return (
            aligned
            and (strides[-2] == 1 or rows == 1)
            and not any(step % 4 for step in steps)
            and (k_blocks == 1 or strides[-1] >= rows)
        )

    def a_scales_stack(self, copied: bool) -> Stack:
        """A's scales as the kernel takes them, a k-block a row."""
        shape, strides, _ = self._tensors["a_scales"]
        rows, k_blocks = shape[-2:]
        groups = shape[0] if len(shape) == 3 else 1
        aligned = get_tma_aligned_size(rows, 4)
        k_stride = aligned if copied or k_blocks == 1 else strides[-1]
        group_stride = aligned * k_blocks if copied or groups == 1 else strides[0]
        return Stack(k_blocks, rows, k_stride, groups, group_stride)

    def b_scales_stack(self) -> tuple[Stack, int]:
        """B's scales, and their stride along K."""
        shape, strides, _ = self._tensors["b_scales"]
        if self.problem.dense.traits.fp4_b:
            return Stack(shape[1], 1, strides[1], shape[0], strides[0]), 0
        return Stack(shape[1], shape[2], strides[1], shape[0], strides[0]), strides[2]


class _GroupedPlan:
    """A checked problem with its kernel and geometry."""

    def __init__(
        self,
        operands: _Operands,
        geometry: GroupedGeometry,
        copies_scales: bool,
        device: int,
        range_name: str | None,
    ) -> None:
        self._operands, self._geometry, self._copies_scales, self._device = operands, geometry, copies_scales, device
        self._range_name = range_name
        self._bound: Table[tuple[Any, ...], Callable[[], int]] = Table(BOUND_LAUNCHES)

    def __call__(
        self,
        a: Tensor,
        a_scales: Tensor | None,
        b: Tensor,
        b_scales: Tensor | None,
        d: Tensor,
        layout: Tensor,
        steps: Steps | None,
    ) -> None:
        if current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(a, a_scales, b, b_scales, d, layout, steps)
        if self._copies_scales and a_scales is not None:
            _check_addresses(self._operands, a, a_scales, b, b_scales, d, layout)
            a_scales = copy_to_mn_major(a_scales)
        packed = None if steps is None else pack(steps)
        key = (raw_stream(self._device), *_addresses(a, a_scales, b, b_scales, d, layout), packed)
        run = self._bound.get(key)
        if run is None:
            if not self._copies_scales:
                _check_addresses(self._operands, a, a_scales, b, b_scales, d, layout)
            arguments = self._geometry.bind(*key[1:7])
            if steps is not None and packed is not None:
                _check_steps_apart(self._operands, steps, a, a_scales, b, b_scales, d, layout)
                ctypes.memmove(arguments.address + STEPS_OFFSET, packed, len(packed))
            run = self._geometry.launch.prepare(arguments, key[0])
            if self._range_name is not None:
                run = in_range(self._range_name, run)
            self._bound.put(key, run)
        status = run()
        if status:
            self._geometry.launch.retry(run, status)
        return None


class _ReferencePlan:
    """The same on the CPU: the reference computes."""

    def __init__(self, operands: _Operands, zero_padding: bool) -> None:
        self._operands, self._zero_padding = operands, zero_padding

    @torch.no_grad()
    def __call__(
        self,
        a: Tensor,
        a_scales: Tensor | None,
        b: Tensor,
        b_scales: Tensor | None,
        d: Tensor,
        layout: Tensor,
        steps: Steps | None,
    ) -> None:
        from jitgemm.reference import grouped as reference
        from jitgemm.reference.epilogue import PLAIN, Output

        _check_overlap(self._operands, a, a_scales, b, b_scales, d, layout)
        problem = self._operands.problem
        if problem.dense.traits.fp4_b and b_scales is not None:
            b, b_scales = dequantized(b, b_scales, problem.k, problem.dense.traits.fp4_group), None
        epilogue = PLAIN
        output: Output = d
        if steps is not None:
            _check_steps_apart(self._operands, steps, a, a_scales, b, b_scales, d, layout)
            epilogue, output = steps.reference(), d if steps.d_scales is None else (d, steps.d_scales)
        if problem.kind == "masked":
            reference.m_grouped_masked(
                a, b, output, layout, a_scales=a_scales, b_scales=b_scales, recipe=problem.recipe, epilogue=epilogue
            )
        else:
            reference.m_grouped_contiguous(
                *(a, b, output, layout),
                epilogue=epilogue,
                a_scales=a_scales,
                b_scales=b_scales,
                recipe=problem.recipe,
                use_psum_layout=problem.kind == "psum",
                alignment=problem.alignment,
                zero_padding=self._zero_padding,
            )


class _CheckedPlan:
    """A plan that first checks what the layout says, for debugging."""

    def __init__(self, operands: _Operands, plan: Any) -> None:
        self._operands, self._plan = operands, plan

    def __call__(
        self,
        a: Tensor,
        a_scales: Tensor | None,
        b: Tensor,
        b_scales: Tensor | None,
        d: Tensor,
        layout: Tensor,
        steps: Steps | None,
    ) -> None:
        # What a captured call will find in the layout isn't known yet.
        if not (layout.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._check(layout)
        self._plan(a, a_scales, b, b_scales, d, layout, steps)

    def _check(self, layout: Tensor) -> None:
        from jitgemm.reference import grouped as reference

        problem, rows = self._operands.problem, self._operands.rows
        if problem.kind == "masked":
            reference.check_counts(layout, problem.groups, rows)
        elif problem.kind == "psum":
            reference.rows_of_psum(layout, problem.groups, rows, problem.alignment)
        else:
            reference.check_index(layout, problem.groups, rows, problem.alignment)


class _EmptyPlan:
    """There are no rows: nothing to do."""

    def __call__(self, *_: object) -> None:
        return None


def _addresses(
    a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor | None, d: Tensor, layout: Tensor
) -> tuple[int, int, int, int, int, int]:
    return (
        a.data_ptr(),
        0 if a_scales is None else a_scales.data_ptr(),
        b.data_ptr(),
        0 if b_scales is None else b_scales.data_ptr(),
        d.data_ptr(),
        layout.data_ptr(),
    )


def _check_addresses(operands: _Operands, *tensors: Any) -> None:
    """Check that TMA can start at the operands' addresses, and ``_check_overlap``.

    Raises:
        ProblemError: it can't.
    """
    a, _, b, *_ = tensors
    for name, tensor in (("a", a), ("b", b)):
        if tensor.data_ptr() % _ALIGNMENT:
            raise ProblemError(
                f"{name} starts at address {tensor.data_ptr():#x}; accepted is a multiple of {_ALIGNMENT} bytes (TMA)"
            )
    _check_overlap(operands, *tensors)


def _check_overlap(operands: _Operands, *tensors: Any) -> None:
    """Check that the output lies apart from the inputs.

    Raises:
        ProblemError: d overlaps an input.
    """
    a, a_scales, b, b_scales, d, layout = tensors
    inputs = {"a": a, "a_scales": a_scales, "b": b, "b_scales": b_scales, operands.layout_name: layout}
    known = [(name, t.data_ptr(), operands.lengths[name]) for name, t in inputs.items() if t is not None]
    check_apart("d", d.data_ptr(), operands.lengths["d"], known)


def _check_steps_apart(operands: _Operands, steps: Steps, *tensors: Any) -> None:
    """Check that both outputs lie apart from all inputs, an epilogue's too.

    Raises:
        ProblemError: one overlaps another.
    """
    a, a_scales, b, b_scales, d, layout = tensors
    inputs = {"a": a, "a_scales": a_scales, "b": b, "b_scales": b_scales, operands.layout_name: layout}
    check_steps_apart(steps, d, inputs)


def _make_plan(operands: _Operands, a_scales: Tensor | None, in_force: Settings, zero_padding: bool) -> Any:
    problem, kind = operands.problem, operands.device.type
    if kind == _GPU:
        a, b, d = (operands.stack(name) for name in ("a", "b", "d"))
    elif kind != "cpu":
        raise ProblemError(f"d is on {operands.device}; accepted are CUDA and CPU tensors")
    if in_force.record is not None:
        record(in_force.record, problem)
    if kind != _GPU:
        return _ReferencePlan(operands, zero_padding)
    if operands.rows == 0:
        return _EmptyPlan()
    copies_scales, a_scales_stack, b_scales_stack, b_scales_k_stride = False, None, None, 0
    if a_scales is not None:
        copies_scales = not operands.scales_in_place(a_scales.data_ptr() % _ALIGNMENT == 0)
        a_scales_stack = operands.a_scales_stack(copies_scales)
        b_scales_stack, b_scales_k_stride = operands.b_scales_stack()
    ordinal = -1 if operands.device.index is None else operands.device.index
    device, num_sms = device_facts(ordinal)
    assert problem.m is not None
    config = chooser(problem, device, in_force)(problem.m)
    spec = FAMILY.spec(problem, config, device.arch.name)
    geometry = GroupedGeometry(
        problem,
        config,
        load(spec, ordinal, problem),
        a=a,
        b=b,
        d=d,
        a_scales=a_scales_stack,
        b_scales=b_scales_stack,
        b_scales_k_stride=b_scales_k_stride,
        num_sms=min(num_sms, in_force.num_sms or num_sms),
        zero_padding=zero_padding,
        pdl=in_force.pdl,
    )
    name = f"jitgemm {FAMILY.describe(spec)} groups={problem.groups} m={problem.m} n={problem.n} k={problem.k}"
    return _GroupedPlan(operands, geometry, copies_scales, ordinal, name if in_force.nvtx else None)


def _grouped_operator(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    layout: Tensor,
    kind: str,
    expected_m: int | None,
    zero_padding: bool,
) -> None:
    _run(a, a_scales, b, b_scales, d, layout, kind, expected_m, zero_padding)


def _grouped_fake(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    layout: Tensor,
    kind: str,
    expected_m: int | None,
    zero_padding: bool,
) -> None:
    rank = 3 if kind == "masked" else 2
    for name, tensor, dimensions in (("a", a, rank), ("b", b, 3), ("d", d, rank), (_layout_name(kind), layout, 1)):
        if tensor.dim() != dimensions:
            raise ProblemError(f"{name} has {tensor.dim()} dimensions; accepted is {dimensions}")


torch.library.define(
    "jitgemm::m_grouped_gemm",
    "(Tensor a, Tensor? a_scales, Tensor b, Tensor? b_scales, Tensor(d!) d, Tensor layout, str kind, int? expected_m,"
    " bool zero_padding) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("jitgemm::m_grouped_gemm", ("cpu", "cuda"), _grouped_operator)
torch.library.register_fake("jitgemm::m_grouped_gemm", _grouped_fake)


def _grouped_with_epilogue_operator(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    layout: Tensor,
    kind: str,
    expected_m: int | None,
    zero_padding: bool,
    *steps: Any,
) -> None:
    _run(a, a_scales, b, b_scales, d, layout, kind, expected_m, zero_padding, Steps(*steps))


def _grouped_with_epilogue_fake(*arguments: Any) -> None:
    _grouped_fake(*arguments[:9])


torch.library.define(
    "jitgemm::m_grouped_gemm_with_epilogue",
    "(Tensor a, Tensor? a_scales, Tensor b, Tensor? b_scales, Tensor(d!) d, Tensor layout, str kind, int? expected_m,"
    " bool zero_padding, Tensor? alpha, float alpha_value, Tensor? bias, bool swiglu, float? limit,"
    " Tensor? row_weights, Tensor(e!)? d_scales) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("jitgemm::m_grouped_gemm_with_epilogue", ("cpu", "cuda"), _grouped_with_epilogue_operator)
torch.library.register_fake("jitgemm::m_grouped_gemm_with_epilogue", _grouped_with_epilogue_fake)
