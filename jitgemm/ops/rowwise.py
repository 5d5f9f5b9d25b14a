"""Quantizers, SwiGLU, RMSNorm, head norm with rotary embedding, and these fused with a quantizer.

All take bf16, fp16 or fp32 rows and compute in fp32. None is differentiable. Under ``torch.compile`` and in dispatch
modes they are operators, ``torch.ops.jitgemm.*``; on CPU tensors the reference computes.

A scale belongs to a group of neighbouring columns of one row. Where scales go, ``scale_layout``: ``row_major``;
``col_major``, stride 1 along the rows; ``mn_major_tma_aligned``, the same with the rows filled up to a multiple of 16
bytes, as the GEMM kernels load them. What they are, ``scale_dtype``: ``torch.float32``; ``torch.float8_e8m0fnu``, one
byte each; ``torch.int32``, four such bytes to a word, the lowest columns in the low byte, unused bytes 0.

NaN and Inf reach what depends on them: E4M3 codes are NaN there; formats without NaN show them in the group's scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from jitgemm.errors import ProblemError
from jitgemm.families.rowwise import GROUPS, MAX_NORM_COLUMNS, TIES, WHOLE_ROW
from jitgemm.ops.checks import MAX_FP32, check_elements_apart
from jitgemm.ops.dispatch import needs_dispatch
from jitgemm.ops.rowwise_launch import (
    DTYPES,
    E8M0,
    LAYOUTS,
    Quantizer,
    Staging,
    in_rows,
    launch,
    on_gpu,
    operation_of,
    rows_of,
    tell,
)
from jitgemm.reference import rowwise as reference

_Result = TypeVar("_Result")
_SCALE_FORMATS = (None, "ue8m0")
_INT8_ROWS = Quantizer("int8", "fp32_inverse", WHOLE_ROW)


def _cached(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Remember results; but not where torch traces, which warns of it."""
    remembered = functools.lru_cache(maxsize=256, typed=True)(function)  # 64.0 equals 64, and is refused

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> _Result:
        return function(*arguments, **options) if is_dynamo_compiling() else remembered(*arguments, **options)

    return call


# -- Quantizers.


def act_quant(
    x: Tensor,
    block_size: int = 128,
    scale_fmt: str | None = None,
    scale_dtype: torch.dtype = torch.float32,
    inplace: bool = False,
    *,
    scale_layout: str = "row_major",
) -> Any:
    """Quantize rows to E4M3 in groups of ``block_size`` columns.

    ``scale = max(amax, 1e-4) * fp32(1 / 448)``, with ``scale_fmt="ue8m0"`` rounded up to a power of two; codes are
    ``x / scale`` rounded to nearest even.

    Args:
        x: ``[..., n]``; n a multiple of ``block_size``.
        block_size: 16, 32, 64 or 128.
        scale_fmt: None or ``"ue8m0"``.
        scale_dtype: float32; with ``"ue8m0"`` also float8_e8m0fnu and int32 (packed).
        inplace: write what the codes stand for back into ``x``, whose rows may be strided, and return ``x``.
        scale_layout: others than ``row_major`` take ``[m, n]`` only.

    Returns:
        E4M3 ``[..., n]`` and scales ``[..., n / block_size]`` (int32: a quarter, rounded up); or ``x``.

    Raises:
        ProblemError: an argument is not of these.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    quantizer = _e4m3(block_size, scale_fmt, scale_dtype, scale_layout)
    if inplace:
        return _round_trip(x, quantizer, "act_quant_")
    _check_rows("x", x, quantizer)
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x):
        return torch.ops.jitgemm.act_quant(x, block_size, scale_fmt, scale_dtype, scale_layout)
    return _cast(x, quantizer)


def int8_act_quant(x: Tensor, block_size: int = 128, *, scale_layout: str = "col_major") -> tuple[Tensor, Tensor]:
    """Quantize rows to INT8 in groups of ``block_size`` columns.

    ``scale = max(amax / 127, 1e-12)``; codes are ``x / scale`` rounded to nearest even, -127 to 127.

    Args:
        x: ``[..., n]``; n a multiple of ``block_size``.
        block_size: 16, 32, 64 or 128.
        scale_layout: others than ``row_major`` take ``[m, n]`` only.

    Returns:
        int8 ``[..., n]`` and fp32 scales ``[..., n / block_size]``.

    Raises:
        ProblemError: an argument is not of these.
        CacheMissError: as ``act_quant``.
    """
    quantizer = _quantizer("int8", "fp32", block_size, scale_layout)
    _check_rows("x", x, quantizer)
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x):
        result: tuple[Tensor, Tensor] = torch.ops.jitgemm.int8_act_quant(x, block_size, scale_layout)
        return result
    return _cast(x, quantizer)


def per_token_cast_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows to INT8 with one scale a row: activations by token, or weights by output channel.

    ``a = max(amax, 1e-4)``, codes are ``x * (127 / a)`` rounded to nearest even, scales ``1 / (127 / a)``: what a code
    is multiplied with.

    Args:
        x: ``[..., n]``, n from 1 to 32768.

    Returns:
        int8 ``[..., n]`` and fp32 scales ``[..., 1]``.

    Raises:
        ProblemError: an argument is not of these.
        CacheMissError: as ``act_quant``.
    """
    _check_rows("x", x, _INT8_ROWS)
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x):
        result: tuple[Tensor, Tensor] = torch.ops.jitgemm.per_token_cast_to_int8(x)
        return result
    return _cast(x, _INT8_ROWS)


