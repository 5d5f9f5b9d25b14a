"""Every recipe against float64: on the 56 shapes, and on random ragged problems. ::

    python -m benchmarks.numerics            # all
    python -m benchmarks.numerics --quick    # a part, for a look in between

The calls go through the public API. A case passes if the result

- is within ``jitgemm.reference.gemm.tolerance``, and no element is further from the reference, beyond its own rounding,
  than 10 times the bound on the Frobenius error times the result's root mean square (one wrong row of thousands would
  hide in a norm);
- has no NaN: outputs are NaN before the call;
- leaves the poison around D (a row above and below, and the margins of a strided D) as it was; what lies around the
  operands is NaN, which would show if it were used;
- has the same bits the second time.

In the 56 shapes, results of more than 512 rows are compared on 256 random rows and the last 128: a row of D depends
on that row of A alone, and float64 is slow. That all elements are finite is checked everywhere. Ragged problems are
compared in full. ``--device cpu`` checks the check itself, with the reference in place of the kernels.

Exit codes: 0 all passed, 1 a case failed, 3 no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import jitgemm
from benchmarks import harness
from benchmarks.harness import CsvLog, say
from benchmarks.operands import (
    D_DTYPES,
    Embedded,
    lay_out_scales,
    quantize,
    random_matrix,
    same_bits,
    sample_rows,
)
from benchmarks.shapes import MS, Case, dense_cases, dense_shapes, ragged_cases
from jitgemm.reference.gemm import Errors, error_measures, tolerance

RAGGED = 240
QUICK_MS, QUICK_RAGGED = (1, 64, 512, 4096), 60
ELEMENT_FACTOR = 10.0
ROUNDING = {"bf16": 2.0**-7, "fp32": 2.0**-10}  # of an element: a unit of bf16, and some of what FP8 sums keep
UNKNOWN = Errors(float("nan"), float("nan"))
COLUMNS = ("case", "kind", "cosine", "frobenius", "element", "failures")


@dataclass
class Outcome:
    """What one case measured, and what is wrong with it."""

    case: Case
    errors: Errors = UNKNOWN
    element: float = float("nan")
    """How far beyond its rounding any element is from the reference, over the reference's root mean square."""
    failures: list[str] = field(default_factory=list)


class Call:
    """The tensors of a case, as they lie in memory, and the call."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        m, n, k = case.shape.m, case.shape.n, case.shape.k
        generator = torch.Generator(device).manual_seed(case.seed)
        a, b = (random_matrix(rows, k, generator, spread=True) for rows in (m, n))
        self.operands = quantize(case.recipe, a, b)
        del a, b
        self.c: Tensor | None = None
        dtype = D_DTYPES[case.d_dtype]
        if case.c != "none":  # of about the product's size
            self.c = (random_matrix(m, n, generator) * k**0.5).to(dtype)
        self.rows = sample_rows(m, generator) if case.sampled else None

        self._a = _stored(self.operands.a, case.layout[0] == "t", case.a_margin)
        self._b = _stored(self.operands.b, case.layout[1] == "n", case.b_margin)
        self._scales = [
            None if scales is None else lay_out_scales(scales, case.scales)
            for scales in (self.operands.a_scales, self.operands.b_scales)
        ]
        self._c = None
        if self.c is not None and case.c == "given":
            self._c = Embedded((m, n), dtype, device, case.c_margin).fill(self.c)

    def run(self) -> Embedded:
        """Compute D, with poison in it (or C, in place) and around it."""
        case = self.case
        m, n = case.shape.m, case.shape.n
        d = Embedded((m, n), D_DTYPES[case.d_dtype], self.operands.a.device, case.d_margin)
        c = self._c
        if case.c == "in_place":
            assert self.c is not None
            c = d.fill(self.c)
        if case.recipe == "bf16":
            function = getattr(jitgemm, f"bf16_gemm_{case.layout}")
            function(self._a, self._b, d.view, c)
        else:
            (a_scales, b_scales), recipe = self._scales, case.recipe
            scaled_a, scaled_b = (self._a, a_scales), (self._b, b_scales)
            jitgemm.fp8_gemm_nt(scaled_a, scaled_b, d.view, c, recipe=recipe, fast_accum=case.fast_accum)
        return d

    def expected(self) -> Tensor:
        """The result, or the sampled rows of it."""
        return self.operands.product(self.case.d_dtype, self.rows, self.c)


def _stored(x: Tensor, transposed: bool, margin: tuple[int, int]) -> Tensor:
    x = x.t() if transposed else x
    rows, columns = x.shape
    return Embedded((rows, columns), x.dtype, x.device, margin, unit=16 // x.element_size()).fill(x)


def check(case: Case, device: torch.device) -> Outcome:
    """Run one case twice and compare."""
    call = Call(case, device)
    first, second = call.run(), call.run()
    d = first.view if call.rows is None else first.view[call.rows]
    return judge(case, d, call.expected(), first, second)


def judge(case: Case, d: Tensor, expected: Tensor, first: Embedded, second: Embedded) -> Outcome:
    """Compare the (sampled) result ``d`` of the first of two runs."""
    bounds = tolerance(case.recipe, case.d_dtype, case.fast_accum)
    excess = _excess(case, d, expected)
    outcome = Outcome(case, error_measures(d, expected), float(excess.max()))
    failures = outcome.failures
    if not outcome.errors.within(bounds):
        failures.append(
            f"cosine {outcome.errors.cosine:.3g} (bound {bounds.cosine:g}),"
            f" Frobenius {outcome.errors.frobenius:.3g} (bound {bounds.frobenius:g})"
        )
    if not outcome.element <= ELEMENT_FACTOR * bounds.frobenius:
        row, column = divmod(int(excess.argmax()), d.shape[1])
        at = "of the sampled rows" if case.sampled else "of D"
        failures.append(
            f"element ({row}, {column}) {at} is {float(d[row, column]):g}, expected {float(expected[row, column]):g}"
        )
    unwritten = int((~first.view.isfinite()).sum())
    if unwritten:
        failures.append(f"{unwritten} elements of D are NaN or Inf")
    if not (first.intact() and second.intact()):
        failures.append("wrote around D")
    if not same_bits(first.view, second.view):
        failures.append("another result the second time")
    return outcome


def _excess(case: Case, d: Tensor, expected: Tensor) -> Tensor:
    """How far each element is from the reference beyond its rounding, over the reference's root mean square."""
    expected = expected.float()
    distance = (d.float() - expected).abs() - ROUNDING[case.d_dtype] * expected.abs()
    return distance.clamp(min=0).nan_to_num(nan=float("inf")) / expected.square().mean().sqrt().clamp(min=1e-30)


