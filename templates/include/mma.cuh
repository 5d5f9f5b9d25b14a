// Warpgroup MMA from shared memory (PTX ISA, wgmma): descriptors, ordering, register reallocation.
#pragma once
#include "common.cuh"

// Matrix descriptor of an operand in shared memory with the 128-byte swizzle (mode 1): start address, leading and stride byte
// offsets in units of 16 bytes. All advances touch the low word only, and none carries out of the address.
constexpr uint32_t DESCRIPTOR_UNIT = 16;

struct MmaOperand {
  uint32_t low, high;

  // In a cluster a shared address has the CTA's rank above its 18 bits. Same in all lanes: descriptors live in uniform registers.
  __device__ __forceinline__ MmaOperand(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes)
      : low(__shfl_sync(0xffffffff, (address & 0x3ffff) / DESCRIPTOR_UNIT | (leading_bytes / DESCRIPTOR_UNIT) << 16, 0)), high((stride_bytes / DESCRIPTOR_UNIT) | (1u << 30)) {}

  __device__ __forceinline__ uint64_t at(uint32_t offset) const { return (uint64_t(high) << 32) | (low + offset); }
};

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS_IN_FLIGHT>
__device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS_IN_FLIGHT) : "memory");
}

// Keeps the compiler from moving accesses to the accumulators across this point.
template <int N>
__device__ __forceinline__ void mma_fence_registers(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int N>
__device__ __forceinline__ void mma_fence_registers(uint32_t (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

template <int REGISTERS>
__device__ __forceinline__ void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void registers_acquire() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
