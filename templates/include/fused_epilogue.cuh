// What may follow a product before D is stored: alpha, bias, SwiGLU, a weight for each row, quantization to FP8.
//
// The steps that a call does without are neutral: a null pointer, an infinite limit. Code depends on SwiGLU and on the type of D
// alone. All of it works on accumulators in place, in the fragment that the MMA leaves (epilogue.cuh).
//
// SwiGLU. B's rows are gate's and up's in runs of 8, so that a thread holds both of an output:
//   columns of the MMA are B's rows:  values[8j + i] is gate, values[8j + 4 + i] up; out comes a fragment of half as many columns;
//   rows of the MMA are (swapped):    values[4j + i] is gate, values[4j + 2 + i] up; out comes one of 32 rows: row 8 * warp + lane / 4.
// Both are described by (HALVES, values): value (2 * HALVES * j + 2 * h + i) lies in MMA row 8 * (HALVES * warp + h) + lane / 4 and
// column 8j + 2 * (lane % 4) + i, of what is left after SwiGLU.
//
// Quantization. A scale covers 128 columns of D: 256 of the product with SwiGLU. Promoted sums of 64 x 256 leave no registers, so
// tiles stay as narrow as they are without, and two CTAs of a cluster side by side make up the scale's columns: before they
// quantize they send each other their rows' largest magnitudes (st.async into the other's shared memory, counted by an mbarrier
// there). That is 4 bytes a row, while operands and rings are those of any other tile. Swapped, D's columns lie along MMA rows, which
// warps share: all of both CTAs' warps send, and where one CTA has all of a group's columns, its warps meet at a named barrier (st.async
// is illegal in a launch without clusters). Slots alternate: who sends for the second tile from here has received for the next one,
// which is sent after this one was read.
#pragma once
#include "common.cuh"
#include "epilogue.cuh"
#include "pipeline.cuh"

struct EpilogueSteps {
  const float* alpha;        // null: alpha_value
  const void* bias;          // of B's rows, FP32 or BF16; null: none
  const float* row_weights;  // of A's rows; null: none
  void* scales;              // of a quantized D: FP32, one for 128 columns, or UE8M0, four for 32 columns each in a word
  int64_t scales_stride, scales_plane_stride;                           // words between columns, and between planes
  int32_t alpha_group_stride, bias_group_stride, weights_plane_stride;  // elements
  int32_t bias_is_bf16;
  float alpha_value, limit;

  __device__ __forceinline__ float alpha_of(int group) const { return alpha ? alpha[group * alpha_group_stride] : alpha_value; }

  __device__ __forceinline__ float bias_at(int group, int index, int end) const {
    float value = 0.f;  // volatile: loads of many columns at once would spill
    const int64_t at = int64_t(group) * bias_group_stride + index;
    if (index < end) {
      if (bias_is_bf16) {
        uint16_t bits;
        asm volatile("ld.global.b16 %0, [%1];" : "=h"(bits) : "l"(static_cast<const uint16_t*>(bias) + at));
        value = BFloat16{bits}.value();
      } else {
        asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(static_cast<const float*>(bias) + at));
      }
    }
    return value;
  }

  __device__ __forceinline__ float weight_at(int plane, int row, int end) const {
    float value = 0.f;
    if (row < end) asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(row_weights + int64_t(plane) * weights_plane_stride + row));
    return value;
  }
};

template <int COUNT>
__device__ __forceinline__ void multiply_by_alpha(float* values, const EpilogueSteps& steps, int group) {
  const float alpha = steps.alpha_of(group);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) values[i] *= alpha;
}

