"""Several GEMMs at once: candidates, limits and choice, by dense GEMM's cost model with the groups as more tiles.

As for dense GEMM, the winners of a few anchors serve every m.
"""

from __future__ import annotations

import dataclasses
import functools
import math

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

# The kernel that adds up the parts of a sum: launch and latency, and its reads, which are in L2 (measured).
_SUM_OF_PARTS_US = 2.1
_SUM_OF_PARTS_BYTES_PER_US = 6.4e6

# What predictions for it are multiplied by along K, where it is stored while the next tile is computed and three stages
# are as fast as four; the model knows neither (H200: 0.89 to 0.93 of 256x128's time, predicted 1.11 to 1.14).
_CORRECTIONS_ALONG_K = {"128x192x128 s3": 0.81}

_MOST_TOKENS = 96  # of FP8, on the MMA's N side
# Of BF16 there: the K of one head hides no store of more (H200, 128 of 4096x128x512: 216x128 200 us, 128x128 187).
_MOST_TOKENS_OF_BF16 = 128
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
    """Every kernel that calls of the problem, of any m, can need: also to copy scales or to add up parts of a sum."""
    from jitgemm.families.sum_parts import D_DTYPES, SUM_PARTS
    from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES

    specs = [FAMILY.spec(problem, config, device.arch.name) for config in enumerate_configs(problem, device)]
    if problem.dense.traits.is_fp8:
        specs.append(TRANSPOSE_SCALES.spec(device.arch.name))
    if problem.kind == "batch_sum" and problem.d_dtype == "fp32":
        specs += [SUM_PARTS.spec(device.arch.name, d_dtype=d_dtype) for d_dtype in D_DTYPES]
    return tuple(specs)


def problem_of_sum(
    batches: int, m: int, n: int, k: int, layout: str, device: Device, in_force: Settings | None = None
) -> BatchedProblem:
    """How batches of ``[m, k] @ [k, n]`` are summed up: the FP32 parts, as groups of a ``batch_sum``, with k of a part.

    More parts keep more multiprocessors busy, but have to be written, read and added up: of the numbers that fill the
    chip with tiles of some config, it is that with the least predicted time of all this. No part is empty.
    """
    assert batches > 0
    in_force = in_force or settings.current()
    num_sms = min(device.num_sms, in_force.num_sms or device.num_sms)
    overrides = tuple(in_force.tuning().items())
    return _problem_of_sum(batches, m, n, k, layout, device.with_num_sms(num_sms), overrides)


@functools.lru_cache(maxsize=1024)
def _problem_of_sum(
    batches: int, m: int, n: int, k: int, layout: str, device: Device, overrides: Overrides
) -> BatchedProblem:
    def of_parts(parts: int) -> BatchedProblem:
        each = -(-batches // parts)
        return BatchedProblem(n, k * each, "bf16", -(-batches // each), "batch_sum", m, layout, "fp32")

    whole = of_parts(1)
    configs = tuple(config for config in candidates(whole, overrides) if illegal(whole, config, device) is None)
    fitting = {1} | {max(1, min(batches, _slots(whole, config, device) // _tiles(config, m, n))) for config in configs}
    problems = list(dict.fromkeys(of_parts(parts) for parts in sorted(fitting)))
    return min(problems, key=lambda problem: _cost_of_sum(problem, configs, device))


def _slots(problem: BatchedProblem, config: GemmConfig, device: Device) -> int:
    """CTAs that are resident at once."""
    return device.num_sms * kernel_shape(problem.dense.without_sizes(), config).blocks_per_sm


def _tiles(config: GemmConfig, m: int, n: int) -> int:
    """CTAs of one GEMM."""
    rows, columns = config.tile_m * config.cluster_m, config.tile_n * config.cluster_n
    return -(-m // rows) * -(-n // columns) * config.cluster_m * config.cluster_n * config.split_k


def _cost_of_sum(problem: BatchedProblem, configs: tuple[GemmConfig, ...], device: Device) -> float:
    """Predicted us of the parts with the best config, and of adding them up; infinite if no config is legal."""
    assert problem.m is not None
    legal = tuple(config for config in configs if illegal(problem, config, device) is None)
    if not legal:
        return math.inf
    of_parts = min(_costs(problem, legal, device, (problem.m,))[0])
    if problem.groups == 1:
        return of_parts
    return of_parts + _SUM_OF_PARTS_US + problem.groups * problem.m * problem.n * 4 / _SUM_OF_PARTS_BYTES_PER_US


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
    return _menu(problem.kind, dense.recipe, dense.layout, dense.d_dtype)


@functools.lru_cache(maxsize=64)
def _menu(kind: str, recipe: str, layout: str, d_dtype: str) -> tuple[GemmConfig, ...]:
    problem = GemmProblem(1, 1, recipe, None, layout, d_dtype).without_sizes()
    tile_k = 128 // problem.traits.operand_bytes
    menu = list(gemm.candidates(problem, ()))
    if not problem.traits.is_fp8:
        menu = [
            dataclasses.replace(config, split_k=1)
            for config in menu
            if not (config.swap_ab and config.tile_m > _MOST_TOKENS_OF_BF16)
        ]
    for tile_m, tile_n in _TOKEN_TILES:
        config = GemmConfig(tile_m, tile_n, tile_k, 0, swap_ab=True)
        if gemm.illegal_tile(problem, dataclasses.replace(config, stages=2), SM90A) is None:
            menu += [dataclasses.replace(config, stages=stages) for stages in gemm.stage_choices(problem, config)]
    if kind == "k_grouped":
        menu = [_staged_whole(problem, config) for config in menu]
    return tuple(dict.fromkeys(menu))


def _staged_whole(problem: GemmProblem, config: GemmConfig) -> GemmConfig:
    """The config with as many of its stages as leave room for all of a tile of D, if 3 do: it is stored while the next
    one is computed then.
    """
    for stages in range(config.stages, 2, -1):
        fitting = dataclasses.replace(config, stages=stages)
        shape = kernel_shape(problem, fitting)
        if shape.store_columns == shape.mma_n:
            return fitting
    return config


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
    costs = gemm.predict_all(problem.dense.without_m(), configs, device, ms, Groups(problem.groups, idles=False))
    if problem.kind != "k_grouped" or not problem.dense.promotes:
        return costs
    corrections = [_CORRECTIONS_ALONG_K.get(str(config), 1.0) for config in configs]
    return [[us * correction for us, correction in zip(row, corrections, strict=True)] for row in costs]
