"""The GEMMs of one rank of a model, from the ``config.json`` that is published with it.

Layers are cut as vLLM and SGLang do: column-parallel by n, row-parallel by k, key and value heads repeated where there
are more ranks than heads, what all heads share (MLA's first projections, the indexer, the router) whole on each rank.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jitgemm.cache_tools import presets
from jitgemm.cache_tools.console import UsageError
from jitgemm.cache_tools.problems import NamedProblem
from jitgemm.families.gemm import D_SCALE_COLUMNS, FP4, GATE_UP_RUN, SCALE_GROUP, GemmProblem, recipe_traits
from jitgemm.families.grouped import GROUPED_RECIPES, GroupedProblem

BLOCK_FP8 = "fp8_1x128_128x128"
VOCABULARY_STEP = 64
"""The output head's rows are padded to a multiple of it."""
EXPERT_LAYOUTS = ("masked", "contiguous")
"""How frameworks lay out the tokens of experts: mostly so for decoding, and so for prefill."""
IN_BATCHES = "a batched GEMM, which frameworks lay out and quantize in different ways; a shapes file adds it"
FUSED_LAYOUTS = (*EXPERT_LAYOUTS, "psum")
"""The same where SwiGLU is fused: ``moe_permutation`` makes each of them."""


@dataclass(frozen=True)
class Layers:
    """The GEMMs of one rank, and remarks for people: what was left out, what was assumed."""

    problems: list[NamedProblem]
    notes: list[str]


def from_file(path: Path, *, tp: int = 1, ep: int = 1, recipe: str | None = None) -> Layers:
    """The GEMMs of one rank of the model that ``path``, a ``config.json`` or its folder, describes.

    Args:
        path: the file; nothing else is read.
        tp: ranks of tensor parallelism.
        ep: ranks of expert parallelism.
        recipe: of the quantized layers, routed experts too, instead of those that the file tells.

    Raises:
        UsageError: the file can't be read, its architecture is not known, a field is missing, or the model can't be
            cut like that.
    """
    if path.is_dir():
        path = path / "config.json"
    where = f"--model: {path}"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{where}: not JSON; wanted is the config.json of a model") from None
    return derive(config, where, tp=tp, ep=ep, recipe=recipe)


def from_preset(name: str, *, tp: int = 1, ep: int = 1, recipe: str | None = None) -> Layers:
    """The GEMMs of one rank of a model that ships as a preset; see ``from_file``.

    Raises:
        UsageError: there is no such preset, or the model can't be cut like that.
    """
    if name not in presets.names():
        raise UsageError(f"--preset: {name!r} is not a preset; there are: {', '.join(presets.names())}")
    preset = presets.read(name)
    layers = derive(preset["config"], f"--preset: {name}", tp=tp, ep=ep, recipe=recipe)
    if preset["unverified"]:
        layers.notes.append(f"not read from a public config: {', '.join(preset['unverified'])} of {preset['title']}")
    return layers


def derive(config: object, where: str, *, tp: int = 1, ep: int = 1, recipe: str | None = None) -> Layers:
    """``from_file`` for the content of a file; ``where`` begins the messages of errors."""
    if not isinstance(config, Mapping):
        raise UsageError(f"{where}: a {type(config).__name__}; wanted is the JSON object of a model's config.json")
    text = config.get("text_config")  # of a model that takes more than text
    fields = text if isinstance(text, Mapping) else config
    add_layers = _find_architecture(fields, where)
    notes: list[str] = []
    expert_recipe = recipe
    if recipe is None:
        recipe = _recipe(fields.get("quantization_config") or config.get("quantization_config"), notes)
        expert_recipe = _expert_recipe(fields.get("expert_dtype"), recipe, notes)
    rank = _Rank(fields, where, tp, ep, recipe, expert_recipe or recipe, notes=notes)
    add_layers(rank)
    rank.head()
    if ep > 1 and not rank.has_experts:
        raise UsageError(f"{where}: ep is {ep}; the model has no experts, accepted is 1")
    return Layers(rank.problems, rank.notes)


def _find_architecture(fields: Mapping[str, Any], where: str) -> Callable[[_Rank], None]:
    classes, model_type = fields.get("architectures"), fields.get("model_type")
    for name, (class_name, add_layers) in ARCHITECTURES.items():
        if model_type == name or (isinstance(classes, list) and class_name in classes):
            return add_layers
    known = ", ".join(f"{name} ({class_name})" for name, (class_name, _) in ARCHITECTURES.items())
    raise UsageError(
        f"{where}: model_type is {reprlib.repr(model_type)} and architectures is {reprlib.repr(classes)};"
        f" accepted are, there or in text_config: {known}"
    )


