"""GEMMs with FP4 weights raced: dense, and masked groups. ::

    python -m benchmarks.fp4 --out fp4.csv
    python -m benchmarks.fp4 --cases masked --groups 8 --m 1 64 --layers 4096,7168

Peers: ``humming`` (humming-kernels; the same MXFP4 weights, e4m3 activations with scales of 128, quantized before), and
``deepgemm`` (sgl-deep-gemm), which multiplies FP8 weights, as does ``ours_fp8``, our own FP8 kernel. ``ratio`` is the
better peer's time over ours. Masked: m is rows per group, A has room for twice as many, at least 64. The floor is
max(4.8 us + bytes of weights and scales / 4.3 TB/s, 3.6 us + FLOP / 1700 TFLOP/s). Ours is compared with float64 of the
dequantized operands first, into an output of NaN; peers must be near it. A peer that is missing is said at once. Exit
codes: 0 done, 1 something of ours is missing or wrong, 3 no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping, Sequence
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
from jitgemm.families.gemm import FP4, GemmProblem
from jitgemm.families.grouped import GroupedProblem
from jitgemm.heuristics import expansion, gemm, grouped
from jitgemm.reference.fp4 import dequantize_fp4, ue8m0_to_exponents
from jitgemm.reference.gemm import Errors, error_measures, tolerance
from jitgemm.reference.gemm import gemm as reference

CASES = ("dense", "masked")
LAYERS = {
    "dense": ((4096, 7168), (7168, 2048), (2112, 7168), (24576, 1536), (7168, 16384)),
    "masked": ((4096, 4096), (4096, 2048), (6144, 7168), (7168, 3072)),
}
MS = {"dense": (1, 8, 16, 32, 64, 128, 512, 1024, 4096), "masked": (1, 8, 16, 32, 64, 128, 512)}
GROUPS = (8, 32)
CLASSES = ((1, 64), (65, 512), (513, 2**31))  # of m, as the targets are set
OURS, OURS_FP8, PEERS = "jitgemm", "ours_fp8", {"humming": "humming", "deepgemm": "deep_gemm"}
PEER_COLUMNS = (*(f"{name}_us" for name in PEERS), "ours_fp8_us")
COLUMNS = (
    *("case", "m", "n", "k", "groups", "recipe", "ours_us", "best_peer_us", "best_peer", "ratio", "floor_us"),
    *("over_floor", "config", *PEER_COLUMNS, "empty_us", "samples", "errors", "measured"),
)
_ROOM = 64  # rows of a masked group at least
_MAX_BYTES = 60e9
_PEER_BOUND = Errors(1e-3, float("inf"))


@dataclass(frozen=True)
class Shape:
    """What is raced; m is rows, of each group where there are such."""

    case: str
    m: int
    n: int
    k: int
    groups: int = 1

    def __str__(self) -> str:
        groups = f"{self.groups} x " if self.case == "masked" else ""
        return f"{self.case} {groups}{self.m}x{self.n}x{self.k}"

    @property
    def problem(self) -> GemmProblem | GroupedProblem:
        """The problem that ours is asked."""
        if self.case == "dense":
            return GemmProblem(self.n, self.k, FP4, self.m)
        return GroupedProblem(self.n, self.k, FP4, self.groups, "masked", self.m)


def floor_us(shape: Shape) -> float:
    """What no kernel gets below."""
    weights = shape.groups * shape.n * shape.k * (1 / 2 + 1 / 32)
    return max(4.8 + weights / 4.3e6, 3.6 + 2 * shape.groups * shape.m * shape.n * shape.k / 1700e6)


class Inputs:
    """Operands of one shape, weights as MXFP4 and as FP8 of the same matrices."""

    def __init__(self, shape: Shape, seed: int = 0, device: str = "cuda") -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(seed)
        groups, m, n, k = shape.groups, shape.m, shape.n, shape.k
        self.rows = (groups, max(_ROOM, 2 * m)) if shape.case == "masked" else (m,)
        self.counts = torch.full((groups,), m, dtype=torch.int32, device=device)
        count = groups * self.rows[1] if shape.case == "masked" else m
        self.a, scales = jitgemm.per_token_cast_to_fp8(random_matrix(count, k, generator))
        self.a, self.row_scales = self.a.view(*self.rows, k), scales.view(*self.rows, -1).contiguous()
        self.a_scales = jitgemm.get_mn_major_tma_aligned_tensor(self.row_scales)
        packed, exponents, fp8, fp8_scales = [], [], [], []
        for _ in range(groups):
            matrix = random_matrix(n, k, generator)
            codes, powers = jitgemm.per_token_cast_to_fp4(matrix, True, 32)
            packed.append(codes)
            exponents.append(ue8m0_to_exponents(powers))
            data, block_scales = jitgemm.per_block_cast_to_fp8(matrix)
            fp8.append(data.view(torch.uint8))
            fp8_scales.append(block_scales)
        self.fp4 = self._stacked(packed), self._stacked(exponents)
        self.fp8 = self._stacked(fp8).view(torch.float8_e4m3fn), self._stacked(fp8_scales)
        self._expected: Tensor | None = None

    def _stacked(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts) if self.shape.case == "masked" else parts[0]

    def output(self) -> Tensor:
        """A result that is still to be computed."""
        return poisoned((*self.rows, self.shape.n), torch.bfloat16, self.a.device)

    def call_of(self, name: str, d: Tensor) -> Call:
        """The call of a contender."""
        calls: dict[str, Callable[[Tensor], Call]] = {OURS: self._ours, OURS_FP8: self._ours_fp8}
        calls |= {"humming": self._humming, "deepgemm": self._deepgemm}
        return calls[name](d)

    def _ours(self, d: Tensor) -> Call:
        a, b = (self.a, self.a_scales), jitgemm.prepare_fp4_weights(*self.fp4)
        if self.shape.case == "dense":
            return lambda: jitgemm.fp8_fp4_gemm_nt(a, b, d)
        return lambda: jitgemm.m_grouped_fp8_fp4_gemm_nt_masked(a, b, d, self.counts, self.shape.m)

    def _ours_fp8(self, d: Tensor) -> Call:
        a, b = (self.a, self.a_scales), self.fp8
        if self.shape.case == "dense":
            return lambda: jitgemm.fp8_gemm_nt(a, b, d)
        return lambda: jitgemm.m_grouped_fp8_gemm_nt_masked(a, b, d, self.counts, self.shape.m)

    def _deepgemm(self, d: Tensor) -> Call:
        import deep_gemm

        a, b = (self.a, self.a_scales), self.fp8
        if self.shape.case == "dense":
            return lambda: deep_gemm.fp8_gemm_nt(a, b, d)
        names = ("m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked", "m_grouped_fp8_fp4_gemm_nt_masked")
        masked = next(getattr(deep_gemm, name) for name in names if hasattr(deep_gemm, name))
        return lambda: masked(a, b, d, self.counts, self.shape.m)

    def _humming(self, d: Tensor) -> Call:
        from humming.layer import HummingLayer

        shape, masked = self.shape, self.shape.case == "masked"
        layer = HummingLayer(
            shape_n=shape.n,
            shape_k=shape.k,
            weight_config={"quant_method": "mxfp4"},
            input_config={"dtype": "float8e4m3", "group_size": 128},
            num_experts=shape.groups if masked else None,
            torch_dtype=torch.bfloat16,
        ).cuda()
        layer.load_from_tensors({"weight": self.fp4[0].view(torch.uint8), "weight_scale": self.fp4[1]})
        layer.transform()
        more: dict[str, Any] = {}
        if masked:
            more = {
                "expert_layout": self.counts,
                "compute_config": {"gemm_type": "grouped_masked"},
                "valid_shape_m": shape.groups * shape.m,
            }
        return lambda: layer(self.a, outputs=d, input_scale=self.row_scales, **more)

    def check(self, name: str, d: Tensor) -> None:
        """Compare the first and the last group with the reference.

        Raises:
            ArithmeticError: they are wrong.
        """
        m, last = self.shape.m, self.shape.groups - 1
        found = d if self.shape.case == "dense" else torch.cat([d[0, :m], d[last, :m]])
        if self._expected is None:
            self._expected = torch.cat([self._product(group) for group in ((0, last) if d.dim() == 3 else (0,))])
        errors = error_measures(found, self._expected)
        # FP8 of the weights is another rounding of them; to be of use at all it must be about as near.
        bounds = tolerance(FP4, "bf16") if name == OURS else _PEER_BOUND if name == "humming" else Errors(2e-2, 1.0)
        if not errors.within(bounds):
            raise ArithmeticError(f"wrong result: cosine {errors.cosine:.3g}, Frobenius {errors.frobenius:.3g}")

    def _product(self, group: int) -> Tensor:
        a, scales, packed, exponents = self.a, self.row_scales, *self.fp4
        if self.shape.case == "masked":
            a, scales = a[group, : self.shape.m], scales[group, : self.shape.m]
            packed, exponents = packed[group], exponents[group]
        return reference(a, dequantize_fp4(packed, exponents), a_scales=scales, recipe=FP4)


def run_shape(inputs: Inputs, names: Sequence[str], preset: str, samples: int | None, timer: Timer) -> dict[str, Any]:
    """Race one shape; a row of the CSV but for ``measured``."""
    contenders: dict[str, Call] = {}
    errors: dict[str, str] = {}
    for name in names:
        try:
            d = inputs.output()
            call = inputs.call_of(name, d)
            call()
            inputs.check(name, d)
            contenders[name] = call
        except Exception as error:
            timer.check()
            errors[name] = harness.error_text(error)
    timings = race(contenders, samples, timer)
    errors.update({name: timing.error for name, timing in timings.items() if timing.error is not None})
    medians = {name: t.median_us for name, t in timings.items() if t.median_us is not None}
    return make_row(inputs.shape, config_of(inputs.shape, preset), medians, errors, timings[EMPTY].samples)


def config_of(shape: Shape, preset: str) -> str:
    """The config that ours gets."""
    problem, device = shape.problem, PRESETS[preset]
    if isinstance(problem, GroupedProblem):
        return str(grouped.choose_config(problem, device))
    many_rows = expansion.expansion(problem, device)
    return str(gemm.choose_config(problem, device)) if many_rows is None else f"expanded {many_rows.product}"


def make_row(
    shape: Shape, config: str, medians: Mapping[str, float], errors: Mapping[str, str], samples: int
) -> dict[str, Any]:
    """A row of the CSV but for when and on what it was measured; what is missing is None."""
    ours, floor = medians.get(OURS), floor_us(shape)
    peers = {name: medians[name] for name in PEERS if name in medians}
    best = min(peers, key=peers.__getitem__) if peers else None
    return {
        "case": shape.case,
        "m": shape.m,
        "n": shape.n,
        "k": shape.k,
        "groups": shape.groups,
        "recipe": FP4,
        "ours_us": ours,
        "best_peer_us": None if best is None else peers[best],
        "best_peer": best,
        "ratio": None if best is None or ours is None else peers[best] / ours,
        "floor_us": floor,
        "over_floor": None if ours is None else ours / floor,
        "config": config,
        **{f"{name}_us": medians.get(name) for name in PEERS},
        "ours_fp8_us": medians.get(OURS_FP8),
        "empty_us": medians.get(EMPTY),
        "samples": samples,
        "errors": " | ".join(f"{name}: {text}" for name, text in errors.items()),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Geomean and worst ratio of each class, how near the floor, and ours in FP8 over ours."""
    classes: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        low, high = next(bounds for bounds in CLASSES if row["m"] <= bounds[1])
        span = f"m {low} to {high}" if high < 2**31 else f"m from {low}"
        classes.setdefault(f"{row['case']}, {span}", []).append(row)
    lines = []
    for name, members in classes.items():
        raced = [row for row in members if row["ratio"] is not None]
        if not raced:
            lines.append((name, f"0/{len(members)}", None, None, None, None, ""))
            continue
        worst = min(raced, key=lambda row: row["ratio"])
        both = [row["ours_fp8_us"] / row["ours_us"] for row in raced if row["ours_fp8_us"] is not None]
        groups = f"{worst['groups']} x " if worst["case"] == "masked" else ""
        lines.append(
            (
                name,
                f"{len(raced)}/{len(members)}",
                f"{harness.geomean([row['ratio'] for row in raced]):.3f}",
                f"{worst['ratio']:.3f}",
                f"{harness.geomean([row['over_floor'] for row in raced]):.3f}",
                f"{harness.geomean(both):.3f}" if both else None,
                f"{groups}{worst['m']}x{worst['n']}x{worst['k']}",
            )
        )
    return harness.table(("class", "raced", "ratio", "worst", "over floor", "over our FP8", "worst shape"), lines)


