"""Policies: which outcomes, and how long to wait."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.saguaro.backup import Costs, Pace, best_length
from ssd_ray.saguaro.fanout import (
    MAX_RANK,
    POLICIES,
    Auto,
    Confidence,
    FanOutPolicy,
    Geometric,
    Histogram,
    Situation,
    Source,
    Uniform,
    fit_exponent,
    shape,
)

gaps = st.lists(st.floats(0.0, 20.0), max_size=8).map(sorted)
situations = st.builds(Situation, st.lists(gaps, min_size=1, max_size=8), st.booleans())
outcomes = st.lists(st.tuples(situations, st.integers(0, 7), st.none() | st.integers(0, 99)), max_size=30)


def sure(n: int, gap: float = 1.0, after_hit: bool = True) -> Situation:
    """A round of n tokens of which the draft is equally sure."""
    return Situation([[gap + 0.1 * rank for rank in range(MAX_RANK)] for _ in range(n + 1)], after_hit)


@pytest.mark.parametrize("name", POLICIES)
@given(seen=outcomes, situation=situations)
def test_weights_are_a_distribution_whatever_was_seen(
    name: str, seen: list[tuple[Situation, int, int | None]], situation: Situation
) -> None:
    policy: FanOutPolicy = POLICIES[name]()
    for earlier, accepted, rank in seen:
        policy.observe(earlier, min(accepted, earlier.n), rank)
    weights = policy.depths(situation)
    assert len(weights) == situation.n + 1
    assert sum(weights) == pytest.approx(1.0)
    assert min(weights) >= 0.0
    for depth in range(situation.n + 1):
        ranks = list(policy.ranks(situation, depth))
        assert len(ranks) >= len(situation.gaps[depth])
        assert ranks == sorted(ranks, reverse=True)
        assert min(ranks) >= 0.0


@pytest.mark.parametrize("name", POLICIES)
@given(seen=outcomes, situation=situations, data=st.data())
def test_the_place_of_an_outcome_is_where_best_first_comes_to_it(
    name: str, seen: list[tuple[Situation, int, int | None]], situation: Situation, data: st.DataObject
) -> None:
    policy: FanOutPolicy = POLICIES[name]()
    for earlier, accepted, rank in seen:
        policy.observe(earlier, min(accepted, earlier.n), rank)
    depth = data.draw(st.integers(0, situation.n))
    rank = data.draw(st.integers(0, max(0, len(situation.gaps[depth]) - 1)))
    place = policy.place(situation, depth, rank)
    values = [
        [weight * value for value in policy.ranks(situation, at)] for at, weight in enumerate(policy.depths(situation))
    ]
    mine = values[depth][rank]
    larger = sum(value > mine * (1 + 1e-9) for row in values for value in row)
    smaller = sum(value < mine * (1 - 1e-9) for row in values for value in row)
    assert place is not None
    assert larger <= place <= sum(map(len, values)) - smaller
    assert policy.place(situation, depth, None) is None


def test_histogram_learns_what_it_sees() -> None:
    policy = Histogram()
    for accepted in itertools.islice(itertools.cycle([0, 4, 4, 4]), 400):
        policy.observe(sure(4), accepted, 0)
        policy.observe(sure(4, after_hit=False), 0, 0)
    weights = policy.depths(sure(4))
    assert weights[0] == pytest.approx(0.25, abs=0.05)
    assert weights[4] == pytest.approx(0.75, abs=0.05)
    assert policy.depths(sure(4, after_hit=False))[0] > 0.95


def test_geometric_is_the_closed_form() -> None:
    policy = Geometric()
    for _ in range(500):
        policy.observe(sure(4), 4, 0)
        policy.observe(sure(4), 0, 0)
    a = 4 / 5
    expected = [a**k * (1 - a) for k in range(4)] + [a**4]
    assert list(policy.depths(sure(4))) == pytest.approx(expected, rel=0.05)


def test_uniform_takes_the_depths_in_turn() -> None:
    places = {(depth, rank): Uniform().place(sure(3), depth, rank) for depth in range(4) for rank in range(5)}
    assert all(4 * rank <= (place or 0) < 4 * rank + 4 for (_, rank), place in places.items())


def test_confidence_learns_what_a_lead_is_worth() -> None:
    policy = Confidence()
    for _ in range(300):
        policy.observe(sure(1, gap=6.0), 1, 0)
        policy.observe(sure(1, gap=0.2), 0, 0)
    assert policy.depths(sure(1, gap=6.0))[1] > 0.9
    assert policy.depths(sure(1, gap=0.2))[0] > 0.9
    assert policy.acceptance(6.0, Source.MODEL) > 0.9 > 0.1 > policy.acceptance(0.2, Source.MODEL)


def test_confidence_tells_sources_apart() -> None:
    policy = Confidence()
    for _ in range(300):
        for source, accepted in ((Source.BOTH, 1), (Source.OVERRULED, 0)):
            situation = sure(1)
            situation.sources = [source] * 2
            policy.observe(situation, accepted, 0)
    assert policy.acceptance(1.0, Source.BOTH) > 0.9 > 0.1 > policy.acceptance(1.0, Source.OVERRULED)


def test_auto_follows_the_one_with_more_hits() -> None:
    """A lead that says nothing: only the histogram knows at which depth rounds end."""
    policy = Auto()
    assert isinstance(policy.best, Confidence)
    for accepted in itertools.islice(itertools.cycle([3, 3, 3, 0, 3, 3, 1]), 900):
        situation = sure(4, gap=1.0)
        situation.budget = 1
        policy.observe(situation, accepted, 0)
    assert isinstance(policy.best, Histogram)


def test_without_speculation_all_weight_is_on_none_accepted() -> None:
    assert all(list(policy().depths(sure(0))) == [1.0] for policy in POLICIES.values())


weights = st.lists(st.floats(0.0, 1.0) | st.just(0.0), min_size=1, max_size=8)


@given(weights, st.floats(0.2, 4.0), st.integers(0, 64))
def test_a_shape_deals_the_budget_out_exactly(weights: list[float], r: float, budget: int) -> None:
    guesses = shape(weights, r, budget)
    assert sum(guesses) == (budget if any(weights) else 0)
    assert all(guess == 0 for guess, weight in zip(guesses, weights, strict=True) if weight == 0.0)
    if budget >= len(weights):
        assert all(guess > 0 for guess, weight in zip(guesses, weights, strict=True) if weight > 0.0)
    for guess, weight in zip(guesses, weights, strict=True):
        assert all(guess + 1 >= other for other, less in zip(guesses, weights, strict=True) if less <= weight)


def hit_rate(guesses: Sequence[int], weights: Sequence[float], r: float) -> float:
    """The chance of a hit if the bonus token is not among F guesses with chance (F + 1)^-r."""
    return sum(weight * (1.0 - (guess + 1) ** -r) for guess, weight in zip(guesses, weights, strict=True))


@pytest.mark.parametrize("r", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("a", [0.3, 0.6, 0.9])
def test_the_closed_form_is_within_two_percent_of_the_best_of_all_shapes(a: float, r: float) -> None:
    weights = [a**k * (1 - a) for k in range(3)] + [a**3]
    budget = 12
    best = max(
        hit_rate(guesses, weights, r)
        for guesses in itertools.product(range(budget + 1), repeat=4)
        if sum(guesses) == budget
    )
    assert hit_rate(shape(weights, r, budget), weights, r) > 0.98 * best


@pytest.mark.parametrize("r", [0.3, 0.7, 1.5])
def test_the_exponent_is_found_again(r: float) -> None:
    assert fit_exponent([fan**-r for fan in range(2, 30)]) == pytest.approx(r)


@given(
    available=st.integers(0, 7),
    most=st.integers(0, 7),
    acceptance=st.lists(st.floats(0.0, 1.0), min_size=7, max_size=7),
    verify_ms=st.floats(1, 100),
    step_ms=st.floats(0.1, 100),
    delay_ms=st.floats(0, 10),
)
def test_best_length_is_the_best_of_all(
    available: int, most: int, acceptance: list[float], verify_ms: float, step_ms: float, delay_ms: float
) -> None:
    chosen = best_length(available, most, acceptance, Costs(verify_ms, step_ms, delay_ms))

    def rate(length: int) -> float:
        gain = sum(_product(acceptance[:n]) for n in range(length + 1))
        steps = max(0, length - available)
        return gain / (verify_ms + steps * step_ms + (delay_ms if steps else 0.0))

    lengths = range(min(available, most), most + 1)
    assert chosen in lengths
    assert rate(chosen) >= max(map(rate, lengths)) * 0.999


def _product(values: list[float]) -> float:
    result = 1.0
    for value in values:
        result *= value
    return result


def test_a_slow_draft_is_not_waited_for_and_a_fast_one_is() -> None:
    pace = Pace()
    assert pace.best_length(2, 7) == 7
    pace.saw_verification(20.0, 0, 0)
    pace.saw_step(200.0)
    assert pace.best_length(0, 7) == 0
    for _ in range(200):
        pace.saw_step(1.0)
    assert pace.best_length(0, 7) >= 3
    assert pace.patience_ms(3) < 20.0


def test_what_was_whole_from_the_start_says_nothing_about_waiting() -> None:
    pace = Pace()
    for _ in range(50):
        pace.saw_verification(20.0, 7, 7, whole=True)
        pace.saw_verification(20.0, 2, 1)
    assert pace.acceptance[1] < 0.1
    assert pace.acceptance[2:] == Pace().acceptance[2:]
