// A CUDA block on one CPU thread: each of its threads is a fiber, and a shuffle or a barrier lets the others run first.
//
// Stands in for common.cuh and convert.cuh, and defines the functions of other headers that are assembly: what a kernel
// computes is then what its own source says, but for the single instructions below, whose meaning is written out here.
// Asynchronous copies arrive when they are waited for, and leave NaN from when they are issued. Dynamic shared memory is NaN when
// a block begins.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

using std::isnan;
using std::max;
using std::min;

constexpr int WARP = 32, WARPGROUP = 128;

struct uint3 { unsigned x, y, z; };
struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint3 threadIdx, blockIdx, gridDim;

// -- Fibers.

namespace emulation {
constexpr int MAX_THREADS = 1024;
constexpr size_t STACK = 64 << 10;

// Threads that wait until all of a group have come.
struct Barrier {
  int arrived;
  unsigned turn;
};
struct Copy {
  void* target;
  const void* source;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::deque<std::vector<Copy>> copies;  // that have not arrived, by group; the last one is not committed
  bool done;
};
inline Fiber fibers[MAX_THREADS];
inline ucontext_t scheduler;
inline Barrier block_barrier, warp_barriers[MAX_THREADS / WARP];
inline int current, block_threads;
inline int64_t progress;  // arrivals at barriers, and fibers that are done
inline uint64_t slots[MAX_THREADS];  // what lanes show each other
inline float4* dynamic_shared;
inline void (*kernel)(const void*);
inline const void* params;

inline void rest() {
  const int me = current;
  swapcontext(&fibers[me].context, &scheduler);
  current = me, threadIdx = {unsigned(me), 0, 0};
}
// Threads that have ended never come: on a GPU a shuffle of all lanes would read what they no longer say.
inline void wait(Barrier& barrier, int expected) {
  const unsigned turn = barrier.turn;
  ++progress;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0, ++barrier.turn;
    return;
  }
  while (barrier.turn == turn) rest();
}
inline void entry() {
  kernel(params);
  fibers[current].done = true;
  ++progress;
  while (true) swapcontext(&fibers[current].context, &scheduler);
}

// Whether all threads of the block come to their end.
inline bool run_block(int threads) {
  block_threads = threads, block_barrier = {};
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    fiber.done = false, fiber.copies.assign(1, {});
    warp_barriers[i / WARP] = {};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, entry, 0);
  }
  while (true) {
    const int64_t before = progress;
    int alive = 0;
    for (int warp = 0; warp < threads; warp += WARP) {
      // As far as it comes alone, so that what others have not read yet may be overwritten unless a barrier sees to it.
      for (int64_t seen = -1; seen != progress;) {
        seen = progress;
        for (int i = warp; i < warp + WARP; ++i) {
          if (fibers[i].done) continue;
          current = i, threadIdx = {unsigned(i), 0, 0};
          swapcontext(&scheduler, &fibers[i].context);
        }
      }
      for (int i = warp; i < warp + WARP; ++i) alive += !fibers[i].done;
    }
    if (alive == 0) return true;
    if (progress == before) return false;
  }
}

// 0, or 1 if a block's threads wait for ever.
inline int run(void (*entry)(const void*), const void* values, int grid_x, int grid_y, int threads, int smem_bytes) {
  if (threads > MAX_THREADS || threads % WARP) abort();
  std::vector<float4> memory(smem_bytes / 16 + 1);
  kernel = entry, params = values, dynamic_shared = memory.data();
  gridDim = {unsigned(grid_x), unsigned(grid_y), 1};
  for (int y = 0; y < grid_y; ++y)
    for (int x = 0; x < grid_x; ++x) {
      blockIdx = {unsigned(x), unsigned(y), 0};
      memset(memory.data(), 0xff, memory.size() * 16);
      if (!run_block(threads)) return 1;
    }
  return 0;
}
}  // namespace emulation

// -- What threads do together.

inline void __syncthreads() { emulation::wait(emulation::block_barrier, emulation::block_threads); }
inline void __syncwarp() { emulation::wait(emulation::warp_barriers[emulation::current / WARP], WARP); }

