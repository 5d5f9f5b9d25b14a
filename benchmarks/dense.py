"""Dense GEMM raced against DeepGEMM and cuBLASLt over the 56 shapes of DeepSeek-V3's layers, or over others. ::

    python -m benchmarks.dense --warm-peer --report out/
    python -m benchmarks.dense --warm-peer --shapes unlisted --out other.csv

Peers: ``deepgemm`` (sgl-deep-gemm; scales prepared in its layout), ``cublaslt_rowwise`` and ``cublaslt_blockwise``
(``torch._scaled_mm``, without fast accumulation, where it accepts the problem; row-wise scales are an easier problem
than 1x128 with 128x128, and count as a peer all the same), ``cublas`` (``torch.matmul`` for BF16). All get the same
random matrices. ``ratio`` is the best peer's time over ours: above 1 we are faster. Each result is compared with
float64 first (on some rows), ours into an output of NaN. ``--report`` writes the CSV, ``dense.csv``, and what
``benchmarks.report`` makes of it. Exit codes: 0 done, 1 something of ours is missing or wrong, 3 no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jitgemm
from benchmarks import harness, report
from benchmarks.harness import EMPTY, Call, CsvLog, CudaTimer, Timer, race, say
from benchmarks.operands import Operands, poisoned, quantize, random_matrix, sample_rows
from benchmarks.shapes import LAYERS, MS, OTHER_LAYERS, OTHER_MS, Shape, dense_shapes, floor_us
from jitgemm.compiler import driver_version, find_nvrtc, version_text
from jitgemm.device import PRESETS
from jitgemm.families.gemm import RECIPES, GemmProblem
from jitgemm.heuristics import choose_config
from jitgemm.reference.gemm import Errors, error_measures, tolerance

OURS = "jitgemm"
NAMES = {"fp8": "fp8_1x128_128x128", "bf16": "bf16"}
PEERS = {"fp8": ("deepgemm", "cublaslt_rowwise", "cublaslt_blockwise"), "bf16": ("deepgemm", "cublas")}
PEER_COLUMNS = tuple(f"{name}_us" for name in dict.fromkeys(name for names in PEERS.values() for name in names))
COLUMNS = (
    *("case", "m", "n", "k", "groups", "recipe", "ours_us", "best_peer_us", "best_peer", "ratio", "floor_us"),
    *("over_floor", "config", *PEER_COLUMNS, "empty_us", "samples", "errors", "measured"),
)
SETS = {"listed": (MS, LAYERS), "unlisted": (OTHER_MS, OTHER_LAYERS)}
_SEPARATOR = " | "
_PEER_BOUND = Errors(1e-3, math.inf)  # whether a peer computes this problem at all


@dataclass(frozen=True)
class Contender:
    """A call, the operands that it multiplies and where its result goes."""

    call: Call
    operands: Operands
    d: Tensor


class Inputs:
    """Random matrices of one shape, cast to a recipe when first asked for."""

    def __init__(self, shape: Shape, seed: int = 0, device: str = "cuda") -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(seed)
        self._a = random_matrix(shape.m, shape.k, generator)
        self._b = random_matrix(shape.n, shape.k, generator)
        self.rows = sample_rows(shape.m, generator, last=64)
        self._operands: dict[str, Operands] = {}
        self._expected: dict[str, Tensor] = {}

    def operands(self, recipe: str) -> Operands:
        """The matrices as a recipe wants them."""
        if recipe not in self._operands:
            self._operands[recipe] = quantize(recipe, self._a, self._b)
        return self._operands[recipe]

    def expected(self, recipe: str) -> Tensor:
        """Some rows of the result."""
        if recipe not in self._expected:
            self._expected[recipe] = self.operands(recipe).product("bf16", self.rows)
        return self._expected[recipe]

    def output(self) -> Tensor:
        """A result that is still to be computed."""
        return poisoned((self.shape.m, self.shape.n), torch.bfloat16, self._a.device)


# -- Contenders: from the inputs of a shape to a call.


def _ours(recipe: str, inputs: Inputs) -> Contender:
    operands, d = inputs.operands(NAMES[recipe]), inputs.output()
    a, b = operands.a, operands.b
    if recipe == "bf16":
        return Contender(lambda: jitgemm.bf16_gemm_nt(a, b, d), operands, d)
    assert operands.a_scales is not None and operands.b_scales is not None
    scaled_a, scaled_b = (a, jitgemm.get_mn_major_tma_aligned_tensor(operands.a_scales)), (b, operands.b_scales)
    return Contender(lambda: jitgemm.fp8_gemm_nt(scaled_a, scaled_b, d), operands, d)


def _deepgemm(recipe: str, inputs: Inputs) -> Contender:
    import deep_gemm

    operands, d = inputs.operands(NAMES[recipe]), inputs.output()
    a, b = operands.a, operands.b
    if recipe == "bf16":
        return Contender(lambda: deep_gemm.bf16_gemm_nt(a, b, d), operands, d)
    scaled_a, scaled_b = (a, deep_gemm.get_mn_major_tma_aligned_tensor(operands.a_scales)), (b, operands.b_scales)
    return Contender(lambda: deep_gemm.fp8_gemm_nt(scaled_a, scaled_b, d), operands, d)


def _cublaslt_rowwise(_: str, inputs: Inputs) -> Contender:
    operands, d = inputs.operands("fp8_rowwise"), inputs.output()
    assert operands.a_scales is not None and operands.b_scales is not None
    return _scaled_mm(operands, d, operands.a_scales, operands.b_scales.t())


def _cublaslt_blockwise(_: str, inputs: Inputs) -> Contender:
    operands, d = inputs.operands("fp8_1x128_128x128"), inputs.output()
    assert operands.a_scales is not None and operands.b_scales is not None
    return _scaled_mm(operands, d, operands.a_scales.t().contiguous().t(), operands.b_scales.t())


def _scaled_mm(operands: Operands, d: Tensor, a_scales: Tensor, b_scales: Tensor) -> Contender:
    a, b = operands.a, operands.b.t()

    def call() -> object:
        return torch._scaled_mm(
            a, b, scale_a=a_scales, scale_b=b_scales, out_dtype=d.dtype, use_fast_accum=False, out=d
        )

    return Contender(call, operands, d)


def _cublas(_: str, inputs: Inputs) -> Contender:
    operands, d = inputs.operands("bf16"), inputs.output()
    a, b = operands.a, operands.b.t()
    return Contender(lambda: torch.matmul(a, b, out=d), operands, d)


MAKERS: dict[str, Callable[[str, Inputs], Contender]] = {
    OURS: _ours,
    "deepgemm": _deepgemm,
    "cublaslt_rowwise": _cublaslt_rowwise,
    "cublaslt_blockwise": _cublaslt_blockwise,
    "cublas": _cublas,
}


# -- The race.


def run_shape(recipe: str, inputs: Inputs, preset: str, samples: int | None, timer: Timer) -> dict[str, Any]:
    """Race one shape; a row of the CSV."""
    shape = inputs.shape
    contenders: dict[str, Call] = {}
    errors: dict[str, str] = {}
    for name in (OURS, *PEERS[recipe]):
        try:
            contender = MAKERS[name](recipe, inputs)
            contender.call()
            check(name, contender, inputs)
            contenders[name] = contender.call
        except Exception as error:
            timer.check()
            errors[name] = harness.error_text(error)
    timings = race(contenders, samples, timer)
    errors.update({name: timing.error for name, timing in timings.items() if timing.error is not None})
    medians = {name: t.median_us for name, t in timings.items() if t.median_us is not None}
    problem = GemmProblem(shape.n, shape.k, NAMES[recipe], shape.m)
    config = str(choose_config(problem, PRESETS[preset]))
    return make_row(recipe, shape, config, medians, errors, timings[EMPTY].samples)


def check(name: str, contender: Contender, inputs: Inputs) -> None:
    """Compare a contender's result with float64.

    Raises:
        ArithmeticError: it is wrong.
    """
    recipe = contender.operands.recipe
    bounds = tolerance(recipe, "bf16") if name == OURS else _PEER_BOUND
    errors = error_measures(contender.d[inputs.rows], inputs.expected(recipe))
    if not errors.within(bounds) or not bool(contender.d.isfinite().all()):
        raise ArithmeticError(f"wrong result: cosine {errors.cosine:.3g}, Frobenius {errors.frobenius:.3g}")


def make_row(
    recipe: str, shape: Shape, config: str, medians: Mapping[str, float], errors: Mapping[str, str], samples: int
) -> dict[str, Any]:
    """A row of the CSV but for when and on what it was measured; what is missing is None."""
    ours = medians.get(OURS)
    peers = {name: medians[name] for name in PEERS[recipe] if name in medians}
    best = min(peers, key=peers.__getitem__) if peers else None
    floor = floor_us(shape, RECIPES[NAMES[recipe]].operand_bytes)
    return {
        "case": f"{NAMES[recipe]}/{shape}",
        "m": shape.m,
        "n": shape.n,
        "k": shape.k,
        "groups": 1,
        "recipe": NAMES[recipe],
        "ours_us": ours,
        "best_peer_us": None if best is None else peers[best],
        "best_peer": best,
        "ratio": None if best is None or ours is None else peers[best] / ours,
        "floor_us": floor,
        "over_floor": None if ours is None else ours / floor,
        "config": config,
        **{f"{name}_us": medians.get(name) for name in (column.removesuffix("_us") for column in PEER_COLUMNS)},
        "empty_us": medians.get(EMPTY),
        "samples": samples,
        "errors": _SEPARATOR.join(f"{name}: {text}" for name, text in errors.items()),
    }


def faults(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Contenders that are missing, with the shapes: one line for each different error."""
    shapes: dict[str, list[str]] = {}
    for row in rows:
        for text in filter(None, row["errors"].split(_SEPARATOR)):
            shapes.setdefault(text, []).append(row["case"])
    return [f"{text} [{len(cases)} shapes, first {cases[0]}]" for text, cases in shapes.items()]


