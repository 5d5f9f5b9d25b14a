"""Scales as UE8M0: the exponents of fp32 powers of two, four along K to an int32, in the layout that TMA loads."""

from __future__ import annotations

from jitgemm.families.base import KernelSpec
from jitgemm.families.plain import Field, PlainFamily

THREADS = 128
"""Of a block: neighbours along mn, whose words lie side by side."""


class _PackFamily(PlainFamily):
    def kernel_name(self, spec: KernelSpec) -> str:
        return "pack_fp32_into_ue8m0"  # so DeepGEMM's tests find it in a profile; see also transpose_scales


PACK_UE8M0 = _PackFamily(
    "pack_ue8m0",
    (
        Field("input", "const uint32_t*", "bits of fp32 [planes, mn, k_blocks]; grouped: of [k_blocks, mn]"),
        Field("layout", "const int32_t*", "grouped: [groups], each one's k or, in the psum layout, where it ends"),
        Field("output", "uint32_t*", "[planes, words, mn]"),
        Field("stride_plane", "int64_t", "elements, of the input"),
        Field("stride_mn", "int64_t"),
        Field("stride_k", "int64_t"),
        Field("output_stride_plane", "int64_t"),
        Field("output_stride_word", "int64_t"),
        Field("mn", "int32_t"),
        Field("k_blocks", "int32_t", "of a plane; grouped: of all groups"),
        Field("words", "int32_t", "likewise"),
        Field("gran_k", "int32_t", "grouped: elements of K that share a scale"),
        Field("alignment", "int32_t", "of the psum layout; 0: the layout holds sizes"),
    ),
    num_threads=THREADS,
    describe=lambda spec: "groups along k" if spec["grouped"] else "planes",
)
