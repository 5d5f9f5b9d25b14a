// Number formats: loads and stores of values, and encoders that round to nearest as the formats' definitions say.
//
// Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3), OCP Microscaling Formats 1.0 (E2M1, UE8M0); UE4M3 is E4M3
// without its sign. Every arithmetic step that decides bits is written so that the compiler cannot fuse it.
#pragma once
#include "common.cuh"
#include "convert.cuh"

enum Format { VALUES, E4M3, INT8, E2M1 };
// FP32: x / s. FP32_RECIPROCAL: x * (1 / s). POW2: fp32 powers of two. UE8M0: their exponents, one byte. UE4M3: one byte.
// FP32_INVERSE: x * i with i = 127 / amax, and s = 1 / i.
enum ScaleKind { FP32, FP32_RECIPROCAL, POW2, UE8M0, UE4M3, FP32_INVERSE };
enum Ties { EVEN, AWAY, ZERO };  // where E2M1 rounds a tie: to the even code, away from zero, toward zero

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

constexpr uint32_t INFINITY_BITS = 0x7f800000;

// -- Values.

template <typename T> __device__ __forceinline__ float widen(T x);
template <> __device__ __forceinline__ float widen(float x) { return x; }
template <> __device__ __forceinline__ float widen(Bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
template <> __device__ __forceinline__ float widen(Fp16 x) { return half_to_float(x.bits); }

template <typename T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow(float x) { return x; }
template <> __device__ __forceinline__ Bf16 narrow(float x) { return {float_to_bf16(x)}; }
template <> __device__ __forceinline__ Fp16 narrow(float x) { return {float_to_half(x)}; }

// -- Magnitudes, as the bits of an fp32: unsigned comparison orders them, with Inf and then NaN above all numbers.

__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }
__device__ __forceinline__ uint32_t larger(uint32_t x, uint32_t y) { return x > y ? x : y; }

// -- Scales.

// The exponent field of the least power of two that is not below s >= 0: 1 to 254.
__device__ __forceinline__ uint32_t ceil_exponent(float s) {
  const uint32_t bits = __float_as_uint(s);
  const uint32_t exponent = (bits >> 23) + ((bits & 0x7fffff) != 0);
  return exponent < 1 ? 1 : exponent > 254 ? 254 : exponent;
}

struct Scale {
  float value;    // what a code is multiplied with
  float inverse;  // what a value is multiplied with; FP32: 1 / `value`, by which divided_by divides
  uint32_t code;  // of one-byte scales
  bool finite;    // whether the group holds neither NaN nor Inf
  bool blank;     // all codes are 0, for the scale is 0, or is NaN and shows what E2M1 has no codes for
};

// The scale of a group whose largest magnitude has these bits.
template <Format FORMAT, ScaleKind KIND>
__device__ __forceinline__ Scale scale_of(uint32_t amax_bits) {
  Scale scale;
  scale.finite = amax_bits < INFINITY_BITS;
  scale.blank = FORMAT == E2M1 && !scale.finite;
  scale.code = 0;
  scale.inverse = 0.f;
  if constexpr (KIND == FP32_INVERSE) {
    scale.inverse = __fdiv_rn(127.f, __uint_as_float(larger(amax_bits, __float_as_uint(1e-4f))));
    scale.value = __fdiv_rn(1.f, scale.inverse);
  } else if constexpr (FORMAT == INT8) {
    const float s = __fdiv_rn(__uint_as_float(amax_bits), 127.f);
    scale.value = s < 1e-12f ? 1e-12f : s;  // a NaN stays
  } else if constexpr (KIND == UE4M3) {
    const float amax = __uint_as_float(larger(amax_bits, __float_as_uint(1e-4f)));
    scale.code = scale.finite ? float_to_e4m3(__fdiv_rn(amax, 6.f)) : 0x7f;
    scale.value = e4m3_to_float(scale.code);
    scale.inverse = scale.code ? __fdiv_rn(1.f, scale.value) : 0.f;
    scale.blank |= scale.code == 0;
  } else {
    constexpr float SMALLEST = FORMAT == E4M3 ? 1e-4f : 0x1.8p-124f;  // 6 * 2^-126
    constexpr float RECIPROCAL = 1.f / (FORMAT == E4M3 ? 448.f : 6.f);
    const float s = __fmul_rn(__uint_as_float(larger(amax_bits, __float_as_uint(SMALLEST))), RECIPROCAL);
    if constexpr (KIND == POW2 || KIND == UE8M0) {
      const uint32_t exponent = ceil_exponent(s);
      scale.code = scale.blank ? 255 : exponent;
      scale.value = __uint_as_float(scale.blank ? 0x7fffffffu : exponent << 23);
      scale.inverse = __uint_as_float(exponent == 254 ? 0x00400000 : (254 - exponent) << 23);  // exact
    } else {
      scale.value = s;
      if constexpr (KIND == FP32_RECIPROCAL) scale.inverse = __fdiv_rn(1.f, s);
    }
  }
  if constexpr (KIND == FP32) scale.inverse = __fdiv_rn(1.f, scale.value);
  return scale;
}

