"""Families of kernels and their registry."""

from __future__ import annotations

import importlib

from jitgemm.families.base import Family, KernelSpec

__all__ = ["FAMILY_MODULES", "Family", "KernelSpec", "family_of"]

FAMILY_MODULES = {
    "batched_gemm": "jitgemm.families.batched",
    "expand_fp4": "jitgemm.families.fp4:EXPAND_FP4",
    "gate_logits": "jitgemm.families.moe:GATE_LOGITS",
    "gemm": "jitgemm.families.gemm",
    "hc_mix": "jitgemm.families.hyper_connections:HC_MIX",
    "hc_post": "jitgemm.families.hyper_connections:HC_POST",
    "hc_prenorm": "jitgemm.families.hyper_connections:HC_PRENORM",
    "hc_sinkhorn": "jitgemm.families.hyper_connections:HC_SINKHORN",
    "moe_combine": "jitgemm.families.moe:MOE_COMBINE",
    "moe_map": "jitgemm.families.moe:MOE_MAP",
    "moe_permute": "jitgemm.families.moe:MOE_PERMUTE",
    "topk_gate": "jitgemm.families.moe:TOPK_GATE",
    "m_grouped_gemm": "jitgemm.families.grouped",
    "pack_fp4": "jitgemm.families.fp4:PACK_FP4",
    "pack_ue8m0": "jitgemm.families.pack_scales:PACK_UE8M0",
    "rowwise": "jitgemm.families.rowwise",
    "sum_parts": "jitgemm.families.sum_parts:SUM_PARTS",
    "tiles": "jitgemm.families.tiles",
    "transpose_scales": "jitgemm.families.transpose_scales",
    "unpack_scales": "jitgemm.families.fp4:UNPACK_SCALES",
}
"""Family name -> module, and after a colon the name in it, ``FAMILY`` by default, that implements the protocol."""


def family_of(spec: KernelSpec) -> Family:
    """The family that a spec belongs to.

    Raises:
        ValueError: the spec names a family that does not exist.
    """
    if spec.family not in FAMILY_MODULES:
        raise ValueError(f"kernel family {spec.family!r} does not exist; there are {', '.join(FAMILY_MODULES)}")
    module, _, name = FAMILY_MODULES[spec.family].partition(":")
    family: Family = getattr(importlib.import_module(module), name or "FAMILY")
    return family
