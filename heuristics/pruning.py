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
    assigned = [min(range(len(row)), key=row.__getitem__) for row in costs]
    while len(kept := sorted(set(assigned))) > limit:
        losses = dict.fromkeys(kept, 0.0)
        substitutes = []
        for row, current, weight in zip(costs, assigned, weights or [1.0] * len(costs), strict=True):
            substitute = min((other for other in kept if other != current), key=row.__getitem__)
            losses[current] += weight * math.log(row[substitute] / row[current])
            substitutes.append(substitute)
        dropped = min(kept, key=losses.__getitem__)
        assigned = [
            substitute if current == dropped else current
            for current, substitute in zip(assigned, substitutes, strict=True)
        ]
    return assigned
