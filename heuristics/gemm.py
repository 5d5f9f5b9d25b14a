"""Dense GEMM: candidates, limits, cost model and choice.

A choice has two steps. The winner of each *anchor* m (a fixed ladder) is found over the candidates; a call's
m is then served by whichever of the winners around it costs least at that very m. So all configs that any m
can get are the anchors' winners: finite, and enumerable without knowing m.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jitgemm import settings
from jitgemm.device import SM90A, Architecture, Device
from jitgemm.errors import ConfigError
from jitgemm.families.base import KernelSpec
from jitgemm.families.gemm import (
    FAMILY,
    FEW_BOUNDARIES_STEP,
    MMA_M,
    STAGE_ROW_BYTES,
    GemmConfig,
    GemmProblem,
    KernelShape,
    kernel_shape,
)
from jitgemm.heuristics import sm90a
from jitgemm.settings import Settings

ANCHORS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384)
"""Values of m whose winners serve every m."""

_CHOICES = 65536  # kept of one problem

_NEIGHBOURS = 1  # anchors on each side of m whose winners are considered

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


def choose_config(problem: GemmProblem, device: Device) -> GemmConfig:
    """The config for a problem with its m.

    Raises:
        ConfigError: no legal config meets the overrides in force.
    """
    assert problem.m is not None
    return chooser(problem, device)(problem.m)


def chooser(problem: GemmProblem, device: Device, in_force: Settings | None = None) -> Chooser:
    """``choose_config`` for a problem with any m, under the overrides of some settings, or those in force."""
    return _chooser(problem.without_m(), device, _overrides(in_force))


def enumerate_configs(problem: GemmProblem, device: Device) -> tuple[GemmConfig, ...]:
    """Every config that ``choose_config`` can return for the problem, whatever its m."""
    overrides = _overrides()
    return tuple(sorted({_anchor_winner(problem.without_m(), m, device, overrides) for m in ANCHORS}))


def enumerate_specs(problem: GemmProblem, device: Device) -> tuple[KernelSpec, ...]:
    """Every kernel that calls of the problem can need: of any m, with scales in any layout, with or without C."""
    from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES

    specs = [FAMILY.spec(problem, config, device.arch.name) for config in enumerate_configs(problem, device)]
    if "row_k" in (problem.traits.a_scales, problem.traits.b_scales):
        specs.append(TRANSPOSE_SCALES.spec(device.arch.name))
    return tuple(specs)


@dataclass(frozen=True)
class Explanation:
    """All candidates of a problem, and the one that a call gets."""

    candidates: list[Candidate]
    winner: GemmConfig


def explain(problem: GemmProblem, device: Device) -> Explanation:
    """Predicted cost of every config on the menu (or that has the overrides' values), and why others are illegal.

    Raises:
        ConfigError: no legal config meets the overrides in force.
    """
    winner = choose_config(problem, device)
    overrides = _overrides()
    offered = [assess(problem, config, device) for config in candidates(problem, overrides)]
    others = [assess(problem, config, device) for config in generate(problem, overrides)]
    illegal_only = [other for other in others if other.reason is not None]
    return Explanation(
        [*offered, *(other for other in illegal_only if other.config not in candidates(problem, overrides))], winner
    )


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


@functools.lru_cache(maxsize=256)
def _menu(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    text = sm90a.FP8_MENU if problem.promotes else sm90a.BF16_MENU
    tile_k = STAGE_ROW_BYTES // problem.traits.operand_bytes
    configs = (_parse(entry, tile_k) for entry in text.split(","))
    return tuple(dict.fromkeys(_fitting(problem, config) for config in configs))


def _parse(entry: str, tile_k: int) -> GemmConfig:
    """A line of a menu, such as ``64x48 s12 c2x1``."""
    tile, stages, *rest = entry.split()
    tile_m, tile_n = map(int, tile.split("x"))
    config = GemmConfig(tile_m, tile_n, tile_k, int(stages[1:]))
    for word in rest:
        if word == "swap":
            config = dataclasses.replace(config, swap_ab=True)
        elif word[0] == "k":
            config = dataclasses.replace(config, split_k=int(word[1:]))
        else:
            cluster_m, cluster_n = map(int, word[1:].split("x"))
            config = dataclasses.replace(config, cluster_m=cluster_m, cluster_n=cluster_n)
    return config


def _fitting(problem: GemmProblem, config: GemmConfig) -> GemmConfig:
    """The config with as many of its stages as shared memory has room for: scales and FP32 outputs take some."""
    while config.stages > 2 and _shape(problem, config).smem_bytes > SM90A.smem_per_block:
        config = dataclasses.replace(config, stages=config.stages - 1)
    return config


_shape, _signature = kernel_shape, GemmProblem.without_sizes


_TILE_NS = (16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 136, 144, 160, 176, 192, 208, 224, 240, 256)
_TOKEN_TILES = (8, 16, 24, 32, 40, 48, 64, 80, 96, 128)
_SPLITS = (1, 2, 4, 8)


def generate(problem: GemmProblem, overrides: Overrides = ()) -> Iterator[GemmConfig]:
    """Every config worth thinking of, legal or not; overrides replace the values that they name."""
    given = dict(overrides)
    tile_k = 128 // problem.traits.operand_bytes
    clusters = [given["cluster"]] if "cluster" in given else [(1, 1), (2, 1), (1, 2)]
    splits = [given["split_k"]] if "split_k" in given else _SPLITS
    for swap_ab in [given["swap_ab"]] if "swap_ab" in given else (False, True):
        tiles_m = (given["tile_m"],) if "tile_m" in given else _TOKEN_TILES if swap_ab else (64, 128, 256)
        tiles_n = (given["tile_n"],) if "tile_n" in given else (64, 128) if swap_ab else _TILE_NS
        for tile_m, tile_n, (cluster_m, cluster_n), split_k in itertools.product(tiles_m, tiles_n, clusters, splits):
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


def illegal(problem: GemmProblem, config: GemmConfig, device: Device) -> str | None:
    """Why a config can't be built or would not run, or None."""
    if config.split_k > 1 and config.split_k > -(-problem.k // config.tile_k):
        return "split_k exceeds the stages of K"
    return _illegal_kernel(_signature(problem), config, device.arch)


@functools.lru_cache(maxsize=65536)
def _illegal_kernel(problem: GemmProblem, config: GemmConfig, arch: Architecture) -> str | None:
    shape = _shape(problem, config)
    if config.tile_k != 128 // problem.traits.operand_bytes:
        return f"tile_k must be {128 // problem.traits.operand_bytes}: one stage holds 128 bytes of a row"
    if shape.mma_m not in (64, 128, 256):
        side = "tile_n" if config.swap_ab else "tile_m"
        return f"{side} must be 64, 128 or 256: it takes the MMA's M side"
    if shape.mma_n % 8 or not 8 <= shape.mma_n <= 256:
        side = "tile_m" if config.swap_ab else "tile_n"
        return f"{side} must be a multiple of 8 from 8 to 256: it takes the MMA's N side"
    budget = (192 if problem.promotes else 128) if shape.math_warpgroups == 2 else 208 if problem.promotes else 128
    if shape.accumulator_registers > budget:
        return f"sums take {'more than'} {budget} registers a thread"
    if problem.promotes and shape.waves > 1 and config.split_k > 1 and shape.accumulator_registers > 160:
        return "sums of two waves take more than 160 registers a thread beside split-K"
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
    """What the cost model reads of a kernel; none of it depends on m, n or k."""

    waves: int
    warpgroups: int
    columns: int  # of the MMA
    blocks_per_sm: int
    chained: bool
    promotion: float  # cycles of one wave
    mma: float  # cycles of one wave's MMAs of a stage, at full rate
    smem: float  # cycles of a stage's operand reads and copies
    ingress: float  # cycles of its copies from L2
    stage_bytes: int
    epilogue: float  # cycles
    reduction: float  # us


@functools.lru_cache(maxsize=4096)
def _traits(problem: GemmProblem, config: GemmConfig) -> _Traits:
    shape = _shape(problem, config)
    columns, rows = shape.mma_n, shape.mma_m
    fixed, divisor = sm90a.MMA_OPERAND_CYCLES
    promotion = 0.0
    if problem.promotes:
        per_register = sm90a.PROMOTION_CYCLES
        if shape.column_scale_blocks > 1:
            few = shape.column_boundary_step >= FEW_BOUNDARIES_STEP
            per_register += sm90a.PROMOTION_BRANCH_CYCLES if few else sm90a.PROMOTION_SELECT_CYCLES
        if shape.n_side_scales == "row_k":
            per_register += sm90a.PROMOTION_SCALE_CYCLES
        promotion = columns / 2 * per_register
    waves = shape.math_warpgroups * shape.waves
    reads = waves * sm90a.MMAS_PER_STAGE * (MMA_M + columns) * 32
    m_shared = config.cluster_m if config.swap_ab else config.cluster_n
    n_shared = config.cluster_n if config.swap_ab else config.cluster_m
    slices = columns // shape.store_columns
    fixed_reduction, reduction_per_column = sm90a.REDUCTION_US
    return _Traits(
        waves=shape.waves,
        warpgroups=shape.math_warpgroups,
        columns=columns,
        blocks_per_sm=shape.blocks_per_sm,
        chained=shape.chain > 1,
        promotion=promotion,
        mma=sm90a.MMAS_PER_STAGE * max(columns / 2, fixed + columns / divisor),
        smem=(reads + (rows + shape.n_side_rows) * 128) / sm90a.SMEM_BYTES_PER_CYCLE,
        ingress=(rows / m_shared + shape.n_side_rows / n_shared) * 128 / sm90a.INGRESS_BYTES_PER_CYCLE,
        stage_bytes=shape.stage_bytes,
        epilogue=sm90a.EPILOGUE_CYCLES
        + sm90a.EPILOGUE_COLUMN_CYCLES * columns * shape.waves * shape.d_bytes / 2
        + sm90a.EPILOGUE_SLICE_CYCLES * (slices - 1),
        reduction=fixed_reduction + reduction_per_column * columns * waves if config.split_k > 1 else 0.0,
    )


def predict(problem: GemmProblem, config: GemmConfig, device: Device) -> dict[str, float]:
    """Predicted time in us of a legal config (``total``), with the terms it comes from."""
    m, n, k = problem.m, problem.n, problem.k
    assert m is not None
    kernel = _traits(_signature(problem), config)
    size = problem.traits.operand_bytes

    # How the tiles fall on the chip.
    clusters = -(-m // (config.tile_m * config.cluster_m)) * -(-n // (config.tile_n * config.cluster_n))
    per_cluster = config.cluster_m * config.cluster_n * config.split_k
    ctas = clusters * per_cluster
    slots = _resident(device.num_sms, per_cluster, kernel.blocks_per_sm)
    rounds = -(-ctas // slots)  # tiles that the busiest CTA computes
    active = -(-ctas // rounds)
    sms = min(device.num_sms, active)
    sharing = -(-active // device.num_sms)  # CTAs on one SM
    k_blocks = -(-k // config.tile_k)
    stages = -(-k_blocks // config.split_k)

    # One stage of the CTAs of one SM, cycles.
    nominal = 8192 // size  # FLOP per clock and SM that the MMA cycles stand for
    rate = (device.mma_fp8_flops_per_clock_per_sm if size == 1 else device.mma_bf16_flops_per_clock_per_sm) / nominal
    mma = kernel.mma / rate
    overhead, latency = sm90a.STAGE_OVERHEAD_CYCLES, sm90a.MMA_LATENCY_CYCLES
    if not problem.promotes:
        exposed, serial = 0.0, kernel.waves * mma + sm90a.OVERLAPPED_OVERHEAD * overhead
    elif kernel.chained:
        exposed = sm90a.PROMOTION_EXPOSED_IN_CHAIN * kernel.warpgroups * kernel.promotion
        serial = max(mma, kernel.promotion) + sm90a.OVERLAPPED_OVERHEAD * (overhead + latency)
    else:
        exposed = sm90a.PROMOTION_EXPOSED * kernel.waves * (kernel.promotion + latency)
        serial = kernel.waves * (mma + latency + kernel.promotion) + overhead
    tensor = sharing * kernel.warpgroups * kernel.waves * mma
    smem = sharing * kernel.smem + sm90a.PROMOTION_EXPOSED_SMEM * exposed
    ingress = sharing * kernel.ingress
    stage = max(tensor + exposed, smem, serial, ingress)
    if config.cluster_m * config.cluster_n > 1:
        stage += sm90a.MULTICAST_CYCLES

    throttled = tensor > sm90a.TENSOR_BOUND * stage and rounds * stages * stage > sm90a.THROTTLED_CYCLES
    cycles_per_us = (device.clock_hz if throttled else device.clock_hz_memory_bound) / 1e6
    loop = rounds * stages / cycles_per_us
    in_flight = sharing * sms * min(config.stages, stages) * kernel.stage_bytes
    saturation = min(1.0, max(0.2, in_flight / (device.num_sms * sm90a.BYTES_IN_FLIGHT)))
    unique = (m * k + n * k) * size + m * n * (2 if problem.d_dtype == "bf16" else 4)
    hbm = unique / (device.hbm_bytes_per_s * sm90a.HBM_UTILIZATION * saturation) * 1e6
    epilogue = rounds * kernel.epilogue / cycles_per_us
    reduction = 0.0
    if config.split_k > 1:
        reduction = rounds * kernel.reduction + (rounds - 1) * sm90a.RELAUNCH_US
    # Loading and computing overlap, but not perfectly where they take equally long.
    main = float(((loop * stage) ** 4 + hbm**4) ** 0.25)
    return {
        "total": sm90a.LAUNCH_US + main + epilogue + reduction,
        "tensor": loop * tensor,
        "exposed": loop * exposed,
        "serial": loop * serial,
        "smem": loop * smem,
        "ingress": loop * ingress,
        "hbm": hbm,
        "epilogue": epilogue,
        "reduction": reduction,
    }


def _resident(num_sms: int, cluster_size: int, blocks_per_sm: int) -> int:
    """CTAs resident at once. Clusters of more than 2 leave SMs of unevenly fused GPCs idle (measured on an H200)."""
    fill = 1.0 if cluster_size <= 2 else 120 / 132
    return max(cluster_size, int(num_sms * blocks_per_sm * fill) // cluster_size * cluster_size)


# -- Choice.

Overrides = tuple[tuple[str, Any], ...]


def _overrides(in_force: Settings | None = None) -> Overrides:
    return tuple((in_force or settings.current()).tuning().items())


def _rank(problem: GemmProblem, config: GemmConfig, device: Device) -> tuple[float, int, GemmConfig]:
    """Cheapest first; of configs that the model can't tell apart, the one with the deeper ring."""
    return predict(problem, config, device)["total"], -config.stages, config


def prepare(problem: GemmProblem, arch: Architecture) -> None:
    """Compute all of a choice that depends on neither the problem's sizes nor the chip: half of a first call's."""
    kind = problem.without_sizes()
    for config in _menu(kind):
        if _illegal_kernel(kind, config, arch) is None:
            _traits(kind, config)


class Chooser:
    """The table from m to config of one problem; it fills as it is asked."""

    def __init__(self, problem: GemmProblem, device: Device, overrides: Overrides) -> None:
        self._problem, self._device, self._overrides = problem, device, overrides
        self._chosen: dict[int, GemmConfig] = {}
        self._near: dict[int, list[GemmConfig]] = {}  # winners of the anchors around an m, by its place among them

    def __call__(self, m: int) -> GemmConfig:
        """The config for an m.

        Raises:
            ConfigError: no legal config meets the overrides.
        """
        config = self._chosen.get(m)
        if config is None:
            winners = self._winners_near(bisect.bisect_left(ANCHORS, m))
            config = winners[0]
            if len(winners) > 1:
                at = self._problem.with_m(m)
                config = min(winners, key=lambda winner: _rank(at, winner, self._device))
            if len(self._chosen) >= _CHOICES:
                self._chosen = {}
            self._chosen[m] = config
        return config

    def _winners_near(self, middle: int) -> list[GemmConfig]:
        winners = self._near.get(middle)
        if winners is None:
            near = ANCHORS[max(0, middle - _NEIGHBOURS) : middle + _NEIGHBOURS]
            found = {_anchor_winner(self._problem, anchor, self._device, self._overrides) for anchor in near}
            winners = self._near[middle] = sorted(found)
        return winners


_chooser = functools.lru_cache(maxsize=1024)(Chooser)


@functools.lru_cache(maxsize=65536)
def _anchor_winner(problem: GemmProblem, m: int, device: Device, overrides: Overrides) -> GemmConfig:
    at = problem.with_m(m)
    return min(_legal(problem, device, overrides), key=lambda config: _rank(at, config, device))


@functools.lru_cache(maxsize=1024)
def _legal(problem: GemmProblem, device: Device, overrides: Overrides) -> tuple[GemmConfig, ...]:
    """The legal candidates of a problem, whatever its m.

    Raises:
        ConfigError: there is none; names the overrides and the limits that they break.
    """
    assessed = [(config, illegal(problem, config, device)) for config in candidates(problem, overrides)]
    legal = tuple(config for config, reason in assessed if reason is None)
    if legal:
        return legal
    reasons = collections.Counter(reason for _, reason in assessed if reason is not None)
    written = [f"{settings.PREFIX}{name.upper()}={settings.as_written(value)}" for name, value in overrides]
    named = ", ".join(written) or "no overrides"
    raise ConfigError(f"no legal config with {named}: " + "; ".join(reason for reason, _ in reasons.most_common()))
