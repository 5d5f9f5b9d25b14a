"""FP4 weights and many rows: whether weights are expanded to FP8 in memory before they are multiplied (docs/fp4.md)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jitgemm import settings
from jitgemm.device import Device
from jitgemm.families.base import KernelSpec
from jitgemm.families.fp4 import EXPAND_FP4
from jitgemm.families.gemm import (
    EXPANDED,
    FAMILY,
    FAR_FP4,
    FP4,
    MMA_M,
    MXFP4_GROUP,
    SCALE_GROUP,
    GemmConfig,
    GemmProblem,
    packed_bytes,
)
from jitgemm.heuristics import gemm, sm90a
from jitgemm.settings import Settings


class Expansion(NamedTuple):
    """What a call launches instead of one kernel: the expansion, the product, and what weights need that can't be
    expanded.
    """

    product: GemmConfig
    far: GemmConfig
    us: float
    """Predicted, of all three."""
    packed_us: float
    """Of the kernel that would multiply packed weights."""
    workspace_bytes: int

    def specs(self, problem: GemmProblem, arch: str) -> list[KernelSpec]:
        """The kernels, in the order of their launches."""
        products = (expanded(problem), self.product), (far(problem), self.far)
        return [EXPAND_FP4.spec(arch), *(FAMILY.spec(of, config, arch) for of, config in products)]


def expanded(problem: GemmProblem) -> GemmProblem:
    """The product of expanded weights."""
    return dataclasses.replace(problem, recipe=EXPANDED.name)


def far(problem: GemmProblem) -> GemmProblem:
    """The product of weights whose scales lie too far apart to be expanded."""
    return dataclasses.replace(problem, recipe=FAR_FP4.name)


def may_expand(problem: GemmProblem, in_force: Settings) -> bool:
    """Whether calls of some m may expand their weights.

    Not those whose config is given, and not where a row of D must have the same bits whatever m is.
    """
    asked = problem.recipe == FP4 and in_force.expand_fp4 is not False
    return asked and not in_force.tuning() and not in_force.batch_invariant


def workspace_shape(n: int, k: int) -> tuple[int, int]:
    """Rows and columns of expanded weights, a byte each."""
    return -(-n // MMA_M) * MMA_M, -(-k // SCALE_GROUP) * SCALE_GROUP


def expansion(problem: GemmProblem, device: Device, in_force: Settings | None = None) -> Expansion | None:
    """What a call without C of a problem with its m launches, where it expands its weights; else None."""
    in_force = in_force or settings.current()
    if not may_expand(problem, in_force):
        return None
    m = problem.m
    assert m is not None
    served = gemm.chooser(problem, device, in_force).serving(m)
    packed_us = gemm.predict(problem, served.config, device)["total"]
    # The menu's factor was measured where MMAs are fast: what does not overlap with them is less of slow ones.
    factor = gemm.corrections(problem.without_sizes()).get(served.config, 1.0)
    slower_mmas = sm90a.NOMINAL_FP8_FLOPS / device.mma_fp8_flops_per_clock_per_sm
    packed_us *= served.correction * (1 + (factor - 1) / slower_mmas) / factor
    product, rest = (gemm.chooser(of(problem), device, in_force)(m) for of in (expanded, far))
    rows, columns = workspace_shape(problem.n, problem.k)
    moved = rows * columns * (1 + packed_bytes(MXFP4_GROUP) / (MMA_M * SCALE_GROUP))
    us = gemm.predict(expanded(problem), product, device)["total"]
    us += sm90a.EXPANSION_LAUNCHES_US + moved / device.hbm_bytes_per_s * 1e6
    if us >= packed_us and in_force.expand_fp4 is None:
        return None
    return Expansion(product, rest, us, packed_us, rows * columns)


def expansion_specs(problem: GemmProblem, device: Device) -> list[KernelSpec]:
    """Every kernel that calls of the problem can need for it."""
    if not may_expand(problem, settings.current()):
        return []
    arch = device.arch.name
    products = [
        FAMILY.spec(one, config, arch)
        for one in (expanded(problem), far(problem))
        for config in gemm.enumerate_configs(one, device)
    ]
    return [EXPAND_FP4.spec(arch), *products]
