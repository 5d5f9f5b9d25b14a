"""SM90a: the menu of configs that calls choose from, and the constants of the cost model.

Cycles are SM clocks. Constants marked *fitted* come from sweeps of 423 random problems and of DeepSeek-V3's, in FP8 and
BF16 on an H200 (docs/performance.md; ``benchmarks.calibrate`` fits them anew): by what they make of choices and of
times together, so that one alone need not be what it is called. The others are measurements of the chip.
"""

from __future__ import annotations

# -- Fixed times, us.
LAUNCH_US = 4.133  # between events: launch, first loads, drain (fitted; an empty kernel takes 2.8 to 3.4)
CLUSTER_LAUNCH_US = 0.1658  # more for clusters (fitted)
# Split-K: fixed, per part after two, per MMA column of a 64-row wave (fitted).
REDUCTION_US = (0.2291, 0.1377, 0.009767)
RELAUNCH_US = 2.0  # of a tile after the first where blocks don't persist, as with split-K (estimated)

# -- One stage, 128 bytes of K. MMAs of 64 x N take max(N / 2, 16 + N / 4) cycles (measured to the cycle).
MMAS_PER_STAGE = 4
NOMINAL_FP8_FLOPS = 8192  # per clock and SM, that these cycles stand for; half as many of BF16
MMA_OPERAND_CYCLES = (16, 4)
RS_MMA_CYCLES = 13  # at least, of an MMA whose A is in registers (measured)
EXPANSION_LAUNCHES_US = 6.0  # of two kernels more in a stream, where weights are expanded in memory (measured)
EXPANSION_CYCLES = 115.0  # of one warpgroup: 64 x 128 FP4 weights to registers (counted: 112 of the ALU)
EXPANDER_CYCLES = 320.0  # that three warps take for 64 x 128 FP4 weights in shared memory (estimated from samples)
MMA_LATENCY_CYCLES = 58  # from the last MMA of a wave to its result
PROMOTION_CYCLES = 0.5393  # per promoted register (fitted) ...
PROMOTION_BRANCH_CYCLES = 0.15  # ... more where columns meet scale blocks at a few places (from ratios of tiles) ...
PROMOTION_SELECT_CYCLES = 2.0  # ... or at many (estimated; they are avoided) ...
PROMOTION_SCALE_CYCLES = 2.5  # ... or have a scale each (fitted to masked groups)
PROMOTION_EXPOSED = 0.6442  # part of latency and promotion that delays the tensor cores (fitted) ...
PROMOTION_EXPOSED_IN_CHAIN = 0.9245  # ... of promotion per warpgroup in chains (fitted) ...
PROMOTION_EXPOSED_SMEM = 1.123  # ... and of that, what delays shared memory (fitted)
STAGE_OVERHEAD_CYCLES = 74.042  # wait, scales and release of a stage with promotion (fitted) ...
OVERLAPPED_OVERHEAD = 0.2682  # ... the part that remains where the next MMAs run meanwhile (fitted) ...
PLAIN_OVERHEAD_CYCLES = 13.33  # ... and what remains of it without promotion (fitted)
SMEM_BYTES_PER_CYCLE = 128  # operand reads and arriving copies together
INGRESS_BYTES_PER_CYCLE = (108, 76.51)  # from L2: of one SM alone (measured), of each when all ask (fitted) ...
UNIQUE_BYTES_PER_CYCLE = 260.06  # ... and, of what several SMs read, counted once, per SM (fitted)
LOAD_LATENCY = (2196.4, 2.261)  # of a stage: cycles, and times what computing one takes (fitted)
STAGE_NORM = 6.489  # exponent with which these limits meet (fitted)
MULTICAST_CYCLES = 13.51  # of a stage: the two CTAs wait for each other (fitted)

# -- Epilogue of one tile, cycles (fitted).
EPILOGUE_CYCLES = 1350.3
EPILOGUE_COLUMN_CYCLES = 9.909  # per MMA column of a 64-row wave
EPILOGUE_SLICE_CYCLES = 420.95  # per slice of staging after the first
EPILOGUE_BOX_CYCLES = 105.9  # per box of a wave after the first: rows are stored in boxes of up to 128 bytes ...
EPILOGUE_NARROW_CYCLES = 480.58  # ... which are slow where they have 16
EPILOGUE_STEP_CYCLES = {None: 0.0, "linear": 2.0, "swiglu": 10.0}  # per MMA column of a 64-row wave (estimated) ...
QUANTIZATION_COLUMN_CYCLES = 4.0  # ... and more where D is quantized (estimated) ...
EXCHANGE_CYCLES = 1000.0  # ... and warps or CTAs exchange magnitudes (estimated)
EXCHANGE_READ_CYCLES = 2.0  # ... of which a warp reads those of 8 tokens from another at a time
EPILOGUE_REPEATED = 0.1981  # of a tile after the first, whose loads began meanwhile

