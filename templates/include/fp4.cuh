// FP4 weights (E2M1 codes with a scale for each 32 or 16 of K) as E5M2 fragments of the MMA's A operand, which stay in registers.
// docs/fp4.md derives what is used here; jitgemm/reference/fp4.py packs it.
//
// E5M2 holds every E2M1 value times 2^s exactly for -13 <= s <= 13, and its byte then is that for s = 0 plus 4 s, zero's excepted.
// So the eight magnitudes times a group's scale are two words, from which a byte permute looks four codes up at a time. Scales of 16
// (NVFP4) are no powers of two: codes are expanded without them, and sums over 16 scaled.
#pragma once
#include "common.cuh"

constexpr int PACKED_TILE_ROWS = 64;                   // weights of one warpgroup-wide MMA ...
constexpr int PACKED_CODES_BYTES = 64 * 128 / 2;       // ... and 128 of K: codes, behind which are the groups' scales, a byte each
constexpr int PACKED_VECTOR_BYTES = WARPGROUP * 16;    // a thread's codes of two MMAs

constexpr uint32_t UNSCALED = 114;  // exponent for which a code expands to its own value

// Bytes of {high, low}, each chosen by the low 3 bits of a nibble.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t nibbles) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(nibbles));
  return bytes;
}

// 8 codes to 8 bytes. The low 3 bits of nibbles 0-3 are the magnitudes of `low`, those of 4-7 of `high`; signs are where a byte of
// `low` has its own, and 4 bits below for `high`.
__device__ __forceinline__ void expand_codes(uint32_t codes, uint32_t exponent, uint32_t& low, uint32_t& high) {
  const uint32_t small = exponent * 0x04040400u + (0x3e3c3800u - UNSCALED * 0x04040400u);  // 1.5, 1, 0.5, 0
  const uint32_t large = exponent * 0x04040404u + (0x46444240u - UNSCALED * 0x04040404u);  // 6, 4, 3, 2
  const uint32_t magnitudes = codes & 0x77777777u;
  low = permute_bytes(small, large, magnitudes) | (codes & 0x80808080u);
  high = permute_bytes(small, large, magnitudes >> 16) | (codes << 4 & 0x80808080u);
}

__device__ __forceinline__ void load_shared_words(uint32_t address, uint32_t (&words)[4]) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(address));
}
__device__ __forceinline__ void load_shared_words(uint32_t address, uint32_t (&words)[2]) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address));
}

__device__ __forceinline__ uint32_t load_shared_byte(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

// Where this thread's exponents are in a packed tile: of its upper row's four groups and then of its lower row's.
__device__ __forceinline__ uint32_t packed_exponents(uint32_t tile) {
  return tile + PACKED_CODES_BYTES + threadIdx.x % WARPGROUP / 4 * 8;
}

// This thread's part of a tile of 64 x 128 weights, with their scales: A's registers of four MMAs.
__device__ __forceinline__ void expand_tile(uint32_t tile, uint32_t (&fragments)[16]) {
  uint32_t exponents[2];
  load_shared_words(packed_exponents(tile), exponents);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t words[4];
    load_shared_words(tile + pair * PACKED_VECTOR_BYTES + threadIdx.x % WARPGROUP * 16, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // the upper row's codes of an MMA, the lower row's, the same of the next MMA
      const int mma = pair * 2 + i / 2, row = i % 2;
      const uint32_t exponent = permute_bytes(exponents[row], 0, 0x4440 + mma);
      expand_codes(words[i], exponent, fragments[mma * 4 + row], fragments[mma * 4 + row + 2]);
    }
  }
}

// The same for one MMA, without scales, which come apart from them: of the upper row and of the lower.
struct UnscaledStep {
  uint32_t fragments[4];
  float upper, lower;
};
__device__ __forceinline__ UnscaledStep expand_step(uint32_t tile, int step) {
  UnscaledStep out;
  uint32_t words[2];
  load_shared_words(tile + step / 2 * PACKED_VECTOR_BYTES + threadIdx.x % WARPGROUP * 16 + step % 2 * 8, words);
#pragma unroll
  for (int row = 0; row < 2; ++row) expand_codes(words[row], UNSCALED, out.fragments[row], out.fragments[row + 2]);
  const auto scale = [&](int row) {
    return __uint_as_float((load_shared_byte(packed_exponents(tile) + row * 4 + step) + (127 - UNSCALED)) << 23);
  };
  out.upper = scale(0), out.lower = scale(1);
  return out;
}

// With scales of 16: a part of K is half an MMA, whose other half is zeros.
constexpr int HALVES_OF_TILE = 8;

// This thread's part of a tile's codes, without scales: A's registers of an MMA for each group of 16.
__device__ __forceinline__ void expand_halves(uint32_t tile, uint32_t (&fragments)[4 * HALVES_OF_TILE]) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t words[4];
    load_shared_words(tile + pair * PACKED_VECTOR_BYTES + threadIdx.x % WARPGROUP * 16, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t* first = fragments + (pair * 2 + i / 2) * 8;
      const int row = i % 2;
      expand_codes(words[i], UNSCALED, first[row], first[row + 6]);
      first[row + 2] = first[row + 4] = 0;
    }
  }
}

// Scales of this thread's two rows: of 16 of K each, five bits of exponent with bias 9 and three of mantissa (all UE4M3 but zero and NaN).
struct HalfScales {
  uint32_t words[4];  // eight of the upper row, eight of the lower

  __device__ __forceinline__ explicit HalfScales(uint32_t tile) {
    load_shared_words(tile + PACKED_CODES_BYTES + threadIdx.x % WARPGROUP / 4 * 16, words);
  }
  __device__ __forceinline__ float at(int row, int part) const {
    const uint32_t scale = permute_bytes(words[row * 2 + part / 4], 0, 0x4440 + part % 4);
    return __uint_as_float((scale << 20) + ((127u - 9u) << 23));
  }
};