def shapes_of(options: argparse.Namespace) -> list[Shape]:
    """What the options ask for, less what does not fit into memory."""
    found = []
    for case in options.cases:
        for groups in (options.groups or GROUPS) if case == "masked" else (1,):
            for n, k in options.layers or LAYERS[case]:
                for m in options.m or MS[case]:
                    if groups * (n * k + 2 * m * (n + k)) * 4 < _MAX_BYTES:
                        found.append(Shape(case, m, n, k, groups))
    return found


def needed(shape: Shape, preset: str) -> list[Any]:
    """The kernels of a shape, FP4 and FP8; those that other sizes need are not among them."""
    device, problem = PRESETS[preset], shape.problem
    if isinstance(problem, GroupedProblem):
        fp8_groups = GroupedProblem(shape.n, shape.k, "fp8_1x128_128x128", shape.groups, "masked", shape.m)
        return [
            grouped.FAMILY.spec(one, grouped.choose_config(one, device), device.arch.name)
            for one in (problem, fp8_groups)
        ]
    fp8 = GemmProblem(shape.n, shape.k, "fp8_1x128_128x128", shape.m)
    ours, of_fp8 = (gemm.FAMILY.spec(one, gemm.choose_config(one, device), device.arch.name) for one in (problem, fp8))
    many_rows = expansion.expansion(problem, device)
    return [of_fp8, *([ours] if many_rows is None else many_rows.specs(problem, device.arch.name))]


