"""Fit the cost model to a chip: refit its constants, or choose a menu of configs anew, from measured times. ::

    python -m benchmarks.calibrate sweep.csv --menu 44  # prints menus for heuristics/sm90a.py
    python -m benchmarks.calibrate sweep.csv            # prints constants, and the menus with their corrections

The constants are fitted one after the other, in finer and finer steps, to what the choices lose against the best of
all measured, on average and at worst, and to the squared log error of predicted times; a candidate weighs the more
there, the nearer it is to its problem's best, as measured or as predicted so far. Rates of the chip itself
(``jitgemm/device.py``) come from its data sheet or from measurements of their own. A config's correction is what its
times are, over the predictions, beside those of its rivals: of configs near a problem's best. A menu is chosen
greedily: always the config next that lowers the geomean of (best of the menu / best of all) most. Needs no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import say
from benchmarks.regret import read, regret, summary
from jitgemm import settings
from jitgemm.device import PRESETS, Device
from jitgemm.families.gemm import GemmConfig, GemmProblem
from jitgemm.heuristics import gemm, sm90a

MEASURED = (
    *("MMAS_PER_STAGE", "MMA_OPERAND_CYCLES", "MMA_LATENCY_CYCLES", "SMEM_BYTES_PER_CYCLE"),
    *("RS_MMA_CYCLES", "EXPANSION_CYCLES", "THROTTLED_CYCLES", "RELAUNCH_US"),
    *("QUANTIZATION_COLUMN_CYCLES", "EXCHANGE_CYCLES", "EXCHANGE_READ_CYCLES"),
)
"""Constants that are not fitted: facts of the chip, thresholds, and what plain dense GEMMs don't depend on."""

SMALL_M = 128
"""Losses are averaged apart up to it and above."""

NEAR = 0.15
"""A candidate so much slower than the best weighs 1/e of it."""

ROWS = 60
"""Candidates of a problem that take part at most, by weight."""

WORST, ERROR = 0.06, 0.25
"""What the worst loss, and the mean squared log error, count beside the mean log loss."""

UNKNOWN_LOSS = 0.07
"""The log loss that a choice counts for which was not measured."""

STEPS = ((0.6, 0.8, 0.9, 1.1, 1.25, 1.6), (0.9, 0.95, 0.98, 1.02, 1.05, 1.1), (0.97, 0.99, 1.01, 1.03))
"""Factors that are tried on each constant: the next ones where none of these helps any more."""

CORRECTION_ROUNDS, PRIOR = 6, 3.0
"""Rounds in which corrections are fitted, and the weight of none: that of so many problems."""

NEAR_MEASURED, NEAR_PREDICTED = 0.08, 0.04
"""What a candidate weighs there: 1/e for each of these by which it is slower than the best."""

NOT_MEASURED = 10.0
"""Time over the best's that a menu counts for a config without a measurement."""

Sweep = Mapping[GemmProblem, Mapping[GemmConfig, float]]
Row = tuple[GemmProblem, GemmConfig, float, float]  # with us and weight
Constants = dict[str, tuple[float, ...]]


def constants() -> Constants:
    """The constants of the model that are fitted, as they are now."""
    values: Constants = {}
    for name, value in vars(sm90a).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if name.isupper() and name not in MEASURED and all(isinstance(number, (int, float)) for number in numbers):
            values[name] = tuple(map(float, numbers))
    return values


def put(values: Constants) -> None:
    """Let the model use other constants, in this process."""
    for name, numbers in values.items():
        setattr(sm90a, name, numbers if isinstance(getattr(sm90a, name), tuple) else numbers[0])
    for function in vars(gemm).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def rows(sweep: Sweep, device: Device) -> list[Row]:
    """The candidates that are fitted to, with their weights; those of one problem add up to 1."""
    chosen: list[Row] = []
    for problem, measured in sweep.items():
        legal = [config for config in measured if gemm.illegal(problem, config, device) is None]
        if not legal:
            continue
        predicted = dict(zip(legal, predictions(problem, legal, device), strict=True))
        best, best_predicted = min(measured[config] for config in predicted), min(predicted.values())
        weights = {
            config: math.exp((1 - min(measured[config] / best, us / best_predicted)) / NEAR)
            for config, us in predicted.items()
        }
        heaviest = sorted(weights, key=lambda config: (-weights[config], config))[:ROWS]
        total = sum(weights[config] for config in heaviest)
        chosen += [(problem, config, measured[config], weights[config] / total) for config in heaviest]
    return chosen