// Adds the bias of columns of D to COLUMNS columns of the product at MMA position (row0, column0); n ends B's rows.
template <bool SWAPPED, int COLUMNS>
__device__ __forceinline__ void add_bias(float* values, const EpilogueSteps& steps, int group, int row0, int column0, int n) {
  if (!steps.bias) return;
  const int row = row0 + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4, column = column0 + threadIdx.x % 4 * 2;
  if constexpr (SWAPPED) {
    const float upper = steps.bias_at(group, row, n), lower = steps.bias_at(group, row + 8, n);
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) values[4 * j] += upper, values[4 * j + 1] += upper, values[4 * j + 2] += lower, values[4 * j + 3] += lower;
  } else {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
      const float left = steps.bias_at(group, column + 8 * j, n), right = steps.bias_at(group, column + 8 * j + 1, n);
      values[4 * j] += left, values[4 * j + 1] += right, values[4 * j + 2] += left, values[4 * j + 3] += right;
    }
  }
}

// silu(gate) * up. Comparisons let NaN pass, as fminf does not.
__device__ __forceinline__ float gated(float gate, float up, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return __fdividef(gate, 1.f + __expf(-gate)) * up;
}

template <bool SWAPPED, int COLUMNS>
__device__ __forceinline__ void apply_swiglu(float* values, float limit) {
  constexpr int RUN = SWAPPED ? 2 : 4;  // a gate's values, which up's follow
#pragma unroll
  for (int i = 0; i < COLUMNS / 4; ++i) values[i] = gated(values[i / RUN * 2 * RUN + i % RUN], values[i / RUN * 2 * RUN + RUN + i % RUN], limit);
}

// Multiplies each row of D by its weight; (row0, column0) is the fragment's position after SwiGLU.
template <bool SWAPPED, int HALVES, int COLUMNS>
__device__ __forceinline__ void multiply_by_row_weights(float* values, const EpilogueSteps& steps, int plane, int row0, int column0, int m) {
  if (!steps.row_weights) return;
  const int row = row0 + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4, column = column0 + threadIdx.x % 4 * 2;
  if constexpr (SWAPPED) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
      const float left = steps.weight_at(plane, column + 8 * j, m), right = steps.weight_at(plane, column + 8 * j + 1, m);
#pragma unroll
      for (int h = 0; h < HALVES; ++h) values[2 * (HALVES * j + h)] *= left, values[2 * (HALVES * j + h) + 1] *= right;
    }
  } else {
    const float upper = steps.weight_at(plane, row, m), lower = steps.weight_at(plane, row + 8, m);
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) values[4 * j] *= upper, values[4 * j + 1] *= upper, values[4 * j + 2] *= lower, values[4 * j + 3] *= lower;
  }
}

// Columns of D that are not there count as zeros in their scale's group. In D's columns: this thread's fragment begins at `column0`.
template <bool SWAPPED, int HALVES, int COLUMNS>
__device__ __forceinline__ void clear_behind(float* values, int column0, int columns_end) {
  const int warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP;
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
    for (int h = 0; h < HALVES; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = column0 + (SWAPPED ? 8 * (HALVES * warp + h) + lane / 4 : 8 * j + 2 * (lane % 4) + i);
        if (column >= columns_end) values[2 * (HALVES * j + h) + i] = 0.f;
      }
}

// -- Quantization.

struct Float8 {
  uint8_t bits;
};

__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

// The larger magnitude; NaN if either is.
__device__ __forceinline__ float max_magnitude(float x, float y) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(fabsf(x)), "f"(fabsf(y)));
  return larger;
}

template <int FIRST, int LAST>  // over lanes whose numbers differ in these bits
__device__ __forceinline__ float max_of_lanes(float magnitude) {
#pragma unroll
  for (int bit = FIRST; bit <= LAST; bit *= 2) magnitude = max_magnitude(magnitude, __shfl_xor_sync(0xffffffff, magnitude, bit));
  return magnitude;
}

// A group's scale from its largest magnitude, and what its values are multiplied by.
template <bool UE8M0>
struct GroupScale {
  static constexpr float SMALLEST_AMAX = 1e-4f, E4M3_MAX = 448.f;
  float scale, inverse;

