"""Few kernels for many sizes: which candidates to keep, given what each costs at each size."""

from __future__ import annotations

import math
from collections.abc import Sequence


def assign(costs: Sequence[Sequence[float]], limit: int, weights: Sequence[float] | None = None) -> list[int]:
    """The candidate of each row, of at most ``limit`` different ones.

    Every row starts with its cheapest candidate. While there are too many, the one goes whose rows lose least: the
    sum over them of log(cost of the cheapest that stays / cost). Its rows move there. Ties go to the lower index.

    Args:
        costs: one row for each size, one column for each candidate; positive, infinite where a candidate is out.
        limit: at least 1.
        weights: of the rows' losses; 1 each unless given.

    Returns:
        A column for each row.
    """
    assert limit >= 1
    assigned = [row.index(min(row)) for row in costs]
    kept = sorted(set(assigned))
    # Each row's kept candidates, cheapest first: its own, then where it would move.
    ranked = [sorted(kept, key=row.__getitem__) for row in costs]
    weights = weights or [1.0] * len(costs)
    while len(kept) > limit:
        losses = dict.fromkeys(kept, 0.0)
        for row, (current, substitute, *_), weight in zip(costs, ranked, weights, strict=True):
            losses[current] += weight * math.log(row[substitute] / row[current])
        dropped = min(kept, key=losses.__getitem__)
        for candidates in (kept, *ranked):
            candidates.remove(dropped)
    return [candidates[0] for candidates in ranked]