// A value of each lane of the warp, as the function sees it; then that function's result.
template <typename T, typename Function>
inline auto with_all_lanes(T mine, Function&& function) {
  static_assert(sizeof(T) <= 8);
  uint64_t* warp = emulation::slots + emulation::current / WARP * WARP;
  memcpy(&warp[emulation::current % WARP], &mine, sizeof(T));
  __syncwarp();
  const auto result = function([warp](int lane) {
    T value;
    memcpy(&value, &warp[lane], sizeof(T));
    return value;
  });
  __syncwarp();
  return result;
}
template <typename T> inline T __shfl_sync(unsigned, T x, int lane) {
  return with_all_lanes(x, [&](auto of) { return of(lane); });
}
template <typename T> inline T __shfl_xor_sync(unsigned, T x, int bits) { return __shfl_sync(0, x, emulation::current % WARP ^ bits); }
template <typename T> inline T __shfl_up_sync(unsigned, T x, int by) { return __shfl_sync(0, x, max(0, emulation::current % WARP - by)); }
template <typename T> inline unsigned __match_any_sync(unsigned, T x) {
  return with_all_lanes(x, [&](auto of) {
    unsigned same = 0;
    for (int lane = 0; lane < WARP; ++lane) same |= unsigned(of(lane) == x) << lane;
    return same;
  });
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  return with_all_lanes(x, [](auto of) {
    unsigned all = of(0);
    for (int lane = 1; lane < WARP; ++lane) all = max(all, of(lane));
    return all;
  });
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) { return ~__reduce_max_sync(0, ~x); }
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}
template <typename T>
inline constexpr T min_of(T x, T y) { return x < y ? x : y; }

// -- Single instructions and intrinsic functions.

inline float __uint_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline uint32_t __float_as_uint(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frsqrt_rn(float x) { return float(1 / std::sqrt(double(x))); }
inline float __frcp_rn(float x) { return 1 / x; }
template <typename Function>
inline float rounded(int mode, Function&& function) {
  std::fesetround(mode);
  const volatile float result = function();
  std::fesetround(FE_TONEAREST);
  return result;
}
inline float __fadd_rd(float x, float y) { return rounded(FE_DOWNWARD, [=] { return x + y; }); }
inline float __fadd_ru(float x, float y) { return rounded(FE_UPWARD, [=] { return x + y; }); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmaf_rd(float x, float y, float z) { return rounded(FE_DOWNWARD, [=] { return std::fma(x, y, z); }); }
inline float __fmaf_ru(float x, float y, float z) { return rounded(FE_UPWARD, [=] { return std::fma(x, y, z); }); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int bits) { return (uint64_t(high) << 32 | low) << bits >> 32; }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {  // without copies of sign bits
  const uint64_t both = uint64_t(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline int __float2int_rn(float x) {
  return std::isnan(x) ? 0 : x >= 0x1p31f ? INT32_MAX : x <= -0x1p31f ? INT32_MIN : int(std::nearbyint(x));
}

inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return std::isnan(x) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t float_to_half(float x) { _Float16 h = _Float16(x); uint16_t bits; memcpy(&bits, &h, 2); return bits; }
inline float half_to_float(uint16_t bits) { _Float16 h; memcpy(&h, &bits, 2); return float(h); }
inline float e4m3_to_float(uint32_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  float x = exponent ? std::ldexp(1 + mantissa / 8.f, exponent - 7) : std::ldexp(mantissa / 8.f, -6);
  if ((code & 0x7f) == 0x7f) x = NAN;
  return code & 0x80 ? -x : x;
}
inline uint32_t float_to_e4m3(float x) {
  if (std::isnan(x)) return 0x7f;
  const double t = std::fmin(std::fabs(double(x)), 448.0);
  int exponent = t == 0 ? -6 : std::ilogb(t);
  if (exponent < -6) exponent = -6;
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(t, 3 - exponent)), exponent - 3);  // ties to even
  uint32_t code = 0;
  while (code < 126 && e4m3_to_float(code) < rounded) ++code;
  return code | (std::signbit(x) ? 0x80 : 0);
}
inline uint32_t floats_to_e4m3(float a, float b, float c, float d) {
  return float_to_e4m3(a) | float_to_e4m3(b) << 8 | float_to_e4m3(c) << 16 | float_to_e4m3(d) << 24;
}
inline uint32_t e4m3_to_halves(uint32_t pair) {
  return float_to_half(e4m3_to_float(pair & 0xff)) | uint32_t(float_to_half(e4m3_to_float(pair >> 8 & 0xff))) << 16;
}
inline uint32_t floats_to_bf16(float low, float high) { return float_to_bf16(low) | uint32_t(float_to_bf16(high)) << 16; }
inline uint32_t floats_to_halves(float low, float high) { return float_to_half(low) | uint32_t(float_to_half(high)) << 16; }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline float sqrt_fast(float x) { return std::sqrt(x); }
inline uint32_t larger_halves(uint32_t x, uint32_t y) { return max(x & 0xffff, y & 0xffff) | max(x >> 16, y >> 16) << 16; }
inline float min_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::fmin(x, y); }
inline float max_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::fmax(x, y); }

