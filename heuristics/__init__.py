"""From a problem and a device to a config: candidates, limits, cost model, overrides."""

from __future__ import annotations

from jitgemm.device import Device
from jitgemm.families.base import KernelSpec
from jitgemm.families.batched import BatchedProblem
from jitgemm.families.gemm import GemmProblem
from jitgemm.families.grouped import GroupedProblem
from jitgemm.families.rowwise import RowwiseProblem
from jitgemm.families.small_problem import SmallProblem
from jitgemm.families.tiles import FAMILY as TILES
from jitgemm.families.tiles import TileProblem
from jitgemm.heuristics import batched, gemm, grouped, rowwise
from jitgemm.heuristics.gemm import (
    Candidate,
    Chooser,
    Explanation,
    choose_config,
    chooser,
    enumerate_configs,
    prepare,
)
from jitgemm.heuristics.serving import ANCHORS


def enumerate_specs(
    problem: GemmProblem | GroupedProblem | BatchedProblem | RowwiseProblem | TileProblem | SmallProblem, device: Device
) -> tuple[KernelSpec, ...]:
    """Every kernel that calls of the problem can need: of any m, with scales in any layout, with or without C."""
    if isinstance(problem, SmallProblem):
        return problem.specs(device.arch.name)
    if isinstance(problem, RowwiseProblem):
        return rowwise.enumerate_specs(problem, device)
    if isinstance(problem, TileProblem):
        return (TILES.spec(problem, device.arch.name),)
    if isinstance(problem, GroupedProblem):
        return grouped.enumerate_specs(problem, device)
    if isinstance(problem, BatchedProblem):
        return batched.enumerate_specs(problem, device)
    return gemm.enumerate_specs(problem, device)


def explain(problem: GemmProblem | GroupedProblem | BatchedProblem, device: Device) -> Explanation:
    """Predicted cost of every config that a choice is made from, and why others are illegal.

    Raises:
        ConfigError: no legal config meets the overrides in force.
    """
    if isinstance(problem, BatchedProblem):
        return batched.explain(problem, device)
    return grouped.explain(problem, device) if isinstance(problem, GroupedProblem) else gemm.explain(problem, device)


__all__ = [
    "ANCHORS",
    "Candidate",
    "Chooser",
    "Explanation",
    "choose_config",
    "chooser",
    "enumerate_configs",
    "enumerate_specs",
    "explain",
    "prepare",
]
