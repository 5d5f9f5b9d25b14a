// Threads of an epilogue on the CPU: what the device gives them, then the header itself, then what runs it.
#include <pthread.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>
#define __device__
#define __forceinline__ inline
constexpr int WARP = 32, WARPGROUP = 128, MOST_WARPS = 12;
struct float2 { float x, y; };
static thread_local struct { int x; } threadIdx;
static thread_local int this_cta;
static char memory[2][1 << 18];
static pthread_barrier_t warps[2][MOST_WARPS], maths[2], ctas[2];
static float lanes[2][MOST_WARPS][32];
static void __syncwarp() { pthread_barrier_wait(&warps[this_cta][threadIdx.x / 32]); }
static void named_barrier_sync(int, int) { pthread_barrier_wait(&maths[this_cta]); }
static float __shfl_xor_sync(unsigned, float value, int bit) {
  float* mine = lanes[this_cta][threadIdx.x / 32];
  mine[threadIdx.x % 32] = value;
  __syncwarp();
  const float other = mine[threadIdx.x % 32 ^ bit];
  __syncwarp();
  return other;
}
static uint32_t __shfl_sync(unsigned, uint32_t value, int from) {  // of what is the same in all lanes
  static uint32_t words[2][MOST_WARPS][32];
  uint32_t* mine = words[this_cta][threadIdx.x / 32];
  mine[threadIdx.x % 32] = value;
  __syncwarp();
  if (mine[from] != value) abort();
  __syncwarp();
  return value;
}
template <class T> static T& shared(uint32_t address, int cta = this_cta) {
  if (address % sizeof(T)) abort();
  return *reinterpret_cast<T*>(memory[cta] + address);
}
struct Barrier { int expected, arrived, bytes; uint32_t phase; };
static std::map<std::pair<int, uint32_t>, Barrier> barriers;
static std::mutex mutex;
static void turn(Barrier& b) {
  if (b.arrived == b.expected && b.bytes == 0) b.arrived = 0, b.phase ^= 1;
}
static void barrier_init(uint32_t address, int arrivals) { barriers[{this_cta, address}] = {arrivals, 0, 0, 0}; }
static void barrier_arrive_expect(uint32_t address, uint32_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  Barrier& b = barriers.at({this_cta, address});
  b.bytes += bytes, ++b.arrived, turn(b);
}
static void send(uint32_t address, uint32_t barrier, int cta, float x, float y) {
  std::this_thread::yield();
  std::lock_guard<std::mutex> lock(mutex);
  shared<float>(address, cta) = x, shared<float>(address + 4, cta) = y;
  if (address % 8) abort();
  Barrier& b = barriers.at({cta, barrier});
  b.bytes -= 8, turn(b);
}
static void wait_for(uint32_t address, uint32_t parity) {
  while (true) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (barriers.at({this_cta, address}).phase != parity) return;
    }
    std::this_thread::yield();
  }
}
static float2 load_shared_pair(uint32_t address) { return {shared<float>(address), shared<float>(address + 4)}; }
static float __fdividef(float x, float y) { return x / y; }
#define __expf expf
static float __frcp_rn(float x) { return 1.f / x; }
static uint32_t __float_as_uint(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static float __uint_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static uint8_t e4m3(float x) {  // nearest even; of normal and subnormal numbers up to 448
  if (std::isnan(x)) return 0x7f;
  const float magnitude = fminf(fabsf(x), 448.f);
  int exponent;
  frexpf(magnitude, &exponent);
  const int step = (exponent < -5 || magnitude == 0 ? -5 : exponent) - 4;
  const int steps = int(nearbyintf(ldexpf(magnitude, -step)));
  const int bits = ((step + 9) << 3) + steps;  // a carry goes into the exponent
  return uint8_t(bits) | (std::signbit(x) ? 0x80 : 0);
}
struct BFloat16 { uint16_t bits; float value() const { return __uint_as_float(uint32_t(bits) << 16); } };
static uint32_t floats_to_bf16(float, float) { abort(); }
@CODE@
struct Problem {
  const float* product;  // [rows of B (MMA rows or columns), tokens], as [token, row of B]
  uint8_t* d;            // [token, column]
  int tokens, n, ctas;
};

template <bool SWAPPED, bool SWIGLU, int MMA_ROWS, int COLUMNS, int WARPGROUPS, int PARTS, int GROUP, bool UE8M0, int BYTES, int ROW_BYTES>
static void thread_of(int cta, int thread, const EpilogueSteps& steps, const Problem& p) {
  constexpr int WAVES = MMA_ROWS / 64 / WARPGROUPS, GATED_ROWS = SWAPPED && SWIGLU ? 2 : 1, GATED_COLUMNS = !SWAPPED && SWIGLU ? 2 : 1;
  constexpr int HALVES = 2 / GATED_ROWS, STAGED = COLUMNS / GATED_COLUMNS, STAGED_ROWS = 64 / GATED_ROWS;
  using Shape = QuantizerShape<SWAPPED, HALVES, STAGED, WAVES, WARPGROUPS, PARTS, GROUP, UE8M0>;
  static_assert(Shape::BYTES == BYTES);
  this_cta = cta, threadIdx.x = thread;
  const Quantizer<Shape> quantizer{1 << 17};
  if (thread == 0) quantizer.init();
  pthread_barrier_wait(&ctas[0]);
  const int lane = thread % 32, warp = thread / 32 % 4, warpgroup = thread / 128, columns = p.n / (GATED_ROWS * GATED_COLUMNS);
  for (int tile = 0; tile < @TILES@; ++tile) {
    // The same tokens and other columns in the CTAs; from tile to tile other tokens.
    const int token0 = tile * (SWAPPED ? COLUMNS : MMA_ROWS), weight0 = cta * (SWAPPED ? MMA_ROWS : COLUMNS);
    const int tile_row0 = SWAPPED ? weight0 : token0, column0 = SWAPPED ? token0 : weight0, wave_row0 = tile_row0 + warpgroup * WAVES * 64;
    float values[WAVES][COLUMNS / 2];
    for (int wave = 0; wave < WAVES; ++wave)
      for (int v = 0; v < COLUMNS / 2; ++v) {
        const int row = wave_row0 + wave * 64 + warp * 16 + lane / 4 + v / 2 % 2 * 8, column = column0 + v / 4 * 8 + lane % 4 * 2 + v % 2;
        const int token = SWAPPED ? column : row, weight = SWAPPED ? row : column;
        values[wave][v] = token < p.tokens && weight < p.n ? p.product[token * p.n + weight] : NAN;
      }
    for (int wave = 0; wave < WAVES; ++wave) {
      const int row0 = wave_row0 + wave * 64;
      multiply_by_alpha<COLUMNS / 2>(values[wave], steps, 0);
      add_bias<SWAPPED, COLUMNS>(values[wave], steps, 0, row0, column0, p.n);
      if constexpr (SWIGLU) apply_swiglu<SWAPPED, COLUMNS>(values[wave], steps.limit);
      multiply_by_row_weights<SWAPPED, HALVES, STAGED>(values[wave], steps, 0, row0 / GATED_ROWS, column0 / GATED_COLUMNS, p.tokens);
      clear_behind<SWAPPED, HALVES, STAGED>(values[wave], SWAPPED ? row0 / GATED_ROWS : column0 / GATED_COLUMNS, columns);
    }
    quantizer.run(values, steps, 0, SWAPPED ? column0 : wave_row0, SWAPPED ? wave_row0 / GATED_ROWS : column0 / GATED_COLUMNS, p.tokens, columns, PARTS > 1 ? cta : 0);
    for (int wave = 0; wave < WAVES; ++wave) {
      const uint32_t staging = warpgroup * 8192;
      stage_fragment<Float8, SWAPPED, HALVES, STAGED, ROW_BYTES>(staging, values[wave]);
      pthread_barrier_wait(&ctas[0]);
      const int height = SWAPPED ? STAGED : 64, width = SWAPPED ? STAGED_ROWS : STAGED;
      const int d_row0 = SWAPPED ? column0 : wave_row0 + wave * 64, d_column0 = SWAPPED ? (wave_row0 + wave * 64) / GATED_ROWS : column0 / GATED_COLUMNS;
      for (int i = thread % 128; i < height * width; i += 128) {
        const int row = i / width, byte = i % width;
        const uint32_t at = staging + byte / ROW_BYTES * height * ROW_BYTES + swizzled<ROW_BYTES>(row, byte % ROW_BYTES / 16) + byte % 16;
        if (d_row0 + row < p.tokens && d_column0 + byte < columns) p.d[(d_row0 + row) * columns + d_column0 + byte] = shared<uint8_t>(at);
      }
      pthread_barrier_wait(&ctas[0]);
    }
  }
}

extern "C" void run(int which, const EpilogueSteps* steps, const Problem* p) {
  static void (*const kinds[])(int, int, const EpilogueSteps&, const Problem&) = {@KINDS@};
  static const int warpgroups[] = {@WARPGROUPS@};
  const int threads = warpgroups[which] * 128;
  pthread_barrier_init(&ctas[0], nullptr, p->ctas * threads);
  for (int cta = 0; cta < p->ctas; ++cta) pthread_barrier_init(&maths[cta], nullptr, threads);
  for (int cta = 0; cta < p->ctas; ++cta)
    for (int warp = 0; warp < threads / 32; ++warp) pthread_barrier_init(&warps[cta][warp], nullptr, 32);
  std::vector<std::thread> all;
  for (int i = 0; i < p->ctas * threads; ++i) all.emplace_back(kinds[which], i / threads, i % threads, std::cref(*steps), std::cref(*p));
  for (auto& one : all) one.join();
}
