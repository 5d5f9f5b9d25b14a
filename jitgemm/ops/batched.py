"""Several GEMMs in one launch, of sizes that the host knows, under the peer's names: the products around attention, and
gradients of experts' weights (groups along K).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from jitgemm import settings
from jitgemm.errors import ProblemError
from jitgemm.families.batched import EXPECTED_K, FAMILY, MAX_GROUPS, MOST_GROUPS_OF_K, BatchedProblem
from jitgemm.families.batched_launch import BatchedGeometry, Heads, PartOfK
from jitgemm.families.gemm import SCALE_GROUP
from jitgemm.families.grouped_launch import Stack
from jitgemm.families.plain import PlainLaunch
from jitgemm.families.sum_parts import QUAD, SUM_PARTS, THREADS, ways_of
from jitgemm.heuristics.batched import chooser, problem_of_sum
from jitgemm.kernel import load
from jitgemm.ops.checks import (
    Scaled,
    check_apart,
    check_elements_apart,
    check_tensors,
    extent,
    integer_of,
    pair,
    span_of,
)
from jitgemm.ops.dispatch import needs_dispatch
from jitgemm.ops.layout import copy_to_mn_major
from jitgemm.ops.plain import Gpu
from jitgemm.plan import BOUND_LAUNCHES, Table, current_device, device_facts, raw_stream
from jitgemm.record import record
from jitgemm.reference import einsum as reference_einsum
from jitgemm.reference import grouped as reference_grouped
from jitgemm.reference.einsum import EXPRESSIONS, FP8_EXPRESSIONS
from jitgemm.reference.epilogue import gemm_into
from jitgemm.reference.layout import get_tma_aligned_size
from jitgemm.settings import Settings

_D_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_ALIGNMENT = 16  # bytes: TMA's, of addresses and strides
_GPU = "cuda"  # the type of the devices that kernels run on
_ROW_RECIPE = "fp8_1x128_1x128"
_BLOCK_RECIPE = "fp8_1x128_128x128"
_PEER_RECIPES = {(1, 128, 128): _BLOCK_RECIPE, (1, 1, 128): _ROW_RECIPE}


# -- Along K.


def k_grouped_fp8_gemm_nt_contiguous(
    a: Scaled,
    b: Scaled,
    d: Tensor,
    ks: Sequence[int],
    grouped_layout: Tensor,
    c: Tensor | None = None,
    recipe: str | tuple[int, int, int] = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """``d[group] = a[group] @ b[group].T (+ c[group])``, where each group has a K of its own: gradients of weights.

    One launch serves up to 32 groups. Groups without elements get c, or zeros.

    Args:
        a: e4m3, of any shape, and contiguous: the elements of each group's ``[m, k]`` one group after the other; and
            scales ``[m, sum of ceil(k/128)]``, read fastest MN-major.
        b: the same with n.
        d: output, fp32 or bf16 ``[groups, m, n]``, n contiguous.
        ks: K of each group, multiples of 16.
        grouped_layout: int32 ``[groups]``, the same on the device, which is not read here.
        c: added to the product; ``[groups, m, n]`` of d's dtype, may be d itself or a view of the same elements; that
            is fastest in fp32.
        recipe: what one scale covers, ``"fp8_1x128_1x128"`` or the peer's ``(1, 1, 128)``.
        compiled_dims: accepted for the peer's callers; sizes are always run-time values here.
        use_psum_layout: must be false, as in the peer on this architecture.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    (a_data, a_scales), (b_data, b_scales) = pair("a", a), pair("b", b)
    _k_grouped(a_data, a_scales, b_data, b_scales, d, ks, grouped_layout, c, recipe, use_psum_layout, "nt")


