// From MMA accumulators to D, in BF16 or FP32.
//
// A thread holds, per 8 columns of the MMA's tile, two neighbouring columns of two rows 8 apart (wgmma D fragment):
//   values[4j + 0, 1]: row r, columns 8j + c, 8j + c + 1;  values[4j + 2, 3]: row r + 8, the same columns;
//   r = 16 * warp + lane / 4, c = 2 * (lane % 4).
// Transposed (operands swapped), MMA rows are columns of D and MMA columns its rows.
#pragma once
#include "common.cuh"
#include "convert.cuh"
#include "tma.cuh"

struct BFloat16 {
  uint16_t bits;
  __device__ __forceinline__ float value() const { return __uint_as_float(uint32_t(bits) << 16); }
};
struct Float32 {
  float bits;
  __device__ __forceinline__ float value() const { return bits; }
};

// 16-byte chunk `chunk` of row `row` in a tile of ROW_BYTES-wide rows, where TMA's swizzle of that width puts it.
template <int ROW_BYTES>
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
  static_assert(ROW_BYTES == 16 || ROW_BYTES == 32 || ROW_BYTES == 64 || ROW_BYTES == 128);
  constexpr uint32_t CHUNKS = ROW_BYTES / 16;
  return row * ROW_BYTES + ((chunk ^ (row * ROW_BYTES / 128 % CHUNKS)) * 16);
}

template <bool TRANSPOSED>
__device__ __forceinline__ void store_matrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if constexpr (TRANSPOSED)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

template <bool TRANSPOSED>
__device__ __forceinline__ void store_matrix_x2(uint32_t address, uint32_t a, uint32_t b) {
  if constexpr (TRANSPOSED)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// Writes one warpgroup's 64 x COLUMNS values into its staging area, in the layout that the store's boxes have:
// slabs of ROW_BYTES (128 where transposed), each 64 rows (COLUMNS where transposed) high.
template <class Element, bool TRANSPOSED, int COLUMNS, int ROW_BYTES>
__device__ __forceinline__ void stage_tile(uint32_t staging, const float* values) {
  const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
  constexpr int CHUNKS = ROW_BYTES / 16;
  if constexpr (sizeof(Element) == 2) {
    // Lane l addresses row l % 8 of matrix l / 8; matrices alternate between the fragment's two row halves.
    const uint32_t row_in_matrix = lane % 8, half = lane / 8 % 2, next = lane / 16;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j += 2) {
      const float* v = values + 4 * j;
      const uint32_t column8 = j + next;
      uint32_t address;
      if constexpr (TRANSPOSED)
        address = staging + swizzled<ROW_BYTES>(8 * column8 + row_in_matrix, 2 * warp + half);
      else
        address = staging + column8 / CHUNKS * (64 * ROW_BYTES) + swizzled<ROW_BYTES>(16 * warp + 8 * half + row_in_matrix, column8 % CHUNKS);
      if (j + 1 < COLUMNS / 8)
        store_matrix_x4<TRANSPOSED>(address, floats_to_bf16(v[0], v[1]), floats_to_bf16(v[2], v[3]), floats_to_bf16(v[4], v[5]), floats_to_bf16(v[6], v[7]));
      else
        store_matrix_x2<TRANSPOSED>(address, floats_to_bf16(v[0], v[1]), floats_to_bf16(v[2], v[3]));
    }
  } else {
    const uint32_t row = 16 * warp + lane / 4, pair = lane % 4;
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i += 2) {
      const uint32_t j = i / 4, half = i / 2 % 2;
      if constexpr (TRANSPOSED) {
        const uint32_t column = row + 8 * half, token = 8 * j + 2 * pair;
        const uint32_t slab = staging + column / 32 * (COLUMNS * 128) + column % 4 * 4;
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(slab + swizzled<128>(token, column % 32 / 4)), "f"(values[i]) : "memory");
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(slab + swizzled<128>(token + 1, column % 32 / 4)), "f"(values[i + 1]) : "memory");
      } else {
        const uint32_t chunk = 2 * j + pair / 2;
        // Rows 8 apart are swizzled alike.
        const uint32_t address = staging + chunk / CHUNKS * (64 * ROW_BYTES) + swizzled<ROW_BYTES>(row, chunk % CHUNKS) + pair % 2 * 8;
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address + half * 8 * ROW_BYTES), "f"(values[i]), "f"(values[i + 1]) : "memory");
      }
    }
  }
}

// stage_tile for FP32 in rows of 128 bytes, without bank conflicts. The 4 rows that half a warp writes at a time have 32 bytes each of
// the same columns, which the swizzle spreads over half of the banks: odd rows take turns with the columns 16 further.
template <int COLUMNS>
__device__ __forceinline__ void stage_wide_tile(uint32_t staging, const float* values) {
  static_assert(COLUMNS % 32 == 0);
  constexpr int ROW_BYTES = 128;
  const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4, row = 16 * warp + lane / 4, pair = lane % 4;
  const bool odd = row % 2;
  const auto store = [](uint32_t address, float x, float y) { asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory"); };
#pragma unroll
  for (int slab = 0; slab < COLUMNS / 32; ++slab)
#pragma unroll
    for (uint32_t j = 0; j < 2; ++j) {
      const uint32_t address = staging + slab * (64 * ROW_BYTES) + swizzled<ROW_BYTES>(row, (2 * j + pair / 2) ^ (odd ? 4 : 0)) + pair % 2 * 8;
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const float *near = values + 16 * slab + 4 * j + 2 * half, *far = near + 8;
        const uint32_t at = address + half * 8 * ROW_BYTES;  // rows 8 apart are swizzled alike
        store(at, odd ? far[0] : near[0], odd ? far[1] : near[1]);
        store(at ^ 64, odd ? near[0] : far[0], odd ? near[1] : far[1]);
      }
    }
}

