"""Policies: which outcomes, and how long to wait."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ssd_ray.config import MAX_LOOKAHEAD
from ssd_ray.saguaro.backup import ENOUGH, Pace
from ssd_ray.saguaro.budget import Prospect, best_budget, best_lengths
from ssd_ray.saguaro.calibration import Calibration, to_byte
from ssd_ray.saguaro.costs import Costs, Load, Measured
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


@given(
    rows=st.lists(chances, min_size=1, max_size=3),
    curve=st.lists(st.floats(0.0, 5.0), min_size=16, max_size=16),
    fixed_ms=st.floats(0.1, 50.0),
    other_ms=st.floats(0.0, 5.0),
)
def test_the_tokens_of_a_round_are_the_best_of_all(
    rows: list[list[float]], curve: list[float], fixed_ms: float, other_ms: float
) -> None:
    """Whatever a verification costs by its tokens."""
    costs = [fixed_ms, *(fixed_ms + total for total in itertools.accumulate(curve))]
    budget = best_lengths(rows, costs.__getitem__, other_ms)

    def rate(lengths: Sequence[int]) -> float:
        tokens = sum(sum(_product(row[:i]) for i in range(n + 1)) for row, n in zip(rows, lengths, strict=True))
        return tokens / (costs[len(rows) + sum(lengths)] + other_ms)

    best = max(map(rate, itertools.product(*(range(len(row) + 1) for row in rows))))
    assert rate(budget.lengths) == pytest.approx(budget.rate)
    assert budget.rate == pytest.approx(best)
    gains = [_product(row[:n]) for row, n in zip(rows, budget.lengths, strict=True) if n]
    assert budget.least == pytest.approx(min(gains, default=1.0))


@given(
    rows=st.lists(st.tuples(chances, chances), min_size=1, max_size=3),
    fixed_ms=st.floats(1.0, 100.0),
    token_ms=st.floats(0.0, 10.0),
    step_ms=st.floats(0.1, 100.0),
    delay_ms=st.floats(0.0, 10.0),
    arrival=st.floats(0.0, 1.0),
)
@example([([], [0.05, 1.0, 1.0, 1.0])], 100.0, 0.0, 1.0, 10.0, 1.0)  # two steps are not worth the delay, three are
def test_a_wait_is_the_best_of_all(
    rows: list[tuple[list[float], list[float]]],
    fixed_ms: float,
    token_ms: float,
    step_ms: float,
    delay_ms: float,
    arrival: float,
) -> None:
    prospects = [Prospect(there, coming) for there, coming in rows]

    def verify_ms(tokens: int) -> float:
        return fixed_ms + tokens * token_ms

    def wait_ms(steps: int) -> float:
        return steps * step_ms + delay_ms

    chosen = best_budget(prospects, verify_ms, wait_ms, 0.5, arrival)

    def rate(steps: int) -> float:
        after = [
            [*there, *(c * (1.0 if i else arrival) for i, c in enumerate(coming[:steps]))] for there, coming in rows
        ]
        return best_lengths(after, verify_ms, 0.5 + (wait_ms(steps) if steps else 0.0)).rate

    assert rate(chosen.steps) == pytest.approx(chosen.rate)
    assert chosen.rate >= 0.999 * max(map(rate, range(5)))


def _product(values: list[float]) -> float:
    result = 1.0
    for value in values:
        result *= value
    return result


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


MEASURED = Measured((1, 4, 8, 16), (5.0, 8.0, 8.0, 16.0), row_ms=0.5, slot_ms=0.001)


def test_a_verification_costs_what_was_measured() -> None:
    costs = Costs(MEASURED)
    assert [costs.alone_ms(tokens) for tokens in (1, 4, 6, 12, 24)] == [5.0, 8.0, 8.0, 12.0, 24.0]
    assert costs.alone_ms(4, Load(rows=3, slots=100)) == pytest.approx(8.0 + 1.0 + 0.1)
    assert costs.per_token_ms(8) == pytest.approx(1.0)


def test_the_first_verification_says_what_nobody_measured() -> None:
    costs = Costs()
    assert not costs.known
    costs.saw(4, Load(), 12.0, beside=False)
    assert costs.known
    assert costs.alone_ms(1) == costs.alone_ms(9) == pytest.approx(12.0)


def test_costs_follow_the_machine_and_not_its_noise() -> None:
    costs, dice = Costs(MEASURED), random.Random(0)
    for _ in range(600):
        tokens = dice.choice([1, 4, 8, 16])
        truth = 2.0 * MEASURED.ms[MEASURED.sizes.index(tokens)]
        disturbed = truth * (50.0 if dice.random() < 0.05 else dice.uniform(0.9, 1.1))
        costs.saw(tokens, Load(), disturbed, beside=False)
    for tokens, once in zip(MEASURED.sizes, MEASURED.ms, strict=True):
        assert costs.alone_ms(tokens) == pytest.approx(2.0 * once, rel=0.3)


def test_what_drafts_cost_is_found_by_trials() -> None:
    costs, dice = Costs(MEASURED), random.Random(0)
    for round in range(200):
        resting = round % 20 == 19
        truth = 8.0 * (1.0 if resting else 1.5) * dice.uniform(0.95, 1.05)
        if resting:
            costs.saw_trial(4, Load(), truth, beside=False)
        else:
            costs.saw(4, Load(), truth, beside=True)
    assert costs.drag == pytest.approx(0.5, abs=0.15)
    assert costs.verify_ms(4) == pytest.approx(12.0, rel=0.15)
    assert costs.alone_ms(4) == pytest.approx(8.0, rel=0.15)


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
