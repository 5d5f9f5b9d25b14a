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

// Two as they lie in memory.
template <typename T> __device__ __forceinline__ uint32_t narrow(float low, float high);
template <> __device__ __forceinline__ uint32_t narrow<Bf16>(float low, float high) { return floats_to_bf16(low, high); }
template <> __device__ __forceinline__ uint32_t narrow<Fp16>(float low, float high) { return floats_to_halves(low, high); }

// -- Magnitudes, as the bits of an fp32: unsigned comparison orders them, with Inf and then NaN above all numbers.

__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }
__device__ __forceinline__ uint32_t larger(uint32_t x, uint32_t y) { return x > y ? x : y; }

// -- Scales.

// x / y as IEEE 754 rounds it, where `inverse` is 1 / y, in few instructions and without a branch: two corrections by what is left,
// of which the first leaves at most the last bit wrong (Markstein, IBM J. Res. Dev. 34, 1990). What is left has its sign turned,
// and so does not change that of a zero. It underflows where x or the quotient is below 2^-100, and last bits may be wrong then.
__device__ __forceinline__ float quotient(float x, float y, float inverse) {
  const float q0 = __fmul_rn(x, inverse);
  const float q1 = fmaf(-inverse, fmaf(y, q0, -x), q0);
  return fmaf(-inverse, fmaf(y, q1, -x), q1);
}

// 1 / x as IEEE 754 rounds it, for x from 2^-125 to 2^125, Inf and NaN: what __frcp_rn does, but for the branch to what is left.
__device__ __forceinline__ float inverse_of(float x, bool finite) {
  const float r = reciprocal_fast(x);
  return finite ? fmaf(-r, fmaf(x, r, -1.f), r) : r;
}

// The exponent field of the least power of two that is not below s, which is normal; 254 if s is Inf or NaN.
__device__ __forceinline__ uint32_t ceil_exponent(float s) {
  return min_of((__float_as_uint(s) + 0x7fffff) >> 23, 254u);
}

struct Scale {
  float value;    // what a code is multiplied with
  float divisor;  // FP32: what a value is divided by: `value`, or 0 beside an `inverse` of 0 or NaN if that is Inf or NaN
  float inverse;  // what a value is multiplied with; FP32: 1 / `value`
  uint32_t code;  // of one-byte scales
  bool finite;    // whether the group holds neither NaN nor Inf
  bool blank;     // all codes are 0, for the scale is 0, or is Inf or NaN and shows what the format has no codes for
};

// The scale of a group whose largest magnitude has these bits.
template <Format FORMAT, ScaleKind KIND>
__device__ __forceinline__ Scale scale_of(uint32_t amax_bits) {
  const float amax = __uint_as_float(amax_bits);
  Scale scale;
  scale.finite = amax_bits < INFINITY_BITS;
  scale.blank = FORMAT != E4M3 && !scale.finite;
  scale.code = 0;
  scale.inverse = 0.f;
  if constexpr (KIND == FP32_INVERSE) {
    scale.inverse = __fdiv_rn(127.f, __uint_as_float(larger(amax_bits, __float_as_uint(1e-4f))));
    scale.value = __frcp_rn(scale.inverse);
  } else if constexpr (FORMAT == INT8) {
    const float s = quotient(amax, 127.f, 1.f / 127.f);
    scale.value = scale.finite ? fmaxf(s, 1e-12f) : amax;
  } else if constexpr (KIND == UE4M3) {
    const float s = quotient(__uint_as_float(larger(amax_bits, __float_as_uint(1e-4f))), 6.f, 1.f / 6.f);
    scale.code = scale.finite ? float_to_e4m3(s) : 0x7f;
    scale.value = e4m3_to_float(scale.code);
    scale.blank |= scale.code == 0;
    scale.inverse = inverse_of(scale.value, true);  // of a NaN, and of the 0 that is blank, no matter what
  } else {
    constexpr float SMALLEST = FORMAT == E4M3 ? 1e-4f : 0x1.8p-124f;  // 6 * 2^-126
    constexpr float RECIPROCAL = 1.f / (FORMAT == E4M3 ? 448.f : 6.f);
    const float s = __fmul_rn(__uint_as_float(larger(amax_bits, __float_as_uint(SMALLEST))), RECIPROCAL);
    if constexpr (KIND == POW2 || KIND == UE8M0) {
      const uint32_t exponent = ceil_exponent(s);
      scale.code = scale.blank ? 255 : exponent;
      scale.value = __uint_as_float(scale.blank ? 0x7fffffffu : exponent << 23);
      scale.inverse = __uint_as_float(larger((254 - exponent) << 23, 0x00400000));  // exact, 2^-127 too
    } else {
      scale.value = s;
      if constexpr (KIND == FP32_RECIPROCAL) scale.inverse = inverse_of(s, scale.finite);
    }
  }
  if constexpr (KIND == FP32) scale.inverse = inverse_of(scale.value, scale.finite);
  scale.divisor = scale.finite ? scale.value : 0.f;
  return scale;
}

