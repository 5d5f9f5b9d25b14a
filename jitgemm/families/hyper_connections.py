"""The kernels around hyper-connections: mixes of four residual streams before and after each sublayer."""

from __future__ import annotations

from typing import NamedTuple

from jitgemm.families.base import KernelSpec
from jitgemm.families.plain import Field, PlainFamily

STREAMS = 4
MIX_WIDTH = (2 + STREAMS) * STREAMS
VECTOR = 8  # BF16 of one load
THREADS = 256
COLUMNS = THREADS * VECTOR
"""Columns of a token that one block of hc_mix and hc_post makes."""


def _of_fp32(spec: KernelSpec) -> str:
    """What describes the streams."""
    return " fp32 streams" if spec["fp32"] else ""


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

HC_MIX = PlainFamily(
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
    describe=lambda spec: f"{'head' if spec['head'] else 'pre'}{_of_fp32(spec)}",
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
    describe=lambda spec: _of_fp32(spec),
)

# -- The prenorm GEMM.

MMA_ROWS = 16
CHUNK = 32  # of K, that a warp loads and multiplies at once
SPLIT_BLOCK = 64  # of K, that splits are made of
MAX_N = MIX_WIDTH  # more spills registers


class PrenormConfig(NamedTuple):
    """How a block's warps share its rows and its ring of stages of K.

    Each of ``warps_m`` times ``warps_k`` has ``m_blocks`` x 16 rows, and those that have the same take turns with a
    stage's chunks of K.
    """

    warps_m: int
    warps_k: int
    m_blocks: int
    stage_k: int
    stages: int

    @property
    def tile_m(self) -> int:
        """Rows of a block."""
        return self.warps_m * self.m_blocks * MMA_ROWS


SHORT = PrenormConfig(1, 8, 1, 256, 2)
"""For few rows: all warps have the same 16, and each its own chunk of K."""
TALL = PrenormConfig(8, 1, 1, 64, 4)
"""For many rows."""
PRENORM_CONFIGS = (SHORT, TALL)

_SHORT_ROWS = 32
_LEAST_K = 128  # of a split: less would be all latency
MAX_SPLITS = 128


def blocks_per_sm(fp32: bool) -> int:
    """Blocks of the prenorm GEMM on a multiprocessor: chunks of FP32 take the registers of two."""
    return 1 if fp32 else 2


def _b_pitch(stage_k: int) -> int:
    return 4 * stage_k + 16  # bytes: rows start a vector further on in the banks, so that loads don't collide


def _b_rows(spec: KernelSpec) -> int:
    """Rows of B's stage, rounded up to what all threads copy at once."""
    at_once = 32 * spec["warps_m"] * spec["warps_k"] * 4 // spec["stage_k"]
    return int(-(-spec["n_blocks"] * 8 // at_once) * at_once)


def _prenorm_smem(spec: KernelSpec) -> int:
    rows, n = spec["warps_m"] * spec["m_blocks"] * MMA_ROWS, spec["n_blocks"] * 8
    a, b = rows * spec["stage_k"] * (4 if spec["fp32"] else 2), _b_rows(spec) * _b_pitch(spec["stage_k"])
    stages = spec["stages"] * (a + b * (2 if spec["precise"] else 1))
    sums = 4 * spec["warps_k"] * rows * (n + 1) if spec["warps_k"] > 1 else 0
    return int(max(stages, sums))


class _PrenormFamily(PlainFamily):
    def kernel_name(self, spec: KernelSpec) -> str:
        return "jitgemm_tf32_hc_prenorm_gemm"  # so DeepGEMM's tests find it in a profile, whatever the precision

    def of(self, arch: str, n: int, config: PrenormConfig, precise: bool, fp32: bool = False) -> KernelSpec:
        """The spec of the kernel for a config and n rows of B; ``fp32``: A is FP32."""
        n_blocks = 1 if n <= 8 else MAX_N // 8
        return self.spec(arch, n_blocks=n_blocks, precise=precise, fp32=fp32, **config._asdict())

    def num_threads(self, spec: KernelSpec) -> int:
        return 32 * int(spec["warps_m"] * spec["warps_k"])

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        smem = self.smem_bytes(spec) + 1024
        blocks = max(1, min(233472 // smem, 65536 // (self.num_threads(spec) * (168 if spec["m_blocks"] > 1 else 128))))
        return {**super().render_context(spec), "b_rows": _b_rows(spec), "b_pitch": _b_pitch(spec["stage_k"]), "blocks_per_sm": blocks, "threads": self.num_threads(spec)}


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
        f" {MMA_ROWS * spec['warps_m'] * spec['m_blocks']}x{spec['stage_k']}x{spec['stages']}{' fp32 a' if spec['fp32'] else ''}"
    ),
    smem_bytes=_prenorm_smem,
)


def choose_prenorm(m: int) -> PrenormConfig:
    """The config for so many rows."""
    return SHORT if m <= _SHORT_ROWS else TALL


def choose_num_splits(m: int, k: int, num_sms: int, fp32: bool = False) -> int:
    """Parts of K that fill the multiprocessors with one wave of blocks, none shorter than 128."""
    tiles = max(1, -(-m // choose_prenorm(m).tile_m))
    return max(1, min(blocks_per_sm(fp32) * num_sms // tiles, k // _LEAST_K, MAX_SPLITS))
