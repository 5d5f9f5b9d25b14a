// Zeros in the rows of D that belong to no group, by warps which have nothing else to do while the tiles are computed.
#pragma once
#include "common.cuh"
#include "epilogue.cuh"
#include "grouped.cuh"

// By a whole warp: zeros to `columns` elements; `aligned`: they start and end on multiples of 16 bytes.
template <class Element>
__device__ __forceinline__ void clear_row(Element* row, int columns, bool aligned) {
  constexpr int UNIT = 16 / sizeof(Element);
  const int lane = threadIdx.x % WARP;
  if (aligned)
    for (int i = lane * UNIT; i < columns; i += WARP * UNIT) *reinterpret_cast<uint4*>(row + i) = uint4{0, 0, 0, 0};
  else
    for (int i = lane; i < columns; i += WARP) row[i].bits = 0;
}

// By warps 0 to `warps` - 1 of the grid, all of whose lanes call it. Every row is one warp's, in turn.
template <Grouping GROUPING, class Element>
__device__ __forceinline__ void clear_padding(const GroupLayout& layout, const PlainMatrix& d, int n, bool aligned, int warp, int warps) {
  constexpr uint32_t ALL = 0xffffffff;
  const int lane = threadIdx.x % WARP;
  const auto clear = [&](int row) { clear_row(static_cast<Element*>(d.pointer) + row * d.row_stride, n, aligned); };
  if constexpr (GROUPING == INDEXED) {
    constexpr int LOOKED_AT = 8;  // rows at a time
    for (int base = warp * LOOKED_AT; base < layout.m; base += warps * LOOKED_AT) {
      const int row = base + lane;
      const bool padding = lane < LOOKED_AT && row < layout.m && uint32_t(layout.values[row]) >= uint32_t(layout.groups);
      for (uint32_t found = __ballot_sync(ALL, padding); found; found &= found - 1) clear(base + __ffs(found) - 1);
    }
  } else {
    // Padding lies between where a group ends, and where the next may start; behind the last, up to the end of D.
    int ahead = 0;  // padding rows of the groups before, for all warps to get as many
    for (int first = 0; first < layout.groups; first += WARP) {
      const int group = first + lane;
      int begin = 0, rows = 0;
      if (group < layout.groups) {
        begin = layout.clamped(layout.values[group]);
        const int end = group + 1 == layout.groups ? layout.m : min_of(layout.aligned(begin), layout.m);
        rows = end - begin;
      }
      for (uint32_t found = __ballot_sync(ALL, rows > 0); found; found &= found - 1) {
        const int holder = __ffs(found) - 1, gap = __shfl_sync(ALL, begin, holder), count = __shfl_sync(ALL, rows, holder);
        for (int i = (warp + warps - ahead) % warps; i < count; i += warps) clear(gap + i);
        ahead = (ahead + count) % warps;
      }
    }
  }
}
