"""Timing and tuning on a real GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import jitgemm
from jitgemm import settings, tuning
from jitgemm.cache_tools import cli
from jitgemm.families.gemm import FP4, RECIPES, GemmProblem
from jitgemm.heuristics import choose_config, enumerate_configs, tuned
from jitgemm.plan import device_facts
from jitgemm.timing import CudaTimer
from jitgemm.tuning import GpuMeasure, Workload

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PROBLEM = GemmProblem(576, 1024, "fp8_1x128_128x128")


@pytest.fixture
def own_cache(tmp_path: Path) -> Iterator[Path]:
    """A cache, and so a user's table, of this test's own."""
    tuned.forget()
    tuning._tried.clear()
    with settings.override(cache_dir=tmp_path / "cache"):
        yield tmp_path / "cache"
    tuned.forget()
    tuning._tried.clear()


def test_the_timer_agrees_with_itself_and_orders_calls() -> None:
    timer = CudaTimer()
    small, large = (Workload(GemmProblem(4096, 4096, "bf16", m)) for m in (64, 4096))
    device = device_facts(torch.cuda.current_device())[0]
    calls = [
        work.call(choose_config(GemmProblem(4096, 4096, "bf16", m), device)) for work, m in ((small, 64), (large, 4096))
    ]
    first, second = ([sorted(timer(call) for _ in range(11))[5] for call in calls] for _ in range(2))
    assert 2 < first[0] < 100
    assert first[1] > 3 * first[0]
    assert second == pytest.approx(first, rel=0.2)
    timer.check()


@pytest.mark.parametrize("recipe", [*RECIPES, FP4])
def test_every_recipe_is_timed(recipe: str) -> None:
    device = device_facts(torch.cuda.current_device())[0]
    problem = GemmProblem(1000, 1160, recipe, 100)
    configs = tuning.candidates(problem, device, 4)
    times = GpuMeasure()(problem, configs, configs[:1])
    assert set(times) == set(configs)
    assert all(1 < us < 1000 for us in times.values())


def test_tune_writes_a_table_that_calls_use(own_cache: Path) -> None:
    device = device_facts(torch.cuda.current_device())[0]
    entries = jitgemm.tune(PROBLEM.n, PROBLEM.k, m=[64, 100], candidates=6)
    assert set(entries) == {64, 96, 128, 192}
    # The limit on kernels may drop a winner whose margin is small.
    assert any(choose_config(PROBLEM.with_m(m), device) == entry.config for m, entry in entries.items())
    assert {choose_config(PROBLEM.with_m(m), device) for m in entries} <= set(enumerate_configs(PROBLEM, device))
    for entry in entries.values():
        assert 0 < entry.us < 1000
        assert entry.run.gpu == torch.cuda.get_device_name()


def test_the_command_tunes_and_checks(own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = tmp_path / "shapes.jsonl"
    shapes.write_text('{"n": 576, "k": 1024, "recipe": "bf16"}\n')
    assert cli.run(["tune", "--shapes", str(shapes), "--m", "64", "--candidates", "4"]) == 0
    assert "measured 1 anchors" in capsys.readouterr().out
    assert cli.run(["tune", "--shapes", str(shapes), "--m", "64", "--candidates", "4"]) == 0
    assert "measured 0 anchors" in capsys.readouterr().out
    assert cli.run(["tune", "--check"]) in (0, 1)  # noise may turn an entry of a short list
    assert re.search(r"of \d+ entries are stale", capsys.readouterr().out)  # the shipped table's are checked too


def test_autotune_at_first_use_but_not_while_capturing(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    device = device_facts(torch.cuda.current_device())[0]
    x, weight = (torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16) for rows in (64, 576))
    d, expected = (torch.empty(64, 576, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    jitgemm.bf16_gemm_nt(x, weight, expected)
    problem = GemmProblem(576, 1024, "bf16", 64)
    path = tuned.user_path(device)
    with settings.override(autotune=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            jitgemm.bf16_gemm_nt(x, weight, d)
        assert not path.exists()
        jitgemm.bf16_gemm_nt(x.clone(), weight, d)  # the same plan: no first use
        assert not path.exists()
        y = torch.randn(128, 1024, device="cuda", dtype=torch.bfloat16)[:64]
        wide = torch.empty(64, 600, device="cuda", dtype=torch.bfloat16)[:, :576]
        jitgemm.bf16_gemm_nt(y, weight, wide)
        assert path.exists()
    assert set(tuned.read_table(path, device).problems()) == {problem.without_m()}
    assert sum("autotune" in record.getMessage() for record in caplog.records) == 1
    graph.replay()
    torch.testing.assert_close(d, expected)
    torch.testing.assert_close(wide.float(), (y.float() @ weight.float().t()), rtol=2e-2, atol=0.5)
