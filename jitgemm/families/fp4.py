"""The kernels beside GEMMs with FP4 weights: weights to packed tiles and these to e5m2, packed scales of activations to
fp32.
"""

from __future__ import annotations

from jitgemm.families.base import KernelSpec
from jitgemm.families.gemm import MXFP4_GROUP, NVFP4_GROUP
from jitgemm.families.plain import Field, PlainFamily

FORMATS = {"mxfp4": MXFP4_GROUP, "nvfp4": NVFP4_GROUP}
"""Of K, that share a scale."""


class _Helper(PlainFamily):
    def kernel_name(self, spec: KernelSpec) -> str:
        """Without the prefix: profiles that are searched for ``gemm_``, as the peer's tests do, would find it."""
        return self.name


class _PackFamily(_Helper):
    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        return {**super().render_context(spec), "fp4_group": FORMATS[spec["format"]]}


PACK_THREADS = 512

PACK_FP4 = _PackFamily(
    "pack_fp4",
    (
        Field("weights", "const uint8_t*", "[groups, rows, k / 2]"),
        Field("scales", "const uint8_t*", "[groups, rows, scales of a row]"),
        Field("row_scales", "const float*", "[groups, rows], of NVFP4"),
        Field("data", "uint8_t*", "[groups, tiles of 64 rows, blocks of 128 of K, bytes of a tile]"),
        Field("units", "float*", "[groups, rows]"),
        Field("weights_group_stride", "int64_t", "bytes"),
        Field("weights_row_stride", "int64_t"),
        Field("scales_group_stride", "int64_t"),
        Field("scales_row_stride", "int64_t"),
        Field("scales_stride", "int64_t"),
        Field("rows", "int32_t"),
        Field("k", "int32_t"),
        Field("aligned", "int32_t", "whether rows start at multiples of 16 bytes"),
    ),
    num_threads=PACK_THREADS,
    describe=lambda spec: str(spec["format"]),
)

EXPAND_THREADS = 256

EXPAND_FP4 = _Helper(
    "expand_fp4",
    (
        Field("data", "const uint8_t*", "[tiles of 64 rows, k_blocks, bytes of a tile]"),
        Field("output", "uint8_t*", "[tiles * 64, k_blocks * 128], e5m2"),
        Field("k_blocks", "int32_t", "of 128 of K"),
        Field("blocks", "int32_t", "of all tiles"),
    ),
    num_threads=EXPAND_THREADS,
)
"""MXFP4 only: no FP8 format holds the products of NVFP4's codes and scales."""

UNPACK_THREADS = 128

UNPACK_SCALES = _Helper(
    "unpack_scales",
    (
        Field("input", "const uint32_t*", "[planes, mn, words]"),
        Field("output", "float*", "[planes, k_blocks, mn_aligned]"),
        Field("plane_stride", "int64_t", "words, of the input"),
        Field("mn_stride", "int64_t"),
        Field("k_stride", "int64_t"),
        Field("mn", "int32_t"),
        Field("mn_aligned", "int32_t"),
        Field("k_blocks", "int32_t"),
        Field("blocks_of_plane", "int32_t"),
    ),
    num_threads=UNPACK_THREADS,
)


def helper_specs(fp4_group: int, arch: str) -> list[KernelSpec]:
    """The kernels that calls of a GEMM with such weights can need beside its own."""
    name = next(name for name, group in FORMATS.items() if group == fp4_group)
    return [UNPACK_SCALES.spec(arch), PACK_FP4.spec(arch, format=name)]
