"""The plan that a target's rounds follow, from what was measured.

Every round verifies and waits for what pays at that moment (:mod:`~ssd_ray.saguaro.budget`), and drafting beside it has
a price: what a step costs the verification. So speculative speculation turns into plain speculation, or none, where
these are better, step by step and without a switch. What is kept from round to round is Saguaro's C, which changes when
another one promises clearly more for many rounds in a row, and what drafting costs, which trials find out: now and then
drafts rest for a round, ever more rarely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

from ssd_ray.saguaro.backup import Pace
from ssd_ray.saguaro.budget import Budget, Curve, Prospect, best_budget
from ssd_ray.saguaro.contest import Contest
from ssd_ray.saguaro.costs import REMEMBERED, Costs, Load
from ssd_ray.saguaro.factors import FACTORS, FIRST, Factors

CLEARLY = 1.03
"""How much faster the rounds that it concerns must be by a new plan."""

PATIENCE = 16
"""Rounds in a row in which it must be."""

FREE = 0.02
"""What a draft's time is worth against the target's where it costs the target nothing: somebody may need the processor,
and the power."""

FIRST_TRIAL, RAREST_TRIAL = 6, 192
"""Rounds before the first trial of resting drafts, and between two once it is known what drafting costs."""

LONGEST_TRIAL = 3
"""Rounds of a trial at most: a step that runs is not broken off, so the first one often says nothing."""

LEAST_TOLL = 0.1
"""Part of a draft's time that verifications beside it lose, below which working ahead is free."""

AT_WORK, IDLE, BUSY = 0.15, 0.3, 0.3
"""Drafts that have worked for less than the first part of verifications have rested. A trial says something if they
work for less than the second part of what they did, or, if they had rested, for more than the third of a
verification."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, and why.

    Attributes:
        lookahead: tokens of a speculation at most.
        wait: tokens to wait for when nothing was prepared; 0 goes on at once.
        ahead: draft steps that there is time for while the target verifies and that are worth their price; 0: drafts
            work when they are waited for.
        budget: outcomes that these steps prepare for, as it has turned out.
        c: Saguaro's C to draw with; None in coupled mode, which has none.
        why: the estimates behind it, in words.
    """

    lookahead: int
    wait: int
    ahead: int = 0
    budget: int = 0
    c: float | None = None
    why: str = "nothing is measured yet"

    def __str__(self) -> str:
        what = f"wait for {self.wait} tokens" if self.wait else "go on at once"
        drawn = "" if self.c is None else f", draw with C = {self.c:g}"
        ahead = (
            f"draft {self.ahead} steps a round ahead for {self.budget} outcomes" if self.ahead else "draft when asked"
        )
        if not (self.ahead or self.wait):
            ahead = "draft nothing"
        return f"verify up to {self.lookahead} speculated tokens, {ahead}{drawn}, on a miss {what}: {self.why}"


def plan_without_draft(lookahead: int, pace: Pace, *, looks_up: bool) -> str:
    """What a round is like while no draft is connected; ``looks_up`` says whether the text itself is asked."""
    if not lookahead or not looks_up:
        return "go on without speculation: no draft is connected"
    why = f"first token accepted {pace.lookup_acceptance[0]:.0%}" if pace.rate else "nothing is measured yet"
    return f"speculate up to {lookahead} tokens that followed the same ones earlier in the text, without a draft: {why}"


class Choice(Generic[T]):
    """A value that is kept until another one has promised clearly more for several rounds in a row."""

    def __init__(self, value: T) -> None:
        self.value = value
        self._in_favour = 0

    def consider(self, other: T, rate: Callable[[T], float]) -> bool:
        """Compare with the value that is best now; returns whether it was taken."""
        better = rate(other) > CLEARLY * rate(self.value)
        self._in_favour = self._in_favour + 1 if better else 0
        if self._in_favour < PATIENCE:
            return False
        self.take(other)
        return True

    def take(self, value: T) -> None:
        """Change at once."""
        self.value, self._in_favour = value, 0