// -- Codes.

// E2M1 has the magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6: steps of 1/2 to 2, of 1 to 4, of 2 to 6. As t grows from 0 to 6, its code is
// therefore twice the least of t, 1 + t / 2 and 2 + t / 4, rounded: the low bits of these sums, each of which is rounded once. Ties go
// away from zero where quarters are rounded down and those that are odd then up, toward zero the other way round.
template <Ties TIES> constexpr float E2M1_BIAS = TIES == EVEN ? 0x1.8p22f : 0x1.8p21f;       // has a last place of 1/2, 1/4
template <Ties TIES> constexpr uint32_t E2M1_BIAS_BITS = TIES == EVEN ? 0x4ac00000 : 0x4a400000 / 2;  // what codes are added to

template <Ties TIES>
__device__ __forceinline__ uint32_t biased_e2m1(float t) {
  constexpr float BIAS = E2M1_BIAS<TIES>;
  const auto least = [](float x, float y, float z) {
    return min_of(min_of(__float_as_uint(x), __float_as_uint(y)), __float_as_uint(z));
  };
  if constexpr (TIES == EVEN) return least(__fadd_rn(t, BIAS), __fmaf_rn(t, .5f, BIAS + 1), __fmaf_rn(t, .25f, BIAS + 2));
  else if constexpr (TIES == AWAY) return (least(__fadd_rd(t, BIAS), __fmaf_rd(t, .5f, BIAS + 1), __fmaf_rd(t, .25f, BIAS + 2)) + 1) / 2;
  else return least(__fadd_ru(t, BIAS), __fmaf_ru(t, .5f, BIAS + 1), __fmaf_ru(t, .25f, BIAS + 2)) / 2;
}

__device__ __forceinline__ float e2m1_to_float(uint32_t code) {
  const uint32_t exponent = code >> 1 & 3, mantissa = code & 1;
  const float magnitude = exponent ? __uint_as_float((exponent + 126) << 23 | mantissa << 22) : .5f * mantissa;
  return code & 8 ? -magnitude : magnitude;
}

// 8 of them, the first in the lowest bits. Signs of zeros: EVEN keeps them, AWAY those of numbers that became zero, ZERO none.
template <Ties TIES, bool SATURATE>
__device__ __forceinline__ uint32_t floats_to_e2m1(const float* x) {
  uint32_t magnitudes = 0, signs = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    magnitudes = magnitudes * 16 + biased_e2m1<TIES>(SATURATE ? fminf(fabsf(x[i]), 6.f) : fabsf(x[i]));
    signs = __funnelshift_l(TIES == AWAY && x[i] == 0.f ? 0 : __float_as_uint(x[i]), signs, 4);
  }
  magnitudes -= 0x11111111 * E2M1_BIAS_BITS<TIES>;
  if constexpr (TIES == ZERO) signs &= magnitudes + 0x77777777;  // carries into the sign bit unless the code is 0
  return magnitudes | (signs & 0x88888888);
}

// The codes of values, the first in the lowest bits. Nibbles of E2M1 and bytes of the others.
template <Format FORMAT, int COUNT>
struct Codes {
  static constexpr int BITS = FORMAT == E2M1 ? 4 : 8, WORDS = COUNT * BITS / 32, BYTES = 4 * WORDS;
  uint32_t words[WORDS];

