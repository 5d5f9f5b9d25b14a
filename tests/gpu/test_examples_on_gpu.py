"""The example on a GPU: against the reference, captured, with the shared expert beside the routing, and timed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

import jitgemm
from examples import moe_half_layer as example
from jitgemm.timing import CudaTimer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SHAPE = example.Shape(width=1024, inner=512, experts=32, topk=6)


@pytest.fixture(scope="module")
def layer() -> Iterator[example.MoeHalf]:
    with jitgemm.override(pdl=True):
        yield example.MoeHalf(SHAPE, example.random_checkpoint(SHAPE, "cuda"))


@pytest.fixture(autouse=True)
def poisoned_allocations() -> None:
    """What a kernel leaves unwritten is NaN: blocks that the allocator hands out again were filled with it."""
    torch.cuda.empty_cache()
    junk = [torch.full((size,), math.nan, device="cuda") for size in (1 << 12, 1 << 18, 1 << 24)]
    del junk


def streams_of(tokens: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(tokens)
    return torch.randn(tokens, 4, SHAPE.width, generator=generator, device="cuda").bfloat16()


def check_replays(layer: example.MoeHalf, streams: torch.Tensor, output: example.Output) -> None:
    graph, captured = example.capture(layer, streams)
    for _ in range(3):
        for tensor in captured:
            tensor.fill_(-1)
        graph.replay()
        assert all(map(torch.equal, captured, output))


@pytest.mark.parametrize("tokens", [1, 64, 800])
def test_eager_and_captured(layer: example.MoeHalf, tokens: int) -> None:
    streams = streams_of(tokens)
    output = layer(streams)
    assert example.check(layer, streams, output) < example.MAX_DIFF
    check_replays(layer, streams, output)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("tokens", [1, 64])
def test_the_shared_expert_beside_the_routing(
    layer: example.MoeHalf, tokens: int, pdl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = streams_of(tokens)
    with jitgemm.override(pdl=pdl):
        output = layer(streams)
        monkeypatch.setattr(layer, "overlap", True)
        assert all(map(torch.equal, layer(streams), output))
        check_replays(layer, streams, output)


def test_the_report(layer: example.MoeHalf, capsys: pytest.CaptureFixture[str]) -> None:
    streams = streams_of(64)
    example.report(layer, streams, layer(streams), 0.0, CudaTimer())
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("T = 64: ")
    kernels = [line.split()[-1] for line in lines[2:]]
    assert [name for name in kernels if "hc_" in name and "jitgemm" in name]
    assert len(kernels) >= 13  # two of hc_pre, the norm, two of the gate, two of rows, four GEMMs, combine, hc_post