  __device__ __forceinline__ explicit GroupScale(float amax) {
    scale = (amax < SMALLEST_AMAX ? SMALLEST_AMAX : amax) * (1.f / E4M3_MAX);
    if constexpr (UE8M0) {  // up to a power of two; Inf and NaN to the largest
      const uint32_t bits = __float_as_uint(scale) & 0x7fffffff, exponent = (bits >> 23) + ((bits & 0x7fffff) != 0);
      scale = __uint_as_float((exponent < 1 ? 1 : exponent > 254 ? 254 : exponent) << 23);
    }
    inverse = __frcp_rn(scale);
  }
  // Inf becomes NaN, where the conversion would saturate.
  __device__ __forceinline__ float apply(float value) const { return UE8M0 ? fmaf(value, 0.f, value * inverse) : value * inverse; }
};

// The scale of D's row `row` and group `group` of so many.
template <bool UE8M0>
__device__ __forceinline__ void store_scale(const EpilogueSteps& steps, int plane, int row, int group, int groups, float scale) {
  const int64_t first = plane * steps.scales_plane_stride + row;
  if constexpr (UE8M0) {
    uint8_t* bytes = static_cast<uint8_t*>(steps.scales) + (first + group / 4 * steps.scales_stride) * 4;
    bytes[group % 4] = __float_as_uint(scale) >> 23;
    if (group == groups - 1)  // unused bytes are those of 1
      for (int unused = group % 4 + 1; unused < 4; ++unused) bytes[unused] = 127;
  } else {
    static_cast<float*>(steps.scales)[first + group * steps.scales_stride] = scale;
  }
}

constexpr int MATH_BARRIER = 4;  // a named barrier of all math warpgroups, each of which has one of its own before this

// Sends two words to the same offset of a CTA of the cluster, and counts them at its mbarrier.
__device__ __forceinline__ void send_pair(uint32_t address, uint32_t barrier, uint32_t cta, float x, float y) {
  asm volatile(
      "{\n .reg .b32 there, counted;\n mapa.shared::cluster.u32 there, %0, %2;\n mapa.shared::cluster.u32 counted, %1, %2;\n"
      " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%3, %4}, [counted];\n}" ::"r"(address),
      "r"(barrier), "r"(cta), "f"(x), "f"(y)
      : "memory");
}

