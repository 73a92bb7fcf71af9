"""The plan: what a round should be like, from what was measured, with a reason that can be read.

Estimates are noisy, and a plan that follows every twitch is worth less than one that is a little off. So a new plan has
to promise clearly more than the old one, by the same estimates, for several rounds in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ssd_ray.saguaro.backup import Pace
from ssd_ray.saguaro.factors import FACTORS, FIRST, Factors

CLEARLY = 1.03
"""How much faster the rounds that it concerns must be by a new plan."""

PATIENCE = 16
"""Rounds in a row in which it must be."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, and why.

    Attributes:
        lookahead: tokens of a speculation at most.
        wait: tokens to wait for when nothing was prepared; 0 goes on at once.
        steps: draft steps that there is time for while the target verifies.
        budget: outcomes that these steps prepare for, as it has turned out.
        c: Saguaro's C to draw with; None in coupled mode, which has none.
        why: the estimates behind it, in words.
    """

    lookahead: int
    wait: int
    steps: int = 0
    budget: int = 0
    c: float | None = None
    why: str = "nothing is measured yet"

    def __str__(self) -> str:
        what = f"wait for {self.wait} tokens" if self.wait else "go on at once"
        drawn = "" if self.c is None else f", draw with C = {self.c:g}"
        planned = (
            f"speculate up to {self.lookahead} tokens, draft {self.steps} steps a round for {self.budget} outcomes"
        )
        return f"{planned}{drawn}, on a miss {what}: {self.why}"


def plan_without_draft(lookahead: int, pace: Pace, *, looks_up: bool) -> str:
    """What a round is like while no draft is connected; ``looks_up`` says whether the text itself is asked."""
    if not lookahead or not looks_up:
        return "go on without speculation: no draft is connected"
    why = f"first token accepted {pace.lookup_acceptance[0]:.0%}" if pace.verify_ms else "nothing is measured yet"
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
        pace: the estimates.
        lookahead: tokens in one speculation at most.
        c: Saguaro's C; "auto" finds it, None is coupled mode.
    """

    def __init__(self, pace: Pace, lookahead: int, c: float | str | None = None) -> None:
        self._pace = pace
        self._most = lookahead
        self._wait = Choice(lookahead)
        self._factor = Choice(c if isinstance(c, float | int) else FIRST)
        self.factors = Factors() if c == "auto" else None
        self._sampled = c is not None
        self._measured = False
        self.plan = Plan(lookahead, lookahead, c=self.c)

    @property
    def c(self) -> float | None:
        """The C of the plan."""
        return self._factor.value if self._sampled else None

    def update(self) -> Plan | None:
        """Reconsider after a round; the new plan if there is one."""
        pace = self._pace
        if not pace.verify_ms or not pace.step_ms:
            return None
        changed = self._consider_wait(pace.best_length(0, self._most))
        changed |= self.factors is not None and self._consider_factor(self.factors)
        if not changed:
            return None
        self.plan = self._plan()
        return self.plan

    def _consider_wait(self, best: int) -> bool:
        if self._measured:
            return self._wait.consider(best, self._rate)
        self._wait.take(best)
        self._measured = True
        return True

    def _consider_factor(self, factors: Factors) -> bool:
        wait, costs = self._wait.value, self._pace.costs

        def rate(c: float) -> float:
            return factors.rate(c, self._most, wait, costs)

        return factors.positions > 0 and self._factor.consider(max(FACTORS, key=rate), rate)

    def _plan(self) -> Plan:
        pace = self._pace
        why = (
            f"verification {pace.verify_ms:.1f} ms, draft step {pace.step_ms:.1f} ms, "
            f"waiting costs {pace.delay_ms:.1f} ms more, first token accepted {pace.acceptance[0]:.0%}"
        )
        steps = round(pace.verify_ms / pace.step_ms)
        return Plan(self._most, self._wait.value, steps, round(pace.outcomes), self.c, why)

    def _rate(self, wait: int) -> float:
        """Tokens per millisecond of a round after a miss; after a hit all plans are the same."""
        return self._pace.costs.rate(wait, wait, self._pace.acceptance)
