"""The MoE half of a DeepSeek-V4-Flash layer on one GPU, from jitgemm's parts alone. ::

    python examples/moe_half_layer.py                  # T = 1, 8, 64, 512, 4096 tokens; needs 12 GB of an H200
    python examples/moe_half_layer.py --device cpu     # the same calls at a small size, served by the reference

``MoeHalf`` is the part to copy: hyper-connections in, norm, gate, permutation, FP4 experts, shared FP8 expert,
combination, hyper-connections out. For each T it runs once, is compared with ``reference`` (the layer in plain torch,
unfused, an expert at a time), is captured into a CUDA graph, whose replay must give the same bits, and timed. Then come
the kernels of one replay by torch's profiler: when each starts, how long it takes, and how much later than all before
it it ends (under programmatic dependent launch kernels overlap; only this adds up to the whole).

The bound is all weight bytes that this T touches at 4.3 TB/s, and 1 us for each kernel. Weights and inputs are random,
but for the hyper-connections' biases, which are about those of a trained layer. Exit codes: 0 done, 1 a wrong result.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import jitgemm
from jitgemm.reference import hyper_connections, moe, rowwise
from jitgemm.reference.fp4 import dequantize_fp4
from jitgemm.reference.quantize import cast_back_from_fp8, ceil_div
from jitgemm.testing import calc_diff, count_bytes
from jitgemm.timing import CudaTimer

BYTES_PER_US = 4.3e6
KERNEL_US = 1.0
SAMPLES = 30
MAX_DIFF = 1e-3  # of outputs whose inner values are quantized: codes at a rounding boundary may differ
MAX_KEY_GAP = 1e-2  # between the keys of the experts chosen and of the best


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer, by default DeepSeek-V4-Flash's."""

    width: int = 4096
    inner: int = 2048  # of an expert
    experts: int = 256
    topk: int = 6
    route_scale: float = 1.5
    limit: float = 10.0  # of SwiGLU


SMALL = Shape(width=256, inner=128, experts=8, topk=2)

Pair = tuple[Tensor, Tensor]


class Checkpoint(NamedTuple):
    """Weights as the model stores them; gate lies before up."""

    hc_fn: Tensor  # fp32 [24, 4 * width]
    hc_scale: Tensor  # fp32 [3]
    hc_base: Tensor  # fp32 [24]
    norm: Tensor  # bf16 [width]
    gate: Tensor  # bf16 [experts, width]
    gate_bias: Tensor  # fp32 [experts]
    gate_up: Pair  # MXFP4: codes [experts, 2 * inner, width / 2] and exponents [experts, 2 * inner, width / 32]
    down: Pair  # MXFP4, likewise of [experts, width, inner]
    shared_gate_up: Pair  # e4m3 [2 * inner, width], fp32 scales of 128 x 128
    shared_down: Pair  # e4m3 [width, inner], likewise