__device__ __forceinline__ void store_shared_pair(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// By whole warps, at the same barrier: where the compiler does not know that, it takes all that follows for divergent code, and
// descriptors of MMAs leave the uniform registers.
__device__ __forceinline__ void barrier_wait_for_cluster(uint32_t barrier, uint32_t parity) {
  barrier = __shfl_sync(0xffffffff, barrier, 0), parity = __shfl_sync(0xffffffff, parity, 0);
  asm volatile(
      "{\n .reg .pred done;\n WAIT:\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n @done bra DONE;\n bra WAIT;\n"
      " DONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Which part of the kernel's shape decides how D is quantized.
template <bool SWAPPED_, int HALVES_, int COLUMNS_, int WAVES_, int WARPGROUPS_, int PARTS_, int GROUP_, bool UE8M0_>
struct QuantizerShape {
  static constexpr bool SWAPPED = SWAPPED_, UE8M0 = UE8M0_;
  static constexpr int HALVES = HALVES_, COLUMNS = COLUMNS_;  // of the fragment after SwiGLU
  static constexpr int WAVES = WAVES_, WARPGROUPS = WARPGROUPS_;
  static constexpr int PARTS = PARTS_;  // CTAs side by side that make up a group's columns
  static constexpr int GROUP = GROUP_;  // columns of D that share a scale
  static constexpr int VALUES = COLUMNS / 4 * HALVES;  // of a wave and thread
  // Swapped, a group is made up by warps, with all their waves where these are in one group.
  static constexpr int PLANES = UE8M0 ? WAVES : 1, WAVES_OF_GROUP = WAVES / PLANES;
  static constexpr int WARPS = WARPGROUPS * 4, SOURCES = PARTS * WARPS;
  static constexpr int COLUMNS_OF_SOURCE = 8 * HALVES * WAVES_OF_GROUP, SOURCES_OF_GROUP = GROUP / COLUMNS_OF_SOURCE;
  // Shared memory: two slots of magnitudes, their barriers, and each warp's count of exchanges, which registers have no room for.
  static constexpr int SLOT = SWAPPED ? PLANES * SOURCES * COLUMNS * 4 : WARPS * WAVES * 16 * 4;  // bytes
  static constexpr int BARRIERS = PARTS == 1 ? 0 : SWAPPED ? 1 : WARPS;                           // of a slot
  static constexpr bool EXCHANGES = SWAPPED || PARTS > 1;
  static constexpr int COUNTS_OFFSET = 2 * (SLOT + BARRIERS * 8), BYTES = EXCHANGES ? COUNTS_OFFSET + WARPS * 4 : 0;
};

template <class Shape>
struct Quantizer {
  uint32_t base;  // shared address, aligned to 8

  // By one thread, before any other uses it.
  __device__ __forceinline__ void init() const {
    if constexpr (Shape::EXCHANGES) {
      for (int barrier = 0; barrier < 2 * Shape::BARRIERS; ++barrier) barrier_init(base + 2 * Shape::SLOT + barrier * 8, 1);
      for (int warp = 0; warp < Shape::WARPS; ++warp) asm volatile("st.shared.b32 [%0], %1;" ::"r"(count(warp)), "r"(0) : "memory");
    }
  }

  // Quantizes all waves' values in place, up to rounding, and stores the scales. Whole warps, and swapped all of the math warpgroups.
  // (row0, column0): position of the warpgroup's first wave in D; rows_end, columns_end: D's ends; part: this CTA's place among PARTS.
  template <int STRIDE>
  __device__ __forceinline__ void run(float (&values)[Shape::WAVES][STRIDE], const EpilogueSteps& steps, int plane, int row0, int column0, int rows_end,
                                      int columns_end, int part) const {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int groups = (columns_end + Shape::GROUP - 1) / Shape::GROUP;
    uint32_t number = 0;
    if constexpr (Shape::EXCHANGES) {
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(number) : "r"(count(warp)) : "memory");
      __syncwarp();
      if (lane == 0) asm volatile("st.shared.b32 [%0], %1;" ::"r"(count(warp)), "r"(number + 1) : "memory");
    }
    const uint32_t slot = base + number % 2 * Shape::SLOT, barriers = base + 2 * Shape::SLOT + number % 2 * Shape::BARRIERS * 8, parity = number / 2 % 2;
    if constexpr (Shape::SWAPPED) {
      // (row0, column0) is that of the warpgroup's MMA rows: columns of D.
      constexpr int PLANE = Shape::SOURCES * Shape::COLUMNS * 4;
      const int source = part * Shape::WARPS + warp;
      if (Shape::PARTS > 1 && threadIdx.x == 0) barrier_arrive_expect(barriers, Shape::SLOT);
#pragma unroll
      for (int p = 0; p < Shape::PLANES; ++p)
#pragma unroll
        for (int j = 0; j < Shape::COLUMNS / 8; ++j) {
          float left = 0.f, right = 0.f;
#pragma unroll
          for (int wave = p; wave < p + Shape::WAVES_OF_GROUP; ++wave)
#pragma unroll
            for (int h = 0; h < Shape::HALVES; ++h) {
              const float* v = &values[wave][2 * (Shape::HALVES * j + h)];
              left = max_magnitude(left, v[0]), right = max_magnitude(right, v[1]);
            }
          left = max_of_lanes<4, 16>(left), right = max_of_lanes<4, 16>(right);
          if (lane / 4 == j % 8) {
            const uint32_t at = slot + p * PLANE + (source * Shape::COLUMNS + 8 * j + lane % 4 * 2) * 4;
            if constexpr (Shape::PARTS > 1) {
#pragma unroll
              for (int cta = 0; cta < Shape::PARTS; ++cta) send_pair(at, barriers, cta, left, right);
            } else {
              store_shared_pair(at, left, right);
            }
          }
        }
      if constexpr (Shape::PARTS > 1)
        barrier_wait_for_cluster(barriers, parity);
      else
        named_barrier_sync(MATH_BARRIER, Shape::WARPS * WARP);
      const int first_source = source / Shape::SOURCES_OF_GROUP * Shape::SOURCES_OF_GROUP;
#pragma unroll
      for (int p = 0; p < Shape::PLANES; ++p) {
        // The group's place: of the columns of all sources from the first part's on.
        const int column = column0 + p * Shape::WAVES_OF_GROUP * 32 * Shape::HALVES + (warp % 4) * 8 * Shape::HALVES, group = column / Shape::GROUP;
        const bool stores = source == first_source && group < groups && lane < 4;
#pragma unroll
        for (int j = 0; j < Shape::COLUMNS / 8; ++j) {
          float left = 0.f, right = 0.f;
#pragma unroll
          for (int i = 0; i < Shape::SOURCES_OF_GROUP; ++i) {
            const float2 magnitudes = load_shared_pair(slot + p * PLANE + ((first_source + i) * Shape::COLUMNS + 8 * j + lane % 4 * 2) * 4);
            left = max_magnitude(left, magnitudes.x), right = max_magnitude(right, magnitudes.y);
          }
          const GroupScale<Shape::UE8M0> left_scale(left), right_scale(right);
          const int row = row0 + 8 * j + lane % 4 * 2;
          if (stores && row < rows_end) store_scale<Shape::UE8M0>(steps, plane, row, group, groups, left_scale.scale);
          if (stores && row + 1 < rows_end) store_scale<Shape::UE8M0>(steps, plane, row + 1, group, groups, right_scale.scale);
#pragma unroll
          for (int wave = p; wave < p + Shape::WAVES_OF_GROUP; ++wave)
#pragma unroll
            for (int h = 0; h < Shape::HALVES; ++h) {
              float* v = &values[wave][2 * (Shape::HALVES * j + h)];
              v[0] = left_scale.apply(v[0]), v[1] = right_scale.apply(v[1]);
            }
        }
      }
    } else {
      constexpr int WIDTH = Shape::COLUMNS < Shape::GROUP ? Shape::COLUMNS : Shape::GROUP;  // of a group, in this tile
      float magnitudes[Shape::WAVES][Shape::COLUMNS / WIDTH][2];
#pragma unroll
      for (int wave = 0; wave < Shape::WAVES; ++wave)
#pragma unroll
        for (int g = 0; g < Shape::COLUMNS / WIDTH; ++g)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float magnitude = 0.f;
#pragma unroll
            for (int j = g * WIDTH / 8; j < (g + 1) * WIDTH / 8; ++j)
              magnitude = max_magnitude(magnitude, max_magnitude(values[wave][4 * j + 2 * h], values[wave][4 * j + 2 * h + 1]));
            magnitudes[wave][g][h] = max_of_lanes<1, 2>(magnitude);
          }
      if constexpr (Shape::PARTS > 1) {
        // Each warp with the same warp of the other CTA: a pair of rows 8 apart is 8 bytes.
        static_assert(Shape::PARTS == 2 && WIDTH == Shape::COLUMNS);
        const uint32_t barrier = barriers + warp * 8, mine = slot + (warp * Shape::WAVES * 8 + lane / 4) * 8;
        if (lane == 0) barrier_arrive_expect(barrier, Shape::WAVES * 16 * 4);
#pragma unroll
        for (int wave = 0; wave < Shape::WAVES; ++wave)
          if (lane % 4 == 0) send_pair(mine + wave * 64, barrier, part ^ 1, magnitudes[wave][0][0], magnitudes[wave][0][1]);
        barrier_wait_for_cluster(barrier, parity);
#pragma unroll
        for (int wave = 0; wave < Shape::WAVES; ++wave) {
          const float2 theirs = load_shared_pair(mine + wave * 64);
          magnitudes[wave][0][0] = max_magnitude(magnitudes[wave][0][0], theirs.x), magnitudes[wave][0][1] = max_magnitude(magnitudes[wave][0][1], theirs.y);
        }
      }
#pragma unroll
      for (int wave = 0; wave < Shape::WAVES; ++wave)
#pragma unroll
        for (int g = 0; g < Shape::COLUMNS / WIDTH; ++g)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const GroupScale<Shape::UE8M0> scale(magnitudes[wave][g][h]);
            const int row = row0 + wave * 64 + warp % 4 * 16 + lane / 4 + 8 * h, group = column0 / Shape::GROUP + g;
            if (lane % 4 == 0 && part == 0 && row < rows_end && group < groups) store_scale<Shape::UE8M0>(steps, plane, row, group, groups, scale.scale);
#pragma unroll
            for (int j = g * WIDTH / 8; j < (g + 1) * WIDTH / 8; ++j)
#pragma unroll
              for (int i = 0; i < 2; ++i) values[wave][4 * j + 2 * h + i] = scale.apply(values[wave][4 * j + 2 * h + i]);
          }
    }
  }

 private:
  __device__ __forceinline__ uint32_t count(int warp) const { return base + Shape::COUNTS_OFFSET + warp * 4; }
};

