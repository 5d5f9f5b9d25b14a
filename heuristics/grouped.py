"""Grouped GEMM: candidates, limits and choice, by dense GEMM's cost model with the groups as more tiles.

As for dense GEMM, the expected rows of a group are the m of a choice, and the winners of a few anchors serve every m.
"""

from __future__ import annotations

import dataclasses
import functools

from jitgemm import settings
from jitgemm.device import SM90A, Device
from jitgemm.families.base import KernelSpec
from jitgemm.families.gemm import GemmConfig, kernel_shape
from jitgemm.families.grouped import FAMILY, MAX_BOX, GroupedProblem, smem_bytes
from jitgemm.heuristics import gemm
from jitgemm.heuristics.gemm import ANCHORS, MAX_KERNELS, Candidate, Explanation, Groups, Overrides, serving_anchors
from jitgemm.heuristics.pruning import assign
from jitgemm.settings import Settings

# Tiles beside those of dense GEMM's menu: up to 64 rows weights are read once whatever the tile, and the smallest that
# holds a group's rows leaves most to the loads. There are tiles enough to keep all SMs busy with 128 rows of weights,
# for which tokens are loaded half as often as for 64.
_TOKEN_TILES = (
    *((8, 128), (16, 128), (24, 128), (48, 64), (48, 128)),
    *((64, 64), (64, 128), (80, 128), (96, 128)),
)

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
    offered = candidates(problem, found.overrides)
    legal = [config for config in offered if illegal(problem, config, device) is None]
    costs = _costs(problem, tuple(legal), device, (problem.m,))[0]
    listed = [Candidate(config, cost, {"total": cost}) for config, cost in zip(legal, costs, strict=True)]
    reasons = ((config, illegal(problem, config, device)) for config in offered)
    listed += [Candidate(config, terms={}, reason=reason) for config, reason in reasons if reason is not None]
    return Explanation(listed, found(problem.m))


def candidates(problem: GroupedProblem, overrides: Overrides = ()) -> tuple[GemmConfig, ...]:
    """What a choice is made from: dense GEMM's menu without clusters and split K, and more tiles of few tokens; under
    overrides everything that has their values.
    """
    kind = dataclasses.replace(problem, n=1, k=1, groups=1, m=None)
    return tuple(gemm.generate(kind.dense, overrides)) if overrides else _menu(kind)


@functools.lru_cache(maxsize=256)
def _menu(problem: GroupedProblem) -> tuple[GemmConfig, ...]:
    dense = problem.dense
    tile_k = 128 // dense.traits.operand_bytes
    menu = [dataclasses.replace(config, cluster_m=1, cluster_n=1, split_k=1) for config in gemm.candidates(dense, ())]
    for tile_m, tile_n in _TOKEN_TILES:
        config = GemmConfig(tile_m, tile_n, tile_k, 0, swap_ab=True)
        if gemm._illegal_kernel(dense, dataclasses.replace(config, stages=2), SM90A) is None:
            menu += [dataclasses.replace(config, stages=stages) for stages in gemm.stage_choices(dense, config)]
    return tuple(dict.fromkeys(_fitting(problem, config) for config in menu))


def _fitting(problem: GroupedProblem, config: GemmConfig) -> GemmConfig:
    """The config with as many of its stages as leave room for what grouped kernels hold beside dense GEMM's.

    As many blocks share an SM then as the cost model, which knows dense GEMM's kernels, takes for granted.
    """
    dense = problem.dense.without_sizes()
    while config.stages > 2 and (
        smem_bytes(problem.shape(config)) > SM90A.smem_per_block
        or problem.shape(config).blocks_per_sm != kernel_shape(dense, config).blocks_per_sm
    ):
        config = dataclasses.replace(config, stages=config.stages - 1)
    return config


def illegal(problem: GroupedProblem, config: GemmConfig, device: Device) -> str | None:
    """Why a config can't be built or would not run, or None."""
    if config.cluster_m * config.cluster_n * config.split_k > 1:
        return "grouped kernels have no clusters and no split K"
    tile, alignment = config.tile_m, problem.alignment
    if problem.kind == "contiguous" and alignment % tile and tile % alignment:
        return f"tile_m must divide the alignment of the groups, {alignment}, or be a multiple of it"
    if problem.scale_slack and tile + problem.scale_slack > MAX_BOX:
        return f"tile_m must be at most {MAX_BOX - problem.scale_slack} where FP8 groups start at any row"
    shape = problem.shape(config)
    if shape.math_warpgroups == 3 and problem.dense.promotes and shape.accumulator_registers > _SUMS_OF_THREE:
        return f"sums take more than {_SUMS_OF_THREE} registers a thread beside a group's tile"
    if config.swap_ab and problem.dense.promotes and tile > _MOST_TOKENS:
        return f"tile_m must be at most {_MOST_TOKENS} beside a group's tile where operands are swapped"
    if (reason := gemm.illegal(problem.dense, config, device)) is not None:
        return reason
    limit = device.arch.smem_per_block
    return f"shared memory exceeds {limit} bytes" if smem_bytes(shape) > limit else None


def _costs(
    problem: GroupedProblem, configs: tuple[GemmConfig, ...], device: Device, ms: tuple[int, ...]
) -> list[list[float]]:
    groups = Groups(problem.groups, problem.alignment if problem.kind == "contiguous" else 0)
    return gemm.predict_all(problem.dense.without_m(), configs, device, ms, groups)


class Chooser:
    """The table from expected m to config of one problem."""

    def __init__(self, problem: GroupedProblem, device: Device, overrides: Overrides) -> None:
        self._problem, self._device, self.overrides = problem, device, overrides
        assessed = [(config, illegal(problem, config, device)) for config in candidates(problem, overrides)]
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
