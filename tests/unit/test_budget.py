"""What a round verifies and waits for is the best there is: nothing that one could do instead yields more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.saguaro.budget import Budget, Curve, Prospect, best_budget, best_lengths

CHANCES = st.lists(st.floats(0.0, 1.0), max_size=4)
ROWS = st.lists(CHANCES, min_size=1, max_size=3)
COSTS = st.lists(st.floats(0.0, 5.0), min_size=25, max_size=25)


def convex(increments: Sequence[float]) -> Curve:
    """Every further token costs at least as much as the one before it."""
    costs = np.array([*accumulate(sorted(increments), initial=1.0)])
    return lambda tokens: costs[tokens]


def steps(increments: Sequence[float]) -> Curve:
    """Four tokens cost what one does: where shapes are padded."""
    costs = np.array([*accumulate(increments, initial=1.0)])
    return lambda tokens: costs[-(-tokens // 4)]


def anyhow(increments: Sequence[float]) -> Curve:
    """More tokens cost no less, and nothing else is said."""
    costs = np.array([*accumulate(increments, initial=1.0)])
    return lambda tokens: costs[tokens]


SHAPES = st.sampled_from([convex, steps, anyhow])


def gain(chances: Sequence[float], length: int) -> float:
    """Tokens that a row yields, expected, that verifies so many."""
    return sum(accumulate(chances[:length], lambda reach, chance: reach * chance, initial=1.0))


def rate(rows: Sequence[Sequence[float]], lengths: Sequence[int], ms: float) -> float:
    return sum(gain(chances, length) for chances, length in zip(rows, lengths, strict=True)) / ms


def best_rate(rows: Sequence[Sequence[float]], verify_ms: Curve, other_ms: float) -> float:
    """By trying all lengths of all rows."""
    choices = product(*(range(len(chances) + 1) for chances in rows))
    return max(rate(rows, lengths, verify_ms(len(rows) + sum(lengths)) + other_ms) for lengths in choices)


def check(budget: Budget, rows: Sequence[Sequence[float]], ms: float) -> None:
    """What a budget says of itself is so."""
    assert budget.ms == pytest.approx(ms)
    assert budget.rate == pytest.approx(rate(rows, budget.lengths, ms))
    last = [
        gain(row, length) - gain(row, length - 1) for row, length in zip(rows, budget.lengths, strict=True) if length
    ]
    assert budget.least == pytest.approx(min(last, default=1.0), abs=1e-9)


@given(ROWS, COSTS, SHAPES, st.floats(0.0, 20.0))
def test_the_best_lengths_are_the_best_of_all(
    rows: list[list[float]],
    increments: list[float],
    shape: Callable[[Sequence[float]], Curve],
    other_ms: float,
) -> None:
    verify_ms = shape(increments)
    budget = best_lengths(rows, verify_ms, other_ms)
    assert budget.steps == 0
    check(budget, rows, verify_ms(len(rows) + sum(budget.lengths)) + other_ms)
    assert budget.rate == pytest.approx(best_rate(rows, verify_ms, other_ms))


@given(
    st.lists(st.builds(Prospect, CHANCES, st.lists(st.floats(0.0, 1.0), max_size=6)), min_size=1, max_size=2),
    COSTS,
    SHAPES,
    st.floats(0.0, 20.0),
    st.floats(0.0, 20.0),
    st.floats(0.0, 5.0),
    st.sampled_from([0.0, 3.0]),
    st.floats(0.0, 1.0),
)
def test_the_best_budget_is_the_best_of_all_lengths_and_waits(
    rows: list[Prospect],
    increments: list[float],
    shape: Callable[[Sequence[float]], Curve],
    other_ms: float,
    delay_ms: float,
    step_ms: float,
    under_way_ms: float,
    arrival: float,
) -> None:
    """``under_way_ms`` is what a step that has begun costs a target that does not wait for it."""
    verify_ms = shape(increments)

    def wait_ms(count: int) -> float:
        return delay_ms + count * step_ms if count else under_way_ms

    def after(count: int) -> list[list[float]]:
        late = [
            [chance * (1.0 if place else arrival) for place, chance in enumerate(row.coming[:count])] for row in rows
        ]
        return [[*row.there, *added] for row, added in zip(rows, late, strict=True)]

    budget = best_budget(rows, verify_ms, wait_ms, other_ms, arrival)
    waited = other_ms + wait_ms(budget.steps)
    check(budget, after(budget.steps), verify_ms(len(rows) + sum(budget.lengths)) + waited)
    longest = max(len(row.coming) for row in rows)
    everything = [best_rate(after(count), verify_ms, other_ms + wait_ms(count)) for count in range(longest + 1)]
    assert budget.rate == pytest.approx(max(everything))


def test_a_long_way_is_gone_to_its_end() -> None:
    """Of a wait most may be the way there: one step alone is not worth it, and neither are two."""
    budget = best_budget([Prospect((), [0.99] * 7)], lambda tokens: 10.0, lambda count: 30.0 + count if count else 0.0)
    assert budget.steps == 7


def test_where_tokens_are_free_all_are_verified() -> None:
    budget = best_lengths([[0.9, 0.1, 0.01], [0.001]], lambda tokens: 10.0)
    assert list(budget.lengths) == [3, 1]
    assert budget.least == pytest.approx(0.9 * 0.1 * 0.01)


def test_where_each_costs_as_much_as_the_first_none_is() -> None:
    budget = best_lengths([[0.9, 0.9], [0.5]], lambda tokens: 10.0 * tokens)
    assert (list(budget.lengths), budget.least) == ([0, 0], 1.0)


def test_the_surer_row_gets_the_tokens() -> None:
    sure, unsure = [0.95] * 4, [0.2] * 4
    budget = best_lengths([unsure, sure], lambda tokens: 10.0 + 3.0 * tokens)
    assert list(budget.lengths) == [0, 4]


def test_nobody_waits_for_what_does_not_come() -> None:
    rows = [Prospect((), [0.9] * 4)]
    assert best_budget(rows, lambda tokens: 10.0, lambda count: 1.0 * count).steps > 0
    assert best_budget(rows, lambda tokens: 10.0, lambda count: 1.0 * count, arrival=0.0).steps == 0


def test_costs_of_nothing_are_no_division_by_it() -> None:
    assert best_lengths([[0.5]], lambda tokens: 0.0).tokens == 1.5
