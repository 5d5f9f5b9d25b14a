"""Choice of configs: always legal, always from the enumerated set, and open to overrides."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_gemm_problem import kinds

from jitgemm import settings
from jitgemm.device import H20, H100, H200, PRESETS, Device, nearest_preset, presets_of
from jitgemm.errors import ConfigError, SettingsError
from jitgemm.families.gemm import FAMILY, RECIPES, GemmConfig, GemmProblem
from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES
from jitgemm.heuristics import choose_config, chooser, enumerate_configs, enumerate_specs, explain, gemm, sm90a
from jitgemm.heuristics.gemm import MAX_KERNELS, assess, candidates, illegal, predict, predict_all
from jitgemm.heuristics.serving import ANCHORS

PROBLEM = GemmProblem(4096, 7168, "fp8_1x128_128x128", m=300)
DEVICES = st.sampled_from(sorted(PRESETS.values(), key=lambda device: device.name))
SIZES = st.one_of(st.integers(1, 300), st.integers(1, 140_000), st.sampled_from((128, 576, 2112, 7168, 129280)))
MS = st.one_of(st.integers(1, 300), st.integers(1, 2**20), st.sampled_from(ANCHORS))


@pytest.fixture(autouse=True)
def no_settings(cache_dir: object) -> Iterator[None]:
    """No variable of the environment is in force."""
    yield


@st.composite
def asked(draw: st.DrawFn) -> tuple[GemmProblem, Device]:
    problem = GemmProblem(n=draw(SIZES), k=draw(SIZES), m=None, **draw(kinds()))
    device = draw(DEVICES)
    limit = draw(st.one_of(st.none(), st.integers(1, 160)))
    return problem, device if limit is None else device.with_num_sms(limit)


# -- Properties.


@given(asked(), MS)
@hypothesis_settings(deadline=None, max_examples=60)
def test_many_predictions_at_once_are_those_of_each(asked: tuple[GemmProblem, Device], m: int) -> None:
    problem, device = asked
    legal = [config for config in candidates(problem, ()) if illegal(problem, config, device) is None]
    (row,) = predict_all(problem, legal, device, [m])
    assert row == pytest.approx([predict(problem.with_m(m), c, device)["total"] for c in legal], rel=1e-9, abs=1e-6)


@given(asked(), st.lists(MS, min_size=1, max_size=8))
@hypothesis_settings(deadline=None, max_examples=80)
def test_every_choice_is_legal_and_enumerated(asked: tuple[GemmProblem, Device], ms: list[int]) -> None:
    problem, device = asked
    enumerated = enumerate_configs(problem, device)
    assert enumerated == tuple(sorted(set(enumerated)))
    assert 0 < len(enumerated) <= MAX_KERNELS == 12
    specs = {FAMILY.spec(problem, config, device.arch.name) for config in enumerated}
    assert specs <= set(enumerate_specs(problem, device))
    for config in enumerated:
        assert illegal(problem, config, device) is None
    for m in [*ms, 1, 2**20]:
        config = choose_config(problem.with_m(m), device)
        assert config in enumerated
        assert config == choose_config(problem.with_m(m), device)


@given(asked(), MS)
@hypothesis_settings(deadline=None, max_examples=80)
def test_predictions_are_positive_and_finite(asked: tuple[GemmProblem, Device], m: int) -> None:
    problem, device = asked[0].with_m(m), asked[1]
    for config in candidates(problem, ()):
        if illegal(problem, config, device) is None:
            terms = predict(problem, config, device)
            assert all(math.isfinite(term) and term >= 0 for term in terms.values()), (config, terms)
            assert terms["total"] > 0


@pytest.mark.parametrize("device", PRESETS)
def test_every_m_of_a_layer(device: str) -> None:
    problem = GemmProblem(576, 7168, "fp8_1x128_128x128")
    enumerated = set(enumerate_configs(problem, PRESETS[device]))
    chosen = {choose_config(problem.with_m(m), PRESETS[device]) for m in [*range(1, 600), *range(600, 9000, 37)]}
    assert chosen <= enumerated


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("device", PRESETS)
def test_a_layer_needs_few_kernels(device: str, recipe: str) -> None:
    """The limit that prewarm promises, where it binds (576 columns) and where it does not."""
    for n, k in ((576, 7168), (7168, 16384), (2880, 2880)):
        problem = GemmProblem(n, k, recipe)
        unlimited = enumerate_configs(problem, PRESETS[device], limit=len(ANCHORS))
        limited = enumerate_configs(problem, PRESETS[device])
        assert len(limited) == min(MAX_KERNELS, len(unlimited))
        assert set(limited) <= set(unlimited)


def test_a_lower_limit_is_kept_for_every_m() -> None:
    problem = GemmProblem(576, 7168, "bf16")
    few = enumerate_configs(problem, H200, limit=3)
    assert len(few) == 3
    assert {choose_config(problem.with_m(m), H200, limit=3) for m in (1, 7, 100, 777, 5000, 20000)} <= set(few)


def test_the_table_of_a_problem_gives_what_each_m_gets() -> None:
    problem = GemmProblem(2112, 7168, "fp8_1x128_128x128")
    table = chooser(problem, H200)
    assert chooser(problem.with_m(7), H200) is table
    for m in (1, 2, 50, 64, 65, 700, 700, 100_000):
        assert table(m) == choose_config(problem.with_m(m), H200)
        assert table(m) in enumerate_configs(problem, H200)
    with settings.override(tile_m=64, swap_ab=False):
        assert chooser(problem, H200) is not table


def test_enumeration_does_not_depend_on_m() -> None:
    assert enumerate_configs(PROBLEM, H200) == enumerate_configs(PROBLEM.without_m(), H200)


@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "fp8_1x128_1x128", "fp8_rowwise", "bf16"])
def test_specs_include_the_transform_where_scales_go_through_the_ring(recipe: str) -> None:
    problem = GemmProblem(576, 7168, recipe)
    specs = enumerate_specs(problem, H200)
    assert len(set(specs)) == len(specs)
    assert (TRANSPOSE_SCALES.spec("sm_90a") in specs) == recipe.startswith("fp8_1x128")
    assert len(specs) == len(enumerate_configs(problem, H200)) + recipe.startswith("fp8_1x128")


# -- The batch-invariant mode.


@given(asked(), st.lists(MS, min_size=1, max_size=6))
@hypothesis_settings(deadline=None, max_examples=40)
def test_batch_invariant_choices_share_one_split(asked: tuple[GemmProblem, Device], ms: list[int]) -> None:
    problem, device = asked
    with settings.override(batch_invariant=True):
        enumerated = enumerate_configs(problem, device)
        chosen = {choose_config(problem.with_m(m), device) for m in [*ms, 1, 2**20]}
        assert explain(problem.with_m(ms[0]), device).winner in enumerated
    assert len({config.split_k for config in enumerated}) == 1
    assert chosen <= set(enumerated)
    assert len(enumerated) <= MAX_KERNELS
    assert all(illegal(problem, config, device) is None for config in enumerated)


def test_the_split_serves_all_m() -> None:
    """Few columns and a long K want a split for few rows, and large tiles with that split for many."""
    problem = GemmProblem(256, 7168, "bf16")
    with settings.override(batch_invariant=True):
        few, many = (choose_config(problem.with_m(m), H200) for m in (1, 8192))
        assert few.split_k == many.split_k > 1
        assert many.tile_m * many.tile_n >= 8 * few.tile_m * few.tile_n
        with settings.override(split_k=8):
            assert {config.split_k for config in enumerate_configs(problem, H200)} == {8}
        assert choose_config(GemmProblem(24576, 1536, "bf16", m=64), H200).split_k == 1
    assert choose_config(problem.with_m(8192), H200).split_k == 1


# -- Explanations.


@pytest.mark.parametrize("device", [H200, H100, H20], ids=lambda device: device.name)
@pytest.mark.parametrize("m", [1, 100, 4096])
def test_explanations_list_costs_or_reasons(m: int, device: Device) -> None:
    problem = PROBLEM.with_m(m)
    explanation = explain(problem, device)
    assert explanation.winner == choose_config(problem, device)
    configs = [candidate.config for candidate in explanation.candidates]
    assert len(set(configs)) == len(configs)
    winner = next(candidate for candidate in explanation.candidates if candidate.config == explanation.winner)
    assert winner.reason is None
    for candidate in explanation.candidates:
        assert (candidate.cost_us is None) == (candidate.reason is not None)
        if candidate.cost_us is None:
            assert candidate.reason == illegal(problem, candidate.config, device)
            assert len(str(candidate.reason)) > 10
        else:
            assert candidate == assess(problem, candidate.config, device)
            assert (candidate.terms or {})["total"] == candidate.cost_us > 0
    assert any(candidate.reason for candidate in explanation.candidates)


# -- Overrides.

# override, and what the configs then have
FORCED: list[dict[str, Any]] = [
    {"tile_m": 128},
    {"tile_n": 64},
    {"tile_m": 64, "tile_n": 32},
    {"tile_k": 128},
    {"stages": 3},
    {"cluster": (2, 1)},
    {"cluster": (1, 2)},
    {"cluster": (1, 1)},
    {"split_k": 1},
    {"split_k": 4},
    {"swap_ab": True},
    {"swap_ab": False},
    {"tile_m": 16, "tile_n": 128, "swap_ab": True, "split_k": 2, "stages": 4},
    {"config": "64x56x128 s7 c1x2"},
    {"config": "16x64x128 s9 k4 swap", "split_k": 4},
]


def meets(config: Any, forced: dict[str, Any]) -> bool:
    have = {**config.to_dict(), "cluster": (config.cluster_m, config.cluster_n), "config": str(config)}
    return all(have[name] == value for name, value in forced.items())


@pytest.mark.parametrize("forced", FORCED, ids=str)
def test_overrides_narrow_the_choice(forced: dict[str, Any]) -> None:
    with settings.override(**forced):
        config = choose_config(PROBLEM, H200)
        assert meets(config, forced)
        assert illegal(PROBLEM, config, H200) is None
        assert config in enumerate_configs(PROBLEM, H200)
        assert all(meets(enumerated, forced) for enumerated in enumerate_configs(PROBLEM, H200))
    assert choose_config(PROBLEM, H200) == explain(PROBLEM, H200).winner


def test_overrides_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TILE_M": "128", "TILE_N": "64", "CLUSTER": "2x1", "SWAP_AB": "0"}.items():
        monkeypatch.setenv(f"JITGEMM_{name}", value)
    settings.reload()
    assert meets(choose_config(PROBLEM, H200), {"tile_m": 128, "tile_n": 64, "cluster": (2, 1), "swap_ab": False})
    with settings.override(cluster=None):
        assert meets(choose_config(PROBLEM, H200), {"tile_m": 128, "tile_n": 64, "swap_ab": False})


@pytest.mark.parametrize(
    ("forced", "named"),
    [
        ({"tile_k": 64}, "tile_k must be 128"),
        ({"tile_m": 100, "swap_ab": False}, "tile_m must be 64, 128, 192 or 256"),
        ({"tile_n": 100, "swap_ab": True}, "tile_n must be 64, 128, 192 or 256"),
        ({"tile_n": 12, "swap_ab": False}, "tile_n must be a multiple of 8 from 8 to 256"),
        ({"tile_m": 264, "swap_ab": True}, "tile_m must be a multiple of 8 from 8 to 256"),
        ({"tile_m": 256, "tile_n": 256, "swap_ab": False}, "registers a thread"),
        ({"cluster": (2, 2)}, "a multicast cluster has at most 2 CTAs"),
        ({"cluster": (4, 1)}, "a multicast cluster has at most 2 CTAs"),
        ({"cluster": (2, 1), "split_k": 2}, "shares operands or splits K, not both"),
        ({"split_k": 9}, "split_k must be one of 1, 2, 3, 4, 5, 6, 7, 8"),
        ({"tile_n": 24, "cluster": (2, 1), "swap_ab": False}, "equal multiples of 8 rows"),
        ({"stages": 60}, "shared memory exceeds 232448 bytes"),
        ({"stages": 1}, "fewer than 2 stages"),
        ({"config": "256x256x128 s3"}, "registers a thread"),
        ({"config": "64x64x128 s3", "stages": 4}, "they contradict each other"),
    ],
    ids=str,
)
def test_overrides_that_nothing_meets_name_the_limit(forced: dict[str, Any], named: str) -> None:
    with settings.override(**forced):
        with pytest.raises(ConfigError, match=named) as caught:
            choose_config(PROBLEM, H200)
        for name in forced:
            assert f"JITGEMM_{name.upper()}=" in str(caught.value)
        with pytest.raises(ConfigError, match=named):
            enumerate_configs(PROBLEM, H200)
        with pytest.raises(ConfigError, match=named):
            explain(PROBLEM, H200)


def test_split_k_beyond_k_is_an_error() -> None:
    with settings.override(split_k=8), pytest.raises(ConfigError, match="split_k exceeds the stages of K"):
        choose_config(GemmProblem(512, 512, "fp8_rowwise", m=16), H200)


def test_settings_in_the_messages_can_be_set() -> None:
    """What a message names is the text that the variable takes."""
    with settings.override(cluster=(2, 2), swap_ab=True), pytest.raises(ConfigError) as caught:
        choose_config(PROBLEM, H200)
    named = str(caught.value).partition("with ")[2].partition(":")[0].split(", JITGEMM_")
    for text in named:
        name, _, value = text.removeprefix("JITGEMM_").partition("=")
        with settings.override(**{name.lower(): value}):
            pass


def test_unknown_overrides() -> None:
    with pytest.raises(SettingsError, match="tile_q"), settings.override(tile_q=3):
        pass


# -- Devices.


def test_presets() -> None:
    assert set(PRESETS) == {"h200", "h100", "h20"}
    assert presets_of("sm_90a") == tuple(PRESETS.values())
    assert presets_of("sm_80") == ()
    assert H200.with_num_sms(64).num_sms == 64


@pytest.mark.parametrize(
    ("name", "sms", "preset"),
    [
        ("NVIDIA H200", 132, "h200"),
        ("NVIDIA H100 80GB HBM3", 132, "h100"),
        ("NVIDIA H100 PCIe", 114, "h100"),
        ("NVIDIA H20", 78, "h20"),
        ("NVIDIA H20-3e", 78, "h20"),
        ("NVIDIA GH200 480GB", 132, "h200"),
        ("Graphics Device", 80, "h20"),
    ],
)
def test_gpus_get_their_preset(name: str, sms: int, preset: str) -> None:
    assert nearest_preset("sm_90a", name, sms).name == preset


@pytest.mark.parametrize("recipe", ["fp8_1x128_128x128", "bf16"])
def test_corrections_multiply_predictions(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = GemmProblem(4096, 7168, recipe, m=64)
    corrections = dict(gemm.corrections(problem.without_sizes()))
    assert 0.8 < min(corrections.values()) < 1 < max(corrections.values()) < 1.2
    config, correction = max(corrections.items(), key=lambda item: item[1])
    us = predict(problem, config, H200)["total"]
    name = "FP8_MENU" if problem.promotes else "BF16_MENU"
    caches = [function for function in vars(gemm).values() if hasattr(function, "cache_clear")]
    try:
        monkeypatch.setattr(sm90a, name, re.sub(r" \*[0-9.]+", "", getattr(sm90a, name)))
        for function in caches:
            function.cache_clear()
        assert predict(problem, config, H200)["total"] == pytest.approx(us / correction)
    finally:
        monkeypatch.undo()
        for function in caches:
            function.cache_clear()


def test_no_rows_get_the_config_of_one() -> None:
    assert choose_config(PROBLEM.with_m(0), H200) == choose_config(PROBLEM.with_m(1), H200)


@pytest.mark.parametrize(
    ("problem", "config"),
    [
        (GemmProblem(192, 3584, "bf16", m=64, layout="tn", d_dtype="fp32"), "64x192x64 s6 k2"),
        (GemmProblem(4096, 7168, "fp8_rowwise", m=64), "192x128x128 s5 k8"),
        (GemmProblem(4096, 7168, "fp8_1x128_128x128", m=64), "128x192x128 s5 k2"),
    ],
)
def test_kernels_that_would_spill_are_not_legal(problem: GemmProblem, config: str) -> None:
    assert "beside split-K" in (illegal(problem, GemmConfig.from_text(config), H200) or "")