// -- Codes.

// E2M1 has the magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6: steps of 1/2 to 2, of 1 to 4, of 2 to 6.
template <Ties TIES>
__device__ __forceinline__ uint32_t e2m1_code(float x) {
  const float t = fminf(fabsf(x), 6.f);
  const uint32_t sign = __float_as_uint(x) >> 28 & 8;
  if constexpr (TIES == EVEN) {
    // Adding 3 * 2^22 steps leaves t / step in the low bits, rounded to nearest even; so are the codes then.
    const float magic = t < 2.f ? 0x1.8p22f : t < 4.f ? 0x1.8p23f : 0x1.8p24f;
    const uint32_t offset = t < 2.f ? 0 : t < 4.f ? 2 : 4;
    return (__float_as_uint(__fadd_rn(t, magic)) & 7) + offset | sign;
  } else if constexpr (TIES == AWAY) {
    const uint32_t code = (t >= .25f) + (t >= .75f) + (t >= 1.25f) + (t >= 1.75f) + (t >= 2.5f) + (t >= 3.5f) + (t >= 5.f);
    return code | (x < 0.f ? 8 : 0);
  } else {
    const uint32_t code = (t > .25f) + (t > .75f) + (t > 1.25f) + (t > 1.75f) + (t > 2.5f) + (t > 3.5f) + (t > 5.f);
    return code ? code | sign : 0;
  }
}

__device__ __forceinline__ float e2m1_to_float(uint32_t code) {
  const uint32_t exponent = code >> 1 & 3, mantissa = code & 1;
  const float magnitude = exponent ? __uint_as_float((exponent + 126) << 23 | mantissa << 22) : .5f * mantissa;
  return code & 8 ? -magnitude : magnitude;
}

// x / scale.value as IEEE 754 rounds it, in fewer instructions and without a branch: two corrections by what is left, of which the first
// leaves at most the last bit wrong (Markstein, IBM J. Res. Dev. 34, 1990). Neither is made where the scale is Inf or NaN, or of
// a zero, whose sign they would lose. What is left underflows for quotients below 2^-70 alone, all of whose codes are 0.
__device__ __forceinline__ float divided_by(float x, const Scale& scale) {
  const float q0 = __fmul_rn(x, scale.inverse);
  const float q1 = fmaf(fmaf(-scale.value, q0, x), scale.inverse, q0);
  const float q2 = fmaf(fmaf(-scale.value, q1, x), scale.inverse, q1);
  return scale.finite && q0 != 0.f ? q2 : q0;
}

constexpr int CHUNK = 8;  // values that a thread handles together

// The codes of 8 values, first value in the lowest bits: 8 bytes, or 4 of E2M1. They share a scale, or have one each.
template <Format FORMAT, ScaleKind KIND, Ties TIES, int COUNT>
__device__ __forceinline__ void encode(const float (&x)[CHUNK], const Scale (&scales)[COUNT], uint32_t (&words)[2]) {
  static_assert(COUNT == 1 || COUNT == CHUNK);
  constexpr int NEXT = COUNT / CHUNK;  // from the scale of a value to that of the next
  float y[CHUNK];
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) {
    const Scale& scale = scales[i * NEXT];
    y[i] = KIND == FP32 ? divided_by(x[i], scale) : __fmul_rn(x[i], scale.inverse);
    if (FORMAT == E4M3 && !scale.finite && magnitude(y[i]) == INFINITY_BITS) y[i] = __uint_as_float(0x7fffffff);  // no Inf
  }
  words[0] = words[1] = 0;
  if constexpr (FORMAT == E4M3) {
#pragma unroll
    for (int i = 0; i < CHUNK; i += 2) words[i / 4] |= floats_to_e4m3(y[i], y[i + 1]) << i % 4 * 8;
  } else if constexpr (FORMAT == INT8) {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      const int code = __float2int_rn(y[i]);  // a NaN becomes 0; the scale shows it
      words[i / 4] |= (uint32_t(code < -127 ? -127 : code > 127 ? 127 : code) & 0xff) << i % 4 * 8;
    }
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) words[0] |= (scales[i * NEXT].blank ? 0 : e2m1_code<TIES>(y[i])) << i * 4;
  }
}

// The i-th code among those.
template <Format FORMAT>
__device__ __forceinline__ uint32_t code_at(const uint32_t (&words)[2], int i) {
  return FORMAT == E2M1 ? words[0] >> i * 4 & 0xf : words[i / 4] >> i % 4 * 8 & 0xff;
}

template <Format FORMAT>
__device__ __forceinline__ float decode(uint32_t code) {
  if constexpr (FORMAT == E4M3) return e4m3_to_float(code);
  if constexpr (FORMAT == INT8) return float(int(code << 24) >> 24);
  return e2m1_to_float(code);
}
