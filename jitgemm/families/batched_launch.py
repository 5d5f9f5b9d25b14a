"""How the kernels of several GEMMs at once are launched: parameter blocks, tensor maps and grid."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple

from jitgemm.driver import Arguments, Launch, ensure_context
from jitgemm.errors import DriverError, ProblemError
from jitgemm.families.batched import MOST_GROUPS_OF_K, BatchedProblem, producer_stores
from jitgemm.families.gemm import MMA_M, ROWS_STORED, GemmConfig, kernel_shape, scale_blocks
from jitgemm.families.gemm_launch import ScaleStrides, divisor, raster_fields, raster_group, scale_fields
from jitgemm.families.grouped_launch import Stack
from jitgemm.kernel import Kernel
from jitgemm.tensor_map import ALIGNMENT, BYTES, OperandMap

# The template's `Params`: tensor maps, then d_plain, c, row_scale_matrix, column_scale_matrix, d_group_stride,
# c_group_stride, raster, by_group, tiles, m, n, d_aligned, adds; then what the kinds differ in.
MAPS_OF_BATCHES = ("rows", "rows_cut", "columns", "columns_cut", "row_scales", "column_scales", "d")
MAPS_OF_K = ("row_scales", "column_scales", "d")
COMMON = struct.Struct("<Qq Qq Qiiii Qiiii qq iiiiIIIIII II iiiii")
BATCHES = struct.Struct("<ii II ii II iii")  # k_blocks, batches, by_batch, k_blocks_of_batch, scale stride, holes
GROUP = struct.Struct("<iii4x")  # of groups along k: k_blocks, first_scale, plane
_D, _C, _ROW_SCALES, _COLUMN_SCALES = 0, 2, 4, 7  # words of these pointers, behind the maps


def params_bytes(kind: str) -> int:
    """Bytes of the parameter block."""
    if kind != "k_grouped":
        return _aligned(len(MAPS_OF_BATCHES) * BYTES + COMMON.size + BATCHES.size)
    return maps_of_groups() + 2 * MOST_GROUPS_OF_K * BYTES


def maps_of_groups() -> int:
    """Offset of the groups' maps along k."""
    return _aligned(len(MAPS_OF_K) * BYTES + COMMON.size + MOST_GROUPS_OF_K * GROUP.size)


