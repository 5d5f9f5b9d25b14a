"""How a dense GEMM kernel is launched: its parameter block, its tensor maps and its grid."""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

from jitgemm.driver import Arguments, Launch, ensure_context, replace_tensor_map_address_function
from jitgemm.errors import DriverError
from jitgemm.families.gemm import (
    D_BYTES,
    ROWS_STORED,
    GemmConfig,
    GemmProblem,
    KernelShape,
    kernel_shape,
    scale_blocks,
)
from jitgemm.kernel import Kernel
from jitgemm.tensor_map import ALIGNMENT, BYTES, OperandMap

# The template's `Params`: tensor maps, then d_plain, c, row_scale_matrix, column_scale_matrix, raster,
# m, n, k_blocks, d_aligned.
_MAPS = ("rows", "rows_cut", "columns", "columns_cut", "row_scales", "column_scales", "d")
_TAIL = struct.Struct("<Qq Qq Qiiii Qiiii iiii IIIIII iii i")
_TAIL_OFFSET = len(_MAPS) * BYTES
STEPS_OFFSET = _TAIL_OFFSET + _TAIL.size
"""Where the parameters of a kernel with an epilogue go on with its ``EpilogueSteps``."""
_D, _C, _ROW_SCALES, _COLUMN_SCALES = (_TAIL_OFFSET // 8 + word for word in (0, 2, 4, 7))  # words of these pointers
PARAMS_BYTES = -(-(_TAIL_OFFSET + _TAIL.size) // BYTES) * BYTES


class Matrix(NamedTuple):
    """A matrix as the kernel sees it; strides in elements."""

    rows: int
    columns: int
    row_stride: int


class ScaleStrides(NamedTuple):
    """Strides of a scale tensor, in elements: along the operand's rows (or blocks of rows) and along K."""

    mn: int
    k: int


class GemmGeometry:
    """All of a launch that does not depend on addresses.

    Args:
        problem: with its m.
        config: tiles and cluster.
        kernel: the loaded kernel of both.
        a: A as stored: ``[m, k]``, or ``[k, m]`` where MN-major.
        b: B as stored: ``[n, k]``, or ``[k, n]`` where MN-major; not used where B is FP4, which is packed.
        d: D.
        c_row_stride: row stride of C.
        a_scales: strides of A's scales, as the kernel takes them.
        b_scales: strides of B's scales, as the kernel takes them.
        num_sms: multiprocessors to use.
        pdl: launch with programmatic dependent launch.
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
        pdl: bool = False,
    ) -> None:
        self._problem, self._config, self._kernel = problem.without_m(), config, kernel
        self._num_sms, self._pdl = num_sms, pdl
        self._shape = shape = kernel_shape(problem.without_sizes(), config)
        self._swap = config.swap_ab
        self._k_blocks = -(-problem.k // config.tile_k)
        self._a, self._d, self._c_row_stride = a, d, c_row_stride
        self._b_maps: tuple[OperandMap | None, OperandMap | None]
        self._maps: tuple[OperandMap | None, ...]

        # The MMA's M side takes A, or B where they are swapped.
        self._packed: int | None = None  # of the maps, the one in whose place the address of packed weights stands
        if problem.traits.fp4_b:
            self._packed = _MAPS.index("rows" if config.swap_ab else "columns")
            self._b_maps = None, None
            self._b_scales_map = None
            self._b_fields = scale_fields(problem.traits.b_scales, b_scales, scale_blocks(problem.n, problem.gated))
        elif config.swap_ab:
            self._b_maps = _operand(shape, b, shape.m_side_major, shape.mma_m, config.cluster_m)
            self._b_scales_map = _scales(shape.m_side_scales, problem.n, self._k_blocks, b_scales, shape.mma_m)
            self._b_fields = scale_fields(shape.m_side_scales, b_scales, scale_blocks(problem.n, problem.gated))
        else:
            self._b_maps = _operand(shape, b, shape.n_side_major, shape.mma_n, config.cluster_m)
            self._b_scales_map = _scales(shape.n_side_scales, problem.n, self._k_blocks, b_scales, shape.mma_n)
            self._b_fields = scale_fields(shape.n_side_scales, b_scales, scale_blocks(problem.n, problem.gated))
        assert problem.m is not None
        self._d_rows_aligned = _rows_aligned(shape, d)
        self._set_m(problem.m, a_scales)

    def with_m(self, m: int, a_scales: ScaleStrides) -> GemmGeometry:
        """The same for another m, where A is K-major; with the strides of as many scales."""
        other = object.__new__(GemmGeometry)
        other.__dict__.update(self.__dict__)
        a, d = self._a, self._d
        other._a, other._d = Matrix(m, a.columns, a.row_stride), Matrix(m, d.columns, d.row_stride)
        other._set_m(m, a_scales)
        return other

    def _set_m(self, m: int, a_scales: ScaleStrides) -> None:
        """All that depends on m."""
        shape, config, k_blocks, n = self._shape, self._config, self._k_blocks, self._problem.n
        if self._swap:
            major, granularity, tile_rows = shape.n_side_major, shape.n_side_scales, shape.mma_n
        else:
            major, granularity, tile_rows = shape.m_side_major, shape.m_side_scales, shape.mma_m
        a_maps = _operand(shape, self._a, major, tile_rows, config.cluster_n)
        a_scales_along_k = -(-self._problem.k // self._problem.traits.a_group)
        a_scales_map = _scales(granularity, m, a_scales_along_k, a_scales, tile_rows, shape.a_scales_per_stage)
        d_map = _output(shape, self._d) if config.split_k == 1 else None  # split, D is stored without TMA
        a_fields, b_fields = scale_fields(granularity, a_scales, scale_blocks(m)), self._b_fields
        if self._swap:
            self._maps = (*self._b_maps, *a_maps, self._b_scales_map, a_scales_map, d_map)
            row_fields, column_fields = b_fields, a_fields
        else:
            self._maps = (*a_maps, *self._b_maps, a_scales_map, self._b_scales_map, d_map)
            row_fields, column_fields = a_fields, b_fields
        # The parameters of a first call and the addresses of its maps, by whether D is aligned.
        self._first: dict[bool, tuple[bytes, tuple[int, ...]]] = {}

        clusters_m = -(-m // (config.tile_m * config.cluster_m))
        clusters_n = -(-n // (config.tile_n * config.cluster_n))
        clusters, cluster_size = clusters_m * clusters_n, config.cluster_m * config.cluster_n * config.split_k
        if config.split_k > 1:
            resident = clusters  # one tile per cluster; the hardware queues what does not fit
        else:
            slots = max(1, self._num_sms * shape.blocks_per_sm // cluster_size)
            rounds = -(-clusters // slots)
            resident = -(-clusters // rounds)  # as many tiles for each as can be
        self.grid = (resident * cluster_size, 1, 1)
        kernel = self._kernel
        self.launch = Launch(kernel.handle, self.grid, kernel.num_threads, kernel.smem_bytes, kernel.device, self._pdl)
        raster = raster_fields(clusters_m, clusters_n, raster_group(m, config, self._num_sms))
        self._tail = (
            *(0, self._d.row_stride, 0, self._c_row_stride, 0, *row_fields, 0, 0, *column_fields, 0),
            *(*raster, m, n, k_blocks),
        )

    def bind(self, a: int, a_scales: int, b: int, b_scales: int, d: int, c: int) -> Arguments:
        """The parameter block for tensors at these addresses, 0 where there is none.

        Raises:
            DriverError: the driver refuses a tensor map.
        """
        if self._swap:
            a, a_scales, b, b_scales = b, b_scales, a, a_scales
        d_aligned = d % ALIGNMENT == 0 and self._d_rows_aligned
        addresses = (a, a, b, b, a_scales, b_scales, d if d_aligned else 0)
        try:
            arguments = self._arguments(addresses, d_aligned)
        except DriverError:
            ensure_context(self._kernel.device)  # a thread's first CUDA call
            arguments = self._arguments(addresses, d_aligned)
        words, first = arguments.words, arguments.first
        if self._packed is not None:
            words[first + self._packed * BYTES // 8] = addresses[self._packed]
        words[first + _D] = d
        words[first + _C] = c
        words[first + _ROW_SCALES] = a_scales
        words[first + _COLUMN_SCALES] = b_scales
        return arguments

    def _arguments(self, addresses: tuple[int, ...], d_aligned: bool) -> Arguments:
        """All but the plain pointers."""
        arguments = Arguments(PARAMS_BYTES)
        known = self._first.get(d_aligned)
        if known is not None:
            params, before = known
            target, status = arguments.address, 0
            ctypes.memmove(target, params, PARAMS_BYTES)
            replace = replace_tensor_map_address_function()
            for operand, address, old in zip(self._maps, addresses, before, strict=True):
                if address != old and operand is not None:
                    status |= replace(target, address)
                target += BYTES
            if status:
                raise DriverError(f"the driver refuses one of the addresses {', '.join(map(hex, addresses))}")
            return arguments
        for index, (operand, address) in enumerate(zip(self._maps, addresses, strict=True)):
            if operand is not None and (d_aligned or _MAPS[index] != "d"):
                operand.write(arguments.address + index * BYTES, address)
        tail = _TAIL.pack(*self._tail, d_aligned)
        ctypes.memmove(arguments.address + _TAIL_OFFSET, tail, _TAIL.size)
        self._first[d_aligned] = ctypes.string_at(arguments.address, PARAMS_BYTES), addresses
        return arguments


def raster_group(m: int, config: GemmConfig, num_sms: int) -> int:
    """Clusters along m that are walked before n advances: those that keep the tiles in flight nearest a square.

    The operands that the tiles in flight touch then take the fewest bytes of L2.
    """
    height, width = config.tile_m * config.cluster_m, config.tile_n * config.cluster_n
    clusters_m = -(-m // height)
    if clusters_m == 1:
        return 1
    in_flight = max(1, num_sms // (config.cluster_m * config.cluster_n * config.split_k))
    candidates = [group for group in (1, 2, 4, 8, 16, 32) if group < clusters_m] + [clusters_m]
    return min(candidates, key=lambda group: group * height + -(-in_flight // group) * width)


def raster_fields(clusters_m: int, clusters_n: int, group: int) -> tuple[int, ...]:
    """The template's ``TileRaster``."""
    last_group = clusters_m % group or group
    divisors = (divisor(group * clusters_n), divisor(group), divisor(last_group))
    return (clusters_m, clusters_n, group, last_group, *(number for pair in divisors for number in pair))


def divisor(number: int) -> tuple[int, int]:
    """The template's ``Divisor``: dividend (below 2^31) times the first, shifted by 31 and the second."""
    shift = (number - 1).bit_length()
    return -(-(1 << (31 + shift)) // number), shift


def _operand(
    shape: KernelShape, matrix: Matrix, major: str, tile_rows: int, shared_by: int
) -> tuple[OperandMap, OperandMap | None]:
    """The map of A or B and, where its end cuts the last tile, the map for that.

    CTAs that share a tile load a part each. Of a tile that is cut, only the rows that exist are asked for: rows beyond
    the end cost the copy engine some 9 cycles each, others 1.2 (measured on an H200).
    """
    dtype = "uint8" if shape.problem.traits.is_fp8 else "bf16"
    tile_k = shape.config.tile_k

    def mapped(box_width: int, box_height: int) -> OperandMap:
        return OperandMap(dtype, matrix.columns, matrix.rows, matrix.row_stride, box_width, box_height, 128)

    if major == "mn":  # in slabs of 64, of which the kernel asks for those that exist
        return mapped(64, tile_k // shared_by), None
    left = matrix.rows % tile_rows
    part = left if shared_by == 1 else -(-left // (8 * shared_by)) * 8  # whole swizzle atoms of 8 rows
    return mapped(tile_k, tile_rows // shared_by), mapped(tile_k, part) if left else None


def _scales(
    granularity: str, length: int, along_k: int, strides: ScaleStrides, tile_rows: int, per_stage: int = 1
) -> OperandMap | None:
    """The map of scales that go through the ring: one per row and 128 of K, or less, MN-major."""
    if granularity != "row_k":
        return None
    return OperandMap("fp32", length, along_k, strides.k, tile_rows, per_stage, 16)


def d_map_type(d_dtype: str) -> str:
    """The type of elements of D, as tensor maps name it."""
    return "uint8" if D_BYTES[d_dtype] == 1 else d_dtype


def _rows_aligned(shape: KernelShape, d: Matrix) -> bool:
    """Whether D's rows start and end on multiples of 16 bytes, if D does."""
    # A store by TMA clips the last columns in such steps: what lies behind others would be overwritten.
    return d.row_stride * shape.d_bytes % ALIGNMENT == 0 and d.columns * shape.d_bytes % ALIGNMENT == 0


def _output(shape: KernelShape, d: Matrix) -> OperandMap | None:
    """The map of D, where TMA can store it."""
    if not _rows_aligned(shape, d):
        return None
    width = shape.store_row_bytes
    height = shape.store_columns if shape.config.swap_ab else ROWS_STORED
    return OperandMap(
        d_map_type(shape.problem.d_dtype), d.columns, d.rows, d.row_stride, width // shape.d_bytes, height, width
    )


def scale_fields(granularity: str, strides: ScaleStrides, blocks: int) -> tuple[int, int, int]:
    """Stride along rows, stride along K, and 128-row blocks."""
    if granularity == "tensor":
        return 0, 0, 0
    return strides.mn, strides.k, blocks
