// The parts that row-wise kernels and casts of tiles are made of: chunks of values in and out, the largest of some lanes, sums over
// a row.
#pragma once
#include "formats.cuh"

// COUNT values as they lie in memory.
template <typename T, int COUNT>
struct Chunk {
  static constexpr int WORDS = COUNT * sizeof(T) / 4;
  uint32_t words[WORDS];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = 0;
  }
  __device__ __forceinline__ float at(int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
    else return widen(T{uint16_t(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffff)});
  }
  __device__ __forceinline__ void get(float (&v)[COUNT]) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] = at(i);
  }
  __device__ __forceinline__ void set(const float (&v)[COUNT]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) words[i] = __float_as_uint(v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; i += 2) words[i / 2] = narrow<T>(v[i], v[i + 1]);
    }
  }
  // Each number the larger of two magnitudes: its own, which is one already, and another's. Those of 16 bits are ordered as they
  // are, two at a time.
  __device__ __forceinline__ void raise(const Chunk& other) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      if constexpr (sizeof(T) == 4) words[i] = larger(words[i], other.words[i] & 0x7fffffff);
      else words[i] = larger_halves(words[i], other.words[i] & 0x7fff7fff);
    }
  }
  __device__ __forceinline__ Chunk of_lane_xor(int distance) const {
    Chunk other;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) other.words[i] = __shfl_xor_sync(0xffffffff, words[i], distance);
    return other;
  }
  // The largest magnitude.
  __device__ __forceinline__ uint32_t largest() const {
    if constexpr (sizeof(T) == 4) {
      uint32_t amax = 0;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) amax = larger(amax, words[i] & 0x7fffffff);
      return amax;
    } else {
      uint32_t pair = words[0] & 0x7fff7fff;
#pragma unroll
      for (int i = 1; i < WORDS; ++i) pair = larger_halves(pair, words[i] & 0x7fff7fff);
      return __float_as_uint(widen(T{uint16_t(larger(pair & 0xffff, pair >> 16))}));
    }
  }

  // The first `count` values at `source`, zeros behind them. ALIGNED: all of them, or none, at a multiple of 16 bytes.
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
      for (int i = 0; i < COUNT; ++i) {
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
      for (int i = 0; i < COUNT; ++i) {
        if (i >= count) continue;
        if constexpr (sizeof(T) == 4) target[i] = __uint_as_float(words[i]);
        else target[i].bits = uint16_t(words[i / 2] >> i % 2 * 16);
      }
    }
  }
};

// The largest magnitude of numbers in registers.
template <int COUNT>
__device__ __forceinline__ uint32_t largest_of(const float (&v)[COUNT]) {
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) amax = larger(amax, magnitude(v[i]));
  return amax;
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
