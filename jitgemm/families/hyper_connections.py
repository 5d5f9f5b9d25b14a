"""The kernels around hyper-connections: mixes of four residual streams before and after each sublayer."""

from __future__ import annotations

import functools
from typing import NamedTuple

from jitgemm.device import ARCHITECTURES
from jitgemm.families.base import KernelSpec
from jitgemm.families.plain import Field, PlainFamily

STREAMS = 4
MIX_WIDTH = (2 + STREAMS) * STREAMS
VECTOR = 8  # BF16 of one load
VECTOR_BYTES = 16
WARP = 32
THREADS = 256
COLUMNS = THREADS * VECTOR
"""Columns of a token that one block of hc_mix and hc_post makes."""


def _of_fp32(spec: KernelSpec) -> str:
    """What describes the streams."""
    return "fp32 streams" if spec["fp32"] else ""


HC_SINKHORN = PlainFamily(
    "hc_sinkhorn",
    (
        Field("mixes", "const float*", "[tokens, 24]"),
        Field("scale", "const float*", "[3]"),
        Field("base", "const float*", "[24]"),
        Field("pre", "float4*", "[tokens]"),
        Field("post", "float4*", "[tokens]"),
        Field("comb", "float4*", "[tokens, 4]"),
        Field("tokens", "int32_t"),
        Field("iterations", "int32_t"),
        Field("eps", "float"),
        Field("post_mult", "float"),
    ),
    num_threads=32,  # of one token each; small, so that few tokens spread over many multiprocessors
)

MIX_TOKENS = 1, 16
"""Tokens of a block of hc_mix that makes weights: for few tokens, and for many."""
_FEW_TOKENS = 512  # blocks that are at work beside those of the sums


class _MixFamily(PlainFamily):
    def of(self, arch: str, head: bool, fp32: bool, tokens_per_block: int) -> KernelSpec:
        """The spec of the kernel for BF16 or FP32 streams."""
        # A thread's registers hold a vector of each stream: more blocks where these take half as many.
        blocks = 4 if fp32 else 6
        made = {} if head else {"tokens_per_block": tokens_per_block}
        return self.spec(arch, head=head, fp32=fp32, blocks_per_sm=blocks, **made)


def choose_mix_tokens(tokens: int) -> int:
    """Tokens of a block of hc_mix that makes weights, where there are so many."""
    return MIX_TOKENS[tokens > _FEW_TOKENS]


HC_MIX = _MixFamily(
    "hc_mix",
    (
        Field("products", "const float*", "[splits, tokens, mixes]"),
        Field("squares", "const float*", "[splits, tokens]"),
        Field("x", "const Stream*", "BF16 or FP32 [tokens, 4, width]"),
        Field("scale", "const float*", "[3], or [1] in the head"),
        Field("base", "const float*", "[mixes]"),
        Field("y", "uint4*", "BF16 [tokens, width]"),
        Field("post", "float4*", "[tokens]"),
        Field("comb", "float4*", "[tokens, 4]"),
        Field("tokens", "int32_t"),
        Field("vectors", "int32_t", "width / 8"),
        Field("splits", "int32_t"),
        Field("iterations", "int32_t"),
        Field("mean_factor", "float", "1 / (4 * width)"),
        Field("norm_eps", "float"),
        Field("eps", "float"),
        Field("post_mult", "float"),
    ),
    num_threads=THREADS,
    describe=lambda spec: f"{'head' if spec['head'] else 'pre by ' + str(spec['tokens_per_block'])} {_of_fp32(spec)}",
)

HC_POST = PlainFamily(
    "hc_post",
    (
        Field("x", "const uint4*", "BF16 [tokens, width]"),
        Field("residual", "const Stream*", "BF16 or FP32 [tokens, 4, width]"),
        Field("post", "const float4*", "[tokens]"),
        Field("comb", "const float4*", "[tokens, 4]"),
        Field("y", "Stream*", "as residual, which it may be"),
        Field("vectors", "int32_t", "width / 8"),
    ),
    num_threads=THREADS,
    describe=_of_fp32,
)

# -- The prenorm GEMM.

MMA_ROWS = 16
CHUNK = 32  # of K, that a warp loads and multiplies at once
SPLIT_BLOCK = 64  # of K, that splits are made of
MAX_N = MIX_WIDTH  # more spills registers


class PrenormConfig(NamedTuple):
    """How a block's warps share its rows.

    Each of ``warps_m`` times ``warps_k`` warps has ``m_blocks`` x 16 rows, and those that have the same take turns with
    a stage's chunks of K. ``blocks_per_sm`` share a multiprocessor, or one has it where two stages of each would not
    fit.
    """

    warps_m: int
    warps_k: int
    m_blocks: int
    stage_k: int
    blocks_per_sm: int

    @property
    def tile_m(self) -> int:
        """Rows of a block."""
        return self.warps_m * self.m_blocks * MMA_ROWS

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return self.warps_m * self.warps_k * WARP


SHORT = PrenormConfig(warps_m=1, warps_k=8, m_blocks=1, stage_k=256, blocks_per_sm=2)
"""For few rows, which B's bytes outweigh: all warps have the same 16, and each its own chunk of K."""
MEDIUM = PrenormConfig(warps_m=4, warps_k=1, m_blocks=1, stage_k=64, blocks_per_sm=2)
"""For too few rows to keep all multiprocessors at work 256 at a time."""
TALL = PrenormConfig(warps_m=8, warps_k=1, m_blocks=2, stage_k=64, blocks_per_sm=1)
"""For many rows: each load of B from shared memory serves 32 of them, and each from L2 256."""
PRENORM_CONFIGS = (SHORT, MEDIUM, TALL)

