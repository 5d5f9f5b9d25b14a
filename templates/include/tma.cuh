// Tensor memory accelerator: bulk copies between global memory and shared memory (PTX ISA, cp.async.bulk.tensor).
#pragma once
#include "common.cuh"

// CUtensorMap of the driver: 128 opaque bytes.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads the box at (x, y), x contiguous; `barrier` counts the bytes that arrive.
__device__ __forceinline__ void tma_load_2d(uint32_t destination, const TensorMap& map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(destination),
      "l"(&map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// The same of an operand with groups, at group z.
__device__ __forceinline__ void tma_load_3d(uint32_t destination, const TensorMap& map, int x, int y, int z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(destination),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}

// As tma_load_2d, written to the same offset of every CTA in `cta_mask` and counted by the barrier at that offset in each.
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t destination, const TensorMap& map, int x, int y, uint32_t barrier,
                                                      uint16_t cta_mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
          destination),
      "l"(&map), "r"(x), "r"(y), "r"(barrier), "h"(cta_mask)
      : "memory");
}

__device__ __forceinline__ void tma_load_3d_multicast(uint32_t destination, const TensorMap& map, int x, int y, int z, uint32_t barrier,
                                                      uint16_t cta_mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(
          destination),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(cta_mask)
      : "memory");
}

// Stores a box; parts outside the tensor are clipped.
__device__ __forceinline__ void tma_store_2d(uint32_t source, const TensorMap& map, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(x), "r"(y), "r"(source)
               : "memory");
}

__device__ __forceinline__ void tma_store_3d(uint32_t source, const TensorMap& map, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&map), "r"(x), "r"(y), "r"(z), "r"(source)
               : "memory");
}

// Adds a box to what is there, in the tensor's type.
__device__ __forceinline__ void tma_add_3d(uint32_t source, const TensorMap& map, int x, int y, int z) {
  asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&map), "r"(x), "r"(y), "r"(z),
               "r"(source)
               : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until this thread's stores have read their shared memory.
__device__ __forceinline__ void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Makes ordinary writes to shared memory visible to the copy engine and the tensor cores.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
