"""From a problem and a device to a config: candidates, limits, cost model, overrides."""

from __future__ import annotations

from jitgemm.device import Device
from jitgemm.families.base import KernelSpec
from jitgemm.families.gemm import GemmProblem
from jitgemm.families.rowwise import RowwiseProblem
from jitgemm.families.tiles import FAMILY as TILES
from jitgemm.families.tiles import TileProblem
from jitgemm.heuristics import gemm, rowwise
from jitgemm.heuristics.gemm import (
    ANCHORS,
    Candidate,
    Chooser,
    Explanation,
    choose_config,
    chooser,
    enumerate_configs,
    explain,
    prepare,
)


def enumerate_specs(problem: GemmProblem | RowwiseProblem | TileProblem, device: Device) -> tuple[KernelSpec, ...]:
    """Every kernel that calls of the problem can need: of any m, with scales in any layout, with or without C."""
    if isinstance(problem, RowwiseProblem):
        return rowwise.enumerate_specs(problem, device)
    if isinstance(problem, TileProblem):
        return (TILES.spec(problem, device.arch.name),)
    return gemm.enumerate_specs(problem, device)


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
