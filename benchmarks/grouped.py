"""Grouped GEMMs along m raced against DeepGEMM: masked, contiguous and psum layouts. ::

    python -m benchmarks.grouped --warm-peer --out grouped.csv
    python -m benchmarks.grouped --cases masked --groups 8 --m 20 192 --layers 4096,7168

m is rows per group, all of them the same. Masked: A has room for twice as many, at least 64. Contiguous and psum:
groups start at multiples of 128. Both multiply the same tensors, with A's scales MN-major; results are compared with
the reference first, ours into an output of NaN. The floor is max(4.8 us + bytes of all weights / 4.3 TB/s,
3.6 us + FLOP / 1700 TFLOP/s), 900 for BF16. Exit codes: 0 done, 1 something of ours is missing or wrong, 3 no GPU, 4
DeepGEMM can't compute what it is to be raced on: that is tried first.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jitgemm
from benchmarks import harness
from benchmarks.dense import provenance
from benchmarks.harness import EMPTY, Call, CsvLog, CudaTimer, Timer, race, say
from benchmarks.operands import poisoned, random_matrix
from jitgemm.device import PRESETS
from jitgemm.families.grouped import FAMILY, GroupedProblem
from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES
from jitgemm.heuristics import grouped as heuristics
from jitgemm.reference import grouped as reference
from jitgemm.reference.gemm import Errors, error_measures, tolerance
from jitgemm.reference.quantize import align

NAMES = {"fp8": "fp8_1x128_128x128", "bf16": "bf16"}
CASES = ("masked", "contiguous", "psum")
LAYERS = ((4096, 7168), (7168, 2048), (4096, 4096), (4096, 2048), (6144, 7168), (7168, 3072))
MS = {
    "masked": (1, 4, 8, 16, 20, 64, 96, 128, 192, 320, 1024),
    "contiguous": (128, 256, 1024, 4096),
    "psum": (128, 256, 1024, 4096),
}
GROUPS = {"masked": (4, 8, 32), "contiguous": (4, 8), "psum": (4, 8)}
CLASSES = ((1, 64), (65, 320), (321, 2**31))  # of masked m, as the targets are set
COLUMNS = (
    *("case", "m", "n", "k", "groups", "recipe", "ours_us", "best_peer_us", "best_peer", "ratio", "floor_us"),
    *("over_floor", "config", "empty_us", "samples", "errors", "measured"),
)
PEER, OURS = "deepgemm", "jitgemm"
_ALIGNMENT = 128
_ROOM = 64  # rows of a masked group at least
_MAX_BYTES = 60e9
_PEER_BOUND = Errors(1e-3, float("inf"))


@dataclass(frozen=True)
class Shape:
    """What is raced; m is rows per group."""

    case: str
    recipe: str
    m: int
    n: int
    k: int
    groups: int

    def __str__(self) -> str:
        return f"{self.case} {NAMES[self.recipe]} {self.groups} x {self.m}x{self.n}x{self.k}"

    @property
    def problem(self) -> GroupedProblem:
        """The problem that ours is asked."""
        return GroupedProblem(self.n, self.k, NAMES[self.recipe], self.groups, self.case, self.m)

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return 1 if self.recipe == "fp8" else 2


def floor_us(shape: Shape) -> float:
    """What no kernel gets below."""
    weights = shape.groups * shape.n * shape.k * shape.size
    flop = 2 * shape.groups * shape.m * shape.n * shape.k
    return max(4.8 + weights / 4.3e6, 3.6 + flop / (1700e6 if shape.recipe == "fp8" else 900e6))


class Inputs:
    """Operands of one shape."""

    def __init__(self, shape: Shape, seed: int = 0, device: str = "cuda") -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(seed)
        groups, m, n, k = shape.groups, shape.m, shape.n, shape.k
        each = max(_ROOM, 2 * m) if shape.case == "masked" else align(m, _ALIGNMENT)
        self.rows = (groups, each) if shape.case == "masked" else (groups * each,)
        place = torch.arange(each, device=device).repeat(groups)
        group = torch.arange(groups, device=device).repeat_interleave(each)
        self.used = (place < m).view(self.rows)
        if shape.case == "masked":
            layout = torch.full((groups,), m, device=device)
        elif shape.case == "psum":
            layout = torch.arange(groups, device=device) * each + m
        else:
            layout = torch.where(place < m, group, -1)
        self.layout = layout.to(torch.int32)
        a = random_matrix(groups * each, k, generator)
        b = torch.stack([random_matrix(n, k, generator) for _ in range(groups)])
        self.a_scales: Tensor | None = None
        self.b_scales: Tensor | None = None
        if shape.recipe == "fp8":
            a, a_scales = jitgemm.per_token_cast_to_fp8(a)
            cast = [jitgemm.per_block_cast_to_fp8(part) for part in b]
            b = torch.stack([data.view(torch.uint8) for data, _ in cast]).view(torch.float8_e4m3fn)
            self.a_scales = jitgemm.get_mn_major_tma_aligned_tensor(a_scales.view(*self.rows, -1).contiguous())
            self.b_scales = torch.stack([scales for _, scales in cast])
        self.a, self.b = a.view(*self.rows, k), b
        self._expected: Tensor | None = None

    def output(self) -> Tensor:
        """A result that is still to be computed."""
        return poisoned((*self.rows, self.shape.n), torch.bfloat16, self.a.device)

    def call_of(self, library: Any, d: Tensor) -> Call:
        """The call of a library that has the peer's names."""
        shape, a, b = self.shape, self.a, self.b
        first: Any = a if self.a_scales is None else (a, self.a_scales)
        second: Any = b if self.b_scales is None else (b, self.b_scales)
        layout = self.layout
        if shape.case == "masked":
            masked = getattr(library, f"{shape.recipe}_m_grouped_gemm_nt_masked")
            return lambda: masked(first, second, d, layout, shape.m)
        contiguous = getattr(library, f"m_grouped_{shape.recipe}_gemm_nt_contiguous")
        more = {"use_psum_layout": True} if shape.case == "psum" else {}
        return lambda: contiguous(first, second, d, layout, **more)

    def check(self, name: str, d: Tensor) -> None:
        """Compare the first and the last group with the reference.

        Raises:
            ArithmeticError: they are wrong.
        """
        shape = self.shape
        if self._expected is None:
            parts = []
            for group in (0, shape.groups - 1):
                place = self._place(group)
                part = torch.empty((1, shape.m, shape.n), dtype=d.dtype, device=d.device)
                reference.m_grouped_masked(
                    self.a[place][None],
                    self.b[group : group + 1],
                    part,
                    torch.tensor([shape.m], dtype=torch.int32, device=d.device),
                    a_scales=None if self.a_scales is None else self.a_scales[place][None],
                    b_scales=None if self.b_scales is None else self.b_scales[group : group + 1],
                    recipe=NAMES[shape.recipe],
                )
                parts.append(part[0])
            self._expected = torch.cat(parts)
        found = torch.cat([d[self._place(group)] for group in (0, shape.groups - 1)])
        errors = error_measures(found, self._expected)
        bounds = tolerance(NAMES[shape.recipe], "bf16") if name == OURS else _PEER_BOUND
        if not errors.within(bounds) or not bool(d[self.used].isfinite().all()):
            raise ArithmeticError(f"wrong result: cosine {errors.cosine:.3g}, Frobenius {errors.frobenius:.3g}")

    def _place(self, group: int) -> Any:
        m = self.shape.m
        if self.shape.case == "masked":
            return group, slice(0, m)
        first = group * (self.rows[0] // self.shape.groups)
        return slice(first, first + m)


def _library(name: str) -> Any:
    if name == OURS:
        return jitgemm
    import deep_gemm

    return deep_gemm


def run_shape(
    inputs: Inputs, preset: str, samples: int | None, timer: Timer, names: Sequence[str] = (OURS, PEER)
) -> dict[str, Any]:
    """Race one shape; a row of the CSV but for ``measured``."""
    contenders: dict[str, Call] = {}
    errors: dict[str, str] = {}
    for name in names:
        try:
            d = inputs.output()
            call = inputs.call_of(_library(name), d)
            call()
            inputs.check(name, d)
            contenders[name] = call
        except Exception as error:
            timer.check()
            errors[name] = harness.error_text(error)
    timings = race(contenders, samples, timer)
    errors.update({name: timing.error for name, timing in timings.items() if timing.error is not None})
    medians = {name: t.median_us for name, t in timings.items() if t.median_us is not None}
    config = str(heuristics.choose_config(inputs.shape.problem, PRESETS[preset]))
    return make_row(inputs.shape, config, medians, errors, timings[EMPTY].samples)


def make_row(
    shape: Shape, config: str, medians: Mapping[str, float], errors: Mapping[str, str], samples: int
) -> dict[str, Any]:
    """A row of the CSV but for when and on what it was measured; what is missing is None."""
    ours, peer, floor = medians.get(OURS), medians.get(PEER), floor_us(shape)
    return {
        "case": shape.case,
        "m": shape.m,
        "n": shape.n,
        "k": shape.k,
        "groups": shape.groups,
        "recipe": NAMES[shape.recipe],
        "ours_us": ours,
        "best_peer_us": peer,
        "best_peer": None if peer is None else PEER,
        "ratio": None if peer is None or ours is None else peer / ours,
        "floor_us": floor,
        "over_floor": None if ours is None else ours / floor,
        "config": config,
        "empty_us": medians.get(EMPTY),
        "samples": samples,
        "errors": " | ".join(f"{name}: {text}" for name, text in errors.items()),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Geomean and worst ratio of each class, and the worst shape by name."""
    classes: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = f"{row['case']} {row['recipe']}"
        if row["case"] == "masked":
            low, high = next(bounds for bounds in CLASSES if row["m"] <= bounds[1])
            name += f", m {low} to {high}" if high < 2**31 else f", m from {low}"
        classes.setdefault(name, []).append(row)
    lines = []
    for name, members in classes.items():
        raced = [row for row in members if row["ratio"] is not None]
        if not raced:
            lines.append((name, f"0/{len(members)}", None, None, None, ""))
            continue
        worst = min(raced, key=lambda row: row["ratio"])
        lines.append(
            (
                name,
                f"{len(raced)}/{len(members)}",
                f"{harness.geomean([row['ratio'] for row in raced]):.3f}",
                f"{worst['ratio']:.3f}",
                f"{harness.geomean([row['over_floor'] for row in raced]):.3f}",
                f"{worst['groups']} x {worst['m']}x{worst['n']}x{worst['k']}",
            )
        )
    return harness.table(("class", "raced", "ratio", "worst", "over floor", "worst shape"), lines)


def shapes_of(options: argparse.Namespace) -> list[Shape]:
    """What the options ask for, less what does not fit into memory."""
    found = []
    for case in options.cases:
        for recipe in options.recipes:
            for groups in options.groups or GROUPS[case]:
                for n, k in options.layers:
                    for m in options.m or MS[case]:
                        shape = Shape(case, recipe, m, n, k, groups)
                        if groups * (n * k + 2 * m * (n + k)) * shape.size * 3 < _MAX_BYTES:
                            found.append(shape)
    return found


def needed(shape: Shape, preset: str) -> list[Any]:
    """The kernels of a shape."""
    device = PRESETS[preset]
    problem = shape.problem
    return [
        FAMILY.spec(problem, heuristics.choose_config(problem, device), device.arch.name),
        TRANSPOSE_SCALES.spec(device.arch.name),
    ]


def missing_of_peer(shapes: Sequence[Shape]) -> list[str]:
    """What fails of DeepGEMM on a small problem of each kind that is to be raced."""
    kinds = dict.fromkeys((shape.case, shape.recipe) for shape in shapes)
    with harness.spawn_pool(1) as pool:
        errors = pool.map(_call_peer, [Shape(case, recipe, 128, 256, 256, 2) for case, recipe in kinds])
        return [
            f"{case} {NAMES[recipe]}: {error}" for (case, recipe), error in zip(kinds, errors, strict=True) if error
        ]


def warm_peer(shapes: Sequence[Shape], workers: int) -> None:
    """Fill DeepGEMM's disk cache with the kernels of the shapes."""
    with harness.spawn_pool(workers) as pool:
        problems = {text for text in pool.map(_call_peer, shapes) if text is not None}
    say(f"warm-peer: {len(shapes)} calls of DeepGEMM, {len(problems)} different errors")
    for text in sorted(problems):
        say(f"  {text}")


def _call_peer(shape: Shape) -> str | None:
    try:
        inputs = Inputs(shape)
        inputs.call_of(_library(PEER), inputs.output())()
        torch.cuda.synchronize()
    except Exception as error:
        return harness.error_text(error)
    return None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grouped", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["masked", "contiguous"])
    parser.add_argument("--recipes", nargs="+", choices=list(NAMES), default=["fp8"])
    parser.add_argument("--groups", nargs="+", type=harness.positive, help="numbers of groups (default: the case's)")
    parser.add_argument("--m", nargs="+", type=harness.positive, help="rows per group (default: the case's)")
    parser.add_argument("--layers", nargs="+", type=harness.layer, default=list(LAYERS), metavar="N,K")
    parser.add_argument("--samples", type=harness.positive, help="timed calls each (default 30; 100 below 20 us)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--no-peer", action="store_true", help="time jitgemm alone")
    parser.add_argument("--warm-peer", action="store_true", help="compile DeepGEMM's kernels in parallel first")
    parser.add_argument("--list", action="store_true", help="print the shapes and their floors; needs no GPU")
    harness.add_jobs_option(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = parse(arguments)
    shapes = shapes_of(options)
    if options.list:
        print(harness.table(("shape", "floor us"), [(str(shape), floor_us(shape)) for shape in shapes]))
        return 0
    harness.require_gpu()
    measured, preset = provenance(), harness.preset_name()
    say(measured)
    if not options.no_peer and (missing := missing_of_peer(shapes)):
        say("\n  ".join(["DeepGEMM can't be raced (--no-peer does without it):", *missing]))
        return 4
    harness.build_all(list(dict.fromkeys(spec for shape in shapes for spec in needed(shape, preset))), options.jobs)
    if options.warm_peer and not options.no_peer:
        warm_peer(shapes, 8)
    timer, rows = CudaTimer(), []
    with CsvLog(options.out, COLUMNS) as log:
        for index, shape in enumerate(shapes):
            try:
                names = (OURS,) if options.no_peer else (OURS, PEER)
                row = run_shape(Inputs(shape, options.seed + index), preset, options.samples, timer, names)
            except RuntimeError as error:
                say(f"stopped at {shape}: {harness.error_text(error)}")
                break
            row["measured"] = measured
            rows.append(row)
            log.write(row)
            say(
                f"{shape!s:<60} ours {harness.fixed(row['ours_us'])}  deepgemm {harness.fixed(row['best_peer_us'])}"
                f"  ratio {harness.fixed(row['ratio'], 3)}  over floor {harness.fixed(row['over_floor'])}"
                f"  {row['config']}  {row['errors']}"
            )
    print(summary(rows))
    return int(len(rows) < len(shapes) or any(row["ours_us"] is None for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
