"""What verifications cost, learned from those that ran."""

from __future__ import annotations

import random
from math import isfinite

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.saguaro.costs import TELLING, TRIALS, Costs, Load, Measured

SIZES = (1, 2, 4, 8, 16)
ONE = Load()


def line(fixed: float, slope: float) -> Measured:
    return Measured(SIZES, tuple(fixed + slope * size for size in SIZES))


def run(costs: Costs, real: Measured, rounds: int, noise: float = 0.0, seed: int = 0, times: float = 1.0) -> None:
    """Verifications of all sizes on a machine that is really so."""
    dice, machine = random.Random(seed), Costs(real)
    for _ in range(rounds):
        tokens = dice.choice(SIZES)
        ms = times * machine.alone_ms(tokens) * dice.uniform(1.0 - noise, 1.0 + noise)
        costs.saw(tokens, ONE, ms, beside=0.0)


def relative(costs: Costs) -> list[float]:
    return [costs.alone_ms(size) / costs.alone_ms(1) for size in SIZES]


class TestTheCurve:
    def test_it_goes_through_what_was_measured(self) -> None:
        costs = Costs(Measured((1, 4, 8), (5.0, 8.0, 10.0), row_ms=2.0, slot_ms=0.01))
        assert [costs.alone_ms(tokens) for tokens in (1, 2, 4, 6, 8)] == [5.0, 6.0, 8.0, 9.0, 10.0]
        assert costs.alone_ms(4, Load(3, 100)) == 8.0 + 2 * 2.0 + 100 * 0.01

    @pytest.mark.parametrize("ms", [(5.0, 8.0, 10.0), (5.0, 8.0, 7.0), (6.0, 6.0, 30.0)])
    def test_many_sizes_at_once_cost_what_each_does(self, ms: tuple[float, ...]) -> None:
        costs, sizes = Costs(Measured((2, 4, 8), ms, row_ms=2.0)), range(1, 30)
        each = [costs.verify_ms(size, Load(3)) for size in sizes]
        assert costs.each_verify_ms(np.array(sizes), Load(3)) == pytest.approx(each)

    def test_beyond_its_end_it_goes_on_and_does_not_fall(self) -> None:
        assert Costs(Measured((1, 4, 8), (5.0, 8.0, 10.0))).alone_ms(16) == 14.0
        assert Costs(Measured((1, 4, 8), (5.0, 8.0, 7.0))).alone_ms(64) == 7.0

    def test_where_nothing_is_known_all_cost_what_the_first_did(self) -> None:
        costs = Costs()
        assert not costs.known
        costs.saw(3, ONE, 12.0, beside=0.0)
        assert costs.known
        assert [costs.alone_ms(tokens) for tokens in (1, 3, 50)] == [12.0] * 3
        assert costs.per_token_ms(1) == 0.0

    def test_drafts_beside_count_for_the_time_that_they_work(self) -> None:
        costs = Costs(line(10.0, 1.0))
        costs.drag = 0.5
        assert costs.verify_ms(1) == pytest.approx(1.5 * 11.0)
        assert costs.verify_ms(1, beside=0.0) == costs.alone_ms(1) == pytest.approx(11.0)
        took = costs.verify_ms(1, beside=0.4)
        assert took == pytest.approx(11.0 + costs.toll * 0.4 * took)

    def test_the_next_tokens_have_a_price(self) -> None:
        assert Costs(line(10.0, 0.7)).per_token_ms(1) == pytest.approx(0.7)


class TestLearning:
    def test_a_slope_it_was_not_told(self) -> None:
        costs, real = Costs(line(10.0, 0.0)), line(6.0, 1.0)
        run(costs, real, 3000, noise=0.1)
        for size, ms in zip(SIZES, real.ms, strict=True):
            assert costs.alone_ms(size) == pytest.approx(ms, rel=0.15)

    def test_a_machine_that_gets_twice_as_slow_has_the_same_prices_in_proportion(self) -> None:
        costs = Costs(line(6.0, 1.0))
        before = relative(costs)
        run(costs, line(6.0, 1.0), 200, times=2.0)
        assert costs.alone_ms(1) == pytest.approx(14.0, rel=0.05)
        assert relative(costs) == pytest.approx(before, rel=0.05)

    def test_a_verification_that_took_far_too_long_says_nothing(self) -> None:
        costs, same = Costs(line(6.0, 1.0)), Costs(line(6.0, 1.0))
        costs.saw(4, ONE, 500.0, beside=0.0)
        assert costs.alone_ms(4) == pytest.approx(same.alone_ms(4), rel=0.05)
        assert relative(costs) == pytest.approx(relative(same))

    def test_once_they_all_take_so_long_it_is_believed(self) -> None:
        costs = Costs(line(6.0, 1.0))
        run(costs, line(6.0, 1.0), 500, times=8.0)
        assert costs.alone_ms(4) == pytest.approx(80.0, rel=0.1)


def saw(costs: Costs, trial: bool, tokens: int, load: Load, ms: float, beside: float) -> None:
    if trial:
        costs.saw_trial(tokens, load, ms, beside=beside, rests=beside < 0.3)
    else:
        costs.saw(tokens, load, ms, beside=beside)


