"""From m to a kernel: sizes at which kernels are compared and limited, and what serves those between.

Needs neither torch nor a GPU.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

ANCHORS = (
    *(1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024),
    *(1280, 1536, 1792, 2048, 2560, 3072, 4096, 6144, 8192, 16384),
)
"""Values of m at which kernels are measured, and which tuned tables may name."""

RAGGED = (104, 152, 232, 288, 352, 416, 480, 576, 704, 776, 840, 952, 1104, 1400, 1656, 1920, 2304, 2800, 3496, 5000)
"""Values of m that have their say where kernels are limited: few tiles fill these and the round ones alike."""

_STEP = 8  # rows: heights of tiles are its multiples, so that these few m fill tiles alike
_MOST = 64  # values of m that are compared between two anchors

T = TypeVar("T")


def serving_anchors(m: int) -> tuple[int, ...]:
    """The anchors that are measured for an m: itself, or the two before and the two after it."""
    return (m,) if m in ANCHORS else anchors_around(m, 2)


def anchors_around(m: int, reach: int) -> tuple[int, ...]:
    """So many anchors before an m that is none, and so many after it."""
    after = bisect.bisect_left(ANCHORS, m)
    return ANCHORS[max(0, after - reach) : after + reach]


class Serving(Generic[T]):
    """What serves each m: at anchors given; between two of them chosen for all m when one is asked for.

    Args:
        at_anchors: what serves each.
        choose: for some values of m between two anchors, or one above all, what serves each.
    """

    def __init__(self, at_anchors: Sequence[T], choose: Callable[[tuple[int, ...]], Sequence[T]]) -> None:
        self._at_anchors = dict(zip(ANCHORS, at_anchors, strict=True))
        self._choose = choose
        self._between: dict[int, tuple[int, Sequence[T]]] = {}

    def __call__(self, m: int) -> T:
        """What serves an m."""
        m = max(m, 1)
        found = self._at_anchors.get(m)
        if found is not None:
            return found
        after = bisect.bisect_left(ANCHORS, m)
        if after == len(ANCHORS):
            return self._choose((m,))[0]
        first = ANCHORS[after - 1] // _STEP * _STEP
        if after not in self._between:
            step = math.ceil((ANCHORS[after] - first) / _STEP / _MOST) * _STEP
            ms = (*range(first + step, ANCHORS[after], step), ANCHORS[after] - 1)
            self._between[after] = step, self._choose(ms)
        step, chosen = self._between[after]
        return chosen[(m - first - 1) // step]
