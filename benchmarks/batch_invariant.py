"""What the batch-invariant mode costs: every shape with the setting and without, raced. ::

    python -m benchmarks.batch_invariant --out batch_invariant.csv

``cost`` is the time with ``JITGEMM_BATCH_INVARIANT=1`` over the time without: 1 where both get the same kernel.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import CsvLog, race, say
from benchmarks.shapes import LAYERS, MS, dense_shapes
from jitgemm import settings
from jitgemm.device import PRESETS, Device
from jitgemm.families.gemm import FAMILY, GemmProblem
from jitgemm.heuristics import choose_config
from jitgemm.timing import CudaTimer, Timer
from jitgemm.tuning import Workload

RECIPES = {"fp8": "fp8_1x128_128x128", "bf16": "bf16"}
COLUMNS = ("recipe", "m", "n", "k", "us", "invariant_us", "cost", "config", "invariant_config")


def run_shape(problem: GemmProblem, device: Device, timer: Timer, workload: Workload | None = None) -> dict[str, Any]:
    """Race one problem; a row of the CSV."""
    free = choose_config(problem, device)
    with settings.override(batch_invariant=True):
        bound = choose_config(problem, device)
    work = workload or Workload(problem)
    calls = {"free": work.call(free)}
    if bound != free:
        calls["bound"] = work.call(bound)
    timings = race(calls, timer=timer)
    us = timings["free"].median_us
    invariant_us = timings["bound" if bound != free else "free"].median_us
    return {
        "recipe": problem.recipe,
        "m": problem.m,
        "n": problem.n,
        "k": problem.k,
        "us": us,
        "invariant_us": invariant_us,
        "cost": None if us is None or invariant_us is None else invariant_us / us,
        "config": free,
        "invariant_config": bound,
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Geomean and worst cost, per recipe and per layer."""
    lines = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        of_recipe = [row for row in rows if row["recipe"] == recipe and row["cost"] is not None]
        groups = {"all": of_recipe}
        for row in of_recipe:
            groups.setdefault(f"n = {row['n']}, k = {row['k']}", []).append(row)
        for name, members in groups.items():
            worst = max(members, key=lambda row: row["cost"], default=None)
            mean = harness.geomean([row["cost"] for row in members])
            splits = {row["invariant_config"].split_k for row in members}
            split = splits.pop() if len(splits) == 1 else None
            at = None if worst is None else f"{worst['cost']:.3f} (m = {worst['m']})"
            lines.append((recipe, name, len(members), split, harness.fixed(mean, 3), at))
    return harness.table(("recipe", "shapes", "raced", "split of K", "cost", "worst"), lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_invariant", description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--m", nargs="+", type=harness.positive, default=list(MS), help="values of m")
    parser.add_argument("--shapes", nargs="+", type=harness.layer, default=list(LAYERS), metavar="N,K")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    harness.add_jobs_option(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = parse(arguments)
    shapes = dense_shapes(options.m, options.shapes)
    problems = [GemmProblem(s.n, s.k, RECIPES[recipe], s.m) for recipe in options.recipes for s in shapes]
    harness.require_gpu()
    say(harness.machine())
    device = PRESETS[harness.preset_name()]
    configs = [(problem, choose_config(problem, device)) for problem in problems]
    with settings.override(batch_invariant=True):
        configs += [(problem, choose_config(problem, device)) for problem in problems]
    harness.build_all(
        list(dict.fromkeys(FAMILY.spec(p, config, device.arch.name) for p, config in configs)), options.jobs
    )
    timer, rows = CudaTimer(), []
    with CsvLog(options.out, COLUMNS) as log:
        for problem in problems:
            row = run_shape(problem, device, timer)
            rows.append(row)
            log.write(row)
            say(
                f"{row['recipe']} {row['m']}x{row['n']}x{row['k']}: {harness.fixed(row['us'])} us ({row['config']}),"
                f" invariant {harness.fixed(row['invariant_us'])} us ({row['invariant_config']}),"
                f" cost {harness.fixed(row['cost'], 3)}"
            )
    print()
    print(summary(rows))
    return int(any(row["cost"] is None for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
