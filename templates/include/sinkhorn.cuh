// Hyper-connections: from a token's 24 mixes to the weights of its 4 streams.
#pragma once
#include "warp.cuh"

constexpr int STREAMS = 4;
constexpr int MIXES = (2 + STREAMS) * STREAMS;

// Makes rows and columns of `c` sum to 1 in turn, columns last. One thread does a whole matrix: the chain of normalizations
// is what takes the time, and between lanes each would wait for shuffles.
__device__ __forceinline__ void sinkhorn(float (&c)[STREAMS][STREAMS], int iterations, float eps) {
#pragma unroll
  for (int j = 0; j < STREAMS; ++j) {  // softmax of each row
    const float largest = fmaxf(fmaxf(c[j][0], c[j][1]), fmaxf(c[j][2], c[j][3]));
    float sum = 0;
#pragma unroll
    for (int k = 0; k < STREAMS; ++k) sum += c[j][k] = expf(c[j][k] - largest);
    const float inverse = reciprocal_fast(sum);
#pragma unroll
    for (int k = 0; k < STREAMS; ++k) c[j][k] = fmaf(c[j][k], inverse, eps);
  }
  for (int i = 0;;) {
#pragma unroll
    for (int k = 0; k < STREAMS; ++k) {
      const float inverse = reciprocal_fast(((c[0][k] + c[1][k]) + (c[2][k] + c[3][k])) + eps);
#pragma unroll
      for (int j = 0; j < STREAMS; ++j) c[j][k] *= inverse;
    }
    if (++i >= iterations) break;
#pragma unroll
    for (int j = 0; j < STREAMS; ++j) {
      const float inverse = reciprocal_fast(((c[j][0] + c[j][1]) + (c[j][2] + c[j][3])) + eps);
#pragma unroll
      for (int k = 0; k < STREAMS; ++k) c[j][k] *= inverse;
    }
  }
}

// From the logits of the matrix among the streams to the matrix.
__device__ __forceinline__ void make_doubly_stochastic(float (&c)[STREAMS][STREAMS], int iterations, float eps, float4* comb) {
  sinkhorn(c, iterations, eps);
#pragma unroll
  for (int j = 0; j < STREAMS; ++j) comb[j] = {c[j][0], c[j][1], c[j][2], c[j][3]};
}
