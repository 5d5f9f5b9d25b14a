"""Layers from the config.json of a model, and the presets, which are such configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import Jitgemm

from jitgemm.cache_tools import presets
from jitgemm.cache_tools.console import UsageError
from jitgemm.cache_tools.models import ARCHITECTURES, Layers, derive, from_file, from_preset
from jitgemm.families.gemm import FP4
from jitgemm.families.grouped import GroupedProblem

CONFIGS = Path(__file__).with_name("configs")
BLOCK = "fp8_1x128_128x128"

Shapes = dict[str, tuple[int, int]]


def shapes(layers: Layers) -> Shapes:
    """N and K of dense layers that end with the product."""
    found = {named.layer: named for named in layers.problems}
    assert len(found) == len(layers.problems)
    return {layer: (named.problem.n, named.problem.k) for layer, named in found.items() if named.is_dense}


def fused(layers: Layers) -> dict[str, str]:
    """D's type and the recipe of layers that SwiGLU is fused with; each has the shape of one without it."""
    found = {named.layer: named.problem for named in layers.problems}
    chosen = {layer: problem for layer, problem in found.items() if getattr(problem, "epilogue", None)}
    for layer, problem in chosen.items():
        assert problem.epilogue == "swiglu"
        plain = found[layer.replace("_swiglu", "").replace("psum", "masked")]
        assert (plain.n, plain.k, plain.recipe, plain.epilogue) == (problem.n, problem.k, problem.recipe, None)
    return {layer: f"{problem.recipe} {problem.d_dtype}" for layer, problem in chosen.items()}


def experts(layers: Layers) -> tuple[int, tuple[int, int], tuple[int, int], str]:
    """Experts of a rank, N and K of gate and up and of down, and their recipe; all layouts have the same."""
    grouped = {named.layer: named.problem for named in layers.problems if isinstance(named.problem, GroupedProblem)}
    kinds = ("masked", "contiguous")
    fused_kinds = (*kinds, "psum") if any("swiglu" in layer for layer in grouped) else ()
    wanted = {"gate_up": kinds, "gate_up_swiglu": fused_kinds, "down": fused_kinds or kinds}
    assert list(grouped) == [f"experts.{layer}.{kind}" for layer, its in wanted.items() for kind in its]
    assert all(layer.endswith(problem.kind) for layer, problem in grouped.items())
    found = set()
    for kind in fused_kinds or kinds:
        gate_up = grouped[f"experts.gate_up.{kind}" if kind in kinds else f"experts.gate_up_swiglu.{kind}"]
        down = grouped[f"experts.down.{kind}"]
        assert (down.d_dtype, down.epilogue) == ("bf16", None)
        assert (gate_up.groups, gate_up.recipe) == (down.groups, down.recipe)
        found.add((gate_up.groups, (gate_up.n, gate_up.k), (down.n, down.k), gate_up.recipe))
    (one,) = found
    return one


def recipes(layers: Layers) -> dict[str, str]:
    return {
        named.layer: f"{named.problem.recipe} {named.problem.d_dtype}" for named in layers.problems if named.is_dense
    }


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = presets.read(name)["config"]
    return config


DEEPSEEK_V3 = {
    "attention.qkv_a": (2112, 7168),
    "attention.q_b": (24576, 1536),
    "attention.kv_b": (32768, 512),
    "attention.o": (7168, 16384),
    "mlp.gate_up": (36864, 7168),
    "mlp.down": (7168, 18432),
    "router": (256, 7168),
    "shared_expert.gate_up": (4096, 7168),
    "shared_expert.down": (7168, 2048),
    "mtp.eh": (7168, 14336),
    "lm_head": (129280, 7168),
}


def test_latent_attention_whole() -> None:
    layers = from_preset("deepseek-v3")
    assert shapes(layers) == DEEPSEEK_V3
    full_precision = {"router": "bf16 fp32", "lm_head": "bf16 fp32", "mtp.eh": "bf16 bf16"}
    assert recipes(layers) == {layer: full_precision.get(layer, f"{BLOCK} bf16") for layer in DEEPSEEK_V3}
    assert experts(layers) == (256, (4096, 7168), (7168, 2048), BLOCK)
    (note,) = layers.notes
    assert note.startswith(
        "left out: kv_b as decoding absorbs it, 128 heads of 128 x 512 and 128 x 512: a batched GEMM"
    )