def random_checkpoint(shape: Shape, device: str, seed: int = 0) -> Checkpoint:
    """Weights whose products are of order 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=device) * std

    def mxfp4(*size: int) -> Pair:
        # Codes of all values have a standard deviation of 2.9; an exponent of 127 is a scale of 1.
        typical = 127 - round(math.log2(2.9 * size[-1] ** 0.5))

        def integers(low: int, high: int, per_byte: int) -> Tensor:
            shape = (*size[:-1], size[-1] // per_byte)
            return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator, device=device)

        return integers(0, 256, 2), integers(typical - 1, typical + 2, 32)

    def fp8(n: int, k: int) -> Pair:
        return jitgemm.per_block_cast_to_fp8(normal(n, k, std=k**-0.5).bfloat16())

    width, inner, experts = shape.width, shape.inner, shape.experts
    into, out = [5.9, -3.6, -2.9, -3.3], [-3.9, -0.94, -3.3, -2.5]
    among = [2.7 if j == k else -3.0 for j in range(4) for k in range(4)]
    return Checkpoint(
        hc_fn=normal(24, 4 * width, std=(4 * width) ** -0.5),
        hc_scale=torch.tensor([0.0761, 0.0326, 0.2270], device=device),
        hc_base=torch.tensor([*into, *out, *among], device=device),
        norm=1 + normal(width, std=0.1).bfloat16(),
        gate=normal(experts, width, std=width**-0.5).bfloat16(),
        gate_bias=normal(experts, std=0.1),
        gate_up=mxfp4(experts, 2 * inner, width),
        down=mxfp4(experts, width, inner),
        shared_gate_up=fp8(2 * inner, width),
        shared_down=fp8(width, inner),
    )


# -- The layer.


class Output(NamedTuple):
    """What the layer returns: a model needs the streams only."""

    streams: Tensor  # bf16 [tokens, 4, width]
    y: Tensor  # bf16 [tokens, width]: the experts' sum, before it joins the streams
    experts: Tensor  # int32 [tokens, topk]


class MoeHalf:
    """A layer's weights in the layouts that kernels take, and its calls.

    Args:
        shape: sizes.
        checkpoint: weights.
        overlap: run the shared expert on a second stream, beside the routing.
    """

    def __init__(self, shape: Shape, checkpoint: Checkpoint, overlap: bool = False) -> None:
        self.shape, self.weights, self.overlap = shape, checkpoint, overlap
        # SwiGLU in a GEMM's epilogue wants rows of gate and up in turn.
        codes, exponents = (jitgemm.interleave_gate_up(part) for part in checkpoint.gate_up)
        self.gate_up = jitgemm.prepare_fp4_weights(codes, exponents)
        self.down = jitgemm.prepare_fp4_weights(*checkpoint.down)
        self.shared_gate_up = jitgemm.interleave_gate_up(*checkpoint.shared_gate_up)

    def __call__(self, streams: Tensor) -> Output:
        """Streams bf16 [tokens, 4, width] after the layer's second half."""
        shape, weights = self.shape, self.weights
        x, post, comb = jitgemm.hc_pre(streams, weights.hc_fn, weights.hc_scale, weights.hc_base)
        # The gate reads the normalized rows, experts their E4M3 codes: one kernel makes both.
        hidden, codes, scales = jitgemm.rms_norm_act_quant(x, weights.norm, scale_layout="mn_major_tma_aligned")

        shared = torch.empty_like(x)  # allocated on this stream, which reads it last
        with self._beside() as join:
            self._shared_expert(codes, scales, shared)

        experts, expert_weights = jitgemm.moe_gate(
            hidden, weights.gate, weights.gate_bias, shape.topk, route_scale=shape.route_scale
        )
        permutation = jitgemm.moe_permutation(experts, shape.experts, expert_weights, layout="psum")
        rows = jitgemm.moe_permute(codes, permutation, scales)
        routed = self._routed_experts(rows, permutation)

        join()
        y = jitgemm.moe_combine(routed, permutation.token_topk_to_pos, shared=shared)
        return Output(jitgemm.hc_post(y, streams, post, comb), y, experts)

    def _shared_expert(self, codes: Tensor, scales: Tensor, y: Tensor) -> None:
        swiglu = jitgemm.Epilogue(swiglu=True, limit=self.shape.limit)
        inner = jitgemm.empty_quantized((len(codes), self.shape.inner), device=codes.device)
        jitgemm.fp8_gemm_nt((codes, scales), self.shared_gate_up, inner, epilogue=swiglu)
        jitgemm.fp8_gemm_nt(inner, self.weights.shared_down, y)

    def _routed_experts(self, rows: tuple[Tensor, Tensor | None], permutation: jitgemm.MoePermutation) -> Tensor:
        """Two grouped GEMMs; the routing weight goes into the first, before quantization, as the model has it."""
        shape, layout = self.shape, permutation.grouped_layout
        choices = permutation.token_topk_to_pos.numel()
        # Rows of nobody need not become zeros: nothing reads them.
        psum = {
            "use_psum_layout": True,
            "ensure_zero_padding": False,
            "expected_m_for_psum_layout": ceil_div(choices, shape.experts),
        }
        swiglu = jitgemm.Epilogue(swiglu=True, limit=shape.limit, row_weights=permutation.row_weights)
        codes = rows[0]
        inner = jitgemm.empty_quantized((len(codes), shape.inner), device=codes.device)
        jitgemm.m_grouped_fp8_fp4_gemm_nt_contiguous(rows, self.gate_up, inner, layout, **psum, epilogue=swiglu)
        y = codes.new_empty((len(codes), shape.width), dtype=torch.bfloat16)
        jitgemm.m_grouped_fp8_fp4_gemm_nt_contiguous(inner, self.down, y, layout, **psum)
        return y

    @contextlib.contextmanager
    def _beside(self) -> Iterator[Callable[[], None]]:
        """A second stream for what is within, and a function that waits for it."""
        if not self.overlap:
            yield lambda: None
            return
        here, there = torch.cuda.current_stream(), torch.cuda.Stream()
        there.wait_stream(here)
        with torch.cuda.stream(there):
            yield lambda: here.wait_stream(there)

    def weight_bytes(self, experts: Tensor) -> float:
        """Bytes of the weights that a call reads which chose these experts."""
        shared = (*self.weights[:6], self.shared_gate_up, self.weights.shared_down)
        routed = count_bytes(self.gate_up[:2], self.down[:2]) / self.shape.experts
        return count_bytes(shared) + len(experts.unique()) * routed