  // Values share a scale, or have one each.
  template <ScaleKind KIND, Ties TIES, int SCALES>
  __device__ __forceinline__ void encode(const float (&x)[COUNT], const Scale (&scales)[SCALES]) {
    static_assert(SCALES == 1 || (SCALES == COUNT && FORMAT == E4M3));
    constexpr int NEXT = SCALES / COUNT;  // from the scale of a value to that of the next
    float y[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const Scale& scale = scales[i * NEXT];
      if (KIND == FP32) y[i] = quotient(x[i], scale.divisor, scale.inverse);
      // E4M3 has no Inf. Where Inf is not multiplied with 0 anyway, it becomes NaN by this; zeros keep their sign.
      else if (FORMAT == E4M3 && (KIND == POW2 || KIND == UE8M0)) y[i] = fmaf(x[i], scale.inverse, __fmul_rn(x[i], 0.f));
      else y[i] = __fmul_rn(x[i], scale.inverse);
    }
    if constexpr (FORMAT == E4M3) {
#pragma unroll
      for (int i = 0; i < WORDS; ++i) words[i] = floats_to_e4m3(y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]);
    } else if constexpr (FORMAT == INT8) {
      // Scales leave no more than 127. Adding 3 * 2^22 leaves the nearest integer in the low byte.
      const auto bits = [&](int i) { return __float_as_uint(__fadd_rn(y[i], 0x1.8p23f)); };
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        const uint32_t low = __byte_perm(bits(4 * i), bits(4 * i + 1), 0x40), high = __byte_perm(bits(4 * i + 2), bits(4 * i + 3), 0x40);
        words[i] = scales[0].blank ? 0 : __byte_perm(low, high, 0x5410);
      }
    } else {
      constexpr bool SATURATE = KIND == UE4M3;  // powers of two leave no more than 6
#pragma unroll
      for (int i = 0; i < WORDS; ++i) words[i] = scales[0].blank ? 0 : floats_to_e2m1<TIES, SATURATE>(y + 8 * i);
    }
  }

  // What the codes stand for, but for the scale.
  __device__ __forceinline__ void decode(float (&x)[COUNT]) const {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      if constexpr (FORMAT == E4M3) {
        const uint32_t halves = e4m3_to_halves(words[i / 4] >> i % 4 * 8);
        x[i] = half_to_float(uint16_t(halves)), x[i + 1] = half_to_float(uint16_t(halves >> 16));
      } else if constexpr (FORMAT == INT8) {
        x[i] = float(int(words[i / 4] << 24 - i % 4 * 8) >> 24), x[i + 1] = float(int(words[i / 4] << 16 - i % 4 * 8) >> 24);
      } else {
        x[i] = e2m1_to_float(words[i / 8] >> i % 8 * 4 & 0xf), x[i + 1] = e2m1_to_float(words[i / 8] >> i % 8 * 4 + 4 & 0xf);
      }
    }
  }

  // The first `count` of them (an even number of E2M1). ALIGNED: all or none, to a multiple of as many bytes as there are, or of 16.
  template <bool ALIGNED>
  __device__ __forceinline__ void store(uint8_t* target, int count) const {
    if constexpr (ALIGNED) {
      if (count <= 0) return;
      if constexpr (WORDS == 4) *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
      else if constexpr (WORDS == 2) *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
      else *reinterpret_cast<uint32_t*>(target) = words[0];
    } else {
      const int bytes = count * BITS / 8;
#pragma unroll
      for (int i = 0; i < BYTES; ++i) {
        if (i < bytes) target[i] = uint8_t(words[i / 4] >> i % 4 * 8);
      }
    }
  }
  // Reverse that; zeros behind the first `count`.
  template <bool ALIGNED>
  __device__ __forceinline__ void load(const uint8_t* source, int count) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = 0;
    if constexpr (ALIGNED) {
      if (count <= 0) return;
      if constexpr (WORDS == 2) {
        const uint2 both = *reinterpret_cast<const uint2*>(source);
        words[0] = both.x, words[1] = both.y;
      } else {
        words[0] = *reinterpret_cast<const uint32_t*>(source);
      }
    } else {
      const int bytes = count * BITS / 8;
#pragma unroll
      for (int i = 0; i < BYTES; ++i) {
        if (i < bytes) words[i / 4] |= uint32_t(source[i]) << i % 4 * 8;
      }
    }
  }
};
