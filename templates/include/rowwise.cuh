// The parts that row-wise kernels and casts of tiles are made of: chunks of 8 values and their codes in and out, the largest
// of some lanes, sums over a row.
#pragma once
#include "formats.cuh"

// 8 values as they lie in memory.
template <typename T>
struct Chunk {
  static constexpr int WORDS = CHUNK * sizeof(T) / 4;
  uint32_t words[WORDS];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = 0;
  }
  __device__ __forceinline__ float at(int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
    else return widen(T{uint16_t(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffff)});
  }
  __device__ __forceinline__ void get(float (&v)[CHUNK]) const {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) v[i] = at(i);
  }
  __device__ __forceinline__ void set(const float (&v)[CHUNK]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) words[i] = __float_as_uint(v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < CHUNK; i += 2) words[i / 2] = narrow<T>(v[i]).bits | uint32_t(narrow<T>(v[i + 1]).bits) << 16;
    }
  }

  // The first `count` values at `source`, zeros behind them. ALIGNED: 8 of them, or none, at a multiple of 16 bytes.
  template <bool ALIGNED>
  __device__ __forceinline__ void load(const T* source, int count) {
    clear();
    if constexpr (ALIGNED) {
      if (count > 0) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
          const uint4 quad = *reinterpret_cast<const uint4*>(reinterpret_cast<const uint32_t*>(source) + i);
          words[i] = quad.x, words[i + 1] = quad.y, words[i + 2] = quad.z, words[i + 3] = quad.w;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        if (i >= count) continue;
        if constexpr (sizeof(T) == 4) words[i] = __float_as_uint(source[i]);
        else words[i / 2] |= uint32_t(source[i].bits) << i % 2 * 16;
      }
    }
  }
  template <bool ALIGNED>
  __device__ __forceinline__ void store(T* target, int count) const {
    if constexpr (ALIGNED) {
      if (count > 0) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
          *reinterpret_cast<uint4*>(reinterpret_cast<uint32_t*>(target) + i) =
              make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        if (i >= count) continue;
        if constexpr (sizeof(T) == 4) target[i] = __uint_as_float(words[i]);
        else target[i].bits = uint16_t(words[i / 2] >> i % 2 * 16);
      }
    }
  }
};

// Codes of a chunk, of which the first `count` exist (an even number of E2M1), to `target`.
template <Format FORMAT, bool ALIGNED>
__device__ __forceinline__ void store_codes(uint8_t* target, const uint32_t (&words)[2], int count) {
  if constexpr (ALIGNED) {
    if (count <= 0) return;
    if constexpr (FORMAT == E2M1) *reinterpret_cast<uint32_t*>(target) = words[0];
    else *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
  } else {
    const int bytes = FORMAT == E2M1 ? count / 2 : count;
#pragma unroll
    for (int i = 0; i < (FORMAT == E2M1 ? CHUNK / 2 : CHUNK); ++i) {
      if (i < bytes) target[i] = uint8_t(words[i / 4] >> i % 4 * 8);
    }
  }
}

// Reverse store_codes, of a byte each; zeros behind the first `count`.
template <bool ALIGNED>
__device__ __forceinline__ void load_codes(const uint8_t* source, uint32_t (&words)[2], int count) {
  words[0] = words[1] = 0;
  if constexpr (ALIGNED) {
    if (count <= 0) return;
    const uint2 both = *reinterpret_cast<const uint2*>(source);
    words[0] = both.x, words[1] = both.y;
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      if (i < count) words[i / 4] |= uint32_t(source[i]) << i % 4 * 8;
    }
  }
}

// The largest of the magnitudes that LANES neighbouring lanes hold.
template <int LANES>
__device__ __forceinline__ uint32_t largest_of_lanes(uint32_t amax) {
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) amax = larger(amax, __shfl_xor_sync(0xffffffff, amax, distance));
  return amax;
}

// The largest of the magnitudes that the threads of a row hold.
template <int THREADS_PER_ROW, int THREADS>
__device__ __forceinline__ uint32_t largest_of_row(uint32_t amax) {
  constexpr int WARPS = THREADS_PER_ROW / WARP;  // of a row
  amax = largest_of_lanes<THREADS_PER_ROW < WARP ? THREADS_PER_ROW : WARP>(amax);
  if constexpr (WARPS > 1) {
    __shared__ uint32_t of_warps[THREADS / WARP];
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = amax;
    __syncthreads();
    const uint32_t* row = of_warps + threadIdx.x / THREADS_PER_ROW * WARPS;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) amax = larger(amax, row[i]);
  }
  return amax;
}

// The sum of a binary tree over COUNT values (the next power of two, with zeros), highest bit of the index first.
template <int COUNT>
__device__ __forceinline__ float sum_of_tree(const float (&values)[COUNT]) {
  if constexpr (COUNT == 1) {
    return values[0];
  } else {
    constexpr int HALF = COUNT > 16 ? 16 : COUNT > 8 ? 8 : COUNT > 4 ? 4 : COUNT > 2 ? 2 : 1;
    static_assert(COUNT <= 32);
    float halved[HALF];
#pragma unroll
    for (int i = 0; i < HALF; ++i) halved[i] = i + HALF < COUNT ? __fadd_rn(values[i], values[i + HALF]) : values[i];
    return sum_of_tree<HALF>(halved);
  }
}

// The sum over a row of THREADS_PER_ROW x COUNT partial sums, which chunk number i * THREADS_PER_ROW + thread gave: that
// of a tree over the chunk numbers, so that its bits do not depend on the number of threads.
template <int THREADS_PER_ROW, int COUNT, int THREADS>
__device__ __forceinline__ float sum_of_row(const float (&partial)[COUNT]) {
  float sum = sum_of_tree<COUNT>(partial);
  constexpr int WARPS = THREADS_PER_ROW / WARP;  // of a row
  if constexpr (WARPS > 1) {
    __shared__ float sums[THREADS];
    sums[threadIdx.x] = sum;
    __syncthreads();
    const float* row = sums + threadIdx.x / THREADS_PER_ROW * THREADS_PER_ROW + threadIdx.x % WARP;
    float of_warps[WARPS];
#pragma unroll
    for (int i = 0; i < WARPS; ++i) of_warps[i] = row[i * WARP];
    sum = sum_of_tree<WARPS>(of_warps);
  }
  constexpr int LANES = THREADS_PER_ROW < WARP ? THREADS_PER_ROW : WARP;
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffff, sum, distance));
  return sum;
}
