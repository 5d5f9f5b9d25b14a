"""FP4 weights: E2M1 codes, two to a byte, the even column's in the low half; in the OCP MX format with a UE8M0 scale
for each 32 of a row, or in NVFP4 with a UE4M3 scale for each 16 and an FP32 one for all; how kernels take them, packed;
and FP8 of the same values.

A UE8M0 scale is 2^(e - 127) for e from 0 to 254, and NaN for 255 (OCP Microscaling Formats 1.0, sections 5.3 and 5.4).
A code is its value's sign, two bits of exponent with bias 1, and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6.

Packed weights, layout ``PACKED_VERSION``. Rows come in tiles of 64, K in blocks of 128, both padded with zeros. A tile
and block takes ``PACKED_BYTES``: 4096 of codes, in the order in which the threads of a warpgroup hold them for an MMA,
and 256 of exponents. ``data`` is ``[..., row tiles, blocks * PACKED_BYTES]``. Thread t, with w = t / 32, g = t % 32 / 4
and q = t % 4, has 32-bit words for j = 0 to 3, the block's MMAs of 32 of K, and h = 0, 1, its upper and its lower row,
16 w + g + 8 h; they lie at byte j / 2 * 2048 + 16 t + j % 2 * 8 + 4 h. A word's nibbles i = 0 to 3 hold the magnitudes
of columns 32 j + 4 q + i in their low three bits, nibbles 4 to 7 those of 32 j + 16 + 4 q + i; bit 8 i + 7 is the sign
of the former, bit 8 i + 3 that of the latter. Exponents of a row's four groups follow each other, at
4096 + 8 (8 w + g) + 4 h.

An exponent is stored as r = e - c, where c, one for each row, puts the row's largest at 127. ``units`` holds 2^(c - 13)
for each row: a row's values are units * code * 2^(r - 114). E5M2 holds code * 2^(r - 114) exactly for r from 101 to 127
(docs/fp4.md): where all exponents in 64 rows are of these, kernels multiply such numbers; else the units of all the 64
are negative, and kernels scale sums over 32. Groups whose codes are all zero count for neither.

NVFP4 is packed in the same way, but for the scales, of which a row has eight in a block, at 4096 + 16 (8 w + g) + 8 h.
A UE4M3 scale is an E4M3 number (OCP FP8 1.0, section 5.2) whose sign is not read: 0, or from 2^-9 to 448, or NaN. All
that are neither zero nor NaN have four significant bits, and are stored in a byte as five bits of exponent with bias 9
and three of mantissa, subnormals normalized. Groups with a scale of zero get codes of zero. ``units`` holds the FP32
scale, or NaN for a row that has a NaN scale. Products of a code and a UE4M3 scale have up to six significant bits,
which no FP8 format holds: kernels multiply by codes and scale sums over 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.families.gemm import MMA_M, MXFP4_GROUP, NVFP4_GROUP, packed_bytes
from jitgemm.reference.quantize import E2M1_VALUES, ceil_div, pack_nibbles, unpack_nibbles

GROUP = MXFP4_GROUP
"""Elements of a row that share a scale of MXFP4."""

PACKED_VERSION = 1
PACKED_BYTES = packed_bytes(GROUP)
"""Of a tile of 64 rows and 128 of K."""

_BLOCK = 128  # of K
_GROUPS = _BLOCK // GROUP
_NV_GROUPS = _BLOCK // NVFP4_GROUP
_CODES_BYTES = MMA_M * _BLOCK // 2
_BIAS = 127  # of UE8M0
_NAN = 255  # in UE8M0
_UNSCALED = 114  # exponent of a packed group whose codes stand for themselves
_LARGEST, _SMALLEST = 127, 101  # exponents whose groups E5M2 holds
_LIMIT = 241  # largest exponent of a packed group: 2^(241 - 114) is the largest power of two in FP32


def ue8m0_to_exponents(scales: Tensor) -> Tensor:
    """The exponents of scales, as uint8: UE8M0 in any of its types, or FP32 powers of two (NaN and Inf become NaN).

    Raises:
        ProblemError: another type, or a number that is no power of two from 2^-126 to 2^127.
    """
    if scales.dtype in (torch.uint8, getattr(torch, "float8_e8m0fnu", None)):
        return scales.view(torch.uint8)
    if scales.dtype != torch.float32:
        raise ProblemError(f"scales have dtype {scales.dtype}; accepted is uint8, float8_e8m0fnu or float32")
    bits = scales.contiguous().view(torch.int32)
    exponents = bits >> 23 & 0xFF
    if bool(((bits & 0x7FFFFF != 0) | (bits < 0) | (exponents == 0))[exponents != _NAN].any()):
        raise ProblemError("scales hold a number that is no power of two; accepted are those from 2^-126 to 2^127")
    return exponents.to(torch.uint8)


def exponents_to_float(exponents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What UE8M0 exponents stand for: powers of two, and NaN."""
    values = _power_of_two(exponents.to(torch.int64) - _BIAS)
    return values.masked_fill(exponents == _NAN, float("nan")).to(dtype)


