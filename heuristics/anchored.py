"""The choice for families without tuned tables: the winners of a few anchors serve every m."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jitgemm.families.gemm import GemmConfig
from jitgemm.heuristics import gemm
from jitgemm.heuristics.gemm import MAX_KERNELS, Candidate, Explanation, Overrides
from jitgemm.heuristics.pruning import assign
from jitgemm.heuristics.serving import ANCHORS, RAGGED, Serving


class Chooser:
    """The table from m to config of one problem with any m.

    Args:
        offered: the configs that a choice is made from.
        illegal: why one of them can't be built or would not run, or None.
        costs: for each of some m, the predicted us of each of some configs.
        overrides: those in force, which the configs meet.

    Raises:
        ConfigError: none of the configs is legal.
    """

    def __init__(
        self,
        offered: Sequence[GemmConfig],
        illegal: Callable[[GemmConfig], str | None],
        costs: Callable[[tuple[GemmConfig, ...], tuple[int, ...]], list[list[float]]],
        overrides: Overrides,
    ) -> None:
        self._costs = costs
        assessed = [(config, illegal(config)) for config in offered]
        self._reasons = [(config, reason) for config, reason in assessed if reason is not None]
        self._legal = sorted((config for config, reason in assessed if reason is None), key=lambda c: (-c.stages, c))
        if not self._legal:
            raise gemm.no_legal_config(overrides, [reason for _, reason in self._reasons])
        chosen = assign(costs(tuple(self._legal), (*ANCHORS, *RAGGED)), MAX_KERNELS)
        self.kernels = tuple(sorted({self._legal[index] for index in chosen}))
        self._serving = Serving([self._legal[index] for index in chosen[: len(ANCHORS)]], self._choose)

    def __call__(self, m: int) -> GemmConfig:
        """The config for an m."""
        return self._serving(m)

    def _choose(self, ms: tuple[int, ...]) -> list[GemmConfig]:
        costs = self._costs(self.kernels, ms)
        return [self.kernels[row.index(min(row))] for row in costs]

    def explain(self, m: int) -> Explanation:
        """Predicted cost of every config for an m, and why others are illegal."""
        costs = self._costs(tuple(self._legal), (m,))[0]
        listed = [Candidate(config, cost, {"total": cost}) for config, cost in zip(self._legal, costs, strict=True)]
        listed += [Candidate(config, terms={}, reason=reason) for config, reason in self._reasons]
        return Explanation(listed, self(m))