def predictions(problem: GemmProblem, configs: Sequence[GemmConfig], device: Device) -> list[float]:
    """Predicted times in us of configs for a problem with its m."""
    assert problem.m is not None
    return gemm.predict_all(problem.without_m(), configs, device, [problem.m])[0]


def error(data: Sequence[Row], device: Device) -> float:
    """Weighted mean of the squared log error. Rows of one problem stand together."""
    squares = 0.0
    for problem, rows in itertools.groupby(data, lambda row: row[0]):
        members = list(rows)
        predicted = predictions(problem, [config for _, config, *_ in members], device)
        squares += sum(row[3] * math.log(us / row[2]) ** 2 for row, us in zip(members, predicted, strict=True))
    return squares / sum(weight for *_, weight in data)


def corrections(sweep: Sweep, device: Device) -> dict[bool, dict[GemmConfig, float]]:
    """What predictions for the configs of both menus should be multiplied by, by whether their problems promote."""
    found: dict[bool, dict[GemmConfig, float]] = {}
    for promotes in (True, False):
        logs: dict[GemmConfig, float] = {}
        cases = []
        for problem, measured in sweep.items():
            menu = [config for config in gemm.candidates(problem, ()) if config in measured]
            if problem.promotes == promotes and menu:
                logs |= dict.fromkeys(menu, 0.0)
                known = gemm.corrections(problem.without_sizes())
                plain = [us / known[c] for us, c in zip(predictions(problem, menu, device), menu, strict=True)]
                cases.append((menu, [math.log(measured[c]) for c in menu], [math.log(us) for us in plain]))
        for _ in range(CORRECTION_ROUNDS):
            moves, weights = dict.fromkeys(logs, 0.0), dict.fromkeys(logs, PRIOR)
            for menu, times, predicted in cases:
                now = [log + logs[config] for config, log in zip(menu, predicted, strict=True)]
                near = [
                    math.exp((min(times) - time) / NEAR_MEASURED) + math.exp((min(now) - log) / NEAR_PREDICTED)
                    for time, log in zip(times, now, strict=True)
                ]
                level = sum(w * (t - p) for w, t, p in zip(near, times, now, strict=True)) / sum(near)
                for config, weight, time, log in zip(menu, near, times, now, strict=True):
                    moves[config] += weight * (time - log - level)
                    weights[config] += weight
            logs = {config: log + 0.7 * moves[config] / weights[config] for config, log in logs.items()}
        found[promotes] = {config: math.exp(log) for config, log in logs.items()}
    return found


def loss(sweep: Sweep, data: Sequence[Row], device: Device) -> float:
    """What is fitted: the choices' log losses, mean and worst, averaged over kinds and sizes, and ``error``."""
    classes: dict[tuple[str, bool], list[float]] = {}
    with settings.override(tuned=False):
        for problem, measured in sweep.items():
            us = measured.get(gemm.choose_config(problem, device))
            log = UNKNOWN_LOSS if us is None else math.log(us / min(measured.values()))
            classes.setdefault((problem.recipe, (problem.m or 0) <= SMALL_M), []).append(log)
    losses = sum(sum(logs) / len(logs) + WORST * max(logs) for logs in classes.values())
    return losses / len(classes) + ERROR * error(data, device)


def fit(sweep: Sweep, data: Sequence[Row], device: Device, evaluations: int) -> Constants:
    """The constants with the least loss that are found; they are in use when this returns."""
    best = constants()
    least, left = loss(sweep, data, device), evaluations
    for factors in STEPS:
        improved = True
        while improved and left > 0:
            improved = False
            for name, index in [(name, index) for name, numbers in best.items() for index in range(len(numbers))]:
                number, kept = best[name][index], best
                for factor in factors:
                    numbers = (*best[name][:index], number * factor, *best[name][index + 1 :])
                    put(tried := {**best, name: numbers})
                    left -= 1
                    if (found := loss(sweep, data, device)) < least - 1e-5:
                        least, kept, improved = found, tried, True
                best = kept
                if left <= 0:
                    break
    put(best)
    return best


