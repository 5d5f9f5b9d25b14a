"""Grouped GEMMs raced against DeepGEMM: masked, contiguous and psum layouts, fused, groups along K, and einsum. ::

    python -m benchmarks.grouped --warm-peer --out grouped.csv
    python -m benchmarks.grouped --cases masked --groups 8 --m 20 192 --layers 4096,7168
    python -m benchmarks.grouped --cases k_grouped einsum --recipes fp8 bf16

m is rows per group, all of them the same. Masked: A has room for twice as many, at least 64. Contiguous and psum:
groups start at multiples of 128. Both multiply the same tensors, with A's scales MN-major; results are compared with
the reference first, ours into an output of NaN. Fused: masked FP8, n columns of gate and up, with SwiGLU and
quantization in the same kernel; the peer's GEMM is followed by the kernel of ``benchmarks.fused``. The floor is
max(4.8 us + bytes of all weights / 4.3 TB/s, 3.6 us + FLOP / 1700 TFLOP/s), 900 for BF16. Groups along K and einsum:
see ``benchmarks.batched``. Exit codes: 0 done, 1 something of ours is missing or wrong, 3 no GPU, 4
DeepGEMM can't compute what it is to be raced on: that is tried first.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jitgemm
from benchmarks import batched, fused, harness
from benchmarks.dense import provenance
from benchmarks.harness import EMPTY, Call, CsvLog, CudaTimer, Timer, race, say
from benchmarks.operands import poisoned, random_matrix
from jitgemm.device import PRESETS
from jitgemm.families import batched as batched_family
from jitgemm.families.grouped import FAMILY, GroupedProblem
from jitgemm.families.transpose_scales import FAMILY as TRANSPOSE_SCALES
from jitgemm.heuristics import batched as batched_heuristics
from jitgemm.heuristics import grouped as heuristics
from jitgemm.reference import grouped as reference
from jitgemm.reference.gemm import Errors, error_measures, tolerance
from jitgemm.reference.quantize import align

NAMES = {"fp8": "fp8_1x128_128x128", "bf16": "bf16"}
CASES = ("masked", "contiguous", "psum", "fused")
ALL_CASES = (*CASES, *batched.CASES)
LAYERS = ((4096, 7168), (7168, 2048), (4096, 4096), (4096, 2048), (6144, 7168), (7168, 3072))
MS = {
    "masked": (1, 4, 8, 16, 20, 64, 96, 128, 192, 320, 1024),
    "contiguous": (128, 256, 1024, 4096),
    "psum": (128, 256, 1024, 4096),
    "fused": (1, 8, 16, 64, 128, 1024, 4096),
}
GROUPS = {"masked": (4, 8, 32), "contiguous": (4, 8), "psum": (4, 8), "fused": (8, 32)}
FUSED_LAYERS = ((4096, 7168), (4096, 4096), (3072, 2048))  # gate and up together
CLASSES = ((1, 64), (65, 320), (321, 2**31))  # of masked m, as the targets are set
COLUMNS = (
    *("case", "m", "n", "k", "groups", "recipe", "ours_us", "best_peer_us", "best_peer", "ratio", "floor_us"),
    *("over_floor", "config", "empty_us", "samples", "errors", "measured"),
)
PEER, OURS, TORCH = "deepgemm", "jitgemm", "torch"
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
        recipe = NAMES[self.recipe]
        if self.case == "fused":
            return GroupedProblem(
                *(self.n, self.k, recipe, self.groups, "masked", self.m), d_dtype="e4m3", epilogue="swiglu"
            )
        return GroupedProblem(self.n, self.k, recipe, self.groups, self.case, self.m)

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return 1 if self.recipe == "fp8" else 2


def floor_us(shape: Shape | batched.Shape) -> float:
    """What no kernel gets below."""
    if isinstance(shape, batched.Shape):
        return shape.floor_us
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


class FusedInputs:
    """Operands of one shape of case ``fused``."""

    def __init__(self, shape: Shape, seed: int = 0, device: str = "cuda") -> None:
        self.shape = shape
        self._masked = Inputs(dataclasses.replace(shape, case="masked"), seed, device)
        assert self._masked.b_scales is not None
        self._layer = fused.Layer(self._masked.b, self._masked.b_scales)

    def output(self) -> tuple[Tensor, Tensor]:
        """A result that is still to be computed."""
        values, scales = jitgemm.empty_quantized((*self._masked.rows, self.shape.n // 2), device=self._masked.a.device)
        values.view(torch.uint8).fill_(0x7F)
        return values, scales.fill_(torch.nan)

    def call_of(self, library: Any, d: tuple[Tensor, Tensor]) -> Call:
        """One kernel of ours, or two."""
        inputs, m = self._masked, self.shape.m
        a, layout = (inputs.a, inputs.a_scales), inputs.layout
        run = library.fp8_m_grouped_gemm_nt_masked
        if library is jitgemm:
            b, epilogue = self._layer.interleaved, jitgemm.Epilogue(swiglu=True)
            return lambda: run(a, b, d, layout, m, epilogue=epilogue)
        between = inputs.output()
        b, second = self._layer.stacked, fused.SwigluQuantize(between, d, layout, m)

        def both() -> None:
            run(a, b, between, layout, m)
            second()

        return both

    def check(self, name: str, d: tuple[Tensor, Tensor]) -> None:
        """Compare the first and the last group with the reference.

        Raises:
            ArithmeticError: they are wrong.
        """
        inputs, shape = self._masked, self.shape
        for group in (0, shape.groups - 1):
            product = torch.empty((1, shape.m, shape.n), dtype=torch.float32, device=inputs.a.device)
            assert inputs.a_scales is not None
            assert inputs.b_scales is not None
            reference.m_grouped_masked(
                inputs.a[group : group + 1, : shape.m],
                inputs.b[group : group + 1],
                product,
                torch.tensor([shape.m], dtype=torch.int32, device=product.device),
                a_scales=inputs.a_scales[group : group + 1, : shape.m],
                b_scales=inputs.b_scales[group : group + 1],
                recipe=NAMES[shape.recipe],
            )
            fused.check(d, product[0], group, shape.m)


AnyInputs = Inputs | FusedInputs | batched.Inputs


def inputs_of(shape: Shape | batched.Shape, seed: int = 0) -> AnyInputs:
    """The operands of a shape."""
    if isinstance(shape, batched.Shape):
        return batched.Inputs(shape, seed)
    return FusedInputs(shape, seed) if shape.case == "fused" else Inputs(shape, seed)


def _library(name: str) -> Any:
    if name == OURS:
        return jitgemm
    if name == TORCH:
        return torch
    import deep_gemm

    return deep_gemm


def check(inputs: AnyInputs, name: str, d: Any) -> None:
    """Compare a result with the reference.

    Raises:
        ArithmeticError: it is wrong.
    """
    if not isinstance(inputs, batched.Inputs):
        inputs.check(name, d)
        return
    found, expected = inputs.found(d), inputs.expected()
    errors = error_measures(found.flatten(0, -2), expected.flatten(0, -2))
    d_dtype = "fp32" if d.dtype == torch.float32 else "bf16"
    bounds = tolerance(inputs.shape.name, d_dtype) if name == OURS else _PEER_BOUND
    if not errors.within(bounds):
        raise ArithmeticError(f"wrong result: cosine {errors.cosine:.3g}, Frobenius {errors.frobenius:.3g}")


def config_of(shape: Shape | batched.Shape, preset: str) -> str:
    """What ours chooses."""
    if isinstance(shape, batched.Shape):
        return str(batched_heuristics.choose_config(shape.problem, PRESETS[preset]))
    return str(heuristics.choose_config(shape.problem, PRESETS[preset]))


def run_shape(
    inputs: AnyInputs, preset: str, samples: int | None, timer: Timer, with_peer: bool = True
) -> dict[str, Any]:
    """Race one shape; a row of the CSV but for ``measured``."""
    contenders: dict[str, Call] = {}
    errors: dict[str, str] = {}
    of_torch = (TORCH,) if inputs.shape.case == "einsum" and inputs.shape.recipe == "bf16" else ()
    for name in (OURS, *((PEER,) if with_peer else ()), *of_torch):
        try:
            d: Any = inputs.output()
            call = inputs.call_of(_library(name), d)
            call()
            check(inputs, name, d)
            contenders[name] = call
        except Exception as error:
            timer.check()
            errors[name] = harness.error_text(error)
    timings = race(contenders, samples, timer)
    errors.update({name: timing.error for name, timing in timings.items() if timing.error is not None})
    medians = {name: t.median_us for name, t in timings.items() if t.median_us is not None}
    return make_row(inputs.shape, config_of(inputs.shape, preset), medians, errors, timings[EMPTY].samples)


def make_row(
    shape: Shape | batched.Shape, config: str, medians: Mapping[str, float], errors: Mapping[str, str], samples: int
) -> dict[str, Any]:
    """A row of the CSV but for when and on what it was measured; what is missing is None."""
    ours, floor = medians.get(OURS), floor_us(shape)
    peers = {name: medians[name] for name in (PEER, TORCH) if name in medians}
    best_peer = min(peers, key=peers.__getitem__, default=None)
    peer = None if best_peer is None else peers[best_peer]
    return {
        "case": shape.case,
        "m": shape.m,
        "n": shape.n,
        "k": shape.k,
        "groups": shape.groups,
        "recipe": shape.name if isinstance(shape, batched.Shape) else NAMES[shape.recipe],
        "ours_us": ours,
        "best_peer_us": peer,
        "best_peer": best_peer,
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
        if row["case"] == "einsum":
            name += ", m up to 128" if row["m"] <= 128 else ", m above 128"
        if row["case"] in ("masked", "fused"):
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


def shapes_of(options: argparse.Namespace) -> list[Shape | batched.Shape]:
    """What the options ask for, less what does not fit into memory."""
    found: list[Shape | batched.Shape] = []
    for case in options.cases:
        for recipe in options.recipes if case != "fused" else ("fp8",):
            if case in batched.CASES:
                found += batched.shapes_of(case, recipe, options.groups, options.m)
                continue
            for groups in options.groups or GROUPS[case]:
                for n, k in options.layers or (FUSED_LAYERS if case == "fused" else LAYERS):
                    for m in options.m or MS[case]:
                        shape = Shape(case, recipe, m, n, k, groups)
                        if groups * (n * k + 2 * m * (n + k)) * shape.size * 3 < _MAX_BYTES:
                            found.append(shape)
    return found


def needed(shape: Shape | batched.Shape, preset: str) -> list[Any]:
    """The kernels of a shape."""
    device = PRESETS[preset]
    if isinstance(shape, batched.Shape):
        config = batched_heuristics.choose_config(shape.problem, device)
        return [
            batched_family.FAMILY.spec(shape.problem, config, device.arch.name),
            TRANSPOSE_SCALES.spec(device.arch.name),
        ]
    problem = shape.problem
    return [
        FAMILY.spec(problem, heuristics.choose_config(problem, device), device.arch.name),
        TRANSPOSE_SCALES.spec(device.arch.name),
    ]


def missing_of_peer(shapes: Sequence[Shape | batched.Shape]) -> list[str]:
    """What fails of DeepGEMM on the first problem of each kind that is to be raced."""
    first: dict[tuple[str, str], Shape | batched.Shape] = {}
    for shape in shapes:
        first.setdefault((shape.case, shape.recipe), shape)
    with harness.spawn_pool(1) as pool:
        errors = pool.map(_call_peer, first.values())
        return [f"{shape}: {error}" for shape, error in zip(first.values(), errors, strict=True) if error]


def warm_peer(shapes: Sequence[Shape | batched.Shape], workers: int) -> None:
    """Fill DeepGEMM's disk cache with the kernels of the shapes."""
    with harness.spawn_pool(workers) as pool:
        problems = {text for text in pool.map(_call_peer, shapes) if text is not None}
    say(f"warm-peer: {len(shapes)} calls of DeepGEMM, {len(problems)} different errors")
    for text in sorted(problems):
        say(f"  {text}")


def _call_peer(shape: Shape | batched.Shape) -> str | None:
    try:
        inputs: Any = inputs_of(shape)
        inputs.call_of(_library(PEER), inputs.output())()
        torch.cuda.synchronize()
    except Exception as error:
        return harness.error_text(error)
    return None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grouped", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=ALL_CASES, default=["masked", "contiguous"])
    parser.add_argument("--recipes", nargs="+", choices=list(NAMES), default=["fp8"])
    parser.add_argument("--groups", nargs="+", type=harness.positive, help="numbers of groups (default: the case's)")
    parser.add_argument("--m", nargs="+", type=harness.positive, help="rows per group (default: the case's)")
    parser.add_argument("--layers", nargs="+", type=harness.layer, metavar="N,K", help="(default: the case's)")
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
                inputs = inputs_of(shape, options.seed + index)
                row = run_shape(inputs, preset, options.samples, timer, not options.no_peer)
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