// As stage_tile, for what SwiGLU or quantization leaves: COLUMNS columns on the MMA's N side, 32 * HALVES rows on its M side.
template <class Element, bool SWAPPED, int HALVES, int COLUMNS, int ROW_BYTES>
__device__ __forceinline__ void stage_fragment(uint32_t staging, const float* values) {
  const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
  constexpr uint32_t SIZE = sizeof(Element), SLAB = (SWAPPED ? COLUMNS : 64) * ROW_BYTES;
  const auto place = [&](uint32_t row, uint32_t column) {  // in D
    const uint32_t byte = column * SIZE;
    return staging + byte / ROW_BYTES * SLAB + swizzled<ROW_BYTES>(row, byte % ROW_BYTES / 16) + byte % 16;
  };
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      const float left = values[2 * (HALVES * j + h)], right = values[2 * (HALVES * j + h) + 1];
      const uint32_t along = 8 * (HALVES * warp + h) + lane / 4, across = 8 * j + 2 * (lane % 4);
      if constexpr (SIZE == 4) {
        if constexpr (SWAPPED) {
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(place(across, along)), "f"(left) : "memory");
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(place(across + 1, along)), "f"(right) : "memory");
        } else {
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(place(along, across)), "f"(left), "f"(right) : "memory");
        }
      } else {
        const uint32_t packed = SIZE == 2 ? floats_to_bf16(left, right) : pack_e4m3(left, right);
        if constexpr (!SWAPPED && SIZE == 2) {
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(place(along, across)), "r"(packed) : "memory");
        } else if constexpr (!SWAPPED) {
          asm volatile("st.shared.b16 [%0], %1;" ::"r"(place(along, across)), "h"(uint16_t(packed)) : "memory");
        } else if constexpr (SIZE == 2) {
          asm volatile("st.shared.b16 [%0], %1;" ::"r"(place(across, along)), "h"(uint16_t(packed)) : "memory");
          asm volatile("st.shared.b16 [%0], %1;" ::"r"(place(across + 1, along)), "h"(uint16_t(packed >> 16)) : "memory");
        } else {
          asm volatile("st.shared.b8 [%0], %1;" ::"r"(place(across, along)), "r"(packed & 0xff) : "memory");
          asm volatile("st.shared.b8 [%0], %1;" ::"r"(place(across + 1, along)), "r"(packed >> 8) : "memory");
        }
      }
    }
}
