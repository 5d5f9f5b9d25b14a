// Scales of FP8 operands.
#pragma once
#include "common.cuh"

// What one scale covers: nothing, one row x 128 of K, 128 rows x 128 of K, a row, the whole operand.
enum Scales { NONE, ROW_K, BLOCK_K, ROW, TENSOR };
constexpr int SCALE_GROUP = 128;

struct ScaleMatrix {
  const float* pointer;
  int32_t stride_mn, stride_k;  // elements (2^31 at most in all); 0 where one scale serves all
  int32_t blocks;               // of 128 rows, where one scale covers 128 x 128
  int32_t padding;
};

// Scales of one 128-row block along K, a warp's worth at a time: lane i holds that of the i-th k-block of `current`.
struct BlockScales {
  const float* pointer;  // null outside the matrix
  int32_t stride_k;
  float current, ahead;

  __device__ __forceinline__ void begin(const ScaleMatrix& scales, int block) {
    pointer = block < scales.blocks ? scales.pointer + block * scales.stride_mn : nullptr;
    stride_k = scales.stride_k;
  }
  __device__ __forceinline__ void fetch(int first, int end) {
    const int mine = first + threadIdx.x % WARP;
    ahead = pointer && mine < end ? pointer[mine * stride_k] : 0.f;
  }
  __device__ __forceinline__ void turn() { current = ahead; }
  __device__ __forceinline__ float at(int index) const { return __shfl_sync(0xffffffff, current, index); }
};

// The same of one group's matrix, in fewer registers: where the matrix depends on the tile, a pointer takes two of each thread.
struct GroupBlockScales {
  int32_t first;  // the block's first scale, in elements from the first group's; negative outside the matrix
  float current, ahead;

  __device__ __forceinline__ void begin(const ScaleMatrix& scales, int block, int group_offset) {
    first = block < scales.blocks ? group_offset + block * scales.stride_mn : -1;
  }
  __device__ __forceinline__ void fetch(const ScaleMatrix& scales, int first_k, int end) {
    const int mine = first_k + threadIdx.x % WARP;
    ahead = first >= 0 && mine < end ? scales.pointer[first + mine * scales.stride_k] : 0.f;
  }
  __device__ __forceinline__ void turn() { current = ahead; }
  __device__ __forceinline__ float at(int index) const { return __shfl_sync(0xffffffff, current, index); }
};

// The scale of row `index`, or of the whole operand (stride 0). Volatile: loads of many columns at once would spill.
__device__ __forceinline__ float outer_scale(const ScaleMatrix& scales, int index, int end) {
  float value = 0.f;
  if (index < end) asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(scales.pointer + index * scales.stride_mn));
  return value;
}
