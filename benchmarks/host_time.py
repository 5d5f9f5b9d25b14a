"""What a call costs the host in steady state: ours next to ``torch.matmul(out=)`` and DeepGEMM. ::

    python -m benchmarks.host_time

A batch of calls is timed until the last one returns, and the GPU is waited for between batches, so that the launch
queue never fills; contenders take turns, and the median over batches counts. The problem is tiny: the host is what
takes long. ``N sets`` means that the tensors differ from call to call, N sets in turn. The loop itself is the row
``loop``; it is not subtracted. Exit codes: 0 done, 1 something of ours is missing, 3 no GPU.
"""

from __future__ import annotations

import argparse
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

COLUMNS = ("case", "us", "over_matmul", "error")
MATMUL = "torch.matmul(out=)"
FEW_SETS, MANY_SETS = 64, 1000
_FP8 = "fp8_1x128_128x128"


@dataclass(frozen=True)
class Contender:
    """A function and the sets of arguments that it gets in turn."""

    function: Callable[..., object]
    sets: Sequence[tuple[Any, ...]]


def measure(
    contenders: Mapping[str, Contender], batch: int, batches: int, synchronize: Callable[[], None]
) -> dict[str, Timing]:
    """The median time of a call in microseconds, by contender; the error of one that raises."""
    turns = {name: itertools.cycle(contender.sets) for name, contender in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    errors: dict[str, str] = {}
    for name, contender in contenders.items():
        try:
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


# -- Contenders. Each is called through one lambda, so that all pay the same for it.


def contenders(shape: Shape, with_peers: bool = True, device: str = "cuda") -> dict[str, Contender | str]:
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
    parser.add_argument("--out", type=Path, help="CSV file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = parse(arguments)
    harness.require_gpu()
    say(harness.machine())
    shape = Shape(*options.shape)
    harness.prewarm([GemmProblem(shape.n, shape.k, recipe, shape.m) for recipe in (_FP8, "bf16")], 2)
    found = contenders(shape, not options.no_peers)
    running = {name: contender for name, contender in found.items() if isinstance(contender, Contender)}
    timings = measure(running, options.batch, options.batches, torch.cuda.synchronize)
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
