"""From a problem and a device to a config: candidates, limits, cost model, overrides."""

from jitgemm.heuristics.gemm import (
    ANCHORS,
    Candidate,
    Chooser,
    Explanation,
    choose_config,
    chooser,
    enumerate_configs,
    enumerate_specs,
    explain,
    prepare,
)

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
