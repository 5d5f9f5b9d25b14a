// What the row-wise kernels share: vectors of 16 bytes, BF16, and the instructions of one warp.
#pragma once
#include "common.cuh"
#include "convert.cuh"

constexpr uint32_t ALL_LANES = 0xffffffff;
constexpr int BF16_PER_VECTOR = 8;

// A pair of BF16 in a word, the first in the low half.
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000); }

// sums += weight * vector
__device__ __forceinline__ void add_scaled(float (&sums)[BF16_PER_VECTOR], float weight, const uint4& vector) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums[2 * i] = fmaf(weight, low_bf16(words[i]), sums[2 * i]);
    sums[2 * i + 1] = fmaf(weight, high_bf16(words[i]), sums[2 * i + 1]);
  }
}

// As many columns in FP32: two loads, or two stores.
struct Floats { float4 low, high; };

__device__ __forceinline__ void add_scaled(float (&sums)[BF16_PER_VECTOR], float weight, const Floats& vector) {
  const float4 low = vector.low, high = vector.high;
  const float values[BF16_PER_VECTOR] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < BF16_PER_VECTOR; ++i) sums[i] = fmaf(weight, values[i], sums[i]);
}

__device__ __forceinline__ Floats pack_floats(const float (&v)[BF16_PER_VECTOR]) {
  return {float4{v[0], v[1], v[2], v[3]}, float4{v[4], v[5], v[6], v[7]}};
}

__device__ __forceinline__ uint4 pack_vector(const float (&values)[BF16_PER_VECTOR]) {
  return {floats_to_bf16(values[0], values[1]), floats_to_bf16(values[2], values[3]), floats_to_bf16(values[4], values[5]), floats_to_bf16(values[6], values[7])};
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// To 10 bits of mantissa, nearest, ties away from zero.
__device__ __forceinline__ float round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// c (16 x 8) += a (16 x 8) * b (8 x 8). With g = lane / 4 and q = lane % 4, a lane has a[row g, k q], [g + 8, q], [g, q + 4],
// [g + 8, q + 4]; b[k q, column g], [q + 4, g]; c[g, 2q], [g, 2q + 1], [g + 8, 2q], [g + 8, 2q + 1].
__device__ __forceinline__ void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
                 "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// The same with BF16 pairs, for k of 16: a lane has a[g, k pair q], [g + 8, q], [g, q + 4], [g + 8, q + 4]; b[q, column g], [q + 4, g].
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, or zeros; for the copying thread there once it has waited for the group.
__device__ __forceinline__ void copy_async(void* target, const void* source, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(target)), "l"(source), "r"(exists ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS_IN_FLIGHT>
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_IN_FLIGHT) : "memory"); }
