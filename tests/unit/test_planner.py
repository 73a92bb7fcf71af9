"""The plan follows what changes and not what twitches."""

from __future__ import annotations

import random

import pytest

from ssd_ray.bench.simulate import Hardware, geometric_pair, ssd
from ssd_ray.saguaro.backup import Pace
from ssd_ray.saguaro.factors import FACTORS
from ssd_ray.saguaro.planner import PATIENCE, Plan, Planner


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
) -> list[Plan]:
    """Plans that were made in ``count`` rounds of these times, each off by up to ``noise``."""
    plans = []
    for _ in range(count):
        accepted = next((k for k in range(7) if dice.random() > accept), 7)
        pace.saw_verification(verify * dice.uniform(1 - noise, 1 + noise), 7, accepted)
        pace.saw_step(step * dice.uniform(1 - noise, 1 + noise))
        plans += [plan for plan in [planner.update()] if plan]
    return plans


def test_before_anything_is_measured_the_plan_is_the_most() -> None:
    planner = Planner(Pace(), 5)
    assert planner.update() is None
    assert planner.plan.wait == 5


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_make_it_oscillate(seed: int) -> None:
    pace, dice = Pace(), random.Random(seed)
    planner = Planner(pace, 7)
    rounds(pace, planner, 200, verify=15, step=2, accept=0.6, noise=0.5, dice=dice)
    assert len(rounds(pace, planner, 3000, verify=15, step=2, accept=0.6, noise=0.5, dice=dice)) <= 6


def test_a_step_change_is_followed_once() -> None:
    pace, dice = Pace(), random.Random(0)
    planner = Planner(pace, 7)
    rounds(pace, planner, 300, verify=15, step=1, accept=0.8, noise=0.2, dice=dice)
    before = planner.plan
    plans = rounds(pace, planner, 300, verify=15, step=60, accept=0.8, noise=0.2, dice=dice)
    assert before.wait >= 3
    assert planner.plan.wait == 0
    assert 1 <= len(plans) <= 4


def test_a_passing_disturbance_changes_nothing() -> None:
    pace, dice = Pace(), random.Random(0)
    planner = Planner(pace, 7)
    rounds(pace, planner, 300, verify=15, step=1, accept=0.8, noise=0.1, dice=dice)
    assert not rounds(pace, planner, PATIENCE // 4, verify=15, step=60, accept=0.8, noise=0.1, dice=dice)


def test_the_plan_says_why() -> None:
    pace = Pace()
    planner = Planner(pace, 7)
    pace.saw_verification(15.0, 7, 3)
    pace.saw_step(2.0)
    plan = planner.update()
    assert plan is not None
    assert "verification 15.0 ms, draft step 2.0 ms" in str(plan)


@pytest.mark.parametrize("acceptance", [0.4, 0.6, 0.85])
@pytest.mark.parametrize(("verify", "step"), [(18.0, 1.9), (30.0, 3.5), (60.0, 2.0)])
def test_the_planned_wait_is_the_best_in_simulation(verify: float, step: float, acceptance: float) -> None:
    """The simulator has whole trees on every hit, so these drafts have the time for them."""
    pace, dice = Pace(), random.Random(1)
    planner = Planner(pace, 7)
    pace.delay_ms = 0.5
    rounds(pace, planner, 1500, verify=verify, step=step, accept=acceptance, noise=0.1, dice=dice)
    hardware = Hardware(verify_ms=verify, step_ms=step, message_ms=0.5)

    def speed(wait: int) -> float:
        pair = geometric_pair(acceptance, hit_rate=0.7, wait=wait)
        return ssd(hardware, pair, rounds=20_000).tokens_per_s

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
    pace = Pace()
    planner = Planner(pace, 7, "auto")
    assert factor(planner, pace, dearness=0.0, noise=0.1)[-1] == 0.0
    assert 1 <= len(factor(planner, pace, dearness=0.65, noise=0.1)) <= 4
    assert planner.c == 1.0
    assert "draw with C = 1" in str(planner.update() or planner.plan)


def test_noise_does_not_make_c_oscillate() -> None:
    pace = Pace()
    planner = Planner(pace, 7, "auto")
    factor(planner, pace, dearness=0.2, noise=0.3, count=200)
    assert len(factor(planner, pace, dearness=0.2, noise=0.3, count=3000)) <= 4


def test_a_given_c_stays_and_coupled_mode_has_none() -> None:
    assert Planner(Pace(), 7, 0.4).c == 0.4
    assert Planner(Pace(), 7).c is None
    assert "C =" not in str(Planner(Pace(), 7).plan)


def test_whatever_drafts_report_a_wait_is_bounded() -> None:
    pace = Pace()
    pace.saw_verification(20.0, 7, 3)
    pace.saw_step(1e9)
    assert pace.patience_ms(7) <= 20.0 + 100.0
