// Routing: from logits to scores, a token's experts, and their weights.
#pragma once
#include "warp.cuh"

constexpr float SUM_FLOOR = 1e-20f;
#define MINUS_INFINITY __uint_as_float(0xff800000)

enum Scores { SQRTSOFTPLUS, SIGMOID, SOFTMAX };

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bit = WARP / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(ALL_LANES, x, bit);
  return x;
}

// What softmax needs of a token: its greatest logit and the sum of exponentials.
struct Row {
  float largest, inverse_sum;
};

// Of logits whose index is that of their expert over 32, and the lane; minus infinity where there is no expert.
template <int PER_LANE>
__device__ __forceinline__ Row row_of(const float (&logits)[PER_LANE]) {
  float largest = MINUS_INFINITY, exponentials = 0;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) largest = fmaxf(largest, logits[i]);
#pragma unroll
  for (int bit = WARP / 2; bit > 0; bit /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, bit));
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) exponentials += logits[i] == MINUS_INFINITY ? 0.f : expf(logits[i] - largest);
  return {largest, 1.f / warp_sum(exponentials)};
}

__device__ __forceinline__ float sqrt_fast(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log(1 + e^x), within a few units in the last place: the greater of x and 0, and log(1 + t) = 2 artanh(t / (2 + t)) of a t up to 1,
// whose series has been fitted to that range (error of 5e-9).
__device__ __forceinline__ float softplus(float x) {
  const float t = expf(-fabsf(x)), s = t * reciprocal_fast(2.f + t), z = s * s;
  return fmaxf(x, 0.f) + s * fmaf(fmaf(fmaf(fmaf(0.28157778f, z, 0.27965158f), z, 0.40024595f), z, 0.66666322f), z, 2.f);
}

template <Scores SCORES>
__device__ __forceinline__ float score_of(float logit, const Row& row) {
  if constexpr (SCORES == SOFTMAX) return expf(logit - row.largest) * row.inverse_sum;
  if constexpr (SCORES == SIGMOID) return sigmoid(logit);
  return sqrt_fast(softplus(logit));
}

// Orders as floats do, NaN as the greatest; 0 is below all.
__device__ __forceinline__ uint32_t ordered(float x) {
  if (isnan(x)) return 0xffffffff;
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// Lane k's result: the expert of the k-th greatest key, of equals the first. Keys as in row_of, 0 where there is no expert.
template <int PER_LANE>
__device__ __forceinline__ int chosen_expert(uint32_t (&keys)[PER_LANE], int topk, int lane) {
  int expert = -1;
#pragma unroll 1
  for (int k = 0; k < topk; ++k) {
    uint32_t best = keys[0];
#pragma unroll
    for (int i = 1; i < PER_LANE; ++i) best = max(best, keys[i]);
    best = __reduce_max_sync(ALL_LANES, best);
    uint32_t chosen = PER_LANE * WARP;
#pragma unroll
    for (int i = PER_LANE - 1; i >= 0; --i) chosen = keys[i] == best ? i * WARP + lane : chosen;
    chosen = __reduce_min_sync(ALL_LANES, chosen);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) keys[i] = chosen == i * WARP + lane ? 0 : keys[i];
    if (lane == k) expert = chosen;
  }
  return expert;
}

// Lane k's expert of a token, as the table of ids has it; -1 where there is none.
template <typename Params>
__device__ __forceinline__ int expert_of_id(const Params& p, int64_t token, int lane) {
  const int64_t id = p.ids_are_long ? static_cast<const int64_t*>(p.input_ids)[token] : static_cast<const int32_t*>(p.input_ids)[token];
  const int expert = lane < p.topk && id >= 0 && id < p.vocabulary ? p.tid2eid[id * p.topk + lane] : -1;
  return expert >= 0 && expert < p.experts ? expert : -1;
}

// Lane k writes the token's k-th expert, and its score over the sum that softmax has, and others get.
template <Scores SCORES, typename Index, typename Params>
__device__ __forceinline__ void store_choice(const Params& p, int64_t token, int lane, int expert, float score) {
  float weight = expert >= 0 ? score : 0.f;
  if constexpr (SCORES != SOFTMAX) {
    const float sum = warp_sum(weight);  // a NaN stays one
    weight /= sum < SUM_FLOOR ? SUM_FLOOR : sum;
  }
  if (lane >= p.topk) return;
  static_cast<Index*>(p.indices)[token * p.topk + lane] = expert;
  p.weights[token * p.topk + lane] = expert >= 0 ? weight * p.route_scale : 0.f;
}