_SHORT_ROWS, _MEDIUM_ROWS = 32, 1024
_MAX_STAGES = 4
_LEAST_K = 128  # of a split: less would be all latency
_WAVE_K = 256  # K that takes as long as to start and to end a block
_ENOUGH = 0.85  # of the multiprocessors take all of the memory's bandwidth
_MAX_WAVES = 4
MAX_SPLITS = 128


def _b_pitch(stage_k: int) -> int:
    return 4 * stage_k + VECTOR_BYTES  # rows start a vector further on in the banks, so that loads don't collide


def _b_rows(config: PrenormConfig, n_blocks: int) -> int:
    """Rows of B's part of a stage: all, and as many more as make the threads' shares equal."""
    at_once = config.num_threads * VECTOR_BYTES // (4 * config.stage_k)
    return -(-n_blocks * 8 // at_once) * at_once


def _stage_bytes(config: PrenormConfig, n_blocks: int, precise: bool, fp32: bool) -> int:
    a = config.tile_m * config.stage_k * (4 if fp32 else 2)
    return a + _b_rows(config, n_blocks) * _b_pitch(config.stage_k) * (2 if precise else 1)


def _config_of(spec: KernelSpec) -> PrenormConfig:
    return PrenormConfig(**{field: spec[field] for field in PrenormConfig._fields})


def _prenorm_smem(spec: KernelSpec) -> int:
    config, n_blocks = _config_of(spec), spec["n_blocks"]
    stages = spec["stages"] * _stage_bytes(config, n_blocks, spec["precise"], spec["fp32"])
    sums = 4 * config.warps_k * config.tile_m * (8 * n_blocks + 1) if config.warps_k > 1 else 0
    return int(max(stages, sums))


class _PrenormFamily(PlainFamily):
    def kernel_name(self, spec: KernelSpec) -> str:
        return "jitgemm_tf32_hc_prenorm_gemm"  # so DeepGEMM's tests find it in a profile, whatever the precision

    def of(self, arch: str, n: int, config: PrenormConfig, precise: bool, fp32: bool = False) -> KernelSpec:
        """The spec of the kernel for a config and n rows of B, with the stages that fit; ``fp32``: A is FP32."""
        n_blocks, device = 1 if n <= 8 else MAX_N // 8, ARCHITECTURES[arch]
        stage = _stage_bytes(config, n_blocks, precise, fp32)
        if (device.smem_per_sm // config.blocks_per_sm - device.smem_reserved) // stage < 2:
            config = config._replace(blocks_per_sm=1)
        room = device.smem_per_sm // config.blocks_per_sm - device.smem_reserved
        stages = min(_MAX_STAGES, room // stage)
        return self.spec(arch, n_blocks=n_blocks, precise=precise, fp32=fp32, stages=stages, **config._asdict())

    def num_threads(self, spec: KernelSpec) -> int:
        return _config_of(spec).num_threads

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        config = _config_of(spec)
        made = {"threads": config.num_threads, "b_pitch": _b_pitch(config.stage_k)}
        return {**super().render_context(spec), **made, "b_rows": _b_rows(config, spec["n_blocks"])}


HC_PRENORM = _PrenormFamily(
    "hc_prenorm",
    (
        Field("a", "const Element*", "BF16 or FP32 [m, k]"),
        Field("b", "const float*", "[n, k]"),
        Field("d", "float*", "[splits, m, n]"),
        Field("squares", "float*", "[splits, m]"),
        Field("a_row_stride", "int64_t", "elements"),
        Field("b_row_stride", "int64_t"),
        Field("m", "int32_t"),
        Field("n", "int32_t"),
        Field("k", "int32_t"),
        Field("blocks_per_split", "int32_t", "of 64 of K"),
        Field("longer_splits", "int32_t", "the first ones, which have a block more"),
    ),
    num_threads=THREADS,
    describe=lambda spec: (
        f"n<={8 * spec['n_blocks']} {'fp32' if spec['precise'] else 'tf32'}"
        f" {_config_of(spec).tile_m}x{spec['stage_k']}x{spec['stages']}{' fp32 a' if spec['fp32'] else ''}"
    ),
    smem_bytes=_prenorm_smem,
)


def choose_prenorm(m: int) -> PrenormConfig:
    """The config for so many rows."""
    return SHORT if m <= _SHORT_ROWS else MEDIUM if m <= _MEDIUM_ROWS else TALL


@functools.lru_cache(maxsize=1024)
def choose_num_splits(m: int, k: int, num_sms: int) -> int:
    """Parts of K, none shorter than 128, that fill the multiprocessors once, or a few times where once is poorly."""
    config = choose_prenorm(m)
    tiles, slots = max(1, -(-m // config.tile_m)), config.blocks_per_sm * num_sms

    def cost(splits: int) -> float:
        """Of a multiprocessor's turns, in K of one block."""
        waves = -(-tiles * splits // slots)
        return max(waves * k / splits, tiles * k / (_ENOUGH * slots)) + waves * _WAVE_K

    most = max(1, min(k // _LEAST_K, MAX_SPLITS))
    return min((max(1, min(waves * slots // tiles, most)) for waves in range(1, _MAX_WAVES + 1)), key=cost)