def fp4_act_quant(
    x: Tensor,
    block_size: int = 32,
    inplace: bool = False,
    *,
    scale_dtype: torch.dtype = E8M0,
    scale_layout: str = "row_major",
    ties: str = "even",
) -> Any:
    """Quantize rows to MXFP4: E2M1 with a power of two for each ``block_size`` columns.

    ``scale = 2 ** ceil(log2(max(amax, 6 * 2**-126) * fp32(1 / 6)))``; codes are ``x / scale`` rounded to nearest.

    Args:
        x: ``[..., n]``; n a multiple of ``block_size``.
        block_size: 16, 32, 64 or 128; MXFP4 proper has 32.
        inplace: write what the codes stand for back into ``x``, whose rows may be strided, and return ``x``.
        scale_dtype: float8_e8m0fnu or int32 (packed).
        scale_layout: others than ``row_major`` take ``[m, n]`` only.
        ties: where a tie goes: to the ``even`` code; ``away`` from zero; toward ``zero``, as DeepGEMM's helper.

    Returns:
        uint8 ``[..., n / 2]``, the even column's code in the low half, and scales ``[..., n / block_size]``; or ``x``.

    Raises:
        ProblemError: an argument is not of these.
        CacheMissError: as ``act_quant``.
    """
    quantizer = _quantizer(
        "e2m1", "ue8m0", block_size, scale_layout, _is_packed(scale_dtype, (E8M0, torch.int32)), ties
    )
    if inplace:
        return _round_trip(x, quantizer, "fp4_act_quant_")
    _check_rows("x", x, quantizer)
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x):
        return torch.ops.jitgemm.fp4_act_quant(x, block_size, scale_dtype, scale_layout, ties)
    return _cast(x, quantizer)


def nvfp4_act_quant(x: Tensor, *, ties: str = "even") -> tuple[Tensor, Tensor]:
    """Quantize rows to NVFP4: E2M1 with an unsigned E4M3 scale for each 16 columns, and no scale of the tensor.

    ``scale = e4m3(max(amax, 1e-4) / 6)``, rounded to nearest even, subnormals included, and at most 448; codes are
    ``x * (1 / scale)`` rounded to nearest, or 0 where the scale is 0.

    Args:
        x: ``[..., n]``; n a multiple of 16.
        ties: ``even``, ``away`` or ``zero``, as ``fp4_act_quant``.

    Returns:
        uint8 ``[..., n / 2]``, the even column's code in the low half, and E4M3 scales ``[..., n / 16]``.

    Raises:
        ProblemError: an argument is not of these.
        CacheMissError: as ``act_quant``.
    """
    quantizer = _quantizer("e2m1", "ue4m3", 16, "row_major", ties=ties)
    _check_rows("x", x, quantizer)
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x):
        result: tuple[Tensor, Tensor] = torch.ops.jitgemm.nvfp4_act_quant(x, ties)
        return result
    return _cast(x, quantizer)


def stage_nvfp4(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    x_fp4: Tensor,
    x_sf: Tensor,
    topk_ids_out: Tensor,
    topk_weights_out: Tensor,
    *,
    ties: str = "even",
) -> None:
    """Write NVFP4 rows and their routing into the input buffers of an expert kernel, in one launch.

    Args:
        x: ``[m, n]``; n a multiple of 128.
        topk_ids: int32 or int64 ``[m, k]``, any strides.
        topk_weights: fp32 ``[m, k]``, any strides.
        x_fp4: uint8 or int8 ``[m, n / 2]``, rows contiguous: codes as ``nvfp4_act_quant`` gives them.
        x_sf: int32 ``[m, n / 64]``, any strides: four scales to a word, the lowest columns in the low byte.
        topk_ids_out: int64 ``[m, k]``, any strides.
        topk_weights_out: fp32 ``[m, k]``, any strides.
        ties: ``even``, ``away`` (as a public Triton kernel) or ``zero``.

    Raises:
        ProblemError: an argument is not of these.
        CacheMissError: as ``act_quant``.
    """
    quantizer = _quantizer("e2m1", "ue4m3", 16, "row_major", packed=True, ties=ties)
    _stage(x, topk_ids, topk_weights, x_fp4, x_sf, topk_ids_out, topk_weights_out, quantizer, "stage_nvfp4", ties)


def stage_fp8(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    x_fp8: Tensor,
    x_sf: Tensor,
    topk_ids_out: Tensor,
    topk_weights_out: Tensor,
) -> None:
    """As ``stage_nvfp4``, with E4M3 rows ``[m, n]`` and a power of two for each 32 columns, int32 ``[m, n / 128]``."""
    quantizer = _quantizer("e4m3", "ue8m0", 32, "row_major", packed=True)
    _stage(x, topk_ids, topk_weights, x_fp8, x_sf, topk_ids_out, topk_weights_out, quantizer, "stage_fp8")


# -- SwiGLU.


def swiglu(x: Tensor, weights: Tensor | None = None, limit: float | None = None) -> Tensor:
    """``silu(gate) * up``, where ``x`` is gate before up, times a weight for each row.

    Args:
        x: ``[m, 2n]``.
        weights: fp32 ``[m]``, contiguous, or None.
        limit: the gate is at most that, and up within plus or minus that; None or 0: no limit.

    Returns:
        ``[m, n]`` in the type of ``x``.

    Raises:
        ProblemError: an argument is not of these.
        CacheMissError: as ``act_quant``.
    """
    limit = _check_swiglu(x, weights, limit)
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x, weights):
        result: Tensor = torch.ops.jitgemm.swiglu(x, weights, limit)
        return result
    return _swiglu(x, weights, limit)


