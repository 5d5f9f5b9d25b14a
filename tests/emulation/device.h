// A CUDA block on one CPU thread: each of its threads is a fiber, and a shuffle or a barrier lets the others run first.
// Stands in for common.cuh and convert.cuh; what a kernel computes is then what its own source says, but for the single
// instructions below, whose meaning is written out here.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__
#define __shared__ static

constexpr int WARP = 32;

struct Index { unsigned x, y, z; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// -- Fibers.

namespace emulation {
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  int waits;  // barriers that it has reached
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current;
inline void (*kernel)(const void*);
inline const void* params;
inline uint32_t slots[1024];

// The others run before this fiber goes on. All threads of a block reach the same barriers here, in the same order, so
// that one turn of the scheduler is a barrier.
inline void barrier() {
  ++fibers[current].waits;
  swapcontext(&fibers[current].context, &scheduler);
}
inline void entry() {
  kernel(params);
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}
}  // namespace emulation

inline Index threadIdx, blockIdx;

inline void run_block(int threads) {
  using namespace emulation;
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(64 << 10);
    fiber.done = false;
    fiber.waits = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  for (int turn = 1;; ++turn) {
    int running = 0;
    for (current = 0; current < threads; ++current) {
      threadIdx = {unsigned(current), 0, 0};
      swapcontext(&scheduler, &fibers[current].context);
      running += !fibers[current].done;
      if (!fibers[current].done && fibers[current].waits != turn) abort();
    }
    if (running == 0) return;
    if (running != threads) abort();  // a barrier that not all reach: a hang, or worse, on a GPU
  }
}

inline void __syncthreads() { emulation::barrier(); }
template <typename T>
inline T __shfl_xor_sync(uint32_t, T value, int distance) {
  static_assert(sizeof(T) == 4);
  const int thread = threadIdx.x;
  memcpy(&emulation::slots[thread], &value, 4);
  emulation::barrier();
  memcpy(&value, &emulation::slots[thread ^ distance], 4);
  emulation::barrier();
  return value;
}
inline void grid_dependency_wait() {}
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
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return std::exp(x); }
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
inline uint32_t floats_to_e4m3(float low, float high) { return float_to_e4m3(low) | float_to_e4m3(high) << 8; }
inline float min_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::fmin(x, y); }
inline float max_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::fmax(x, y); }
