"""The race of small kernels: its peers compute what we do, and its bytes are right."""

from __future__ import annotations

import pytest
import torch

from benchmarks import small
from jitgemm.reference.quantize import ceil_div


@pytest.mark.parametrize("name", small.CASES)
def test_peers_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "DEVICE", "cpu")
    case = small.CASES[name]
    work = case.make(128, min(case.widths))
    assert small.agrees(work, case.exact, case.whole_tiles)
    ours, peers = (small.as_tuple(call(*work.arguments())) for call in (work.ours, work.peer))
    for a, b in zip(ours, peers, strict=True):
        if a.dtype == torch.int32:  # packed exponents
            a = (a.contiguous().view(torch.uint8).int() << 23).view(torch.float32)[:, : b.shape[1]]
        if a.dtype == torch.uint8:
            assert (a != b).float().mean() < 0.01
            continue
        assert a.shape == b.shape
        torch.testing.assert_close(a.float(), b.float(), rtol=1 / 7, atol=2e-2)


def test_bytes_are_those_of_the_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "DEVICE", "cpu")
    m, n = 8, 4096
    assert small.CASES["act_quant"].make(m, n).bytes() == m * n * 3 + m * ceil_div(n, 128) * 4
    assert small.CASES["fp4_act_quant"].make(m, n).bytes() == m * n * 2 + m * n // 2 + m * n // 32
    assert small.CASES["rms_norm"].make(m, n).bytes() == 4 * m * n