class TestDrag:
    """What drafts cost is found by resting them now and then, or by having them work."""

    @staticmethod
    def learn(real: float, *, at_work: bool, noise: float, seed: int, measured: float = 1.0) -> Costs:
        """Rounds with a trial among every ten, on a machine where drafts slow verifications down; ``measured`` is what
        was measured at load in proportion to what is."""
        costs, dice = Costs(line(measured * 6.0, measured * 1.0)), random.Random(seed)
        for number in range(10 * TRIALS * 2):
            trial = number > 50 and number % 10 == 0
            tokens, beside = dice.choice(SIZES), float(at_work != trial)
            ms = (6.0 + tokens) * (1.0 + real * beside) * dice.uniform(1.0 - noise, 1.0 + noise)
            saw(costs, trial, tokens, ONE, ms, beside)
        return costs

    @pytest.mark.parametrize("part", [0.3, 0.6, 1.0])
    def test_it_is_what_drafts_would_cost_that_work_all_the_time(self, part: float) -> None:
        """Each millisecond of drafting costs a third of one, however few there are."""
        costs = Costs(line(6.0, 1.0))
        for number in range(300):
            trial = number > 50 and number % 10 == 0
            beside = 0.0 if trial else part
            saw(costs, trial, 1, ONE, 7.0 / (1.0 - beside / 3.0), beside)
        assert costs.drag == pytest.approx(0.5, abs=0.05)
        assert costs.toll == pytest.approx(1 / 3, abs=0.02)

    @pytest.mark.parametrize("rest", [0.0, 0.1, 0.25])
    def test_a_step_that_still_ran_when_drafts_began_to_rest_is_reckoned_with(self, rest: float) -> None:
        costs = Costs(line(6.0, 1.0))
        for number in range(300):
            trial = number > 50 and number % 10 == 0
            beside = rest if trial else 1.0
            saw(costs, trial, 1, ONE, 7.0 / (1.0 - beside / 3.0), beside)
        assert costs.toll == pytest.approx(1 / 3, abs=0.02)

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("at_work", [True, False], ids=["drafts rest in trials", "drafts work in trials"])
    @pytest.mark.parametrize("real", [0.0, 0.2, 0.6])
    def test_it_is_found_in_noise(self, real: float, at_work: bool, seed: int) -> None:
        costs = self.learn(real, at_work=at_work, noise=0.2, seed=seed)
        assert 1.0 + costs.drag == pytest.approx(1.0 + real, rel=0.13)
        assert costs.verify_ms(4, beside=float(at_work)) == pytest.approx(10.0 * (1.0 + real * at_work), rel=0.2)

    @pytest.mark.parametrize("at_work", [True, False])
    @pytest.mark.parametrize("measured", [0.6, 1.6])
    def test_a_machine_that_is_not_as_it_was_measured_does_not_count_as_drag(
        self, measured: float, at_work: bool
    ) -> None:
        costs = self.learn(0.3, at_work=at_work, noise=0.0, seed=0, measured=measured)
        assert costs.drag == pytest.approx(0.3, abs=0.1)

    def test_it_is_doubted_at_first_and_follows_what_changes(self) -> None:
        costs = Costs(line(6.0, 1.0))
        costs.saw_trial(1, ONE, 7.0 * 1.6, beside=1.0, rests=False)
        assert 0.0 < costs.drag < 0.6
        for _ in range(TRIALS):
            costs.saw_trial(1, ONE, 7.0, beside=1.0, rests=False)
        assert costs.drag == pytest.approx(0.0, abs=0.01)

    def test_a_later_start_begins_with_it(self) -> None:
        first = self.learn(0.5, at_work=True, noise=0.1, seed=0)
        assert first.learned is not None
        costs = Costs(line(6.0, 1.0), first.learned)
        assert costs.remembers
        assert costs.drag == pytest.approx(0.5, abs=0.15)
        for _ in range(2 * TRIALS):  # and is not bound to it
            costs.saw_trial(1, ONE, 7.0, beside=1.0, rests=False)
        assert costs.drag == pytest.approx(0.0, abs=0.01)

    def test_a_few_trials_are_not_worth_telling(self) -> None:
        costs = Costs(line(6.0, 1.0))
        for _ in range(TELLING - 1):
            costs.saw_trial(1, ONE, 7.0 * 1.2, beside=1.0, rests=False)
        assert costs.learned is None
        costs.saw_trial(1, ONE, 7.0 * 1.2, beside=1.0, rests=False)
        assert costs.learned is not None
        assert costs.learned.toll == pytest.approx(1.0 - 1.0 / 1.2)

    def test_one_trial_that_was_disturbed_changes_little(self) -> None:
        costs = Costs(line(6.0, 1.0))
        for ratio in (1.2, 1.2, 2.9, 1.2, 1.2):
            costs.saw_trial(1, ONE, 7.0 * ratio, beside=1.0, rests=False)
        assert costs.drag < 0.21


MS = st.one_of(st.floats(0.0, 1e9), st.sampled_from([0.0, 1e-12, 1e-300]))
LOADS = st.builds(Load, st.integers(1, 64), st.integers(0, 10**6))
SEEN = st.tuples(st.booleans(), st.integers(1, 600), LOADS, MS, st.floats(0.0, 1.0))


@given(
    st.one_of(st.none(), st.just(Measured()), st.just(Measured(SIZES, (5.0, 6.0, 7.0, 8.0, 9.0), 0.1, 1e-5))),
    st.lists(SEEN, max_size=60),
)
def test_costs_are_numbers_whatever_comes(
    measured: Measured | None, seen: list[tuple[bool, int, Load, float, float]]
) -> None:
    costs = Costs(measured)
    for trial, tokens, load, ms, beside in seen:
        saw(costs, trial, tokens, load, ms, beside)
    assert isfinite(costs.drag)
    assert costs.drag >= 0.0
    for tokens in (1, 2, 8, 600):
        for load in (ONE, Load(64, 10**6)):
            assert isfinite(costs.verify_ms(tokens, load))
            assert costs.verify_ms(tokens, load) >= 0.0
            assert isfinite(costs.per_token_ms(tokens, load))