def k_grouped_fp8_gemm_tn_contiguous(
    a: Scaled,
    b: Scaled,
    d: Tensor,
    ks: Sequence[int],
    grouped_layout: Tensor,
    c: Tensor | None = None,
    recipe: str | tuple[int, int, int] = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """``d[group] = a[group].T @ b[group] (+ c[group])``: a ``[sum of ks, m]`` and scales ``[sum of ceil(k/128), m]``.

    b is the same with n. The tensor cores of this architecture read FP8 along K only, so both operands are transposed
    into copies first; else as the ``nt`` function.
    """
    (a_data, a_scales), (b_data, b_scales) = pair("a", a), pair("b", b)
    _k_grouped(a_data, a_scales, b_data, b_scales, d, ks, grouped_layout, c, recipe, use_psum_layout, "tn")


def k_grouped_bf16_gemm_tn_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    ks: Sequence[int],
    grouped_layout: Tensor,
    c: Tensor | None = None,
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """``d[group] = a[group].T @ b[group] (+ c[group])`` in bf16: a ``[sum of ks, m]``, b ``[sum of ks, n]``.

    Any ks will do, and m and n that are multiples of 8; else as ``k_grouped_fp8_gemm_nt_contiguous``.
    """
    _k_grouped(a, None, b, None, d, ks, grouped_layout, c, None, use_psum_layout, "tn")


def _k_grouped(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    ks: Sequence[int] | None,
    grouped_layout: Tensor,
    c: Tensor | None,
    recipe: object,
    use_psum_layout: object,
    layout: str,
) -> None:
    if use_psum_layout is not False:
        raise ProblemError(f"use_psum_layout is {use_psum_layout!r}; groups along K accept False")
    if recipe is not None and _recipe_name(recipe) != _ROW_RECIPE:
        raise ProblemError(f"recipe is {recipe!r}; groups along K accept {_ROW_RECIPE} and (1, 1, 128)")
    scales = {} if recipe is None else {"a_scales": a_scales, "b_scales": b_scales}
    check_tensors(a=a, b=b, d=d, grouped_layout=grouped_layout, **scales, **({} if c is None else {"c": c}))
    groups, sizes = d.shape[0] if d.dim() == 3 else 0, _integers(ks)
    if len(sizes) != groups or any(not 0 <= k < 2**31 for k in sizes):
        raise ProblemError(f"ks is {ks!r}; accepted are {groups} integers, at least 0: K of each group in d")
    if grouped_layout.dtype != torch.int32 or tuple(grouped_layout.shape) != (groups,):
        raise ProblemError(
            f"grouped_layout is {grouped_layout.dtype} {tuple(grouped_layout.shape)};"
            f" accepted is torch.int32 {(groups,)}"
        )
    accumulate = c is not None and c is d
    arguments = (a, a_scales, b, b_scales, d, None if accumulate else c, accumulate, sizes, layout)
    if needs_dispatch(a, a_scales, b, b_scales, d, c):
        torch.ops.jitgemm.k_grouped_gemm(*arguments)
    else:
        _run_k_grouped(*arguments)


def _integers(values: object) -> list[int]:
    """What a list of integers holds; no number where there is anything else."""
    numbers = [integer_of(value) for value in values] if isinstance(values, Sequence) else [None]
    return [] if None in numbers else cast("list[int]", numbers)


def _is_same(c: Tensor | None, d: Tensor) -> bool:
    """Whether c is another tensor of d's elements. Only an operator's implementation sees addresses under all modes."""
    if c is None or not (c.shape == d.shape and c.dtype == d.dtype and c.device == d.device):
        return False
    strides = zip(d.shape, c.stride(), d.stride(), strict=True)
    return all(of_c == of_d or size <= 1 for size, of_c, of_d in strides) and c.data_ptr() == d.data_ptr()


# -- Batches.


def einsum(expr: str, a: Tensor, b: Tensor, d: Tensor, c: Tensor | None = None, use_cublaslt: bool = False) -> None:
    """``d = einsum(expr, a, b) (+ c)`` for bf16 operands, which are read in place where they have stride 1 in a
    dimension that is multiplied or summed over.

    K is summed up in one chain, unless an override of ``split_k`` is in force. ``bmk,bnk->mn`` alone sums up parts of
    the batches first, as many as are fastest on the device, and then these: in FP32, always in the same order, c last,
    rounded once.

    Args:
        expr: ``bhr,hdr->bhd``, ``bhd,hdr->bhr``, ``bhd,bhr->hdr`` or ``bmk,bnk->mn``.
        a: bf16, dimensions as the expression has them.
        b: the same.
        d: output, bf16 or fp32, its last dimension contiguous.
        c: added to the product; of d's shape and dtype, may be d itself or a view of the same elements.
        use_cublaslt: have torch's cuBLAS compute instead.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    if use_cublaslt is False and _launch_again(expr, "bf16", _Tensors(a, None, b, None, d, c)):
        return
    if expr not in EXPRESSIONS:
        raise ProblemError(f"expr is {expr!r}; accepted is {', '.join(EXPRESSIONS)}")
    check_tensors(a=a, b=b, d=d, **({} if c is None else {"c": c}))
    reference_einsum.check(expr, EXPRESSIONS, a, b, d, c)
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype != torch.bfloat16:
            raise ProblemError(f"{name} has dtype {tensor.dtype}; accepted is torch.bfloat16")
    if not isinstance(use_cublaslt, bool):
        raise ProblemError(f"use_cublaslt is {use_cublaslt!r}; accepted is a boolean")
    if use_cublaslt:
        _by_cublas(expr, a, b, d, c)
    elif expr == "bmk,bnk->mn":
        plane = d[None]
        plane_of_c = plane if c is d else None if c is None else c[None]
        plan = _batched(a, None, b, None, plane, plane_of_c, "bf16", "batch_sum", None)
        _repeat(plan, expr, "bf16", _Tensors(a, None, b, None, d, c))
    else:
        _of_heads(expr, a, None, b, None, d, c, "bf16")


def fp8_einsum(
    expr: str,
    a: Scaled,
    b: Scaled,
    d: Tensor,
    c: Tensor | None = None,
    recipe: str | tuple[int, int, int] = (1, 128, 128),
) -> None:
    """``d = einsum(expr, a, b) (+ c)`` for e4m3 operands with fp32 scales, one for 128 of what is summed over.

    The tensor cores of this architecture read FP8 along the summed dimension only. Operands that have stride 1 there
    are read in place, so both of ``bhr,hdr->bhd``; others are transposed into copies first.

    Args:
        expr: ``bhr,hdr->bhd``, ``bhd,hdr->bhr`` or ``bhd,bhr->hdr`` (this with scales of single rows only).
        a: e4m3 and scales, shaped as the expression has them, but the summed dimension in groups of 128.
        b: the same; with recipe ``(1, 128, 128)`` scales have groups of 128 in its other dimension too (not h).
        d: output, bf16 or fp32, its last dimension contiguous.
        c: added to the product; of d's shape and dtype, may be d itself or a view of the same elements.
        recipe: what one scale covers: ``(1, 128, 128)`` or ``(1, 1, 128)``, or their names.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    name = _recipe_name(recipe)
    (a_data, a_scales), (b_data, b_scales) = pair("a", a), pair("b", b)
    if _launch_again(expr, name, _Tensors(a_data, a_scales, b_data, b_scales, d, c)):
        return
    if expr not in FP8_EXPRESSIONS:
        raise ProblemError(f"expr is {expr!r}; accepted is {', '.join(FP8_EXPRESSIONS)}")
    tensors = {"a": a_data, "a_scales": a_scales, "b": b_data, "b_scales": b_scales, "d": d}
    check_tensors(**tensors, **({} if c is None else {"c": c}))
    reference_einsum.check(expr, FP8_EXPRESSIONS, a_data, b_data, d, c)
    if expr == "bhd,bhr->hdr" and name != _ROW_RECIPE:
        raise ProblemError(f"recipe is {recipe!r}; {expr} accepts {_ROW_RECIPE} and (1, 1, 128)")
    for key, tensor in tensors.items():
        if key in ("a_scales", "b_scales") and tensor.dim() != 3:
            raise ProblemError(f"{key} has {tensor.dim()} dimensions; accepted is 3")
    _of_heads(expr, a_data, a_scales, b_data, b_scales, d, c, name)


def fp8_gemm_nt_skip_head_mid(
    a: Scaled,
    b: Scaled,
    d: Tensor,
    head_splits: tuple[int, int, int],
    recipe: str | tuple[int, int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """``a @ b.T``, written around a hole in each head, which stays as it is.

    Args:
        a: e4m3 ``[m, k]``, K contiguous, and scales ``[m, ceil(k/128)]``, read fastest MN-major.
        b: e4m3 ``[n, k]``, K contiguous, and scales ``[ceil(n/128), ceil(k/128)]``.
        d: output, bf16 or fp32 ``[m, heads * (left + mid + right)]``, its last dimension contiguous.
        head_splits: left, mid and right columns of a head; n is heads * (left + right).
        recipe: what one scale covers, ``(1, 128, 128)``, ``(1, 1, 128)`` or their names.
        compiled_dims: accepted for the peer's callers; sizes are always run-time values here.
        disable_ue8m0_cast: accepted for the peer's callers; fp32 scales are never cast here.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    name = _BLOCK_RECIPE if recipe is None else _recipe_name(recipe)
    (a_data, a_scales), (b_data, b_scales) = pair("a", a), pair("b", b)
    tensors = {"a": a_data, "a_scales": a_scales, "b": b_data, "b_scales": b_scales, "d": d}
    check_tensors(**tensors)
    for key, tensor in tensors.items():
        if tensor.dim() != 2:
            raise ProblemError(f"{key} has {tensor.dim()} dimensions; accepted is 2")
    splits = tuple(head_splits) if isinstance(head_splits, (tuple, list)) else ()
    n = b_data.shape[0]
    if len(splits) != 3 or any(not isinstance(part, int) or isinstance(part, bool) or part < 0 for part in splits):
        raise ProblemError(f"head_splits is {head_splits!r}; accepted are three integers: left, mid and right columns")
    left, mid, right = splits
    if left + right == 0 or n % (left + right):
        raise ProblemError(f"head_splits is {splits}; accepted are left + right that divide n = {n}")
    shape = (a_data.shape[0], n // (left + right) * sum(splits))
    if tuple(d.shape) != shape:
        raise ProblemError(f"d has shape {tuple(d.shape)}; accepted is {shape}")
    a_data, a_scales, b_data, b_scales, d = (tensor[None] for tensor in (a_data, a_scales, b_data, b_scales, d))
    _batched(a_data, a_scales, b_data, b_scales, d, None, name, "batched", Heads(left + right, left, mid))


def _of_heads(
    expr: str,
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    recipe: str,
) -> None:
    """One GEMM for each head: tensors as [h, m, k], [h, n, k] and [h, m, n], without a copy."""
    of_a, of_b, of_d = {
        "bhr,hdr->bhd": ((1, 0, 2), (0, 1, 2), (1, 0, 2)),
        "bhd,hdr->bhr": ((1, 0, 2), (0, 2, 1), (1, 0, 2)),
        "bhd,bhr->hdr": ((1, 2, 0), (1, 2, 0), (0, 1, 2)),
    }[expr]
    seen = d.permute(of_d)
    plan = _batched(
        a.permute(of_a),
        None if a_scales is None else a_scales.permute(of_a),
        b.permute(of_b),
        None if b_scales is None else b_scales.permute(of_b),
        seen,
        seen if c is d else None if c is None else c.permute(of_d),
        recipe,
        "batched",
        None,
    )
    _repeat(plan, expr, recipe, _Tensors(a, a_scales, b, b_scales, d, c))


_of_expressions: Table[Any, Any] = Table(4096)
"""Plans of calls that need neither views nor copies to be repeated: a launch knows addresses alone."""


def _key_of_expression(expr: str, recipe: str, tensors: _Tensors) -> tuple[object, ...]:
    return (expr, recipe, tensors.c is tensors.d, settings.current().generation, *map(_key, tensors))


def _repeat(plan: object, expr: str, recipe: str, tensors: _Tensors) -> None:
    """Keep the plan of a call for ``_launch_again``, if it is one."""
    direct = isinstance(plan, _PlanOfSum) or (isinstance(plan, _Plan) and not plan.copies)
    if direct and (tensors.c is None or tensors.c is tensors.d):
        _of_expressions.put(_key_of_expression(expr, recipe, tensors), plan)


def _launch_again(expr: str, recipe: str, tensors: _Tensors) -> bool:
    """Launch as an earlier call with like tensors did; whether there was one."""
    if needs_dispatch(*tensors) or (tensors.c is not None and tensors.c is not tensors.d):
        return False
    plan = _of_expressions.get(_key_of_expression(expr, recipe, tensors))
    if plan is not None:
        plan(tensors)
    return plan is not None


def _by_cublas(expr: str, a: Tensor, b: Tensor, d: Tensor, c: Tensor | None) -> None:
    _check_same_kind("bf16", d, c, a=a, b=b)
    _check_output("d", d)
    if not needs_dispatch(a, b, d, c):  # else a view of d is what the mode makes of it
        tensors = _Tensors(a, None, b, None, d, c)
        _check_addresses(_spans(tensors), tensors, c is d or _is_same(c, d), on_gpu=False)
    if d.dtype == torch.float32:
        a, b = a.float(), b.float()
    result = torch.einsum(expr, a, b)
    d.copy_(result if c is None else result.add_(c))


# -- Checks.


def _recipe_name(recipe: object) -> str:
    given = tuple(recipe) if isinstance(recipe, list) else recipe
    for peer, name in _PEER_RECIPES.items():
        if given in (peer, name):
            return name
    raise ProblemError(
        f"recipe is {recipe!r}; accepted are {', '.join(map(str, (*_PEER_RECIPES.values(), *_PEER_RECIPES)))}"
    )


def _check_same_kind(recipe: str, d: Tensor, c: Tensor | None, **inputs: Tensor | None) -> None:
    """Check dtypes and devices."""
    dtype = torch.bfloat16 if recipe == "bf16" else torch.float8_e4m3fn
    if d.dtype not in _D_DTYPES:
        raise ProblemError(f"d has dtype {d.dtype}; accepted are torch.bfloat16 and torch.float32")
    if c is not None and c.dtype != d.dtype:
        raise ProblemError(f"c has dtype {c.dtype} and d {d.dtype}; they must agree")
    for name, tensor in (*inputs.items(), ("c", c)):
        if tensor is None:
            continue
        accepted = d.dtype if name == "c" else torch.float32 if name.endswith("scales") else dtype
        if tensor.dtype != accepted:
            raise ProblemError(f"{name} has dtype {tensor.dtype}; accepted is {accepted}")
        if tensor.device != d.device:
            raise ProblemError(f"{name} is on {tensor.device} and d on {d.device}; accepted is one device for all")
        if name.endswith("scales") and extent(tensor) >= 2**31:
            raise ProblemError(f"{name} spans {extent(tensor)} elements; accepted are less than 2**31")


def _check_output(name: str, tensor: Tensor) -> None:
    """Check that the last dimension is contiguous and that no two elements are one."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        shown = f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        raise ProblemError(f"{shown}; accepted is stride 1 in the last dimension")
    check_elements_apart(name, tensor)


class _Span(NamedTuple):
    """Where a tensor's bytes are, from its address on."""

    name: str
    bytes: int


class _Tensors(NamedTuple):
    """What a plan is called with."""

    a: Tensor
    a_scales: Tensor | None
    b: Tensor
    b_scales: Tensor | None
    d: Tensor
    c: Tensor | None

    def addresses(self) -> tuple[int, ...]:
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in self)


def _spans(tensors: _Tensors) -> list[_Span]:
    return [_Span(name, span_of(tensor)) for name, tensor in zip(_Tensors._fields, tensors, strict=True)]


def _check_addresses(spans: Sequence[_Span], tensors: _Tensors, accumulate: bool, on_gpu: bool) -> None:
    """Check that the output lies apart from the inputs, and that TMA can start at the operands' addresses.

    Raises:
        ProblemError: it does not, or can't.
    """
    addresses = tensors.addresses()
    others = [(span.name, address, span.bytes) for span, address in zip(spans, addresses, strict=True)]
    others = [one for one in others if one[0] != "d" and not (one[0] == "c" and accumulate)]
    check_apart("d", tensors.d.data_ptr(), spans[4].bytes, others)
    for name, address, _ in others if on_gpu else ():
        if name in ("a", "b") and address % _ALIGNMENT:
            raise ProblemError(
                f"{name} starts at address {address:#x}; accepted is a multiple of {_ALIGNMENT} bytes (TMA)"
            )


def _key(tensor: Tensor | None) -> tuple[object, ...] | None:
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % _ALIGNMENT


# -- Running batches.

_plans: Table[Any, Any] = Table(4096)


def _forget_plans() -> None:
    _plans.clear()
    _of_expressions.clear()


os.register_at_fork(after_in_child=_forget_plans)  # a child whose parent used CUDA is told so where it loads a kernel


def _batched(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    recipe: str,
    kind: str,
    heads: Heads | None,
) -> object:
    """Compute; the plan of a call that did so directly, from these tensors."""
    accumulate = c is not None and c is d
    splits = [] if heads is None else list(heads)
    arguments = (a, a_scales, b, b_scales, d, None if accumulate else c, accumulate, recipe, kind, splits)
    if needs_dispatch(a, a_scales, b, b_scales, d, c):
        torch.ops.jitgemm.batched_gemm(*arguments)
        return None
    return _run_batched(*arguments)


def _run_batched(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    accumulate: bool,
    recipe: str,
    kind: str,
    heads: list[int],
) -> object:
    """Find or make the plan of a call and launch it; CPU tensors go to the reference. The plan, if it takes a and b."""
    given = a, b
    if recipe != "bf16":
        a, b = _along_k(a), _along_k(b)
    accumulate, in_force = accumulate or _is_same(c, d), settings.current()
    tensors = _Tensors(a, a_scales, b, b_scales, d, d if accumulate else c)
    key = (recipe, kind, tuple(heads), accumulate, in_force.generation, *map(_key, tensors))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.put(
            key, _plan_of_batches(tensors, recipe, kind, Heads(*heads) if heads else None, accumulate, in_force)
        )
    plan(tensors)
    return plan if a is given[0] and b is given[1] else None


def _batched_operator(*arguments: Any) -> None:
    _run_batched(*arguments)


def _ordinal(d: Tensor) -> int:
    return -1 if d.device.index is None else d.device.index


def _along_k(operand: Tensor) -> Tensor:
    """An FP8 operand whose last dimension is contiguous, as the tensor cores want it: itself or, on a GPU, a copy."""
    if operand.stride(-1) == 1 or operand.device.type != _GPU:
        return operand
    k = operand.shape[-1]
    copy = operand.new_empty((*operand.shape[:-1], get_tma_aligned_size(k, operand.element_size())))[..., :k]
    return copy.copy_(operand)


def _check_scale_shapes(tensors: _Tensors, recipe: str, groups: int, m: int, n: int, k_blocks: int) -> None:
    if recipe == "bf16":
        return
    of_b = n if recipe == _ROW_RECIPE else -(-n // SCALE_GROUP)
    for name, scales, rows in (("a_scales", tensors.a_scales, m), ("b_scales", tensors.b_scales, of_b)):
        if scales is None or tuple(scales.shape) != (groups, rows, k_blocks):
            shape = None if scales is None else tuple(scales.shape)
            raise ProblemError(
                f"{name} has shape {shape} as [groups, rows, blocks of K]; recipe {recipe} accepts"
                f" {(groups, rows, k_blocks)}"
            )


def _plan_of_batches(
    tensors: _Tensors, recipe: str, kind: str, heads: Heads | None, accumulate: bool, in_force: Settings
) -> Any:
    a, a_scales, b, b_scales, d, c = tensors
    _check_same_kind(recipe, d, c, a=a, a_scales=a_scales, b=b, b_scales=b_scales)
    _check_output("d", d)
    if c is not None and c.shape[-1] > 1 and c.stride(-1) != 1:
        raise ProblemError(f"c has strides {c.stride()}; accepted is stride 1 in the last dimension")
    all_batches, m, k = a.shape
    groups, n = d.shape[0], b.shape[1]
    _check_scale_shapes(tensors, recipe, groups, m, n, -(-k // SCALE_GROUP))
    spans = _spans(tensors)
    on_gpu = d.device.type == _GPU
    if not on_gpu:
        if d.device.type == "cpu":
            return _ReferenceOfBatches(spans, recipe, kind, heads, accumulate)
        raise ProblemError(f"d is on {d.device}; accepted are CUDA and CPU tensors")
    if d.numel() == 0:
        return _nothing
    if all_batches * k == 0:  # heads: columns in holes stay as they are
        return (
            _WithoutProduct(accumulate)
            if heads is None
            else _ReferenceOfBatches(spans, recipe, kind, heads, accumulate)
        )
    if groups > MAX_GROUPS:
        raise ProblemError(f"d has {groups} groups; accepted are at most {MAX_GROUPS}")
    ordinal = _ordinal(d)
    device, num_sms = device_facts(ordinal)
    a_stack, a_major = _operand_stack("a", a)
    b_stack, b_major = _operand_stack("b", b)
    layout = ("n" if a_major == "k" else "t") + ("t" if b_major == "k" else "n")
    if kind == "batch_sum" and groups == 1:
        of_parts = problem_of_sum(all_batches, m, n, k, layout, device.with_num_sms(num_sms), in_force)
        if of_parts.groups > 1:
            return _plan_of_sum(tensors, spans, of_parts, accumulate, in_force)
    batches = -(-all_batches // groups) if kind == "batch_sum" else 1
    problem = BatchedProblem(
        n=n,
        k=k * batches,
        recipe=recipe,
        groups=groups,
        kind=kind,
        m=m,
        layout=layout,
        d_dtype=_D_DTYPES[d.dtype],
    )
    if in_force.record is not None:
        record(in_force.record, problem)
    copied, scale_stacks, k_stride = _scale_stacks(tensors, recipe)
    config = chooser(problem, device, in_force)(m)
    geometry = BatchedGeometry(
        problem,
        config,
        load(FAMILY.spec(problem, config, device.arch.name), ordinal, problem),
        a=a_stack,
        b=b_stack,
        d=_output_stack(d),
        c=(0, 0) if c is None else (c.stride(1), c.stride(0)),
        a_scales=scale_stacks[0],
        b_scales=scale_stacks[1],
        b_scales_k_stride=k_stride,
        num_sms=min(num_sms, in_force.num_sms or num_sms),
        batches=batches,
        heads=heads,
        adds=accumulate,
        pdl=in_force.pdl,
    )
    return _Plan(spans, [geometry], copied, accumulate, ordinal)


def _plan_of_sum(
    tensors: _Tensors, spans: Sequence[_Span], problem: BatchedProblem, accumulate: bool, in_force: Settings
) -> _PlanOfSum:
    d, c, (_, m, n) = tensors.d, tensors.c, tensors.d.shape
    shape = problem.groups, m, -(-n // QUAD) * QUAD
    into_parts = tensors._replace(d=d.new_empty(shape, dtype=torch.float32)[..., :n], c=None)
    of_parts = _plan_of_batches(into_parts, problem.recipe, problem.kind, None, False, in_force)
    launch = launch_of_sum(Gpu(d, problem), problem.groups, d[0], None if c is None else c[0])
    return _PlanOfSum(spans, of_parts, shape, launch, accumulate, _ordinal(d))


def launch_of_sum(gpu: Gpu, num_parts: int, d: Tensor, c: Tensor | None) -> PlainLaunch:
    """The launch that adds up FP32 parts, in rows of whole quads of columns, and c.

    It takes the addresses of the parts, of c (or 0) and of d, which are ``[m, n]`` with any strides of rows.
    """
    m, n = d.shape
    row_quads, ways = -(-n // QUAD), ways_of(num_parts)
    return gpu.launch(
        SUM_PARTS,
        SUM_PARTS.spec(gpu.arch, d_dtype=_D_DTYPES[d.dtype]),
        (-(-m * row_quads // (THREADS // ways)),),
        c_row_stride=0 if c is None else c.stride(0),
        d_row_stride=d.stride(0),
        num_parts=num_parts,
        n=n,
        row_quads=row_quads,
        quads=m * row_quads,
        ways=ways,
    )


def _operand_stack(name: str, tensor: Tensor) -> tuple[Stack, str]:
    """An operand [groups, rows, k] as it is stored, and its contiguous dimension.

    Raises:
        ProblemError: TMA can't address it.
    """
    groups, rows, k = tensor.shape
    group_stride, row_stride, k_stride = tensor.stride()
    size = tensor.element_size()
    columns = (
        k == 1 and row_stride == 1 and size == 2
    )  # of one element each: by rows their steps would be too short for TMA
    major = "mn" if columns or (k_stride != 1 and k > 1) else "k"
    if major == "mn":
        rows, k, row_stride, k_stride = k, rows, k_stride, row_stride
    shown = f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()} as [groups, rows, k]"
    if k_stride != 1 and k > 1:
        raise ProblemError(f"{shown}; accepted is stride 1 along rows or k")
    for count, stride in ((rows, row_stride), (groups, group_stride)):
        if count > 1 and (stride * size % _ALIGNMENT or stride < 1):
            raise ProblemError(
                f"{shown}; TMA needs steps of multiples of {_ALIGNMENT} bytes ({_ALIGNMENT // size} elements)"
            )
    if rows <= 1:  # strides that are never used, but must be legal
        row_stride = get_tma_aligned_size(k, size)
    if groups <= 1:
        group_stride = get_tma_aligned_size(rows * row_stride, size)
    return Stack(rows, k, row_stride, groups, group_stride), major


def _output_stack(d: Tensor) -> Stack:
    groups, rows, columns = d.shape
    row_stride = d.stride(1) if rows > 1 else get_tma_aligned_size(columns, d.element_size())
    group_stride = d.stride(0) if groups > 1 else get_tma_aligned_size(rows * row_stride, d.element_size())
    return Stack(rows, columns, row_stride, groups, group_stride)


def _scale_stacks(tensors: _Tensors, recipe: str) -> tuple[tuple[bool, bool], tuple[Stack | None, Stack | None], int]:
    """Whether scales are copied first; how they are stored then; and b's stride along K, where one covers 128 rows."""
    a_scales, b_scales = tensors.a_scales, tensors.b_scales
    if a_scales is None or b_scales is None:
        return (False, False), (None, None), 0
    a_copied, a_stack = _row_scales(a_scales)
    if recipe == _ROW_RECIPE:
        b_copied, b_stack = _row_scales(b_scales)
        return (a_copied, b_copied), (a_stack, b_stack), 0
    groups, blocks, k_blocks = b_scales.shape
    strides = b_scales.stride()
    return (a_copied, False), (a_stack, Stack(blocks, k_blocks, strides[1], groups, strides[0])), strides[2]


def _row_scales(scales: Tensor) -> tuple[bool, Stack]:
    """Scales [(groups,) rows, k-blocks] as TMA loads them, copied where they are not stored so."""
    shape, strides = (1,) * (3 - scales.dim()) + tuple(scales.shape), (0,) * (3 - scales.dim()) + scales.stride()
    groups, rows, k_blocks = shape
    steps = [strides[2]] * (k_blocks > 1) + [strides[0]] * (groups > 1)
    in_place = scales.data_ptr() % _ALIGNMENT == 0 and (strides[1] == 1 or rows == 1)
    in_place = in_place and not any(step % 4 or step < 1 for step in steps)
    aligned = get_tma_aligned_size(rows, 4)
    k_stride = strides[2] if in_place and k_blocks > 1 else aligned
    group_stride = strides[0] if in_place and groups > 1 else k_stride * k_blocks
    return not in_place, Stack(k_blocks, rows, k_stride, groups, group_stride)


def _nothing(_: _Tensors) -> None:
    """There is no output."""


class _WithoutProduct:
    """There is nothing to sum up: D is C, or zero."""

    def __init__(self, accumulate: bool) -> None:
        self._accumulate = accumulate

    def __call__(self, tensors: _Tensors) -> None:
        if tensors.c is None:
            tensors.d.zero_()
        elif not self._accumulate:
            tensors.d.copy_(tensors.c)


class _Plan:
    """A checked problem with its launches."""

    def __init__(
        self,
        spans: Sequence[_Span],
        geometries: Sequence[BatchedGeometry],
        copied: tuple[bool, bool],
        accumulate: bool,
        device: int,
    ) -> None:
        self._spans, self._geometries, self._accumulate, self._device = spans, geometries, accumulate, device
        self._copied, self.copies = copied, any(copied)
        self._bound: Table[tuple[int, ...], list[Callable[[], int]]] = Table(BOUND_LAUNCHES)

    def __call__(self, tensors: _Tensors) -> None:
        if current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(tensors)
        if self.copies:
            _check_addresses(self._spans, tensors, self._accumulate, True)
            a_copied, b_copied = self._copied
            a_scales, b_scales = tensors.a_scales, tensors.b_scales
            tensors = tensors._replace(
                a_scales=copy_to_mn_major(a_scales) if a_copied and a_scales is not None else a_scales,
                b_scales=copy_to_mn_major(b_scales) if b_copied and b_scales is not None else b_scales,
            )
        addresses = (raw_stream(self._device), *tensors.addresses())
        runs = self._bound.get(addresses)
        if runs is None:
            if not self.copies:
                _check_addresses(self._spans, tensors, self._accumulate, True)
            runs = [one.launch.prepare(one.bind(*addresses[1:]), addresses[0]) for one in self._geometries]
            self._bound.put(addresses, runs)
        for run, geometry in zip(runs, self._geometries, strict=True):
            status = run()
            if status:
                geometry.launch.retry(run, status)
        return None


class _PlanOfSum:
    """A sum over batches: FP32 sums of parts of them in one launch, and of these in another, in a fixed order.

    Parts are in memory of torch's allocator for as long as a call takes; the stream keeps later users behind it.
    """

    def __init__(
        self,
        spans: Sequence[_Span],
        of_parts: _Plan,
        shape: tuple[int, int, int],
        launch: PlainLaunch,
        accumulate: bool,
        device: int,
    ) -> None:
        self._spans, self._of_parts, self._shape, self._launch = spans, of_parts, shape, launch
        self._accumulate, self._device = accumulate, device
        self._apart: Table[tuple[int, ...], bool] = Table(BOUND_LAUNCHES)

    def __call__(self, tensors: _Tensors) -> None:
        if current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(tensors)
        addresses = tensors.addresses()
        if not self._apart.get(addresses):
            _check_addresses(self._spans, tensors, self._accumulate, on_gpu=False)  # TMA's: the launch of parts does
            self._apart.put(addresses, True)
        parts = tensors.d.new_empty(self._shape, dtype=torch.float32)
        self._of_parts(tensors._replace(d=parts, c=None))
        *_, d, c = addresses
        self._launch(raw_stream(self._device), parts.data_ptr(), c, d)
        return None


class _ReferenceOfBatches:
    """The same on the CPU: the reference computes."""

    def __init__(self, spans: Sequence[_Span], recipe: str, kind: str, heads: Heads | None, accumulate: bool) -> None:
        self._spans, self._recipe, self._kind, self._heads, self._accumulate = spans, recipe, kind, heads, accumulate

    @torch.no_grad()
    def __call__(self, tensors: _Tensors) -> None:
        _check_addresses(self._spans, tensors, self._accumulate, False)
        a, a_scales, b, b_scales, d, c = tensors
        if self._kind == "batch_sum":
            reference_einsum.einsum("bmk,bnk->mn", a, b, d[0], None if c is None else c[0])
        elif self._heads is not None and a_scales is not None and b_scales is not None:
            width, left, mid = self._heads
            reference_einsum.fp8_gemm_nt_skip_head_mid(
                (a[0], a_scales[0]), (b[0], b_scales[0]), d[0], (left, mid, width - left), recipe=self._recipe
            )
        else:
            for group in range(d.shape[0]):
                gemm_into(
                    *(a[group], b[group], d[group], None if c is None else c[group]),
                    a_scales=None if a_scales is None else a_scales[group],
                    b_scales=None if b_scales is None else b_scales[group],
                    recipe=self._recipe,
                )


# -- Running groups along K.


def _run_k_grouped(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    accumulate: bool,
    ks: list[int],
    layout: str,
) -> None:
    """Find or make the plan of a call and launch it; CPU tensors go to the reference."""
    accumulate, in_force = accumulate or _is_same(c, d), settings.current()
    tensors = _Tensors(a, a_scales, b, b_scales, d, d if accumulate else c)
    key = (layout, tuple(ks), accumulate, in_force.generation, *map(_key, tensors))
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.put(key, _plan_of_k(tensors, ks, layout, accumulate, in_force))
    plan(tensors)


def _plan_of_k(tensors: _Tensors, ks: list[int], layout: str, accumulate: bool, in_force: Settings) -> Any:
    a, a_scales, b, b_scales, d, c = tensors
    recipe = "bf16" if a_scales is None else _ROW_RECIPE
    _check_same_kind(recipe, d, c, a=a, a_scales=a_scales, b=b, b_scales=b_scales)
    _check_output("d", d)
    groups, m, n = d.shape
    if c is not None and tuple(c.shape) != (groups, m, n):
        raise ProblemError(f"c has shape {tuple(c.shape)}; accepted is {(groups, m, n)}")
    if c is not None and c.stride(2) != 1 and n > 1:
        raise ProblemError(f"c has strides {c.stride()}; accepted is stride 1 along n")
    total, blocks = sum(ks), sum(-(-k // SCALE_GROUP) for k in ks)
    fp8, transposed = recipe != "bf16", layout == "tn"
    for name, operand, scales, mn in (("a", a, a_scales, m), ("b", b, b_scales, n)):
        if operand.numel() != total * mn or (transposed and tuple(operand.shape) != (total, mn)):
            accepted = f"{(total, mn)}" if transposed else f"{total * mn} elements"
            raise ProblemError(f"{name} has shape {tuple(operand.shape)}; ks and d make it {accepted}")
        if not operand.is_contiguous():
            raise ProblemError(f"{name} has strides {operand.stride()}; accepted is a contiguous tensor")
        shape = (blocks, mn) if transposed else (mn, blocks)
        if scales is not None and tuple(scales.shape) != shape:
            raise ProblemError(f"{name}_scales has shape {tuple(scales.shape)}; ks and d make it {shape}")
    spans = _spans(tensors)
    if d.device.type != _GPU:
        if d.device.type == "cpu":
            return _ReferenceOfK(spans, ks, layout, recipe, accumulate)
        raise ProblemError(f"d is on {d.device}; accepted are CUDA and CPU tensors")
    if d.numel() == 0:
        return _nothing
    if total == 0:
        return _WithoutProduct(accumulate)
    step = _ALIGNMENT // a.element_size()
    if fp8:
        for k in ks:
            if k % step:
                raise ProblemError(f"ks has {k}; FP8 accepts multiples of {step} (TMA)")
    else:
        for name, mn in (("m", m), ("n", n)):
            if mn % step:
                raise ProblemError(f"d has {name} = {mn}; groups along K in bf16 accept multiples of {step} (TMA)")
    problem = BatchedProblem(
        n=n,
        k=EXPECTED_K,
        recipe=recipe,
        groups=groups,
        kind="k_grouped",
        m=m,
        layout="nt" if fp8 else "tn",
        d_dtype=_D_DTYPES[d.dtype],
    )
    if in_force.record is not None:
        record(in_force.record, problem)
    if transposed:  # scales as [rows, blocks]
        tensors = tensors._replace(
            a_scales=None if a_scales is None else a_scales.t(), b_scales=None if b_scales is None else b_scales.t()
        )
    copied, scale_stacks, _ = _scale_stacks(tensors, recipe)
    ordinal = _ordinal(d)
    device, num_sms = device_facts(ordinal)
    config = chooser(problem, device, in_force)(m)
    kernel = load(FAMILY.spec(problem, config, device.arch.name), ordinal, problem)
    parts = parts_of_k(ks, m, n, a.element_size(), along_k=fp8, in_rows=transposed and fp8)
    geometries = [
        BatchedGeometry(
            problem,
            config,
            kernel,
            a=None,
            b=None,
            d=_output_stack(d),
            c=(0, 0) if c is None else (c.stride(1), c.stride(0)),
            a_scales=scale_stacks[0],
            b_scales=scale_stacks[1],
            b_scales_k_stride=0,
            num_sms=min(num_sms, in_force.num_sms or num_sms),
            parts=parts[first : first + MOST_GROUPS_OF_K],
            adds=accumulate,
            pdl=in_force.pdl,
        )
        for first in range(0, len(parts), MOST_GROUPS_OF_K)
    ]
    plan = _Plan(spans, geometries, copied, accumulate, ordinal)
    return _PlanOfK(plan, [group for group, k in enumerate(ks) if k == 0], accumulate, transposed and fp8)


def parts_of_k(ks: Sequence[int], m: int, n: int, size: int, *, along_k: bool, in_rows: bool) -> list[PartOfK]:
    """The groups that have elements, the longest first: what is last to begin should be first to end.

    Args:
        ks: K of all groups.
        m: rows of a group's A.
        n: rows of a group's B.
        size: bytes of an element.
        along_k: whether operands are contiguous along K, each group's [rows, k] for itself ...
        in_rows: ... or all groups' in rows of [rows, sum of ks].
    """
    parts, start, scale, total = [], 0, 0, sum(ks)
    for group, k in enumerate(ks):
        if k:
            if in_rows:
                places = (start * size, total, start * size, total)
            else:
                places = (start * m * size, k if along_k else m, start * n * size, k if along_k else n)
            parts.append(PartOfK(k, scale, group, *places))
        start, scale = start + k, scale - (-k // SCALE_GROUP)
    return sorted(parts, key=lambda part: -part.k)


class _PlanOfK:
    """Groups along K: those without elements, then the launches for the others."""

    def __init__(self, plan: _Plan, empty: Sequence[int], accumulate: bool, copies: bool) -> None:
        self._plan, self._empty, self._accumulate, self._copies = plan, empty, accumulate, copies

    def __call__(self, tensors: _Tensors) -> None:
        a, a_scales, b, b_scales, d, c = tensors
        if self._copies and a_scales is not None and b_scales is not None:
            tensors = _Tensors(a.t().contiguous(), a_scales.t(), b.t().contiguous(), b_scales.t(), d, c)
        self._plan(tensors)
        for group in self._empty if not self._accumulate else ():
            if c is None:
                d[group].zero_()
            else:
                d[group].copy_(c[group])


class _ReferenceOfK:
    """The same on the CPU: the reference computes."""

    def __init__(self, spans: Sequence[_Span], ks: list[int], layout: str, recipe: str, accumulate: bool) -> None:
        self._spans, self._ks, self._layout, self._recipe, self._accumulate = spans, ks, layout, recipe, accumulate

    @torch.no_grad()
    def __call__(self, tensors: _Tensors) -> None:
        _check_addresses(self._spans, tensors, self._accumulate, False)
        a, a_scales, b, b_scales, d, c = tensors
        reference_grouped.k_grouped_contiguous(
            *(a, b, d, self._ks, c),
            a_scales=a_scales,
            b_scales=b_scales,
            recipe=self._recipe,
            layout=self._layout,
        )


# -- As torch operators.


def _batched_fake(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    accumulate: bool,
    recipe: str,
    kind: str,
    heads: list[int],
) -> None:
    for name, tensor in (("a", a), ("b", b), ("d", d)):
        if tensor.dim() != 3:
            raise ProblemError(f"{name} has {tensor.dim()} dimensions; accepted is 3")


def _k_grouped_fake(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    d: Tensor,
    c: Tensor | None,
    accumulate: bool,
    ks: list[int],
    layout: str,
) -> None:
    if d.dim() != 3:
        raise ProblemError(f"d has {d.dim()} dimensions; accepted is 3")


_TENSORS = "Tensor a, Tensor? a_scales, Tensor b, Tensor? b_scales, Tensor(d!) d, Tensor? c, bool accumulate"
for _name, _more, _implementation, _fake in (
    ("batched_gemm", "str recipe, str kind, int[] heads", _batched_operator, _batched_fake),
    ("k_grouped_gemm", "int[] ks, str layout", _run_k_grouped, _k_grouped_fake),
):
    torch.library.define(f"jitgemm::{_name}", f"({_TENSORS}, {_more}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"jitgemm::{_name}", ("cpu", "cuda"), _implementation)
    torch.library.register_fake(f"jitgemm::{_name}", _fake)
