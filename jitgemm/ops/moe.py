"""Mixture of experts around the grouped GEMMs: gate, permutation of rows to experts, combination.

Nothing here waits for the device: sizes of outputs follow from those of the inputs, and counts stay on the device.
None of these functions is differentiable. On CPU tensors the reference computes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jitgemm import settings
from jitgemm.errors import ProblemError
from jitgemm.families.moe import (
    COMBINE_THREADS,
    EXPAND_THREADS,
    GATE_LOGITS,
    LOGITS_EXPERTS,
    MAP_THREADS,
    MAX_COMBINED,
    MAX_EXPERTS,
    MAX_FEW_TOKENS,
    MAX_TOPK,
    MOE_COMBINE,
    MOE_MAP,
    MOE_PERMUTE,
    PIECE,
    TOPK_GATE,
    VECTOR,
    choose_parts,
    choose_token_tiles,
    gates_by_block,
)
from jitgemm.families.plain import PlainLaunch
from jitgemm.families.small_problem import LAYOUTS, SCORES, SmallProblem
from jitgemm.ops.dispatch import needs_dispatch
from jitgemm.ops.gemm import bf16_gemm_nt
from jitgemm.ops.plain import (
    ALIGNMENT,
    Call,
    Gpu,
    check_aligned,
    check_choice,
    check_contiguous,
    check_number,
    check_rows,
    check_tensor,
    define,
    on_gpu,
    plan_of,
    record_if_asked,
    row_stride,
)
from jitgemm.plan import raw_stream
from jitgemm.reference import moe as reference
from jitgemm.reference.layout import as_bytes, get_tma_aligned_size

_INDEX_DTYPES = (torch.int32, torch.int64)
_ROW_DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int8)
_SCALE_DTYPES = (torch.float32, torch.int32)
_MAX_ITEMS = 2**30
_MAX_ALIGNMENT = 1024


class MoePermutation(NamedTuple):
    """Which row each choice of an expert has, and whose each row is."""

    grouped_layout: Tensor
    """int32, as the grouped GEMMs take it. Contiguous: [rows], each row's expert, -1 for padding; psum: [experts],
    where each expert's rows end; masked: [experts], how many rows each has (``masked_m``)."""
    token_topk_to_pos: Tensor
    """int32 [tokens, topk]: the row, or -1 where there is none; masked: ``expert * max_m`` plus the expert's row."""
    pos_to_token_topk: Tensor
    """int32 [rows]: ``token * topk + k`` of the choice that has the row, -1 for padding."""
    row_weights: Tensor | None
    """fp32 [rows]: its routing weight, 0 for padding; None where no weights were given."""
    max_m: int
    """Rows of an expert in the masked layout, else 0."""


def moe_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    topk: int = 6,
    *,
    scores: str = "sqrtsoftplus",
    route_scale: float = 1.0,
    tid2eid: Tensor | None = None,
    input_ids: Tensor | None = None,
    mask: Tensor | None = None,
    index_dtype: torch.dtype = torch.int32,
) -> tuple[Tensor, Tensor]:
    """``topk_gate`` of the logits ``x @ weight.T``, which are FP32 sums of exact products.

    The logits of up to 64 tokens have a kernel of their own; those of more, and all with the setting
    ``batch_invariant``, are made by ``bf16_gemm_nt``.

    Args:
        x: bf16 [tokens, width], as ``bf16_gemm_nt`` takes it.
        weight: bf16 [experts, width], likewise.
        bias: as ``topk_gate`` takes it, like what follows.
        topk: see there.
        scores: see there.
        route_scale: see there.
        tid2eid: see there.
        input_ids: see there.
        mask: see there.
        index_dtype: see there.

    Returns:
        Experts and weights, as ``topk_gate`` does.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: a kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    arguments = (x, weight, bias, topk, scores, route_scale, tid2eid, input_ids, mask, index_dtype)
    if needs_dispatch(x, weight, bias, tid2eid, input_ids, mask):
        _check_moe_gate(*arguments)
        indices, weights = torch.ops.jitgemm.moe_gate(*arguments)
        return indices, weights
    return _moe_gate(*arguments)


def topk_gate(
    logits: Tensor,
    bias: Tensor | None = None,
    topk: int = 6,
    *,
    scores: str = "sqrtsoftplus",
    route_scale: float = 1.0,
    tid2eid: Tensor | None = None,
    input_ids: Tensor | None = None,
    mask: Tensor | None = None,
    index_dtype: torch.dtype = torch.int32,
) -> tuple[Tensor, Tensor]:
    """Each token's experts and their weights.

    The experts are those of the greatest score plus bias, greatest first, of equals the smaller index first (a NaN
    counts as greatest), or those that ``tid2eid`` has for the token's id. Their weights are their scores without bias,
    divided by the sum of these (at least 1e-20; not for softmax), times ``route_scale``.

    Args:
        logits: fp32 [tokens, experts] of up to 1024 experts, contiguous along experts.
        bias: fp32 [experts], for the choice only.
        topk: experts of a token, up to 32.
        scores: ``"sqrtsoftplus"``, ``"sigmoid"`` or ``"softmax"``.
        route_scale: see above.
        tid2eid: int32 [vocabulary, topk], contiguous: a hash-routed layer. Then ``input_ids`` too, and no bias. An id
            or an expert that does not exist gives -1.
        input_ids: int32 or int64 [tokens].
        mask: bool [tokens]; a token where it is False has experts -1 and weights 0.
        index_dtype: of the result, int32 or int64.

    Returns:
        Experts [tokens, topk] and fp32 weights [tokens, topk].

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    arguments = (logits, bias, topk, scores, route_scale, tid2eid, input_ids, mask, index_dtype)
    if needs_dispatch(logits, bias, tid2eid, input_ids, mask):
        _check_gate(*arguments)
        indices, weights = torch.ops.jitgemm.topk_gate(*arguments)
        return indices, weights
    return _gate(*arguments)


