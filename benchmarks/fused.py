"""Gate and up, SwiGLU and quantization of experts: one kernel of ours, or DeepGEMM's GEMM and a separate kernel.

The separate kernel is this module's: it reads the GEMM's BF16 once, 16 bytes a load, and writes FP8 and scales once.
Half a warp makes one group of 128 columns; rows of no group are skipped. ``benchmarks.grouped --cases fused`` races
the two.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any

import torch
from torch import Tensor

import jitgemm
from jitgemm.compiler import compile_source
from jitgemm.device import SM90A
from jitgemm.driver import Arguments, Launch, load_kernel
from jitgemm.families.base import KernelSpec
from jitgemm.plan import raw_stream
from jitgemm.reference.epilogue import swiglu
from jitgemm.render import KernelSource

THREADS = 256
GROUP = 128  # columns that share a scale
LANES = 16  # that make a group, 8 columns each

SOURCE = """
using uint32_t = unsigned int;
struct Params {
  const uint4* input;   // BF16 [groups, rows, 2 * half]: gate's columns, then up's
  uint2* output;        // E4M3 [groups, rows, half]
  float* scales;        // [groups, half / 128, stride]
  const int* counts;    // rows of each group
  int rows, half, stride, scale_groups;
};

__device__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000); }
__device__ float gated(float gate, float up) { return __fdividef(gate, 1.f + __expf(-gate)) * up; }
__device__ uint32_t pack(float a, float b) {
  unsigned short packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(b), "f"(a));
  return packed;
}

extern "C" __global__ void __launch_bounds__(256) swiglu_quantize(const __grid_constant__ Params p) {
  const int group = blockIdx.y, count = min(p.counts[group], p.rows);
  const int items = count * p.scale_groups;
  for (int item = (blockIdx.x * 256 + threadIdx.x) / 16; item - threadIdx.x / 16 % 2 < items; item += gridDim.x * 16) {
    const int row = min(item / p.scale_groups, count - 1), column = item % p.scale_groups * 128 + threadIdx.x % 16 * 8;
    const long long at = (long long)group * p.rows + row;
    const uint4 gate = p.input[(at * 2 * p.half + column) / 8], up = p.input[(at * 2 * p.half + p.half + column) / 8];
    const uint32_t gates[4] = {gate.x, gate.y, gate.z, gate.w}, ups[4] = {up.x, up.y, up.z, up.w};
    float values[8], amax = 1e-4f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = gated(low(gates[i]), low(ups[i])), values[2 * i + 1] = gated(high(gates[i]), high(ups[i]));
      amax = fmaxf(amax, fmaxf(fabsf(values[2 * i]), fabsf(values[2 * i + 1])));
    }
#pragma unroll
    for (int bit = 1; bit < 16; bit *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffff, amax, bit));
    const float scale = amax * (1.f / 448.f), inverse = __frcp_rn(scale);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= inverse;
    if (item >= items) continue;
    p.output[(at * p.half + column) / 8] = {pack(values[0], values[1]) | pack(values[2], values[3]) << 16,
                                            pack(values[4], values[5]) | pack(values[6], values[7]) << 16};
    if (threadIdx.x % 16 == 0) p.scales[((long long)group * p.scale_groups + column / 128) * p.stride + row] = scale;
  }
}
"""
_PARAMS = struct.Struct("<QQQQiiii")


@functools.cache
def image() -> bytes:
    """The kernel's machine code."""
    spec = KernelSpec.make("swiglu_quantize", SM90A.name, {})
    return compile_source(KernelSource("swiglu_quantize", SOURCE, {}), spec, "0" * 64).image


@functools.cache
def _kernel(device: int) -> tuple[Any, int]:
    return load_kernel(image(), "swiglu_quantize", 0, device)


class SwigluQuantize:
    """The separate kernel on tensors of one shape.

    Args:
        x: bf16 [groups, rows, 2h], h a multiple of 128: gate's columns, then up's.
        d: e4m3 [groups, rows, h] and fp32 scales, as ``empty_quantized`` makes them.
        counts: int32 [groups], rows of each.
        expected: rows of a group that are expected, for the grid.
    """

    def __init__(self, x: Tensor, d: tuple[Tensor, Tensor], counts: Tensor, expected: int) -> None:
        groups, rows, width = x.shape
        half = width // 2
        assert half % GROUP == 0
        assert x.is_contiguous()
        self._tensors = x, d, counts  # kept alive
        device = x.get_device()
        self._library, handle = _kernel(device)
        blocks = -(-expected * (half // GROUP) * LANES // THREADS)
        self._launch = Launch(handle, (blocks, groups, 1), THREADS, 0, device, False)
        self._arguments = Arguments(_PARAMS.size)
        addresses = (x.data_ptr(), d[0].data_ptr(), d[1].data_ptr(), counts.data_ptr())
        packed = _PARAMS.pack(*addresses, rows, half, d[1].stride(2), half // GROUP)
        ctypes.memmove(self._arguments.address, packed, len(packed))
        self._device = device

    def __call__(self) -> None:
        """Launch it on the current stream."""
        self._launch(self._arguments, raw_stream(self._device))


class Layer:
    """Experts' gate and up weights for both: interleaved for ours, stacked for the peer."""

    def __init__(self, b: Tensor, b_scales: Tensor) -> None:
        self.stacked = b, b_scales
        data, scales = jitgemm.interleave_gate_up(b.view(torch.uint8), b_scales)
        self.interleaved = data.view(b.dtype), scales


def check(d: tuple[Tensor, Tensor], product: Tensor, group: int, rows: int) -> None:
    """Compare a group's rows with SwiGLU of the exact product, gate's columns before up's.

    Raises:
        ArithmeticError: they are wrong.
    """
    gate, up = product.double().chunk(2, -1)
    expected = swiglu(gate, up)
    values, scales = d[0][group, :rows].float().double(), d[1][group, :rows].double()
    found = values * scales.repeat_interleave(GROUP, 1)[:, : values.shape[1]]
    error = float((found - expected).norm() / expected.norm())
    if not error < 0.04:  # E4M3 rounds to 3 bits: 0.026
        raise ArithmeticError(f"wrong result: Frobenius {error:.3g}")
