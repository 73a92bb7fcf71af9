"""What a row does when its next speculation is short: wait for the draft, and for how many tokens.

Waiting until j tokens are there takes the time of the draft steps that are missing, and a verification of j tokens
earns 1 + a_1 + a_1 a_2 + .. tokens. The best j maximises tokens per time (paper, section 4.3); j = what is there
already means going on at once. The rule is the same after a miss, where nothing is there, and after a hit whose branch
is short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ssd_ray.config import MAX_LOOKAHEAD

_SMOOTHING = 0.1


def best_length(
    available: int, most: int, acceptance: Sequence[float], *, verify_ms: float, step_ms: float, delay_ms: float
) -> int:
    """How many tokens to verify next.

    Args:
        available: tokens that are there.
        most: tokens that can be of use.
        acceptance: probability of accepting the i-th token when it is reached.
        verify_ms, step_ms: time of a verification and of one draft step, which makes one token.
        delay_ms: what waiting costs beyond the steps: the messages' way and the draft's reaction.
    """
    best, best_rate = min(available, most), 0.0
    gain, reach = 1.0, 1.0
    for length in range(most + 1):
        if length > 0:
            reach *= acceptance[length - 1]
            gain += reach
        if length < min(available, most):
            continue
        steps = max(0, length - available)
        rate = gain / (verify_ms + steps * step_ms + (delay_ms if steps else 0.0))
        if rate > best_rate * 1.0001:
            best, best_rate = length, rate
    return best


@dataclass(slots=True)
class Pace:
    """Online estimates, exponentially weighted, that :func:`best_length` needs.

    Attributes:
        verify_ms, step_ms: milliseconds of a verification and of a draft step.
        delay_ms: milliseconds of a message's way and of the draft's reaction.
        acceptance: probability that the i-th token of a speculation is accepted when it is reached.
    """

    verify_ms: float = 0.0
    step_ms: float = 0.0
    delay_ms: float = 0.5
    acceptance: list[float] = field(default_factory=lambda: [0.6] * MAX_LOOKAHEAD)

    def saw_verification(self, milliseconds: float, n: int, accepted: int) -> None:
        """Learn from a round that verified n tokens."""
        self.verify_ms = _blend(self.verify_ms, milliseconds)
        for depth in range(min(accepted + 1, n)):
            self.acceptance[depth] += 0.02 * ((depth < accepted) - self.acceptance[depth])

    def saw_step(self, milliseconds: float) -> None:
        """Learn from a draft's report of its step time."""
        if milliseconds > 0.0:
            self.step_ms = _blend(self.step_ms, milliseconds)

    def saw_wait(self, milliseconds: float, steps: int) -> None:
        """Learn from a wait for ``steps`` draft steps."""
        self.delay_ms = _blend(self.delay_ms, min(max(milliseconds - steps * self.step_ms, 0.0), 2.0 * self.step_ms))

    def best_length(self, available: int, most: int) -> int:
        """How many tokens to verify next; while nothing is known yet, as many as possible."""
        if not self.verify_ms or not self.step_ms:
            return most
        return best_length(
            available,
            most,
            self.acceptance,
            verify_ms=self.verify_ms,
            step_ms=self.step_ms,
            delay_ms=self.delay_ms,
        )

    def patience_ms(self, steps: int) -> float:
        """How long to wait for ``steps`` draft steps before giving up: they may take twice what they usually do."""
        return 2.0 * (steps * self.step_ms + self.delay_ms)


def _blend(old: float, new: float) -> float:
    return new if old == 0.0 else old + _SMOOTHING * (new - old)
