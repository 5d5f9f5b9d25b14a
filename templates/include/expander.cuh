// FP4 weights on the MMA's N side: a warp expands a packed tile to e5m2 in shared memory, where the MMA reads it.
//
// Of the tile's place (64 rows x 128 bytes, K-major with the 128-byte swizzle) the packed tile takes the last 4352 bytes, until the
// warp writes its own rows over it. So expanded weights take no more room than FP8's, and no warp waits for another one.
#pragma once
#include "epilogue.cuh"
#include "fp4.cuh"
#include "scales.cuh"

constexpr int EXPANDED_TILE_BYTES = PACKED_TILE_ROWS * 128;
constexpr int PACKED_TILE_BYTES = PACKED_CODES_BYTES + PACKED_TILE_ROWS * 128 / 32;
constexpr int PACKED_IN_PLACE = EXPANDED_TILE_BYTES - PACKED_TILE_BYTES;  // offset

// Exponents that are expanded in one walk along K. Where units say that a tile's lie farther apart, K is walked once for each window,
// codes with other exponents being zeros meanwhile.
struct Window {
  int number = 0;

  static constexpr int LARGEST = 241;  // exponent of a group
  static constexpr int FIRST = 101, WIDTH = 27, WINDOWS = 10;  // all that E5M2 spans; then four windows below, and five above

  __device__ __forceinline__ int first() const { return number < 5 ? FIRST - number * 26 : FIRST + WIDTH + (number - 5) * 23; }
  __device__ __forceinline__ int width() const { return number == 0 ? WIDTH : number < 5 ? 26 : 23; }
  // What sums are multiplied by: their codes have been expanded as if the window were the first one.
  __device__ __forceinline__ float scale() const { return __uint_as_float(uint32_t(first() - FIRST + 127) << 23); }
  // Whether K is walked once more.
  __device__ __forceinline__ bool next(bool apart) { return (number > 0 || apart) && ++number < WINDOWS; }
};

// Here, not where the number is looked at.
__device__ __forceinline__ float load_now(const float* pointer) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(pointer));
  return value;
}

// Units of the first rows of TILES tiles of 64 weights, whose signs say whether exponents lie too far apart. They arrive while other
// things are done.
template <int TILES>
struct TileUnits {
  float units[TILES];

  __device__ __forceinline__ TileUnits(const ScaleMatrix& matrix, int row0, int rows) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const int row = row0 + i * PACKED_TILE_ROWS;
      units[i] = row < rows ? load_now(matrix.pointer + row * matrix.stride_mn) : 0.f;
    }
  }
  __device__ __forceinline__ bool apart() const {
    bool negative = false;
#pragma unroll
    for (int i = 0; i < TILES; ++i) negative |= int(__float_as_uint(units[i])) < 0;
    return negative;
  }
};

// A thread's codes and exponents of 16 rows: its upper row's and its lower row's, of four MMAs.
struct PackedRows {
  uint32_t codes[2][4], exponents[2];

  __device__ __forceinline__ void load(uint32_t packed, int warp_rows) {
    const uint32_t lane = threadIdx.x % WARP;
    load_shared_words(packed + PACKED_CODES_BYTES + warp_rows * 64 + lane / 4 * 8, exponents);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) load_shared_words(packed + pair * PACKED_VECTOR_BYTES + warp_rows * 512 + lane * 16, codes[pair]);
  }
  // Of one MMA: A's registers, which are 8 x 16 bytes each: upper and lower rows, then the same 16 columns behind.
  template <bool APART>
  __device__ __forceinline__ void expand(int mma, const Window& window, uint32_t (&fragment)[4]) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      uint32_t word = codes[mma / 2][mma % 2 * 2 + row], exponent = permute_bytes(exponents[row], 0, 0x4440 + mma);
      if constexpr (APART) {
        const uint32_t from_first = exponent - window.first();
        const bool within = from_first < uint32_t(window.width());
        word = within ? word : 0, exponent = Window::FIRST + (within ? from_first : 0);
      }
      expand_codes(word, exponent, fragment[row], fragment[row + 2]);
    }
  }
};

// Expands the packed tile in place. Rows are read ahead of those that are written: 16 to 31 overwrite codes of the first 16, and those
// behind them codes and exponents of all.
template <bool APART>
__device__ __forceinline__ void expand_in_place(uint32_t tile, const Window& window = {}) {
  const uint32_t lane = threadIdx.x % WARP, packed = tile + PACKED_IN_PLACE;
  // Lane l addresses row l % 16 of 16, and the first or second 16 bytes of an MMA's 32.
  const uint32_t row = tile + swizzled<128>(lane % 16, lane / 16);
  PackedRows rows[2];
  rows[0].load(packed, 0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i + 1 < 4) rows[(i + 1) % 2].load(packed, i + 1);
    __syncwarp();  // what other lanes read is overwritten
#pragma unroll
    for (int mma = 0; mma < 4; ++mma) {
      uint32_t fragment[4];
      rows[i % 2].expand<APART>(mma, window, fragment);
      store_matrix_x4<false>((row + i * 16 * 128) ^ mma * 32, fragment[0], fragment[1], fragment[2], fragment[3]);
    }
  }
}