def swiglu_act_quant(
    x: Tensor,
    weights: Tensor | None = None,
    limit: float | None = None,
    block_size: int = 128,
    scale_fmt: str | None = "ue8m0",
    scale_dtype: torch.dtype = torch.float32,
    *,
    scale_layout: str = "row_major",
    round_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """``act_quant`` of ``swiglu``, in one kernel.

    Args:
        x: ``[m, 2n]``; n a multiple of ``block_size``.
        weights: as ``swiglu``.
        limit: as ``swiglu``.
        block_size: as ``act_quant``; so are the scales.
        scale_fmt: None or ``"ue8m0"``.
        scale_dtype: float32, or with ``"ue8m0"`` float8_e8m0fnu or int32.
        scale_layout: ``row_major``, ``col_major`` or ``mn_major_tma_aligned``.
        round_first: round to the type of ``x`` before quantizing, as the two functions one after the other do.

    Returns:
        E4M3 ``[m, n]`` and scales.

    Raises:
        ProblemError: an argument is not of these.
        CacheMissError: as ``act_quant``.
    """
    quantizer = _e4m3(block_size, scale_fmt, scale_dtype, scale_layout)
    limit = _check_swiglu(x, weights, limit, quantizer)
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x, weights):
        result: tuple[Tensor, Tensor] = torch.ops.jitgemm.swiglu_act_quant(
            x, weights, limit, block_size, scale_fmt, scale_dtype, scale_layout, round_first
        )
        return result
    return _swiglu_quant(x, weights, limit, quantizer, round_first)


# -- RMSNorm.


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``x * rsqrt(mean(x**2) + eps) * weight`` for each row.

    The same bits for every number of rows: the order of the sum does not depend on it.

    Args:
        x: ``[..., n]``, n at most 32768.
        weight: bf16, fp16 or fp32 ``[n]``, contiguous.
        eps: at least 0.

    Returns:
        ``[..., n]`` in the type of ``x``.

    Raises:
        ProblemError: an argument is not of these.
        CacheMissError: as ``act_quant``.
    """
    _check_norm(x, weight, eps)
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x, weight):
        result: Tensor = torch.ops.jitgemm.rms_norm(x, weight, eps)
        return result
    return _rms_norm(x, weight, eps)


def rms_norm_act_quant(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    block_size: int = 128,
    scale_fmt: str | None = "ue8m0",
    scale_dtype: torch.dtype = torch.float32,
    *,
    scale_layout: str = "row_major",
) -> tuple[Tensor, Tensor, Tensor]:
    """``rms_norm`` and ``act_quant`` of its result, in one kernel.

    Args:
        x: ``[..., n]``; n a multiple of ``block_size``, at most 32768.
        weight: as ``rms_norm``.
        eps: as ``rms_norm``.
        block_size: as ``act_quant``; so are the scales.
        scale_fmt: None or ``"ue8m0"``.
        scale_dtype: float32, or with ``"ue8m0"`` float8_e8m0fnu or int32.
        scale_layout: others than ``row_major`` take ``[m, n]`` only.

    Returns:
        The normalized rows in the type of ``x``, their E4M3 codes ``[..., n]``, and scales.

    Raises:
        ProblemError: an argument is not of these.
        CacheMissError: as ``act_quant``.
    """
    quantizer = _e4m3(block_size, scale_fmt, scale_dtype, scale_layout)
    _check_norm(x, weight, eps, quantizer)
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x, weight):
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.jitgemm.rms_norm_act_quant(
            x, weight, eps, block_size, scale_fmt, scale_dtype, scale_layout
        )
        return result
    return _rms_norm_quant(x, weight, eps, quantizer)


def rms_norm_cast_to_int8(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """``rms_norm`` and ``per_token_cast_to_int8`` of its result, in one kernel.

    Args:
        x: as ``rms_norm``.
        weight: as ``rms_norm``.
        eps: as ``rms_norm``.

    Returns:
        The normalized rows in the type of ``x``, their INT8 codes ``[..., n]``, and fp32 scales ``[..., 1]``.

    Raises:
        ProblemError: an argument is not of these.
        CacheMissError: as ``act_quant``.
    """
    _check_norm(x, weight, eps, _INT8_ROWS)
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x, weight):
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.jitgemm.rms_norm_cast_to_int8(x, weight, eps)
        return result
    return _rms_norm_quant(x, weight, eps, _INT8_ROWS)


# -- Head norm and rotary embedding.


def rope_cos_sin(
    num_positions: int,
    rope_dim: int = 64,
    theta: float = 10000.0,
    factor: float = 1.0,
    original_max_position: int = 65536,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The table of ``head_norm_rope``: fp32 ``[num_positions, rope_dim]``, cosines before sines.

    Frequencies are fp32, ``theta ** (-2i / rope_dim)``, with a ``factor`` above 1 by YaRN (arXiv:2309.00071) without
    its factor of attention; angles are their fp32 products with the position, as the models that use them compute them.
    """
    frequencies = reference.rope_frequencies(rope_dim, theta, factor, original_max_position, beta_fast, beta_slow)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.double().cos(), angles.double().sin()], 1).float().to(device or "cpu")


