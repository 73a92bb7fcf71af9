"""What a row does when its next speculation is short: wait for the draft, and for how many tokens, or do without it.

Waiting until j tokens are there takes the time of the draft steps that are missing, and a verification of j tokens
earns 1 + a_1 + a_1 a_2 + .. tokens. The best j maximises tokens per time (paper, section 4.3); j = what is there
already means going on at once. The rule is the same after a miss, where nothing is there, and after a hit whose branch
is short. On a miss a proposal from the text itself competes with waiting, at its own rate of acceptance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ssd_ray.config import MAX_LOOKAHEAD

MOST_PATIENCE_MS = 100.0
"""How much longer than a verification a wait may take."""

_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds of what a round may consist of.

    Attributes:
        verify_ms: a verification.
        step_ms: one draft step, which makes one token.
        delay_ms: what waiting costs beyond the steps: the messages' way and the draft's reaction.
        arrival: probability that what is waited for comes in time.
    """

    verify_ms: float
    step_ms: float
    delay_ms: float
    arrival: float = 1.0

    def gain(self, length: int, available: int, acceptance: Sequence[float]) -> float:
        """Tokens that a row yields which verifies ``length`` tokens, of which ``available`` are there."""
        gain, reach = 1.0, 1.0
        for index, chance in enumerate(acceptance[:length]):
            reach *= chance * (self.arrival if index == available else 1.0)
            gain += reach
        return gain

    def round_ms(self, steps: int) -> float:
        """Milliseconds of a round that waits for so many draft steps."""
        return self.verify_ms + (steps * self.step_ms + self.delay_ms if steps else 0.0)

    def rate(self, length: int, steps: int, acceptance: Sequence[float]) -> float:
        """Tokens per millisecond of a round of one row that verifies ``length`` tokens and waits for ``steps`` draft
        steps, which make the last of them."""
        return self.gain(length, length - steps, acceptance) / self.round_ms(steps)


def best_length(available: int, most: int, acceptance: Sequence[float], costs: Costs) -> int:
    """How many tokens to verify next.

    Args:
        available: tokens that are there.
        most: tokens that can be of use.
        acceptance: probability of accepting the i-th token when it is reached.
        costs: of a round.
    """
    start = min(available, most)
    # The first of equals: what needs no waiting.
    return max(range(start, most + 1), key=lambda length: costs.rate(length, max(0, length - available), acceptance))


def best_steps(lengths: Sequence[tuple[int, int]], acceptance: Sequence[float], costs: Costs) -> int:
    """How many draft steps rows that are verified together should wait for: what one gains, all wait for.

    Args:
        lengths: for each row the tokens that are there, and how many can be of use. A step adds one to each row.
        acceptance, costs: as for :func:`best_length`.
    """

    def rate(steps: int) -> float:
        gains = (costs.gain(min(there + steps, most), there, acceptance) for there, most in lengths)
        return sum(gains) / costs.round_ms(steps)

    return max(range(1 + max(most - there for there, most in lengths)), key=rate)


@dataclass(slots=True)
class Pace:
    """Online estimates, exponentially weighted, that :func:`best_length` needs.

    Attributes:
        verify_ms, step_ms: milliseconds of a verification and of a draft step.
        delay_ms: milliseconds of a message's way and of the draft's reaction.
        acceptance: probability that the i-th token of a speculation is accepted when it is reached. Speculations that
            were whole when they were looked up do not count: nobody asks whether to wait for more of them, and they
            are accepted more often than others.
        lookup_acceptance: the same of tokens that were found in the text.
        arrival: probability that a wait is not in vain. It recovers slowly, so that a draft that has got better is
            found out.
        outcomes: outcomes that a round is prepared for.
    """

    verify_ms: float = 0.0
    step_ms: float = 0.0
    delay_ms: float = 0.5
    arrival: float = 1.0
    outcomes: float = 0.0
    acceptance: list[float] = field(default_factory=lambda: [0.6] * MAX_LOOKAHEAD)
    lookup_acceptance: list[float] = field(default_factory=lambda: [0.3] * MAX_LOOKAHEAD)

    _seen: dict[bool, list[int]] = field(
        default_factory=lambda: {looked_up: [0] * MAX_LOOKAHEAD for looked_up in (False, True)}
    )

    def saw_verification(
        self, milliseconds: float, n: int, accepted: int, *, looked_up: bool = False, whole: bool = False
    ) -> None:
        """Learn from a round that verified n tokens, drafted or found in the text, and ``whole`` from the start."""
        self.verify_ms = _blend(self.verify_ms, milliseconds)
        self.arrival += 0.002 * (1.0 - self.arrival)
        if whole:
            return
        acceptance = self.lookup_acceptance if looked_up else self.acceptance
        seen = self._seen[looked_up]
        for depth in range(min(accepted + 1, n)):
            seen[depth] += 1
            acceptance[depth] += max(0.02, 1.0 / (5 + seen[depth])) * ((depth < accepted) - acceptance[depth])

    def saw_step(self, milliseconds: float) -> None:
        """Learn from a draft's report of its step time."""
        if milliseconds > 0.0:
            self.step_ms = _blend(self.step_ms, milliseconds)

    def saw_outcomes(self, prepared: int) -> None:
        """Learn from how many outcomes a round was prepared for."""
        self.outcomes = _blend(self.outcomes, float(prepared))

    def saw_wait(self, milliseconds: float, steps: int, *, came: bool) -> None:
        """Learn from a wait for ``steps`` draft steps, and from whether they came."""
        self.delay_ms = _blend(self.delay_ms, min(max(milliseconds - steps * self.step_ms, 0.0), self.verify_ms))
        self.arrival += 0.2 * (came - self.arrival)

    @property
    def costs(self) -> Costs:
        """The estimates as costs."""
        return Costs(self.verify_ms, self.step_ms, self.delay_ms, self.arrival)

    def best_length(self, available: int, most: int) -> int:
        """How many tokens to verify next; while nothing is known yet, as many as possible."""
        if not self.verify_ms or not self.step_ms:
            return most
        return best_length(available, most, self.acceptance, self.costs)

    def best_steps(self, lengths: Sequence[tuple[int, int]]) -> int:
        """How many draft steps to wait for; while nothing is known yet, as many as possible."""
        if not self.verify_ms or not self.step_ms:
            return max(most - available for available, most in lengths)
        return best_steps(lengths, self.acceptance, self.costs)

    def prefers_lookup(self, length: int, most: int, *, waits: bool) -> bool:
        """Whether, with nothing drafted, ``length`` tokens from the text earn more than what a draft could do.

        ``waits`` says whether there is a draft to wait for.
        """
        if not self.verify_ms or not self.step_ms or not waits:
            return True
        best = self.best_length(0, most)
        rate = self.costs.rate
        return rate(length, 0, self.lookup_acceptance) > rate(best, best, self.acceptance)

    def patience_ms(self, steps: int) -> float:
        """How long to wait for ``steps`` draft steps before giving up: they may take twice what they usually do, but
        whatever drafts report, no row waits much longer than a round."""
        return min(2.0 * (steps * self.step_ms + self.delay_ms), self.verify_ms + MOST_PATIENCE_MS)


def _blend(old: float, new: float) -> float:
    return new if old == 0.0 else old + _SMOOTHING * (new - old)
