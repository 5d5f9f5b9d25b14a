// Types that NVRTC does not predefine, and the small things that every kernel uses.
#pragma once

using int32_t = int;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

constexpr int WARP = 32;       // threads
constexpr int WARPGROUP = 128;  // threads

template <typename T>
__device__ __forceinline__ constexpr T min_of(T x, T y) { return x < y ? x : y; }

// A number that the type knows, for a function that is to have code of its own for it.
template <int VALUE>
struct Known {
  __device__ __forceinline__ constexpr operator int() const { return VALUE; }
};

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One lane of a converged warp, chosen by the hardware: the compiler then knows that the branch is uniform.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

// PTX ISA, griddepcontrol: no-ops unless the launch, or that of the kernel behind, asked for programmatic stream serialization.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The kernel behind may begin: for pairs of which the first leaves room for the second on the multiprocessors, and has waited
// itself, so that the second needs to wait for the first's results only. No other kernel does this: blocks that come early and
// take room, or wait long, cost more than they gain.
__device__ __forceinline__ void grid_dependency_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ float load_shared(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
  return value;
}
__device__ __forceinline__ float2 load_shared_pair(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address));
  return value;
}
__device__ __forceinline__ void store_shared_quad(uint32_t address, const float* values) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}
