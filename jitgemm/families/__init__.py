"""Families of kernels and their registry."""

from __future__ import annotations

import importlib

from jitgemm.families.base import Family, KernelSpec

__all__ = ["FAMILY_MODULES", "Family", "KernelSpec", "family_of"]

FAMILY_MODULES = {
    "gemm": "jitgemm.families.gemm",
    "rowwise": "jitgemm.families.rowwise",
    "tiles": "jitgemm.families.tiles",
    "transpose_scales": "jitgemm.families.transpose_scales",
}
"""Family name -> module whose ``FAMILY`` implements the protocol."""


def family_of(spec: KernelSpec) -> Family:
    """The family that a spec belongs to.

    Raises:
        ValueError: the spec names a family that does not exist.
    """
    if spec.family not in FAMILY_MODULES:
        raise ValueError(f"kernel family {spec.family!r} does not exist; there are {', '.join(FAMILY_MODULES)}")
    family: Family = importlib.import_module(FAMILY_MODULES[spec.family]).FAMILY
    return family
