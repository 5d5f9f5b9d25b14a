"""Quantizers, SwiGLU, RMSNorm and rotary embedding in plain torch: what the row-wise kernels compute.

All but SwiGLU's exponential is defined to the bit: the same on every device, for every number of rows.

Groups: the largest magnitude of a group of columns gives its scale; its elements are divided by the scale, or
multiplied with its exact reciprocal where it is a power of two, and rounded to nearest. What is not finite shows in
what depends on it: E4M3 has a NaN, and takes it for Inf too; where a format has none, the scale of the group is NaN
(INT8: Inf or NaN) and its codes are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jitgemm.reference.quantize import E4M3_MAX, SMALLEST_AMAX, align, ceil_div, ceil_to_ue8m0

E2M1_MAX, INT8_MAX = 6.0, 127.0
SMALLEST_E2M1_AMAX = 6 * 2.0**-126
SMALLEST_INT8_SCALE = 1e-12
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CHUNK = 8
"""Neighbouring columns whose squares are added up one after the other; the sums of chunks are those of a tree."""


class Quantized(NamedTuple):
    """Codes [m, n] (INT8: int8, others: uint8, one for each element) and the scales of their groups.

    Args:
        codes: not packed yet.
        scales: fp32 [m, groups].
        scale_codes: uint8 [m, groups], of scales that have one.
    """

    codes: Tensor
    scales: Tensor
    scale_codes: Tensor | None


# -- Formats.


def round_to_e4m3(x: Tensor) -> Tensor:
    """E4M3 codes of fp32 ``x``, as uint8: nearest even, beyond 448 saturated; NaN is 0x7f."""
    codes = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.masked_fill(x.isnan(), 0x7F)


def e4m3_to_float(codes: Tensor) -> Tensor:
    """The fp32 values of E4M3 codes."""
    return codes.view(torch.float8_e4m3fn).float()


def round_to_e2m1(x: Tensor, ties: str = "even") -> Tensor:
    """E2M1 codes of fp32 ``x``, as uint8, beyond 6 saturated; NaN is 6.

    A tie goes to the ``even`` code, ``away`` from zero or toward ``zero``. A negative number that becomes zero keeps
    its sign, as do negative zeros with ``even``; no zero has a sign with ``zero``.
    """
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for below, low in enumerate(E2M1_MAGNITUDES[:-1]):
        middle = (low + E2M1_MAGNITUDES[below + 1]) / 2
        tie_goes_up = {"even": below % 2 == 1, "away": True, "zero": False}[ties]
        code += ~(magnitude < middle) if tie_goes_up else ~(magnitude <= middle)
    sign = x < 0 if ties == "away" else x.signbit()
    if ties == "zero":
        sign = sign & (code != 0)
    return code | sign.to(torch.uint8) << 3


def e2m1_to_float(codes: Tensor) -> Tensor:
    """The fp32 values of E2M1 codes, one to an element."""
    values = torch.tensor(E2M1_MAGNITUDES + tuple(-x for x in E2M1_MAGNITUDES), device=codes.device)
    return values[codes.long()]


def ue8m0_codes(scales: Tensor) -> Tensor:
    """The exponents of fp32 powers of two, as uint8; 255 of a NaN."""
    return (scales.view(torch.int32) >> 23 & 0xFF).to(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes to a byte, that of the even column in the low half."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Reverse ``pack_nibbles``."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)


def decode(codes: Tensor, format: str) -> Tensor:
    """The fp32 values of codes of a format, one to an element."""
    if format == "e4m3":
        return e4m3_to_float(codes)
    return e2m1_to_float(codes) if format == "e2m1" else codes.float()


# -- Quantization.


def quantize(x: Tensor, format: str, scales: str, group: int, ties: str = "even") -> Quantized:
    """Quantize the rows of ``x`` [m, n] in groups of ``group`` columns; a last, partial group counts as it is.

    Args:
        x: fp32, or a type that fp32 holds.
        format: ``e4m3``, ``int8`` or ``e2m1``.
        scales: ``fp32`` (elements are divided by them), ``fp32_reciprocal`` (multiplied with their rounded
            reciprocals), ``fp32_inverse`` (INT8: multiplied with 127 / amax, whose reciprocals they are), ``pow2`` or
            ``ue8m0`` (rounded up to powers of two), ``ue4m3`` (rounded to nearest E4M3).
        group: columns that share a scale.
        ties: of E2M1.
    """
    m, n = x.shape
    count = ceil_div(n, group)
    values = torch.nn.functional.pad(x.float(), (0, count * group - n)).view(m, count, group)
    amax = values.abs().amax(2) if m and n else values.new_zeros(m, count)
    sf, inverse, scale_codes = scales_of(amax, format, scales)
    scaled = values * inverse[..., None] if inverse is not None else values / sf[..., None]
    if format == "e4m3":
        codes = round_to_e4m3(scaled.masked_fill(scaled.isinf(), float("nan")))
    elif format == "int8":
        codes = scaled.nan_to_num(0.0).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    else:
        blank = ~sf.isfinite() | (sf == 0)
        codes = round_to_e2m1(scaled, ties).masked_fill(blank[..., None], 0)
    return Quantized(codes.view(m, count * group)[:, :n], sf, scale_codes)


def scales_of(amax: Tensor, format: str, scales: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales of groups with these largest magnitudes; what values are multiplied with instead of divided; codes."""
    # Tensors, not numbers: torch divides by a number through its reciprocal on some devices.
    if scales == "fp32_inverse":
        inverse = amax.new_tensor(INT8_MAX) / amax.clamp(min=SMALLEST_AMAX)
        return amax.new_tensor(1.0) / inverse, inverse, None
    if format == "int8":
        return (amax / amax.new_tensor(INT8_MAX)).clamp(min=SMALLEST_INT8_SCALE), None, None
    if scales == "ue4m3":
        scaled = amax.clamp(min=SMALLEST_AMAX) / amax.new_tensor(E2M1_MAX)
        codes = round_to_e4m3(scaled.masked_fill(scaled.isinf(), float("nan")))
        sf = e4m3_to_float(codes)
        return sf, torch.where(sf == 0, 0.0, amax.new_tensor(1.0) / sf), codes
    smallest, largest = (SMALLEST_AMAX, E4M3_MAX) if format == "e4m3" else (SMALLEST_E2M1_AMAX, E2M1_MAX)
    sf = amax.clamp(min=smallest) * amax.new_tensor(1 / largest)
    if scales == "fp32":
        return sf, None, None
    one = amax.new_tensor(1.0)
    if scales == "fp32_reciprocal":
        return sf, one / sf, None
    powers = ceil_to_ue8m0(sf)
    inverse = one / powers
    if format == "e2m1":  # which has no NaN
        powers = powers.masked_fill(~amax.isfinite(), float("nan"))
    return powers, inverse, ue8m0_codes(powers)


