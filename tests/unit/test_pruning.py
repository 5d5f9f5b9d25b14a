"""Few kernels for many sizes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitgemm.heuristics.pruning import assign


@st.composite
def tables(draw: st.DrawFn) -> list[list[float]]:
    columns = draw(st.integers(1, 7))
    cost = st.floats(1.0, 1000.0)
    return draw(st.lists(st.lists(cost, min_size=columns, max_size=columns), min_size=1, max_size=9))


def loss(costs: list[list[float]], assigned: list[int]) -> float:
    return sum(math.log(row[column] / min(row)) for row, column in zip(costs, assigned, strict=True))


@given(tables(), st.integers(1, 8))
def test_at_most_limit_and_each_row_has_the_cheapest_that_is_kept(costs: list[list[float]], limit: int) -> None:
    assigned = assign(costs, limit)
    assert assigned == assign(costs, limit)
    assert len(assigned) == len(costs)
    kept = set(assigned)
    assert len(kept) <= limit
    for row, column in zip(costs, assigned, strict=True):
        assert row[column] == min(row[other] for other in kept)


@given(tables())
def test_without_need_nothing_is_lost(costs: list[list[float]]) -> None:
    assert loss(costs, assign(costs, len(costs[0]))) == 0


@given(tables(), st.integers(1, 7))
def test_one_kernel_more_never_costs(costs: list[list[float]], limit: int) -> None:
    assert loss(costs, assign(costs, limit + 1)) <= loss(costs, assign(costs, limit)) + 1e-9


@given(tables())
def test_the_last_to_go_is_the_one_that_is_missed_least(costs: list[list[float]]) -> None:
    winners = set(assign(costs, len(costs[0])))
    if len(winners) < 2:
        return
    best = min(
        sum(math.log(min(row[column] for column in kept) / min(row)) for row in costs)
        for kept in itertools.combinations(sorted(winners), len(winners) - 1)
    )
    assert loss(costs, assign(costs, len(winners) - 1)) == pytest.approx(best, abs=1e-9)


def test_candidates_that_are_out_are_never_taken() -> None:
    out = math.inf
    assert assign([[1.0, out, 3.0], [out, 1.0, 2.0]], 2) == [0, 1]
    assert assign([[1.0, 2.0, out], [out, 1.0, 2.0], [1.5, out, 1.0]], 3) == [0, 1, 2]


def test_ties_go_to_the_lower_index() -> None:
    assert assign([[2.0, 1.0, 1.0]], 1) == [1]
    assert assign([[1.0, 2.0], [2.0, 1.0]], 1) == [1, 1]  # either may go; the first does


def test_rows_that_weigh_more_keep_what_is_best_for_them() -> None:
    costs = [[1.0, 1.4], [1.4, 1.0], [1.4, 1.0]]
    assert assign(costs, 1) == [1, 1, 1]
    assert assign(costs, 1, [4.0, 1.0, 1.0]) == [0, 0, 0]
