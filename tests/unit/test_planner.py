"""The plan follows what changes and not what twitches."""

from __future__ import annotations

import random
from math import inf

import pytest

from ssd_ray.bench.simulate import Hardware, geometric_pair, ssd
from ssd_ray.saguaro.backup import ENOUGH, Pace
from ssd_ray.saguaro.budget import Prospect
from ssd_ray.saguaro.costs import Costs, Load, Measured
from ssd_ray.saguaro.factors import FACTORS
from ssd_ray.saguaro.planner import PATIENCE, RAREST_TRIAL, Plan, Planner


def make(lookahead: int = 7, c: float | str | None = None) -> tuple[Pace, Planner]:
    """A planner of a machine of which nothing was measured."""
    pace = Pace()
    return pace, Planner(pace, Costs(), lookahead, c)


def rounds(
    pace: Pace,
    planner: Planner,
    count: int,
    *,
    verify: float,
    step: float,
    accept: float,
    noise: float,
    dice: random.Random,
    drag: float = 0.0,
) -> list[Plan]:
    """Plans that were made in ``count`` rounds of these times, each off by up to ``noise``. Drafts work all the time,
    unless they have been priced out, and slow verifications down by ``drag``."""
    plans = []
    for _ in range(count):
        accepted = next((k for k in range(7) if dice.random() > accept), 7)
        working = planner.price < inf
        ms = verify * (1.0 + drag * working) * dice.uniform(1 - noise, 1 + noise)
        pace.saw_decision(7, accepted)
        planner.saw_verification(8, Load(), ms, ms * working)
        pace.saw_round(1 + accepted, ms, 0.0)
        if working:
            pace.saw_step(step * dice.uniform(1 - noise, 1 + noise))
        plans += [plan for plan in [planner.update()] if plan]
    return plans


def test_before_anything_is_measured_the_plan_is_the_most() -> None:
    _, planner = make(5)
    assert planner.update() is None
    assert planner.plan.wait == 5


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_make_it_oscillate(seed: int) -> None:
    (pace, planner), dice = make(), random.Random(seed)
    rounds(pace, planner, 200, verify=15, step=2, accept=0.6, noise=0.5, dice=dice)
    assert len(rounds(pace, planner, 3000, verify=15, step=2, accept=0.6, noise=0.5, dice=dice)) <= 6


def test_a_step_change_is_followed_once() -> None:
    (pace, planner), dice = make(), random.Random(0)
    rounds(pace, planner, 300, verify=15, step=1, accept=0.8, noise=0.2, dice=dice)
    before = planner.plan
    plans = rounds(pace, planner, 300, verify=15, step=60, accept=0.8, noise=0.2, dice=dice)
    assert before.wait >= 3
    assert planner.plan.wait == 0
    assert 1 <= len(plans) <= 4