# -- The peer's kernels, compiled in parallel: nvcc takes seconds for each.


def warm_peer(cases: Sequence[tuple[str, Shape]], workers: int) -> None:
    """Fill DeepGEMM's disk cache (``DG_JIT_CACHE_DIR``) with the kernels of ``cases``."""
    with harness.spawn_pool(workers) as pool:
        problems = {text for text in pool.map(_call_peer, cases) if text is not None}
    say(f"warm-peer: {len(cases)} calls of DeepGEMM, {len(problems)} different errors")
    for text in sorted(problems):
        say(f"  {text}")


def _call_peer(case: tuple[str, Shape]) -> str | None:
    recipe, shape = case
    try:
        _deepgemm(recipe, Inputs(shape)).call()
        torch.cuda.synchronize()
    except Exception as error:
        return harness.error_text(error)
    return None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dense", description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--m", nargs="+", type=harness.positive, help="values of m (default: those of the set)")
    parser.add_argument(
        "--shapes", nargs="+", default=["listed"], help="listed (DeepSeek-V3's), unlisted (others), or layers as N,K"
    )
    parser.add_argument("--samples", type=harness.positive, help="timed calls each (default 30; 100 below 20 us)")
    parser.add_argument("--seed", type=int, default=0)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--out", type=Path, help="CSV file to write")
    output.add_argument("--report", type=Path, metavar="DIR", help="directory for the CSV, a table and plots")
    report.add_sweep_option(parser)
    parser.add_argument("--warm-peer", action="store_true", help="compile DeepGEMM's kernels in parallel first")
    parser.add_argument("--no-prewarm", action="store_true", help="our kernels are cached already")
    parser.add_argument("--list", action="store_true", help="print the shapes and their floors; needs no GPU")
    harness.add_jobs_option(parser)
    options = parser.parse_args(arguments)
    known = SETS.get(" ".join(options.shapes))
    try:
        ms, options.layers = known or (MS, [harness.layer(text) for text in options.shapes])
    except (ValueError, argparse.ArgumentTypeError):
        parser.error(f"--shapes is {' '.join(options.shapes)}; accepted is {' or '.join(SETS)} or layers as N,K")
    if options.sweep and options.report is None:
        parser.error("--sweep is for the plots of --report")
    options.m = options.m or list(ms)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = parse(arguments)
    shapes = dense_shapes(options.m, options.layers)
    cases = [(recipe, shape) for recipe in options.recipes for shape in shapes]
    if options.list:
        floors = [(NAMES[r], str(s), floor_us(s, RECIPES[NAMES[r]].operand_bytes)) for r, s in cases]
        print(harness.table(("recipe", "m x n x k", "floor us"), floors))
        return 0
    if options.report is not None:
        report.require_matplotlib()
        options.report.mkdir(parents=True, exist_ok=True)
        options.out = options.report / "dense.csv"
    harness.require_gpu()
    measured = provenance()
    say(measured)
    if not options.no_prewarm:
        layers = [GemmProblem(n, k, NAMES[recipe]) for recipe in options.recipes for n, k in options.layers]
        harness.prewarm(layers, options.jobs)
    if options.warm_peer:
        warm_peer(cases, 14)

    timer, rows = CudaTimer(), []
    with CsvLog(options.out, COLUMNS) as log:
        for index, (recipe, shape) in enumerate(cases):
            try:
                inputs = Inputs(shape, options.seed + index)
                row = run_shape(recipe, inputs, harness.preset_name(), options.samples, timer)
            except RuntimeError as error:
                say(f"stopped at {recipe} {shape}: {harness.error_text(error)}")
                break
            row["measured"] = measured
            rows.append(row)
            log.write(row)
            say(progress(row))
    print()
    empty = harness.geomean([row["empty_us"] for row in rows if row["empty_us"] is not None])
    print(f"ratio: best peer / ours. An empty kernel takes {harness.fixed(empty)} us here. {measured}")
    if timer.exposed:
        print(f"{timer.exposed} samples include host time: a contender waits for the GPU")
    missing = faults(rows)
    if missing:
        print("missing:", *missing, sep="\n  ")
    print(report.summary(rows))
    if options.report is not None:
        regrets = report.regrets_of(options.sweep, harness.preset_name())
        paths = report.write(rows, options.report, options.out.name, regrets)
        print("written:", options.out, *paths, sep="\n  ")
    return int(len(rows) < len(cases) or any(row["ours_us"] is None for row in rows))


def provenance() -> str:
    """When, on what and with which versions a race is run."""
    driver = driver_version()
    parts = [datetime.date.today().isoformat(), harness.machine(), f"NVRTC {find_nvrtc().version_text}"]
    if driver is not None:
        parts.append(f"driver for CUDA {version_text(driver)}")
    try:
        parts.append(f"sgl-deep-gemm {importlib.metadata.version('sgl-deep-gemm')}")
    except importlib.metadata.PackageNotFoundError:
        parts.append("no sgl-deep-gemm")
    return ", ".join(parts)


def progress(row: Mapping[str, Any]) -> str:
    """One line on a raced shape."""
    peers = " ".join(
        f"{column.removesuffix('_us')} {harness.fixed(row[column])}" for column in PEER_COLUMNS if row[column]
    )
    return (
        f"{row['case']:<40} ours {harness.fixed(row['ours_us'])}  {peers}  ratio {harness.fixed(row['ratio'], 3)}"
        f"  over floor {harness.fixed(row['over_floor'])}  {row['config']}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