def report(outcomes: Sequence[Outcome]) -> str:
    """The worst errors of each kind, beside the bounds."""
    rows = []
    for kind in dict.fromkeys(outcome.case.kind for outcome in outcomes):
        members = [outcome for outcome in outcomes if outcome.case.kind == kind]
        case = members[0].case
        bounds = tolerance(case.recipe, case.d_dtype, case.fast_accum)
        measured = [outcome for outcome in members if outcome.element == outcome.element]
        worst = max(measured, key=lambda outcome: outcome.errors.frobenius, default=None)
        rows.append(
            (
                kind,
                len(members),
                sum(bool(outcome.failures) for outcome in members),
                max((outcome.errors.cosine for outcome in measured), default=None),
                bounds.cosine,
                None if worst is None else worst.errors.frobenius,
                bounds.frobenius,
                max((outcome.element for outcome in measured), default=None),
                ELEMENT_FACTOR * bounds.frobenius,
                None if worst is None else str(worst.case.shape),
            )
        )
    headers = ("kind", "cases", "failed", "cosine", "bound", "Frobenius", "bound", "element", "bound", "worst shape")
    return harness.table(headers, rows)


def select(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    shapes = dense_shapes(QUICK_MS if options.quick else MS)
    ragged = options.ragged if options.ragged is not None else QUICK_RAGGED if options.quick else RAGGED
    cases = dense_cases(shapes, ("bf16",) if options.quick else ("bf16", "fp32")) if options.dense else []
    cases += ragged_cases(ragged, options.seed)
    return [case for case in cases if options.recipes is None or case.recipe in options.recipes]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="half of the m, bf16 results only, fewer ragged problems")
    parser.add_argument("--recipes", nargs="+", metavar="RECIPE", help="only these, such as fp8_rowwise")
    parser.add_argument("--ragged", type=int, metavar="N", help=f"random problems (default {RAGGED})")
    parser.add_argument("--no-dense", dest="dense", action="store_false", help="without the 56 shapes")
    parser.add_argument("--seed", type=int, default=0, help="of the random problems (default 0)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-prewarm", action="store_true", help="the kernels are cached already")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--list", action="store_true", help="print the cases; needs no GPU")
    harness.add_jobs_option(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; the exit code."""
    options = parse(arguments)
    cases = select(options)
    if options.list:
        print(*cases, sep="\n")
        return 0
    if options.device == "cuda":
        harness.require_gpu()
        say(harness.machine())
        if not options.no_prewarm:
            harness.prewarm([case.problem for case in cases], options.jobs)
    outcomes = []
    with CsvLog(options.out, COLUMNS) as log:
        for index, case in enumerate(cases):
            outcome = attempt(case, torch.device(options.device))
            outcomes.append(outcome)
            log.write(_row(outcome))
            for failure in outcome.failures:
                say(f"FAILED {case}: {failure}")
            if (index + 1) % 100 == 0:
                say(f"{index + 1} of {len(cases)}")
            if outcome.failures and options.device == "cuda" and _gpu_is_lost():
                say("the GPU failed; what follows can't run in this process")
                break

    failed = [outcome for outcome in outcomes if outcome.failures]
    print()
    print(report(outcomes))
    print(f"{len(outcomes)} of {len(cases)} cases run, {len(failed)} failed")
    return int(bool(failed) or len(outcomes) < len(cases))


def attempt(case: Case, device: torch.device) -> Outcome:
    """The same as ``check``; an exception is a failure."""
    try:
        return check(case, device)
    except Exception as error:
        return Outcome(case, failures=[harness.error_text(error)])


def _row(outcome: Outcome) -> dict[str, object]:
    values = (f"{value:.3e}" for value in (*outcome.errors, outcome.element))
    return dict(zip(COLUMNS, (outcome.case, outcome.case.kind, *values, " | ".join(outcome.failures)), strict=True))


def _gpu_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


if __name__ == "__main__":
    raise SystemExit(main())