# -- Memory and clocks.
HBM_UTILIZATION = 1.174  # of the device's nominal streaming rate (fitted; some of what is read is in L2)
HBM_SHARED = 0.1411  # part of B's bytes that is read once more where several tiles share it (fitted)
HBM_BYTES_PER_US_AND_SM = 1.173e5  # of one SM (fitted; measured 105e3)
MAIN_NORM = 5.759  # exponent with which loop and memory meet (fitted)
# Power limits the clock where the tensor cores are busy for this long (assumed), from the first of these parts of
# a stage on, and fully from the second (fitted).
THROTTLED_CYCLES = 40_000
TENSOR_BOUND = (0.7368, 0.8524)

# Part of the SMs that clusters of more than 2 CTAs fill (measured; with two CTAs an SM a little more).
CLUSTER_FILL = {3: 117 / 132, 4: 120 / 132, 5: 110 / 132, 6: 102 / 132, 7: 105 / 132, 8: 120 / 132}

# -- The menu. Tile m x n, ring stages, then: cM x N, cluster; kN, split-K; swap, operands swapped; *F, what predictions
# for it are multiplied by (fitted). Chosen greedily out of the sweeps (``benchmarks.calibrate --menu``).
FP8_MENU = """
    8x64 s12 swap *1.01, 8x64 s12 k2 swap *1.01, 8x64 s12 k3 swap *1.02, 8x64 s12 k4 swap *1.01, 8x64 s12 k5 swap,
    8x64 s12 k8 swap *0.99, 16x64 s10 k2 swap *0.99, 16x64 s10 k4 swap, 16x64 s12 swap *1.01,
    16x64 s12 k2 swap *1.01, 16x64 s12 k3 swap *0.99, 16x64 s12 k4 swap *1.01, 24x64 s12 swap *1.02,
    24x64 s12 k2 swap *1.01, 24x64 s12 k5 swap *1.01, 32x64 s8 swap *0.99, 32x64 s8 k3 swap *0.99, 40x64 s8 swap,
    40x64 s12 swap *1.03, 40x64 s12 k2 swap *1.02, 40x64 s12 k4 swap *1.02, 48x64 s12 swap *1.04, 64x32 s8 *1.01,
    64x32 s12 k2 *1.02, 64x40 s12 k3 *0.95, 64x48 s12 *1.03, 64x48 s12 k2, 64x64 s12 *1.02, 64x64 s12 k4 *0.99,
    64x128 s8 *0.96, 64x128 s8 c2x1 *0.95, 128x64 s8 k2 *0.95, 128x64 s8 k4 *0.96, 128x72 s8 k4 *0.91,
    128x80 s8 k2 *0.89, 128x128 s5 *0.99, 128x128 s6 *0.98, 128x128 s6 k2 *0.96, 128x160 s5, 128x192 s4,
    192x64 s6 *0.99, 192x64 s6 c1x2 *0.98, 192x96 s5 *1.01, 192x96 s5 k2, 192x128 s4 *1.01, 192x128 s5 *0.99,
    256x128 s4 *0.99
"""
# Of FP8 groups, where swapped operands pay up to 48 rows a group. (Chosen by hand, docs/performance.md.)
FP8_GROUPS_MENU = """
    8x64 s8 swap, 8x64 s12 swap, 8x128 s12 swap, 16x64 s12 swap, 16x128 s12 swap, 24x64 s12 swap, 24x128 s10 swap,
    32x64 s12 swap, 32x128 s10 swap, 48x64 s12 swap, 48x128 s9 swap, 64x64 s12, 64x128 s8, 128x128 s6, 128x192 s4,
    192x64 s6, 192x128 s5, 256x128 s4
"""
# Of FP4 weights; swapped, they are expanded in registers, else in shared memory. (Factors: measured on three shapes.)
FP4_MENU = """
    8x64 s12 swap *1.29, 8x64 s12 k2 swap *1.28, 8x64 s12 k4 swap *1.29, 8x64 s12 k8 swap *1.28, 16x64 s12 swap *1.34,
    16x64 s12 k2 swap *1.26, 16x64 s12 k4 swap *1.27, 8x128 s12 swap *1.31, 8x128 s12 k2 swap *1.31,
    8x128 s12 k4 swap *1.26, 16x128 s12 swap *1.41, 16x128 s12 k2 swap *1.29, 16x128 s12 k4 swap *1.22,
    24x128 s12 swap *1.30, 24x128 s12 k2 swap *1.31, 24x128 s12 k4 swap *1.19, 32x64 s12 swap *1.31,
    32x64 s12 k2 swap *1.25, 32x64 s12 k4 swap *1.20, 32x128 s12 swap *1.29, 32x128 s12 k2 swap *1.29,
    32x128 s12 k4 swap *1.18, 48x128 s12 swap *1.32, 48x128 s12 k4 swap *1.18, 64x64 s12 swap *1.35,
    64x64 s12 k2 swap *1.23, 64x128 s12 swap *1.29, 64x128 s12 k2 swap *1.22, 64x128 s12 k4 swap *1.16,
    80x128 s10 swap *1.24, 96x128 s9 swap *1.30, 128x128 s8 swap *1.40, 128x64 s8 *1.29, 128x64 s8 k2 *1.20,
    128x128 s6 k2 *1.26, 256x64 s5 *1.06, 256x128 s4 *1.20
"""
# Of many rows: weights that have been expanded, and those that can't be (docs/fp4.md).
FP4_MANY_ROWS_MENUS = {
    "fp8_1x128_e5m2_row": """
        64x128 s8, 128x64 s8, 128x128 s6, 128x192 s4, 192x64 s6, 192x96 s5, 192x128 s5, 256x64 s5, 256x128 s4
    """,
    "fp8_1x128_far_fp4_1x32": "128x128 s8 swap",
}
BF16_MENU = """
    8x64 s12 swap *1.03, 8x64 s12 k3 swap *1.04, 8x64 s12 k5 swap *1.03, 16x64 s12 swap *1.02,
    16x64 s12 k2 swap *1.04, 16x64 s12 k5 swap, 24x64 s9 swap, 24x64 s12 k8 swap *1.01, 40x64 s12 swap *1.02,
    40x64 s12 k2 swap *1.04, 40x64 s12 k4 swap *1.03, 48x64 s12 swap *1.01, 64x128 s8 k4 swap *0.99,
    96x128 s7 swap *0.99, 104x64 s10 swap *0.97, 104x128 s6 swap, 128x128 s6 swap *1.01, 128x128 s6 k4 swap,
    136x128 s5 swap, 152x128 s5 swap *1.01, 176x128 s4 swap *1.02, 200x128 s4 swap *1.02, 216x128 s3 swap *1.01,
    64x32 s12 k2 *1.03, 64x32 s12 k3 *1.03, 64x32 s12 k5 *1.02, 64x48 s7 *0.97, 64x48 s12 k2 *1.02, 64x64 s12,
    64x80 s12 *0.98, 64x96 s10 *0.97, 64x112 s9 *0.96, 64x128 s9 *0.97, 64x144 s7 *0.95, 64x160 s7 *0.96,
    64x192 s6 *0.95, 128x48 s9 k2 *0.99, 128x64 s8 k2 *1.02, 128x64 s8 k4 *0.96, 128x96 s7 *0.99, 128x128 s6 *1.01,
    128x192 s5 *1.02, 128x256 s4 *1.03, 192x160 s4 *1.03, 192x192 s3 *1.05, 256x192 s3 *1.03
"""

# More tiles for SwiGLU and for a quantized D, whose scales cover 128 columns: of few tokens with as many columns as a
# scale has, in one CTA or two. (Chosen by hand.)
EPILOGUE_MENU = """
    8x128 s12 swap, 16x128 s11 swap, 24x128 s10 swap, 32x128 s10 swap, 48x128 s9 swap, 64x128 s8 swap,
    8x256 s6 swap, 16x256 s6 swap, 24x256 s6 swap, 32x256 s5 swap, 48x256 s5 swap, 64x256 s5 swap,
    64x128 s8, 128x128 s6, 192x128 s5, 256x128 s4
"""
