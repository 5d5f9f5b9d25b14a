// Tiles along K on the CPU: every thread of the math warpgroups stages its sums, then the producer's boxes go to D.
#include <cstdint>
#include <cstdlib>
#define __device__
#define __forceinline__ inline
constexpr int WARP = 32;
struct Index { int x; };
static Index threadIdx;
static char memory[1 << 18];
template <class T> static T& shared(uint32_t address) {
  if (address % sizeof(T) || address + sizeof(T) > sizeof memory) abort();
  return *reinterpret_cast<T*>(memory + address);
}
struct Float32 { float bits; };
struct Group { int plane; };
struct Matrix { float* values; int rows, columns, box_rows, box_columns; };  // a tensor map, swizzled as wide as its boxes
struct Params { Matrix d; int adds; Group groups[2]; };
struct Tile { int row0, column0, group; };
static void barrier_init(uint32_t, int) {}
static void barrier_wait(uint32_t, uint32_t) {}

// The copy engine: a box at (x, y) of plane z, whose rows lie one after another; what lies outside D is left alone.
static void tma_add_3d(uint32_t source, const Matrix& d, int x, int y, int z) {
  const int row_bytes = d.box_columns * 4;
  if (source % 128) abort();
  for (int row = 0; row < d.box_rows; ++row)
    for (int column = 0; column < d.box_columns; ++column) {
      const uint32_t chunk = column / 4, in_repeat = (source + row * row_bytes) / 128 % 8;
      const uint32_t at = source + row * row_bytes + (chunk ^ (in_repeat % (row_bytes / 16))) * 16 + column % 4 * 4;
      if (y + row < d.rows && x + column < d.columns) d.values[(int64_t(z) * d.rows + y + row) * d.columns + x + column] += shared<float>(at);
    }
}
static void tma_store_3d(uint32_t, const Matrix&, int, int, int) { abort(); }

@STAGING@

// -- Of each kind of tile.
extern "C" void run_@NAME@(float* values, int groups, int m, int n, int box_rows) {
  Params p{{values, m, n, box_rows, STORE_ROW_ELEMENTS}, 1, {{1}, {0}}};
  const int rows = SWAP_AB ? n : m, columns = SWAP_AB ? m : n;
  for (int group = 0; group < groups; ++group)
    for (int row0 = 0; row0 < rows; row0 += TILE_ROWS)
      for (int column0 = 0; column0 < columns; column0 += TILE_COLUMNS) {
        for (threadIdx.x = 0; threadIdx.x < MATH_WARPGROUPS * 128; ++threadIdx.x)
          for (int wave = 0; wave < WAVES; ++wave) {
            const int block = threadIdx.x / 128 * WAVES + wave;
            float sums[TILE_COLUMNS / 2];
            for (int i = 0; i < TILE_COLUMNS / 2; ++i) {
              const int row = row0 + block * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
              const int column = column0 + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
              sums[i] = 1 + (SWAP_AB ? row + 512 * column : column + 512 * row) + (1 << 18) * p.groups[group].plane;
            }
            const uint32_t staging = 1024 + block * STAGING_PER_WAVE;
            if constexpr (!SWAP_AB && TILE_COLUMNS % 32 == 0)
              stage_wide_tile<TILE_COLUMNS>(staging, sums);
            else
              stage_tile<Element, SWAP_AB, TILE_COLUMNS, STORE_ROW_BYTES>(staging, sums);
          }
        for (int box = 0; box < StagedTile::BOXES; ++box) StagedTile::store_box(p, 1024, Tile{row0, column0, group}, box);
      }
}
