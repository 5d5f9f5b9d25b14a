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

// Scales of one 128-row block along K, or of two that follow each other, a warp's worth at a time: lane i holds that of the i-th
// k-block of `current`, and of two blocks the upper half of the warp those of the second.
template <int BLOCKS>
struct BlockScales {
  static constexpr int CHUNK = WARP / BLOCKS;  // k-blocks held
  const float* pointer;  // null outside the matrix
  int32_t stride_k;
  float current, ahead;

  __device__ __forceinline__ void begin(const ScaleMatrix& scales, int block) {
    if constexpr (BLOCKS > 1) block += threadIdx.x % WARP / CHUNK;
    pointer = block < scales.blocks ? scales.pointer + block * scales.stride_mn : nullptr;
    stride_k = scales.stride_k;
  }
  __device__ __forceinline__ void fetch(int first, int end) {
    const int mine = first + threadIdx.x % CHUNK;
    ahead = pointer && mine < end ? pointer[mine * stride_k] : 0.f;
  }
  __device__ __forceinline__ void turn() { current = ahead; }
  // Of the k-block that is number `index`, modulo CHUNK, from the first.
  __device__ __forceinline__ float at(int index, int block = 0) const {
    return __shfl_sync(0xffffffff, current, BLOCKS > 1 ? index % CHUNK + block * CHUNK : index);
  }
};

// The same of one group's matrix, in fewer registers: where the matrix depends on the tile, a pointer takes two of each thread.
template <int BLOCKS>
struct GroupBlockScales {
  static constexpr int CHUNK = WARP / BLOCKS;
  int32_t first;  // the block's first scale, in elements from the first group's; negative outside the matrix
  float current, ahead;

  __device__ __forceinline__ void begin(const ScaleMatrix& scales, int block, int group_offset) {
    if constexpr (BLOCKS > 1) block += threadIdx.x % WARP / CHUNK;
    first = block < scales.blocks ? group_offset + block * scales.stride_mn : -1;
  }
  __device__ __forceinline__ void fetch(const ScaleMatrix& scales, int first_k, int end) {
    const int mine = first_k + threadIdx.x % CHUNK;
    ahead = first >= 0 && mine < end ? scales.pointer[first + mine * scales.stride_k] : 0.f;
  }
  __device__ __forceinline__ void turn() { current = ahead; }
  // Of the k-block that is number `index`, modulo CHUNK, from the first.
  __device__ __forceinline__ float at(int index, int block = 0) const {
    return __shfl_sync(0xffffffff, current, BLOCKS > 1 ? index % CHUNK + block * CHUNK : index);
  }
};

// The scale of row `index`, or of the whole operand (stride 0).
__device__ __forceinline__ float outer_scale(const ScaleMatrix& scales, int index, int end) {
  return index < end ? scales.pointer[index * scales.stride_mn] : 0.f;
}

// Scales of a fragment's columns, or what their sums are multiplied by, a warp's worth in a register: all are on their way at once.
template <int COLUMNS>
struct OuterScales {
  float held[(COLUMNS + WARP - 1) / WARP];  // lane i: of columns i, 32 + i, ...

  __device__ __forceinline__ OuterScales(const ScaleMatrix& scales, int column0, int lane, int end) {
#pragma unroll
    for (int i = 0; i * WARP < COLUMNS; ++i) held[i] = outer_scale(scales, column0 + i * WARP + lane, end);
  }
  // Of column 8j + 2 * (lane % 4) + next.
  __device__ __forceinline__ float at(int j, int lane, int next) const {
    return __shfl_sync(0xffffffff, held[j / 4], j % 4 * 8 + lane % 4 * 2 + next);
  }
};

// Multiplies a fragment of COLUMNS columns by the scales of its rows and columns: this thread's rows are row and row + 8.
template <int COLUMNS>
__device__ __forceinline__ void multiply_by_outer_scales(float* values, const ScaleMatrix& rows, const ScaleMatrix& columns, int row, int column0,
                                                         int lane, int rows_end, int columns_end) {
  const OuterScales<COLUMNS> column_scales(columns, column0, lane, columns_end);
  const float upper_scale = outer_scale(rows, row, rows_end);
  const float lower_scale = outer_scale(rows, row + 8, rows_end);
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j) {
    const float left = column_scales.at(j, lane, 0), right = column_scales.at(j, lane, 1);
    float* v = values + 4 * j;
    v[0] *= upper_scale * left, v[1] *= upper_scale * right, v[2] *= lower_scale * left, v[3] *= lower_scale * right;
  }
}

// Multiplies a fragment of COLUMNS columns by what each column's sums are multiplied by, whose signs say something else.
template <int COLUMNS>
__device__ __forceinline__ void multiply_by_column_units(float* values, const ScaleMatrix& units, int column0, int lane, int columns_end) {
  const OuterScales<COLUMNS> column_units(units, column0, lane, columns_end);
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j) {
    const float left = fabsf(column_units.at(j, lane, 0)), right = fabsf(column_units.at(j, lane, 1));
    float* v = values + 4 * j;
    v[0] *= left, v[1] *= right, v[2] *= left, v[3] *= right;
  }
}

// The number that a row's sums are multiplied by, of a matrix of these that starts `first` numbers behind the first; 0 behind its rows.
__device__ __forceinline__ float row_unit(const ScaleMatrix& units, int first, int row, int rows) {
  return row < rows ? units.pointer[first + row * units.stride_mn] : 0.f;
}