def test_latent_attention_cut() -> None:
    cut = {
        "attention.q_b": (24576 // 16, 1536),
        "attention.kv_b": (32768 // 16, 512),
        "attention.o": (7168, 16384 // 16),
        "mlp.gate_up": (36864 // 16, 7168),
        "mlp.down": (7168, 18432 // 16),
        "shared_expert.gate_up": (4096 // 16, 7168),
        "shared_expert.down": (7168, 128),
        "lm_head": (129280 // 16, 7168),
    }
    layers = from_preset("deepseek-v3", tp=16, ep=32)
    assert shapes(layers) == {**DEEPSEEK_V3, **cut}
    assert experts(layers) == (8, (4096, 7168), (7168, 2048), BLOCK)
    assert experts(from_preset("deepseek-v3", tp=16, ep=8)) == (32, (2048, 7168), (7168, 1024), BLOCK)


@pytest.mark.parametrize(
    ("name", "tp", "ep", "groups", "width", "hidden", "recipe"),
    [
        ("kimi-k2", 16, 16, 24, 2048, 7168, BLOCK),
        ("deepseek-v4-flash", 8, 8, 32, 2048, 4096, FP4),
        ("deepseek-v4-pro", 8, 4, 96, 1536, 7168, FP4),
        ("glm-4.5", 8, 8, 20, 1536, 5120, "bf16"),
        ("glm-4.5-air", 8, 1, 128, 176, 4096, "bf16"),
        ("qwen3-235b-a22b", 4, 2, 64, 768, 4096, "bf16"),
        ("qwen3-30b-a3b", 1, 1, 128, 768, 2048, "bf16"),
        ("minimax-m2", 4, 1, 256, 384, 3072, BLOCK),
        ("llama-4-maverick", 8, 8, 16, 8192, 5120, "bf16"),
        ("gpt-oss-20b", 1, 4, 8, 2880, 2880, "bf16"),
    ],
)
def test_routed_experts(name: str, tp: int, ep: int, groups: int, width: int, hidden: int, recipe: str) -> None:
    assert experts(from_preset(name, tp=tp, ep=ep)) == (groups, (2 * width, hidden), (hidden, width), recipe)


def test_routed_experts_that_no_kernel_serves_are_left_out() -> None:
    layers = from_preset("minimax-m2", tp=8)
    assert shapes(layers)
    assert "left out: routed experts, 256 of 256 a rank, 384 x 3072 and 3072 x 192: their width cuts" in layers.notes[0]
    layers = from_preset("minimax-m2", recipe="fp8_rowwise")
    assert "3072 x 1536: fp8_rowwise grouped GEMM, which has no kernels" in layers.notes[0]
    assert all(named.is_dense for named in layers.problems)


SWIGLU_OF_EXPERTS = [f"experts.gate_up_swiglu.{kind}" for kind in ("masked", "contiguous", "psum")]


def test_layers_that_swiglu_and_quantization_are_fused_with() -> None:
    dense = ["mlp.gate_up_swiglu", "shared_expert.gate_up_swiglu"]
    assert fused(from_preset("deepseek-v3")) == dict.fromkeys(dense + SWIGLU_OF_EXPERTS, f"{BLOCK} e4m3")
    v4 = {"shared_expert.gate_up_swiglu": f"{BLOCK} e4m3", **dict.fromkeys(SWIGLU_OF_EXPERTS, f"{FP4} e4m3")}
    assert fused(from_preset("deepseek-v4-flash", tp=2, ep=4)) == v4
    of_32 = fused(from_preset("deepseek-v3", recipe="fp8_1x32_fp4_1x32"))
    assert of_32 == dict.fromkeys(dense + SWIGLU_OF_EXPERTS, "fp8_1x32_fp4_1x32 e4m3_ue8m0")
    for name, recipe in (("glm-4.5", None), ("qwen3-32b", "fp8_rowwise"), ("gpt-oss-20b", BLOCK)):
        assert fused(from_preset(name, recipe=recipe)) == {}  # not quantized; by rows; another activation


def test_widths_that_swiglu_cannot_be_fused_with() -> None:
    config = {**config_of("deepseek-v3"), "moe_intermediate_size": 1028}
    layers = derive(config, "x", ep=8)
    assert list(fused(layers)) == ["mlp.gate_up_swiglu"]
    assert experts(layers)[1] == (2056, 7168)
    told = "a rank's width is 1028; SwiGLU is fused for multiples of 8"
    assert [note for note in layers.notes if "swiglu" in note] == [
        f"left out: {name}.gate_up_swiglu: {told}" for name in ("shared_expert", "experts")
    ]


def test_the_weights_of_experts_may_have_a_format_of_their_own() -> None:
    config = config_of("deepseek-v4-flash")
    for dtype, recipe in (("fp4", FP4), ("fp8", BLOCK), (None, BLOCK)):
        layers = derive({**config, "expert_dtype": dtype}, "x")
        assert experts(layers)[-1] == recipe
        assert recipes(layers)["shared_expert.down"] == f"{BLOCK} bf16"
    layers = derive({**config, "expert_dtype": "int4"}, "x")
    assert experts(layers)[-1] == BLOCK
    assert layers.notes[0] == f"expert_dtype is 'int4', neither fp4 nor fp8: experts are taken as {BLOCK}"
    assert experts(from_preset("deepseek-v4-flash", recipe=BLOCK))[-1] == BLOCK
    # A cut by 32 leaves the scales of MXFP4 whole, but not blocks of 128.
    narrow = {**config, "moe_intermediate_size": 256, "n_shared_experts": 0}
    assert experts(derive(narrow, "x", tp=8))[1:] == ((64, 4096), (4096, 32), FP4)
    notes = derive({**narrow, "expert_dtype": "fp8"}, "x", tp=8).notes
    assert any("their width cuts blocks of scales" in note for note in notes)


def test_sparse_attention_adds_an_indexer() -> None:
    found = shapes(from_preset("deepseek-v3.2", tp=8))
    plain = shapes(from_preset("deepseek-v3", tp=8))
    extra = {"indexer.q_b": (8192, 1536), "indexer.k": (128, 7168), "indexer.weights": (64, 7168)}
    assert found == {**plain, **extra}  # whole on each rank
    assert shapes(from_preset("glm-5"))["attention.q_b"] == (64 * 256, 2048)
    assert shapes(from_preset("glm-5"))["attention.kv_b"] == (64 * 448, 512)


def test_deepseek_v4() -> None:
    layers = from_preset("deepseek-v4-flash", tp=4)
    assert shapes(layers) == {
        "attention.qkv_a": (1536, 4096),
        "attention.q_b": (8192, 1024),
        "attention.o_b": (4096, 2048),
        "compressor.4": (2048, 4096),
        "compressor.128": (1024, 4096),
        "indexer.q_b": (8192, 1024),
        "indexer.weights": (64, 4096),
        "indexer.compressor": (512, 4096),
        "router": (256, 4096),
        "shared_expert.gate_up": (1024, 4096),
        "shared_expert.down": (4096, 512),
        "mtp.e": (4096, 4096),
        "lm_head": (32320, 4096),
    }
    assert "o_a, 2 groups of 1024 x 4096" in layers.notes[0]


def test_grouped_query_attention_repeats_key_and_value_heads() -> None:
    whole = {"attention.qkv": (6144, 4096), "attention.o": (4096, 4096)}
    mlp = {"mlp.gate_up": (28672, 4096), "mlp.down": (4096, 14336)}
    assert shapes(from_preset("llama-3-8b")) == {**whole, **mlp, "lm_head": (128256, 4096)}
    for tp, heads in ((2, 16 + 8), (8, 4 + 2), (16, 2 + 2), (32, 1 + 2)):
        found = shapes(from_preset("llama-3-8b", tp=tp))
        assert found["attention.qkv"] == (heads * 128, 4096)
        assert found["attention.o"] == (4096, 4096 // tp)


@pytest.mark.parametrize(("tp", "rows"), [(1, 128), (2, 64), (4, 32), (3, 64), (6, 64)])
def test_the_head_is_padded_so_that_ranks_have_the_same(tp: int, rows: int) -> None:
    config = {**config_of("llama-3-8b"), "num_attention_heads": 24, "num_key_value_heads": 24, "hidden_size": 3072}
    assert shapes(derive({**config, "vocab_size": 100, "intermediate_size": 768}, "x", tp=tp))["lm_head"][0] == rows


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama-4-maverick",
            {
                "attention.qkv": (56 * 128, 5120),
                "attention.o": (5120, 5120),
                "mlp.gate_up": (32768, 5120),
                "mlp.down": (5120, 16384),
                "router": (128, 5120),
                "shared_expert.gate_up": (16384, 5120),
                "shared_expert.down": (5120, 8192),
                "lm_head": (202048, 5120),
            },
        ),
        (
            "gpt-oss-120b",
            {
                "attention.qkv": (5120, 2880),
                "attention.o": (2880, 4096),
                "router": (128, 2880),
                "lm_head": (201088, 2880),
            },
        ),
        (
            "minimax-m2",
            {
                "attention.qkv": (8192, 3072),
                "attention.o": (3072, 6144),
                "router": (256, 3072),
                "lm_head": (200064, 3072),
            },
        ),
        (
            "qwen3-235b-a22b",
            {
                "attention.qkv": (9216, 4096),
                "attention.o": (4096, 8192),
                "router": (128, 4096),
                "lm_head": (151936, 4096),
            },
        ),
        (
            "qwen3-32b",
            {
                "attention.qkv": (10240, 5120),
                "attention.o": (5120, 8192),
                "mlp.gate_up": (51200, 5120),
                "mlp.down": (5120, 25600),
                "lm_head": (151936, 5120),
            },
        ),
        (
            "glm-4.5",
            {
                "attention.qkv": (14336, 5120),
                "attention.o": (5120, 12288),
                "mlp.gate_up": (24576, 5120),
                "mlp.down": (5120, 12288),
                "router": (160, 5120),
                "shared_expert.gate_up": (3072, 5120),
                "shared_expert.down": (5120, 1536),
                "mtp.eh": (5120, 10240),
                "lm_head": (151552, 5120),
            },
        ),
    ],
)
def test_other_models(name: str, expected: Shapes) -> None:
    assert shapes(from_preset(name)) == expected


def test_the_recipe_follows_from_the_config_or_is_given() -> None:
    config = config_of("qwen3-8b")
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    assert set(recipes(derive(config, "x")).values()) == {"bf16 bf16", "bf16 fp32"}
    assert recipes(derive({**config, "quantization_config": fp8}, "x"))["mlp.down"] == f"{BLOCK} bf16"
    for other in ({"quant_method": "mxfp4"}, {**fp8, "weight_block_size": [64, 64]}, {"quant_method": "fp8"}, "odd"):
        layers = derive({**config, "quantization_config": other}, "x")
        assert recipes(layers)["mlp.down"] == "bf16 bf16"
        assert "not fp8 in blocks of 128 x 128" in layers.notes[0]
    layers = derive({**config, "quantization_config": {"quant_method": "mxfp4"}}, "x", recipe="fp8_rowwise")
    assert (recipes(layers)["mlp.down"], recipes(layers)["lm_head"]) == ("fp8_rowwise bf16", "bf16 fp32")
    assert layers.notes == []


@pytest.mark.parametrize("name", presets.names())
def test_presets_say_where_their_values_come_from(name: str) -> None:
    preset = presets.read(name)
    assert set(preset) == {"name", "title", "source", "unverified", "config"}
    assert preset["name"] == name
    assert preset["title"]
    assert preset["source"]
    assert set(preset["unverified"]) <= set(preset["config"])
    layers = from_preset(name, tp=2)
    assert len(layers.problems) >= 4
    told = [note for note in layers.notes if note.startswith("not read from a public config: ")]
    assert len(told) == bool(preset["unverified"])


def test_every_architecture_has_a_preset() -> None:
    assert {config_of(name)["model_type"] for name in presets.names()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.json"))])
def test_published_files(name: str) -> None:
    """Files as they are published, with much that does not matter, give what the presets of these models do."""
    path = CONFIGS / f"{name}.json"
    assert shapes(from_file(path, tp=2)) == shapes(from_preset(name, tp=2))
    assert recipes(from_file(path)) == recipes(from_preset(name))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mamba"}, ["model_type is 'mamba'", "deepseek_v3 (DeepseekV3ForCausalLM)", "gpt_oss"]),
        ({"model_type": None, "architectures": ["X" * 1000]}, ["architectures is ['XXX", "accepted are"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"hidden_size": "4096"}, ["hidden_size is '4096'; accepted is an integer from 1"]),
        ({"vocab_size": 0}, ["vocab_size is 0"]),
        ({"num_key_value_heads": True}, ["num_key_value_heads is True"]),
        ({"intermediate_size": 2**40}, ["intermediate_size is 1099511627776"]),
    ],
)
def test_fields_that_do_not_serve(change: dict[str, object], said: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        derive({**config_of("llama-3-8b"), **change}, "here")
    message = str(caught.value)
    assert message.startswith("here: ")
    assert all(part in message for part in said), message
    assert len(message) < 700


@pytest.mark.parametrize(
    ("name", "tp", "ep", "said"),
    [
        ("llama-3-8b", 3, 1, "tp is 3; accepted is what divides num_attention_heads, 32"),
        ("llama-4-scout", 5, 1, "tp is 5; accepted is what divides num_key_value_heads, 8, or is a multiple of it"),
        ("llama-3-8b", 1, 2, "ep is 2; the model has no experts"),
        ("deepseek-v3", 1, 7, "ep is 7; accepted is what divides n_routed_experts, 256"),
        ("deepseek-v3", 4, 6, "ep is 6"),
        ("deepseek-v3", 32, 32, "tp is 32, which makes n of mlp.gate_up 576 a rank; accepted is a multiple of 128"),
        ("deepseek-v4-flash", 16, 1, "tp is 16; accepted is what divides o_groups, 8"),
        ("glm-4.5-air", 32, 1, None),
    ],
)
def test_cuts_that_do_not_work(name: str, tp: int, ep: int, said: str | None) -> None:
    if said is None:  # in bf16 there are no blocks that a cut could break
        from_preset(name, tp=tp, ep=ep)
        return
    with pytest.raises(UsageError) as caught:
        from_preset(name, tp=tp, ep=ep)
    assert said in str(caught.value)


def test_the_command_derives_layers_from_a_file_or_its_folder(jitgemm: Jitgemm, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("minimax-m2")))
    arguments = ("--tp", 8, "--ep", 4, "--device", "h200", "--dry-run")
    text = jitgemm("prewarm", "--model", tmp_path, *arguments).stdout
    assert "attention.qkv  " in text
    assert "experts.down.masked  " in text
    assert "64 groups contiguous, fp8_1x128_128x128" in text
    assert "note:" not in text
    report = jitgemm.json("prewarm", "--model", tmp_path / "config.json", *arguments)
    assert report["needed"] > 0
    assert report["notes"] == []
    assert jitgemm.json("prewarm", "--preset", "minimax-m2", *arguments)["kernels"] == report["kernels"]
    given = jitgemm.json("prewarm", "--model", tmp_path, "--recipe", "fp8_rowwise", *arguments)
    assert any("fp8_rowwise" in kernel["config"] for kernel in given["kernels"])


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"[]", None])
def test_files_that_are_no_config(jitgemm: Jitgemm, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    done = jitgemm("prewarm", "--model", tmp_path, code=2)
    assert done.stderr.startswith(f"jitgemm: --model: {path}: ")
    assert done.stderr.count("\n") == 1
