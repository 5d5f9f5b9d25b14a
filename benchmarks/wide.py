"""Time a grid of kernels on many problems, which is what the cost model is fitted to (``benchmarks.calibrate``). ::

    python -m benchmarks.wide --out wide.csv --count 520 --seconds 300
    python -m benchmarks.wide --trim wide.csv --out sweep_h200.csv  # what docs/performance keeps; needs no GPU

Where ``benchmarks.sweep`` times all configs of a few problems with care, this takes problems of all sizes, half of them
shards of real layers, and of a fixed grid of kernels those that the model does not think hopeless. All are timed once,
then in rounds that narrow down to the best. The file is one of ``benchmarks.sweep``; its samples say how often.
Exit codes: 0 done, 3 no GPU.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import harness, sweep
from benchmarks.harness import say
from jitgemm.device import PRESETS, Device
from jitgemm.families.gemm import FAMILY, GemmConfig, GemmProblem
from jitgemm.heuristics.gemm import candidates, illegal, predict_all, stage_choices
from jitgemm.timing import Call, CudaTimer, Timer
from jitgemm.tuning import Workload

ROUNDS = ((1.5, 3), (1.25, 4), (1.08, 8))
"""How often those are timed again that take at most so many times the best's time."""

FAR, MOST = 1.7, 130
"""Predicted time over the best's beyond which a config is not timed, and configs of a problem at most."""

MAX_M, MAX_WEIGHTS, MAX_PRODUCTS = 8192, 2**27.5, 2**38.5
USUAL_MS = (1, 8, 16, 32, 33, 64, 100, 128, 200, 256, 384, 512, 777, 1024, 2048, 4096)
HIDDEN = (2048, 2560, 2880, 3072, 4096, 5120, 6144, 7168, 8192)
INNER = (1024, 1280, 1536, 2048, 2304, 2560, 3072, 4096, 5120, 5632, 6144, 8192)
INNER += (10240, 11008, 13824, 14336, 16384, 18432, 24576, 25600, 28672)

_ONE, _PAIRS = ((1, 1),), ((1, 1), (2, 1), (1, 2))
GRID: tuple[tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[tuple[int, int]], bool], ...] = (
    ((8, 16, 24, 32), (64,), (1, 2, 3, 4, 5, 8), _ONE, True),
    ((40, 48, 64, 96, 128), (64,), (1, 2, 4), _ONE, True),
    ((16, 32, 64, 96, 128), (128,), (1, 2, 4), _ONE, True),
    ((104, 200), (64,), (1, 2), _ONE, True),
    ((104, 136, 152, 160, 176, 200, 216, 232, 256), (128,), (1, 2), _ONE, True),
    ((64,), (32, 40, 48, 64), (1, 2, 3, 4, 5), _ONE, False),
    ((64,), (72, 80, 96, 112, 128, 144, 160, 192), (1, 2, 4), _ONE, False),
    ((128,), (32, 48, 64, 72, 80, 96), (1, 2, 4), _ONE, False),
    ((128,), (112, 128, 144, 160, 176, 192, 224, 256), (1, 2, 4), _PAIRS, False),
    ((192,), (64, 96, 128, 160, 192), (1, 2), _PAIRS, False),
    ((256,), (64, 96, 128, 192), (1, 2), _PAIRS, False),
)
"""Tiles m and n, splits of K, clusters, and whether operands are swapped; all combinations."""


def problems(count: int, seed: int, recipes: Sequence[str]) -> list[GemmProblem]:
    """So many problems, the recipes in turn."""
    draw, known = random.Random(seed), layers()
    found: list[GemmProblem] = []
    while len(found) < count:
        m = round(math.exp(draw.uniform(0, math.log(MAX_M)))) if draw.random() < 0.6 else draw.choice(USUAL_MS)
        if draw.random() < 0.6:
            n, k = draw.choice(known)
        else:
            n, k = (round(math.exp(draw.uniform(math.log(256), math.log(high))) / 64) * 64 for high in (2**15, 2**14))
        if n * k <= MAX_WEIGHTS and m * n * k <= MAX_PRODUCTS:
            found.append(GemmProblem(n, k, recipes[len(found) % len(recipes)], m))
    return found


def layers() -> list[tuple[int, int]]:
    """(n, k) of projections from and to hidden states, whole and in shards."""
    found = set()
    for hidden, inner, shards in itertools.product(HIDDEN, INNER, (1, 2, 4, 8)):
        width = inner // shards
        if width % 64 == 0 and width >= 256:
            found |= {(width, hidden), (hidden, width)}
    return sorted(found)