# -- The check.


def reference(shape: Shape, weights: Checkpoint, streams: Tensor, experts: Tensor) -> tuple[Output, float]:
    """The layer in plain torch with FP64 products, and how far the keys of ``experts`` are from the best ones.

    The experts are given, because near ties may go either way.
    """
    x, post, comb = hyper_connections.hc_pre(streams, *weights[:3], 1e-6, 1e-6, 20, 2.0)
    hidden = rowwise.normalize(x, weights.norm, 1e-6).bfloat16()
    rows = rowwise.round_trip(hidden, "e4m3", "pow2", 128).double()

    scores = moe.scores_of(hidden.double() @ weights.gate.double().T, "sqrtsoftplus")
    keys = scores + weights.gate_bias
    chosen = experts.long()
    gap = (keys.topk(shape.topk).values.sum(-1) - keys.gather(1, chosen).sum(-1)).abs()
    of_experts = scores.gather(1, chosen)
    of_experts = of_experts / of_experts.sum(-1, keepdim=True) * shape.route_scale

    def expert(rows: Tensor, gate_up: Tensor, down: Tensor, row_weights: Tensor | None) -> Tensor:
        inner = rowwise.swiglu(rows @ gate_up.T, row_weights, shape.limit).float()
        return (rowwise.round_trip(inner, "e4m3", "fp32", 128).double() @ down.T).bfloat16()

    y = torch.zeros_like(rows)
    for index in chosen.unique().tolist():
        tokens, slots = (chosen == index).nonzero(as_tuple=True)
        gate_up, down = (dequantize_fp4(*(part[index] for part in pair)) for pair in (weights.gate_up, weights.down))
        y[tokens] += expert(rows[tokens], gate_up, down, of_experts[tokens, slots])
    of_blocks = (
        cast_back_from_fp8(*pair, (128, 128), dtype=torch.float64)
        for pair in (weights.shared_gate_up, weights.shared_down)
    )
    y = (y + expert(rows, *of_blocks, None)).bfloat16()
    return Output(hyper_connections.hc_post(y, streams, post, comb), y, experts), float(gap.max())


def check(layer: MoeHalf, streams: Tensor, output: Output) -> float:
    """Compare a result with the reference; the greater difference of its two parts.

    Raises:
        ArithmeticError: it is wrong.
    """
    expected, gap = reference(layer.shape, layer.weights, streams, output.experts)
    diffs = {name: calc_diff(getattr(output, name), getattr(expected, name)) for name in ("y", "streams")}
    wrong = [f"{name} differs by {diff:.1e}" for name, diff in diffs.items() if not diff < MAX_DIFF]
    if not gap < MAX_KEY_GAP:
        wrong.append(f"keys of the chosen experts are {gap:.1e} from the best")
    if wrong:
        raise ArithmeticError(f"T = {len(streams)}: {', '.join(wrong)}")
    return max(diffs.values())


