"""SM90a: the menu of configs that calls choose from, and the constants of the cost model.

Cycles are SM clocks. Constants marked *fitted* come from ``benchmarks.calibrate`` on sweeps of 141 problems in FP8 and
BF16 on an H200 (docs/performance.md): of what they make of choices and of times together, so that one alone need not be
what it is called. The others are measurements of the chip.
"""

from __future__ import annotations

# -- Fixed times, us.
LAUNCH_US = 6.27  # between events: launch, first loads, drain (fitted; an empty kernel takes 2.8 to 3.4)
REDUCTION_US = (0.648, 0.0207)  # split-K: fixed, and per MMA column of a 64-row wave (fitted)
RELAUNCH_US = 2.0  # of a tile after the first where blocks don't persist, as with split-K (estimated)

# -- One stage, 128 bytes of K. MMAs of 64 x N take max(N / 2, 16 + N / 4) cycles (measured to the cycle).
MMAS_PER_STAGE = 4
MMA_OPERAND_CYCLES = (16, 4)
MMA_LATENCY_CYCLES = 55  # from the last MMA of a wave to its result (fitted; 58 measured)
PROMOTION_CYCLES = 1.62  # per promoted register (fitted) ...
PROMOTION_BRANCH_CYCLES = 0.55  # ... more where columns meet scale blocks at a few places (fitted) ...
PROMOTION_SELECT_CYCLES = 9.8  # ... or at many (fitted: they are avoided) ...
PROMOTION_SCALE_CYCLES = 1.0  # ... or have a scale each (estimated)
PROMOTION_EXPOSED = 0.825  # part of latency and promotion that delays the tensor cores (fitted) ...
PROMOTION_EXPOSED_IN_CHAIN = 0.07  # ... per warpgroup in chains (fitted) ...
PROMOTION_EXPOSED_SMEM = 0.18  # ... and of that, what delays shared memory (fitted)
STAGE_OVERHEAD_CYCLES = 202  # wait, scales and release of a stage (fitted)
OVERLAPPED_OVERHEAD = 0.336  # part of the overhead that remains where the next MMAs run meanwhile (fitted)
SMEM_BYTES_PER_CYCLE = 128  # operand reads and arriving copies together (fitted 128)
INGRESS_BYTES_PER_CYCLE = 64  # of one SM from L2 (up to 108 alone, 37 with 132 distinct streams)

MULTICAST_CYCLES = 23  # of a stage: the two CTAs wait for each other (fitted)

# -- Epilogue of one tile, cycles (fitted).
EPILOGUE_CYCLES = 412
EPILOGUE_COLUMN_CYCLES = 6.4  # per MMA column of a 64-row wave
EPILOGUE_SLICE_CYCLES = 570  # per slice of staging after the first

# -- Memory and clocks.
HBM_UTILIZATION = 1.25  # of the device's nominal streaming rate (fitted; some of what is read is in L2)
HBM_SHARED = 0.108  # part of B's bytes that is read once more where several tiles share it (fitted)
BYTES_IN_FLIGHT = 15.8e3  # per SM, that streaming at that rate takes (fitted; 48 KiB measured for all bytes)
TENSOR_BOUND = 0.7  # part of a stage that the tensor cores must be busy ...
THROTTLED_CYCLES = 40_000  # ... for this long before power limits the clock (assumed)

# Part of the SMs that clusters of more than 2 CTAs fill (measured; with two CTAs an SM a little more).
CLUSTER_FILL = {3: 117 / 132, 4: 120 / 132, 5: 110 / 132, 6: 102 / 132, 7: 105 / 132, 8: 120 / 132}

# -- The menu. Tile m x n, ring stages, then: cM x N, cluster; kN, split-K; swap, operands swapped. First chosen
# greedily out of a sweep (docs/performance.md), since then changed by hand where later kernels won.
FP8_MENU = """
    8x64 s12 swap, 8x64 s12 k2 swap, 8x64 s12 k4 swap, 8x64 s12 k5 swap, 8x64 s12 k8 swap,
    16x64 s10 swap, 16x64 s12 k2 swap, 16x64 s10 k3 swap, 16x64 s10 k5 swap, 16x64 s12 k4 swap,
    24x64 s12 k2 swap, 24x64 s9 k4 swap, 32x64 s8 swap, 32x64 s8 k2 swap, 32x64 s8 k4 swap,
    64x32 s12, 64x32 s12 k2, 64x32 s12 k3, 64x32 s12 k5, 64x40 s8, 64x40 s8 k4, 64x64 s12,
    64x80 s11, 64x128 s8, 64x128 s9,
    128x32 s10 k2, 128x48 s9 k2, 128x64 s8, 128x72 s8, 128x96 s7, 128x160 s5, 128x192 s4,
    128x128 s5, 192x64 s6, 192x128 s4, 192x128 s5, 256x64 s5, 256x128 s3, 256x128 s4
"""
BF16_MENU = """
    8x64 s12 swap, 8x64 s12 k2 swap, 8x64 s12 k4 swap, 8x64 s12 k8 swap,
    16x64 s10 swap, 16x64 s12 swap, 16x64 s12 k2 swap, 16x64 s10 k8 swap, 24x64 s9 k4 swap,
    32x64 s8 swap, 32x64 s12 swap, 32x64 s12 k2 swap, 32x64 s8 k4 swap, 64x64 s12 swap, 64x64 s12 k4 swap,
    64x128 s8 swap, 64x32 s12 k2, 64x40 s8 k4, 64x48 s12 c2x1, 64x48 s12 c1x2, 64x96 s10, 64x112 s9, 64x144 s8 c1x2,
    64x176 s7, 64x192 s6, 128x64 s8 swap, 128x112 s6, 128x128 s6 swap, 128x144 s6 c1x2, 128x160 s5 c2x1,
    128x160 s5, 128x192 s4, 128x224 s4 c2x1, 128x256 s4, 128x256 s4 c2x1, 192x192 s4
"""
