"""How a grouped GEMM kernel is launched: its parameter block, its tensor maps and its grid.

None of it depends on how many rows the groups have, so that a captured launch serves any.
"""

from __future__ import annotations

import ctypes
import math
import struct
from typing import NamedTuple

from jitgemm.driver import Arguments, Launch, ensure_context
from jitgemm.errors import DriverError, ProblemError
from jitgemm.families.gemm import ROWS_STORED, GemmConfig, scale_blocks
from jitgemm.families.gemm_launch import d_map_type
from jitgemm.families.grouped import GroupedProblem, token_piece, token_tile
from jitgemm.kernel import Kernel
from jitgemm.tensor_map import ALIGNMENT, BYTES, OperandMap

# The template's `Params`: tensor maps, then d_plain, row_scale_matrix, column_scale_matrix, d_group_stride,
# scale_matrix_group_stride, layout, n, k_blocks, d_aligned, zero_padding.
MAPS = ("rows", "rows_cut", "columns", "columns_cut", "row_scales", "column_scales", "d")
TAIL = struct.Struct("<Qq Qiiii Qiiii q i4x Qiiiiiii4x iiii")
TAIL_OFFSET = len(MAPS) * BYTES
_D, _ROW_SCALES, _COLUMN_SCALES, _LAYOUT = (
    TAIL_OFFSET // 8 + word for word in (0, 2, 5, 10)
)  # words of these pointers
STEPS_OFFSET = TAIL_OFFSET + TAIL.size
"""Where the parameters of a kernel with an epilogue go on with its ``EpilogueSteps``."""
PARAMS_BYTES = -(-(TAIL_OFFSET + TAIL.size) // BYTES) * BYTES

_BAND_ROWS = 1024  # of D that are walked before n advances
_POSITIONS = 32  # at which a tile may start in the rows that one lane looks through
_STRETCH_TILES = 4  # of them, where a tile starts at multiples of its height only


class Stack(NamedTuple):
    """Matrices of one shape as the kernel sees them, one for each group, or one in all; strides in elements."""

    rows: int
    columns: int
    row_stride: int
    groups: int = 1
    group_stride: int = 0


class GroupedGeometry:
    """All of a launch that does not depend on addresses.

    Args:
        problem: what is computed.
        config: tiles.
        kernel: the loaded kernel of both.
        a: A as stored, ``[m, k]``, or one such for each group.
        b: B as stored, ``[n, k]`` or ``[k, n]`` for each group; not used where B is FP4, which is packed.
        d: D, as A.
        a_scales: of A, MN-major: what lies along K as rows.
        b_scales: of B, blocks of rows as rows; any column stride. Of FP4, rows of one number each.
        b_scales_k_stride: that stride.
        num_sms: multiprocessors to use.
        zero_padding: write zeros to rows of no group; in the psum layout, for others are always written.
        pdl: launch with programmatic dependent launch.

    Raises:
        ProblemError: there are more tiles than the kernel can count.
    """

    def __init__(
        self,
        problem: GroupedProblem,
        config: GemmConfig,
        kernel: Kernel,
        a: Stack,
        b: Stack,
        d: Stack,
        a_scales: Stack | None,
        b_scales: Stack | None,
        b_scales_k_stride: int,
        num_sms: int,
        zero_padding: bool = True,
        pdl: bool = False,
    ) -> None:
        self._config, self._kernel = config, kernel
        self._shape = shape = problem.shape(config)
        traits = shape.problem.traits
        dtype, tile_k = "uint8" if traits.is_fp8 else "bf16", config.tile_k
        token_rows, weight_rows = token_tile(config), config.tile_n

        def operand(stack: Stack, box_width: int, box_height: int) -> OperandMap:
            return _map(dtype, stack, box_width, box_height, 128)

        tokens = (operand(a, tile_k, token_rows), operand(a, tile_k, token_piece(config)))
        weights: tuple[OperandMap | None, OperandMap | None]
        if traits.fp4_b:
            weights = None, None
        elif problem.dense.b_major == "mn":  # in slabs of 64, of which the kernel asks for those that exist
            weights = operand(b, 64, tile_k), None
        else:
            left = problem.n % weight_rows
            weights = operand(b, tile_k, weight_rows), operand(b, tile_k, left) if left else None
        scales_map = None
        if a_scales is not None:
            scales_map = _map("fp32", a_scales, token_rows + shape.scale_slack, shape.a_scales_per_stage, 16)
        self._d_rows_aligned = _aligned(d, shape.d_bytes)
        d_map = None
        if self._d_rows_aligned:
            width = shape.store_row_bytes
            height = shape.store_columns if config.swap_ab else ROWS_STORED
            d_map = _map(d_map_type(problem.d_dtype), d, width // shape.d_bytes, height, width)
        maps: tuple[OperandMap | None, ...]
        b_fields = (0, 0, 0)
        if b_scales is not None and traits.fp4_b:
            b_fields = (b_scales.row_stride, 0, 0)
        elif b_scales is not None:
            b_fields = (b_scales.row_stride, b_scales_k_stride, scale_blocks(problem.n, problem.dense.gated))
        if config.swap_ab:
            maps = (*weights, *tokens, None, scales_map, d_map)
            row_fields, column_fields = b_fields, (0, 0, 0)
        else:
            maps = (*tokens, *weights, scales_map, None, d_map)
            row_fields, column_fields = (0, 0, 0), b_fields
        self._maps = maps
        self._packed = (
            MAPS.index("rows") if traits.fp4_b else None
        )  # in whose place the address of packed weights stands
        self._zero_padding = problem.kind == "contiguous" or (problem.kind == "psum" and zero_padding)

        cluster = config.cluster_n  # CTAs that make up one tile of the schedule
        tiles_n = -(-problem.n // (config.tile_n * cluster))
        most = most_tiles(problem, config, a.rows)
        self.grid = (max(1, min(most, num_sms * shape.blocks_per_sm // cluster)) * cluster, 1, 1)
        if tiles_n > 2**21 or most + self.grid[0] >= 2**31:
            raise ProblemError(f"d has {most} tiles at most, {tiles_n} of them along n; accepted is less than 2**31")
        self.launch = Launch(kernel.handle, self.grid, kernel.num_threads, kernel.smem_bytes, kernel.device, pdl)
        positions, step = stretch(token_rows, problem.alignment)
        layout = (0, problem.groups, a.rows, problem.alignment, tiles_n, band(token_rows), positions, step)
        self._tail = (
            *(0, d.row_stride, 0, *row_fields, 0, 0, *column_fields, 0),
            *(d.group_stride, 0 if b_scales is None else b_scales.group_stride, *layout),
            *(problem.n, -(-problem.k // tile_k)),
        )

    def bind(self, a: int, a_scales: int, b: int, b_scales: int, d: int, layout: int) -> Arguments:
        """The parameter block for tensors at these addresses, 0 where there is none.

        Raises:
            DriverError: the driver refuses a tensor map.
        """
        try:
            return self._arguments(a, a_scales, b, b_scales, d, layout)
        except DriverError:
            ensure_context(self._kernel.device)  # a thread's first CUDA call
            return self._arguments(a, a_scales, b, b_scales, d, layout)

    def _arguments(self, a: int, a_scales: int, b: int, b_scales: int, d: int, layout: int) -> Arguments:
        d_aligned = d % ALIGNMENT == 0 and self._d_rows_aligned
        swap = self._config.swap_ab
        addresses = (b, b, a, a, 0, a_scales, d) if swap else (a, a, b, b, a_scales, 0, d)
        arguments = Arguments(PARAMS_BYTES)
        for index, (operand, address) in enumerate(zip(self._maps, addresses, strict=True)):
            if operand is not None and (d_aligned or MAPS[index] != "d"):
                operand.write(arguments.address + index * BYTES, address)
        tail = TAIL.pack(*self._tail, d_aligned, self._zero_padding)
        ctypes.memmove(arguments.address + TAIL_OFFSET, tail, TAIL.size)
        words, first = arguments.words, arguments.first
        if self._packed is not None:
            words[first + self._packed * BYTES // 8] = b
        words[first + _D] = d
        words[first + (_ROW_SCALES if swap else _COLUMN_SCALES)] = b_scales
        words[first + _LAYOUT] = layout
        return arguments


def _map(dtype: str, stack: Stack, box_width: int, box_height: int, swizzle: int) -> OperandMap:
    stride = stack.group_stride or stack.rows * stack.row_stride  # of one group it is never used, but must be legal
    return OperandMap(
        dtype, stack.columns, stack.rows, stack.row_stride, box_width, box_height, swizzle, stack.groups, stride
    )


def _aligned(d: Stack, size: int) -> bool:
    """Whether all rows of D start and end on multiples of 16 bytes, if D does."""
    return not any(number * size % ALIGNMENT for number in (d.row_stride, d.columns, d.group_stride))


def band(tile: int) -> int:
    """Tiles along m that are walked before n advances."""
    return max(1, _BAND_ROWS // tile)


def stretch(tile: int, alignment: int) -> tuple[int, int]:
    """Of the rows that one lane of the scheduler looks through where every row carries its group's index: at how many
    positions a tile may start, and the rows between these.
    """
    step = math.gcd(tile, alignment)
    per_tile = tile // step
    return per_tile * min(_STRETCH_TILES, max(1, _POSITIONS // per_tile)), step


def most_tiles(problem: GroupedProblem, config: GemmConfig, rows: int) -> int:
    """Tiles that there are at most, whatever the layout says; ``rows`` are those of A, masked those of one group."""
    tile, tiles_n = token_tile(config), -(-problem.n // (config.tile_n * config.cluster_n))
    if problem.kind == "contiguous":
        return -(-rows // math.gcd(tile, problem.alignment)) * tiles_n
    return problem.groups * -(-rows // tile) * tiles_n  # psum: ends that decrease may give groups the same rows
