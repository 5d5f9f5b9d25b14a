"""Time all configs of many problems on the GPU at hand, for ``benchmarks.regret`` and ``benchmarks.calibrate``. ::

    python -m benchmarks.sweep --out sweep.csv
    python -m benchmarks.sweep --out random.csv --shapes random --count 60 --seed 1

Candidates of a problem: the menu, and of all that the heuristics generate before pruning those that the cost model
ranks first, up to ``--limit``. All are timed a few times in turn; those that take three times as long as the best drop
out after the first two; the best five and the choice are timed again with 200 samples. One row a config: the median in
us. A file that exists is continued: problems in it are skipped.
Exit codes: 0 done, 1 the GPU failed, 3 no GPU.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import say
from benchmarks.shapes import dense_shapes
from jitgemm.device import PRESETS, Device
from jitgemm.families.gemm import FAMILY, GemmConfig, GemmProblem
from jitgemm.heuristics import choose_config
from jitgemm.heuristics.gemm import candidates, rank_candidates
from jitgemm.timing import Call, CudaTimer, Timer, error_text, measure
from jitgemm.tuning import Workload

RECIPES = {"fp8": "fp8_1x128_128x128", "bf16": "bf16"}
COLUMNS = ("recipe", "m", "n", "k", "config", "us", "samples")
LIMIT = 500
FINALISTS, FINAL_SAMPLES = 5, 200
_MAX_M, _MAX_N, _MAX_K, _MAX_WEIGHTS, _MAX_PRODUCTS = 8192, 32768, 18432, 2**28, 2**40


def random_problems(count: int, seed: int, recipes: Sequence[str]) -> list[GemmProblem]:
    """Problems with sizes drawn on a logarithmic scale: any m, n and k multiples of 64 (32 now and then)."""
    draw = random.Random(seed)
    problems = []
    while len(problems) < count:
        m = round(math.exp(draw.uniform(0, math.log(_MAX_M))))
        if draw.random() < 0.5:
            m = 2 ** round(math.log2(m))
        unit = draw.choice((64, 64, 64, 32))
        n, k = (round(math.exp(draw.uniform(math.log(256), math.log(high))) / unit) * unit for high in (_MAX_N, _MAX_K))
        if n * k <= _MAX_WEIGHTS and m * n * k <= _MAX_PRODUCTS:
            problems.append(GemmProblem(n, k, recipes[len(problems) % len(recipes)], m))
    return problems


def offered(problem: GemmProblem, device: Device, limit: int = LIMIT) -> list[GemmConfig]:
    """The legal configs to time: the menu, and of those generated the ones that the cost model ranks first."""
    ranked = rank_candidates(problem, device)
    menu = [config for config in candidates(problem, ()) if config in ranked]
    return [*menu, *(config for config in ranked if config not in menu)][:limit]


def read(path: Path) -> dict[GemmProblem, dict[GemmConfig, float]]:
    """The measured us of a sweep's file, by problem and config. Columns beside the first six don't matter.

    Raises:
        ValueError: the file has other columns, or a line is not a measurement; names the line.
    """
    sweep: dict[GemmProblem, dict[GemmConfig, float]] = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS[:6] if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path}: column {missing[0]!r} is missing; a sweep has {', '.join(COLUMNS[:6])}")
        for row in reader:
            try:
                problem = GemmProblem(int(row["n"]), int(row["k"]), row["recipe"], int(row["m"]))
                config, us = GemmConfig.from_text(row["config"]), float(row["us"])
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}:{reader.line_num}: {error}") from None
            sweep.setdefault(problem, {})[config] = us
    return sweep


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="CSV file to write or to continue")
    parser.add_argument("--shapes", choices=("dense", "random"), default="dense", help="default %(default)s")
    parser.add_argument("--count", type=harness.positive, default=60, help="random problems (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random problems (default %(default)s)")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--limit", type=harness.positive, default=LIMIT, help="candidates (default %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the problems; needs no GPU")
    harness.add_jobs_option(parser)
    return parser.parse_args(arguments)


def problems_of(options: argparse.Namespace) -> list[GemmProblem]:
    """The problems that were asked for."""
    recipes = [RECIPES[name] for name in options.recipes]
    if options.shapes == "random":
        return random_problems(options.count, options.seed, recipes)
    return [GemmProblem(shape.n, shape.k, recipe, shape.m) for recipe in recipes for shape in dense_shapes()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; the exit code."""
    options = parse(arguments)
    problems = problems_of(options)
    if options.list:
        device = PRESETS["h200"]
        rows = [(p.recipe, p.m, p.n, p.k, len(offered(p, device, options.limit))) for p in problems]
        print(harness.table(("recipe", "m", "n", "k", "candidates"), rows))
        return 0
    harness.require_gpu()
    say(harness.machine())
    device = PRESETS[harness.preset_name()]
    known = read(options.out) if options.out is not None and options.out.exists() else {}
    todo = [problem for problem in problems if problem not in known]
    say(f"{len(problems)} problems, {len(problems) - len(todo)} of them known")
    offers = {problem: offered(problem, device, options.limit) for problem in todo}
    specs = {FAMILY.spec(p, config, device.arch.name): None for p, configs in offers.items() for config in configs}
    harness.build_all(list(specs), options.jobs)

    timer = CudaTimer()
    for index, problem in enumerate(todo):
        try:
            line = run_problem(problem, offers[problem], device, timer, options.out)
        except RuntimeError as error:
            say(f"stopped: {error_text(error)}")
            return 1
        say(f"[{index + 1}/{len(todo)}] {line}")
    if timer.exposed:
        say(f"{timer.exposed} samples include host time")
    return 0


def run_problem(
    problem: GemmProblem,
    configs: Sequence[GemmConfig],
    device: Device,
    timer: Timer,
    out: Path | None,
    workload: Workload | None = None,
) -> str:
    """Time one problem, add it to the file, and say how the choice does in one line."""
    calls = prepared(workload or Workload(problem), configs, timer)
    chosen = str(choose_config(problem, device))
    by_name = {str(config): call for config, call in calls.items()}
    measured, errors = measure(by_name, timer, keep=[chosen], finalists=FINALISTS, samples=FINAL_SAMPLES)
    for name, text in errors.items():
        say(f"  {name}: {text}")
    if out is not None and measured:
        key = (problem.recipe, problem.m, problem.n, problem.k)
        append(out, [(*key, name, f"{us:.3f}", samples) for name, (us, samples) in measured.items()])
    if not measured:
        return f"{problem}: nothing could be timed"
    best = min(measured, key=lambda name: measured[name].us)
    against = f"x{measured[chosen].us / measured[best].us:.3f}" if chosen in measured else "failed"
    sizes = f"{problem.m}x{problem.n}x{problem.k}"
    return f"{problem.recipe} {sizes}: best {best} {measured[best].us:.2f} us, choice {chosen} {against}"


def prepared(work: Workload, configs: Sequence[GemmConfig], timer: Timer) -> dict[GemmConfig, Call]:
    """Calls of those configs that can run, loaded; says what the others failed with.

    Raises:
        RuntimeError: the GPU failed, and can't go on in this process.
    """
    calls: dict[GemmConfig, Call] = {}
    for config in configs:
        try:
            calls[config] = work.call(config)
        except Exception as error:
            timer.check()
            say(f"  {config}: {error_text(error)}")
    return calls


def append(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """Add a problem's rows at once, so that an aborted run leaves whole problems."""
    new = not path.exists() or not path.stat().st_size
    lines = [COLUMNS, *rows] if new else rows
    with path.open("a") as file:
        file.write("".join(",".join(map(str, line)) + "\n" for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
