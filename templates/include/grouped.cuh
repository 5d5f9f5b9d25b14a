// Tiles of groups whose rows only the device knows.
//
// One order goes through the tiles of all groups, and each block takes one of every gridDim.x. The producer's first warp looks
// them up: a window of 32 entries, one a lane, with running sums of their tiles. An entry is a group or, where every row
// carries the index of its group, a stretch of rows. What it finds goes through a small queue to the warp that loads and to the math
// warpgroups.
#pragma once
#include "common.cuh"
#include "pipeline.cuh"

enum Grouping { MASKED, PSUM, INDEXED };

struct GroupLayout {
  const int32_t* values;  // MASKED: rows of each group. PSUM: end of each. INDEXED: group of each row, all but 0 to groups - 1 is padding
  int32_t groups;
  int32_t m;          // rows of A; MASKED: of each group
  int32_t alignment;  // PSUM: groups start at multiples of it
  int32_t tiles_n;
  int32_t band;       // tiles along m that are walked before n advances
  int32_t positions;  // INDEXED: of an entry at which a tile may start ...
  int32_t step;       // ... and rows between them; a tile starts nowhere else

  __device__ __forceinline__ int clamped(int row) const { return row < 0 ? 0 : min_of(row, m); }
  // PSUM: where a group starts whose forerunner ends at `row`, from 0 to m.
  __device__ __forceinline__ int aligned(int row) const { return (row + alignment - 1) / alignment * alignment; }
};

// INDEXED: asks L2 for the index, before anything is looked up: the first look-up reads rows at which tiles may start, and the second
// those of a tile. By a whole warp of each block, which share the lines among them. Values that the kernel ahead in the stream is yet
// to write reach L2 as well, so that this need not wait for its end.
__device__ __forceinline__ void prefetch_index(const GroupLayout& layout) {
  constexpr int LINE = 128 / sizeof(int32_t);  // rows
  const uint32_t lines = (layout.m + LINE - 1) / LINE, lane = threadIdx.x % WARP;
  if (lane < lines) asm volatile("prefetch.global.L2 [%0];" ::"l"(layout.values + (blockIdx.x * WARP + lane) % lines * LINE) : "memory");
}

// A tile in rows of A and D and columns of D; rows_left: from its first row to its group's end, 0 if there are no more tiles.
struct GroupTile {
  int row, rows_left, group, column;
};

// dividend / divisor for quotients up to 2^21, where the estimate is off by one at most: the compiler's exact one takes longer.
__device__ __forceinline__ int quotient(int dividend, int divisor) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(float(divisor)));
  const int estimate = int(float(dividend) * reciprocal), rest = dividend - estimate * divisor;
  return rest < 0 ? estimate - 1 : rest >= divisor ? estimate + 1 : estimate;
}

// The tile that a block takes of each round of as many as there are blocks. Not always the one at the same place: where the tiles along
// m of a group divide that number, some blocks would get nothing but full tiles, and others groups' last ones, which take less time.
__device__ __forceinline__ int tile_of_round(int round, uint32_t block, uint32_t blocks) { return int(round * blocks + (block + round) % blocks); }

// Whole warps call it together. TILE: rows of A in a tile, WIDTH: columns of D.
template <Grouping GROUPING, int TILE, int WIDTH>
class GroupSchedule {
 public:
  __device__ __forceinline__ explicit GroupSchedule(const GroupLayout& layout) : layout(layout) {
    open();
  }

  // The tile of this index, which must not be less than the one before; false behind the last.
  __device__ __forceinline__ bool find(int index, GroupTile& tile) {
    int sum;
    while (index >= (sum = __shfl_sync(ALL, end, WARP - 1))) {
      first += WARP;
      if (first >= entries()) return false;
      before = sum;
      open();
    }
    const int holder = __ffs(__ballot_sync(ALL, index < end)) - 1;
    const int count = __shfl_sync(ALL, tiles, holder);
    const int local = index - (__shfl_sync(ALL, end, holder) - count * layout.tiles_n);
    const int per_band = layout.band * layout.tiles_n, band = quotient(local, per_band), in_band = local - band * per_band;
    const int height = min_of(layout.band, count - band * layout.band), n = quotient(in_band, height);
    const int which = band * layout.band + in_band - n * height;
    tile.column = n * WIDTH;
    if constexpr (GROUPING == INDEXED) {
      locate_run((first + holder) * layout.positions * layout.step, which, tile);
    } else {
      tile.row = __shfl_sync(ALL, begin, holder) + which * TILE;
      tile.rows_left = __shfl_sync(ALL, rows, holder) - which * TILE;
      tile.group = first + holder;
    }
    return true;
  }

 private:
  static constexpr uint32_t ALL = 0xffffffff;
  const GroupLayout& layout;
  int first = 0, before = 0;  // entry of lane 0; tiles ahead of it
  int begin = 0, rows = 0;    // of this lane's group
  int tiles, end;             // along m of this lane's entry; running sum of all its tiles

  __device__ __forceinline__ int entries() const {
    if constexpr (GROUPING != INDEXED) return layout.groups;
    const int stretch = layout.positions * layout.step;
    return (layout.m + stretch - 1) / stretch;
  }

