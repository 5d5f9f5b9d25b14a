"""FP4 weights that a warp expands in shared memory, over the packed tile: the kernels' own function, run on the CPU."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import emulation
import pytest
import torch
from support import ROOT
from test_fp4 import all_codes
from torch import Tensor

from jitgemm.families import KernelSpec
from jitgemm.families.hyper_connections import HC_SINKHORN
from jitgemm.reference import fp4
from jitgemm.render import KernelSource

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="g++ is not installed")

WINDOWS = 10
KERNEL = """
#include "expander.cuh"
struct Params { const uint8_t* packed; uint8_t* out; float* scale; int apart, window; };
extern "C" __global__ void kernel(const __grid_constant__ Params p) {
  __shared__ uint8_t memory[EXPANDED_TILE_BYTES];
  emulation::shared_space = memory;
  for (int i = threadIdx.x; i < PACKED_TILE_BYTES; i += WARP) memory[PACKED_IN_PLACE + i] = p.packed[i];
  __syncwarp();
  Window window;
  window.number = p.window;
  if (p.apart) expand_in_place<true>(0, window);
  else expand_in_place<false>(0);
  __syncwarp();
  for (int i = threadIdx.x; i < EXPANDED_TILE_BYTES; i += WARP) p.out[i] = memory[i];
  *p.scale = window.scale();
}
"""
HEADERS = ("expander.cuh", "fp4.cuh", "epilogue.cuh", "tma.cuh")
SCALES = """
#pragma once
#include "common.cuh"
struct ScaleMatrix { const float* pointer; int stride_mn; };
float load_now(const float*);
"""

Expand = Callable[[Tensor, "int | None"], Tensor]


@pytest.fixture(scope="module")
def expand() -> Expand:
    """Values ``[64, 128]`` of a packed tile, without the rows' units; of a window of exponents, or of the first one."""
    headers = {name: (ROOT / "templates" / "include" / name).read_text() for name in HEADERS}
    headers["scales.cuh"] = SCALES
    spec: KernelSpec = HC_SINKHORN.spec("sm_90a", body="expander")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulation, "render", lambda _: KernelSource("kernel", KERNEL, headers))
        run = emulation.emulate(spec)

    def expanded(packed: Tensor, window: int | None) -> Tensor:
        out, scale = torch.full((64, 8, 16), 255, dtype=torch.uint8), ctypes.c_float()
        addresses = packed.data_ptr(), out.data_ptr(), ctypes.addressof(scale)
        run(struct.pack("<QQQii", *addresses, window is not None, window or 0), (1,), 32)
        chunks = torch.arange(8) ^ torch.arange(64)[:, None] % 8  # the 128-byte swizzle
        rows = out.gather(1, chunks[..., None].expand(64, 8, 16)).view(64, 128)
        return rows.view(torch.float8_e5m2).double() * scale.value

    return expanded


@pytest.mark.parametrize("base", [0, 3, 100, 228])
def test_all_codes_with_all_scales_of_a_window(expand: Expand, base: int) -> None:
    place = torch.arange(64)[:, None] * 5 + torch.arange(4) * 7
    exponents = (base + place % 27).to(torch.uint8)
    exponents[:, 0] = base + 26
    data, units = fp4.pack(all_codes(), exponents)
    assert (units > 0).all()
    assert torch.equal(expand(data, None) * units[:, None].double(), fp4.dequantize_fp4(all_codes(), exponents))


@pytest.mark.parametrize("spread", [27, 60, 127, 200, 241])
def test_windows_add_up_to_all_scales(expand: Expand, spread: int) -> None:
    """Each group is in one window, whatever its exponent, and zeros in the others."""
    generator = torch.Generator().manual_seed(spread)
    exponents = torch.randint(254 - spread, 255, (64, 4), generator=generator).to(torch.uint8)
    exponents[:, 0], exponents[:, 1] = 254, 254 - spread
    data, units = fp4.pack(all_codes(), exponents)
    assert (units < 0).all()
    parts = torch.stack([expand(data, window) for window in range(WINDOWS)])
    groups = parts.view(WINDOWS, 64, 4, 32).ne(0).any(-1).sum(0)
    assert (groups == 1).all()
    assert torch.equal(parts.sum(0) * units.abs()[:, None].double(), fp4.dequantize_fp4(all_codes(), exponents))