// -- Those of fp4.cuh and epilogue.cuh; addresses in shared memory are counted from where the kernel says.

namespace emulation {
inline uint8_t* shared_space;
}
inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t nibbles) { return __byte_perm(low, high, nibbles); }
template <int N>
inline void load_shared_words(uint32_t address, uint32_t (&words)[N]) { memcpy(words, emulation::shared_space + address, 4 * N); }
inline uint32_t load_shared_byte(uint32_t address) { return emulation::shared_space[address]; }
template <bool TRANSPOSED>
inline void store_matrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  static_assert(!TRANSPOSED);
  const uint32_t mine[4] = {a, b, c, d};
  const int lane = emulation::current % WARP;
  with_all_lanes(address, [&](auto of) {
    for (int i = 0; i < 4; ++i) memcpy(emulation::shared_space + of(8 * i + lane / 4) + lane % 4 * 4, &mine[i], 4);
    return 0;
  });
}

// -- Those of warp.cuh.

inline float round_tf32(float x) { return std::isnan(x) ? x : __uint_as_float((__float_as_uint(x) + 0x1000) & 0xffffe000); }
inline void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  struct Operands { float a[4][WARP], b[2][WARP]; } all;
  const float mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (int i = 0; i < 6; ++i) {
    float (&target)[WARP] = i < 4 ? all.a[i] : all.b[i - 4];
    const float truncated = __uint_as_float(__float_as_uint(mine[i]) & 0xffffe000);  // of other bits the unit reads none
    with_all_lanes(truncated, [&](auto of) {
      for (int lane = 0; lane < WARP; ++lane) target[lane] = of(lane);
      return 0;
    });
  }
  const int g = emulation::current % WARP / 4, q = emulation::current % 4;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 8; ++k) c[i] += all.a[i / 2 + k / 4 * 2][g * 4 + k % 4] * all.b[k / 4][(2 * q + i % 2) * 4 + k % 4];
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  // Two of TF32's, of the pairs' first numbers and of their second ones: the order of a sum is the unit's own.
  for (int shift : {16, 0}) {
    const auto number = [shift](uint32_t pair) { return __uint_as_float(pair << shift & 0xffff0000); };
    mma_tf32(c, {number(a[0]), number(a[1]), number(a[2]), number(a[3])}, number(b0), number(b1));
  }
}
inline void copy_async(void* target, const void* source, bool exists) {
  if (uintptr_t(target) % 16 || uintptr_t(source) % 16) abort();
  memset(target, 0xff, 16);  // NaN for who reads what was there, or does not wait
  emulation::fibers[emulation::current].copies.back().push_back({target, exists ? source : nullptr});
}
inline void copy_async_commit() { emulation::fibers[emulation::current].copies.emplace_back(); }
template <int GROUPS_IN_FLIGHT>
inline void copy_async_wait() {
  auto& groups = emulation::fibers[emulation::current].copies;
  for (; groups.size() > GROUPS_IN_FLIGHT + 1; groups.pop_front())
    for (const auto& copy : groups.front()) {
      if (copy.source != nullptr) memcpy(copy.target, copy.source, 16);
      else memset(copy.target, 0, 16);
    }
}
