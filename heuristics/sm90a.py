"""SM90a: the menu of configs that calls choose from, and the constants of the cost model.

Cycles are SM clocks. The constants marked *fitted* come from one sweep of the menu over the 56 dense shapes of
DeepSeek-V3 in FP8 and BF16 on an H200 (docs/performance.md); the others are measurements of the chip.
"""

from __future__ import annotations

# -- Fixed times, us.
LAUNCH_US = 6.66  # between events: launch, first loads, drain (fitted; an empty kernel takes 3.4)
REDUCTION_US = (0.91, 0.0032)  # split-K: fixed, and per MMA column of a 64-row wave (fitted)

# -- One stage, 128 bytes of K. MMAs of 64 x N take max(N / 2, 16 + N / 4) cycles (measured to the cycle).
MMAS_PER_STAGE = 4
MMA_OPERAND_CYCLES = (16, 4)
PROMOTION_CYCLES = (1.78, 1.49, 1.0)  # per promoted register; more where columns straddle scale blocks (fitted) or
#                                       have a scale each (estimated)
PROMOTION_EXPOSED = (1.05, 0.17)  # part of the promotion that delays the tensor cores: single, and in chains (fitted)
PROMOTION_EXPOSED_SMEM = 0.3  # and of that, what delays shared memory (fitted)
STAGE_OVERHEAD_CYCLES = 74  # wait, scales and release of a warpgroup that overlaps nothing (fitted)
SMEM_BYTES_PER_CYCLE = 128 / 0.97  # operand reads and arriving copies together (fitted; 128 is the width)
INGRESS_BYTES_PER_CYCLE = 64  # of one SM from L2 (fitted; up to 108 alone, 37 with 132 distinct streams)

# -- Epilogue of one tile, cycles: fixed, per MMA column of a wave, per slice of staging after the first (fitted).
EPILOGUE_CYCLES = (451, 6.0, 753)

# -- Memory and clocks.
HBM_UTILIZATION = 1.10  # of the device's nominal streaming rate (fitted)
BYTES_IN_FLIGHT = 44e3  # per SM, that streaming at that rate takes (measured 48 KiB)
TENSOR_BOUND = 0.7  # part of a stage that the tensor cores must be busy ...
THROTTLED_CYCLES = 40_000  # ... for this long before power limits the clock (fitted)

# -- The menu. Tile m x n, ring stages, then: cN x M, cluster; kN, split-K; swap, operands swapped. Chosen greedily from
# a sweep of 844 kernels: a shape's best of these is within 0.3 percent of its best of all, on average.
FP8_MENU = """
    8x64 s12 swap, 8x64 s12 k2 swap, 8x64 s12 k4 swap, 8x64 s12 k8 swap,
    16x64 s10 swap, 16x64 s12 k2 swap, 16x64 s12 k4 swap, 16x64 s12 k8 swap,
    24x64 s12 k2 swap, 24x64 s9 k4 swap, 32x64 s8 swap, 32x64 s8 k2 swap, 32x64 s8 k4 swap,
    64x32 s12, 64x32 s12 k2, 64x40 s8 k4, 64x64 s12, 64x72 s12, 64x128 s8,
    128x32 s10 k2, 128x40 s10 k2, 128x48 s9 k2, 128x64 s8, 128x72 s8, 128x96 s7, 128x144 s6, 128x192 s4,
    128x128 s5, 128x128 s5 c2x1, 256x64 s5, 256x128 s3, 256x128 s3 c1x2
"""
BF16_MENU = """
    8x64 s12 swap, 8x64 s12 k2 swap, 8x64 s12 k8 swap,
    16x64 s10 swap, 16x64 s12 swap, 16x64 s12 k2 swap, 16x64 s10 k8 swap,
    32x64 s8 swap, 32x64 s12 swap, 32x64 s8 k4 swap, 64x64 s12 swap, 64x64 s12 k4 swap, 64x128 s8 swap,
    64x32 s12 k2, 64x40 s8 k4, 64x48 s12 c2x1, 64x48 s12 c1x2, 64x96 s10, 64x112 s9, 64x144 s8 c1x2,
    64x176 s7, 64x192 s6, 128x64 s8 swap, 128x112 s6, 128x128 s6 swap, 128x144 s6 c1x2, 128x160 s5 c2x1,
    128x192 s4, 128x192 s4 c1x2, 128x224 s4 c2x1, 128x256 s4, 128x256 s4 c2x1
"""