def contenders() -> list[str]:
    """Ours and the peers that are installed; says which are not."""
    found = [OURS, OURS_FP8]
    for name, module in PEERS.items():
        if importlib.util.find_spec(module) is None:
            say(f"{name}: module {module} is not installed, and does not take part")
        else:
            found.append(name)
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp4", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--groups", nargs="+", type=harness.positive, help="numbers of groups (default 8 and 32)")
    parser.add_argument("--m", nargs="+", type=harness.positive, help="rows, of each group (default: the case's)")
    parser.add_argument("--layers", nargs="+", type=harness.layer, metavar="N,K", help="default: the case's")
    parser.add_argument("--samples", type=harness.positive, help="timed calls each (default 30; 100 below 20 us)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file to write")
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
    names = contenders()
    measured, preset = provenance(), harness.preset_name()
    say(measured)
    harness.build_all(list(dict.fromkeys(spec for shape in shapes for spec in needed(shape, preset))), options.jobs)
    timer, rows = CudaTimer(), []
    with CsvLog(options.out, COLUMNS) as log:
        for index, shape in enumerate(shapes):
            try:
                row = run_shape(Inputs(shape, options.seed + index), names, preset, options.samples, timer)
            except RuntimeError as error:
                say(f"stopped at {shape}: {harness.error_text(error)}")
                break
            row["measured"] = measured
            rows.append(row)
            log.write(row)
            times = "  ".join(f"{name} {harness.fixed(row[f'{name}_us'])}" for name in (*PEERS, OURS_FP8))
            say(
                f"{shape!s:<32} ours {harness.fixed(row['ours_us'])}  {times}  ratio {harness.fixed(row['ratio'], 3)}"
                f"  over floor {harness.fixed(row['over_floor'])}  {row['config']}  {row['errors']}"
            )
    print(summary(rows))
    return int(len(rows) < len(shapes) or any(row["ours_us"] is None for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