def moe_permutation(
    topk_indices: Tensor,
    num_experts: int,
    topk_weights: Tensor | None = None,
    *,
    layout: str = "contiguous",
    alignment: int | None = None,
    max_m: int | None = None,
    first_expert: int = 0,
) -> MoePermutation:
    """Give each choice of an expert a row among the experts' rows, those of an expert in the order of ``topk_indices``.

    There are as many rows as any choices can need. With the layouts contiguous and psum each expert's rows start at a
    multiple of ``alignment``; with masked each expert has ``max_m`` rows, and choices beyond them get none.

    Args:
        topk_indices: int32 or int64 [tokens, topk], contiguous; what is no expert here, such as -1, gets no row.
        num_experts: that are here, up to 1024.
        topk_weights: fp32 [tokens, topk], contiguous, for ``row_weights``.
        layout: ``"contiguous"``, ``"psum"`` or ``"masked"``, which the grouped GEMMs take.
        alignment: rows, 1 to 1024; by default what the grouped GEMMs count with
            (``get_mk_alignment_for_contiguous_layout``); under ``torch.compile`` what that was when the graph was made.
        max_m: rows of an expert, with masked only.
        first_expert: the index of the first expert that is here (expert parallelism).

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: a kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    if (layout == "masked") != (max_m is not None):
        raise ProblemError(f"max_m is {max_m!r} with layout {layout!r}; accepted is a number with masked, None else")
    if alignment is not None:
        check_number("alignment", alignment, 1, _MAX_ALIGNMENT)
    of_an_expert = 0 if max_m is None else max_m
    arguments = (topk_indices, topk_weights, num_experts, layout, alignment, of_an_expert, first_expert)
    if needs_dispatch(topk_indices, topk_weights):
        _check_permutation(*arguments)
        grouped, to_pos, to_item, weights = torch.ops.jitgemm.moe_permutation(*arguments)
    else:
        grouped, to_pos, to_item, weights = _permutation(*arguments)
    return MoePermutation(grouped, to_pos, to_item, None if topk_weights is None else weights, of_an_expert)


def moe_permute(
    x: Tensor, permutation: MoePermutation, scales: Tensor | None = None, *, zero_padding: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Copy each token's row, and its scales, to the rows that the token has.

    Args:
        x: [tokens, width], e4m3, bf16, fp16, fp32, uint8 or int8; rows are multiples of 16 bytes, and start at such.
        permutation: as ``moe_permutation`` made it.
        scales: fp32 or int32 (packed exponents) [tokens, scales of a row], any strides.
        zero_padding: fill the rows of nobody with zeros, and their scales; otherwise they are left uninitialized, which
            the grouped GEMMs allow. Costs a write of all rows.

    Returns:
        ``[rows, width]``, or ``[experts, max_m, width]`` masked; and the scales MN-major and TMA-aligned
        (``get_mn_major_tma_aligned_tensor``), ``[rows, n]`` or ``[experts, max_m, n]``, None without ``scales``.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    if not isinstance(permutation, MoePermutation):
        raise ProblemError(f"permutation is {type(permutation).__name__}; accepted is a MoePermutation")
    if not isinstance(zero_padding, bool):
        raise ProblemError(f"zero_padding is {zero_padding!r}; accepted is a boolean")
    to_pos, to_item, max_m = permutation.token_topk_to_pos, permutation.pos_to_token_topk, permutation.max_m
    arguments = (x, scales, to_pos, to_item, max_m, zero_padding)
    if needs_dispatch(x, scales, to_pos, to_item):
        _check_permute(*arguments)
        rows, rows_scales = torch.ops.jitgemm.moe_permute(*arguments)
    else:
        rows, rows_scales = _permute(*arguments)
    return rows, None if scales is None else rows_scales


def moe_combine(
    y: Tensor, token_topk_to_pos: Tensor, topk_weights: Tensor | None = None, shared: Tensor | None = None
) -> Tensor:
    """Add up the rows of each token: ``sum over k of topk_weights[k] * y[pos of k] + shared``.

    FP32 sums, k ascending, the shared expert last, rounded once.

    Args:
        y: bf16 [rows, width], or [experts, max_m, width] contiguous; width a multiple of 8, rows multiples of 16 bytes
            apart.
        token_topk_to_pos: int32 [tokens, topk] of ``moe_permutation``, contiguous, topk up to 16; what is no row is
            left out.
        topk_weights: fp32 [tokens, topk], contiguous; None where the rows are weighted already.
        shared: bf16 [tokens, width], what the shared expert adds; row stride as y's.

    Returns:
        bf16 [tokens, width].

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    if isinstance(y, Tensor) and y.dim() == 3:
        check_contiguous(y=y)
        y = y.flatten(0, 1)
    arguments = (y, token_topk_to_pos, topk_weights, shared)
    if needs_dispatch(*arguments):
        _check_combine(*arguments)
        result: Tensor = torch.ops.jitgemm.moe_combine(*arguments)
        return result
    return _combine(*arguments)