def round_trip(x: Tensor, format: str, scales: str, group: int, ties: str = "even") -> Tensor:
    """What the codes of ``x`` stand for, rounded to its type."""
    quantized = quantize(x, format, scales, group, ties)
    spread = quantized.scales.repeat_interleave(group, 1)[:, : x.shape[1]]
    return (decode(quantized.codes, format) * spread).to(x.dtype)


# -- What comes before.


def row_sums_of_squares(x: Tensor) -> Tensor:
    """Sums of the squares of rows [m, n], fp32 [m].

    Each rounding is defined: squares of 8 neighbouring columns are added one after the other, and the sums of these
    chunks in a binary tree, chunk i and i + half first.
    """
    m, n = x.shape
    chunks = 1 << (ceil_div(n, CHUNK) - 1).bit_length()
    squares = torch.nn.functional.pad(x.float(), (0, chunks * CHUNK - n)).view(m, chunks, CHUNK).square()
    sums = torch.zeros_like(squares[..., 0])
    for i in range(CHUNK):
        sums = sums + squares[..., i]
    while chunks > 1:
        chunks //= 2
        sums = sums[:, :chunks] + sums[:, chunks:]
    return sums[:, 0]


def normalize(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Rows [m, n] divided by their root mean squares, times ``weight`` [n], in fp32 without a last rounding."""
    mean = row_sums_of_squares(x) / torch.tensor(float(x.shape[1]), dtype=torch.float32, device=x.device)
    inverse = (1 / (mean + torch.tensor(eps, dtype=torch.float32, device=x.device)).double().sqrt()).float()
    normalized = x.float() * inverse[:, None]
    return normalized if weight is None else normalized * weight.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate pairs of columns at the end of fp32 rows ``x`` [..., n] by angles [..., rope_dim / 2]."""
    rope_dim = 2 * cos.shape[-1]
    rest, turned = x[..., : x.shape[-1] - rope_dim], x[..., x.shape[-1] - rope_dim :]
    even, odd = turned[..., ::2], turned[..., 1::2]
    if inverse:
        sin = -sin
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([rest, rotated], -1)


def swiglu(x: Tensor, weights: Tensor | None = None, limit: float | None = None) -> Tensor:
    """``silu(gate) * up`` [m, n] of ``x`` [m, 2n], gate before up, times ``weights`` [m], in fp32 (float64 stays).

    With a limit the gate is at most that, and up within plus or minus that.
    """
    gate, up = (x if x.dtype == torch.float64 else x.float()).chunk(2, dim=1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    result = gate / (1 + torch.exp(-gate)) * up
    return result if weights is None else result * weights[:, None]


def rope_frequencies(
    rope_dim: int,
    theta: float,
    factor: float = 1.0,
    original_max_position: int = 65536,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """Angular frequencies of pairs, fp32 [rope_dim / 2]: ``theta ** (-2i / rope_dim)``.

    With a ``factor`` above 1 by YaRN: pairs that turn more than ``beta_fast`` times within the original positions keep
    their frequency, those that turn less than ``beta_slow`` times get it divided by the factor, a ramp lies between.
    """
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim
    frequencies = 1.0 / theta**exponents
    if factor <= 1:
        return frequencies

    def pair_that_turns(turns: float) -> float:
        ratio = torch.tensor(original_max_position / (turns * 2 * torch.pi), dtype=torch.float64)
        return float(rope_dim * ratio.log() / (2 * torch.tensor(theta, dtype=torch.float64).log()))

    low = max(int(pair_that_turns(beta_fast) // 1), 0)
    high = min(-int(-pair_that_turns(beta_slow) // 1), rope_dim - 1)
    ramp = ((torch.arange(rope_dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp)


def pad_groups(codes: Tensor, multiple: int, padding: int) -> Tensor:
    """Scale codes [m, groups], filled up to a multiple of groups."""
    return torch.nn.functional.pad(codes, (0, align(codes.shape[1], multiple) - codes.shape[1]), value=padding)