def dequantize_fp4(packed: Tensor, exponents: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values ``[..., rows, k]`` of codes ``[..., rows, k / 2]`` and exponents; float64 holds them exactly."""
    codes = unpack_nibbles(packed)
    values = torch.tensor((*E2M1_VALUES, *(-value for value in E2M1_VALUES)), dtype=dtype, device=packed.device)
    scales = exponents_to_float(exponents, dtype).repeat_interleave(GROUP, -1)[..., : codes.shape[-1]]
    return values[codes.int()] * scales


def pack(packed: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """``data`` and ``units`` of codes ``[..., rows, k / 2]`` and exponents ``[..., rows, ceil(k / 32)]``, as uint8.

    A row with a NaN scale gets NaN units. Groups whose exponents are more than 241 below the row's largest are lost.
    """
    lead, rows, k = packed.shape[:-2], packed.shape[-2], 2 * packed.shape[-1]
    tiles, blocks = ceil_div(rows, MMA_M), ceil_div(k, _BLOCK)
    codes = torch.nn.functional.pad(unpack_nibbles(packed), (0, blocks * _BLOCK - k, 0, tiles * MMA_M - rows))
    more = blocks * _GROUPS - exponents.shape[-1]
    scales = torch.nn.functional.pad(exponents, (0, more, 0, tiles * MMA_M - rows), value=_BIAS).to(torch.int16)

    used = (codes & 7).view(*lead, tiles * MMA_M, blocks * _GROUPS, GROUP).ne(0).any(-1) & (scales != _NAN)
    largest = scales.masked_fill(~used, -1).amax(-1, keepdim=True)
    smallest = scales.masked_fill(~used, 1 << 10).amin(-1, keepdim=True)
    largest, smallest = (x.where(used.any(-1, keepdim=True), largest.new_tensor(_BIAS)) for x in (largest, smallest))
    offset = largest - (largest - smallest).clamp(_LARGEST, _LIMIT)
    relative = scales - offset
    lost = used & (relative < 0)
    relative = torch.where(used, relative.clamp(min=0), relative.clamp(_SMALLEST, _LARGEST)).to(torch.uint8)
    codes = codes.masked_fill(lost.repeat_interleave(GROUP, -1), 0)

    folds = (relative >= _SMALLEST) & (relative <= _LARGEST)
    tile_folds = folds.view(*lead, tiles, -1).all(-1).repeat_interleave(MMA_M, -1)
    units = _power_of_two(offset.squeeze(-1).to(torch.int64) - (_BIAS - _UNSCALED)).float()
    units = units.masked_fill((scales == _NAN).any(-1), float("nan"))
    bits = units.view(torch.int32)
    units = torch.where(tile_folds, bits & 0x7FFFFFFF, bits | -0x80000000).view(torch.float32)[..., :rows]  # NaN too

    words = _words(codes.view(*lead, tiles, MMA_M, blocks, _BLOCK))
    # From tile, w, h, g, block, j to tile, block, w, g, h, j.
    exponent_bytes = _moved(relative.view(*lead, tiles, 4, 2, 8, blocks, _GROUPS), (0, 4, 1, 3, 2, 5)).flatten(-4)
    data = torch.cat([words, exponent_bytes], -1).flatten(-2)
    return data.contiguous(), units.contiguous()


def unpack(data: Tensor, units: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Reverse ``pack``: codes and exponents of the same values.

    Of a row with a NaN scale all exponents become NaN; those of groups of zeros may differ from what was packed.
    """
    lead, tiles, rows = data.shape[:-2], data.shape[-2], units.shape[-1]
    blocks = data.shape[-1] // PACKED_BYTES
    parts = data.view(*lead, tiles, blocks, PACKED_BYTES)
    codes = _codes(parts[..., :_CODES_BYTES]).reshape(*lead, tiles * MMA_M, blocks * _BLOCK)[..., :rows, :k]
    # From tile, block, w, g, h, j to tile, w, h, g, block, j.
    stored = parts[..., _CODES_BYTES:].reshape(*lead, tiles, blocks, 4, 8, 2, _GROUPS)
    relative = _moved(stored, (0, 2, 4, 3, 1, 5)).reshape(*lead, tiles * MMA_M, blocks * _GROUPS)
    relative = relative[..., :rows, : ceil_div(k, GROUP)].to(torch.int16)
    nan = units.isnan()
    offset = torch.frexp(units.abs().masked_fill(nan, 1.0).double())[1].to(torch.int16) - 1 + (_BIAS - _UNSCALED)
    exponents = (relative + offset[..., None]).clamp(0, _NAN - 1).masked_fill(nan[..., None], _NAN)
    return pack_nibbles(codes), exponents.to(torch.uint8)


def dequantize_nvfp4(packed: Tensor, scales: Tensor, units: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values ``[..., rows, k]`` of codes, e4m3 scales ``[..., rows, ceil(k / 16)]`` and FP32 ones ``[..., rows]``.

    Float64 holds them exactly.
    """
    codes = unpack_nibbles(packed)
    values = torch.tensor((*E2M1_VALUES, *(-value for value in E2M1_VALUES)), dtype=dtype, device=packed.device)
    unsigned = (scales.view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn).to(dtype)
    of_each = unsigned.repeat_interleave(NVFP4_GROUP, -1)[..., : codes.shape[-1]]
    return values[codes.int()] * of_each * units.to(dtype)[..., None]


def pack_nvfp4(packed: Tensor, scales: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """``data`` and ``units`` of codes ``[..., rows, k / 2]``, e4m3 scales ``[..., rows, ceil(k / 16)]`` and FP32 ones
    ``[..., rows]``. A row with a NaN scale gets NaN units.
    """
    lead, rows, k = packed.shape[:-2], packed.shape[-2], 2 * packed.shape[-1]
    tiles, blocks = ceil_div(rows, MMA_M), ceil_div(k, _BLOCK)
    codes = torch.nn.functional.pad(unpack_nibbles(packed), (0, blocks * _BLOCK - k, 0, tiles * MMA_M - rows))
    magnitudes = scales.view(torch.uint8) & 0x7F
    more = blocks * _NV_GROUPS - scales.shape[-1]
    magnitudes = torch.nn.functional.pad(magnitudes, (0, more, 0, tiles * MMA_M - rows))
    codes = codes.masked_fill((magnitudes == 0).repeat_interleave(NVFP4_GROUP, -1), 0)
    nan = (magnitudes[..., :rows, :] == 0x7F).any(-1)
    units = units.masked_fill(nan, float("nan"))

    words = _words(codes.view(*lead, tiles, MMA_M, blocks, _BLOCK))
    stored = torch.tensor(_NORMALIZED, dtype=torch.uint8, device=packed.device)[magnitudes.int()]
    # From tile, w, h, g, block, group to tile, block, w, g, h, group.
    scale_bytes = _moved(stored.view(*lead, tiles, 4, 2, 8, blocks, _NV_GROUPS), (0, 4, 1, 3, 2, 5)).flatten(-4)
    return torch.cat([words, scale_bytes], -1).flatten(-2).contiguous(), units.contiguous()


def unpack_nvfp4(data: Tensor, units: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Reverse ``pack_nvfp4``: codes, scales and FP32 scales of rows, of the same values.

    Of a row with a NaN scale all become NaN; scales of zero become others, of codes of zero.
    """
    lead, tiles, rows = data.shape[:-2], data.shape[-2], units.shape[-1]
    blocks = data.shape[-1] // packed_bytes(NVFP4_GROUP)
    parts = data.view(*lead, tiles, blocks, packed_bytes(NVFP4_GROUP))
    codes = _codes(parts[..., :_CODES_BYTES]).reshape(*lead, tiles * MMA_M, blocks * _BLOCK)[..., :rows, :k]
    # From tile, block, w, g, h, group to tile, w, h, g, block, group.
    stored = parts[..., _CODES_BYTES:].reshape(*lead, tiles, blocks, 4, 8, 2, _NV_GROUPS)
    stored = _moved(stored, (0, 2, 4, 3, 1, 5)).reshape(*lead, tiles * MMA_M, blocks * _NV_GROUPS)
    magnitudes = torch.zeros(256, dtype=torch.uint8, device=data.device)
    known = torch.tensor(_NORMALIZED[1:0x7F], device=data.device)
    magnitudes[known.long()] = torch.arange(1, 0x7F, dtype=torch.uint8, device=data.device)
    scales = magnitudes[stored.int()][..., :rows, : ceil_div(k, NVFP4_GROUP)]
    scales = scales.masked_fill(units.isnan()[..., None], 0x7F)
    return pack_nibbles(codes), scales.contiguous().view(torch.float8_e4m3fn), units


def _normalized(magnitude: int) -> int:
    """A positive finite E4M3 number as five bits of exponent with bias 9 and three of mantissa; 0 for others."""
    exponent, mantissa = magnitude >> 3, magnitude & 7
    if magnitude in (0, 0x7F):
        return 0
    if exponent:
        return exponent + 2 << 3 | mantissa  # from bias 7
    shift = 4 - mantissa.bit_length()
    return 3 - shift << 3 | mantissa << shift & 7


_NORMALIZED = tuple(_normalized(magnitude) for magnitude in range(128))


def to_fp8(packed: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same values as e4m3 ``[..., rows, k]`` and fp32 scales ``[..., rows, ceil(k / 128)]``, or None.

    None: within some row and 128 of K scales of groups that are not all zero lie more than 2^11 apart, or one is NaN
    or so small that its e4m3 scale is no normal fp32 number.
    """
    rows, k = packed.shape[-2], 2 * packed.shape[-1]
    blocks = ceil_div(k, _BLOCK)
    lead = packed.shape[:-2]
    codes = torch.nn.functional.pad(unpack_nibbles(packed), (0, blocks * _BLOCK - k))
    scales = torch.nn.functional.pad(exponents, (0, blocks * _GROUPS - exponents.shape[-1]), value=_BIAS)
    scales = scales.to(torch.int32).view(*lead, rows, blocks, _GROUPS)
    used = (codes & 7).view(*lead, rows, blocks, _GROUPS, GROUP).ne(0).any(-1)
    if bool((scales == _NAN).any()):
        return None
    largest = scales.masked_fill(~used, -1).amax(-1, keepdim=True)
    largest = torch.where(largest < 0, _BIAS, largest)
    shift = scales - largest + 6
    if bool((used & (shift < -5)).any()) or bool((largest <= 6).any()):
        return None
    shift = shift.clamp(-5, 6).repeat_interleave(GROUP, -1).flatten(-2)
    magnitudes = torch.tensor((0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C), dtype=torch.int32, device=packed.device)
    magnitude = magnitudes[(codes & 7).int()]
    values = torch.where(magnitude == 0, 0, magnitude + 8 * shift) | (codes >> 3).int() << 7
    powers = ((largest.squeeze(-1) - 6) << 23).view(torch.float32)
    return values[..., :k].to(torch.uint8).contiguous().view(torch.float8_e4m3fn), powers


def _power_of_two(exponents: Tensor) -> Tensor:
    """2 to the power of int64 ``exponents`` from -1022 to 1023, in float64."""
    return (exponents + 1023 << 52).view(torch.float64)


def _moved(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The last dimensions of ``x`` in another order."""
    first = x.dim() - len(order)
    return x.permute(*range(first), *(first + i for i in order))


def _words(codes: Tensor) -> Tensor:
    """Codes ``[..., tile, 64, block, 128]`` as bytes ``[..., tile, block, 4096]``."""
    lead, tiles, blocks = codes.shape[:-4], codes.shape[-4], codes.shape[-2]
    # Rows are w, h, g; columns pair of MMAs, MMA of the pair, half, q, i.
    split = codes.view(*lead, tiles, 4, 2, 8, blocks, 2, 2, 2, 4, 4).to(torch.int32)
    low, high = split.unbind(-3)
    shift = torch.arange(4, device=codes.device, dtype=torch.int32)
    magnitudes = ((low & 7) << 4 * shift) + ((high & 7) << 4 * shift + 16)
    signs = (low >> 3 << 8 * shift + 7) + (high >> 3 << 8 * shift + 3)
    word = (magnitudes + signs).sum(-1, dtype=torch.int32)  # tile, w, h, g, block, pair, MMA, q
    ordered = _moved(word, (0, 4, 5, 1, 3, 7, 6, 2))  # tile, block, pair, w, g, q, MMA, h
    shifts = torch.arange(0, 32, 8, device=codes.device, dtype=torch.int32)
    return (ordered[..., None] >> shifts & 0xFF).to(torch.uint8).reshape(*lead, tiles, blocks, _CODES_BYTES)


def _codes(data: Tensor) -> Tensor:
    """Reverse ``_words``: ``[..., tile, 64, block, 128]``."""
    lead, tiles, blocks = data.shape[:-3], data.shape[-3], data.shape[-2]
    shifts = torch.arange(0, 32, 8, device=data.device, dtype=torch.int32)
    stored = data.reshape(*lead, tiles, blocks, 2, 4, 8, 4, 2, 2, 4).to(torch.int32)
    word = (stored << shifts).sum(-1, dtype=torch.int32)
    word = _moved(word, (0, 3, 7, 4, 1, 2, 6, 5))[..., None]  # tile, w, h, g, block, pair, MMA, q, and i
    i = torch.arange(4, device=data.device, dtype=torch.int32)
    low = (word >> 4 * i & 7) + (word >> 8 * i + 7 << 3 & 8)
    high = (word >> 4 * i + 16 & 7) + (word >> 8 * i + 3 << 3 & 8)
    return torch.stack([low, high], -3).to(torch.uint8).reshape(*lead, tiles, MMA_M, blocks, _BLOCK)
