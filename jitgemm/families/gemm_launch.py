"""How a dense GEMM kernel is launched: its parameter block, its tensor maps and its grid."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

from jitgemm.driver import Launch, ensure_context
from jitgemm.families.gemm import ROWS_STORED, SCALE_GROUP, GemmConfig, GemmProblem, KernelShape
from jitgemm.kernel import Kernel
from jitgemm.tensor_map import ALIGNMENT, BYTES, OperandMap

# The template's `Params`: five tensor maps, then d_plain, c, row_scale_matrix, column_scale_matrix, raster,
# m, n, k_blocks, store_by_tma.
_MAPS = ("rows", "columns", "row_scales", "column_scales", "d")
_TAIL = struct.Struct("<Qq Qq Qiiii Qiiii iiii IIIIII iiii ii")
_TAIL_OFFSET = len(_MAPS) * BYTES
PARAMS_BYTES = -(-(_TAIL_OFFSET + _TAIL.size) // BYTES) * BYTES


@dataclass(frozen=True)
class Matrix:
    """A matrix as the kernel sees it; strides in elements."""

    rows: int
    columns: int
    row_stride: int


@dataclass(frozen=True)
class ScaleStrides:
    """Strides of a scale tensor, in elements: along the operand's rows (or blocks of rows) and along K."""

    mn: int
    k: int


@dataclass(frozen=True)
class Addresses:
    """Where the tensors of one call are; 0 where there is none."""

    a: int
    a_scales: int
    b: int
    b_scales: int
    d: int
    c: int


