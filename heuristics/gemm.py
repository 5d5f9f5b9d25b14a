"""Dense GEMM: candidates, limits, cost model and choice.

A choice has two steps. The winner of each *anchor* m (a fixed ladder) is found over the candidates, and at most
``MAX_KERNELS`` different winners are kept; a call's m is then served by whichever of the winners around it costs
least at that very m. So all configs that any m can get are the anchors' winners: few, and enumerable without knowing m.

An entry of a tuned table stands for the cost of its config at its anchor: it makes it the winner there, by the measured
margin, before the number of winners is limited, and scales the predictions for it at the values of m around.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy

from jitgemm import settings
from jitgemm.device import SM90A, Architecture, Device
from jitgemm.errors import ConfigError
from jitgemm.families.base import KernelSpec
from jitgemm.families.gemm import (
    D_BYTES,
    FAMILY,
    FEW_BOUNDARIES_STEP,
    FP4,
    GATE_UP_RUN,
    MMA_M,
    MXFP4_GROUP,
    NVFP4_GROUP,
    SCALE_GROUP,
    STAGE_ROW_BYTES,
    GemmConfig,
    GemmProblem,
    KernelShape,
    kernel_shape,
)
from jitgemm.heuristics import sm90a, tuned
from jitgemm.heuristics.pruning import assign
from jitgemm.heuristics.serving import ANCHORS, RAGGED, Serving, anchors_around
from jitgemm.settings import Settings

if TYPE_CHECKING:
    from jitgemm.heuristics.expansion import Expansion

MAX_KERNELS = 12
"""Different winners that a problem may have, all m together; what each buys is in docs/performance.md."""

_MEASURED_WEIGHT = 4.0  # of an anchor with an entry in a tuned table, where kernels are limited: others are predictions

_DIGITS = 6  # of predictions in us, where they are compared

MAX_STAGES = 12


@dataclass(frozen=True)
class Candidate:
    """A config, with its predicted cost or the reason why it is illegal.

    ``terms`` are microseconds that explain ``cost_us``; they overlap, so they don't add up.
    """

    config: GemmConfig
    cost_us: float | None = None
    terms: Mapping[str, float] | None = None
    reason: str | None = None


def choose_config(problem: GemmProblem, device: Device, limit: int = MAX_KERNELS) -> GemmConfig:
    """The config for a problem with its m, where all m together may have ``limit`` different ones.

    Raises:
        ConfigError: no legal config meets the overrides in force.
    """
    assert problem.m is not None
    return chooser(problem, device, limit=limit)(problem.m)


def chooser(
    problem: GemmProblem, device: Device, in_force: Settings | None = None, limit: int = MAX_KERNELS
) -> Chooser:
    """``choose_config`` for a problem with any m, under some settings, or those in force."""
    return _chooser(problem.without_m(), device, _rules(device, in_force or settings.current()), limit)


def enumerate_configs(problem: GemmProblem, device: Device, limit: int = MAX_KERNELS) -> tuple[GemmConfig, ...]:
    """Every config that ``choose_config`` can return for the problem, whatever its m; at most ``limit``."""
    return chooser(problem, device, limit=limit).kernels


def enumerate_specs(problem: GemmProblem, device: Device) -> tuple[KernelSpec, ...]:
    """Every kernel that calls of the problem can need: of any m, with scales in any layout, with or without C."""
    from jitgemm.families.fp4 import helper_specs
    from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES
    from jitgemm.heuristics.expansion import expansion_specs

    specs = [FAMILY.spec(problem, config, device.arch.name) for config in enumerate_configs(problem, device)]
    if "row_k" in (problem.traits.a_scales, problem.traits.b_scales):
        specs.append(TRANSPOSE_SCALES.spec(device.arch.name))
    if problem.traits.fp4_b:
        specs += helper_specs(problem.traits.fp4_group, device.arch.name) + expansion_specs(problem, device)
    return tuple(specs)


def rank_candidates(problem: GemmProblem, device: Device) -> list[GemmConfig]:
    """All legal configs for a problem with its m, on the menu or off it, by predicted time."""
    legal = [config for config in _everything(_signature(problem)) if illegal(problem, config, device) is None]
    key, m = problem.without_m(), problem.m
    assert m is not None
    costs = dict(zip(legal, predict_all(key, legal, device, [m])[0], strict=True))
    return sorted(costs, key=lambda config: _rank(config, costs[config]))


@functools.lru_cache(maxsize=64)
def _everything(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    return tuple(dict.fromkeys((*candidates(problem, ()), *generate(problem))))


@dataclass(frozen=True)
class Explanation:
    """All candidates of a problem, and the one that a call gets."""

    candidates: list[Candidate]
    winner: GemmConfig
    entry: tuned.Entry | None = None  # why it is the winner, if that was measured ...
    table: Path | None = None  # ... and where that stands
    expansion: Expansion | None = None  # what a call gets instead


def explain(problem: GemmProblem, device: Device) -> Explanation:
    """Predicted cost of every config on the menu (or that has the overrides' values), and why others are illegal.

    Raises:
        ConfigError: no legal config meets the overrides in force.
    """
    from jitgemm.heuristics.expansion import expansion

    assert problem.m is not None
    rules = _rules(device, settings.current())
    served = chooser(problem, device).serving(problem.m)
    menu = candidates(problem, rules.overrides)
    offered = [assess(problem, config, device) for config in dict.fromkeys((*menu, served.config))]
    others = [assess(problem, config, device) for config in generate(problem, rules.overrides)]
    illegal_only = [other for other in others if other.reason is not None and other.config not in menu]
    instead = expansion(problem, device)
    return Explanation([*offered, *illegal_only], served.config, served.entry, served.table, instead)


def assess(problem: GemmProblem, config: GemmConfig, device: Device) -> Candidate:
    """One config as a candidate for a problem with its m."""
    reason = illegal(problem, config, device)
    if reason is not None:
        return Candidate(config, terms={}, reason=reason)
    terms = predict(problem, config, device)
    return Candidate(config, cost_us=terms["total"], terms=terms)


# -- Candidates.


def candidates(problem: GemmProblem, overrides: Overrides) -> tuple[GemmConfig, ...]:
    """What a choice is made from: the menu, or under overrides everything that has their values."""
    if overrides:
        return tuple(generate(_signature(problem), overrides))
    return _menu(_signature(problem))


def _menu(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    return tuple(corrections(problem))


def _menu_text(problem: GemmProblem) -> str:
    if problem.recipe in sm90a.FP4_MANY_ROWS_MENUS:
        return sm90a.FP4_MANY_ROWS_MENUS[problem.recipe]
    return sm90a.FP4_MENU if problem.traits.fp4_b else sm90a.FP8_MENU if problem.promotes else sm90a.BF16_MENU


@functools.lru_cache(maxsize=256)
def corrections(problem: GemmProblem, text: str | None = None) -> dict[GemmConfig, float]:
    """The menu, or another, and what predictions for its configs are multiplied by."""
    if text is None:
        text = _menu_text(problem)
    tile_k = STAGE_ROW_BYTES // problem.traits.operand_bytes
    menu: dict[GemmConfig, float] = {}
    for entry in text.split(","):
        config, _, correction = entry.partition("*")
        menu.setdefault(_fitting(problem, _for_epilogue(problem, _parse(config, tile_k))), float(correction or 1))
    if (problem.gated > 1 or problem.quantizes) and problem.recipe not in sm90a.FP4_MANY_ROWS_MENUS:
        for entry in sm90a.EPILOGUE_MENU.split(","):
            menu.setdefault(_fitting(problem, _for_epilogue(problem, _parse(entry, tile_k))), 1.0)
    return menu


def _for_epilogue(problem: GemmProblem, config: GemmConfig) -> GemmConfig:
    """The config as an epilogue can have it: without split K, and in clusters that make up the columns of a scale."""
    if problem.gated == 1 and not problem.quantizes:
        return config
    config = dataclasses.replace(config, split_k=1)
    if not problem.quantizes:
        return config
    config = dataclasses.replace(config, cluster_m=1, cluster_n=1)
    return dataclasses.replace(config, cluster_n=_shape(problem, config).scale_parts)


@functools.lru_cache(maxsize=256)
def _with_every_split(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    """The menu's tiles with every split of K: the menu splits K for few rows only, and here one split serves all m.

    FP4 weights stay in registers: those whose scales lie far apart are summed up in another order from shared memory.
    """
    menu = [config for config in _menu(problem) if config.swap_ab or not problem.traits.fp4_b]
    split = [
        _fitting(problem, dataclasses.replace(config, cluster_m=1, cluster_n=1, split_k=split_k))
        for config in menu
        for split_k in _EVEN_SPLITS
    ]
    return tuple(dict.fromkeys((*menu, *split)))


def _parse(entry: str, tile_k: int) -> GemmConfig:
    """A config of a menu, such as ``64x48 s12 c2x1``: its text without tile k."""
    tile, _, rest = entry.strip().partition(" ")
    return GemmConfig.from_text(f"{tile}x{tile_k} {rest}")


def _fitting(problem: GemmProblem, config: GemmConfig) -> GemmConfig:
    """The config with as many of its stages as shared memory has room for: scales and FP32 outputs take some."""
    while config.stages > 2 and (
        _shape(problem, config).smem_bytes > SM90A.smem_per_block or _is_cut_too_small(_shape(problem, config))
    ):
        config = dataclasses.replace(config, stages=config.stages - 1)
    return config


def _is_cut_too_small(shape: KernelShape) -> bool:
    """Whether D's tile is staged in so many slices that sums are indexed, in memory: behind the code that sums parts,
    8 are not unrolled.
    """
    return shape.parts > 1 and shape.mma_n > 4 * shape.store_columns


_shape, _signature = kernel_shape, GemmProblem.without_sizes


_TILE_NS = (16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 136, 144, 160, 176, 192, 208, 224, 240, 256)
_TOKEN_TILES = (8, 16, 24, 32, 40, 48, 64, 80, 96, 104, 128)
_WIDE_TOKEN_TILES = (136, 152, 160, 176, 200, 216, 232, 256)
"""Without promotion, whose registers they leave no room for."""

_SPLITS = (1, 2, 3, 4, 5, 6, 7, 8)
_EVEN_SPLITS = (1, 2, 4, 8)  # those that tiles of more than _SMALL_TILE elements are worth trying with
_SMALL_TILE = 64 * 128


def generate(problem: GemmProblem, overrides: Overrides = ()) -> Iterator[GemmConfig]:
    """Every config worth thinking of, legal or not; overrides replace the values that they name."""
    given = dict(overrides)
    if "config" in given:
        config = GemmConfig.from_text(given.pop("config"))
        have = {**config.to_dict(), "cluster": (config.cluster_m, config.cluster_n)}
        if all(have[name] == value for name, value in given.items()):
            yield config
        return
    tile_k = 128 // problem.traits.operand_bytes
    clusters = [given["cluster"]] if "cluster" in given else [(1, 1), (2, 1), (1, 2)]
    splits = [given["split_k"]] if "split_k" in given else _SPLITS
    for swap_ab in [given["swap_ab"]] if "swap_ab" in given else (False, True):
        of_tokens = _TOKEN_TILES if problem.promotes else _TOKEN_TILES + _WIDE_TOKEN_TILES
        tiles_m = (given["tile_m"],) if "tile_m" in given else of_tokens if swap_ab else (64, 128, 192, 256)
        tiles_n = (given["tile_n"],) if "tile_n" in given else (64, 128) if swap_ab else _TILE_NS
        for tile_m, tile_n, (cluster_m, cluster_n), split_k in itertools.product(tiles_m, tiles_n, clusters, splits):
            if "split_k" not in given and split_k not in _EVEN_SPLITS and tile_m * tile_n > _SMALL_TILE:
                continue
            base = GemmConfig(tile_m, tile_n, given.get("tile_k", tile_k), 0, cluster_m, cluster_n, split_k, swap_ab)
            for stages in [given["stages"]] if "stages" in given else stage_choices(problem, base):
                yield dataclasses.replace(base, stages=stages)


def stage_choices(problem: GemmProblem, config: GemmConfig) -> list[int]:
    """Depths of the ring worth trying: the deepest, the deepest that leaves room to stage a whole tile of D, and the
    deepest with which two blocks fit an SM, where their registers do.
    """
    shapes = [KernelShape(problem, dataclasses.replace(config, stages=stages)) for stages in range(MAX_STAGES, 1, -1)]
    if shapes[0].mma_m % MMA_M:
        return [4]
    fitting = [shape for shape in shapes if shape.smem_bytes <= SM90A.smem_per_block]
    choices = fitting[:1]
    choices += [shape for shape in fitting if shape.store_columns == shape.mma_n and shape.config.stages >= 3][:1]
    choices += [shape for shape in fitting if shape.blocks_per_sm == 2 and shape.config.stages >= 3][:1]
    return sorted({shape.config.stages for shape in choices}) or [2]


# -- Limits.

_MOST_FP4_TOKENS = {MXFP4_GROUP: 128, NVFP4_GROUP: 64}  # in a tile, on the MMA's N side


def illegal(problem: GemmProblem, config: GemmConfig, device: Device) -> str | None:
    """Why a config can't be built or would not run, or None."""
    if config.split_k > 1 and config.split_k > -(-problem.k // config.tile_k):
        return "split_k exceeds the stages of K"
    return _illegal_kernel(_signature(problem), config, device.arch)


@functools.lru_cache(maxsize=65536)
def _illegal_kernel(problem: GemmProblem, config: GemmConfig, arch: Architecture) -> str | None:
    return illegal_tile(problem, config, arch) or illegal_epilogue(_shape(problem, config))


def illegal_epilogue(shape: KernelShape) -> str | None:
    """Why a tile can't have the epilogue of its problem, or None."""
    config, gated = shape.config, shape.problem.gated
    if shape.problem.epilogue is None:
        return None
    if not shape.problem.promotes and shape.accumulator_registers > 128:
        return "sums take more than 128 registers a thread beside an epilogue"
    # Promotion with scales of blocks needs no register beside the sums that an epilogue would miss.
    alone = shape.chain == 1 or shape.n_side_scales == "row_k"
    tight = (shape.narrows or shape.m_side_scales in ("row", "tensor")) and shape.n_side_scales != "block_k"
    tight = tight or (shape.expands and shape.d_bytes == 4)
    if shape.problem.promotes and alone and tight and shape.accumulator_registers > 160:
        return "sums take more than 160 registers a thread beside an epilogue"
    if not shape.narrows:
        return None
    if config.split_k > 1:
        return "with split K no CTA has all columns that SwiGLU or a scale of D needs"
    if shape.gate_up_blocks and 2 * SCALE_GROUP % config.tile_n:
        return f"tile_n must divide {2 * SCALE_GROUP}, rows of gate and up that share their scales"
    if config.tile_n % (2 * GATE_UP_RUN) and shape.swiglu:
        return f"tile_n must be a multiple of {2 * GATE_UP_RUN}, runs of gate and up"
    whole = shape.d_scale_columns * gated
    if whole and config.tile_n % whole and (whole % config.tile_n or config.cluster_n != shape.scale_parts):
        return f"tile_n times cluster_n must make up the {whole} columns of a scale of d"
    if shape.problem.promotes and tight and shape.math_warpgroups == 3 and shape.accumulator_registers > 112:
        return "sums take more than 112 registers a thread beside SwiGLU or quantization"
    if shape.quantizes and gated == 1 and not config.swap_ab and config.tile_n > 192:
        return "tile_n must be at most 192 where d is quantized without SwiGLU"
    if shape.store_row_bytes < 16 or config.tile_n // gated * shape.d_bytes < 16:
        return "rows of d in a tile must have 16 bytes or more"
    return None


def illegal_tile(problem: GemmProblem, config: GemmConfig, arch: Architecture) -> str | None:
    """Why a tile can't be computed, whatever its epilogue, or None."""
    shape = _shape(problem, config)
    if problem.traits.b_format == "e5m2" and config.swap_ab:
        return "swap_ab must be off: expanded FP4 weights take the MMA's N side"
    if problem.traits.fp4_b:
        if not config.swap_ab and problem.recipe != FP4:
            return "swap_ab must be on: FP4 weights of this recipe take the MMA's M side"
        if config.tile_n not in (64, 128):
            return "tile_n must be 64 or 128: FP4 weights come in tiles of 64 rows"
        if config.swap_ab and config.tile_m > (most := _MOST_FP4_TOKENS[problem.traits.fp4_group]):
            return f"tile_m must be at most {most} beside FP4 weights"
        if config.cluster_m > 1 or config.cluster_n not in (1, shape.scale_parts):
            return "FP4 weights have clusters only where they make up the columns of a scale of d"
        if _is_cut_too_small(shape):
            return "the ring must leave room to stage a quarter of a tile of d"
    if config.tile_k != 128 // problem.traits.operand_bytes:
        return f"tile_k must be {128 // problem.traits.operand_bytes}: one stage holds 128 bytes of a row"
    if shape.mma_m not in (64, 128, 192, 256):
        side = "tile_n" if config.swap_ab else "tile_m"
        return f"{side} must be 64, 128, 192 or 256: it takes the MMA's M side"
    if shape.mma_n % 8 or not 8 <= shape.mma_n <= 256:
        side = "tile_m" if config.swap_ab else "tile_n"
        return f"{side} must be a multiple of 8 from 8 to 256: it takes the MMA's N side"
    if shape.math_warpgroups == 3:  # of 128 registers at entry, which must hold an instruction's operands
        budget = 96 if not problem.promotes else 112 if shape.n_side_scales == "row_k" else 136
    elif shape.math_warpgroups == 2:
        budget = 192 if problem.promotes or (shape.waves > 1 and not problem.traits.is_fp8) else 128
    else:
        budget = 208 if problem.promotes else 128
    if shape.accumulator_registers > budget:
        return f"sums take more than {budget} registers a thread"
    beside_split = 120 if shape.math_warpgroups == 3 else 144 if shape.n_side_scales == "row_k" else 160
    if problem.promotes and shape.chain == 1 and config.split_k > 1 and shape.accumulator_registers > beside_split:
        return f"sums take more than {beside_split} registers a thread beside split-K"
    mn_major = "mn" in (shape.m_side_major, shape.n_side_major)
    if config.split_k > 1 and mn_major and problem.d_dtype == "fp32" and shape.accumulator_registers > 88:
        return "sums take more than 88 registers a thread beside split-K, an MN-major operand and an FP32 D"
    if config.cluster_m * config.cluster_n > 2:
        return "a multicast cluster has at most 2 CTAs"
    if config.cluster_m * config.cluster_n > 1 and config.split_k > 1:
        return "a cluster shares operands or splits K, not both"
    if config.split_k not in _SPLITS:
        return f"split_k must be one of {', '.join(map(str, _SPLITS))}"
    rows_shared = config.cluster_m if config.swap_ab else config.cluster_n
    columns_shared = config.cluster_n if config.swap_ab else config.cluster_m
    if (shape.n_side_major == "k" and shape.mma_n % (8 * columns_shared)) or shape.mma_m % (8 * rows_shared):
        return "a shared tile must divide into equal multiples of 8 rows"
    if shape.n_side_major == "mn" and shape.mma_n % 64 and shape.mma_n > 64:
        return "an MN-major operand on the MMA's N side comes in slabs of 64"
    if shape.smem_bytes > arch.smem_per_block:
        return f"shared memory exceeds {arch.smem_per_block} bytes"
    if config.stages < 2:
        return "fewer than 2 stages cannot overlap loads with MMAs"
    return None


# -- Cost model.


class _Traits(NamedTuple):
    """What the cost model reads of a kernel, or arrays of it for many; none of it depends on m, n or k."""

    tile_k: int
    rows: int  # of D that a cluster computes at a time ...
    columns: int  # ... and columns
    split_k: int
    cluster: int  # CTAs
    fill: float  # part of the SMs that such clusters fill
    blocks_per_sm: int
    stages: int
    tensor: float  # cycles that the MMAs of a stage take, at full rate ...
    wave: float  # ... and those of one warpgroup
    promotion: float  # cycles that they hide, in chains
    waiting: float  # cycles of a stage in one CTA beside these
    exposed: float  # cycles of a stage in which the tensor cores wait for promotion
    reads: float  # bytes of a stage that MMAs read from shared memory
    tokens: int  # rows of A in a stage ...
    token_sharing: int  # ... and CTAs that share them
    weights: int  # rows of B in a stage ...
    weight_bytes: float  # ... bytes of each ...
    weight_sharing: int  # ... and CTAs that share them
    epilogue: float  # cycles
    multicast: float  # cycles of a stage
    launch: float  # us
    reduction: float  # us
    relaunch: float  # us
    correction: float  # of the whole
    warpgroup_rows: int  # of D that one warpgroup computes, all of them where operands are swapped


class Groups(NamedTuple):
    """What the cost model knows of grouped GEMMs, whose m, n and k are those of one group."""

    number: int
    alignment: int = 0  # of their first rows where tiles end at multiples of their height, else 0
    idles: bool = True  # whether warpgroups without rows leave the tensor cores to the others


@functools.lru_cache(maxsize=4096)
def _traits(problem: GemmProblem, config: GemmConfig) -> _Traits:
    shape = _shape(problem, config)
    columns, waves = shape.mma_n, shape.waves
    all_waves = shape.math_warpgroups * waves
    fixed, divisor = sm90a.MMA_OPERAND_CYCLES
    mmas = max(sm90a.MMAS_PER_STAGE, shape.parts)
    mma = mmas * max(columns / 2, sm90a.RS_MMA_CYCLES if shape.fp4 else fixed + columns / divisor)
    overhead, latency = sm90a.STAGE_OVERHEAD_CYCLES, sm90a.MMA_LATENCY_CYCLES
    hidden = exposed = 0.0
    if not problem.promotes:
        waiting = sm90a.PLAIN_OVERHEAD_CYCLES
    else:
        per_register = sm90a.PROMOTION_CYCLES
        if shape.column_scale_blocks > 1 and not shape.gate_up_blocks:  # whose columns take turns
            few = shape.column_boundary_step >= FEW_BOUNDARIES_STEP
            per_register += sm90a.PROMOTION_BRANCH_CYCLES if few else sm90a.PROMOTION_SELECT_CYCLES
        if shape.n_side_scales == "row_k":
            per_register += sm90a.PROMOTION_SCALE_CYCLES
        promotion = columns / 2 * per_register
        if shape.chain > 1:
            hidden, waiting = promotion, sm90a.OVERLAPPED_OVERHEAD * (overhead + latency)
            exposed = sm90a.PROMOTION_EXPOSED_IN_CHAIN * shape.math_warpgroups * promotion
        else:
            of_wave = shape.parts // shape.parts_at_once * latency + shape.parts * promotion
            waiting = waves * of_wave + overhead
            exposed = sm90a.PROMOTION_EXPOSED * waves * of_wave
    tokens, weights = (shape.n_side_rows, shape.mma_m) if config.swap_ab else (shape.mma_m, shape.n_side_rows)
    reads: float = all_waves * sm90a.MMAS_PER_STAGE * (MMA_M + columns) * 32
    tensor: float = all_waves * mma
    weight_bytes: float = STAGE_ROW_BYTES
    if shape.fp4:
        weight_bytes = shape.packed_bytes / MMA_M
        reads = all_waves * (shape.packed_bytes + mmas * columns * 32)
        # Expansion runs beside the warpgroup's own MMAs, but all warpgroups' is issued by the same four schedulers.
        hidden += sm90a.EXPANSION_CYCLES
        waiting += 0.0 if shape.chain > 1 else sm90a.EXPANSION_CYCLES
        promoting = shape.parts * columns / 2 * sm90a.PROMOTION_CYCLES
        tensor = max(tensor, all_waves * (sm90a.EXPANSION_CYCLES + promoting))
    if shape.expands:
        packed_tiles = columns // MMA_M
        weight_bytes = shape.packed_bytes / MMA_M
        reads += packed_tiles * (shape.packed_bytes + MMA_M * STAGE_ROW_BYTES)  # what is expanded, and written
        tensor = max(tensor, packed_tiles * sm90a.EXPANDER_CYCLES)
    boxes = 1 if config.swap_ab else columns // problem.gated * shape.d_bytes // shape.store_row_bytes
    steps = sm90a.EPILOGUE_STEP_CYCLES[problem.epilogue] * columns * waves
    if shape.quantizes:
        steps += sm90a.QUANTIZATION_COLUMN_CYCLES * columns * waves
        steps += sm90a.EXCHANGE_CYCLES if shape.exchange_bytes else 0.0
        if config.swap_ab:  # every warp reads what all warps found of each token
            steps += sm90a.EXCHANGE_READ_CYCLES * columns / 8 * shape.scale_parts * (4 * shape.math_warpgroups) ** 2
    store = sm90a.EPILOGUE_BOX_CYCLES * (boxes - 1) + sm90a.EPILOGUE_NARROW_CYCLES * (shape.store_row_bytes == 16)
    reduction, per_part, per_column = sm90a.REDUCTION_US
    reduction += per_part * (config.split_k - 2) + per_column * columns * all_waves
    cluster = config.cluster_m * config.cluster_n * config.split_k
    return _Traits(
        tile_k=config.tile_k,
        rows=config.tile_m * config.cluster_m,
        columns=config.tile_n * config.cluster_n,
        split_k=config.split_k,
        cluster=cluster,
        fill=sm90a.CLUSTER_FILL.get(cluster, 1.0),
        blocks_per_sm=shape.blocks_per_sm,
        stages=config.stages,
        tensor=tensor,
        wave=waves * mma,
        promotion=hidden,
        waiting=waiting,
        exposed=exposed,
        reads=reads,
        tokens=tokens,
        token_sharing=config.cluster_n,
        weights=weights,
        weight_bytes=weight_bytes,
        weight_sharing=config.cluster_m,
        epilogue=sm90a.EPILOGUE_CYCLES
        + sm90a.EPILOGUE_COLUMN_CYCLES * columns * waves * shape.d_bytes / 2
        + sm90a.EPILOGUE_SLICE_CYCLES * (columns // shape.store_columns - 1)
        + waves * store
        + steps,
        multicast=sm90a.MULTICAST_CYCLES if config.cluster_m * config.cluster_n > 1 else 0.0,
        launch=sm90a.LAUNCH_US + (sm90a.CLUSTER_LAUNCH_US if cluster > 1 else 0.0),
        reduction=reduction if config.split_k > 1 else 0.0,
        relaunch=sm90a.RELAUNCH_US if config.split_k > 1 else 0.0,
        correction=corrections(problem).get(config, 1.0),
        warpgroup_rows=config.tile_m if config.swap_ab else waves * MMA_M,
    )


@functools.lru_cache(maxsize=256)
def _traits_of_all(problem: GemmProblem, configs: tuple[GemmConfig, ...]) -> _Traits:
    fields: Iterator[Any] = map(numpy.array, zip(*(_traits(problem, config) for config in configs), strict=True))
    return _Traits(*fields)


TERMS = ("total", "tensor", "serial", "smem", "ingress", "latency", "hbm", "epilogue", "reduction")


def predict(problem: GemmProblem, config: GemmConfig, device: Device) -> dict[str, float]:
    """Predicted time in us of a legal config (``total``), with the terms it comes from."""
    assert problem.m is not None
    return dict(zip(TERMS, _predictor(_any_m(problem), config, device)(problem.m), strict=True))


_any_m = functools.lru_cache(maxsize=4096)(GemmProblem.without_m)


class _Operations(NamedTuple):
    """What numbers and arrays spell differently."""

    least: Callable[..., Any]
    most: Callable[..., Any]
    sqrt: Callable[..., Any]
    round: Callable[..., Any]
    ceil: Callable[..., Any]
    where: Callable[..., Any]


_OF_NUMBERS = _Operations(min, max, math.sqrt, round, math.ceil, lambda condition, yes, no: yes if condition else no)
_OF_ARRAYS = _Operations(numpy.minimum, numpy.maximum, numpy.sqrt, numpy.rint, numpy.ceil, numpy.where)


@functools.lru_cache(maxsize=4096)
def _predictor(problem: GemmProblem, config: GemmConfig, device: Device) -> Callable[[int], tuple[float, ...]]:
    """``predict`` for any m, ``TERMS`` in their order."""
    return _terms(_traits(_signature(problem), config), problem, device, _OF_NUMBERS)


def predict_all(
    problem: GemmProblem,
    configs: Sequence[GemmConfig],
    device: Device,
    ms: Sequence[int],
    groups: Groups | None = None,
) -> list[list[float]]:
    """Predicted times in us of legal configs for a problem without m: a row for each m, a column for each config."""
    kernels = _traits_of_all(_signature(problem), tuple(configs))
    total = _terms(kernels, problem, device, _OF_ARRAYS, groups)(numpy.array(ms)[:, None])[0]
    return cast("list[list[float]]", total.round(_DIGITS).tolist())  # powers differ in the last bits between CPUs


def _terms(
    kernel: _Traits, problem: GemmProblem, device: Device, operations: _Operations, groups: Groups | None = None
) -> Callable[[Any], tuple[Any, ...]]:
    """The cost model: from m to ``TERMS``, of one kernel, or of many where all are arrays."""
    least, most, sqrt, nearest, ceil, where = operations
    n, k, num_sms = problem.n, problem.k, device.num_sms
    size = problem.traits.operand_bytes
    tile_k, rows, columns, split_k, cluster, fill, blocks_per_sm, ring, *_ = kernel
    tiles_n = -(-n // columns)
    slots = most(cluster, num_sms * blocks_per_sm * fill // cluster * cluster)  # CTAs resident at once
    k_blocks = -(-k // tile_k)
    stages = -(-k_blocks // split_k)

    nominal = sm90a.NOMINAL_FP8_FLOPS // size
    rate = (device.mma_fp8_flops_per_clock_per_sm if size == 1 else device.mma_bf16_flops_per_clock_per_sm) / nominal
    mma, exposed, reads = kernel.tensor / rate, kernel.exposed, kernel.reads
    serial = most(kernel.wave / rate, kernel.promotion) + kernel.waiting
    fixed_latency, of_stage = sm90a.LOAD_LATENCY
    latency = (fixed_latency + of_stage * serial) / ring
    of_one, of_all = sm90a.INGRESS_BYTES_PER_CYCLE
    unique_rate, norm, main_norm = sm90a.UNIQUE_BYTES_PER_CYCLE, sm90a.STAGE_NORM, sm90a.MAIN_NORM
    smem_rate, exposed_smem = sm90a.SMEM_BYTES_PER_CYCLE, sm90a.PROMOTION_EXPOSED_SMEM * exposed
    tokens, token_sharing, weights = kernel.tokens, kernel.token_sharing, kernel.weights
    weight_bytes = kernel.weight_bytes
    weights_asked = weights / kernel.weight_sharing

    clock, full_clock = device.clock_hz / 1e6, device.clock_hz_memory_bound / 1e6  # cycles per us
    (idle, busy), throttled_cycles = sm90a.TENSOR_BOUND, sm90a.THROTTLED_CYCLES
    bytes_of_a_row, bytes_of_b = k * size, n * k * size * weight_bytes / 128
    bytes_of_d_row = n // problem.gated * D_BYTES[problem.d_dtype]
    shared = sm90a.HBM_SHARED
    utilization = sm90a.HBM_UTILIZATION if groups is None else 1.0  # L2 has nothing of all groups' weights
    hbm_rate, hbm_of_sm = device.hbm_bytes_per_s * utilization / 1e6, sm90a.HBM_BYTES_PER_US_AND_SM
    repeated = sm90a.EPILOGUE_REPEATED

    def terms(m: Any) -> tuple[Any, ...]:
        # How the tiles fall on the chip: rounds of them, each with so many CTAs; of these, CTAs on one SM.
        tiles_m = -(-m // rows)
        if groups is not None and groups.alignment:
            # Groups start at any multiple of the alignment into a tile; warpgroups without rows of theirs cost nothing.
            tiles_m = most(tiles_m, (m + most(kernel.warpgroup_rows - groups.alignment, 0)) / rows)
        ctas = tiles_m * tiles_n * cluster
        if groups is not None:
            ctas = ctas * groups.number
        rounds = -(-ctas // slots)
        active = -(-ctas // rounds)
        sharing = least((active - 1) // num_sms, blocks_per_sm - 1) + 1
        sms = least(num_sms, active)
        # Rows that all CTAs of a round load for a stage, each counted once: of tiles that lie near a square.
        at_once = active / cluster
        if groups is not None:
            groups_at_once = least(groups.number, ceil(at_once / (tiles_m * tiles_n)))
            at_once = at_once / groups_at_once
        tall = least(tiles_m, most(1, nearest(sqrt(at_once * columns / rows))))
        wide = least(tiles_n, ceil(at_once / tall))
        tall = least(tiles_m, ceil(at_once / wide))
        unique = (least(m, tall * rows) * 128 + least(n, wide * columns) * weight_bytes) * split_k / sms
        if groups is not None:
            unique = unique * groups_at_once
        # One stage of the CTAs of one SM, cycles.
        loaded = where(tiles_m > 1, tokens, least(tokens, m))
        tensor = sharing * mma + exposed
        weights_loaded = weights * weight_bytes
        smem = sharing * (reads + loaded * 128 + weights_loaded) / smem_rate + exposed_smem
        if groups is not None and groups.idles:
            computing = -(-m // kernel.warpgroup_rows) / (-(-m // rows) * (rows / kernel.warpgroup_rows))
            tensor = tensor * computing
            # Every block gets full tiles and last ones in turn.
            loaded, read = least(tokens, m / tiles_m), sharing * reads / smem_rate + exposed_smem
            smem = where(tiles_m > 1, read * computing, read) + sharing * (loaded * 128 + weights_loaded) / smem_rate
        asked = sharing * (loaded / token_sharing * 128 + weights_asked * weight_bytes)
        ingress = asked * most(1 / of_one, sms / num_sms / of_all) + unique / unique_rate
        stage = (tensor**norm + smem**norm + serial**norm + ingress**norm + latency**norm) ** (1 / norm)
        stage = stage + kernel.multicast
        # Everything, us.
        iterations = rounds * stages
        throttled = least(most((sharing * mma / stage - idle) / (busy - idle), 0.0), 1.0)
        throttled = where(iterations * stage > throttled_cycles, throttled, 0.0)
        cycles_per_us = full_clock - (full_clock - clock) * throttled
        loop = iterations / cycles_per_us
        operands = m * bytes_of_a_row + bytes_of_b * (1 + shared * (1 - 1 / tiles_m))
        hbm = operands / least(hbm_rate, sms * hbm_of_sm) + m * bytes_of_d_row / hbm_rate
        if groups is not None:
            hbm = hbm * groups.number
        epilogue = (1 + (rounds - 1) * repeated) * kernel.epilogue / cycles_per_us
        reduction = rounds * kernel.reduction + (rounds - 1) * kernel.relaunch
        main = ((loop * stage) ** main_norm + hbm**main_norm) ** (1 / main_norm)
        total = kernel.launch + main + epilogue + reduction
        if groups is None:  # of which corrections know nothing
            total = kernel.correction * total
        return (
            total,
            loop * tensor,
            loop * serial,
            loop * smem,
            loop * ingress,
            loop * latency,
            hbm,
            epilogue,
            reduction,
        )

    return terms


# -- Choice.

Overrides = tuple[tuple[str, Any], ...]


class _Rules(NamedTuple):
    """What is in force beside the model."""

    overrides: Overrides
    batch_invariant: bool
    tables: tuned.Tables


def _rules(device: Device, current: Settings) -> _Rules:
    overrides = tuple(current.tuning().items())
    measured = not overrides and not current.batch_invariant
    return _Rules(overrides, current.batch_invariant, tuned.tables(device, current) if measured else tuned.NONE)


class _Winner(NamedTuple):
    """What serves an anchor."""

    config: GemmConfig
    correction: float = 1.0  # of predictions for it around the anchor
    entry: tuned.Entry | None = None
    table: Path | None = None


def _rank(config: GemmConfig, cost: float) -> tuple[float, int, GemmConfig]:
    """Cheapest first; of configs that the model can't tell apart, the one with the deeper ring."""
    return cost, -config.stages, config


def prepare(problem: GemmProblem, arch: Architecture) -> None:
    """Compute all of a choice that depends on neither the problem's sizes nor the chip: half of a first call's."""
    kind = problem.without_sizes()
    for config in _menu(kind):
        if _illegal_kernel(kind, config, arch) is None:
            _traits(kind, config)


class Chooser:
    """The table from m to config of one problem."""

    def __init__(self, problem: GemmProblem, device: Device, rules: _Rules, limit: int) -> None:
        self._problem, self._device = problem, device
        self._winners, self.kernels = _winners(problem, device, rules, limit)
        self.serving = Serving(self._winners, self._choose)

    def __call__(self, m: int) -> GemmConfig:
        """The config for an m."""
        return self.serving(m).config

    def _choose(self, ms: tuple[int, ...]) -> list[_Winner]:
        """The winners of values of m between two anchors: what was measured at these holds up to the other one."""
        near = [self._winners[ANCHORS.index(anchor)] for anchor in anchors_around(ms[0], 1)]
        served = {config: _Winner(config) for config in self.kernels}
        served |= {winner.config: winner for winner in near if winner.correction != 1}
        kernels = sorted(self.kernels, key=lambda config: _rank(config, 0.0))  # the first of equals serves
        factors = [served[config].correction for config in kernels]
        winners = []
        for row in predict_all(self._problem, kernels, self._device, ms):
            costs = [us * factor for us, factor in zip(row, factors, strict=True)]
            winners.append(served[kernels[costs.index(min(costs))]])
        return winners


_chooser = functools.lru_cache(maxsize=1024)(Chooser)


def _winners(
    problem: GemmProblem, device: Device, rules: _Rules, limit: int
) -> tuple[tuple[_Winner, ...], tuple[GemmConfig, ...]]:
    """What serves each anchor, and the kernels that serve all m."""
    legal = sorted(_legal(problem, device, rules), key=lambda config: _rank(config, 0.0))
    measured = _measured(problem, device, rules.tables)
    configs = list(dict.fromkeys((*legal, *(entry.config for entry, _ in measured.values()))))
    predicted = predict_all(problem, configs, device, (*ANCHORS, *RAGGED))
    if rules.batch_invariant:
        split_k = _best_split(configs, predicted)
        columns = [index for index, config in enumerate(configs) if config.split_k == split_k]
        configs, predicted = [configs[i] for i in columns], [[row[i] for i in columns] for row in predicted]
    costs = [list(row) for row in predicted]
    for m, (entry, _) in measured.items():
        row = costs[ANCHORS.index(m)]
        row[configs.index(entry.config)] = (1 - 1e-9) * min(row) / max(1, entry.margin)  # wins at any margin
    winners = []
    weights = [_MEASURED_WEIGHT if m in measured else 1.0 for m in (*ANCHORS, *RAGGED)]
    assigned = assign(costs, limit, weights)
    for m, index, cost, prediction in zip(ANCHORS, assigned, costs, predicted, strict=False):
        winner = _Winner(configs[index], cost[index] / prediction[index])
        if m in measured and measured[m][0].config == winner.config:
            winner = winner._replace(entry=measured[m][0], table=measured[m][1])
        winners.append(winner)
    return tuple(winners), tuple(sorted({configs[index] for index in assigned}))


def _measured(problem: GemmProblem, device: Device, tables: tuned.Tables) -> dict[int, tuple[tuned.Entry, Path]]:
    """The entries of tuned tables that can be used, by anchor."""
    found = {}
    for m, (entry, path) in tables.entries(problem).items():
        reason = illegal(problem, entry.config, device) if m in ANCHORS else "m is no anchor of this version"
        if reason is None:
            found[m] = entry, path
        else:
            what = f"{entry.config} for m = {m} of {problem.n} x {problem.k}, {problem.recipe}"
            tuned.warn(path, f"{what} cannot be used: {reason}")
    return found


def _best_split(configs: Sequence[GemmConfig], costs: Sequence[Sequence[float]]) -> int:
    """The split of K with which all anchors together cost least, as a geometric mean of what each costs at best.

    An element of D has the same bits, up to the sign of zero, in all configs with the same split: K is summed up in the
    same order, and products don't depend on the order of their factors.
    """
    splits: dict[int, list[int]] = {}
    for index, config in enumerate(configs):
        splits.setdefault(config.split_k, []).append(index)
    return min(sorted(splits), key=lambda split: sum(math.log(min(row[i] for i in splits[split])) for row in costs))


@functools.lru_cache(maxsize=1024)
def _legal(problem: GemmProblem, device: Device, rules: _Rules) -> tuple[GemmConfig, ...]:
    """The legal candidates of a problem, whatever its m.

    Raises:
        ConfigError: there is none; names the overrides and the limits that they break.
    """
    overrides = rules.overrides
    offered = candidates(problem, overrides)
    if rules.batch_invariant and not overrides:
        offered = _with_every_split(_signature(problem))
    assessed = [(config, illegal(problem, config, device)) for config in offered]
    legal = tuple(config for config, reason in assessed if reason is None)
    if legal:
        return legal
    raise no_legal_config(overrides, [reason for _, reason in assessed if reason is not None])


def no_legal_config(overrides: Overrides, found: Sequence[str]) -> ConfigError:
    """The error for overrides whose candidates are all illegal, for these reasons."""
    reasons = collections.Counter(found)
    written = [f"{settings.PREFIX}{name.upper()}={settings.as_written(value)}" for name, value in overrides]
    named = ", ".join(written) or "no overrides"
    why = "; ".join(reason for reason, _ in reasons.most_common()) or "they contradict each other"
    return ConfigError(f"no legal config with {named}: {why}")