class Planner:
    """Keeps the plan of a target.

    Args:
        pace, costs: the estimates.
        lookahead: tokens in one speculation at most.
        c: Saguaro's C; "auto" finds it, None is coupled mode.

    Attributes:
        floor: probability of being reached and accepted below which tokens have not been worth verifying lately.
        trial: in the coming round drafts rest, or work for nothing if they have rested, to see what they cost.
        disturbed: so it is, or was in the round before: drafts may be at work on something else, and waits say nothing.
    """

    def __init__(self, pace: Pace, costs: Costs, lookahead: int, c: float | str | None = None) -> None:
        self._pace, self._costs = pace, costs
        self._most = lookahead
        self._wait = Choice(lookahead)
        self._factor = Choice(c if isinstance(c, float | int) else FIRST)
        self.factors = Factors() if c == "auto" else None
        self._sampled = c is not None
        self._measured = False
        self._period = FIRST_TRIAL * (REMEMBERED if costs.remembers else 1)
        self._until_trial, self._learned = self._period, False
        self.floor, self.trial, self.disturbed = 0.0, False, False
        self._plain_rate = 0.0  # tokens per millisecond without drafts
        self._contest, self._changed = Contest(), False  # and whether its way is another one than the plan says
        self._at_work_by = {True: 1.0, False: 0.0}  # by the way of drafting, see _at_work
        self.plan = Plan(lookahead, lookahead, c=self.c)

    @property
    def c(self) -> float | None:
        """The C of the plan."""
        return self._factor.value if self._sampled else None

    @property
    def price(self) -> float:
        """Tokens that a millisecond of drafting must add, expected, to be worth what it costs the target; infinity: no
        drafting is."""
        if self.trial:
            return 0.0 if self._rested else inf
        if not self._contest.ahead:
            return inf
        return (FREE + self._costs.toll) * max(self._pace.rate, self._plain_rate)

    @property
    def drafts_work(self) -> bool:
        """Whether drafts are at work beside verifications now: else their silence says nothing."""
        return not (self._rested or self.trial)

    @property
    def _at_work(self) -> float:
        """Part of verifications lately beside which drafts worked."""
        return self._at_work_by[self._contest.ahead]

    @property
    def _rested(self) -> bool:
        """Whether drafts have hardly worked beside verifications lately."""
        return self._at_work < AT_WORK

    def budget(self, rows: Sequence[Prospect], load: Load, *, under_way: bool = False) -> Budget:
        """What the coming round verifies and waits for. A step that is ``under_way``, since it was asked for, comes
        without delay, and slows the verification down if it is not waited for."""
        wait_ms = self._wait_ms_under_way if under_way else self._pace.wait_ms
        budget = best_budget(rows, self._verify_ms(load), wait_ms, self._pace.host_ms, self._pace.arrival)
        self._plain_rate = len(rows) / max(self._costs.alone_ms(len(rows), load) + self._pace.host_ms, 1e-9)
        count = len(rows) + sum(budget.lengths)
        floor = max(0.0, min(1.0, budget.rate * self._costs.per_token_ms(count, load)))
        self.floor += 0.2 * (floor - self.floor)
        return budget

    def prefers_lookup(self, proposal: Sequence[float], coming: Sequence[float], load: Load) -> bool:
        """Whether, with nothing drafted, tokens from the text earn more than waiting for a draft, if there is one to
        wait for."""
        if not coming or not self._pace.known:
            return True
        looked_up, waited = (self._alone(row, load) for row in (Prospect(proposal), Prospect((), coming)))
        return looked_up.rate >= waited.rate

    def _alone(self, row: Prospect, load: Load) -> Budget:
        return best_budget([row], self._verify_ms(load), self._pace.wait_ms, self._pace.host_ms, self._pace.arrival)

    def _wait_ms_under_way(self, steps: int) -> float:
        return self._pace.step_ms * (steps or self._costs.toll)

    def _verify_ms(self, load: Load) -> Curve:
        return lambda tokens: self._costs.each_verify_ms(tokens, load, beside=self._at_work)

    def update(self) -> Plan | None:
        """Reconsider after a round; the new plan if there is one."""
        if not self._pace.known or not self._costs.known:
            return None
        self._schedule_trial()
        best = self._alone(Prospect((), self._pace.acceptance[: self._most]), Load()).steps
        changed, self._changed = self._changed | self._consider_wait(best), False
        changed |= self.factors is not None and self._consider_factor(self.factors)
        if not changed:
            return None
        self.plan = self._plan()
        return self.plan

    def _schedule_trial(self) -> None:
        if not self._contest.ahead:
            self.disturbed, self.trial = False, False
            return
        self._until_trial -= 1
        if self.trial and (self._learned or self._until_trial <= -LONGEST_TRIAL):
            self._period = min(2 * self._period, RAREST_TRIAL)
            self._until_trial = self._period
        self.disturbed, self.trial = self.trial, self._until_trial <= 0
        self.disturbed |= self.trial
        self._learned = False

    def saw_verification(self, tokens: int, load: Load, milliseconds: float, drafted_ms: float) -> None:
        """Learn what a verification cost, beside which drafts worked for ``drafted_ms``."""
        part = min(1.0, drafted_ms / max(milliseconds, 1e-9))
        if not self.trial:
            self._at_work_by[self._contest.ahead] += 0.1 * (part - self._at_work)
            self._costs.saw(tokens, load, milliseconds, beside=part)
        elif part > BUSY if self._rested else part < IDLE * self._at_work:
            self._costs.saw_trial(tokens, load, milliseconds, beside=part, rests=not self._rested)
            self._learned = True

    def saw_round(self, rows: int, tokens: float, milliseconds: float) -> None:
        """Learn from a round of so many rows in which so many tokens were to be expected and which took so long."""
        if self._costs.toll < LEAST_TOLL:
            changed = self._contest.take(ahead=True)
        else:
            score = tokens / max(milliseconds * self._plain_rate, 1e-9)
            changed = not self.disturbed and self._contest.saw_round(rows, score)
        if changed:
            self._changed = True
            self._pace.forget_delays()

    def _consider_wait(self, best: int) -> bool:
        if self._measured:
            return self._wait.consider(best, self._rate)
        self._wait.take(best)
        self._measured = True
        return True

    def _consider_factor(self, factors: Factors) -> bool:
        wait = self._wait.value
        verify_ms, wait_ms = self._costs.verify_ms(1 + self._most), self._pace.wait_ms(wait)

        def rate(c: float) -> float:
            return factors.rate(c, self._most, wait, verify_ms, wait_ms)

        return factors.positions > 0 and self._factor.consider(max(FACTORS, key=rate), rate)

    def _plan(self) -> Plan:
        pace, costs = self._pace, self._costs
        one, all_ms = costs.verify_ms(1), costs.verify_ms(1 + self._most)
        why = (
            f"verification {one:.1f} ms for one token and {all_ms:.1f} for {1 + self._most}, "
            f"{costs.drag:.0%} more beside drafts, draft step {pace.step_ms:.1f} ms, "
            f"waiting costs {pace.delay_ms:.1f} ms more, first token accepted {pace.acceptance[0]:.0%}"
        )
        ahead = round(one / pace.wide_ms) if self.drafts_work else 0
        return Plan(self._most, self._wait.value, ahead, round(pace.outcomes), self.c, why)

    def _rate(self, wait: int) -> float:
        """Tokens per millisecond of a round after a miss that waits for so many tokens; after a hit all plans are the
        same."""
        pace, gain, reach = self._pace, 1.0, 1.0
        for chance in pace.acceptance[:wait]:
            reach *= chance
            gain += reach
        return gain / (self._costs.verify_ms(1 + wait) + pace.host_ms + pace.wait_ms(wait))
