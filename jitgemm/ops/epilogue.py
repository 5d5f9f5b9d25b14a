"""What may follow a GEMM's product before it is stored: one description for dense and grouped functions."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.families.gemm import D_SCALE_COLUMNS
from jitgemm.ops.checks import MAX_FP32, check_apart, check_tensors, span_of
from jitgemm.reference import epilogue as reference
from jitgemm.reference.layout import empty_mn_major

_D_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_SCALE_DTYPES = {torch.float32: "e4m3", torch.int32: "e4m3_ue8m0"}
_COLUMNS_OF_SCALES = 128  # of a quantized D to an element of its scales

# The template's `EpilogueSteps`: pointers to alpha, bias, row_weights and scales, two strides of scales, strides of the
# others, bias_is_bf16, alpha_value, limit.
STEPS = struct.Struct("<QQQQ qq iii i ff")


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What becomes of ``a @ b.T``, in this order: ``alpha *``, ``+ c``, ``+ bias``, SwiGLU, ``row_weights *``.

    Rounding to d's type, or quantization where d is a pair of e4m3 values and scales, comes last and once: see
    ``empty_quantized``.

    Args:
        alpha: a number, or an fp32 tensor of one element that the kernel reads on the device; in grouped functions
            also ``[groups]``.
        bias: bf16 or fp32 ``[n]``; in grouped functions also ``[groups, n]``. Of b's rows, so with SwiGLU interleaved
            as they are.
        swiglu: ``silu(gate) * up``, where b's rows are gate's and up's as ``interleave_gate_up`` orders them: d has
            half as many columns. With 128 x 128 scales gate and up have ``ceil(n / 256)`` blocks each.
        limit: of SwiGLU: gate is clamped to at most this, up to plus and minus it.
        row_weights: fp32, one for each row of d: ``[m]``, or ``[groups, max_m]`` of a masked GEMM.
    """

    alpha: float | Tensor = 1.0
    bias: Tensor | None = None
    swiglu: bool = False
    limit: float | None = None
    row_weights: Tensor | None = None