// D and C as plain matrices: any base, any row stride.
struct PlainMatrix {
  void* pointer;
  int64_t row_stride;  // elements
};

// Adds C to a fragment of COLUMNS columns at MMA position (row0, column0); what lies outside C is left alone.
template <class Element, bool TRANSPOSED, int COLUMNS>
__device__ __forceinline__ void add_matrix(float* values, const PlainMatrix& c, int row0, int column0, int m, int n) {
  const int row = row0 + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4, column = column0 + threadIdx.x % 4 * 2;
  const int rows = TRANSPOSED ? n : m, columns = TRANSPOSED ? m : n;
  const int64_t row_step = TRANSPOSED ? 1 : c.row_stride, column_step = TRANSPOSED ? c.row_stride : 1;
  const Element* upper = static_cast<const Element*>(c.pointer) + row * row_step + column * column_step;
  const Element* lower = upper + 8 * row_step;
  const bool has_upper = row < rows, has_lower = row + 8 < rows;
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool has_column = column + 8 * j + i < columns;
      if (has_upper && has_column) values[4 * j + i] += upper[(8 * j + i) * column_step].value();
      if (has_lower && has_column) values[4 * j + 2 + i] += lower[(8 * j + i) * column_step].value();
    }
  }
}

struct NoHoles {
  static constexpr bool EXIST = false;
};

// Copies staged values to D without the copy engine, UNIT bytes at a time: where that is an element's size, to any base and row
// stride. Each warp copies the 16 rows that it staged, or where transposed a warpgroup all of its tile. Of the staged columns only
// every SPLIT-th group of 8, from group `first`, is this CTA's to store. ROWS: of the MMA's that a warpgroup staged. Columns of D's
// holes come on top of the product's.
template <class Element, int UNIT, bool TRANSPOSED, int COLUMNS, int ROW_BYTES, int SPLIT, int ROWS = 64, class Holes = NoHoles>
__device__ __forceinline__ void store_staged(uint32_t staging, const PlainMatrix& d, int row0, int column0, int m, int n, int first,
                                             const Holes& holes = {}) {
  constexpr int HEIGHT = TRANSPOSED ? COLUMNS : 16, WIDTH = (TRANSPOSED ? ROWS : COLUMNS) * sizeof(Element) / UNIT;  // in D's coordinates
  constexpr int SLAB = (TRANSPOSED ? COLUMNS : 64) * ROW_BYTES, THREADS = TRANSPOSED ? WARPGROUP : WARP;
  const int d_row0 = TRANSPOSED ? column0 : row0, d_column0 = TRANSPOSED ? row0 : column0;
  const int staged_row0 = TRANSPOSED ? 0 : threadIdx.x / WARP % 4 * 16;
#pragma unroll 4
  for (int i = threadIdx.x % THREADS; i < HEIGHT * WIDTH; i += THREADS) {
    const int row = staged_row0 + i / WIDTH, byte = i % WIDTH * UNIT, column = byte / int(sizeof(Element));
    const int group = (TRANSPOSED ? row : column) / 8;
    if (d_row0 + row >= m || d_column0 + column >= n || (SPLIT > 1 && group % SPLIT != first)) continue;
    const uint32_t address = staging + byte / ROW_BYTES * SLAB + swizzled<ROW_BYTES>(row, byte % ROW_BYTES / 16) + byte % 16;
    Element* out = static_cast<Element*>(d.pointer) + (d_row0 + row) * d.row_stride + d_column0 + column;
    if constexpr (Holes::EXIST) out += holes.before(d_column0 + column);
    if constexpr (UNIT == 1) {
      asm volatile("{\n .reg .b32 v;\n ld.shared.u8 v, [%0];\n st.global.u8 [%1], v;\n}" ::"r"(address), "l"(out) : "memory");
    } else if constexpr (UNIT == 2) {
      asm volatile("{\n .reg .b16 v;\n ld.shared.b16 v, [%0];\n st.global.b16 [%1], v;\n}" ::"r"(address), "l"(out) : "memory");
    } else if constexpr (UNIT == 4) {
      asm volatile("{\n .reg .b32 v;\n ld.shared.b32 v, [%0];\n st.global.b32 [%1], v;\n}" ::"r"(address), "l"(out) : "memory");
    } else {
      static_assert(UNIT == 16);
      asm volatile("{\n .reg .b32 a, b, c, d;\n ld.shared.v4.b32 {a, b, c, d}, [%0];\n st.global.v4.b32 [%1], {a, b, c, d};\n}" ::"r"(address),
                   "l"(out)
                   : "memory");
    }
  }
}