# -- Gate


def _check_gate(
    logits: Tensor,
    bias: Tensor | None,
    topk: int,
    scores: str,
    route_scale: float,
    tid2eid: Tensor | None,
    input_ids: Tensor | None,
    mask: Tensor | None,
    index_dtype: torch.dtype,
) -> None:
    check_tensor("logits", logits, torch.float32, ("tokens", "experts"))
    tokens, experts = logits.shape
    if not 1 <= experts <= MAX_EXPERTS:
        raise ProblemError(f"logits have shape {[tokens, experts]}; accepted are 1 to {MAX_EXPERTS} experts")
    if logits.stride(1) != 1 and experts > 1:
        raise ProblemError(f"logits have strides {logits.stride()}; accepted is stride 1 along experts")
    check_number("topk", topk, 1, MAX_TOPK if tid2eid is not None else min(experts, MAX_TOPK))
    check_choice("scores", scores, SCORES)
    check_number("route_scale", route_scale, -1e30, 1e30, float)
    check_choice("index_dtype", index_dtype, _INDEX_DTYPES)
    if (tid2eid is None) != (input_ids is None):
        given = "tid2eid" if input_ids is None else "input_ids"
        raise ProblemError(f"{given} is given alone; accepted are both, or neither")
    if tid2eid is not None:
        if bias is not None:
            raise ProblemError("bias is given with tid2eid; hash-routed layers have none")
        check_tensor("tid2eid", tid2eid, torch.int32, ("vocabulary", topk), logits)
        check_tensor("input_ids", input_ids, _INDEX_DTYPES, (tokens,), logits)
    if bias is not None:
        check_tensor("bias", bias, torch.float32, (experts,), logits)
    if mask is not None:
        check_tensor("mask", mask, torch.bool, (tokens,), logits)
    check_contiguous(bias=bias, tid2eid=tid2eid, input_ids=input_ids, mask=mask)