def head_norm_rope(
    x: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    weight: Tensor | None = None,
    *,
    norm: bool = True,
    inverse: bool = False,
    eps: float = 1e-6,
    nope_block_size: int | None = None,
) -> Tensor:
    """Normalize each head and rotate its last columns, pairs of neighbours; one rounding at the end.

    Args:
        x: ``[tokens, heads, n]``, columns contiguous; n a multiple of 8.
        positions: int32 or int64 ``[tokens]``, contiguous. Where the table lacks one, rotated columns are NaN.
        cos_sin: fp32 ``[positions, rope_dim]`` as ``rope_cos_sin`` makes it, contiguous; rope_dim a multiple of 8.
        weight: of the norm ``[n]``, contiguous; None: all ones.
        norm: divide by the root mean square first.
        inverse: rotate back (by minus the angle).
        eps: of the norm.
        nope_block_size: columns that are not rotated become what ``act_quant(..., nope_block_size, "ue8m0")`` of them
            stands for: how a model's cache sees them. Must divide their number and n.

    Returns:
        ``[tokens, heads, n]`` in the type of ``x``.

    Raises:
        ProblemError: an argument is not of these.
        CacheMissError: as ``act_quant``.
    """
    quantizer = None
    if nope_block_size is not None:
        quantizer = _quantizer("e4m3", "pow2", nope_block_size, "row_major", name="nope_block_size")
    _check_rope(x, positions, cos_sin, weight, norm, eps, quantizer)
    if quantizer is not None and (x.shape[2] - cos_sin.shape[1]) % quantizer.group:
        raise ProblemError(
            f"nope_block_size is {nope_block_size}; accepted are divisors of {x.shape[2] - cos_sin.shape[1]}"
        )
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x, positions, cos_sin, weight):
        result: Tensor = torch.ops.jitgemm.head_norm_rope(
            x, positions, cos_sin, weight, norm, inverse, eps, nope_block_size
        )
        return result
    return _rope(x, positions, cos_sin, weight, norm, inverse, eps, quantizer)


def head_norm_rope_act_quant(
    x: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    weight: Tensor | None = None,
    *,
    norm: bool = True,
    inverse: bool = False,
    eps: float = 1e-6,
    block_size: int = 128,
    scale_fmt: str | None = "ue8m0",
    scale_dtype: torch.dtype = torch.float32,
    scale_layout: str = "row_major",
) -> tuple[Tensor, Tensor]:
    """``act_quant`` of ``head_norm_rope``, in one kernel: what a projection of all heads takes.

    Args:
        x: as ``head_norm_rope``; n a multiple of ``block_size``.
        positions: as ``head_norm_rope``.
        cos_sin: as ``head_norm_rope``.
        weight: as ``head_norm_rope``.
        norm: as ``head_norm_rope``.
        inverse: as ``head_norm_rope``; with ``norm=False``, what comes after attention.
        eps: of the norm.
        block_size: as ``act_quant``; so are the scales.
        scale_fmt: None or ``"ue8m0"``.
        scale_dtype: float32, or with ``"ue8m0"`` float8_e8m0fnu or int32 (a token's scales then a multiple of 4).
        scale_layout: ``row_major``, ``col_major`` or ``mn_major_tma_aligned``.

    Returns:
        E4M3 ``[tokens, heads * n]`` and scales ``[tokens, heads * n / block_size]``.

    Raises:
        ProblemError: an argument is not of these.
        CacheMissError: as ``act_quant``.
    """
    quantizer = _e4m3(block_size, scale_fmt, scale_dtype, scale_layout)
    _check_rope(x, positions, cos_sin, weight, norm, eps, quantizer)
    if quantizer.packed and x.shape[1] * x.shape[2] // quantizer.group % 4:
        raise ProblemError(f"x has shape {tuple(x.shape)}; int32 scales want heads * n a multiple of {4 * block_size}")
    x = x.detach() if x.requires_grad else x
    if needs_dispatch(x, positions, cos_sin, weight):
        result: tuple[Tensor, Tensor] = torch.ops.jitgemm.head_norm_rope_act_quant(
            x, positions, cos_sin, weight, norm, inverse, eps, block_size, scale_fmt, scale_dtype, scale_layout
        )
        return result
    return _rope_quant(x, positions, cos_sin, weight, norm, inverse, eps, quantizer)


# -- What the functions and the operators share: checked arguments in, results out.