def _aligned(size: int) -> int:
    return -(-size // BYTES) * BYTES


class Heads(NamedTuple):
    """Of D's columns: those of a head, without its hole; those before the hole; and the hole's."""

    width: int
    left: int = 0
    mid: int = 0


class PartOfK(NamedTuple):
    """A group along K: its length, blocks of scales ahead of it, D's group, and A and B in it.

    A and B start so many bytes after their tensors, in rows so many elements apart.
    """

    k: int
    first_scale: int
    plane: int
    a_offset: int
    a_row_stride: int
    b_offset: int
    b_row_stride: int


class BatchedGeometry:
    """All of a launch that does not depend on addresses.

    Args:
        problem: with its m.
        config: tiles and cluster.
        kernel: the loaded kernel of both.
        a: A as stored, ``[m, k]`` or ``[k, m]``, of each batch; along K None.
        b: B as stored, the same with n.
        d: D of each group, with the columns of holes.
        c: strides of C along rows and groups.
        a_scales: of A, k-blocks as rows.
        b_scales: of B, k-blocks as rows; of 128 x 128, blocks of rows as rows ...
        b_scales_k_stride: ... with this stride along K.
        num_sms: multiprocessors to use.
        batches: of a group.
        heads: D's columns.
        parts: the groups along K, at most ``MOST_GROUPS_OF_K``.
        adds: C is D.
        pdl: launch with programmatic dependent launch.

    Raises:
        ProblemError: there are more tiles than the kernel can count.
    """

    def __init__(
        self,
        problem: BatchedProblem,
        config: GemmConfig,
        kernel: Kernel,
        a: Stack | None,
        b: Stack | None,
        d: Stack,
        c: tuple[int, int],
        a_scales: Stack | None,
        b_scales: Stack | None,
        b_scales_k_stride: int,
        num_sms: int,
        *,
        batches: int = 1,
        heads: Heads | None = None,
        parts: Sequence[PartOfK] = (),
        adds: bool = False,
        pdl: bool = False,
    ) -> None:
        assert problem.m is not None
        self._kernel, self._problem, self._parts, self._adds = kernel, problem, parts, adds
        self._config = config
        self._shape = shape = kernel_shape(problem.dense.without_sizes(), config)
        self._size = params_bytes(problem.kind)
        m, n, swap, recipe = problem.m, problem.n, config.swap_ab, problem.dense.traits
        heads = heads or Heads(n)
        self._d_rows_aligned = _rows_aligned(d, heads, shape.d_bytes, shape.store_row_bytes // shape.d_bytes)

        def scales_map(granularity: str, scales: Stack | None, tile: int) -> OperandMap | None:
            if granularity != "row_k" or scales is None:
                return None
            if problem.kind == "k_grouped":
                return OperandMap("fp32", scales.columns, scales.rows, scales.row_stride, tile, 1, 16)
            return _map("fp32", scales, tile, 1, 16)

        a_map = scales_map(recipe.a_scales, a_scales, config.tile_m)
        b_map = scales_map(recipe.b_scales, b_scales, config.tile_n)
        b_fields, b_group_stride = (0, 0, 0), 0
        if recipe.b_scales == "block_k" and b_scales is not None:
            b_fields = scale_fields("block_k", ScaleStrides(b_scales.row_stride, b_scales_k_stride), scale_blocks(n))
            b_group_stride = b_scales.group_stride
        none = (0, 0, 0)
        row_fields, column_fields = (b_fields, none) if swap else (none, b_fields)
        self._scale_maps = (b_map, a_map) if swap else (a_map, b_map)
        self._d_map = None
        if self._d_rows_aligned and config.split_k == 1:
            width = shape.store_row_bytes
            rows = MMA_M if producer_stores(problem.kind, shape) else ROWS_STORED
            height = shape.store_columns if swap else rows
            self._d_map = _map(problem.d_dtype, d, width // shape.d_bytes, height, width)
        if a is not None and b is not None:
            a_maps = self._operand(a, problem.dense.a_major, config.tile_m, config.cluster_n)
            b_maps = self._operand(b, problem.dense.b_major, config.tile_n, config.cluster_m)
            self._operand_maps = (*b_maps, *a_maps) if swap else (*a_maps, *b_maps)

        clusters_m = -(-m // (config.tile_m * config.cluster_m))
        clusters_n = -(-n // (config.tile_n * config.cluster_n))
        groups = len(parts) or problem.groups
        clusters = clusters_m * clusters_n * groups
        cluster_size = config.cluster_m * config.cluster_n * config.split_k
        if clusters * cluster_size >= 2**30:
            raise ProblemError(f"d has {clusters} tiles; accepted is less than {2**30}")
        if config.split_k > 1:
            resident = clusters
        else:
            slots = max(1, num_sms * shape.blocks_per_sm // cluster_size)
            resident = -(-clusters // -(-clusters // slots))
        self.grid = (resident * cluster_size, 1, 1)
        self.launch = Launch(kernel.handle, self.grid, kernel.num_threads, kernel.smem_bytes, kernel.device, pdl)
        raster = raster_fields(clusters_m, clusters_n, raster_group(m, config, num_sms))
        self._common = (
            *(0, d.row_stride, 0, c[0], 0, *row_fields, 0, 0, *column_fields, 0, d.group_stride, c[1]),
            *(*raster, *divisor(clusters_m * clusters_n), clusters, m, n),
        )
        if problem.kind == "k_grouped":
            self._rest = b"".join(
                GROUP.pack(-(-part.k // config.tile_k), part.first_scale, part.plane) for part in parts
            )
        else:
            of_batch = -(-(problem.k // batches) // config.tile_k)
            self._rest = BATCHES.pack(
                *(of_batch * batches, batches, *divisor(of_batch), of_batch, b_group_stride),
                *(*divisor(heads.width), *heads),
            )

    def _operand(
        self, stack: Stack, major: str, tile_rows: int, shared_by: int
    ) -> tuple[OperandMap, OperandMap | None]:
        """The map of A or B and, where its end cuts the last tile, the map for that (see dense GEMM's)."""
        dtype, tile_k = self._dtype, self._config.tile_k
        if major == "mn":
            return _map(dtype, stack, 64, tile_k // shared_by, 128), None
        left = stack.rows % tile_rows
        part = left if shared_by == 1 else -(-left // (8 * shared_by)) * 8
        whole = _map(dtype, stack, tile_k, tile_rows // shared_by, 128)
        return whole, _map(dtype, stack, tile_k, part, 128) if left else None

    @property
    def _dtype(self) -> str:
        return "uint8" if self._problem.dense.traits.is_fp8 else "bf16"

    def _part(self, part: PartOfK, of_a: bool) -> OperandMap:
        """The map of A or B in one group along K; behind its end are zeros."""
        problem, config, dtype = self._problem, self._config, self._dtype
        assert problem.m is not None
        extent, major, tile, shared_by, stride = (
            (problem.m, problem.dense.a_major, config.tile_m, config.cluster_n, part.a_row_stride)
            if of_a
            else (problem.n, problem.dense.b_major, config.tile_n, config.cluster_m, part.b_row_stride)
        )
        if major == "mn":
            return OperandMap(dtype, extent, part.k, stride, 64, config.tile_k // shared_by, 128)
        return OperandMap(dtype, part.k, extent, stride, config.tile_k, tile // shared_by, 128)

    def bind(self, a: int, a_scales: int, b: int, b_scales: int, d: int, c: int) -> Arguments:
        """The parameter block for tensors at these addresses, 0 where there is none.

        Raises:
            DriverError: the driver refuses a tensor map.
        """
        try:
            return self._arguments(a, a_scales, b, b_scales, d, c)
        except DriverError:
            ensure_context(self._kernel.device)  # a thread's first CUDA call
            return self._arguments(a, a_scales, b, b_scales, d, c)

    def _arguments(self, a: int, a_scales: int, b: int, b_scales: int, d: int, c: int) -> Arguments:
        swap, along_k = self._config.swap_ab, bool(self._parts)
        d_aligned = d % ALIGNMENT == 0 and self._d_rows_aligned
        # The copy engine's sum is as exact as the tile's own where D is FP32.
        adds = self._adds and d_aligned and self._d_map is not None and self._problem.d_dtype == "fp32"
        first, second = (b_scales, a_scales) if swap else (a_scales, b_scales)
        maps: list[tuple[OperandMap | None, int]] = []
        if not along_k:
            addresses = (b, b, a, a) if swap else (a, a, b, b)
            maps += zip(self._operand_maps, addresses, strict=True)
        maps += zip((*self._scale_maps, self._d_map if d_aligned else None), (first, second, d), strict=True)
        arguments = Arguments(self._size)
        for index, (operand, address) in enumerate(maps):
            if operand is not None:
                operand.write(arguments.address + index * BYTES, address)
        tail = len(maps) * BYTES
        packed = COMMON.pack(*self._common, d_aligned, adds) + self._rest
        ctypes.memmove(arguments.address + tail, packed, len(packed))
        if along_k:
            target = arguments.address + maps_of_groups()
            for index, part in enumerate(self._parts):
                of_a, of_b = (MOST_GROUPS_OF_K, 0) if swap else (0, MOST_GROUPS_OF_K)
                self._part(part, True).write(target + (of_a + index) * BYTES, a + part.a_offset)
                self._part(part, False).write(target + (of_b + index) * BYTES, b + part.b_offset)
        words, base = arguments.words, arguments.first + tail // 8
        words[base + _D] = d
        words[base + _C] = 0 if adds else c
        words[base + _ROW_SCALES], words[base + _COLUMN_SCALES] = first, second
        return arguments


def _map(dtype: str, stack: Stack, box_width: int, box_height: int, swizzle: int) -> OperandMap:
    return OperandMap(
        *(dtype, stack.columns, stack.rows, stack.row_stride, box_width, box_height, swizzle),
        *(stack.groups, stack.group_stride),
    )


def _rows_aligned(d: Stack, heads: Heads, size: int, box: int) -> bool:
    """Whether all rows of D and parts of heads start and end on multiples of 16 bytes, if D does, and none ends in a
    box of columns.
    """
    if heads.mid and (heads.left % box or (heads.width - heads.left) % box or heads.mid * size % ALIGNMENT):
        return False
    return not any(number * size % ALIGNMENT for number in (d.row_stride, d.columns, d.group_stride))