def as_code(values: Constants) -> str:
    """Lines to paste; the comments of the old ones still hold."""
    shown = {name: ", ".join(f"{number:.4g}" for number in numbers) for name, numbers in values.items()}
    return "\n".join(f"{name} = {f'({text})' if ',' in text else text}" for name, text in shown.items())


def menu(sweep: Sweep, count: int) -> list[GemmConfig]:
    """``count`` configs of which one is near the best for every problem, in the order in which they were chosen."""
    ratios = [{config: us / min(measured.values()) for config, us in measured.items()} for measured in sweep.values()]
    left = sorted({config for measured in sweep.values() for config in measured})
    reached = [NOT_MEASURED] * len(ratios)
    chosen: list[GemmConfig] = []
    while left and len(chosen) < count:
        config = max(left, key=lambda config: _gain(config, reached, ratios))  # the first of equals
        chosen.append(config)
        left.remove(config)
        reached[:] = [min(now, ratio.get(config, now)) for now, ratio in zip(reached, ratios, strict=True)]
    return chosen


def _gain(config: GemmConfig, reached: Sequence[float], ratios: Sequence[Mapping[GemmConfig, float]]) -> float:
    """What a config adds to a menu that reaches ``reached``, as a sum of logarithms."""
    pairs = zip(reached, ratios, strict=True)
    return sum(math.log(now / ratio[config]) for now, ratio in pairs if ratio.get(config, now) < now)


def as_menu(configs: Sequence[GemmConfig], corrections: Mapping[GemmConfig, float] | None = None) -> str:
    """Entries as in ``heuristics/sm90a.py``; tile k follows from the operands there."""

    def entry(config: GemmConfig) -> str:
        text = str(config).replace(f"x{config.tile_k} s", " s", 1)
        correction = round((corrections or {}).get(config, 1.0), 2)
        return text if correction == 1 else f"{text} *{correction:.2f}"

    ordered = sorted(configs, key=lambda c: (not c.swap_ab, c.tile_m, c.tile_n, c))
    lines = textwrap.wrap(", ".join(entry(config).replace(" ", "~") for config in ordered), 112)
    return "\n".join("    " + line.replace("~", " ") for line in lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrate", description=__doc__.split("\n")[0])
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="CSV", help="files that benchmarks.sweep wrote")
    parser.add_argument("--device", choices=list(PRESETS), default="h200", help="default %(default)s")
    parser.add_argument(
        "--evaluations", type=harness.positive, default=4000, help="of the loss at most (default %(default)s)"
    )
    parser.add_argument("--menu", type=harness.positive, metavar="COUNT", help="choose a menu instead of constants")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print constants or menus; the exit code."""
    options = parse(arguments)
    device, sweep = PRESETS[options.device], read(options.sweeps)
    if options.menu:
        for promotes in (True, False):
            members = {problem: measured for problem, measured in sweep.items() if problem.promotes == promotes}
            if members:
                configs = menu(members, options.menu)
                over_best = harness.geomean([_best(measured, configs) for measured in members.values()])
                say(f"{'FP8' if promotes else 'BF16'}: {len(configs)} configs, geomean over the best {over_best:.4f}")
                say(as_menu(configs))
        return 0
    data = rows(sweep, device)
    report(sweep, data, device, "now")
    fitted = fit(sweep, data, device, options.evaluations)
    report(sweep, data, device, "fitted")
    for promotes, found in corrections(sweep, device).items():
        say(f"{'FP8' if promotes else 'BF16'}_MENU:\n{as_menu(list(found), found)}\n")
    print(as_code(fitted))
    return 0


def _best(measured: Mapping[GemmConfig, float], configs: Sequence[GemmConfig]) -> float:
    have = (measured[config] for config in configs if config in measured)
    return min(have, default=math.inf) / min(measured.values())


def report(sweep: Sweep, data: Sequence[Row], device: Device, label: str) -> None:
    """Say how well the model does."""
    found = (regret(problem, measured, device) for problem, measured in sweep.items())
    say(f"{label}: root mean square log error {math.sqrt(error(data, device)):.4f} over {len(data)} candidates")
    say(summary([one for one in found if one is not None]) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