# -- Time.


class Kernel(NamedTuple):
    """A kernel of a replay; times in microseconds."""

    name: str
    start: float
    takes: float
    adds: float  # how much later than all before it it ends


def capture(layer: MoeHalf, streams: Tensor) -> tuple[torch.cuda.CUDAGraph, Output]:
    """A CUDA graph of a call that has been made before, and where it writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(streams)
    return graph, output


def time_line(replay: Callable[[], None]) -> list[Kernel]:
    """The kernels of one replay, by torch's profiler; those of two before it, which warm up, are left out."""
    replays = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(replays):
            replay()
            torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in on_device)
    return kernels_of(spans[len(spans) * (replays - 1) // replays :])


def kernels_of(spans: Sequence[tuple[float, float, str]]) -> list[Kernel]:
    """Kernels from when each started and ended, in the order in which they started."""
    kernels: list[Kernel] = []
    begin = ended = min((start for start, _, _ in spans), default=0.0)
    for start, end, name in spans:
        kernels.append(Kernel(name, start - begin, end - start, max(end - ended, 0.0)))
        ended = max(ended, end)
    return kernels


def report(layer: MoeHalf, streams: Tensor, output: Output, diff: float, timer: CudaTimer) -> None:
    """Capture, compare with the eager result, time and print.

    Raises:
        ArithmeticError: a replay gives other bits than the call did.
    """
    graph, captured = capture(layer, streams)
    graph.replay()
    if not all(map(torch.equal, captured, output)):
        raise ArithmeticError(f"T = {len(streams)}: a replay differs from the call")
    us = statistics.median(timer(graph.replay) for _ in range(SAMPLES))
    kernels, size = time_line(graph.replay), layer.weight_bytes(output.experts)
    bound = size / BYTES_PER_US + KERNEL_US * len(kernels)
    touched = f"{len(output.experts.unique())} of {layer.shape.experts} experts"
    print(
        f"\nT = {len(streams)}: {us:.1f} us, {us / bound:.2f} of the bound, {bound:.1f} us"
        f" ({size / 1e6:.1f} MB of weights with {touched}, {len(kernels)} kernels);"
        f" difference from the reference {diff:.1e}"
    )
    print(f"{'starts':>9} {'takes':>9} {'adds':>9}  kernel")
    for kernel in kernels:
        print(f"{kernel.start:9.1f} {kernel.takes:9.1f} {kernel.adds:9.1f}  {kernel.name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, check and time the layer; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("::")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", nargs="+", type=int, help="default: 1 8 64 512 4096, on a CPU 5")
    parser.add_argument("--overlap", action="store_true", help="the shared expert on a second stream")
    parser.add_argument("--no-pdl", action="store_true", help="no programmatic dependent launch")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if options.overlap and not on_gpu:
        parser.error("--overlap needs a GPU")
    if min(options.tokens or [1]) < 1:
        parser.error("--tokens: accepted are positive numbers")
    shape = Shape() if on_gpu else SMALL
    layer = MoeHalf(shape, random_checkpoint(shape, options.device), options.overlap)
    timer = CudaTimer() if on_gpu else None
    with torch.no_grad(), jitgemm.override(pdl=not options.no_pdl):
        for tokens in options.tokens or ([1, 8, 64, 512, 4096] if on_gpu else [5]):
            streams = torch.randn(tokens, 4, shape.width, device=options.device).bfloat16()
            output = layer(streams)  # compiles what the cache lacks: a capture may not
            try:
                diff = check(layer, streams, output)
                if timer is not None:
                    report(layer, streams, output, diff, timer)
                else:
                    print(f"T = {tokens}: difference from the reference {diff:.1e}; no time line on a CPU")
            except ArithmeticError as error:
                print(error)
                return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
