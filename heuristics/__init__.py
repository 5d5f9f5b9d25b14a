"""From a problem and a device to a config: candidates, limits, cost model, overrides."""

from jitgemm.heuristics.gemm import (
    Candidate,
    Explanation,
    choose_config,
    enumerate_configs,
    enumerate_specs,
    explain,
)

__all__ = ["Candidate", "Explanation", "choose_config", "enumerate_configs", "enumerate_specs", "explain"]
