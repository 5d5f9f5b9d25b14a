"""What a call costs the host in steady state: ours next to ``torch.matmul(out=)`` and DeepGEMM. ::

    python -m benchmarks.host_time

A batch of calls is timed until the last one returns, and the GPU is waited for between batches, so that the launch
queue never fills; contenders take turns, and the median over batches counts. The problem is tiny: the host is what
takes long. ``N sets`` means that the tensors differ from call to call, N sets in turn; ``new activations`` that a, its
scales and d are at addresses that no call has had lately. ``new m`` is the median of single calls, each with an m that
no call has had, whose kernel is loaded. The loop itself is the row ``loop``; it is not subtracted. Exit codes: 0 done,
1 something of ours is missing, 3 no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jitgemm
from benchmarks import harness
from benchmarks.harness import CsvLog, Timing, say
from benchmarks.operands import Operands, quantize, random_matrix
from benchmarks.shapes import Shape
from jitgemm.families.gemm import GemmProblem
from jitgemm.heuristics import ANCHORS

COLUMNS = ("case", "us", "over_matmul", "error")
MATMUL = "torch.matmul(out=)"
FEW_SETS, MANY_SETS = 64, 1000
ACTIVATIONS = 4000  # more than the launches that a plan keeps
NEW_M = 1500  # the largest of them
_FP8 = "fp8_1x128_128x128"


@dataclass(frozen=True)
class Contender:
    """A function and the sets of arguments that it gets in turn."""

    function: Callable[..., object]
    sets: Sequence[tuple[Any, ...]]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # in force during its calls


def measure(
    contenders: Mapping[str, Contender], batch: int, batches: int, synchronize: Callable[[], None]
) -> dict[str, Timing]:
    """The median time of a call in microseconds, by contender; the error of one that raises."""
    turns = {name: itertools.cycle(contender.sets) for name, contender in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    errors: dict[str, str] = {}
    for name, contender in contenders.items():
        try:
            with jitgemm.override(**contender.settings):
                for arguments in (*contender.sets, *contender.sets[:batch]):  # all plans and launches are made
                    contender.function(*arguments)
        except Exception as error:
            errors[name] = harness.error_text(error)
        synchronize()
    running = [name for name in contenders if name not in errors]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(batches):
            for name in running:
                with jitgemm.override(**contenders[name].settings):
                    times[name].append(_batch(contenders[name].function, list(itertools.islice(turns[name], batch))))
                synchronize()
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(None, error=errors[name]) if name in errors else Timing(statistics.median(times[name]), batches)
        for name in contenders
    }


def _batch(function: Callable[..., object], sets: Sequence[tuple[Any, ...]]) -> float:
    begin = time.perf_counter()
    for arguments in sets:
        function(*arguments)
    return (time.perf_counter() - begin) / len(sets) * 1e6


def measure_new_m(
    function: Callable[..., object], sets: Mapping[int, tuple[Any, ...]], synchronize: Callable[[], None]
) -> Timing:
    """The median time of one call in microseconds for an m that has not been seen; half of them warm up."""
    times: list[float] = []
    warm = {m for m in sets if m in ANCHORS} | {m for index, m in enumerate(sets) if index % 2}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for m in warm:
            function(*sets[m])
        synchronize()
        for index, m in enumerate(sorted(set(sets) - warm)):
            if index % 200 == 0:
                synchronize()
            times.append(_batch(function, [sets[m]]))
        synchronize()
    except Exception as error:
        return Timing(None, error=harness.error_text(error))
    finally:
        if collecting:
            gc.enable()
    return Timing(statistics.median(times), len(times))


# -- Contenders. Each is called through one lambda, so that all pay the same for it.


def contenders(
    shape: Shape, with_peers: bool = True, compiled: bool = False, device: str = "cuda"
) -> dict[str, Contender | str]:
    """Everything that is timed, or why it is missing."""
    generator = torch.Generator(device).manual_seed(0)
    fp8 = [_tensors(shape, _FP8, generator) for _ in range(MANY_SETS)]
    bf16 = [_tensors(shape, "bf16", generator) for _ in range(FEW_SETS)]
    prepared = [_prepared(operands, d) for operands, d in fp8]
    unprepared = [((o.a, o.a_scales), (o.b, o.b_scales), d) for o, d in fp8[:1]]
    plain = [(o.a, o.b, d) for o, d in bf16]
    transposed = [(o.a, o.b.t(), d) for o, d in bf16]

    ours_fp8, ours_bf16 = jitgemm.fp8_gemm_nt, jitgemm.bf16_gemm_nt
    found: dict[str, Contender | str] = {
        "loop": Contender(lambda a, b, d: None, plain[:1]),
        "jitgemm fp8": Contender(lambda a, b, d: ours_fp8(a, b, d), prepared[:1]),
        f"jitgemm fp8, {FEW_SETS} sets": Contender(lambda a, b, d: ours_fp8(a, b, d), prepared[:FEW_SETS]),
        f"jitgemm fp8, {MANY_SETS} sets": Contender(lambda a, b, d: ours_fp8(a, b, d), prepared),
        "jitgemm fp8, row-major scales": Contender(lambda a, b, d: ours_fp8(a, b, d), unprepared),
        "jitgemm bf16": Contender(lambda a, b, d: ours_bf16(a, b, d), plain[:1]),
        f"jitgemm bf16, {FEW_SETS} sets": Contender(lambda a, b, d: ours_bf16(a, b, d), plain),
        MATMUL: Contender(lambda a, b, d: torch.matmul(a, b, out=d), transposed[:1]),
        f"{MATMUL}, {FEW_SETS} sets": Contender(lambda a, b, d: torch.matmul(a, b, out=d), transposed),
    }
    one = prepared[:1]
    found["jitgemm fp8, PDL"] = Contender(lambda a, b, d: ours_fp8(a, b, d), one, {"pdl": True})
    found["jitgemm fp8, new activations"] = Contender(lambda a, b, d: ours_fp8(a, b, d), _activations(shape, generator))
    operator = torch.ops.jitgemm.gemm
    found["jitgemm fp8, operator"] = Contender(
        lambda a, b, d: operator(a[0], a[1], b[0], b[1], d, None, False, _FP8, "nt", False), one
    )
    if compiled:
        ours = torch.compile(lambda a, a_scales, b, b_scales, d: ours_fp8((a, a_scales), (b, b_scales), d))
        matmul = torch.compile(lambda a, b, d: torch.matmul(a, b, out=d))
        found["jitgemm fp8, torch.compile"] = Contender(lambda a, b, d: ours(a[0], a[1], b[0], b[1], d), one)
        found[f"{MATMUL}, torch.compile"] = Contender(lambda a, b, d: matmul(a, b, d), transposed[:1])
    if not with_peers:
        return found
    try:
        import deep_gemm
    except Exception as error:
        found["deepgemm"] = harness.error_text(error)
        return found
    peer_fp8, peer_bf16 = deep_gemm.fp8_gemm_nt, deep_gemm.bf16_gemm_nt
    found["deepgemm fp8"] = Contender(lambda a, b, d: peer_fp8(a, b, d), prepared[:1])
    found[f"deepgemm fp8, {FEW_SETS} sets"] = Contender(lambda a, b, d: peer_fp8(a, b, d), prepared[:FEW_SETS])
    found["deepgemm fp8, row-major scales"] = Contender(lambda a, b, d: peer_fp8(a, b, d), unprepared)
    found["deepgemm bf16"] = Contender(lambda a, b, d: peer_bf16(a, b, d), plain[:1])
    return found


def _activations(shape: Shape, generator: torch.Generator) -> list[tuple[Any, ...]]:
    operands, d = _tensors(shape, _FP8, generator)
    (a, a_scales), b, _ = _prepared(operands, d)
    many = (torch.empty((ACTIVATIONS, *a.shape), dtype=a.dtype, device=a.device), d.new_empty((ACTIVATIONS, *d.shape)))
    width = -(-a_scales.stride(1) // 4) * 4
    scales = a_scales.new_ones((ACTIVATIONS, a_scales.shape[1], width)).transpose(1, 2)[:, : shape.m]
    return [((one, its_scales), b, out) for one, its_scales, out in zip(many[0], scales, many[1], strict=True)]


def new_m_sets(shape: Shape, recipe: str, device: str = "cuda") -> dict[int, tuple[Any, ...]]:
    """Arguments by m, for the same weights."""
    generator = torch.Generator(device).manual_seed(0)
    operands, d = _tensors(Shape(NEW_M, shape.n, shape.k), recipe, generator)
    if recipe == "bf16":
        return {m: (operands.a[:m], operands.b, d[:m]) for m in range(1, NEW_M + 1)}
    assert operands.a_scales is not None
    transform, scales = jitgemm.get_mn_major_tma_aligned_tensor, operands.a_scales
    b = operands.b, operands.b_scales
    return {m: ((operands.a[:m], transform(scales[:m].contiguous())), b, d[:m]) for m in range(1, NEW_M + 1)}


def _tensors(shape: Shape, recipe: str, generator: torch.Generator) -> tuple[Operands, Tensor]:
    a, b = (random_matrix(rows, shape.k, generator) for rows in (shape.m, shape.n))
    return quantize(recipe, a, b), torch.empty((shape.m, shape.n), dtype=torch.bfloat16, device=generator.device)


def _prepared(operands: Operands, d: Tensor) -> tuple[Any, ...]:
    assert operands.a_scales is not None
    a_scales = jitgemm.get_mn_major_tma_aligned_tensor(operands.a_scales)
    return (operands.a, a_scales), (operands.b, operands.b_scales), d


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs=3, type=harness.positive, default=(16, 128, 256), metavar=("M", "N", "K"))
    parser.add_argument("--batch", type=harness.positive, default=200, help="calls in a batch (default 200)")
    parser.add_argument("--batches", type=harness.positive, default=50, help="batches of each (default 50)")
    parser.add_argument("--no-peers", action="store_true", help="without DeepGEMM")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which needs a C compiler")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = parse(arguments)
    harness.require_gpu()
    say(harness.machine())
    shape = Shape(*options.shape)
    harness.prewarm([GemmProblem(shape.n, shape.k, recipe) for recipe in (_FP8, "bf16")], 2)
    found = contenders(shape, not options.no_peers, not options.no_compile)
    running = {name: contender for name, contender in found.items() if isinstance(contender, Contender)}
    timings = measure(running, options.batch, options.batches, torch.cuda.synchronize)
    for recipe, function in ((_FP8, jitgemm.fp8_gemm_nt), ("bf16", jitgemm.bf16_gemm_nt)):
        name = f"jitgemm {recipe[:4].rstrip('_')}, new m"
        timings[name] = measure_new_m(function, new_m_sets(shape, recipe), torch.cuda.synchronize)
    timings.update({name: Timing(None, error=text) for name, text in found.items() if isinstance(text, str)})

    matmul = timings[MATMUL].median_us
    rows = []
    for name, timing in timings.items():
        us = timing.median_us
        rows.append((name, us, None if us is None or matmul is None else us / matmul, timing.error or ""))
    with CsvLog(options.out, COLUMNS) as log:
        for row in rows:
            log.write(dict(zip(COLUMNS, row, strict=True)))
    print(f"host time per call, {shape}")
    print(harness.table(("contender", "us", "of matmul", "error"), rows))
    return int(any(timing.error for name, timing in timings.items() if name.startswith("jitgemm")))


if __name__ == "__main__":
    raise SystemExit(main())
