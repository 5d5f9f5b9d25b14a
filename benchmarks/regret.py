"""What the choice of configs loses, from a file of measured times (``benchmarks.sweep``). ::

    python -m benchmarks.regret sweep.csv --by-shape

Factors above 1 are losses, of measured times: *choice*, of the cost model's choice (without tuned tables) against the
best of all measured; it is the product of *menu* (best of the menu against best of all), *model* (its choice among the
menu, without a limit on kernels, against the best of the menu) and *limit* (with the limit against without). Problems
whose choice was not measured are counted and left out. The last table says what each extra kernel buys. Needs no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness, sweep
from jitgemm import settings
from jitgemm.device import PRESETS, Device
from jitgemm.families.gemm import GemmConfig, GemmProblem
from jitgemm.heuristics import choose_config
from jitgemm.heuristics.gemm import MAX_KERNELS, candidates
from jitgemm.heuristics.serving import ANCHORS, RAGGED

CLASSES: dict[str, Callable[[int], bool]] = {
    "all": lambda m: True,
    "m <= 128": lambda m: m <= 128,
    "128 < m < 2048": lambda m: 128 < m < 2048,
    "m >= 2048": lambda m: m >= 2048,
}
LIMITS = range(6, 17)
LOSSES = ("choice", "menu", "model", "limit")


@dataclass(frozen=True)
class Regret:
    """The losses of one problem, as factors."""

    problem: GemmProblem
    best: GemmConfig
    chosen: GemmConfig
    us: float
    menu: float
    model: float
    limit: float

    @property
    def choice(self) -> float:
        """Time of the choice over the best of all measured."""
        return self.menu * self.model * self.limit


def regret(
    problem: GemmProblem, measured: Mapping[GemmConfig, float], device: Device, limit: int = MAX_KERNELS
) -> Regret | None:
    """The losses of a problem; None where what is chosen was not measured."""
    with settings.override(tuned=False):
        chosen, free = (choose_config(problem, device, most) for most in (limit, len(ANCHORS) + len(RAGGED)))
    if chosen not in measured or free not in measured:
        return None
    best = min(measured, key=lambda config: (measured[config], config))
    menu = min(measured[config] for config in (*candidates(problem, ()), free) if config in measured)
    return Regret(
        *(problem, best, chosen, measured[chosen]),
        menu=menu / measured[best],
        model=measured[free] / menu,
        limit=measured[chosen] / measured[free],
    )


def summary(regrets: Sequence[Regret]) -> str:
    """Geomean and worst of each loss, per recipe and class of m."""
    rows: list[tuple[object, ...]] = []
    for recipe in dict.fromkeys(regret.problem.recipe for regret in regrets):
        for name, belongs in CLASSES.items():
            members = [r for r in regrets if r.problem.recipe == recipe and belongs(r.problem.m or 0)]
            if not members:
                continue
            worst = max(members, key=lambda r: r.choice)
            means = (harness.geomean([getattr(r, loss) for r in members]) for loss in LOSSES)
            shape = f"{worst.problem.m}x{worst.problem.n}x{worst.problem.k}"
            rows.append((recipe, name, len(members), *(f"{mean:.4f}" for mean in means), f"{worst.choice:.3f}", shape))
    return harness.table(("recipe", "class", "problems", *LOSSES, "worst choice", "worst shape"), rows)


def kernels_buy(sweeps: Mapping[GemmProblem, Mapping[GemmConfig, float]], device: Device) -> str:
    """The loss of the choice for each limit on kernels."""
    rows: list[tuple[object, ...]] = []
    before: float | None = None
    for limit in LIMITS:
        found = [r for r in (regret(p, measured, device, limit) for p, measured in sweeps.items()) if r is not None]
        mean = harness.geomean([r.choice for r in found])
        worst = max((r.choice for r in found), default=None)
        gain = None if before is None or mean is None else f"{(before / mean - 1) * 100:.2f} %"
        rows.append((limit, len(found), harness.fixed(mean, 4), harness.fixed(worst, 3), gain))
        before = mean
    return harness.table(("kernels", "problems", "choice", "worst", "gained"), rows)


def by_shape(regrets: Sequence[Regret]) -> str:
    """A row for each problem, the greatest loss first."""
    rows = [
        (
            *(r.problem.recipe, f"{r.problem.m}x{r.problem.n}x{r.problem.k}", f"{r.us:.2f}"),
            *(f"{getattr(r, loss):.3f}" for loss in LOSSES),
            *(r.chosen, r.best),
        )
        for r in sorted(regrets, key=lambda r: -r.choice)
    ]
    return harness.table(("recipe", "m x n x k", "us", *LOSSES, "chosen", "best of all"), rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regret", description=__doc__.split("\n")[0])
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="CSV", help="files that benchmarks.sweep wrote")
    parser.add_argument("--device", choices=list(PRESETS), default="h200", help="default %(default)s")
    parser.add_argument("--limit", type=harness.positive, default=MAX_KERNELS, help="kernels (default %(default)s)")
    parser.add_argument("--by-shape", action="store_true", help="also a row for each problem")
    return parser.parse_args(arguments)


def read(paths: Sequence[Path]) -> dict[GemmProblem, dict[GemmConfig, float]]:
    """Several files; of a config that more than one has, the last counts."""
    together: dict[GemmProblem, dict[GemmConfig, float]] = {}
    for path in paths:
        for problem, measured in sweep.read(path).items():
            together.setdefault(problem, {}).update(measured)
    return together


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the exit code."""
    options = parse(arguments)
    device, sweeps = PRESETS[options.device], read(options.sweeps)
    regrets = [r for r in (regret(p, measured, device, options.limit) for p, measured in sweeps.items()) if r]
    if options.by_shape:
        print(by_shape(regrets), end="\n\n")
    print(summary(regrets), end="\n\n")
    print(kernels_buy(sweeps, device))
    if missing := len(sweeps) - len(regrets):
        print(f"\n{missing} of {len(sweeps)} problems are left out: what is chosen for them was not measured")
    return int(not regrets)


if __name__ == "__main__":
    raise SystemExit(main())
