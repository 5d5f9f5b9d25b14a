"""Dense GEMM: candidates, limits, cost model and choice.

A choice has two steps. The winner of each *anchor* m (a fixed ladder) is found over the candidates; a call's
m is then served by whichever of the winners around it costs least at that very m. So all configs that any m
can get are the anchors' winners: finite, and enumerable without knowing m.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jitgemm import settings
from jitgemm.device import SM90A, Device
from jitgemm.errors import ConfigError
from jitgemm.families.gemm import FAMILY, MMA_M, SMEM_ALIGNMENT, GemmConfig, GemmProblem, KernelShape
from jitgemm.families.base import KernelSpec
from jitgemm.heuristics import sm90a

ANCHORS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384)
"""Values of m whose winners serve every m."""

_NEIGHBOURS = 2  # anchors on each side of m whose winners are considered

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
    return _choose(problem, device, _overrides())


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
    """Cost or illegality of every config that the generator can make.

    Raises:
        ConfigError: no legal config meets the overrides in force.
    """
    winner = choose_config(problem, device)
    return Explanation([assess(problem, config, device) for config in generate(problem, _overrides())], winner)


def assess(problem: GemmProblem, config: GemmConfig, device: Device) -> Candidate:
    """One config as a candidate for a problem with its m."""
    reason = illegal(problem, config, device)
    if reason is not None:
        return Candidate(config, terms={}, reason=reason)
    terms = predict(problem, config, device)
    return Candidate(config, cost_us=terms["total"], terms=terms)


# -- Candidates.


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
    shape = KernelShape(problem, config)
    arch = device.arch
    fp8 = problem.traits.is_fp8
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
    if config.cluster_m * config.cluster_n > 2:
        return "a multicast cluster has at most 2 CTAs"
    if config.cluster_m * config.cluster_n > 1 and config.split_k > 1:
        return "a cluster shares operands or splits K, not both"
    if config.split_k not in _SPLITS:
        return f"split_k must be one of {', '.join(map(str, _SPLITS))}"
    rows_shared = config.cluster_m if config.swap_ab else config.cluster_n
    columns_shared = config.cluster_n if config.swap_ab else config.cluster_m
    if shape.n_side_major == "k" and shape.mma_n % (8 * columns_shared) or shape.mma_m % (8 * rows_shared):
        return "a shared tile must divide into equal multiples of 8 rows"
    if shape.n_side_major == "mn" and shape.mma_n % 64 and shape.mma_n > 64:
        return "an MN-major operand on the MMA's N side comes in slabs of 64"
    if shape.smem_bytes > arch.smem_per_block:
        return f"shared memory exceeds {arch.smem_per_block} bytes"
    if config.stages < 2:
        return "fewer than 2 stages cannot overlap loads with MMAs"
    if config.split_k > 1 and config.split_k > -(-problem.k // config.tile_k):
        return "split_k exceeds the stages of K"
    return None


# -- Cost model.


def predict(problem: GemmProblem, config: GemmConfig, device: Device) -> dict[str, float]:
    """Predicted time in us of a legal config, with the terms it comes from."""
    assert problem.m is not None
    shape = KernelShape(problem, config)
    m, n, k = problem.m, problem.n, problem.k
    size = problem.traits.operand_bytes
    tiles_m, tiles_n = -(-m // config.tile_m), -(-n // config.tile_n)
    clusters_m, clusters_n = -(-tiles_m // config.cluster_m), -(-tiles_n // config.cluster_n)
    per_cluster = config.cluster_m * config.cluster_n * config.split_k
    ctas = clusters_m * clusters_n * per_cluster
    blocks_per_sm = shape.blocks_per_sm
    slots = max(per_cluster, _resident(device.num_sms, config, blocks_per_sm) // per_cluster * per_cluster)
    rounds = -(-ctas // slots)  # tiles that the busiest CTA computes
    active = min(ctas, -(-ctas // rounds))
    sms = min(device.num_sms, active)
    sharing = -(-active // device.num_sms)  # CTAs on one SM
    stages = -(-(-(-k // config.tile_k)) // config.split_k)

    # One stage of one CTA, cycles.
    mma_rate = (device.mma_fp8_flops_per_clock_per_sm if size == 1 else device.mma_bf16_flops_per_clock_per_sm) / (
        8192 / size
    )
    columns = shape.mma_n
    operand_fixed, operand_divisor = sm90a.MMA_OPERAND_CYCLES
    mma = max(columns / 2, operand_fixed + columns / operand_divisor) / mma_rate
    per_wave = sm90a.MMAS_PER_STAGE * mma
    tensor = shape.math_warpgroups * shape.waves * per_wave * sharing
    if problem.promotes:
        # A warpgroup waits for its MMAs, then promotes; another one's MMAs run meanwhile.
        promotion = columns / 2 * (1.0 + 0.5 * (shape.column_scale_blocks > 1) + 0.7 * (shape.n_side_scales == "row_k"))
        chain = shape.waves * (sm90a.MMA_ISSUE_LATENCY + per_wave + promotion) + sm90a.STAGE_OVERHEAD
    else:
        chain = shape.waves * per_wave + sm90a.STAGE_OVERHEAD / 2
    m_shared = config.cluster_m if config.swap_ab else config.cluster_n
    n_shared = config.cluster_n if config.swap_ab else config.cluster_m
    stage_bytes = shape.mma_m * 128 / m_shared + shape.n_side_rows * 128 / n_shared
    l2_rate = device.l2_bytes_per_s / device.clock_hz_memory_bound / sms
    ingress = stage_bytes * sharing / min(sm90a.SM_BYTES_PER_CLOCK, l2_rate / sm90a.L2_SHARED_DISCOUNT)
    stage = max(tensor, chain, ingress)

    bound_by_tensor = tensor >= 0.8 * stage
    clock = device.clock_hz if bound_by_tensor else device.clock_hz_memory_bound
    epilogue = shape.waves * (sm90a.EPILOGUE_FIXED + sm90a.EPILOGUE_PER_COLUMN * columns * shape.d_bytes / 2)
    exposed = epilogue * (1.0 if rounds == 1 else rounds)
    main = rounds * stages * stage / clock
    tail = exposed / clock
    reduction = 0.0
    if config.split_k > 1:
        fixed, per_column = sm90a.CLUSTER_REDUCTION_S
        reduction = rounds * (fixed + per_column * columns * shape.math_warpgroups * shape.waves)
    unique = (m * k + n * k) * size + m * n * shape.d_bytes
    in_flight = min(1.0, sms * min(config.stages, stages) * shape.stage_bytes * blocks_per_sm_used(sharing) / (132 * 48e3))
    hbm = unique / (device.hbm_bytes_per_s * max(0.25, in_flight))
    total = sm90a.LAUNCH_S + sm90a.RAMP_S + max(main, hbm) + tail + reduction
    scale = 1e6
    return {
        "total": total * scale,
        "tensor": rounds * stages * tensor / clock * scale,
        "chain": rounds * stages * chain / clock * scale,
        "ingress": rounds * stages * ingress / clock * scale,
        "hbm": hbm * scale,
        "epilogue": tail * scale,
        "reduction": reduction * scale,
    }


def blocks_per_sm_used(sharing: int) -> int:
    """CTAs that load at the same time on one SM."""
    return max(1, sharing)


def _resident(num_sms: int, config: GemmConfig, blocks_per_sm: int) -> int:
    """CTAs resident at once. Clusters of more than 2 leave SMs of unevenly fused GPCs idle (measured on an H200)."""
    fill = {1: 1.0, 2: 1.0, 4: 120 / 132, 8: 120 / 132}
    size = config.cluster_m * config.cluster_n * config.split_k
    return int(num_sms * blocks_per_sm * fill[size])


# -- Choice.

Overrides = tuple[tuple[str, Any], ...]


def _overrides() -> Overrides:
    return tuple(settings.current().tuning().items())


@functools.lru_cache(maxsize=65536)
def _choose(problem: GemmProblem, device: Device, overrides: Overrides) -> GemmConfig:
    assert problem.m is not None
    middle = bisect.bisect_left(ANCHORS, problem.m)
    near = ANCHORS[max(0, middle - _NEIGHBOURS) : middle + _NEIGHBOURS]
    winners = sorted({_anchor_winner(problem.without_m(), m, device, overrides) for m in near})
    return min(winners, key=lambda config: (predict(problem, config, device)["total"], config))


@functools.lru_cache(maxsize=65536)
def _anchor_winner(problem: GemmProblem, m: int, device: Device, overrides: Overrides) -> GemmConfig:
    at = problem.with_m(m)
    best: tuple[float, GemmConfig] | None = None
    reasons: dict[str, int] = {}
    for config in generate(at, overrides):
        reason = illegal(at, config, device)
        if reason is not None:
            reasons[reason] = reasons.get(reason, 0) + 1
            continue
        cost = (predict(at, config, device)["total"], config)
        best = cost if best is None else min(best, cost)
    if best is None:
        named = ", ".join(f"{settings.PREFIX}{name.upper()}={value}" for name, value in overrides) or "no overrides"
        raise ConfigError(f"no legal config with {named}: " + "; ".join(sorted(reasons, key=lambda r: -reasons[r])))
    return best[1]