class GemmGeometry:
    """All of a launch that does not depend on addresses.

    Args:
        problem: with its m.
        config: tiles and cluster.
        kernel: the loaded kernel of both.
        a: A as stored: ``[m, k]``, or ``[k, m]`` where MN-major.
        b: B as stored: ``[n, k]``, or ``[k, n]`` where MN-major.
        d: D.
        c_row_stride: row stride of C.
        a_scales: strides of A's scales, as the kernel takes them.
        b_scales: strides of B's scales, as the kernel takes them.
        num_sms: multiprocessors to use.
    """

    def __init__(
        self,
        problem: GemmProblem,
        config: GemmConfig,
        kernel: Kernel,
        a: Matrix,
        b: Matrix,
        d: Matrix,
        c_row_stride: int,
        a_scales: ScaleStrides,
        b_scales: ScaleStrides,
        num_sms: int,
    ) -> None:
        assert problem.m is not None
        shape = KernelShape(problem, config)
        self._shape, self._kernel = shape, kernel
        # A store clips the last columns in steps of 16 bytes: D must end on one, or what lies behind it is overwritten.
        self._d_by_tma = d.row_stride * shape.d_bytes % ALIGNMENT == 0 and d.columns * shape.d_bytes % ALIGNMENT == 0
        self._swap = config.swap_ab
        k_blocks = -(-problem.k // config.tile_k)

        rows_shared = config.cluster_m if config.swap_ab else config.cluster_n
        columns_shared = config.cluster_n if config.swap_ab else config.cluster_m
        m_side, n_side = (b, a) if config.swap_ab else (a, b)
        self._rows = _operand(shape, m_side, shape.m_side_major, shape.mma_m, rows_shared)
        self._columns = _operand(shape, n_side, shape.n_side_major, shape.mma_n, columns_shared)
        m_length, n_length = (problem.n, problem.m) if config.swap_ab else (problem.m, problem.n)
        m_scales, n_scales = (b_scales, a_scales) if config.swap_ab else (a_scales, b_scales)
        self._row_scales = _scales(shape.m_side_scales, m_length, k_blocks, m_scales, shape.mma_m)
        self._column_scales = _scales(shape.n_side_scales, n_length, k_blocks, n_scales, shape.mma_n)
        self._d = self._d_map(d)

        cluster_size = config.cluster_m * config.cluster_n * config.split_k
        clusters_m = -(-problem.m // (config.tile_m * config.cluster_m))
        clusters_n = -(-problem.n // (config.tile_n * config.cluster_n))
        clusters = clusters_m * clusters_n
        if config.split_k > 1:
            resident = clusters  # one tile per cluster; the hardware queues what does not fit
        else:
            slots = max(1, num_sms * shape.blocks_per_sm // cluster_size)
            waves = -(-clusters // slots)
            resident = -(-clusters // waves)  # as many tiles for each as can be
        self.grid = (resident * cluster_size, 1, 1)
        self._pack_tail = _TailPacker(
            d_row_stride=d.row_stride,
            c_row_stride=c_row_stride,
            row_scales=_scale_fields(shape.m_side_scales, m_scales, m_length),
            column_scales=_scale_fields(shape.n_side_scales, n_scales, n_length),
            raster=_raster(clusters_m, clusters_n, raster_group(problem, config, num_sms)),
            sizes=(problem.m, problem.n, k_blocks),
        )

    def _d_map(self, d: Matrix) -> OperandMap | None:
        if not self._d_by_tma or self._shape.config.split_k > 1:
            return None
        shape = self._shape
        width = shape.store_row_bytes
        height = shape.store_columns if shape.config.swap_ab else ROWS_STORED
        dtype = shape.problem.d_dtype
        return OperandMap(dtype, d.columns, d.rows, d.row_stride, width // shape.d_bytes, height, width)

    def bind(self, at: Addresses) -> Launch:
        """Pack the parameter block for one set of addresses.

        Raises:
            DriverError: the driver refuses a tensor map.
        """
        ensure_context(self._kernel.device)  # encoding a tensor map needs one
        block = ctypes.create_string_buffer(PARAMS_BYTES + BYTES)
        start = -ctypes.addressof(block) % BYTES
        rows, columns = (at.b, at.a) if self._swap else (at.a, at.b)
        row_scales, column_scales = (at.b_scales, at.a_scales) if self._swap else (at.a_scales, at.b_scales)
        store_by_tma = self._d is not None and at.d % ALIGNMENT == 0
        maps = (
            (self._rows, rows),
            (self._columns, columns),
            (self._row_scales, row_scales),
            (self._column_scales, column_scales),
            (self._d if store_by_tma else None, at.d),
        )
        for index, (operand, address) in enumerate(maps):
            if operand is not None:
                offset = start + index * BYTES
                ctypes.memmove(ctypes.addressof(block) + offset, operand.encoded(address), BYTES)
        self._pack_tail(block, start + _TAIL_OFFSET, at.d, at.c, row_scales, column_scales, store_by_tma)
        kernel = self._kernel
        return Launch(
            kernel.handle,
            self.grid,
            kernel.num_threads,
            kernel.smem_bytes,
            ctypes.addressof(block) + start,
            block,
            kernel.device,
        )


@dataclass(frozen=True)
class _TailPacker:
    """The part of ``Params`` after the tensor maps."""

    d_row_stride: int
    c_row_stride: int
    row_scales: tuple[int, int, int]  # stride along rows, stride along K, 128-row blocks
    column_scales: tuple[int, int, int]
    raster: tuple[int, ...]
    sizes: tuple[int, int, int]

    def __call__(
        self, block: ctypes.Array[ctypes.c_char], offset: int, d: int, c: int, rows: int, columns: int, tma: bool
    ) -> None:
        _TAIL.pack_into(
            block,
            offset,
            *(d, self.d_row_stride, c, self.c_row_stride),
            *(rows, *self.row_scales, 0),
            *(columns, *self.column_scales, 0),
            *self.raster,
            *self.sizes,
            tma,
            *(0, 0),
        )


def raster_group(problem: GemmProblem, config: GemmConfig, num_sms: int) -> int:
    """Clusters along m that are walked before n advances: those that keep the tiles in flight nearest a square.

    The operands that the tiles in flight touch then take the fewest bytes of L2.
    """
    assert problem.m is not None
    clusters_m = -(-problem.m // (config.tile_m * config.cluster_m))
    in_flight = max(1, num_sms // (config.cluster_m * config.cluster_n * config.split_k))
    height, width = config.tile_m * config.cluster_m, config.tile_n * config.cluster_n
    candidates = [group for group in (1, 2, 4, 8, 16, 32) if group < clusters_m] + [clusters_m]
    return min(candidates, key=lambda group: group * height + -(-in_flight // group) * width)


def _raster(clusters_m: int, clusters_n: int, group: int) -> tuple[int, ...]:
    """The template's ``TileRaster``."""
    last_group = clusters_m % group or group
    divisors = (_divisor(group * clusters_n), _divisor(group), _divisor(last_group))
    return (clusters_m, clusters_n, group, last_group, *(number for pair in divisors for number in pair))


def _divisor(number: int) -> tuple[int, int]:
    """The template's ``Divisor``: dividends below 2^31 times the first, shifted by 31 and the second, are the quotients."""
    shift = (number - 1).bit_length()
    return -(-(1 << (31 + shift)) // number), shift


def _operand(shape: KernelShape, matrix: Matrix, major: str, tile_rows: int, shared_by: int) -> OperandMap:
    """The map of A or B; CTAs that share a tile load an equal part of it each."""
    dtype = "uint8" if shape.problem.traits.is_fp8 else "bf16"
    tile_k = shape.config.tile_k
    box = (tile_k, tile_rows // shared_by) if major == "k" else (64, tile_k // shared_by)
    return OperandMap(dtype, matrix.columns, matrix.rows, matrix.row_stride, *box, swizzle=128)


def _scales(granularity: str, length: int, k_blocks: int, strides: ScaleStrides, tile_rows: int) -> OperandMap | None:
    """The map of scales that go through the ring: one per row and 128 of K, MN-major."""
    if granularity != "row_k":
        return None
    return OperandMap("fp32", length, k_blocks, strides.k, tile_rows, 1, swizzle=16)


def _scale_fields(granularity: str, strides: ScaleStrides, length: int) -> tuple[int, int, int]:
    if granularity == "tensor":
        return 0, 0, 0
    return strides.mn, strides.k, -(-length // SCALE_GROUP)
