"""What formats of FP4 weights and of activations' scales cost beside each other, dense. ::

    python -m benchmarks.fp4_formats --out fp4_formats.csv

``mxfp4`` is MXFP4 with fp32 scales of 128 of A; ``packed`` the same with A's scales packed, UE8M0; ``of_32`` with
scales of 32; ``nvfp4`` NVFP4; ``raw`` MXFP4 that each call packs first; ``prepare`` that packing alone; ``fp8`` our FP8
kernel. Columns are medians in us. Each result is first compared with float64 of its own dequantized operands, into an
output of NaN. Exit codes: 0 done, 1 something is missing or wrong, 3 no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jitgemm
from benchmarks import harness
from benchmarks.dense import provenance
from benchmarks.harness import EMPTY, Call, CsvLog, CudaTimer, race, say
from benchmarks.operands import poisoned, random_matrix
from jitgemm.families.gemm import FP4
from jitgemm.reference import fp4
from jitgemm.reference.gemm import check_close
from jitgemm.reference.gemm import gemm as reference

OF_32, NVFP4, FP8 = "fp8_1x32_fp4_1x32", "fp8_1x128_nvfp4_1x16", "fp8_1x128_128x128"
CONTENDERS = ("mxfp4", "packed", "of_32", "nvfp4", "raw", "prepare", "fp8")
LAYERS = ((4096, 7168), (7168, 2048), (24576, 1536), (7168, 16384))
MS = (1, 16, 64, 128, 512, 4096)
COLUMNS = ("m", "n", "k", *(f"{name}_us" for name in CONTENDERS), "empty_us", "errors", "measured")


class Case:
    """Operands of one shape in all formats, of the same matrices."""

    def __init__(self, m: int, n: int, k: int, device: str = "cuda") -> None:
        generator = torch.Generator(device).manual_seed(m)
        a, b = random_matrix(m, k, generator), random_matrix(n, k, generator)
        self.shape = m, n
        self.a = {group: self._activations(a, group, ue8m0=False) for group in (32, 128)}
        self.powers = self._activations(a, 128, ue8m0=True)
        words = jitgemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(self.powers[1])
        self.packed = self.powers[0], words
        codes, scales = jitgemm.per_token_cast_to_fp4(b, True, 32)
        self.mxfp4 = codes, fp4.ue8m0_to_exponents(scales)
        codes, scales = jitgemm.per_token_cast_to_fp4(b, False, 16)
        of_all = float(scales.amax()) / 448
        # Rounded scales: what codes stand for differs from b by some per cent more, which nothing here depends on.
        self.nvfp4 = codes, (scales / of_all).to(torch.float8_e4m3fn), of_all
        self.fp8 = jitgemm.per_block_cast_to_fp8(b)
        self.device = device

    def call_of(self, name: str) -> tuple[Call, Tensor, Any]:
        """The call of a contender, its output, and a function that gives what that should be."""
        d = poisoned(self.shape, torch.bfloat16, torch.device(self.device))
        if name == "prepare":
            return lambda: jitgemm.prepare_fp4_weights(*self.mxfp4), d, None
        if name == "fp8":
            a, b = self.a[128], self.fp8
            return (
                lambda: jitgemm.fp8_gemm_nt(a, b, d),
                d,
                lambda: reference(a[0], b[0], a_scales=a[1], b_scales=b[1], recipe=FP8),
            )
        weights: Any = self.nvfp4 if name == "nvfp4" else self.mxfp4
        given: Any = weights if name == "raw" else jitgemm.prepare_fp4_weights(*weights)
        a = self.packed if name == "packed" else self.a[32 if name == "of_32" else 128]
        floats = self.powers if name == "packed" else a
        recipe = OF_32 if name == "of_32" else NVFP4 if name == "nvfp4" else FP4

        def expected() -> Tensor:
            if name == "nvfp4":
                units = torch.full(self.shape[1:], self.nvfp4[2], device=d.device)
                plain = fp4.dequantize_nvfp4(self.nvfp4[0], self.nvfp4[1], units)
            else:
                plain = fp4.dequantize_fp4(*self.mxfp4)
            return reference(floats[0], plain, a_scales=floats[1], recipe=recipe)

        return lambda: jitgemm.fp8_fp4_gemm_nt(a, given, d, recipe=recipe), d, expected

    def check(self, name: str) -> Call:
        """The call of a contender, once its result is found right.

        Raises:
            AssertionError: it is wrong.
        """
        call, d, expected = self.call_of(name)
        call()
        if expected is not None:
            check_close(d, expected(), recipe=FP8 if name == "fp8" else FP4, d_dtype="bf16", what=name)
        return call

    def _activations(self, a: Tensor, group: int, ue8m0: bool) -> tuple[Tensor, Tensor]:
        data, scales = jitgemm.per_token_cast_to_fp8(a, ue8m0, group)
        return data, jitgemm.get_mn_major_tma_aligned_tensor(scales)


def run_shape(case: Case, samples: int | None, timer: CudaTimer) -> dict[str, Any]:
    """Race one shape; a row of the CSV but for its sizes and ``measured``."""
    contenders: dict[str, Call] = {}
    errors: dict[str, str] = {}
    for name in CONTENDERS:
        try:
            contenders[name] = case.check(name)
        except Exception as error:
            timer.check()
            errors[name] = harness.error_text(error)
    timings = race(contenders, samples, timer)
    errors.update({name: timing.error for name, timing in timings.items() if timing.error is not None})
    medians = {name: timing.median_us for name, timing in timings.items()}
    return {
        **{f"{name}_us": medians.get(name) for name in CONTENDERS},
        "empty_us": medians.get(EMPTY),
        "errors": " | ".join(f"{name}: {text}" for name, text in errors.items()),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp4_formats", description=__doc__.split("\n")[0])
    parser.add_argument("--m", nargs="+", type=harness.positive, default=list(MS), help="rows")
    parser.add_argument("--layers", nargs="+", type=harness.layer, metavar="N,K", default=list(LAYERS))
    parser.add_argument("--samples", type=harness.positive, help="timed calls each (default 30; 100 below 20 us)")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--list", action="store_true", help="print the shapes; needs no GPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = parse(arguments)
    shapes = [(m, n, k) for n, k in options.layers for m in options.m]
    if options.list:
        print(harness.table(("m", "n", "k"), shapes))
        return 0
    harness.require_gpu()
    measured, timer, rows = provenance(), CudaTimer(), []
    say(measured)
    with CsvLog(options.out, COLUMNS) as log:
        for m, n, k in shapes:
            row = {"m": m, "n": n, "k": k, **run_shape(Case(m, n, k), options.samples, timer), "measured": measured}
            rows.append(row)
            log.write(row)
            say(f"{m}x{n}x{k:<8} {row['errors']}")
    columns = COLUMNS[: 3 + len(CONTENDERS)]
    shown = [[row[name] if name in "mnk" else harness.fixed(row[name]) for name in columns] for row in rows]
    print(harness.table(columns, shown))
    return int(any(row["errors"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