def _recipe(quantization: object, notes: list[str]) -> str:
    if not quantization:
        return "bf16"
    if isinstance(quantization, Mapping):
        if quantization.get("quant_method") == "fp8" and quantization.get("weight_block_size") == [SCALE_GROUP] * 2:
            return BLOCK_FP8
        quantization = quantization.get("quant_method")
    notes.append(
        f"quantization_config is {reprlib.repr(quantization)}, not fp8 in blocks of 128 x 128:"
        " layers are taken as bf16; --recipe takes another"
    )
    return "bf16"


def _expert_recipe(dtype: object, recipe: str, notes: list[str]) -> str:
    """The recipe of routed experts, whose weights may have a format of their own, beside that of other layers."""
    if dtype == "fp4":
        return FP4
    if dtype not in (None, "fp8"):
        notes.append(f"expert_dtype is {reprlib.repr(dtype)}, neither fp4 nor fp8: experts are taken as {recipe}")
    return recipe


def _inner_dtype(recipe: str) -> str | None:
    """D's type where SwiGLU and quantization are fused with a GEMM: as the recipe wants the next one's activations.

    None: BF16, where another set of kernels would save less, and scales of whole rows or tensors, which no epilogue
    makes.
    """
    traits = recipe_traits(recipe)
    if traits.a_scales != "row_k":
        return None
    return next(dtype for dtype, columns in D_SCALE_COLUMNS.items() if columns == traits.a_group)


