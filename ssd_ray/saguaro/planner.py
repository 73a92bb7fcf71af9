"""The plan: what a round should be like, from what was measured, with a reason that can be read.

Estimates are noisy, and a plan that follows every twitch is worth less than one that is a little off. So a new plan has
to promise clearly more than the old one, by the same estimates, for several rounds in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from ssd_ray.saguaro.backup import Pace

CLEARLY = 1.03
"""How much faster a new plan must be than the one it replaces."""

PATIENCE = 16
"""Rounds in a row in which it must be."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, and why.

    Attributes:
        lookahead: tokens of a speculation at most.
        wait: tokens to wait for when nothing was prepared; 0 goes on at once.
        steps: draft steps that there is time for while the target verifies; what they make is the budget.
        why: the estimates behind it, in words.
    """

    lookahead: int
    wait: int
    steps: int = 0
    why: str = "nothing is measured yet"

    def __str__(self) -> str:
        what = f"wait for {self.wait} tokens" if self.wait else "go on at once"
        planned = f"speculate up to {self.lookahead} tokens, draft {self.steps} steps a round"
        return f"{planned}, on a miss {what}: {self.why}"


class Planner:
    """Keeps the plan of a target.

    Args:
        pace: the estimates.
        lookahead: tokens in one speculation at most.
    """

    def __init__(self, pace: Pace, lookahead: int) -> None:
        self.plan = Plan(lookahead, lookahead)
        self._pace = pace
        self._most = lookahead
        self._in_favour = 0
        self._measured = False

    def update(self) -> Plan | None:
        """Reconsider after a round; the new plan if there is one."""
        pace = self._pace
        if not pace.verify_ms or not pace.step_ms:
            return None
        better = pace.best_length(0, self._most)
        gain = self._rate(better) / self._rate(self.plan.wait)
        self._in_favour = self._in_favour + 1 if gain > CLEARLY else 0
        if self._measured and self._in_favour < PATIENCE:
            return None
        self.plan, self._measured, self._in_favour = self._plan(better), True, 0
        return self.plan

    def _plan(self, wait: int) -> Plan:
        pace = self._pace
        why = (
            f"verification {pace.verify_ms:.1f} ms, draft step {pace.step_ms:.1f} ms, "
            f"waiting costs {pace.delay_ms:.1f} ms more, first token accepted {pace.acceptance[0]:.0%}"
        )
        return Plan(self._most, wait, round(pace.verify_ms / pace.step_ms), why)

    def _rate(self, wait: int) -> float:
        """Tokens per millisecond of a round after a miss; after a hit all plans are the same."""
        return self._pace.costs.rate(wait, wait, self._pace.acceptance)
