"""Grouped GEMM: candidates, limits and choice, by dense GEMM's cost model with the groups as more tiles.

As for dense GEMM, the expected rows of a group are the m of a choice, and the winners of a few anchors serve every m.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from jitgemm import settings
from jitgemm.device import SM90A, Device
from jitgemm.families.base import KernelSpec
from jitgemm.families.gemm import GemmConfig, kernel_shape
from jitgemm.families.grouped import FAMILY, MAX_BOX, GroupedProblem, smem_bytes
from jitgemm.heuristics import gemm, sm90a
from jitgemm.heuristics.anchored import Chooser
from jitgemm.heuristics.gemm import Explanation, Groups, Overrides
from jitgemm.settings import Settings

_MOST_TOKENS = 160  # of FP8, on the MMA's N side
_TALLEST_STEP = 128  # rows: what tiles' heights are multiples or divisors of
_SUMS_OF_THREE = 128  # registers a thread that sums may take where three warpgroups promote


def choose_config(problem: GroupedProblem, device: Device) -> GemmConfig:
    """The config for a problem with its expected m.

    Raises:
        ConfigError: no legal config meets the overrides in force.
    """
    assert problem.m is not None
    return chooser(problem, device)(problem.m)


def chooser(problem: GroupedProblem, device: Device, in_force: Settings | None = None) -> Chooser:
    """``choose_config`` for a problem with any m, under some settings, or those in force."""
    overrides = tuple((in_force or settings.current()).tuning().items())
    return _chooser(problem.without_m(), device, overrides)


@functools.lru_cache(maxsize=1024)
def _chooser(problem: GroupedProblem, device: Device, overrides: Overrides) -> Chooser:
    return Chooser(
        candidates(problem, overrides),
        lambda config: illegal(problem, config, device),
        lambda configs, ms: _costs(problem, configs, device, ms),
        overrides,
    )


def enumerate_configs(problem: GroupedProblem, device: Device) -> tuple[GemmConfig, ...]:
    """Every config that ``choose_config`` can return for the problem, whatever its m."""
    return chooser(problem, device).kernels


def enumerate_specs(problem: GroupedProblem, device: Device) -> tuple[KernelSpec, ...]:
    """Every kernel that calls of the problem can need: with any rows, with scales in any layout."""
    from jitgemm.families.fp4 import helper_specs
    from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES

    specs = [FAMILY.spec(problem, config, device.arch.name) for config in enumerate_configs(problem, device)]
    if problem.dense.traits.is_fp8:
        specs.append(TRANSPOSE_SCALES.spec(device.arch.name))
    if problem.dense.traits.fp4_b:
        specs += helper_specs(problem.dense.traits.fp4_group, device.arch.name)
    return tuple(specs)


def explain(problem: GroupedProblem, device: Device) -> Explanation:
    """Predicted cost of every config that a choice is made from, and why others are illegal.

    Raises:
        ConfigError: no legal config meets the overrides in force.
    """
    assert problem.m is not None
    return chooser(problem, device).explain(problem.m)


def candidates(problem: GroupedProblem, overrides: Overrides = ()) -> tuple[GemmConfig, ...]:
    """What a choice is made from: of FP8 a menu of its own, else dense GEMM's without clusters and split K; under
    overrides everything that has their values.
    """
    dense = problem.dense.without_sizes()
    if overrides:
        return tuple(gemm.generate(dense, overrides))
    return _menu(dataclasses.replace(problem, n=dense.n, k=dense.k, groups=1, m=None))


@functools.lru_cache(maxsize=256)
def _menu(problem: GroupedProblem) -> tuple[GemmConfig, ...]:
    traits = problem.dense.traits
    menu = gemm.corrections(problem.dense, sm90a.FP8_GROUPS_MENU if traits.is_fp8 and not traits.fp4_b else None)
    return tuple(dict.fromkeys(_fitting(problem, config) for config in menu))


def _fitting(problem: GroupedProblem, config: GemmConfig) -> GemmConfig:
    """The config as a grouped kernel can have it: without split K, in no other clusters than those that make up the
    columns of a scale of D, and with as many of its stages as leave room for what it holds beside dense GEMM's.

    As many blocks share an SM then as the cost model, which knows dense GEMM's kernels, takes for granted.
    """
    parts = problem.shape(config).scale_parts
    config = dataclasses.replace(config, cluster_m=1, cluster_n=parts, split_k=1)
    dense = problem.dense.without_sizes()
    while config.stages > 2 and (
        smem_bytes(problem.shape(config)) > SM90A.smem_per_block
        or problem.shape(config).blocks_per_sm != kernel_shape(dense, config).blocks_per_sm
    ):
        config = dataclasses.replace(config, stages=config.stages - 1)
    return config


def illegal(problem: GroupedProblem, config: GemmConfig, device: Device) -> str | None:
    """Why a config can't be built or would not run, or None."""
    shape = problem.shape(config)
    if config.cluster_m * config.split_k > 1 or config.cluster_n != shape.scale_parts:
        return "grouped kernels have no split K, and clusters only where they make up the columns of a scale of d"
    if config.cluster_n > 2:
        return "a cluster has at most 2 CTAs"
    tile, alignment = config.tile_m, math.gcd(problem.alignment, _TALLEST_STEP)
    if problem.kind == "contiguous" and alignment % tile and tile % alignment:
        return f"tile_m must divide {alignment}, of which groups start at multiples, or be a multiple of it"
    if problem.scale_slack and tile + problem.scale_slack > MAX_BOX:
        return f"tile_m must be at most {MAX_BOX - problem.scale_slack} where FP8 groups start at any row"
    if shape.math_warpgroups == 3 and problem.dense.promotes and shape.accumulator_registers > _SUMS_OF_THREE:
        return f"sums take more than {_SUMS_OF_THREE} registers a thread beside a group's tile"
    if config.swap_ab and problem.dense.promotes and not shape.fp4 and tile > _MOST_TOKENS:
        return f"tile_m must be at most {_MOST_TOKENS} beside a group's tile where operands are swapped"
    alone = dataclasses.replace(config, cluster_n=1)  # CTAs of a cluster share no operands
    reason = gemm.illegal_epilogue(shape) or gemm.illegal_tile(problem.dense.without_sizes(), alone, device.arch)
    if reason is not None:
        return reason
    limit = device.arch.smem_per_block
    return f"shared memory exceeds {limit} bytes" if smem_bytes(shape) > limit else None


def _costs(
    problem: GroupedProblem, configs: tuple[GemmConfig, ...], device: Device, ms: tuple[int, ...]
) -> list[list[float]]:
    groups = Groups(problem.groups, problem.alignment if problem.kind == "contiguous" else 0)
    alone = tuple(dataclasses.replace(config, cluster_n=1) for config in configs)
    return gemm.predict_all(problem.dense.without_m(), alone, device, ms, groups)
