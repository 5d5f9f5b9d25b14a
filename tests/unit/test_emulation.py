"""The emulator of kernels: lanes and barriers do what they do on a GPU, and what would hang there is noticed."""

from __future__ import annotations

import ctypes

import emulation
import pytest

from jitgemm.families import KernelSpec
from jitgemm.families.hyper_connections import HC_SINKHORN
from jitgemm.render import KernelSource

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="g++ is not installed")

KERNEL = """
#include "common.cuh"
struct Params { int* out; };
extern "C" __global__ void kernel(const __grid_constant__ Params p) {
  __shared__ int sums[2];
  const int lane = threadIdx.x & 31;
  %s
}
"""


def run(monkeypatch: pytest.MonkeyPatch, body: str) -> list[int]:
    """What two blocks of 64 threads write."""
    spec: KernelSpec = HC_SINKHORN.spec("sm_90a", body=body)  # as good a family as any: it has no dynamic shared memory
    monkeypatch.setattr(emulation, "render", lambda _: KernelSource("kernel", KERNEL % body, {}))
    out = (ctypes.c_int * 128)(*[-1] * 128)
    emulation.emulate(spec)(ctypes.addressof(out).to_bytes(8, "little"), (2,), 64)
    return list(out)


def test_threads_blocks_and_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
      int sum = threadIdx.x;
      for (int bits = 1; bits < WARP; bits *= 2) sum += __shfl_xor_sync(0xffffffff, sum, bits);
      if (lane == 0) sums[threadIdx.x / WARP] = sum;
      __syncthreads();
      p.out[blockIdx.x * 64 + threadIdx.x] = (blockIdx.x + 1) * (sums[0] + sums[1]);"""
    total = sum(range(64))
    assert run(monkeypatch, body) == [total] * 64 + [2 * total] * 64


def test_what_lanes_tell_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
      const unsigned x = lane * 7 % 5;
      const unsigned parts[] = {__shfl_sync(0xffffffff, x, 3), __shfl_up_sync(0xffffffff, x, 1),
                                unsigned(__popc(__match_any_sync(0xffffffff, x))),
                                __reduce_max_sync(0xffffffff, lane + 1), __reduce_min_sync(0xffffffff, lane + 1)};
      int number = 0;
      for (unsigned part : parts) number = number * 40 + part;
      p.out[blockIdx.x * 64 + threadIdx.x] = number;"""
    x = [lane * 7 % 5 for lane in range(32)]
    expected = []
    for lane in range(32):
        number = 0
        for part in (x[3], x[max(lane - 1, 0)], x.count(x[lane]), 32, 1):
            number = number * 40 + part
        expected.append(number)
    assert run(monkeypatch, body) == expected * 4


@pytest.mark.parametrize(
    "body",
    [
        "if (threadIdx.x < 63) __syncthreads();",
        "if (threadIdx.x == 5) return; __shfl_xor_sync(0xffffffff, lane, 1);",
        "if (threadIdx.x < WARP) __syncwarp(); else __syncthreads();",
    ],
)
def test_what_would_hang_is_noticed(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    with pytest.raises(AssertionError, match="a barrier that not all threads reach"):
        run(monkeypatch, body)


@pytest.mark.parametrize("barrier", ["__syncthreads();", ""])
def test_a_missing_barrier_shows(monkeypatch: pytest.MonkeyPatch, barrier: str) -> None:
    """One warp writes again before the other has read."""
    body = f"""
      const int warp = threadIdx.x / WARP;
      if (lane == 0) sums[warp] = 1;
      __syncthreads();
      __syncwarp();
      const int read = sums[1 - warp];
      {barrier}
      __syncwarp();
      if (lane == 0) sums[warp] = 2;
      p.out[blockIdx.x * 64 + threadIdx.x] = read;"""
    assert set(run(monkeypatch, body)) == ({1} if barrier else {1, 2})
