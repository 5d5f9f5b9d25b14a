"""Constants of the cost model on SM90a, and the menu of configs that it may choose from.

Cycles are SM clocks. Each constant says where it comes from; docs/performance.md holds the measurements.
"""

from __future__ import annotations

from jitgemm.families.gemm import GemmConfig

# -- Fixed times, seconds.
LAUNCH_S = 3.4e-6  # an empty kernel between two events (measured)
RAMP_S = 1.4e-6  # first loads and drain of a kernel that streams (measured: 4.8 us in all)
CLUSTER_REDUCTION_S = (0.42e-6, 6.5e-9)  # split-K through distributed shared memory: fixed, and per MMA column (measured)

# -- One stage of one warpgroup, cycles.
MMA_ISSUE_LATENCY = 58  # first MMA to its result, besides its own N/2 (measured)
MMA_OPERAND_CYCLES = (16, 4)  # an MMA of N columns reads operands for 16 + N/4 cycles (measured to the cycle)
STAGE_OVERHEAD = 130  # wait on the full barrier, scales, release, slot arithmetic (measured 100-200)
MMAS_PER_STAGE = 4

# -- Memory.
L2_BYTES_PER_CLOCK = 4800  # of the whole chip, distinct streams (measured at 1.98 GHz)
SM_BYTES_PER_CLOCK = 64  # that one SM takes in beside its MMAs
L2_SHARED_DISCOUNT = 0.6  # lines that several SMs read at about the same time are served together (measured 0.55-0.65)

# -- Epilogue, cycles per 64 x 8 values of a warpgroup.
EPILOGUE_FIXED = 600
EPILOGUE_PER_COLUMN = 6


def _config(fp8: bool, tile_m: int, tile_n: int, stages: int, **rest: object) -> GemmConfig:
    return GemmConfig(tile_m, tile_n, 128 if fp8 else 64, stages, **rest)  # type: ignore[arg-type]
