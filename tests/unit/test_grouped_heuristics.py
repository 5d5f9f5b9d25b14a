"""Choices and limits of grouped GEMM."""

from __future__ import annotations

import pytest

from jitgemm.device import H200
from jitgemm.families.gemm import GemmConfig
from jitgemm.families.grouped import GROUPINGS, GroupedProblem
from jitgemm.heuristics.grouped import candidates, choose_config, explain, illegal

LAYERS = [(4096, 7168), (7168, 2048), (4096, 4096), (4096, 2048), (6144, 7168), (7168, 3072)]


def problem_of(n: int, k: int, m: int, kind: str = "masked", d_dtype: str = "bf16") -> GroupedProblem:
    return GroupedProblem(n, k, "fp8_1x128_128x128", 8, kind, m, d_dtype=d_dtype)


@pytest.mark.parametrize(("n", "k"), LAYERS)
def test_tiles_are_as_high_as_groups_are(n: int, k: int) -> None:
    assert choose_config(problem_of(n, k, 1), H200).tile_m == 8
    assert choose_config(problem_of(n, k, 128), H200).tile_m == 128
    config = choose_config(problem_of(n, k, 192), H200)
    assert (config.tile_m, config.tile_n) == (192, 128)
    assert choose_config(problem_of(n, k, 320), H200).tile_m >= 160  # two tiles
    assert choose_config(problem_of(n, k, 1024), H200).tile_m == 256


def test_warpgroups_without_rows_make_a_tile_cheaper() -> None:
    def cost(m: int) -> float:
        listed = explain(problem_of(4096, 7168, m), H200).candidates
        return min(one.cost_us for one in listed if str(one.config) == "192x128x128 s5" and one.cost_us is not None)

    assert cost(256) < cost(320) < cost(384)


@pytest.mark.parametrize("d_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", GROUPINGS)
def test_limits(kind: str, d_dtype: str) -> None:
    problem = problem_of(4096, 4096, 192, kind, d_dtype)

    def reason(text: str) -> str | None:
        return illegal(problem, GemmConfig.from_text(text), H200)

    if kind != "contiguous":  # whose tiles divide the alignment
        assert reason("192x128x128 s4") is None
        assert reason("160x128x128 s4 swap") is None
        assert "more than 128 registers" in str(reason("192x136x128 s4"))
        assert "at most 160" in str(reason("168x128x128 s4 swap"))
    assert reason("128x128x128 s4 swap") is None
    assert reason("256x128x128 s4") is None
    assert "clusters" in str(reason("128x64x128 s4 c2x1"))
    legal = [config for config in candidates(problem) if illegal(problem, config, H200) is None]
    assert len(legal) > 10