  // Makes the entries from `first` on the window.
  __device__ __forceinline__ void open() {
    if constexpr (GROUPING == INDEXED) {
      const int base = (first + threadIdx.x % WARP) * layout.positions * layout.step;
      tiles = 0;
#pragma unroll 4
      for (int i = 0; i < layout.positions; ++i) tiles += starts(base + i * layout.step);
    } else {
      const int group = first + threadIdx.x % WARP;
      rows = 0;
      if (group < layout.groups) {
        const int value = layout.clamped(layout.values[group]);
        if constexpr (GROUPING == PSUM) begin = layout.aligned(group > 0 ? layout.clamped(layout.values[group - 1]) : 0);
        rows = value > begin ? value - begin : 0;
      }
      tiles = (rows + TILE - 1) / TILE;
    }
    end = tiles * layout.tiles_n;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
      const int lower = __shfl_up_sync(ALL, end, distance);
      if (threadIdx.x % WARP >= distance) end += lower;
    }
    end += before;
  }

  __device__ __forceinline__ bool is_group(int value) const { return uint32_t(value) < uint32_t(layout.groups); }

  // INDEXED: whether a tile starts here, where a group's rows do, or a multiple of the tile.
  __device__ __forceinline__ bool starts(int row) const {
    if (row >= layout.m) return false;
    const int group = layout.values[row];
    return is_group(group) && (row % TILE == 0 || layout.values[row - 1] != group);
  }

  // INDEXED: the tile that starts at one of an entry's positions; as high as rows of its group follow on each other.
  __device__ __forceinline__ void locate_run(int base, int which, GroupTile& tile) const {
    const int lane = threadIdx.x % WARP;
    tile.row = base;
    for (int i = 0; i < layout.positions; i += WARP) {
      uint32_t found = __ballot_sync(ALL, i + lane < layout.positions && starts(base + (i + lane) * layout.step));
      const int count = __popc(found);
      if (which < count) {
        for (; which > 0; --which) found &= found - 1;
        tile.row = base + (i + __ffs(found) - 1) * layout.step;
        break;
      }
      which -= count;
    }
    const int tile_end = min_of((tile.row / TILE + 1) * TILE, layout.m);
    int mine[(TILE + WARP - 1) / WARP];
#pragma unroll
    for (int i = 0; i < (TILE + WARP - 1) / WARP; ++i) {
      const int row = tile.row + i * WARP + lane;
      mine[i] = row < tile_end ? layout.values[row] : -1;
    }
    tile.group = __shfl_sync(ALL, mine[0], 0);
    tile.rows_left = 0;
    bool open = is_group(tile.group);  // always, unless the layout changes under the kernel
#pragma unroll
    for (int i = 0; i < (TILE + WARP - 1) / WARP; ++i) {
      const uint32_t others = __ballot_sync(ALL, mine[i] != tile.group);
      if (open) tile.rows_left += others ? __ffs(others) - 1 : WARP;
      open &= others == 0;
    }
  }
};

// -- The queue from the warp that finds tiles to those that load and multiply them: slots of one tile each, with full and empty barriers.

constexpr int TILE_SLOTS = 4, TILE_BYTES = 16;
constexpr int TILE_QUEUE_BYTES = TILE_SLOTS * (TILE_BYTES + 2 * 8);

struct TileQueue {
  uint32_t base;  // shared address, aligned to 16

  // By one thread, before any other uses the queue. Readers are warps.
  __device__ __forceinline__ void init(int readers) const {
    for (uint32_t slot = 0; slot < TILE_SLOTS; ++slot) {
      barrier_init(full(slot), 1);
      barrier_init(empty(slot), readers);
    }
  }

  // By one thread: the tile with this number, counted from 0.
  __device__ __forceinline__ void put(uint32_t number, const GroupTile& tile) const {
    barrier_wait(empty(number), number / TILE_SLOTS % 2 ^ 1);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(place(number)), "r"(tile.row), "r"(tile.rows_left), "r"(tile.group), "r"(tile.column)
                 : "memory");
    barrier_arrive(full(number));
  }

  // By whole warps of the readers, before they look at a tile.
  __device__ __forceinline__ void wait(uint32_t number) const { barrier_wait(full(number), number / TILE_SLOTS % 2); }

  // By whole warps of the readers. The same in all lanes, which the compiler is to know: branches around MMAs depend on it.
  __device__ __forceinline__ GroupTile look(uint32_t number) const {
    GroupTile tile;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.row), "=r"(tile.rows_left), "=r"(tile.group), "=r"(tile.column)
                 : "r"(place(number))
                 : "memory");
    const auto of_first_lane = [](int value) { return __shfl_sync(0xffffffff, value, 0); };
    return {of_first_lane(tile.row), of_first_lane(tile.rows_left), of_first_lane(tile.group), of_first_lane(tile.column)};
  }

  // By whole warps of the readers: done with the tile.
  __device__ __forceinline__ void pass(uint32_t number) const {
    __syncwarp();
    if (threadIdx.x % WARP == 0) barrier_arrive(empty(number));
  }

 private:
  __device__ __forceinline__ uint32_t place(uint32_t number) const { return base + number % TILE_SLOTS * TILE_BYTES; }
  __device__ __forceinline__ uint32_t full(uint32_t number) const { return base + TILE_SLOTS * TILE_BYTES + number % TILE_SLOTS * 8; }
  __device__ __forceinline__ uint32_t empty(uint32_t number) const { return full(number) + TILE_SLOTS * 8; }
};
