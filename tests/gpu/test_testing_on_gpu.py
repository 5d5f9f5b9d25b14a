"""The timers of jitgemm.testing on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jitgemm.testing import bench, bench_kineto, get_arch_major

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_the_architecture() -> None:
    assert get_arch_major() == torch.cuda.get_device_properties(torch.cuda.current_device()).major


def test_timers_agree_on_a_long_kernel(tmp_path: Path) -> None:
    x = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")  # 1 GiB, far more than the L2

    def double() -> None:
        x.mul_(2)

    trace = tmp_path / "trace.json"
    by_profiler = bench_kineto(double, "elementwise", num_tests=5, flush_l2=False, trace_path=str(trace))
    # Events also count what other processes run on the GPU in between.
    by_events = min(bench(double, num_tests=1, high_precision=True) for _ in range(10))
    assert isinstance(by_profiler, float)
    assert by_profiler == pytest.approx(by_events, rel=0.1)
    assert by_profiler * 20e12 > 2 << 30  # below 20 TB/s
    assert json.loads(trace.read_text())["traceEvents"]


def test_the_flush_is_not_in_the_times_of_a_kernel() -> None:
    x, y = (torch.randn(256, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    calls = []

    def multiply() -> None:
        calls.append(torch.mm(x, y))

    with_flush = bench_kineto(
        multiply, ("nvjet", "gemm", "absent"), num_tests=4, suppress_kineto_output=True, with_multiple_kernels=True
    )
    assert isinstance(with_flush, tuple) and len(calls) == 9  # one before, two rounds of four
    assert 0 < max(with_flush[:2]) < 1e-3 and with_flush[2] == 0


def test_a_barrier_comes_before_every_call() -> None:
    x, order = torch.zeros(8, device="cuda"), []

    def call() -> None:
        order.append("fn")
        x.add_(1)

    # The L2 is flushed by an elementwise kernel too.
    bench_kineto(call, "elementwise", num_tests=2, flush_l2=False, barrier=lambda: order.append("b"))
    assert order == ["fn"] + ["b", "fn"] * 4
