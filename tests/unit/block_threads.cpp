// A kernel on the CPU: a fiber for each thread of a block, one block after another.
//
// What the device gives its threads comes first, then the kernel itself, then what runs it. Asynchronous copies arrive when
// they are waited for, not before.
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#define __device__
#define __global__ static
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
using std::isnan;
using std::max;
using std::min;
constexpr int WARP = 32, WARPGROUP = 128, MAX_THREADS = 1024;
template <class T> static T min_of(T x, T y) { return min(x, y); }
constexpr size_t STACK = 1 << 16;
struct uint3 { unsigned x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
static uint3 threadIdx, blockIdx, gridDim;

static struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  struct Copy { float* target; const float* source; };
  std::vector<Copy> copies;
  bool done;
} fibers[MAX_THREADS];
static ucontext_t scheduler;
static int current, alive, alive_in_warp[MAX_THREADS / WARP];
static int arrived, arrived_in_warp[MAX_THREADS / WARP];
static unsigned turns, turns_of_warp[MAX_THREADS / WARP];
static uint64_t lanes[MAX_THREADS / WARP][WARP];

static void rest() {
  const int me = current;
  swapcontext(&fibers[me].context, &scheduler);
  current = me, threadIdx = {unsigned(me), 0, 0};
}
static void wait_for_all(int& count, const int& expected, unsigned& turn) {
  const unsigned before = turn;
  ++count;
  while (turn == before) {
    if (count == expected) {
      count = 0, ++turn;
      return;
    }
    rest();
  }
}
static void __syncthreads() { wait_for_all(arrived, alive, turns); }
static void __syncwarp() { wait_for_all(arrived_in_warp[current / WARP], alive_in_warp[current / WARP], turns_of_warp[current / WARP]); }

template <class T>
static void exchange(T mine, T (&all)[WARP]) {
  const int warp = current / WARP;
  memcpy(&lanes[warp][current % WARP], &mine, sizeof(T));
  __syncwarp();
  for (int i = 0; i < WARP; ++i) memcpy(&all[i], &lanes[warp][i], sizeof(T));
  __syncwarp();
}
template <class T> static T __shfl_xor_sync(unsigned, T x, int bits) { T all[WARP]; exchange(x, all); return all[current % WARP ^ bits]; }
template <class T> static T __shfl_sync(unsigned, T x, int lane) { T all[WARP]; exchange(x, all); return all[lane]; }
template <class T> static T __shfl_up_sync(unsigned, T x, int by) {
  T all[WARP];
  exchange(x, all);
  return all[max(0, current % WARP - by)];
}
template <class T> static unsigned __match_any_sync(unsigned, T x) {
  T all[WARP];
  exchange(x, all);
  unsigned same = 0;
  for (int i = 0; i < WARP; ++i) same |= unsigned(all[i] == x) << i;
  return same;
}
static unsigned __reduce_max_sync(unsigned, unsigned x) { unsigned all[WARP]; exchange(x, all); return *std::max_element(all, all + WARP); }
static unsigned __reduce_min_sync(unsigned, unsigned x) { unsigned all[WARP]; exchange(x, all); return *std::min_element(all, all + WARP); }
static int __popc(unsigned x) { return __builtin_popcount(x); }
static uint32_t __float_as_uint(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static float __uint_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static float rsqrtf(float x) { return 1.f / sqrtf(x); }

// In place of the header's assembly.
static void grid_dependency_wait() {}
static uint32_t round_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static uint32_t pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
static float reciprocal(float x) { return 1.f / x; }
static float round_tf32(float x) { return isnan(x) ? x : __uint_as_float((__float_as_uint(x) + 0x1000) & 0xffffe000); }
static float as_tf32(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000); }
static void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  float all[6][WARP];
  for (int i = 0; i < 4; ++i) exchange(as_tf32(a[i]), all[i]);
  exchange(as_tf32(b0), all[4]), exchange(as_tf32(b1), all[5]);
  const int g = current % WARP / 4, q = current % 4;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 8; ++k) {
      const int column = 2 * q + i % 2;
      c[i] += all[i / 2 + k / 4 * 2][g * 4 + k % 4] * all[4 + k / 4][column * 4 + k % 4];
    }
}
static void copy_async(float* target, const float* source, bool exists) {
  if (uintptr_t(target) % 16 || uintptr_t(source) % 16) abort();
  fibers[current].copies.push_back({target, exists ? source : nullptr});
}
static void copy_async_wait() {
  for (const auto& copy : fibers[current].copies) {
    if (copy.source != nullptr) memcpy(copy.target, copy.source, 16);
    else memset(copy.target, 0, 16);
  }
  fibers[current].copies.clear();
}
static float4* dynamic_shared;
@CODE@
static Params params;
static void thread_of_block() {
  @KERNEL@(params);
  fibers[current].done = true;
  --alive, --alive_in_warp[current / WARP];
  while (true) swapcontext(&fibers[current].context, &scheduler);
}

// 0, or 1 if threads wait for each other for ever.
extern "C" int run(const void* values, int blocks_x, int blocks_y, int threads, int smem_bytes) {
  memcpy(&params, values, sizeof params);
  std::vector<float4> memory(smem_bytes / 16 + 1);
  dynamic_shared = memory.data();
  gridDim = {unsigned(blocks_x), unsigned(blocks_y), 1};
  for (int block = 0; block < blocks_x * blocks_y; ++block) {
    memset(memory.data(), 0xff, memory.size() * 16);
    blockIdx = {unsigned(block % blocks_x), unsigned(block / blocks_x), 0};
    alive = threads, arrived = 0;
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[i];
      if (!fiber.stack) fiber.stack.reset(new char[STACK]);
      fiber.done = false, fiber.copies.clear();
      alive_in_warp[i / WARP] = WARP, arrived_in_warp[i / WARP] = 0;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = STACK;
      makecontext(&fiber.context, thread_of_block, 0);
    }
    for (int rounds = 0; alive > 0; ++rounds) {
      if (rounds > 1000000) return 1;
      for (int i = 0; i < threads; ++i) {
        if (fibers[i].done) continue;
        current = i, threadIdx = {unsigned(i), 0, 0};
        swapcontext(&scheduler, &fibers[i].context);
      }
    }
  }
  return 0;
}