def grid(recipe: str, device: Device) -> list[GemmConfig]:
    """The menu, and all of ``GRID`` that is legal: the deepest ring and, where it may pay, a shallower one."""
    problem = GemmProblem(2**20, 2**20, recipe, m=1)
    tile_k = 128 // problem.traits.operand_bytes
    configs = dict.fromkeys(candidates(problem, ()))
    for tile_ms, tile_ns, splits, clusters, swap_ab in GRID:
        for tile_m, tile_n, split_k, (cluster_m, cluster_n) in itertools.product(tile_ms, tile_ns, splits, clusters):
            base = GemmConfig(tile_m, tile_n, tile_k, 0, cluster_m, cluster_n, split_k, swap_ab)
            depths = stage_choices(problem, base)
            both = tile_m * tile_n <= 64 * 128 or split_k * cluster_m * cluster_n == 1
            for stages in (depths[0], depths[-1]) if both else depths[-1:]:
                configs.setdefault(dataclasses.replace(base, stages=stages))
    return [config for config in configs if illegal(problem, config, device) is None]


def hopeful(problem: GemmProblem, configs: Sequence[GemmConfig], device: Device) -> list[GemmConfig]:
    """Those to time, by predicted time."""
    assert problem.m is not None
    legal = [config for config in configs if illegal(problem, config, device) is None]
    costs = dict(zip(legal, predict_all(problem.without_m(), legal, device, [problem.m])[0], strict=True))
    limit = FAR * min(costs.values())
    return sorted((config for config in legal if costs[config] <= limit), key=costs.__getitem__)[:MOST]


def narrow(calls: Mapping[GemmConfig, Call], timer: Timer) -> dict[GemmConfig, list[float]]:
    """Times in us of each: one of all, more of those near the best."""
    times = {config: [timer(call)] for config, call in calls.items()}
    for near, rounds in ROUNDS:
        limit = near * min((statistics.median(taken) for taken in times.values()), default=0.0)
        running = [config for config, taken in times.items() if statistics.median(taken) <= limit]
        for _ in range(rounds):
            for config in running:
                times[config].append(timer(calls[config]))
    return times


def trim(lines: Sequence[Mapping[str, str]], menus: Mapping[str, Sequence[GemmConfig]]) -> list[Mapping[str, str]]:
    """The rows within 5 percent of their problem's best, and of the menu those within half of it."""
    by_problem: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for line in lines:
        by_problem.setdefault((line["recipe"], line["m"], line["n"], line["k"]), []).append(line)
    kept = []
    for (recipe, *_), members in by_problem.items():
        best, menu = min(float(line["us"]) for line in members), set(map(str, menus[recipe]))
        for line in sorted(members, key=lambda line: float(line["us"])):
            over = float(line["us"]) / best
            if over <= 1.05 or (line["config"] in menu and over <= 1.5):
                kept.append(line)
    return kept


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wide", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--trim", type=Path, metavar="CSV", help="a file of this command to shorten, instead")
    parser.add_argument("--count", type=harness.positive, default=520, help="problems (default %(default)s)")
    parser.add_argument("--seconds", type=harness.positive, default=300, help="for timing (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--recipes", nargs="+", choices=list(sweep.RECIPES), default=list(sweep.RECIPES))
    harness.add_jobs_option(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, workload: Callable[[GemmProblem], Workload] = Workload) -> int:
    """Run the sweep; the exit code."""
    options = parse(arguments)
    if options.trim is not None:
        with options.trim.open(newline="") as file:
            lines = list(csv.DictReader(file))
        menus = {line["recipe"]: candidates(GemmProblem(1, 1, line["recipe"]), ()) for line in lines}
        options.out.unlink(missing_ok=True)
        sweep.append(options.out, [[line[name] for name in sweep.COLUMNS] for line in trim(lines, menus)])
        return 0
    harness.require_gpu()
    say(harness.machine())
    device = PRESETS[harness.preset_name()]
    recipes = [sweep.RECIPES[name] for name in options.recipes]
    grids = {recipe: grid(recipe, device) for recipe in recipes}
    specs = [FAMILY.spec(GemmProblem(1, 1, r), c, device.arch.name) for r, configs in grids.items() for c in configs]
    harness.build_all(specs, options.jobs)
    timer, start = CudaTimer(), time.monotonic()
    options.out.unlink(missing_ok=True)
    todo = problems(options.count, options.seed, recipes)
    for done, problem in enumerate(todo):
        if time.monotonic() - start > options.seconds:
            say(f"{done} of {len(todo)} problems in the time")
            break
        calls = sweep.prepared(workload(problem), hopeful(problem, grids[problem.recipe], device), timer)
        key = (problem.recipe, problem.m, problem.n, problem.k)
        times = narrow(calls, timer).items()
        sweep.append(options.out, [(*key, c, f"{statistics.median(taken):.3f}", len(taken)) for c, taken in times])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
