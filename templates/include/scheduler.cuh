// Which tile a cluster computes next. Clusters take tiles round-robin; the raster walks `group` clusters along m,
// then one step along n, so that the tiles in flight share operands in L2.
#pragma once
#include "common.cuh"

// Division by a number that the host knows: a product and a shift, exact for dividends of 31 bits. The hardware has no integer
// division; what the compiler makes of one takes some 200 cycles.
struct Divisor {
  uint32_t multiplier, shift;  // ceil(2^(31 + shift) / divisor), ceil(log2(divisor))

  __device__ __forceinline__ int divide(int dividend) const { return __umulhi(2 * dividend, multiplier) >> shift; }
};

struct TileRaster {
  int clusters_m;  // clusters that cover m
  int clusters_n;
  int group;       // clusters along m that are walked before n advances
  int last_group;  // the same in the last group
  Divisor per_group, by_group, by_last_group;  // clusters of one group; group; last_group

  __device__ __forceinline__ int count() const { return clusters_m * clusters_n; }

  __device__ __forceinline__ void locate(int index, int& cluster_m, int& cluster_n) const {
    const int which = per_group.divide(index);
    const int first_m = which * group, first = first_m * clusters_n;
    const int in_group = index - first;
    const bool last = first_m + group > clusters_m;
    cluster_n = (last ? by_last_group : by_group).divide(in_group);
    cluster_m = first_m + in_group - cluster_n * (last ? last_group : group);
  }
};
