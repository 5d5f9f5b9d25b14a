"""Several GEMMs at once: candidates, limits and choice, by dense GEMM's cost model with the groups as more tiles.

As for dense GEMM, the winners of a few anchors serve every m.
"""

from __future__ import annotations

import dataclasses
import functools

from jitgemm import settings
from jitgemm.device import SM90A, Device
from jitgemm.families.base import KernelSpec
from jitgemm.families.batched import EXPECTED_K, FAMILY, BatchedProblem
from jitgemm.families.gemm import GemmConfig, GemmProblem, kernel_shape
from jitgemm.heuristics import gemm
from jitgemm.heuristics.anchored import Chooser
from jitgemm.heuristics.gemm import Explanation, Groups, Overrides
from jitgemm.settings import Settings

# Tiles beside those of dense GEMM's menu: with many groups of few rows the chip is full without a split of K, and tiles
# of all weights of a small head load the tokens once.
_TOKEN_TILES = ((8, 64), (8, 128), (16, 64), (16, 128), (32, 64), (32, 128), (48, 64), (64, 64), (64, 128), (128, 128))

_MOST_TOKENS = 96  # of FP8, on the MMA's N side
_SUMS_OF_THREE = 120  # registers a thread that sums may take where three warpgroups promote


def choose_config(problem: BatchedProblem, device: Device) -> GemmConfig:
    """The config for a problem with its m.

    Raises:
        ConfigError: no legal config meets the overrides in force.
    """
    assert problem.m is not None
    return chooser(problem, device)(problem.m)


def chooser(problem: BatchedProblem, device: Device, in_force: Settings | None = None) -> Chooser:
    """``choose_config`` for a problem with any m, under some settings, or those in force."""
    overrides = tuple((in_force or settings.current()).tuning().items())
    return _chooser(_any_m(problem), device, overrides)


@functools.lru_cache(maxsize=1024)
def _chooser(problem: BatchedProblem, device: Device, overrides: Overrides) -> Chooser:
    return Chooser(
        candidates(problem, overrides),
        lambda config: illegal(problem, config, device),
        lambda configs, ms: _costs(problem, configs, device, ms),
        overrides,
    )


def _any_m(problem: BatchedProblem) -> BatchedProblem:
    """What a choice knows: any m and, of groups along K, the same K for all calls."""
    k = EXPECTED_K if problem.kind == "k_grouped" else problem.k
    return dataclasses.replace(problem, m=None, k=k)


def enumerate_configs(problem: BatchedProblem, device: Device) -> tuple[GemmConfig, ...]:
    """Every config that ``choose_config`` can return for the problem, whatever its m."""
    return chooser(problem, device).kernels


def enumerate_specs(problem: BatchedProblem, device: Device) -> tuple[KernelSpec, ...]:
    """Every kernel that calls of the problem can need: of any m, with scales in any layout."""
    from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES

    specs = [FAMILY.spec(problem, config, device.arch.name) for config in enumerate_configs(problem, device)]
    if problem.dense.traits.is_fp8:
        specs.append(TRANSPOSE_SCALES.spec(device.arch.name))
    return tuple(specs)


def explain(problem: BatchedProblem, device: Device) -> Explanation:
    """Predicted cost of every config that a choice is made from, and why others are illegal.

    Raises:
        ConfigError: no legal config meets the overrides in force.
    """
    assert problem.m is not None
    return chooser(problem, device).explain(problem.m)


def candidates(problem: BatchedProblem, overrides: Overrides) -> tuple[GemmConfig, ...]:
    """What a choice is made from: dense GEMM's menu and more tiles of few tokens; under overrides everything that has
    their values.

    BF16 sums up K in one chain, as others do whose results are compared bit by bit, unless an override splits it.
    """
    dense = problem.dense.without_sizes()
    if overrides:
        given = dict(overrides)
        if not problem.dense.traits.is_fp8 and "config" not in given:
            given.setdefault("split_k", 1)
        return tuple(gemm.generate(dense, tuple(given.items())))
    return _menu(dense.recipe, dense.layout, dense.d_dtype)


@functools.lru_cache(maxsize=64)
def _menu(recipe: str, layout: str, d_dtype: str) -> tuple[GemmConfig, ...]:
    problem = GemmProblem(1, 1, recipe, None, layout, d_dtype).without_sizes()
    tile_k = 128 // problem.traits.operand_bytes
    menu = list(gemm.candidates(problem, ()))
    if not problem.traits.is_fp8:
        menu = [dataclasses.replace(config, split_k=1) for config in menu]
    for tile_m, tile_n in _TOKEN_TILES:
        config = GemmConfig(tile_m, tile_n, tile_k, 0, swap_ab=True)
        if gemm.illegal_tile(problem, dataclasses.replace(config, stages=2), SM90A) is None:
            menu += [dataclasses.replace(config, stages=stages) for stages in gemm.stage_choices(problem, config)]
    return tuple(dict.fromkeys(menu))


def illegal(problem: BatchedProblem, config: GemmConfig, device: Device) -> str | None:
    """Why a config can't be built or would not run, or None."""
    if problem.kind == "k_grouped" and config.split_k > 1:
        return "groups along K are not split along K"
    shape = kernel_shape(problem.dense.without_sizes(), config)
    if problem.dense.promotes:
        if shape.math_warpgroups == 3 and (
            shape.n_side_scales == "row_k" or shape.accumulator_registers > _SUMS_OF_THREE
        ):
            return "three warpgroups that promote have no register left for the tile's group"
        if config.swap_ab and config.tile_m > _MOST_TOKENS:
            return f"tile_m must be at most {_MOST_TOKENS} beside a tile's group where operands are swapped"
        if problem.kind == "k_grouped" and shape.waves == 1 and shape.store_columns < shape.mma_n == 128:
            return "128 columns of D must be staged at once: slices leave no register for the tile's group"
    return gemm.illegal(problem.dense, config, device)


def _costs(
    problem: BatchedProblem, configs: tuple[GemmConfig, ...], device: Device, ms: tuple[int, ...]
) -> list[list[float]]:
    return gemm.predict_all(problem.dense.without_m(), configs, device, ms, Groups(problem.groups, idles=False))
