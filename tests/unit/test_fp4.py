"""FP4 weights: formats, packing, and the kernels' own expansion of packed tiles, run on the CPU."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support import ROOT
from torch import Tensor

from jitgemm.errors import ProblemError
from jitgemm.reference import fp4
from jitgemm.reference.quantize import pack_nibbles

# OCP Microscaling Formats 1.0, section 5.3.3: sign, two bits of exponent with bias 1, one of mantissa.
E2M1 = [
    (-1) ** (code >> 3) * (2 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2)
    for code in range(16)
    for exponent, mantissa in [(code >> 1 & 3, code & 1)]
]


def fp8(byte: int, bits: int, bias: int) -> float:
    """The value of a positive finite byte with so many bits of mantissa (OCP FP8 1.0, section 5.2)."""
    exponent, mantissa = byte >> bits, byte & (1 << bits) - 1
    return 2.0 ** (max(exponent, 1) - bias) * (mantissa / (1 << bits) + (exponent > 0))


def random_weights(
    shape: tuple[int, ...], low: int, high: int, seed: int = 0, sparse: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes and exponents, the latter from ``low`` to ``high``; ``sparse``: many groups are all zeros."""
    *lead, rows, k = shape
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-128, 128, (*lead, rows, k // 2), generator=generator, dtype=torch.int8)
    exponents = torch.randint(low, high + 1, (*lead, rows, -(-k // 32)), generator=generator).to(torch.uint8)
    if sparse:
        zeros = torch.rand(exponents.shape, generator=generator) < 0.3
        packed = packed.masked_fill(zeros.repeat_interleave(16, -1)[..., : k // 2], 0)
    return packed, exponents


def test_every_code_times_every_scale_has_its_value() -> None:
    for code, exponent in itertools.product(range(16), (0, 1, 120, 127, 128, 254)):
        packed = torch.full((1, 16), code | code << 4, dtype=torch.uint8).view(torch.int8)
        value = fp4.dequantize_fp4(packed, torch.tensor([[exponent]], dtype=torch.uint8))
        assert value.tolist() == [[E2M1[code] * 2.0 ** (exponent - 127)] * 32]
    nan = fp4.dequantize_fp4(torch.zeros((1, 16), dtype=torch.int8), torch.tensor([[255]], dtype=torch.uint8))
    assert nan.isnan().all()


def test_the_even_column_is_in_the_low_half() -> None:
    packed = torch.tensor([[0x21]], dtype=torch.int8)
    assert fp4.dequantize_fp4(packed, torch.tensor([[127]], dtype=torch.uint8)).tolist() == [[0.5, 1.0]]


@pytest.mark.parametrize(("bits", "bias", "s_min", "s_max"), [(3, 7, -5, 6), (2, 15, -13, 13)], ids=["e4m3", "e5m2"])
def test_fp8_holds_every_code_and_bytes_move_with_the_scale(bits: int, bias: int, s_min: int, s_max: int) -> None:
    finite = 0x7F if bits == 3 else 0x7C
    values = {fp8(byte, bits, bias): byte for byte in range(finite)}
    moves = []
    for s in range(-30, 30):
        exact = all(value * 2.0**s in values for value in E2M1[:8])
        if exact and all(values[value * 2.0**s] == values[value] + (s << bits) for value in E2M1[1:8]):
            moves.append(s)
    assert moves == list(range(s_min, s_max + 1))
    if bits == 2:
        assert (s_min, s_max) == (fp4._SMALLEST - fp4._UNSCALED, fp4._LARGEST - fp4._UNSCALED)


@pytest.mark.parametrize("shape", [(64, 128), (100, 160), (1, 32), (3, 130, 416), (2, 64, 2)])
@pytest.mark.parametrize("window", [(101, 127), (0, 26), (228, 254), (0, 240), (13, 254)])
def test_packing_can_be_undone(shape: tuple[int, ...], window: tuple[int, int]) -> None:
    packed, exponents = random_weights(shape, *window)
    data, units = fp4.pack(packed, exponents)
    tiles, blocks = -(-shape[-2] // 64), -(-shape[-1] // 128)
    assert data.shape == (*shape[:-2], tiles, blocks * fp4.PACKED_BYTES) and units.shape == shape[:-1]
    codes, found = fp4.unpack(data, units, shape[-1])
    assert torch.equal(codes, packed)
    values = fp4.dequantize_fp4(packed, exponents)
    assert torch.equal(fp4.dequantize_fp4(codes, found), values)
    used = values.unflatten(-1, (-1, 32)).ne(0).any(-1) if shape[-1] % 32 == 0 else None
    if used is not None:
        assert torch.equal(found[used], exponents[used])


def test_units_say_whether_64_rows_can_be_expanded() -> None:
    packed, exponents = random_weights((192, 256), 100, 126)
    packed[100] |= 1  # no zeros
    assert (fp4.pack(packed, exponents)[1] > 0).all()
    exponents[100, 3] = exponents[100].amax() - 27
    signs = fp4.pack(packed, exponents)[1].sign()
    assert signs.tolist() == [1.0] * 64 + [-1.0] * 64 + [1.0] * 64
    packed[100, 48:64] = 0  # a group of zeros has no scale
    assert (fp4.pack(packed, exponents)[1] > 0).all()


def test_a_nan_scale_makes_its_row_nan() -> None:
    packed, exponents = random_weights((64, 128), 120, 125)
    exponents[7, 2] = 255
    data, units = fp4.pack(packed, exponents)
    assert units.isnan().nonzero().flatten().tolist() == [7]
    codes, found = fp4.unpack(data, units, 128)
    assert torch.equal(codes, packed) and (found[7] == 255).all() and torch.equal(found[8:], exponents[8:])


def test_what_is_more_than_241_binades_below_the_largest_is_lost() -> None:
    packed = torch.full((64, 64), 0x22, dtype=torch.int8)
    for smallest, kept in ((13, True), (12, False)):
        exponents = torch.tensor([[254, smallest, 200, 200]], dtype=torch.uint8).repeat(64, 1)
        codes, found = fp4.unpack(*fp4.pack(packed, exponents), 128)
        values = fp4.dequantize_fp4(codes, found)
        expected = fp4.dequantize_fp4(packed, exponents)
        assert torch.equal(values[:, :32], expected[:, :32]) and torch.equal(values[:, 64:], expected[:, 64:])
        assert torch.equal(values[:, 32:64], expected[:, 32:64] if kept else torch.zeros(64, 32).double())


@pytest.mark.parametrize("shape", [(64, 128), (3, 200), (2, 5, 96)])
def test_fp8_of_the_same_values(shape: tuple[int, ...]) -> None:
    packed, exponents = random_weights(shape, 110, 121, sparse=True)
    converted = fp4.to_fp8(packed, exponents)
    assert converted is not None
    data, scales = converted
    assert data.dtype == torch.float8_e4m3fn and data.shape == shape
    assert scales.shape == (*shape[:-1], -(-shape[-1] // 128))
    values = data.double() * scales.double().repeat_interleave(128, -1)[..., : shape[-1]]
    assert torch.equal(values, fp4.dequantize_fp4(packed, exponents))


def test_fp8_is_refused_where_it_would_not_be_exact() -> None:
    packed = torch.full((1, 64), 0x22, dtype=torch.int8)
    for exponents, exact in (
        ([127, 116, 120, 127], True),
        ([127, 115, 120, 127], False),
        ([127, 127, 127, 255], False),
        ([7, 7, 7, 7], True),
        ([6, 6, 6, 6], False),
    ):
        assert (fp4.to_fp8(packed, torch.tensor([exponents], dtype=torch.uint8)) is not None) == exact


def test_scales_in_every_type() -> None:
    exponents = torch.tensor([[1, 127, 254]], dtype=torch.uint8)
    floats = fp4.exponents_to_float(exponents)
    assert torch.equal(fp4.ue8m0_to_exponents(floats), exponents)
    assert fp4.ue8m0_to_exponents(exponents) is not None
    if hasattr(torch, "float8_e8m0fnu"):
        assert torch.equal(fp4.ue8m0_to_exponents(exponents.view(torch.float8_e8m0fnu)), exponents)
    for wrong in (3.0, -1.0, 0.0):
        with pytest.raises(ProblemError, match="no power of two"):
            fp4.ue8m0_to_exponents(torch.tensor([[wrong]]))
    with pytest.raises(ProblemError, match="accepted is uint8"):
        fp4.ue8m0_to_exponents(torch.tensor([[1]], dtype=torch.int32))


def test_every_scale_of_nvfp4_has_its_value() -> None:
    bytes_of = torch.arange(1, 0x7F, dtype=torch.uint8)  # without zero and NaN
    values = [fp8(byte, 3, 7) for byte in bytes_of.tolist()]
    stored = torch.tensor(fp4._NORMALIZED)[bytes_of.long()]
    assert [(1 + (byte & 7) / 8) * 2.0 ** ((byte >> 3) - 9) for byte in stored.tolist()] == values


def random_nv_weights(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, E4M3 scales that are neither zero nor NaN, and FP32 ones of rows."""
    generator = torch.Generator().manual_seed(2)
    *lead, rows, k = shape
    packed = torch.randint(-128, 128, (*lead, rows, k // 2), generator=generator, dtype=torch.int8)
    scales = torch.randint(1, 0x7F, (*lead, rows, -(-k // 16)), generator=generator).to(torch.uint8)
    return packed, scales.view(torch.float8_e4m3fn), torch.rand((*lead, rows), generator=generator) + 0.5


@pytest.mark.parametrize("shape", [(64, 128), (100, 160), (1, 16), (3, 130, 416), (2, 64, 2)])
def test_packing_of_nvfp4_can_be_undone(shape: tuple[int, ...]) -> None:
    packed, scales, units = random_nv_weights(*shape)
    data, packed_units = fp4.pack_nvfp4(packed, scales, units)
    assert data.shape == (*shape[:-2], -(-shape[-2] // 64), -(-shape[-1] // 128) * 4608)
    codes, found, found_units = fp4.unpack_nvfp4(data, packed_units, shape[-1])
    assert torch.equal(codes, packed) and torch.equal(found_units, units)
    assert torch.equal(found.view(torch.uint8), scales.view(torch.uint8))


def test_nvfp4_with_a_scale_of_zero_is_zero() -> None:
    packed, scales = torch.full((64, 64), 0x77, dtype=torch.int8), torch.zeros((64, 8), dtype=torch.uint8)
    scales[:, 1] = 0x38 | 0x80  # 1, whose sign is not read
    restored = fp4.unpack_nvfp4(*fp4.pack_nvfp4(packed, scales.view(torch.float8_e4m3fn), torch.ones(64)), 128)
    values = fp4.dequantize_nvfp4(*restored)
    assert torch.equal(values, fp4.dequantize_nvfp4(packed, scales.view(torch.float8_e4m3fn), torch.ones(64)))
    assert (values[:, 16:32] == 6).all() and values.count_nonzero() == 64 * 16


# -- The kernels' expansion.

_SHIM = """
#include <cstdint>
#include <cstring>
#define __device__
#define __forceinline__ inline
constexpr int WARPGROUP = 128;
static struct { uint32_t x; } threadIdx;
static const uint8_t* shared;
static float __uint_as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
static uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t nibbles) {  // PTX ISA, prmt, default mode
  const uint64_t both = uint64_t(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = nibbles >> 4 * i & 15, byte = both >> 8 * (nibble & 7) & 255;
    out |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return out;
}
template <int N>
static void load_shared_words(uint32_t address, uint32_t (&words)[N]) { memcpy(words, shared + address, 4 * N); }
static uint32_t load_shared_byte(uint32_t address) { return shared[address]; }
"""

_MAIN = """
extern "C" void expand(const uint8_t* tile, uint32_t (*fragments)[16]) {
  shared = tile;
  for (threadIdx.x = 0; threadIdx.x < WARPGROUP; ++threadIdx.x) expand_tile(0, fragments[threadIdx.x]);
}
extern "C" void expand_halves_of(const uint8_t* tile, uint32_t (*fragments)[32], float (*scales)[16]) {
  shared = tile;
  for (threadIdx.x = 0; threadIdx.x < WARPGROUP; ++threadIdx.x) {
    expand_halves(0, fragments[threadIdx.x]);
    const HalfScales of_rows(0);
    for (int i = 0; i < 16; ++i) scales[threadIdx.x][i] = of_rows.at(i / 8, i % 8);
  }
}
extern "C" void expand_steps(const uint8_t* tile, uint32_t (*fragments)[16], float (*scales)[8]) {
  shared = tile;
  for (threadIdx.x = 0; threadIdx.x < WARPGROUP; ++threadIdx.x)
    for (int step = 0; step < 4; ++step) {
      const UnscaledStep one = expand_step(0, step);
      memcpy(fragments[threadIdx.x] + 4 * step, one.fragments, 16);
      scales[threadIdx.x][2 * step] = one.upper, scales[threadIdx.x][2 * step + 1] = one.lower;
    }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    header = (ROOT / "templates" / "include" / "fp4.cuh").read_text()
    header = re.sub(r"#(pragma once|include \"common.cuh\")", "", header)
    functions = r"__device__ __forceinline__ \w+ (?:permute_bytes|load_shared_words|load_shared_byte)\(.*?\n}\n"
    header, count = re.subn(functions, "", header, flags=re.DOTALL)
    assert count == 4 and "asm" not in header
    directory: Path = tmp_path_factory.mktemp("fp4")
    (directory / "fp4.cpp").write_text(_SHIM + header + _MAIN)
    command = [compiler, "-O1", "-shared", "-fPIC", "-w", "-o", str(directory / "fp4.so"), str(directory / "fp4.cpp")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(directory / "fp4.so"))


def matrix_of(fragments: Tensor) -> Tensor:
    """64 x 128 bytes of the A registers of four MMAs, int32 [128, 16] (PTX ISA, wgmma: fragment of A, 8-bit types)."""
    out = torch.full((64, 128), 255, dtype=torch.uint8)
    data = fragments.view(torch.uint8).view(128, 4, 4, 4)
    for thread, step, register in itertools.product(range(128), range(4), range(4)):
        row = thread // 32 * 16 + thread % 32 // 4 + register % 2 * 8
        column = step * 32 + register // 2 * 16 + thread % 4 * 4
        out[row, column : column + 4] = data[thread, step, register]
    return out


def all_codes() -> Tensor:
    """Codes of 64 x 128 weights, of which each group of 32 has all twice, in turn."""
    place = torch.arange(128) + torch.arange(64)[:, None]
    return pack_nibbles((place % 16).to(torch.uint8))


@pytest.mark.parametrize("base", [0, 3, 100, 228])
def test_kernels_expand_all_codes_with_all_scales_of_the_window(library: ctypes.CDLL, base: int) -> None:
    place = torch.arange(64)[:, None] * 5 + torch.arange(4) * 7
    exponents = (base + place % 27).to(torch.uint8)
    exponents[:, 0] = base + 26
    packed = all_codes()
    data, units = fp4.pack(packed, exponents)
    assert (units > 0).all()
    fragments = torch.empty((128, 16), dtype=torch.int32)
    library.expand(ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(fragments.data_ptr()))
    values = matrix_of(fragments).view(torch.float8_e5m2).double() * units[:, None].double()
    assert torch.equal(values, fp4.dequantize_fp4(packed, exponents))


@pytest.mark.parametrize("window", [(0, 254), (13, 254), (100, 127), (110, 140)])
def test_kernels_scale_sums_where_scales_lie_farther_apart(library: ctypes.CDLL, window: tuple[int, int]) -> None:
    low, high = window
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(low, high + 1, (64, 4), generator=generator)
    exponents[:, 0], exponents[:, 1] = high, max(low, high - 241)
    exponents = exponents.clamp(min=high - 241).to(torch.uint8)
    packed = all_codes()
    data, units = fp4.pack(packed, exponents)
    assert (units < 0).all()
    fragments, scales = torch.empty((128, 16), dtype=torch.int32), torch.empty((128, 4, 2))
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (data, fragments, scales))
    library.expand_steps(*pointers)
    threads = torch.arange(64) // 16 * 32 + torch.arange(64) % 8 * 4
    of_rows = scales[threads, :, torch.arange(64) % 16 // 8]  # of each row's four groups
    codes = matrix_of(fragments).view(torch.float8_e5m2).double()
    values = codes * of_rows.double().repeat_interleave(32, 1) * units.abs()[:, None].double()
    assert torch.equal(values, fp4.dequantize_fp4(packed, exponents))


def test_kernels_scale_sums_over_16_of_nvfp4(library: ctypes.CDLL) -> None:
    place = torch.arange(64)[:, None] * 8 + torch.arange(8)
    scales = (1 + place % 0x7E).to(torch.uint8).view(torch.float8_e4m3fn)  # all but zero and NaN
    packed, units = all_codes(), torch.rand(64) + 0.5
    data, packed_units = fp4.pack_nvfp4(packed, scales, units)
    fragments, of_threads = torch.empty((128, 32), dtype=torch.int32), torch.empty((128, 2, 8))
    library.expand_halves_of(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (data, fragments, of_threads)))
    # Each part is one MMA, half of which is zeros.
    parts = [matrix_of(fragments.view(128, 8, 4)[:, half::2].reshape(128, 16)) for half in (0, 1)]
    codes = [part.view(torch.float8_e5m2).double().view(64, 4, 2, 16) for part in parts]
    assert codes[0][:, :, 1].count_nonzero() == 0 and codes[1][:, :, 0].count_nonzero() == 0
    threads = torch.arange(64) // 16 * 32 + torch.arange(64) % 8 * 4
    of_rows = of_threads[threads, torch.arange(64) % 16 // 8].double()
    values = (codes[0] + codes[1]).view(64, 128) * of_rows.repeat_interleave(16, 1) * packed_units[:, None].double()
    assert torch.equal(values, fp4.dequantize_nvfp4(packed, scales, units))
