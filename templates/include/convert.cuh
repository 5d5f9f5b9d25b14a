// Conversions that are single instructions of sm_89 and later. Those of pairs, first number in the low half, have four times
// the rate of those of one number.
#pragma once
#include "common.cuh"

__device__ __forceinline__ uint32_t floats_to_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t floats_to_halves(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// Saturates to 448; a NaN becomes 0x7f.
__device__ __forceinline__ uint32_t float_to_e4m3(float x) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.f), "f"(x));
  return pair & 0xff;
}
// Four, the first in the lowest byte.
__device__ __forceinline__ uint32_t floats_to_e4m3(float a, float b, float c, float d) {
  uint32_t codes;
  asm("{\n .reg .b16 low, high;\n cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      " mov.b32 %0, {low, high};\n}"
      : "=r"(codes) : "f"(a), "f"(b), "f"(c), "f"(d));
  return codes;
}
__device__ __forceinline__ uint32_t e4m3_to_halves(uint32_t pair) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(pair)));
  return halves;
}
__device__ __forceinline__ float e4m3_to_float(uint32_t code) { return half_to_float(uint16_t(e4m3_to_halves(code))); }

// 2^x and 1 / x, this within one unit in the last place. Subnormal numbers are taken and given as 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger of either two unsigned halves.
__device__ __forceinline__ uint32_t larger_halves(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("max.u16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// As fminf and fmaxf, but a NaN is kept.
__device__ __forceinline__ float min_or_nan(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
