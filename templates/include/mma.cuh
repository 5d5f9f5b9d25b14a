// Warpgroup MMA from shared memory (PTX ISA, wgmma): descriptors, ordering, register reallocation.
#pragma once
#include "common.cuh"

// Matrix descriptor: start address, leading and stride byte offsets in 16-byte units, swizzle mode 1 = 128 bytes.
// Advances along K touch the low word only. In a cluster a shared address has the CTA's rank above its 18 bits.
__device__ __forceinline__ uint64_t mma_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  const uint32_t low = ((address & 0x3ffff) >> 4) | ((leading_bytes >> 4) << 16);
  const uint32_t high = (stride_bytes >> 4) | (1u << 30);
  return (uint64_t(high) << 32) | low;
}

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

template <int REGISTERS>
__device__ __forceinline__ void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void registers_acquire() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
