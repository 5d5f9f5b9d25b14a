"""The example: its flow at a small size on the CPU, and that its check notices what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import jitgemm
from examples import moe_half_layer as example
from examples.moe_half_layer import SMALL, Kernel, MoeHalf
from jitgemm.testing import calc_diff


@pytest.fixture(scope="module")
def checkpoint() -> example.Checkpoint:
    return example.random_checkpoint(SMALL, "cpu", seed=1)


def streams_of(tokens: int) -> Tensor:
    return torch.randn(tokens, 4, SMALL.width, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def test_it_runs_and_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--device", "cpu", "--tokens", "1", "7", "40"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["T = 1", "T = 7", "T = 40"]


@pytest.mark.parametrize("arguments", [["--device", "cpu", "--overlap"], ["--device", "cpu", "--tokens", "0"]])
def test_what_makes_no_sense_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)


def experts_swapped(layer: MoeHalf) -> None:
    down = layer.down
    layer.down = down._replace(data=down.data.flip(0), units=down.units.flip(0))


def gate_and_up_not_interleaved(layer: MoeHalf) -> None:
    layer.shared_gate_up = layer.weights.shared_gate_up


def no_bias_in_the_gate(layer: MoeHalf) -> None:
    layer.weights = layer.weights._replace(gate_bias=-layer.weights.gate_bias)


def other_limit(layer: MoeHalf) -> None:
    layer.shape = example.Shape(**{**vars(SMALL), "limit": 0.5})


@pytest.mark.parametrize(
    "spoil", [experts_swapped, gate_and_up_not_interleaved, no_bias_in_the_gate, other_limit], ids=lambda f: f.__name__
)
def test_the_check_notices(checkpoint: example.Checkpoint, spoil: Callable[[MoeHalf], None]) -> None:
    right, wrong, streams = MoeHalf(SMALL, checkpoint), MoeHalf(SMALL, checkpoint), streams_of(16)
    assert example.check(right, streams, right(streams)) < 1e-6
    spoil(wrong)
    with pytest.raises(ArithmeticError, match=r"differs by|from the best"):
        example.check(right, streams, wrong(streams))


def test_a_tokens_result_does_not_depend_on_the_others(checkpoint: example.Checkpoint) -> None:
    layer, streams = MoeHalf(SMALL, checkpoint), streams_of(9)
    together = layer(streams)
    for token in (0, 8):
        alone = layer(streams[token : token + 1])
        assert torch.equal(alone.experts[0], together.experts[token])
        assert calc_diff(alone.streams[0], together.streams[token]) < 1e-6


def test_weight_bytes(checkpoint: example.Checkpoint) -> None:
    width, inner, experts = SMALL.width, SMALL.inner, SMALL.experts
    layer = MoeHalf(SMALL, checkpoint)
    hyper_connections = 4 * (24 * 4 * width + 3 + 24)
    gate = 2 * width + 2 * experts * width + 4 * experts
    shared = 3 * inner * width + 4 * (2 + 1) * width // 128
    # 4 bits a weight, a byte for 32, and FP32 units of rows; K is padded to blocks of 128.
    expert = 3 * inner * width // 2 + 3 * inner * width // 32 + 4 * (2 * inner + width)
    chosen = torch.tensor([[1, 3], [3, 6]])
    assert layer.weight_bytes(chosen) == hyper_connections + gate + shared + 3 * expert


def test_kernels_that_overlap_add_up() -> None:
    kernels = example.kernels_of([(5.0, 9.0, "a"), (7.0, 8.0, "b"), (8.0, 12.0, "c"), (20.0, 21.0, "d")])
    assert kernels == [Kernel("a", 0, 4, 4), Kernel("b", 2, 1, 0), Kernel("c", 3, 4, 3), Kernel("d", 15, 1, 9)]
    assert sum(kernel.adds for kernel in kernels) == 21 - 5
    assert example.kernels_of([]) == []


def test_its_calls_are_recorded(checkpoint: example.Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    with jitgemm.override(record=str(path)):
        MoeHalf(SMALL, checkpoint)(streams_of(3))
    kinds = {json.loads(line)["kind"] for line in path.read_text().splitlines()}
    assert kinds == {
        *("hc_pre", "rowwise", "gemm", "topk_gate", "moe_permutation", "moe_permute", "m_grouped_psum"),
        *("moe_combine", "hc_post", "prepare_fp4_weights"),
    }