def cast_rows(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Codes and scales of a checked CUDA tensor; a last, partial group counts as it is."""
    codes, scales = quantizer.empty(x, x.shape[:-1], x.shape[-1])
    launch(operation_of("cast", quantizer), in_rows(x), x.shape[-1], codes=codes, scales=scales)
    return codes, scales


def _cast(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    if on_gpu(x):
        return cast_rows(x, quantizer)
    codes, scales = quantizer.empty(x, x.shape[:-1], x.shape[-1])
    tell(operation_of("cast", quantizer), x, x.shape[-1])
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    quantizer.write(_quantize(rows, quantizer), codes, scales)
    return codes, scales


def _quantize(rows: Tensor, quantizer: Quantizer) -> reference.Quantized:
    group = quantizer.group or rows.shape[1]
    return reference.quantize(rows, quantizer.format, quantizer.scales, group, quantizer.ties)


def _round_trip(x: Tensor, quantizer: Quantizer, operator: str) -> Tensor:
    _check_rows("x", x, quantizer)
    if x.requires_grad and torch.is_grad_enabled():
        raise ProblemError("x requires a gradient; accepted in place are tensors that need none")
    if x.numel() and (rows_of(x) is None or x.stride(-1) != 1):
        raise ProblemError(f"x has strides {x.stride()}; accepted in place are contiguous rows, equally far apart")
    check_elements_apart("x", x)
    if needs_dispatch(x):
        arguments = (quantizer.ties,) if quantizer.format == "e2m1" else (quantizer.scales == "fp32",)
        getattr(torch.ops.jitgemm, operator)(x, quantizer.group, *arguments)
    else:
        _round_trip_of(x, quantizer)
    return x


def _round_trip_of(x: Tensor, quantizer: Quantizer) -> None:
    # Scales are not stored, so that neither their type nor their layout matters.
    kind = "pow2" if (quantizer.format, quantizer.scales) == ("e4m3", "ue8m0") else quantizer.scales
    quantizer = _quantizer(quantizer.format, kind, quantizer.group, "row_major", ties=quantizer.ties)
    operation = operation_of("cast", quantizer, round_trip=True)
    if on_gpu(x):
        launch(operation, x, x.shape[-1], values=x)
    elif x.numel():
        tell(operation, x, x.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        x.copy_(reference.round_trip(rows, quantizer.format, kind, quantizer.group, quantizer.ties).view(x.shape))


def _stage(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    codes: Tensor,
    x_sf: Tensor,
    topk_ids_out: Tensor,
    topk_weights_out: Tensor,
    quantizer: Quantizer,
    operator: str,
    *arguments: str,
) -> None:
    _check_staging(x, topk_ids, topk_weights, codes, x_sf, topk_ids_out, topk_weights_out, quantizer)
    x = x.detach() if x.requires_grad else x
    tensors = (x, topk_ids, topk_weights, codes, x_sf, topk_ids_out, topk_weights_out)
    if needs_dispatch(*tensors):
        getattr(torch.ops.jitgemm, operator)(*tensors, *arguments)
    else:
        _stage_tensors(*tensors, quantizer)


def _stage_tensors(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    codes: Tensor,
    x_sf: Tensor,
    topk_ids_out: Tensor,
    topk_weights_out: Tensor,
    quantizer: Quantizer,
) -> None:
    staging = Staging(topk_ids, topk_weights, topk_ids_out, topk_weights_out)
    operation = operation_of("cast", quantizer)
    if on_gpu(x):
        launch(operation, in_rows(x), x.shape[1], codes=codes, scales=x_sf, staging=staging)
        return
    tell(operation, x, x.shape[1], staging=staging)
    quantizer.write(_quantize(x, quantizer), codes, x_sf)
    topk_ids_out.copy_(topk_ids)
    topk_weights_out.copy_(topk_weights.detach())


def _swiglu(x: Tensor, weights: Tensor | None, limit: float) -> Tensor:
    columns = x.shape[1] // 2
    operation = operation_of("swiglu", limit=limit)
    if not on_gpu(x):
        tell(operation, x, columns)
        with torch.no_grad():
            return reference.swiglu(x, weights, limit).to(x.dtype).contiguous()
    values = x.new_empty((x.shape[0], columns))
    launch(operation, in_rows(x), columns, values=values, weight=weights)
    return values


def _swiglu_quant(
    x: Tensor, weights: Tensor | None, limit: float, quantizer: Quantizer, round_first: bool
) -> tuple[Tensor, Tensor]:
    columns = x.shape[1] // 2
    operation = operation_of("swiglu", quantizer, round_first=round_first, limit=limit)
    codes, scales = quantizer.empty(x, x.shape[:1], columns)
    if on_gpu(x):
        launch(operation, in_rows(x), columns, codes=codes, scales=scales, weight=weights)
    else:
        tell(operation, x, columns)
        values = reference.swiglu(x, weights, limit)
        quantizer.write(_quantize(values.to(x.dtype) if round_first else values, quantizer), codes, scales)
    return codes, scales


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    operation = operation_of("rms_norm", norm=True, eps=eps)
    if not on_gpu(x):
        tell(operation, x, x.shape[-1], weight=weight)
        return _normalized(x, weight, eps)
    values = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(operation, in_rows(x), x.shape[-1], values=values, weight=weight)
    return values


def _rms_norm_quant(x: Tensor, weight: Tensor, eps: float, quantizer: Quantizer) -> tuple[Tensor, Tensor, Tensor]:
    operation = operation_of("rms_norm", quantizer, round_first=True, norm=True, eps=eps)
    codes, scales = quantizer.empty(x, x.shape[:-1], x.shape[-1])
    if on_gpu(x):
        values = torch.empty_like(x, memory_format=torch.contiguous_format)
        launch(operation, in_rows(x), x.shape[-1], values=values, codes=codes, scales=scales, weight=weight)
    else:
        tell(operation, x, x.shape[-1], values=x, weight=weight)
        values = _normalized(x, weight, eps)
        quantizer.write(_quantize(values.view(-1, x.shape[-1]), quantizer), codes, scales)
    return values, codes, scales


@torch.no_grad()
def _normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return reference.normalize(x.reshape(-1, x.shape[-1]), weight, eps).to(x.dtype).contiguous().view(x.shape)


def _rope(
    x: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    weight: Tensor | None,
    norm: bool,
    inverse: bool,
    eps: float,
    quantizer: Quantizer | None,
) -> Tensor:
    trip = quantizer is not None
    operation = operation_of("rope", quantizer, round_trip=trip, round_first=trip, norm=norm, inverse=inverse, eps=eps)
    if not on_gpu(x):
        tell(operation, x, x.shape[2], weight=weight, positions=positions)
        values = _rotated(x, positions, cos_sin, weight, norm, inverse, eps)
        if quantizer is not None:
            nope = values[..., : x.shape[2] - cos_sin.shape[1]]
            group = quantizer.group
            nope.copy_(reference.round_trip(nope.flatten(0, 1), "e4m3", "pow2", group).view(nope.shape))
        return values
    values = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(operation, x, x.shape[2], values=values, weight=weight, positions=positions, cos_sin=cos_sin)
    return values


def _rope_quant(
    x: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    weight: Tensor | None,
    norm: bool,
    inverse: bool,
    eps: float,
    quantizer: Quantizer,
) -> tuple[Tensor, Tensor]:
    operation = operation_of("rope", quantizer, round_first=True, norm=norm, inverse=inverse, eps=eps)
    codes, scales = quantizer.empty(x, x.shape[:1], x.shape[1] * x.shape[2])
    if on_gpu(x):
        heads = codes.view(x.shape)
        launch(
            operation, x, x.shape[2], codes=heads, scales=scales, weight=weight, positions=positions, cos_sin=cos_sin
        )
    else:
        tell(operation, x, x.shape[2], weight=weight, positions=positions)
        values = _rotated(x, positions, cos_sin, weight, norm, inverse, eps)
        quantizer.write(_quantize(values.flatten(1), quantizer), codes, scales)
    return codes, scales


@torch.no_grad()
def _rotated(
    x: Tensor, positions: Tensor, cos_sin: Tensor, weight: Tensor | None, norm: bool, inverse: bool, eps: float
) -> Tensor:
    known = (positions >= 0) & (positions < cos_sin.shape[0])
    angles = torch.full((x.shape[0], 1, cos_sin.shape[1]), math.nan, dtype=torch.float32, device=x.device)
    angles[known, 0] = cos_sin[positions[known].long()]
    rows = x.flatten(0, 1)
    values = (reference.normalize(rows, weight, eps) if norm else rows.float()).view(x.shape)
    cos, sin = angles.chunk(2, dim=-1)
    return reference.rotate(values, cos, sin, inverse).to(x.dtype)


# -- Checks. All raise ProblemError.


@_cached
def _e4m3(block_size: int, scale_fmt: str | None, scale_dtype: torch.dtype, scale_layout: str) -> Quantizer:
    if scale_fmt not in _SCALE_FORMATS:
        raise ProblemError(f"scale_fmt is {scale_fmt!r}; accepted are None and 'ue8m0'")
    accepted = (torch.float32,) if scale_fmt is None else (torch.float32, E8M0, torch.int32)
    packed = _is_packed(scale_dtype, accepted, f" with scale_fmt={scale_fmt!r}")
    kind = "fp32" if scale_fmt is None else "pow2" if scale_dtype == torch.float32 else "ue8m0"
    return _quantizer("e4m3", kind, block_size, scale_layout, packed)


def _is_packed(scale_dtype: object, accepted: tuple[torch.dtype, ...], why: str = "") -> bool:
    if scale_dtype not in accepted:
        raise ProblemError(f"scale_dtype is {scale_dtype}; accepted are {', '.join(map(str, accepted))}{why}")
    return scale_dtype == torch.int32


@_cached
def _quantizer(
    format: str,
    kind: str,
    block_size: int,
    scale_layout: str,
    packed: bool = False,
    ties: str = "even",
    name: str = "block_size",
) -> Quantizer:
    if block_size not in GROUPS or not isinstance(block_size, int) or isinstance(block_size, bool):
        raise ProblemError(f"{name} is {block_size!r}; accepted are {', '.join(map(str, GROUPS))}")
    if scale_layout not in LAYOUTS:
        raise ProblemError(f"scale_layout is {scale_layout!r}; accepted are {', '.join(LAYOUTS)}")
    if ties not in TIES:
        raise ProblemError(f"ties is {ties!r}; accepted are {', '.join(TIES)}")
    return Quantizer(format, kind, block_size, scale_layout, packed, ties)


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ProblemError(f"{name} is {type(x).__name__}; accepted is a torch.Tensor")
    if x.layout != torch.strided:
        raise ProblemError(f"{name} has layout {x.layout}; accepted is torch.strided")


def _check_values(name: str, x: Tensor) -> None:
    _check_tensor(name, x)
    if x.dtype not in DTYPES:
        raise ProblemError(f"{name} has dtype {x.dtype}; accepted is {', '.join(map(str, DTYPES))}")
    if x.device.type not in ("cuda", "cpu", "meta"):
        raise ProblemError(f"{name} is on {x.device}; accepted are CUDA and CPU tensors")


def _check_rows(name: str, x: Tensor, quantizer: Quantizer | None, columns: int | None = None) -> None:
    """``columns``: of the result, where they are not those of ``x``."""
    _check_values(name, x)
    if x.dim() < 1:
        raise ProblemError(f"{name} has no dimension; accepted is [..., n]")
    if quantizer is None:
        return
    columns = x.shape[-1] if columns is None else columns
    if quantizer.group == WHOLE_ROW:
        if not 1 <= columns <= MAX_NORM_COLUMNS:
            raise ProblemError(f"{name} has {columns} columns; accepted are 1 to {MAX_NORM_COLUMNS}")
    elif columns % quantizer.group:
        raise ProblemError(f"{name} has shape {tuple(x.shape)}; {columns} columns are no multiple of {quantizer.group}")
    if quantizer.layout != "row_major" and x.dim() != 2:
        raise ProblemError(f"{name} has {x.dim()} dimensions; scale_layout {quantizer.layout} accepts 2")


def _check_vector(name: str, tensor: Tensor, length: int, dtypes: tuple[torch.dtype, ...], x: Tensor) -> None:
    _check_tensor(name, tensor)
    if tensor.dtype not in dtypes:
        raise ProblemError(f"{name} has dtype {tensor.dtype}; accepted is {', '.join(map(str, dtypes))}")
    if tensor.dim() != 1 or tensor.shape[0] != length:
        raise ProblemError(f"{name} has shape {tuple(tensor.shape)}; accepted is ({length},)")
    if not tensor.is_contiguous():
        raise ProblemError(f"{name} has strides {tensor.stride()}; accepted is a contiguous vector")
    _check_device(name, tensor, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ProblemError(f"{name} is on {tensor.device} and x on {x.device}; accepted is one device for all")


def _check_swiglu(x: Tensor, weights: Tensor | None, limit: float | None, quantizer: Quantizer | None = None) -> float:
    """The limit in force."""
    _check_values("x", x)
    if x.dim() != 2 or x.shape[1] % 2:
        raise ProblemError(f"x has shape {tuple(x.shape)}; accepted is [m, 2n], gate before up")
    _check_rows("x", x, quantizer, x.shape[1] // 2)
    if weights is not None:
        _check_vector("weights", weights, x.shape[0], (torch.float32,), x)
    if limit is None or limit == 0:
        return math.inf
    if (
        not isinstance(limit, (int, float))
        or isinstance(limit, bool)
        or not (0 < limit <= MAX_FP32 or limit == math.inf)
    ):
        raise ProblemError(f"limit is {limit!r}; accepted is a positive number of fp32, 0 or None")
    return float(limit)


def _check_eps(eps: object) -> None:
    if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 <= eps <= MAX_FP32:
        raise ProblemError(f"eps is {eps!r}; accepted is a number of fp32, from 0")


def _check_norm(x: Tensor, weight: Tensor, eps: float, quantizer: Quantizer | None = None) -> None:
    _check_rows("x", x, quantizer)
    if not 1 <= x.shape[-1] <= MAX_NORM_COLUMNS:
        raise ProblemError(f"x has {x.shape[-1]} columns; accepted are 1 to {MAX_NORM_COLUMNS}")
    _check_vector("weight", weight, x.shape[-1], tuple(DTYPES), x)
    _check_eps(eps)


def _check_rope(
    x: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    weight: Tensor | None,
    norm: bool,
    eps: float,
    quantizer: Quantizer | None,
) -> None:
    _check_values("x", x)
    if x.dim() != 3 or x.shape[2] % 8 or not 8 <= x.shape[2] <= MAX_NORM_COLUMNS:
        raise ProblemError(
            f"x has shape {tuple(x.shape)}; accepted is [tokens, heads, n], n a multiple of 8 up to {MAX_NORM_COLUMNS}"
        )
    if x.stride(2) != 1:
        raise ProblemError(f"x has strides {x.stride()}; accepted are contiguous columns")
    if quantizer is not None and x.shape[2] % quantizer.group:
        raise ProblemError(f"x has shape {tuple(x.shape)}; {x.shape[2]} columns are no multiple of {quantizer.group}")
    _check_vector("positions", positions, x.shape[0], (torch.int32, torch.int64), x)
    _check_tensor("cos_sin", cos_sin)
    if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        raise ProblemError(
            f"cos_sin has dtype {cos_sin.dtype} and strides {cos_sin.stride()}; accepted is contiguous fp32"
        )
    if cos_sin.dim() != 2 or cos_sin.shape[1] % 8 or not 8 <= cos_sin.shape[1] <= x.shape[2]:
        raise ProblemError(
            f"cos_sin has shape {tuple(cos_sin.shape)}; accepted is [positions, rope_dim], a multiple of 8 up to n"
        )
    _check_device("cos_sin", cos_sin, x)
    if weight is not None:
        if not norm:
            raise ProblemError("weight is given with norm=False; accepted is None")
        _check_vector("weight", weight, x.shape[2], tuple(DTYPES), x)
    _check_eps(eps)


def _check_staging(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    codes: Tensor,
    x_sf: Tensor,
    topk_ids_out: Tensor,
    topk_weights_out: Tensor,
    quantizer: Quantizer,
) -> None:
    _check_rows("x", x, quantizer)
    if x.dim() != 2 or x.shape[1] % 128 or not x.shape[1]:
        raise ProblemError(f"x has shape {tuple(x.shape)}; accepted is [m, n], n a multiple of 128")
    m, n = x.shape
    _check_tensor("topk_ids", topk_ids)
    if topk_ids.dim() != 2 or topk_ids.shape[0] != m:
        raise ProblemError(f"topk_ids has shape {tuple(topk_ids.shape)}; accepted is [{m}, k]")
    k = topk_ids.shape[1]
    fp4 = quantizer.format == "e2m1"
    name, width = ("x_fp4", n // 2) if fp4 else ("x_fp8", n)
    code_types = (torch.uint8, torch.int8) if fp4 else (torch.float8_e4m3fn,)
    for label, tensor, shape, dtypes in (
        ("topk_ids", topk_ids, (m, k), (torch.int32, torch.int64)),
        ("topk_weights", topk_weights, (m, k), (torch.float32,)),
        (name, codes, (m, width), code_types),
        ("x_sf", x_sf, (m, n // quantizer.group // 4), (torch.int32,)),
        ("topk_ids_out", topk_ids_out, (m, k), (torch.int64,)),
        ("topk_weights_out", topk_weights_out, (m, k), (torch.float32,)),
    ):
        _check_tensor(label, tensor)
        if tensor.dtype not in dtypes:
            raise ProblemError(f"{label} has dtype {tensor.dtype}; accepted is {', '.join(map(str, dtypes))}")
        if tuple(tensor.shape) != shape:
            raise ProblemError(f"{label} has shape {tuple(tensor.shape)}; accepted is {shape}")
        _check_device(label, tensor, x)
    if codes.stride(1) != 1:
        raise ProblemError(f"{name} has strides {codes.stride()}; accepted are contiguous rows")
    outputs = {name: codes, "x_sf": x_sf, "topk_ids_out": topk_ids_out, "topk_weights_out": topk_weights_out}
    for label, output in outputs.items():
        check_elements_apart(label, output)


# -- Operators: what a graph, a fake tensor or a dispatch mode sees.


def _define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    # Not by ``torch.library.custom_op``, which would pass every call through two more layers of Python.
    torch.library.define(f"jitgemm::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"jitgemm::{name}", ("cpu", "cuda"), implementation)
    torch.library.register_fake(f"jitgemm::{name}", fake)


def _empty_cast(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    _check_rows("x", x, quantizer)
    return quantizer.empty(x, x.shape[:-1], x.shape[-1])


def _nothing(*_: object) -> None:
    return None


def _define_all() -> None:
    # Operators get their arguments by position, which the functions' types can't follow.
    stage: Callable[..., None] = _stage_tensors
    rope_values: Callable[..., Tensor] = _rope
    rope_codes: Callable[..., tuple[Tensor, Tensor]] = _rope_quant
    fp8 = "int block_size, str? scale_fmt, ScalarType scale_dtype, str scale_layout"

    def fp4(block_size: int, scale_dtype: torch.dtype, scale_layout: str, ties: str) -> Quantizer:
        packed = _is_packed(scale_dtype, (E8M0, torch.int32))
        return _quantizer("e2m1", "ue8m0", block_size, scale_layout, packed, ties)

    def nvfp4(ties: str, packed: bool = False) -> Quantizer:
        return _quantizer("e2m1", "ue4m3", 16, "row_major", packed, ties)

    def int8(block_size: int, scale_layout: str) -> Quantizer:
        return _quantizer("int8", "fp32", block_size, scale_layout)

    for name, arguments, make in (
        ("act_quant", fp8, _e4m3),
        ("int8_act_quant", "int block_size, str scale_layout", int8),
        ("fp4_act_quant", "int block_size, ScalarType scale_dtype, str scale_layout, str ties", fp4),
        ("nvfp4_act_quant", "str ties", nvfp4),
    ):
        _define(
            name,
            f"(Tensor x, {arguments}) -> (Tensor, Tensor)",
            lambda x, *rest, make=make: _cast(x, make(*rest)),
            lambda x, *rest, make=make: _empty_cast(x, make(*rest)),
        )
    _define(
        "per_token_cast_to_int8",
        "(Tensor x) -> (Tensor, Tensor)",
        lambda x: _cast(x, _INT8_ROWS),
        lambda x: _empty_cast(x, _INT8_ROWS),
    )
    _define(
        "act_quant_",
        "(Tensor(a!) x, int block_size, bool fp32_scales) -> ()",
        lambda x, block_size, fp32: _round_trip_of(
            x, _quantizer("e4m3", "fp32" if fp32 else "pow2", block_size, "row_major")
        ),
        _nothing,
    )
    _define(
        "fp4_act_quant_",
        "(Tensor(a!) x, int block_size, str ties) -> ()",
        lambda x, block_size, ties: _round_trip_of(x, _quantizer("e2m1", "ue8m0", block_size, "row_major", ties=ties)),
        _nothing,
    )
    staged = (
        "Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor(a!) codes, Tensor(b!) x_sf, Tensor(c!) topk_ids_out,"
        " Tensor(d!) topk_weights_out"
    )
    _define(
        "stage_nvfp4",
        f"({staged}, str ties) -> ()",
        lambda *tensors_and_ties: stage(*tensors_and_ties[:-1], quantizer=nvfp4(tensors_and_ties[-1], True)),
        _nothing,
    )
    _define(
        "stage_fp8",
        f"({staged}) -> ()",
        lambda *tensors: stage(*tensors, quantizer=_quantizer("e4m3", "ue8m0", 32, "row_major", True)),
        _nothing,
    )
    _define(
        "swiglu",
        "(Tensor x, Tensor? weights, float limit) -> Tensor",
        _swiglu,
        lambda x, weights, limit: x.new_empty((x.shape[0], x.shape[1] // 2)),
    )
    _define(
        "swiglu_act_quant",
        f"(Tensor x, Tensor? weights, float limit, {fp8}, bool round_first) -> (Tensor, Tensor)",
        lambda x, weights, limit, *rest: _swiglu_quant(x, weights, limit, _e4m3(*rest[:-1]), rest[-1]),
        lambda x, weights, limit, *rest: _e4m3(*rest[:-1]).empty(x, x.shape[:1], x.shape[1] // 2),
    )
    _define(
        "rms_norm",
        "(Tensor x, Tensor weight, float eps) -> Tensor",
        _rms_norm,
        lambda x, weight, eps: x.new_empty(x.shape),
    )
    _define(
        "rms_norm_act_quant",
        f"(Tensor x, Tensor weight, float eps, {fp8}) -> (Tensor, Tensor, Tensor)",
        lambda x, weight, eps, *rest: _rms_norm_quant(x, weight, eps, _e4m3(*rest)),
        lambda x, weight, eps, *rest: (x.new_empty(x.shape), *_empty_cast(x, _e4m3(*rest))),
    )
    _define(
        "rms_norm_cast_to_int8",
        "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
        lambda x, weight, eps: _rms_norm_quant(x, weight, eps, _INT8_ROWS),
        lambda x, weight, eps: (x.new_empty(x.shape), *_empty_cast(x, _INT8_ROWS)),
    )
    rope = "Tensor x, Tensor positions, Tensor cos_sin, Tensor? weight, bool norm, bool inverse, float eps"

    def rope_implementation(x: Tensor, *rest: Any) -> Tensor:
        *arguments, nope = rest
        quantizer = None if nope is None else _quantizer("e4m3", "pow2", nope, "row_major", name="nope_block_size")
        return rope_values(x, *arguments, quantizer=quantizer)

    _define(
        "head_norm_rope",
        f"({rope}, int? nope_block_size) -> Tensor",
        rope_implementation,
        lambda x, *_: x.new_empty(x.shape),
    )
    _define(
        "head_norm_rope_act_quant",
        f"({rope}, {fp8}) -> (Tensor, Tensor)",
        lambda x, *rest: rope_codes(x, *rest[:6], quantizer=_e4m3(*rest[6:])),
        lambda x, *rest: _e4m3(*rest[6:]).empty(x, x.shape[:1], x.shape[1] * x.shape[2]),
    )


_define_all()
