"""The kernels around the experts' GEMMs: choose experts, give each choice a row, copy rows there, combine."""

from __future__ import annotations

from jitgemm.families.base import KernelSpec
from jitgemm.families.plain import Field, PlainFamily

WARP = 32  # threads
VECTOR = 8  # BF16 of one load
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
        threads = self.num_threads(spec)
        # Few registers, so that a block finds room beside those of the kernel ahead, but enough for a lane's experts.
        many = spec["per_lane"] > 12
        at_once = (1024 if many else 1536) if spec["by_block"] else (512 if many else 1024)  # threads
        return {**super().render_context(spec), "threads": threads, "blocks_per_sm": at_once // threads}


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
        Field("part_stride", "int64_t", "elements between parts of a logit"),
        Field("vocabulary", "int64_t"),
        Field("parts", "int32_t", "of a logit; of several the kernel ahead has waited for all else"),
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


LOGITS_EXPERTS = 32  # of a block
_LOGITS_WARPS = 8
MMA_TOKENS = 8  # columns of an MMA
MAX_FEW_TOKENS = 64
"""Tokens whose logits have a kernel of their own; more keep a GEMM busy."""
TOKEN_TILES = 1, 2, 4, 8
_WARP_TILES = 4  # of tokens, that a warp has registers for
PIECE = 4  # vectors of K that a warp loads of each row at once
_BATCH_REGISTERS = 80  # of a thread, for vectors on their way; the kernel behind needs its share
_PITCH = LOGITS_EXPERTS + 4  # floats
_LEAST_PIECES = 2  # of a warp in a part


class _LogitsFamily(PlainFamily):
    def of(self, arch: str, token_tiles: int) -> KernelSpec:
        """The spec of the kernel for up to so many times 8 tokens."""
        mine = min(token_tiles, _WARP_TILES)
        batch = _BATCH_REGISTERS // (4 * (LOGITS_EXPERTS // MMA_TOKENS + mine))
        return self.spec(arch, token_tiles=mine, warps_t=token_tiles // mine, batch=batch)

    def render_context(self, spec: KernelSpec) -> dict[str, object]:
        made = {"warps_k": self.warps_k(spec), "experts": LOGITS_EXPERTS, "pitch": _PITCH}
        return {**super().render_context(spec), **made}

    def warps_k(self, spec: KernelSpec) -> int:
        """Warps that take turns with K."""
        return _LOGITS_WARPS // int(spec["warps_t"])

    def smem_bytes(self, spec: KernelSpec) -> int:
        """The sums of all warps that share tokens."""
        return 4 * _PITCH * self.warps_k(spec) * _tokens_of(spec)


def _tokens_of(spec: KernelSpec) -> int:
    return int(MMA_TOKENS * spec["token_tiles"] * spec["warps_t"])


GATE_LOGITS = _LogitsFamily(
    "gate_logits",
    (
        Field("x", "const uint4*", "BF16 [tokens, width]"),
        Field("weight", "const uint4*", "BF16 [experts, width]"),
        Field("logits", "float*", "[parts, tokens, experts]"),
        Field("x_row_stride", "int64_t", "vectors"),
        Field("weight_row_stride", "int64_t", "vectors"),
        Field("vectors", "int32_t", "width / 8"),
        Field("pieces_per_part", "int32_t", "of 4 vectors"),
        Field("longer_parts", "int32_t", "the first ones, which have a piece more"),
        Field("tokens", "int32_t"),
        Field("experts", "int32_t"),
    ),
    num_threads=WARP * _LOGITS_WARPS,
    describe=lambda spec: f"tokens<={_tokens_of(spec)}",
)


def choose_token_tiles(tokens: int) -> int:
    """Columns of MMAs for so many tokens."""
    return next(tiles for tiles in TOKEN_TILES if tokens <= MMA_TOKENS * tiles)


def choose_parts(experts: int, pieces: int, warps_k: int, num_sms: int) -> int:
    """Parts of K that fill the multiprocessors, but leave each warp enough of it."""
    blocks = -(-experts // LOGITS_EXPERTS)
    return max(1, min(num_sms // blocks, -(-pieces // (_LEAST_PIECES * warps_k))))


MAP_THREADS = 512
_FEW_ROUNDS = 1, 2  # items of a lane where one kernel does everything
_MANY_ROUNDS = 8  # where each of a round's blocks would add up the counts of too many others
_MAP_BLOCKS = 128  # of a round
MAP_KERNELS = (
    *(("single", rounds) for rounds in _FEW_ROUNDS),
    *((phase, rounds) for rounds in (1, _MANY_ROUNDS) for phase in ("count", "assign")),
)


class _MapFamily(PlainFamily):
    def of(self, arch: str, layout: str, phase: str, rounds: int, long_indices: bool) -> KernelSpec:
        """The spec of the kernel of one of ``MAP_KERNELS``."""
        return self.spec(arch, layout=layout, phase=phase, rounds=rounds, long_indices=long_indices)

    def phases(self, items: int) -> tuple[tuple[str, ...], int]:
        """The kernels, in turn, for so many choices of experts, and their rounds."""
        for rounds in _FEW_ROUNDS:
            if items <= MAP_THREADS * rounds:
                return ("single",), rounds
        return ("count", "assign"), 1 if items <= MAP_THREADS * _MAP_BLOCKS else _MANY_ROUNDS

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