def _empty_gate(logits: Tensor, topk: int, index_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = logits.shape[0], topk
    return logits.new_empty(shape, dtype=index_dtype), logits.new_empty(shape)


def _fake_gate(
    logits: Tensor,
    bias: Tensor | None,
    topk: int,
    scores: str,
    route_scale: float,
    tid2eid: Tensor | None,
    input_ids: Tensor | None,
    mask: Tensor | None,
    index_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check_gate(logits, bias, topk, scores, route_scale, tid2eid, input_ids, mask, index_dtype)
    return _empty_gate(logits, topk, index_dtype)


def _gate(
    logits: Tensor,
    bias: Tensor | None,
    topk: int,
    scores: str,
    route_scale: float,
    tid2eid: Tensor | None,
    input_ids: Tensor | None,
    mask: Tensor | None,
    index_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    def make() -> Call:
        _check_gate(logits, bias, topk, scores, route_scale, tid2eid, input_ids, mask, index_dtype)
        tokens, experts = logits.shape
        hashed, name = tid2eid is not None, _dtype_name(index_dtype)
        gpu = on_gpu(logits)
        problem = SmallProblem.make("topk_gate", experts=experts, scores=scores, hashed=hashed, index_dtype=name)
        record_if_asked(problem)
        if not gpu:
            return lambda logits, bias, tid2eid, input_ids, mask: reference.topk_gate(
                logits, bias, topk, scores, route_scale, tid2eid, input_ids, mask, index_dtype
            )
        if tokens == 0:
            return lambda logits, *_: _empty_gate(logits, topk, index_dtype)
        where = Gpu(logits, problem)
        launch = _topk_launch(where, logits, 1, topk, scores, route_scale, tid2eid, input_ids, index_dtype)

        def call(logits: Tensor, *optional: Tensor | None) -> tuple[Tensor, Tensor]:
            indices, weights = _empty_gate(logits, topk, index_dtype)
            addresses = (0 if tensor is None else tensor.data_ptr() for tensor in optional)
            stream = raw_stream(where.ordinal)
            launch(stream, logits.data_ptr(), *addresses, indices.data_ptr(), weights.data_ptr())
            return indices, weights

        return where.here(call)

    tensors, numbers = (logits, bias, tid2eid, input_ids, mask), (topk, scores, route_scale, index_dtype)
    indices, weights = plan_of("topk_gate", tensors, numbers, make)(*tensors)
    return indices, weights


def _topk_launch(
    gpu: Gpu,
    logits: Tensor,
    parts: int,
    topk: int,
    scores: str,
    route_scale: float,
    tid2eid: Tensor | None,
    input_ids: Tensor | None,
    index_dtype: torch.dtype,
) -> PlainLaunch:
    """The launch that chooses experts; several parts of logits are those of the kernel ahead, one after the other."""
    tokens, experts = logits.shape
    hashed = tid2eid is not None
    spec = TOPK_GATE.of(
        gpu.arch, experts, scores, hashed, index_dtype == torch.int64, gates_by_block(tokens, experts, hashed)
    )
    return gpu.launch(
        TOPK_GATE,
        spec,
        (TOPK_GATE.blocks(spec, tokens),),
        follows=parts > 1,
        logits_row_stride=row_stride(logits),
        part_stride=tokens * experts,
        vocabulary=0 if tid2eid is None else tid2eid.shape[0],
        parts=parts,
        tokens=tokens,
        experts=experts,
        topk=topk,
        ids_are_long=int(input_ids is not None and input_ids.dtype == torch.int64),
        route_scale=route_scale,
    )


def _check_moe_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk: int,
    scores: str,
    route_scale: float,
    tid2eid: Tensor | None,
    input_ids: Tensor | None,
    mask: Tensor | None,
    index_dtype: torch.dtype,
) -> None:
    check_tensor("x", x, torch.bfloat16, ("tokens", "width"))
    check_tensor("weight", weight, torch.bfloat16, ("experts", x.shape[1]), x)
    logits = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
    _check_gate(logits, bias, topk, scores, route_scale, tid2eid, input_ids, mask, index_dtype)


def _fake_moe_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk: int,
    scores: str,
    route_scale: float,
    tid2eid: Tensor | None,
    input_ids: Tensor | None,
    mask: Tensor | None,
    index_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check_moe_gate(x, weight, bias, topk, scores, route_scale, tid2eid, input_ids, mask, index_dtype)
    shape = x.shape[0], topk
    return x.new_empty(shape, dtype=index_dtype), x.new_empty(shape, dtype=torch.float32)


def _rows_of_vectors(*matrices: Tensor) -> bool:
    """Whether matrices have rows that kernels can read 16 bytes at a time."""
    try:
        for matrix in matrices:
            check_rows("", matrix)
    except ProblemError:
        return False
    return True


def _moe_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk: int,
    scores: str,
    route_scale: float,
    tid2eid: Tensor | None,
    input_ids: Tensor | None,
    mask: Tensor | None,
    index_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    def make() -> Call:
        _check_moe_gate(x, weight, bias, topk, scores, route_scale, tid2eid, input_ids, mask, index_dtype)
        (tokens, width), experts = x.shape, weight.shape[0]
        hashed = tid2eid is not None
        gpu = on_gpu(x)
        problem = SmallProblem.make(
            "moe_gate", experts=experts, scores=scores, hashed=hashed, index_dtype=_dtype_name(index_dtype)
        )
        # The sums of a batch-invariant GEMM do not depend on how many tokens there are.
        few = 0 < tokens <= MAX_FEW_TOKENS and width and not settings.current().batch_invariant
        if not (gpu and few and _rows_of_vectors(x, weight)):

            def in_turn(
                x: Tensor,
                weight: Tensor,
                bias: Tensor | None,
                tid2eid: Tensor | None,
                input_ids: Tensor | None,
                mask: Tensor | None,
            ) -> tuple[Tensor, Tensor]:
                logits = x.new_empty((tokens, experts), dtype=torch.float32)
                bf16_gemm_nt(x, weight, logits)
                return _gate(logits, bias, topk, scores, route_scale, tid2eid, input_ids, mask, index_dtype)

            return in_turn
        record_if_asked(problem)
        where = Gpu(x, problem)
        spec, pieces = GATE_LOGITS.of(where.arch, choose_token_tiles(tokens)), -(-width // (VECTOR * PIECE))
        parts = choose_parts(experts, pieces, GATE_LOGITS.warps_k(spec), where.num_sms)
        logits_of = where.launch(
            GATE_LOGITS,
            spec,
            (-(-experts // LOGITS_EXPERTS), parts),
            x_row_stride=row_stride(x) // VECTOR,
            weight_row_stride=row_stride(weight) // VECTOR,
            vectors=width // VECTOR,
            pieces_per_part=pieces // parts,
            longer_parts=pieces % parts,
            tokens=tokens,
            experts=experts,
        )
        like = x.new_empty((tokens, experts), dtype=torch.float32)
        choose = _topk_launch(where, like, parts, topk, scores, route_scale, tid2eid, input_ids, index_dtype)

        def call(x: Tensor, weight: Tensor, *optional: Tensor | None) -> tuple[Tensor, Tensor]:
            operands = x.data_ptr(), weight.data_ptr()
            check_aligned(("x", "weight"), operands)
            indices = x.new_empty((tokens, topk), dtype=index_dtype)
            weights = x.new_empty((tokens, topk), dtype=torch.float32)
            logits = x.new_empty((parts, tokens, experts), dtype=torch.float32)
            addresses = (0 if tensor is None else tensor.data_ptr() for tensor in optional)
            stream = raw_stream(where.ordinal)
            logits_of(stream, *operands, logits.data_ptr())
            choose(stream, logits.data_ptr(), *addresses, indices.data_ptr(), weights.data_ptr())
            return indices, weights

        return where.here(call)

    tensors = (x, weight, bias, tid2eid, input_ids, mask)
    numbers = (topk, scores, route_scale, index_dtype)
    indices, weights = plan_of("moe_gate", tensors, numbers, make)(*tensors)
    return indices, weights


def _dtype_name(dtype: torch.dtype) -> str:
    return "int64" if dtype == torch.int64 else "int32"


# -- Permutation


def _aligned_to(alignment: int | None) -> int:
    return settings.current().mk_alignment if alignment is None else alignment


def _check_permutation(
    indices: Tensor,
    weights: Tensor | None,
    experts: int,
    layout: str,
    alignment: int | None,
    max_m: int,
    first_expert: int,
) -> None:
    check_tensor("topk_indices", indices, _INDEX_DTYPES, ("tokens", "topk"))
    check_number("num_experts", experts, 1, MAX_EXPERTS)
    check_choice("layout", layout, LAYOUTS)
    check_number("first_expert", first_expert, 0, 2**30)
    if weights is not None:
        check_tensor("topk_weights", weights, torch.float32, tuple(indices.shape), indices)
    check_contiguous(topk_indices=indices, topk_weights=weights)
    if layout == "masked":
        check_number("max_m", max_m, 1, 2**30)
    rows = reference.num_rows(indices.numel(), experts, layout, 1 if alignment is None else alignment, max_m)
    if indices.numel() >= _MAX_ITEMS or rows >= 2**31 - 2**16:  # what blocks add to their first row fits, too
        raise ProblemError(f"topk_indices have shape {list(indices.shape)}, which may take {rows} rows; too many")


_Permutation = tuple[Tensor, Tensor, Tensor, Tensor]


def _empty_permutation(
    indices: Tensor, weights: Tensor | None, experts: int, layout: str, alignment: int, max_m: int
) -> _Permutation:
    rows = reference.num_rows(indices.numel(), experts, layout, alignment, max_m)
    grouped = indices.new_empty(rows if layout == "contiguous" else experts, dtype=torch.int32)
    to_pos = indices.new_empty(indices.shape, dtype=torch.int32)
    to_item = indices.new_empty(rows, dtype=torch.int32)
    # An operator's result can't be None: without weights an empty tensor stands for it.
    return grouped, to_pos, to_item, indices.new_empty(0 if weights is None else rows, dtype=torch.float32)


def _fake_permutation(
    indices: Tensor,
    weights: Tensor | None,
    experts: int,
    layout: str,
    alignment_given: int | None,
    max_m: int,
    first_expert: int,
) -> _Permutation:
    alignment = _aligned_to(alignment_given)
    _check_permutation(indices, weights, experts, layout, alignment, max_m, first_expert)
    return _empty_permutation(indices, weights, experts, layout, alignment, max_m)


def _permutation(
    indices: Tensor,
    weights: Tensor | None,
    experts: int,
    layout: str,
    alignment_given: int | None,
    max_m: int,
    first_expert: int,
) -> _Permutation:
    alignment = _aligned_to(alignment_given)

    def make() -> Call:
        _check_permutation(indices, weights, experts, layout, alignment, max_m, first_expert)
        gpu, items = on_gpu(indices), indices.numel()
        problem = SmallProblem.make("moe_permutation", layout=layout, index_dtype=_dtype_name(indices.dtype))
        record_if_asked(problem)
        if not gpu:
            return lambda indices, weights: _reference_permutation(
                indices, weights, experts, layout, alignment, max_m, first_expert
            )
        where = Gpu(indices, problem)
        rows = reference.num_rows(items, experts, layout, alignment, max_m)
        phases, rounds = MOE_MAP.phases(items)
        blocks = max(1, -(-items // (MAP_THREADS * rounds)))
        # That clear rows; where these are many, more than have choices. One kernel's blocks each count all choices.
        clearing = max(blocks, min(where.num_sms, rows // _ROWS_OF_A_BLOCK))

        def launch_of(phase: str) -> PlainLaunch:
            return where.launch(
                MOE_MAP,
                MOE_MAP.of(where.arch, layout, phase, rounds, indices.dtype == torch.int64),
                (blocks if phase == "assign" else clearing,),
                follows=phase == "assign",
                items=items,
                rows=rows,
                rows_per_block=-(-rows // clearing),
                experts=experts,
                first_expert=first_expert,
                alignment=alignment,
                max_m=max_m,
            )

        launches = [launch_of(phase) for phase in phases]

        def call(indices: Tensor, weights: Tensor | None) -> _Permutation:
            outputs = _empty_permutation(indices, weights, experts, layout, alignment, max_m)
            counts = None if len(launches) == 1 else indices.new_empty(clearing * experts, dtype=torch.int32)
            addresses = (
                indices.data_ptr(),
                0 if weights is None else weights.data_ptr(),
                0 if counts is None else counts.data_ptr(),
                *(output.data_ptr() for output in outputs[:3]),
                0 if weights is None else outputs[3].data_ptr(),
            )
            stream = raw_stream(where.ordinal)
            for launch in launches:
                launch(stream, *addresses)
            return outputs

        return where.here(call)

    tensors, numbers = (indices, weights), (experts, layout, alignment, max_m, first_expert)
    grouped, to_pos, to_item, row_weights = plan_of("moe_permutation", tensors, numbers, make)(*tensors)
    return grouped, to_pos, to_item, row_weights


_ROWS_OF_A_BLOCK = 2048  # that one clears, at least: more blocks would count more often than that saves


def _reference_permutation(
    indices: Tensor, weights: Tensor | None, experts: int, layout: str, alignment: int, max_m: int, first_expert: int
) -> _Permutation:
    grouped, to_pos, to_item, row_weights = reference.moe_permutation(
        indices, weights, experts, layout, alignment, max_m, first_expert
    )
    return grouped, to_pos, to_item, indices.new_empty(0, dtype=torch.float32) if row_weights is None else row_weights


# -- Permute


def _check_permute(
    x: Tensor, scales: Tensor | None, to_pos: Tensor, to_item: Tensor, max_m: int, zero_padding: bool
) -> None:
    check_tensor("x", x, _ROW_DTYPES, ("tokens", "width"))
    check_rows("x", x)
    check_tensor("permutation.token_topk_to_pos", to_pos, torch.int32, (x.shape[0], "topk"), x)
    check_tensor("permutation.pos_to_token_topk", to_item, torch.int32, ("rows",), x)
    check_contiguous(**{"permutation.token_topk_to_pos": to_pos, "permutation.pos_to_token_topk": to_item})
    check_number("permutation.max_m", max_m, 0, 2**30)
    if max_m and to_item.shape[0] % max_m:
        raise ProblemError(f"permutation has {to_item.shape[0]} rows and max_m {max_m}, which does not divide them")
    if scales is not None:
        check_tensor("scales", scales, _SCALE_DTYPES, (x.shape[0], "scales of a row"), x)


def _empty_permuted(
    x: Tensor, scales: Tensor | None, to_item: Tensor, max_m: int, zero_padding: bool = False
) -> tuple[Tensor, Tensor]:
    rows = to_item.shape[0]
    shape = (rows // max_m, max_m) if max_m else (rows,)
    out = x.new_empty((*shape, x.shape[1]))
    if scales is None:
        return out, x.new_empty(0, dtype=torch.float32)
    count = scales.shape[1]
    aligned = get_tma_aligned_size(shape[-1], 4)
    padded = scales.new_empty((*shape[:-1], count, aligned))
    return out, padded[..., : shape[-1]].transpose(-1, -2)


def _fake_permute(
    x: Tensor, scales: Tensor | None, to_pos: Tensor, to_item: Tensor, max_m: int, zero_padding: bool
) -> tuple[Tensor, Tensor]:
    _check_permute(x, scales, to_pos, to_item, max_m, zero_padding)
    return _empty_permuted(x, scales, to_item, max_m)


def _permute(
    x: Tensor, scales: Tensor | None, to_pos: Tensor, to_item: Tensor, max_m: int, zero_padding: bool
) -> tuple[Tensor, Tensor]:
    def make() -> Call:
        _check_permute(x, scales, to_pos, to_item, max_m, zero_padding)
        gpu, problem = on_gpu(x), SmallProblem.make("moe_permute", zero_padding=zero_padding)
        record_if_asked(problem)
        if not gpu:
            return lambda x, scales, to_pos, to_item: _reference_permute(
                x, scales, to_pos, to_item, max_m, zero_padding
            )
        tokens, rows = x.shape[0], to_item.shape[0]
        if rows == 0 or tokens == 0 or x.shape[1] == 0:

            def nothing(x: Tensor, scales: Tensor | None, _: Tensor, to_item: Tensor) -> tuple[Tensor, Tensor]:
                permuted = _empty_permuted(x, scales, to_item, max_m)
                if zero_padding:
                    for part in permuted:
                        as_bytes(part).zero_()
                return permuted

            return nothing
        where = Gpu(x, problem)
        vectors = x.shape[1] * x.element_size() // ALIGNMENT
        plane_rows = max_m or rows
        count, aligned = 0 if scales is None else scales.shape[1], get_tma_aligned_size(plane_rows, 4)
        launch = where.launch(
            MOE_PERMUTE,
            MOE_PERMUTE.spec(where.arch, zero_padding=zero_padding),
            (tokens + rows * zero_padding, -(-vectors // EXPAND_THREADS)),
            x_row_stride=row_stride(x) * x.element_size() // ALIGNMENT,
            out_row_stride=vectors,
            scales_row_stride=0 if scales is None else scales.stride(0),
            scales_stride=0 if scales is None else scales.stride(1),
            out_scales_stride=aligned,
            out_plane_stride=aligned * count,
            tokens=tokens,
            topk=to_pos.shape[1],
            vectors=vectors,
            scales_per_row=count,
            plane_rows=plane_rows,
            num_rows=rows,
        )

        def call(x: Tensor, scales: Tensor | None, to_pos: Tensor, to_item: Tensor) -> tuple[Tensor, Tensor]:
            out, out_scales = _empty_permuted(x, scales, to_item, max_m)
            scales_address, target = (0, 0) if scales is None else (scales.data_ptr(), out_scales.data_ptr())
            addresses = (x.data_ptr(), scales_address, to_pos.data_ptr(), to_item.data_ptr(), out.data_ptr(), target)
            check_aligned(("x",), addresses)
            launch(raw_stream(where.ordinal), *addresses)
            return out, out_scales

        return where.here(call)

    tensors = (x, scales, to_pos, to_item)
    rows, rows_scales = plan_of("moe_permute", tensors, (max_m, zero_padding), make)(*tensors)
    return rows, rows_scales


@torch.no_grad()
def _reference_permute(
    x: Tensor, scales: Tensor | None, to_pos: Tensor, to_item: Tensor, max_m: int, zero_padding: bool
) -> tuple[Tensor, Tensor]:
    out, out_scales = _empty_permuted(x, scales, to_item, max_m)
    if zero_padding:
        out.view(torch.uint8).zero_()
        out_scales.zero_()
    reference.moe_permute(x.view(torch.uint8), to_pos, out.view(torch.uint8).view(-1, x.shape[1] * x.element_size()))
    if scales is not None:
        flat = scales.new_empty((to_item.shape[0], scales.shape[1]))
        flat.zero_()
        reference.moe_permute(scales, to_pos, flat)
        out_scales.copy_(flat.view(out_scales.shape))
    return out, out_scales


# -- Combine


def _check_combine(y: Tensor, to_pos: Tensor, weights: Tensor | None, shared: Tensor | None) -> None:
    check_tensor("y", y, torch.bfloat16, ("rows", "width"))
    check_rows("y", y)
    if not y.shape[1]:
        raise ProblemError(f"y has shape {list(y.shape)}; accepted is a width from 8")
    check_tensor("token_topk_to_pos", to_pos, torch.int32, ("tokens", "topk"), y)
    if not 1 <= to_pos.shape[1] <= MAX_COMBINED:
        raise ProblemError(f"token_topk_to_pos has shape {list(to_pos.shape)}; accepted is topk 1 to {MAX_COMBINED}")
    if weights is not None:
        check_tensor("topk_weights", weights, torch.float32, tuple(to_pos.shape), y)
    if shared is not None:
        check_tensor("shared", shared, torch.bfloat16, (to_pos.shape[0], y.shape[1]), y)
        check_rows("shared", shared)
    check_contiguous(token_topk_to_pos=to_pos, topk_weights=weights)
    if y.shape[0] >= 2**31:
        raise ProblemError(f"y has shape {list(y.shape)}; accepted are less than 2**31 rows")


def _fake_combine(y: Tensor, to_pos: Tensor, weights: Tensor | None, shared: Tensor | None) -> Tensor:
    _check_combine(y, to_pos, weights, shared)
    return y.new_empty((to_pos.shape[0], y.shape[1]))


def _combine(y: Tensor, to_pos: Tensor, weights: Tensor | None, shared: Tensor | None) -> Tensor:
    def make() -> Call:
        _check_combine(y, to_pos, weights, shared)
        tokens, topk = to_pos.shape
        gpu, problem = on_gpu(y), SmallProblem.make("moe_combine", topk=topk)
        record_if_asked(problem)
        if not gpu:
            return reference.moe_combine
        width = y.shape[1]
        if tokens == 0:
            return lambda y, *_: y.new_empty((0, width))
        where = Gpu(y, problem)
        vectors = width * y.element_size() // ALIGNMENT
        per_vector = ALIGNMENT // y.element_size()
        launch = where.launch(
            MOE_COMBINE,
            MOE_COMBINE.of(where.arch, topk),
            (tokens, -(-vectors // COMBINE_THREADS)),
            rows_stride=row_stride(y) // per_vector,
            shared_stride=0 if shared is None else row_stride(shared) // per_vector,
            vectors=vectors,
            num_rows=y.shape[0],
        )

        def call(y: Tensor, *others: Tensor | None) -> Tensor:
            out = y.new_empty((tokens, width))
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (y, *others, out)]
            check_aligned(("y", "shared"), (addresses[0], addresses[3]))
            launch(raw_stream(where.ordinal), *addresses)
            return out

        return where.here(call)

    tensors = (y, to_pos, weights, shared)
    result: Tensor = plan_of("moe_combine", tensors, (), make)(*tensors)
    return result


define(
    "topk_gate(Tensor logits, Tensor? bias, int topk, str scores, float route_scale, Tensor? tid2eid,"
    " Tensor? input_ids, Tensor? mask, ScalarType index_dtype) -> (Tensor, Tensor)",
    _gate,
    _fake_gate,
)
define(
    "moe_gate(Tensor x, Tensor weight, Tensor? bias, int topk, str scores, float route_scale, Tensor? tid2eid,"
    " Tensor? input_ids, Tensor? mask, ScalarType index_dtype) -> (Tensor, Tensor)",
    _moe_gate,
    _fake_moe_gate,
)
define(
    "moe_permutation(Tensor topk_indices, Tensor? topk_weights, int num_experts, str layout, int? alignment, int max_m,"
    " int first_expert) -> (Tensor, Tensor, Tensor, Tensor)",
    _permutation,
    _fake_permutation,
)
define(
    "moe_permute(Tensor x, Tensor? scales, Tensor token_topk_to_pos, Tensor pos_to_token_topk, int max_m,"
    " bool zero_padding) -> (Tensor, Tensor)",
    _permute,
    _fake_permute,
)
define(
    "moe_combine(Tensor y, Tensor token_topk_to_pos, Tensor? topk_weights, Tensor? shared) -> Tensor",
    _combine,
    _fake_combine,
)
