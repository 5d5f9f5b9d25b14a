"""The benchmark of chained calls with real graphs, on a small chain."""

from __future__ import annotations

import pytest

from benchmarks import chain, dense
from benchmarks.harness import CudaTimer
from benchmarks.shapes import Shape

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_our_graphs_replay(recipe: str) -> None:
    inputs = [dense.Inputs(Shape(4, n, k), seed) for seed, (n, k) in enumerate([(256, 128), (128, 256), (256, 128)])]
    timer = CudaTimer()
    rows = chain.run_chain(recipe, inputs, {"warm": chain.WarmTimer(timer, 3), "flushed": timer}, samples=3, replays=3)
    ours = [row for row in rows if row["library"] == "jitgemm"]
    assert [row["error"] for row in ours] == [""] * 4
    assert all(0 < row["us"] < 1e6 for row in ours)
