"""What drafting costs decides how much is drafted; what tokens cost decides which are worth it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.saguaro.backup import ENOUGH, Pace
from ssd_ray.saguaro.budget import Prospect
from ssd_ray.saguaro.costs import Costs, Load, Measured
from ssd_ray.saguaro.planner import FREE, RAREST_TRIAL, Planner

ONE = Load()
LOOKAHEAD = 7
SIZES = tuple(range(1, 65))


def machine(token_ms: float = 0.0) -> Measured:
    return Measured(SIZES, tuple(10.0 + token_ms * size for size in SIZES))


class Machine:
    """A planner, and verifications and drafts as they are on one machine.

    Drafts work for the part ``work`` of each verification while their steps add ``step`` tokens a millisecond. If they
    did all the time, it would take longer by ``drag``. Rounds without drafts have 0.1 tokens a millisecond.
    """

    def __init__(
        self,
        *,
        token_ms: float = 0.0,
        drag: float = 0.0,
        step: float = inf,
        work: float = 1.0,
        acceptance: float = 0.6,
    ) -> None:
        self.drag, self.step, self.work = drag, step, work
        self.pace, self.costs = Pace(), Costs(machine(token_ms))
        self.pace.drafted.chances = [acceptance] * LOOKAHEAD
        self.planner = Planner(self.pace, self.costs, LOOKAHEAD)
        self.prospects = [Prospect([acceptance] * LOOKAHEAD)]
        for _ in range(ENOUGH):
            self.pace.saw_step(2.0)

    def rounds(self, number: int) -> Iterator[bool]:
        """Whether each of so many rounds was a trial."""
        for _ in range(number):
            yield self.planner.trial
            budget = self.planner.budget(self.prospects, ONE)
            part = self.work if self.step > self.planner.price else 0.0
            ms = self.costs.measured.ms[sum(budget.lengths)] / (1.0 - part * self.drag / (1.0 + self.drag))
            self.pace.saw_round(3, ms, 0.0)
            self.planner.saw_verification(1 + sum(budget.lengths), ONE, ms, part * ms)
            self.planner.update()

    def run(self, number: int) -> Machine:
        for _ in self.rounds(number):
            pass
        return self


def resting(planner: Planner) -> float:
    """The price outside of trials, in proportion to what the target makes of the time."""
    planner.trial = False
    return planner.price / planner._pace.rate


class TestTheWay:
    """Working ahead against working when asked."""

    @staticmethod
    def play(machine: Machine, ahead: float, asked: float) -> Planner:
        """Rounds of 10 ms that give so many tokens, by the way."""
        planner = machine.planner
        for _ in machine.rounds(400):
            planner.saw_round(1, ahead if planner._contest.ahead else asked, 10.0)
        return planner

    def test_where_drafting_costs_the_target_the_better_one_is_kept_and_told(self) -> None:
        planner = self.play(Machine(drag=0.6), ahead=2.0, asked=2.6)
        assert planner.price == inf
        assert not planner.drafts_work
        assert "draft when asked" in str(planner.plan)
        planner = self.play(Machine(drag=0.6), ahead=2.6, asked=2.0)
        assert planner.price < inf
        assert "steps a round ahead" in str(planner.plan)

    def test_where_it_costs_nothing_drafts_work_ahead_whatever_rounds_give(self) -> None:
        assert self.play(Machine(), ahead=2.0, asked=2.6).drafts_work


class TestThePrice:
    def test_drafting_that_costs_nothing_is_all_but_free(self) -> None:
        assert resting(Machine().run(300).planner) == pytest.approx(FREE, abs=0.01)

    @pytest.mark.parametrize("work", [0.4, 1.0])
    def test_it_rises_with_what_drafts_cost(self, work: float) -> None:
        """Each millisecond of drafting costs the same, however many there are."""
        prices = [resting(Machine(drag=drag, work=work).run(300).planner) for drag in (0.0, 0.2, 0.6, 1.5)]
        assert prices == sorted(set(prices))
        assert prices[2] == pytest.approx(FREE + 0.6 / 1.6, abs=0.05)
        assert prices[-1] < 1.0 + FREE

    def test_a_steps_worth_decides_whether_drafts_work(self) -> None:
        """A draft whose steps add a fifth of what the target makes of the time rests where drafting costs more."""
        for drag, works in ((0.0, True), (0.1, True), (0.6, False), (1.5, False)):
            machine = Machine(drag=drag, step=0.06).run(600)
            machine.planner.trial = False
            assert machine.planner.drafts_work is works

    def test_drafts_that_have_become_cheap_work_again(self) -> None:
        machine = Machine(drag=0.6, step=0.06).run(600)
        assert not machine.planner.drafts_work
        machine.drag = 0.0
        machine.run(12 * RAREST_TRIAL)
        machine.planner.trial = False
        assert machine.planner.drafts_work
        assert machine.costs.drag < 0.1

    def test_in_a_trial_drafts_that_work_rest_and_drafts_that_rest_work(self) -> None:
        worked, rested = Machine().run(3), Machine(step=0.0).run(60)
        for machine, price in ((worked, inf), (rested, 0.0)):
            machine.planner.trial = True
            assert machine.planner.price == price
            assert not machine.planner.drafts_work


class TestTrials:
    @pytest.mark.parametrize("step", [inf, 0.0], ids=["drafts work", "drafts rest"])
    def test_they_get_rarer(self, step: float) -> None:
        trials = [number for number, trial in enumerate(Machine(step=step).rounds(2000)) if trial]
        apart = [later - sooner for sooner, later in pairwise(trials) if later - sooner > 1]
        assert apart == sorted(apart)
        assert max(apart) >= RAREST_TRIAL
        assert len(trials) < 0.03 * 2000

    def test_one_that_says_nothing_is_not_prolonged_for_ever(self) -> None:
        """A draft that does not rest when it is to: it may be in the middle of a long step."""
        machine = Machine()
        trials = 0
        for trial in machine.rounds(1000):
            trials += trial
            machine.planner.saw_verification(1, ONE, 10.0, 10.0)
        assert machine.costs.drag == 0.0
        assert 0 < trials < 0.1 * 1000


class TestTheFloor:
    def test_where_tokens_are_free_all_are_worth_verifying(self) -> None:
        assert Machine().run(50).planner.floor == 0.0

    def test_it_follows_what_the_next_token_costs(self) -> None:
        floors = [Machine(token_ms=each).run(50).planner.floor for each in (0.0, 0.5, 1.0, 3.0)]
        assert floors == sorted(set(floors))
        assert floors[-1] < 1.0

    def test_what_is_verified_lies_above_it(self) -> None:
        machine = Machine(token_ms=1.5, acceptance=0.8).run(100)
        budget = machine.planner.budget(machine.prospects, ONE)
        assert 0 < budget.lengths[0] < LOOKAHEAD
        assert machine.planner.floor <= budget.least + 0.01
        assert machine.planner.floor > budget.least * 0.8 - 0.01  # the next token is not worth it

    @given(st.floats(0.0, 1e3), st.floats(0.0, 1.0), st.integers(1, 8), st.floats(0.0, 10.0))
    def test_it_is_a_probability_and_the_price_is_none_below_zero(
        self, token_ms: float, chance: float, rows: int, drag: float
    ) -> None:
        machine = Machine(token_ms=token_ms)
        machine.costs.drag = drag
        for _ in range(3):
            machine.planner.budget([Prospect([chance] * LOOKAHEAD)] * rows, Load(rows))
        assert 0.0 <= machine.planner.floor <= 1.0
        assert machine.planner.price >= 0.0


class TestThePlansText:
    def test_drafts_that_work_ahead(self) -> None:
        machine = Machine()
        assert "draft 5 steps a round ahead" in self.text(machine)  # of 2 ms, in 10 ms

    def test_drafts_that_work_when_asked(self) -> None:
        assert "draft when asked" in self.text(Machine(step=0.0))

    def test_drafts_that_do_not_work(self) -> None:
        machine = Machine(token_ms=40.0, step=0.0, acceptance=0.05)
        assert "draft nothing" in self.text(machine)
        assert machine.planner.plan.wait == 0

    @staticmethod
    def text(machine: Machine) -> str:
        """The plan, in words, once everything has settled."""
        machine.run(400)
        machine.planner.trial = False
        return str(machine.planner._plan())
