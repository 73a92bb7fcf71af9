"""Policies: which outcomes, and how long to wait."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.config import MAX_LOOKAHEAD
from ssd_ray.saguaro.backup import ENOUGH, Pace
from ssd_ray.saguaro.budget import Prospect, best_budget
from ssd_ray.saguaro.calibration import Calibration, to_byte
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


chances = st.lists(st.floats(0.0, 1.0), max_size=4)


def wait(pace: Pace, verify_ms: float) -> int:
    """Steps that a row with nothing waits for."""
    prospect = Prospect((), pace.acceptance[:7])
    return best_budget([prospect], lambda tokens: verify_ms, pace.wait_ms, pace.host_ms, pace.arrival).steps


def test_a_slow_draft_is_not_waited_for_and_a_fast_one_is() -> None:
    pace = Pace()
    assert not pace.known
    for _ in range(ENOUGH):
        pace.saw_step(200.0)
    assert pace.known
    assert wait(pace, 20.0) == 0
    for _ in range(200):
        pace.saw_step(1.0)
    assert wait(pace, 20.0) >= 3
    assert pace.patience_ms(3, 20.0) < 20.0


def test_one_slow_step_says_nothing() -> None:
    pace = Pace()
    for milliseconds in (1.0, 1.0, 1.0, 500.0):
        pace.saw_step(milliseconds)
    assert pace.step_ms == 1.0


def test_waits_in_vain_become_rare() -> None:
    pace = Pace()
    for _ in range(ENOUGH):
        pace.saw_step(2.0)
    assert wait(pace, 20.0) > 0
    for _ in range(30):
        pace.saw_wait(5.0, 1, came=False)
    assert wait(pace, 20.0) == 0


def test_what_was_whole_from_the_start_says_nothing_about_waiting() -> None:
    pace = Pace()
    for _ in range(50):
        pace.saw_decision(7, 7, whole=True)
        pace.saw_decision(2, 1)
    assert pace.acceptance[1] < 0.2
    assert pace.acceptance[2:] == [pace.acceptance[1]] * (MAX_LOOKAHEAD - 2)  # as at the last depth that was tried


def test_a_depth_that_was_unlucky_at_first_is_tried_again() -> None:
    """What is not tried is thought to be like the depth above it, whatever its few tries came to."""
    pace = Pace()
    for _ in range(4):
        pace.saw_decision(2, 1)
    unlucky = pace.acceptance[1]
    assert unlucky < 0.6 * pace.acceptance[0]
    for _ in range(100):
        pace.saw_decision(1, 1)
    assert pace.acceptance[0] > 0.9
    assert pace.acceptance[1] > 0.7 * pace.acceptance[0]
    assert pace.acceptance[1] > 1.5 * unlucky


def test_rounds_that_try_nothing_let_nothing_be_forgotten_for_long() -> None:
    pace = Pace()
    for _ in range(100):
        pace.saw_decision(1, 0)
    low = pace.acceptance[0]
    for _ in range(300):
        pace.saw_decision(0, 0)
    assert pace.acceptance[0] < low + 0.1
    for _ in range(10_000):
        pace.saw_decision(0, 0)
    assert pace.acceptance[0] > 0.7  # it may have changed


def test_another_way_of_drafting_has_delays_of_its_own() -> None:
    pace = Pace()
    for _ in range(ENOUGH):
        pace.saw_step(2.0, narrow=True)
        pace.saw_wait(22.0, 1, came=True)
    assert pace.delay_ms > 1.0
    pace.forget_delays()
    assert pace.delay_ms == 0.5


@given(said=st.integers(1, 255), depth=st.integers(0, 14))
def test_a_draft_that_nobody_knows_is_believed(said: int, depth: int) -> None:
    assert Calibration().chance(said, depth) == pytest.approx(said / 255)
    assert to_byte(said / 255) == said


def test_a_draft_that_boasts_is_not_believed_for_long() -> None:
    calibration, dice = Calibration(), random.Random(0)
    for _ in range(2000):
        calibration.saw(250, 0, accepted=dice.random() < 0.4)
        calibration.end_round()
    assert calibration.chance(250, 0) == pytest.approx(0.4, abs=0.08)
    assert calibration.chance(250, 9) > 0.9  # elsewhere nothing was seen
    for _ in range(3000):
        calibration.end_round()
    assert calibration.chance(250, 0) > 0.9