def empty_quantized(
    shape: tuple[int, ...], *, ue8m0: bool = False, device: torch.device | str | int | None = None
) -> tuple[Tensor, Tensor]:
    """Uninitialized e4m3 ``[m, n]`` or ``[groups, m, n]`` with scales, as the d of a function with an epilogue.

    The scales are MN-major and TMA-aligned, as the next GEMM loads them: the pair is its ``a``.

    Args:
        shape: of the values.
        ue8m0: scales are exponents for 32 columns each, four to an int32; else fp32 for 128 columns.
        device: by default the current CUDA device, if there is one.

    Raises:
        ProblemError: the shape has neither two nor three dimensions.
    """
    if len(shape) not in (2, 3) or any(not isinstance(size, int) or size < 0 for size in shape):
        raise ProblemError(f"shape is {shape!r}; accepted is (m, n) or (groups, m, n)")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    of_scales = (*shape[:-1], -(-shape[-1] // _COLUMNS_OF_SCALES))
    return values, empty_mn_major(of_scales, torch.int32 if ue8m0 else torch.float32, values.device)


class Steps(NamedTuple):
    """A call's epilogue, flat, with the output's parts: what custom operators take."""

    alpha: Tensor | None
    alpha_value: float
    bias: Tensor | None
    swiglu: bool
    limit: float | None
    row_weights: Tensor | None
    d_scales: Tensor | None

    @property
    def name(self) -> str:
        """The problem's ``epilogue``."""
        return "swiglu" if self.swiglu else "linear"

    @property
    def gated(self) -> int:
        """Columns of the product that make one of D."""
        return 2 if self.swiglu else 1

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by their names in messages."""
        named = {"alpha": self.alpha, "bias": self.bias, "row_weights": self.row_weights, "d_scales": self.d_scales}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def key(self) -> tuple[object, ...]:
        """What plans depend on."""
        of_tensors = tuple((name, t.shape, t.stride(), t.dtype, t.device) for name, t in self.tensors().items())
        return self.swiglu, of_tensors

    def reference(self) -> reference.Epilogue:
        """The same for the reference."""
        packed = self.d_scales is not None and self.d_scales.dtype == torch.int32
        return reference.Epilogue(
            alpha=self.alpha_value if self.alpha is None else self.alpha,
            bias=self.bias,
            swiglu=self.swiglu,
            limit=self.limit,
            row_weights=self.row_weights,
            gran_k=D_SCALE_COLUMNS["e4m3_ue8m0" if packed else "e4m3"],
        )


def steps_of(epilogue: object, d: Any) -> tuple[Steps, Any]:
    """The steps of a call, and d's values.

    Raises:
        ProblemError: a field is not what ``Epilogue`` says.
    """
    if not isinstance(epilogue, Epilogue):
        raise ProblemError(f"epilogue is {type(epilogue).__name__}; accepted is a jitgemm.Epilogue or None")
    values, scales = d, None
    if isinstance(d, (tuple, list)):
        if len(d) != 2:
            raise ProblemError(f"d has {len(d)} parts; accepted is a tensor, or a pair (e4m3 tensor, scales)")
        values, scales = d
        if not isinstance(scales, Tensor):
            raise ProblemError(f"d_scales is {type(scales).__name__}; accepted is a torch.Tensor")
    alpha, limit = epilogue.alpha, epilogue.limit
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not isinstance(alpha, Tensor) and not (is_number and abs(alpha) <= MAX_FP32):
        raise ProblemError(f"alpha is {alpha!r}; accepted is a number of fp32 or an fp32 tensor")
    if not isinstance(epilogue.swiglu, bool):
        raise ProblemError(f"swiglu is {epilogue.swiglu!r}; accepted is a boolean")
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit <= MAX_FP32:
            raise ProblemError(f"limit is {limit!r}; accepted is a positive number of fp32, or None")
        if not epilogue.swiglu:
            raise ProblemError(f"limit is {limit!r} without swiglu; accepted is None")
    for name in ("bias", "row_weights"):
        tensor = getattr(epilogue, name)
        if tensor is not None and not isinstance(tensor, Tensor):
            raise ProblemError(f"{name} is {type(tensor).__name__}; accepted is a torch.Tensor or None")
    steps = Steps(
        alpha=alpha if isinstance(alpha, Tensor) else None,
        alpha_value=1.0 if isinstance(alpha, Tensor) else float(alpha),
        bias=epilogue.bias,
        swiglu=epilogue.swiglu,
        limit=None if limit is None else float(limit),
        row_weights=epilogue.row_weights,
        d_scales=scales,
    )
    return steps, values


def check_steps(steps: Steps, d: Tensor, n: int, groups: int | None, masked: bool) -> str:
    """Check the tensors of an epilogue against d and the product's columns; returns the problem's ``d_dtype``.

    Raises:
        ProblemError: one is not what ``Epilogue`` says.
    """
    check_tensors(**steps.tensors())
    for name, tensor in steps.tensors().items():
        if tensor.device != d.device:
            raise ProblemError(f"{name} is on {tensor.device} and d on {d.device}; accepted is one device for all")
    of_groups = () if groups is None else (groups,)
    rows = tuple(d.shape[:-1])
    if steps.alpha is not None:
        alpha = steps.alpha
        if alpha.dtype != torch.float32 or not (alpha.numel() == 1 or (of_groups and tuple(alpha.shape) == of_groups)):
            accepted = "one element" if groups is None else f"one element or {of_groups}"
            raise ProblemError(f"alpha is {alpha.dtype} {tuple(alpha.shape)}; accepted is torch.float32, {accepted}")
        _check_contiguous("alpha", alpha)
    if steps.bias is not None:
        bias, shapes = steps.bias, [(n,), *([] if groups is None else [(groups, n)])]
        if bias.dtype not in _D_DTYPES or tuple(bias.shape) not in shapes:
            accepted = " or ".join(map(str, shapes))
            raise ProblemError(
                f"bias is {bias.dtype} {tuple(bias.shape)}; accepted is torch.bfloat16 or torch.float32, {accepted}"
            )
        _check_contiguous("bias", bias)
    if steps.row_weights is not None:
        weights = steps.row_weights
        if weights.dtype != torch.float32 or tuple(weights.shape) != rows:
            raise ProblemError(
                f"row_weights are {weights.dtype} {tuple(weights.shape)}; accepted is torch.float32 {rows}"
            )
        _check_contiguous("row_weights", weights)
    scales = steps.d_scales
    if scales is None:
        if d.dtype not in _D_DTYPES:
            raise ProblemError(
                f"d has dtype {d.dtype}; accepted are torch.bfloat16, torch.float32, and with scales"
                " torch.float8_e4m3fn"
            )
        return _D_DTYPES[d.dtype]
    if d.dtype != torch.float8_e4m3fn or scales.dtype not in _SCALE_DTYPES:
        raise ProblemError(
            f"d is {d.dtype} with scales of {scales.dtype}; accepted is torch.float8_e4m3fn with torch.float32"
            " (1 x 128) or torch.int32 (four UE8M0 exponents, 1 x 32)"
        )
    shape = (*rows, -(-d.shape[-1] // _COLUMNS_OF_SCALES))
    if tuple(scales.shape) != shape:
        raise ProblemError(f"d_scales have shape {tuple(scales.shape)}; d {tuple(d.shape)} makes it {shape}")
    strides, m = scales.stride(), rows[-1]
    apart = shape[-1] <= 1 or strides[-1] >= m
    if masked and shape[0] > 1:
        apart &= strides[0] >= (shape[-1] - 1) * strides[-1] + m
    if (strides[-2] != 1 and m > 1) or not apart:
        raise ProblemError(
            f"d_scales have strides {strides}; accepted is stride 1 along m (empty_quantized makes such)"
        )
    return _SCALE_DTYPES[scales.dtype]


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ProblemError(f"{name} has strides {tensor.stride()}; accepted is a contiguous tensor")


def check_steps_apart(steps: Steps, d: Tensor, inputs: dict[str, Tensor | None]) -> None:
    """Check that the outputs of a call lie apart from each other and from all that it reads.

    Raises:
        ProblemError: they don't.
    """
    named = steps.tensors()
    scales = named.pop("d_scales", None)
    others = [(name, t.data_ptr(), span_of(t)) for name, t in {**inputs, **named}.items() if t is not None]
    check_apart("d", d.data_ptr(), span_of(d), others)
    if scales is not None:
        check_apart("d_scales", scales.data_ptr(), span_of(scales), [*others, ("d", d.data_ptr(), span_of(d))])


def pack(steps: Steps) -> bytes:
    """The template's ``EpilogueSteps``."""
    alpha, bias, weights, scales = steps.alpha, steps.bias, steps.row_weights, steps.d_scales
    stride, plane_stride = 0, 0
    if scales is not None:
        stride = scales.stride(-1) if scales.shape[-1] > 1 else 0
        plane_stride = scales.stride(0) if scales.dim() == 3 and scales.shape[0] > 1 else 0
    return STEPS.pack(
        *(0 if tensor is None else tensor.data_ptr() for tensor in (alpha, bias, weights, scales)),
        *(stride, plane_stride),
        int(alpha is not None and alpha.numel() > 1),
        bias.shape[1] if bias is not None and bias.dim() == 2 else 0,
        weights.shape[1] if weights is not None and weights.dim() == 2 else 0,
        int(bias is not None and bias.dtype == torch.bfloat16),
        *(steps.alpha_value, math.inf if steps.limit is None else steps.limit),
    )
