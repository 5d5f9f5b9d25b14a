"""The kernels around the experts' GEMMs: choose experts, give each choice a row, copy rows there, combine."""

from __future__ import annotations

from jitgemm.families.base import KernelSpec
from jitgemm.families.plain import Field, PlainFamily

WARP = 32  # threads
MAX_EXPERTS = 1024
MAX_TOPK = 32
MAX_COMBINED = 16  # rows of a token that are added up: all are loaded at once

_GATE_THREADS = 128  # of a block of many tokens
_FEW_GATES = 512  # tokens, each a block of few instructions at work at once
_MAX_BLOCK_EXPERTS = 512  # whose threads have registers enough


class _TopkFamily(PlainFamily):
    def of(self, arch: str, experts: int, scores: str, hashed: bool, long_indices: bool, by_block: bool) -> KernelSpec:
        """The spec of the kernel with a block for each token, and a thread for each expert, or with a warp a token."""
        # A lane's experts are in registers: a multiple of 4, or 32 where there are many.
        per_lane = -(-experts // WARP)
        per_lane = -(-per_lane // 4) * 4 if per_lane <= 16 else 32
        return self.spec(
            arch, per_lane=per_lane, scores=scores, hashed=hashed, long_indices=long_indices, by_block=by_block
        )

    def num_threads(self, spec: KernelSpec) -> int:
        return WARP * int(spec["per_lane"]) if spec["by_block"] else _GATE_THREADS

    def blocks(self, spec: KernelSpec, tokens: int) -> int:
        """Of so many tokens."""
        return tokens if spec["by_block"] else -(-tokens // (_GATE_THREADS // WARP))

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        return {**super().render_context(spec), "threads": self.num_threads(spec)}


def gates_by_block(tokens: int, experts: int, hashed: bool) -> bool:
    """Whether each of so many tokens has a block; an id's few experts take no more than a warp."""
    return tokens <= _FEW_GATES and experts <= _MAX_BLOCK_EXPERTS and not hashed


TOPK_GATE = _TopkFamily(
    "topk_gate",
    (
        Field("logits", "const float*", "[tokens, experts]"),
        Field("bias", "const float*", "[experts]; null: none"),
        Field("tid2eid", "const int32_t*", "[vocabulary, topk], the experts of a token id"),
        Field("input_ids", "const void*", "[tokens]"),
        Field("mask", "const uint8_t*", "[tokens], 0: routed nowhere; null: none"),
        Field("indices", "void*", "[tokens, topk]"),
        Field("weights", "float*", "[tokens, topk]"),
        Field("logits_row_stride", "int64_t", "elements"),
        Field("vocabulary", "int64_t"),
        Field("tokens", "int32_t"),
        Field("experts", "int32_t"),
        Field("topk", "int32_t"),
        Field("ids_are_long", "int32_t", "whether input_ids are int64, not int32"),
        Field("route_scale", "float"),
    ),
    num_threads=_GATE_THREADS,
    describe=lambda spec: (
        f"{spec['scores']} {'hashed' if spec['hashed'] else 'experts<=' + str(WARP * spec['per_lane'])}"
        f" {'int64' if spec['long_indices'] else 'int32'}{' block a token' if spec['by_block'] else ''}"
    ),
)


MMA_EXPERTS = 8  # columns of an MMA
CLUSTER_THREADS = 512
CLUSTER_CTAS = 16
"""CTAs that have all experts of some tokens: enough to read the weights at half the memory's bandwidth, and to be
done before a second kernel would have begun."""
CLUSTER_TOKENS = 8, 16
MAX_CLUSTER_TOKENS = 64
"""Tokens whose gate is one kernel; more keep the tensor cores of a GEMM busy."""
MAX_CLUSTER_EXPERTS = 512
_BATCH_REGISTERS = 80  # of a thread, for vectors that are on their way


class _GateFamily(PlainFamily):
    def of(self, arch: str, experts: int, tokens: int, scores: str, hashed: bool, long_indices: bool) -> KernelSpec:
        """The spec of the kernel for clusters of so many tokens."""
        ctas = CLUSTER_CTAS
        tiles = -(-experts // (MMA_EXPERTS * ctas))
        return self.spec(
            arch,
            tokens=tokens,
            ctas=ctas,
            tiles=tiles,
            per_lane=-(-experts // WARP),
            batch=max(1, _BATCH_REGISTERS // (4 * (tiles + tokens // 8))),
            scores=scores,
            hashed=hashed,
            long_indices=long_indices,
        )

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        return {**super().render_context(spec), "warps": CLUSTER_THREADS // WARP}

    def cluster_ctas(self, spec: KernelSpec) -> int:
        """CTAs of a cluster."""
        return int(spec["ctas"])


MOE_GATE = _GateFamily(
    "moe_gate",
    (
        Field("x", "const uint4*", "BF16 [tokens, width]"),
        Field("weight", "const uint4*", "BF16 [experts, width]"),
        *TOPK_GATE.fields[1:7],
        Field("x_row_stride", "int64_t", "vectors"),
        Field("weight_row_stride", "int64_t", "vectors"),
        Field("vocabulary", "int64_t"),
        Field("vectors", "int32_t", "width / 8"),
        *TOPK_GATE.fields[9:],
    ),
    num_threads=CLUSTER_THREADS,
    describe=lambda spec: (
        f"{spec['scores']} {'hashed ' if spec['hashed'] else ''}experts<={MMA_EXPERTS * spec['ctas'] * spec['tiles']}"
        f" tokens {spec['tokens']} {'int64' if spec['long_indices'] else 'int32'}"
    ),
)


def one_kernel_gates(tokens: int, experts: int) -> bool:
    """Whether the gate of so many tokens is one kernel."""
    return tokens <= MAX_CLUSTER_TOKENS and experts <= MAX_CLUSTER_EXPERTS


def choose_cluster_tokens(tokens: int) -> int:
    """Tokens of a cluster of the gate's one kernel."""
    return CLUSTER_TOKENS[tokens > CLUSTER_TOKENS[0]]


MAP_THREADS = 512
_MAP_ROUNDS = 8  # items of a lane
MAP_ITEMS = MAP_THREADS * _MAP_ROUNDS
"""Choices of experts that one block ranks."""
MAP_PHASES = "one round", "single", "count", "assign"


class _MapFamily(PlainFamily):
    def of(self, arch: str, layout: str, phase: str, long_indices: bool) -> KernelSpec:
        """The spec of the kernel of one of ``MAP_PHASES``."""
        # Few items have a lane each: a third of the code, of which all is fetched first.
        rounds = 1 if phase == "one round" else _MAP_ROUNDS
        name = "single" if phase == "one round" else phase
        return self.spec(arch, layout=layout, phase=name, rounds=rounds, long_indices=long_indices)

    def phases(self, items: int) -> tuple[str, ...]:
        """The kernels, in turn, for so many choices of experts."""
        if items > MAP_ITEMS:
            return "count", "assign"
        return ("one round",) if items <= MAP_THREADS else ("single",)

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        return {**super().render_context(spec), "max_experts": MAX_EXPERTS}


MOE_MAP = _MapFamily(
    "moe_map",
    (
        Field("indices", "const void*", "[items], the experts chosen"),
        Field("weights", "const float*", "[items]; null: none"),
        Field("block_counts", "int32_t*", "[blocks of items, experts]"),
        Field("layout", "int32_t*", "as the grouped GEMM takes it"),
        Field("item_to_row", "int32_t*", "[items]"),
        Field("row_to_item", "int32_t*", "[rows]"),
        Field("row_weights", "float*", "[rows]; null: none"),
        Field("items", "int32_t"),
        Field("rows", "int32_t"),
        Field("rows_per_block", "int32_t"),
        Field("experts", "int32_t"),
        Field("first_expert", "int32_t", "that is here"),
        Field("alignment", "int32_t", "rows"),
        Field("max_m", "int32_t", "rows of an expert in the masked layout"),
    ),
    num_threads=MAP_THREADS,
    describe=lambda spec: (
        f"{spec['layout']} {spec['phase']} of {MAP_THREADS * spec['rounds']}"
        f" {'int64' if spec['long_indices'] else 'int32'}"
    ),
)

EXPAND_THREADS = 256

MOE_PERMUTE = PlainFamily(
    "moe_permute",
    (
        Field("x", "const uint4*", "[tokens, row of vectors]"),
        Field("scales", "const uint32_t*", "[tokens, scales of a row]; null: none"),
        Field("token_to_rows", "const int32_t*", "[tokens, topk], -1: none"),
        Field("row_to_item", "const int32_t*", "[rows], -1: padding"),
        Field("out", "uint4*", "[rows, row of vectors]"),
        Field("out_scales", "uint32_t*", "[planes, scales of a row, rows of a plane]"),
        Field("x_row_stride", "int64_t", "vectors"),
        Field("out_row_stride", "int64_t", "vectors"),
        Field("scales_row_stride", "int64_t", "elements"),
        Field("scales_stride", "int64_t"),
        Field("out_scales_stride", "int64_t", "elements"),
        Field("out_plane_stride", "int64_t"),
        Field("tokens", "int32_t"),
        Field("topk", "int32_t"),
        Field("vectors", "int32_t", "of a row, 16 bytes each"),
        Field("scales_per_row", "int32_t"),
        Field("plane_rows", "int32_t", "rows of a plane of out_scales"),
        Field("num_rows", "int32_t"),
    ),
    num_threads=EXPAND_THREADS,
    describe=lambda spec: "zero padding" if spec["zero_padding"] else "",
)

COMBINE_THREADS = 256


class _CombineFamily(PlainFamily):
    def of(self, arch: str, topk: int) -> KernelSpec:
        """The spec of the kernel for so many rows of a token."""
        # Registers for all rows at once: left to itself the compiler takes few, and loads them in turn.
        return self.spec(arch, topk=topk, blocks_per_sm=4 if topk <= 8 else 2)


MOE_COMBINE = _CombineFamily(
    "moe_combine",
    (
        Field("rows", "const uint4*", "BF16 [rows, width]"),
        Field("token_to_rows", "const int32_t*", "[tokens, topk], -1: none"),
        Field("weights", "const float*", "[tokens, topk]; null: all 1"),
        Field("shared", "const uint4*", "BF16 [tokens, width]; null: none"),
        Field("out", "uint4*", "BF16 [tokens, width]"),
        Field("rows_stride", "int64_t", "vectors"),
        Field("shared_stride", "int64_t", "vectors"),
        Field("vectors", "int32_t", "width / 8"),
        Field("num_rows", "int32_t"),
    ),
    num_threads=COMBINE_THREADS,
    describe=lambda spec: f"topk {spec['topk']}",
)