@dataclass
class _Rank:
    """The GEMMs of one rank while they are collected, and the file that they come from."""

    fields: Mapping[str, Any]
    where: str
    tp: int
    ep: int
    recipe: str
    expert_recipe: str
    problems: list[NamedProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    has_experts: bool = False
    has_swiglu: bool = True  # between gate_up and down

    def size(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        """An integer of the file; ``default`` stands in for one that is missing or null."""
        value = self.fields.get(name)
        if value is None:
            value = default
        if value is None:
            raise UsageError(f"{self.where}: {name} is missing; accepted is an integer from {low}")
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
            raise UsageError(f"{self.where}: {name} is {reprlib.repr(value)}; accepted is an integer from {low}")
        return value

    def share(self, size: int, name: str) -> int:
        """One rank's part of something that is cut."""
        if size % self.tp:
            raise UsageError(f"{self.where}: tp is {self.tp}; accepted is what divides {name}, {size}")
        return size // self.tp

    def whole(
        self,
        layer: str,
        n: int,
        k: int,
        recipe: str | None = None,
        d_dtype: str = "bf16",
        epilogue: str | None = None,
    ) -> None:
        """A layer that every rank has, or a rank's part of one."""
        problem = GemmProblem(n, k, recipe or self.recipe, d_dtype=d_dtype, epilogue=epilogue)
        self.problems.append(NamedProblem(layer, problem))

    def column(self, layer: str, n: int, k: int, parts: int = 1) -> None:
        """A layer whose n is cut; it may be ``parts`` layers of that n in one."""
        part = self.share(n, f"n of {layer}")
        self._check_blocks(layer, "n", part)
        self.whole(layer, parts * part, k)

    def row(self, layer: str, n: int, k: int) -> None:
        """A layer whose k is cut."""
        part = self.share(k, f"k of {layer}")
        self._check_blocks(layer, "k", part)
        self.whole(layer, n, part)

    def _check_blocks(self, layer: str, dimension: str, part: int) -> None:
        if self.tp > 1 and self.recipe == BLOCK_FP8 and part % SCALE_GROUP:
            raise UsageError(
                f"{self.where}: tp is {self.tp}, which makes {dimension} of {layer} {part} a rank;"
                f" accepted is a multiple of {SCALE_GROUP}, so that no block of scales is cut"
            )

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.size("hidden_size")

    def mlp(self, name: str, width: int) -> None:
        """A gated MLP."""
        self.column(f"{name}.gate_up", width, self.hidden, parts=2)
        part = self.share(width, f"n of {name}.gate_up")
        if inner := self.fused(name, part, self.recipe):
            self.whole(f"{name}.gate_up_swiglu", 2 * part, self.hidden, d_dtype=inner, epilogue="swiglu")
        self.row(f"{name}.down", self.hidden, width)

    def fused(self, name: str, part: int, recipe: str) -> str | None:
        """D's type where SwiGLU is fused with the GEMM of a rank's part of gate and up, else None."""
        inner = _inner_dtype(recipe) if self.has_swiglu else None
        if inner and part % GATE_UP_RUN:
            because = f"a rank's width is {part}; SwiGLU is fused for multiples of {GATE_UP_RUN}"
            self.left_out(f"{name}.gate_up_swiglu", because)
            return None
        return inner

    def head(self) -> None:
        """The output head: by vocabulary, padded so that ranks have the same."""
        step = VOCABULARY_STEP if VOCABULARY_STEP % self.tp == 0 else VOCABULARY_STEP * self.tp
        vocabulary = -(-self.size("vocab_size") // step) * step
        self.whole("lm_head", vocabulary // self.tp, self.hidden, "bf16", "fp32")

    def left_out(self, what: str, because: str) -> None:
        """Note a layer that is not derived."""
        self.notes.append(f"left out: {what}: {because}")

    def experts(self, count: str, width: int, shared_width: int = 0) -> None:
        """A router, routed experts of a width as grouped GEMMs, and maybe one that all tokens take."""
        self.has_experts = True
        experts = self.size(count)
        if experts % self.ep or (self.tp % self.ep and self.ep % self.tp):
            raise UsageError(
                f"{self.where}: ep is {self.ep}; accepted is what divides {count}, {experts}, and divides tp,"
                f" {self.tp}, or is a multiple of it"
            )
        ranks = max(1, self.tp // self.ep)  # that share an expert
        if width % ranks:
            raise UsageError(f"{self.where}: tp is {self.tp}; {ranks} ranks cannot share experts of width {width}")
        self.whole("router", experts, self.hidden, "bf16", "fp32")
        if shared_width:
            self.mlp("shared_expert", shared_width)
        self._routed_experts(experts, width // ranks, cut=ranks > 1)

    def _routed_experts(self, experts: int, part: int, cut: bool) -> None:
        """Grouped GEMMs of this rank's experts, of which it has a part of their width."""
        groups, hidden, recipe = experts // self.ep, self.hidden, self.expert_recipe
        what = f"routed experts, {groups} of {experts} a rank, {2 * part} x {hidden} and {hidden} x {part}"
        if recipe not in GROUPED_RECIPES:
            self.left_out(what, f"{recipe} grouped GEMM, which has no kernels")
            return
        traits = recipe_traits(recipe)
        if cut and traits.is_fp8 and part % (traits.fp4_group or SCALE_GROUP):
            self.left_out(what, "their width cuts blocks of scales")
            return
        inner = self.fused("experts", part, recipe)

        def add(layer: str, kinds: Sequence[str], n: int, k: int, **more: str) -> None:
            for kind in kinds:
                problem = GroupedProblem(n, k, recipe, groups, kind, **more)  # type: ignore[arg-type]
                self.problems.append(NamedProblem(f"experts.{layer}.{kind}", problem))

        add("gate_up", EXPERT_LAYOUTS, 2 * part, hidden)
        if inner:
            add("gate_up_swiglu", FUSED_LAYOUTS, 2 * part, hidden, d_dtype=inner, epilogue="swiglu")
        add("down", FUSED_LAYOUTS if inner else EXPERT_LAYOUTS, hidden, part)

    def grouped_query_attention(self) -> None:
        """Fused q, k and v by heads, and the output."""
        heads, kv_heads = self.size("num_attention_heads"), self.size("num_key_value_heads")
        head_dim = self.size("head_dim", self.hidden // heads)
        local = self.share(heads, "num_attention_heads")
        if kv_heads % self.tp and self.tp % kv_heads:
            raise UsageError(
                f"{self.where}: tp is {self.tp}; accepted is what divides num_key_value_heads, {kv_heads},"
                " or is a multiple of it"
            )
        local_kv = max(1, kv_heads // self.tp)
        self._check_blocks("attention.qkv", "n", head_dim * local)
        self._check_blocks("attention.qkv", "n", head_dim * local_kv)
        self.whole("attention.qkv", (local + 2 * local_kv) * head_dim, self.hidden)
        self.row("attention.o", self.hidden, heads * head_dim)

    def latent_attention(self) -> None:
        """MLA, with the indexer of sparse attention where the file has one."""
        heads, kv_rank = self.size("num_attention_heads"), self.size("kv_lora_rank")
        nope, rope, value = (self.size(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        local = self.share(heads, "num_attention_heads")
        if self.fields.get("q_lora_rank") is None:
            self.column("attention.q", heads * (nope + rope), self.hidden)
            self.whole("attention.kv_a", kv_rank + rope, self.hidden)
        else:
            q_rank = self.size("q_lora_rank")
            self.whole("attention.qkv_a", q_rank + kv_rank + rope, self.hidden)
            self.column("attention.q_b", heads * (nope + rope), q_rank)
        self.column("attention.kv_b", heads * (nope + value), kv_rank)
        self.row("attention.o", self.hidden, heads * value)
        self.left_out(
            f"kv_b as decoding absorbs it, {local} heads of {nope} x {kv_rank} and {value} x {kv_rank}", IN_BATCHES
        )
        if self.fields.get("index_n_heads") is not None:
            self.indexer()
            self.whole("indexer.k", self.size("index_head_dim"), self.hidden)

    def indexer(self) -> None:
        """What the indexers of sparse attention have in common."""
        heads = self.size("index_n_heads")
        self.whole("indexer.q_b", heads * self.size("index_head_dim"), self.size("q_lora_rank"))
        self.whole("indexer.weights", heads, self.hidden, "bf16", "fp32")


def _dense(rank: _Rank) -> None:
    rank.grouped_query_attention()
    rank.mlp("mlp", rank.size("intermediate_size"))


def _latent_experts(rank: _Rank) -> None:
    rank.latent_attention()
    _deepseek_experts(rank)


def _grouped_query_experts(rank: _Rank) -> None:
    rank.grouped_query_attention()
    _deepseek_experts(rank)


def _deepseek_experts(rank: _Rank) -> None:
    if rank.size("first_k_dense_replace", low=0):
        rank.mlp("mlp", rank.size("intermediate_size"))
    width = rank.size("moe_intermediate_size")
    rank.experts("n_routed_experts", width, width * rank.size("n_shared_experts", 0, low=0))
    if rank.size("num_nextn_predict_layers", 0, low=0):
        rank.whole("mtp.eh", rank.hidden, 2 * rank.hidden, "bf16")


def _deepseek_v4(rank: _Rank) -> None:
    heads, head_dim, q_rank = (rank.size(name) for name in ("num_attention_heads", "head_dim", "q_lora_rank"))
    groups, o_rank = rank.size("o_groups"), rank.size("o_lora_rank")
    rank.whole("attention.qkv_a", q_rank + head_dim, rank.hidden)
    rank.column("attention.q_b", heads * head_dim, q_rank)
    local = rank.share(groups, "o_groups")
    rank.left_out(f"o_a, {local} groups of {o_rank} x {heads * head_dim // groups}", IN_BATCHES)
    rank.row("attention.o_b", rank.hidden, groups * o_rank)
    ratios = rank.fields.get("compress_ratios")
    if not isinstance(ratios, list) or not all(isinstance(ratio, int) for ratio in ratios):
        raise UsageError(f"{rank.where}: compress_ratios is {reprlib.repr(ratios)}; accepted is a list of integers")
    for ratio in sorted({*ratios} - {0}):
        overlap = 2 if ratio == 4 else 1  # windows
        rank.whole(f"compressor.{ratio}", 2 * overlap * head_dim, rank.hidden, "bf16", "fp32")
    if 4 in ratios:
        rank.indexer()
        rank.whole("indexer.compressor", 4 * rank.size("index_head_dim"), rank.hidden, "bf16", "fp32")
    width = rank.size("moe_intermediate_size")
    rank.experts("n_routed_experts", width, width * rank.size("n_shared_experts", 0, low=0))
    if rank.size("num_nextn_predict_layers", 0, low=0):
        rank.whole("mtp.e", rank.hidden, rank.hidden)


def _qwen3_moe(rank: _Rank) -> None:
    rank.grouped_query_attention()
    if rank.fields.get("mlp_only_layers") or rank.size("decoder_sparse_step", 1) > 1:
        rank.mlp("mlp", rank.size("intermediate_size"))
    rank.experts("num_experts", rank.size("moe_intermediate_size"))


def _local_experts(rank: _Rank) -> None:
    rank.grouped_query_attention()
    rank.experts("num_local_experts", rank.size("intermediate_size"))


def _gpt_oss(rank: _Rank) -> None:
    rank.has_swiglu = False  # gate * sigmoid(1.702 gate) * (up + 1), which no epilogue computes
    _local_experts(rank)


def _llama4(rank: _Rank) -> None:
    rank.grouped_query_attention()
    if rank.size("interleave_moe_layer_step", 1) > 1:
        rank.mlp("mlp", rank.size("intermediate_size_mlp"))
    width = rank.size("intermediate_size")
    rank.experts("num_local_experts", width, width)


ARCHITECTURES: dict[str, tuple[str, Callable[[_Rank], None]]] = {
    "deepseek_v3": ("DeepseekV3ForCausalLM", _latent_experts),
    "deepseek_v32": ("DeepseekV32ForCausalLM", _latent_experts),
    "deepseek_v4": ("DeepseekV4ForCausalLM", _deepseek_v4),
    "kimi_k2": ("DeepseekV3ForCausalLM", _latent_experts),
    "glm4_moe": ("Glm4MoeForCausalLM", _grouped_query_experts),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", _latent_experts),
    "qwen3": ("Qwen3ForCausalLM", _dense),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _qwen3_moe),
    "minimax_m2": ("MiniMaxM2ForCausalLM", _local_experts),
    "llama": ("LlamaForCausalLM", _dense),
    "llama4_text": ("Llama4ForCausalLM", _llama4),
    "gpt_oss": ("GptOssForCausalLM", _gpt_oss),
}
"""``model_type`` -> its class in ``architectures``, and what adds its layers."""
