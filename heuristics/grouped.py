"""Grouped GEMM: candidates, limits and choice, by dense GEMM's cost model with the groups as more tiles.

As for dense GEMM, the expected rows of a group are the m of a choice, and the winners of a few anchors serve every m.
"""

from __future__ import annotations

import dataclasses
import functools

from jitgemm import settings
from jitgemm.device import SM90A, Device
from jitgemm.families.base import KernelSpec
from jitgemm.families.gemm import GemmConfig, GemmProblem, kernel_shape
from jitgemm.families.grouped import FAMILY, GroupedProblem
from jitgemm.heuristics import gemm
from jitgemm.heuristics.gemm import ANCHORS, MAX_KERNELS, Candidate, Explanation, Groups, Overrides, serving_anchors
from jitgemm.heuristics.pruning import assign
from jitgemm.settings import Settings

# Tiles beside those of dense GEMM's menu: between few tokens and 64 rows, weights are read once whatever the tile, and
# the smallest that holds a group's rows leaves most to the loads.
_TOKEN_TILES = ((48, 64), (48, 128), (64, 64), (64, 128), (80, 128), (96, 128))

_MOST_TOKENS = 96  # of FP8, on the MMA's N side
_SUMS_OF_THREE = 120  # registers a thread that sums may take where three warpgroups promote


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


def enumerate_configs(problem: GroupedProblem, device: Device) -> tuple[GemmConfig, ...]:
    """Every config that ``choose_config`` can return for the problem, whatever its m."""
    return tuple(sorted(set(chooser(problem, device).winners)))


def enumerate_specs(problem: GroupedProblem, device: Device) -> tuple[KernelSpec, ...]:
    """Every kernel that calls of the problem can need: with any rows, with scales in any layout."""
    from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES

    specs = [FAMILY.spec(problem, config, device.arch.name) for config in enumerate_configs(problem, device)]
    if problem.dense.traits.is_fp8:
        specs.append(TRANSPOSE_SCALES.spec(device.arch.name))
    return tuple(specs)


def explain(problem: GroupedProblem, device: Device) -> Explanation:
    """Predicted cost of every config that a choice is made from, and why others are illegal.

    Raises:
        ConfigError: no legal config meets the overrides in force.
    """
    assert problem.m is not None
    found = chooser(problem, device)
    offered = candidates(problem.dense.without_sizes(), found.overrides)
    legal = [config for config in offered if illegal(problem, config, device) is None]
    costs = _costs(problem, tuple(legal), device, (problem.m,))[0]
    listed = [Candidate(config, cost, {"total": cost}) for config, cost in zip(legal, costs, strict=True)]
    reasons = ((config, illegal(problem, config, device)) for config in offered)
    listed += [Candidate(config, terms={}, reason=reason) for config, reason in reasons if reason is not None]
    return Explanation(listed, found(problem.m))


@functools.lru_cache(maxsize=256)
def candidates(problem: GemmProblem, overrides: Overrides) -> tuple[GemmConfig, ...]:
    """What a choice is made from: dense GEMM's menu without clusters and split K, and more tiles of few tokens; under
    overrides everything that has their values.
    """
    if overrides:
        return tuple(gemm.generate(problem, overrides))
    tile_k = 128 // problem.traits.operand_bytes
    menu = [_fitting_groups(problem, config) for config in gemm.candidates(problem, ())]
    for tile_m, tile_n in _TOKEN_TILES:
        config = _fitting_groups(problem, GemmConfig(tile_m, tile_n, tile_k, 0, swap_ab=True))
        if gemm.illegal_tile(problem, dataclasses.replace(config, stages=2, cluster_n=1), SM90A) is None:
            menu += [dataclasses.replace(config, stages=stages) for stages in gemm.stage_choices(problem, config)]
    return tuple(dict.fromkeys(menu))


def _fitting_groups(problem: GemmProblem, config: GemmConfig) -> GemmConfig:
    """The config without split K, and with no other clusters than those that make up the columns of a scale of D."""
    parts = kernel_shape(problem, config).scale_parts
    return dataclasses.replace(config, cluster_m=1, cluster_n=parts, split_k=1)


def illegal(problem: GroupedProblem, config: GemmConfig, device: Device) -> str | None:
    """Why a config can't be built or would not run, or None."""
    shape = kernel_shape(problem.dense.without_sizes(), config)
    if config.cluster_m * config.split_k > 1 or config.cluster_n != shape.scale_parts:
        return "grouped kernels have no split K, and clusters only where they make up the columns of a scale of d"
    if config.cluster_n > 2:
        return "a cluster has at most 2 CTAs"
    tile, alignment = config.tile_m, problem.alignment
    if problem.kind == "contiguous" and alignment % tile and tile % alignment:
        return f"tile_m must divide the alignment of the groups, {alignment}, or be a multiple of it"
    if shape.math_warpgroups == 3 and problem.dense.promotes and shape.accumulator_registers > _SUMS_OF_THREE:
        return f"sums take more than {_SUMS_OF_THREE} registers a thread beside a group's tile"
    if config.swap_ab and problem.dense.promotes and tile > _MOST_TOKENS:
        return f"tile_m must be at most {_MOST_TOKENS} beside a group's tile where operands are swapped"
    alone = dataclasses.replace(config, cluster_n=1)  # CTAs of a cluster share no operands
    return gemm.illegal_epilogue(shape) or gemm.illegal_tile(problem.dense.without_sizes(), alone, device.arch)


def _costs(
    problem: GroupedProblem, configs: tuple[GemmConfig, ...], device: Device, ms: tuple[int, ...]
) -> list[list[float]]:
    groups = Groups(problem.groups, problem.alignment if problem.kind == "contiguous" else 0)
    alone = tuple(dataclasses.replace(config, cluster_n=1) for config in configs)
    return gemm.predict_all(problem.dense.without_m(), alone, device, ms, groups)


class Chooser:
    """The table from expected m to config of one problem."""

    def __init__(self, problem: GroupedProblem, device: Device, overrides: Overrides) -> None:
        self._problem, self._device, self.overrides = problem, device, overrides
        assessed = [
            (config, illegal(problem, config, device))
            for config in candidates(problem.dense.without_sizes(), overrides)
        ]
        legal = sorted((config for config, reason in assessed if reason is None), key=lambda c: (-c.stages, c))
        if not legal:
            raise gemm.no_legal_config(overrides, [reason for _, reason in assessed if reason is not None])
        costs = _costs(problem, tuple(legal), device, ANCHORS)
        self.winners = tuple(legal[index] for index in assign(costs, MAX_KERNELS))
        self._served = dict(zip(ANCHORS, self.winners, strict=True))

    def __call__(self, m: int) -> GemmConfig:
        """The config for an expected m."""
        config = self._served.get(m)
        if config is None:
            near = tuple(dict.fromkeys(self.winners[ANCHORS.index(anchor)] for anchor in serving_anchors(m)))
            costs = _costs(self._problem, near, self._device, (m,))[0]
            config = self._served[m] = near[min(range(len(near)), key=costs.__getitem__)]
        return config


_chooser = functools.lru_cache(maxsize=1024)(Chooser)