def test_a_passing_disturbance_changes_nothing() -> None:
    (pace, planner), dice = make(), random.Random(0)
    rounds(pace, planner, 300, verify=15, step=1, accept=0.8, noise=0.1, dice=dice)
    assert not rounds(pace, planner, PATIENCE // 4, verify=15, step=60, accept=0.8, noise=0.1, dice=dice)


def test_the_plan_says_why() -> None:
    pace, planner = make()
    for _ in range(ENOUGH):
        pace.saw_decision(7, 3)
        planner.saw_verification(8, Load(), 15.0, 15.0)
        pace.saw_step(2.0)
        plan = planner.update() or planner.plan
    assert "verification 15.0 ms for one token and 15.0 for 8, 0% more beside drafts, draft step 2.0 ms" in str(plan)


@pytest.mark.parametrize("acceptance", [0.4, 0.6, 0.85])
@pytest.mark.parametrize(("verify", "step"), [(18.0, 1.9), (30.0, 3.5), (60.0, 2.0)])
def test_the_planned_wait_is_the_best_in_simulation(verify: float, step: float, acceptance: float) -> None:
    """The simulator has whole trees on every hit, so these drafts have the time for them."""
    (pace, planner), dice = make(), random.Random(1)
    assert pace.delay_ms == 0.5
    rounds(pace, planner, 1500, verify=verify, step=step, accept=acceptance, noise=0.1, dice=dice)
    hardware = Hardware(verify_ms=verify, step_ms=step, message_ms=0.5)

    def speed(wait: int) -> float:
        pair = geometric_pair(acceptance, hit_rate=0.7, wait=wait)
        return ssd(hardware, pair, rounds=8_000).tokens_per_s

    assert speed(planner.plan.wait) > 0.97 * max(speed(wait) for wait in range(8))


def drawn(accepting: float, dearness: float, dice: random.Random, noise: float = 0.0) -> list[tuple[float, float]]:
    """What each C would do at a position: hits grow as C falls, acceptance is lost at this rate. Some positions are
    hard for all of them, and a little of the noise is each one's own."""
    common = dice.uniform(-noise, noise)
    accepted = [accepting - dearness * (1.0 - c) + common + 0.2 * dice.uniform(-noise, noise) for c in FACTORS]
    return [(min(max(each, 0.0), 1.0), 0.3 + 0.6 * (1.0 - c)) for each, c in zip(accepted, FACTORS, strict=True)]


def factor(planner: Planner, pace: Pace, dearness: float, noise: float, count: int = 600) -> list[float]:
    """The Cs of the plans that were made in so many rounds, each with one position looked at."""
    dice, factors = random.Random(0), []
    for _ in range(count):
        assert planner.factors is not None
        planner.factors.saw_position(drawn(0.7, dearness, dice, noise))
        before = planner.c
        rounds(pace, planner, 1, verify=15, step=4, accept=0.7, noise=0.1, dice=dice)
        factors += [planner.c] if planner.c != before else []
    return factors


def test_c_follows_what_acceptance_costs() -> None:
    pace, planner = make(c="auto")
    assert factor(planner, pace, dearness=0.0, noise=0.1)[-1] == 0.0
    assert 1 <= len(factor(planner, pace, dearness=0.65, noise=0.1)) <= 4
    assert planner.c == 1.0
    assert "draw with C = 1" in str(planner.update() or planner.plan)


def test_noise_does_not_make_c_oscillate() -> None:
    pace, planner = make(c="auto")
    factor(planner, pace, dearness=0.2, noise=0.3, count=200)
    assert len(factor(planner, pace, dearness=0.2, noise=0.3, count=3000)) <= 4


def test_a_given_c_stays_and_coupled_mode_has_none() -> None:
    assert make(c=0.4)[1].c == 0.4
    assert make()[1].c is None
    assert "C =" not in str(make()[1].plan)


def test_whatever_drafts_report_a_wait_is_bounded() -> None:
    pace = Pace()
    for _ in range(ENOUGH):
        pace.saw_step(1e9)
    assert pace.patience_ms(7, 20.0) <= 20.0 + 100.0


@pytest.mark.parametrize("drag", [0.0, 0.2, 0.6])
def test_drafting_has_the_price_of_what_it_costs_the_target(drag: float) -> None:
    (pace, planner), dice = make(), random.Random(0)
    rounds(pace, planner, 400, verify=15, step=2, accept=0.6, noise=0.05, dice=dice, drag=drag)
    prices = []
    for _ in range(100):
        rounds(pace, planner, 1, verify=15, step=2, accept=0.6, noise=0.05, dice=dice, drag=drag)
        prices += [planner.price] if planner.price < inf else []
    lost = drag / (1.0 + drag)  # of a millisecond of the target's, for one of a draft's
    assert sum(prices) / len(prices) / pace.rate == pytest.approx(lost, abs=0.06)


def test_trials_become_rare() -> None:
    (pace, planner), dice = make(), random.Random(0)

    def trials(count: int) -> int:
        total = 0
        for _ in range(count):
            rounds(pace, planner, 1, verify=15, step=2, accept=0.6, noise=0.1, dice=dice, drag=0.3)
            total += planner.price == inf
        return total

    assert trials(50) >= 2
    trials(500)
    assert trials(2000) <= 3 * 2000 // RAREST_TRIAL + 3


def test_where_tokens_cost_only_likely_ones_are_verified() -> None:
    """And drafts are told below which probability they are not."""
    sizes = tuple(range(1, 33))
    for token_ms, length in ((0.0, 3), (3.0, 1), (30.0, 0)):
        costs = Costs(Measured(sizes, tuple(10.0 + token_ms * (size - 1) for size in sizes)))
        planner = Planner(Pace(), costs, 7)
        budgets = [planner.budget([Prospect([0.9, 0.3, 0.3])], Load()) for _ in range(50)]
        assert list(budgets[-1].lengths) == [length]
        assert planner.floor == pytest.approx(min(1.0, budgets[-1].rate * token_ms), abs=0.01)
