// Which tile a cluster computes next. Clusters take tiles round-robin; the raster walks `group` clusters along m,
// then one step along n, so that the tiles in flight share operands in L2.
#pragma once
#include "common.cuh"

struct TileRaster {
  int clusters_m;  // clusters that cover m
  int clusters_n;
  int group;       // clusters along m that are walked before n advances

  __device__ __forceinline__ int count() const { return clusters_m * clusters_n; }

  __device__ __forceinline__ void locate(int index, int& cluster_m, int& cluster_n) const {
    const int per_group = group * clusters_n;
    const int first_m = index / per_group * group;
    const int rows = min_of(group, clusters_m - first_m);
    const int in_group = index % per_group;
    cluster_m = first_m + in_group % rows;
    cluster_n = in_group / rows;
  }
};
