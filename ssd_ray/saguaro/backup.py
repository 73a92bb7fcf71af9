"""What a row does when its next speculation is short: wait for the draft, and for how many tokens, or do without it.

Waiting until j tokens are there takes the time of the draft steps that are missing, and a verification of j tokens
earns 1 + a_1 + a_1 a_2 + .. tokens. The best j maximises tokens per time (paper, section 4.3); j = what is there
already means going on at once. The rule is the same after a miss, where nothing is there, and after a hit whose branch
is short: :func:`~ssd_ray.saguaro.budget.best_budget` has it, with what is estimated here. On a miss a proposal from the
text itself competes with waiting, at its own rate of acceptance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from ssd_ray.config import MAX_LOOKAHEAD

MOST_PATIENCE_MS = 100.0
"""How much longer than a verification a wait may take."""

NARROW = 2
"""Tokens of each sequence in a step of which a target may be waiting for one."""

ENOUGH, LATEST = 3, 9
"""Steps whose times must be known, and whose median counts: one may have taken long for reasons of its own."""

DELAY_MS = 0.5
"""A message's way and a draft's reaction, before anything is known."""

FIRST, FIRST_LOOKED_UP = 0.8, 0.3
"""Chances that a first token is accepted, drafted or from the text, before anything is known."""

WORTH = 5.0
"""Tokens that what is known before counts for."""

FADING, UNTRIED = 0.99, 0.999
"""What is left of a decision with each one after it, and with each one that tries nothing."""

_SMOOTHING = 0.1


class Acceptance:
    """How often the i-th token of a speculation is accepted when it is reached.

    Before it was tried a depth is thought to be like the one above it, and what was not tried for long is thought so
    again: a few bad first tries must not keep a depth from being tried for ever.

    Attributes:
        chances: by depth.
    """

    def __init__(self, first: float) -> None:
        self._first = first
        self._accepted, self._tried = [0.0] * MAX_LOOKAHEAD, [0.0] * MAX_LOOKAHEAD
        self.chances = [first] * MAX_LOOKAHEAD

    def saw(self, n: int, accepted: int) -> None:
        """Learn from a speculation of n tokens."""
        chance, kept = self._first, FADING if n else UNTRIED
        for depth in range(MAX_LOOKAHEAD):
            reached = depth < min(accepted + 1, n)
            self._tried[depth] = kept * self._tried[depth] + reached
            self._accepted[depth] = kept * self._accepted[depth] + (depth < min(accepted, n))
            chance = (WORTH * chance + self._accepted[depth]) / (WORTH + self._tried[depth])
            self.chances[depth] = chance


@dataclass(slots=True)
class Pace:
    """Online estimates, exponentially weighted or medians, of everything but what a verification costs.

    Attributes:
        host_ms: milliseconds of a round's other work.
        rate: tokens per millisecond, all rows together.
        arrival: probability that a wait is not in vain. It recovers slowly, so that a draft that has got better is
            found out.
        outcomes: outcomes that a round is prepared for.
        drafted, looked_up: what becomes of speculations, drafted or found in the text.
    """

    host_ms: float = 0.0
    rate: float = 0.0
    arrival: float = 1.0
    outcomes: float = 0.0
    drafted: Acceptance = field(default_factory=lambda: Acceptance(FIRST))
    looked_up: Acceptance = field(default_factory=lambda: Acceptance(FIRST_LOOKED_UP))

    _delays: deque[float] = field(default_factory=lambda: deque([DELAY_MS] * ENOUGH, maxlen=LATEST))
    _narrow: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))
    _wide: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))

    @property
    def acceptance(self) -> Sequence[float]:
        """Probability that the i-th drafted token of a speculation is accepted when it is reached. Speculations that
        were whole when they were looked up do not count: nobody asks whether to wait for more of them, and they are
        accepted more often than others."""
        return self.drafted.chances

    @property
    def lookup_acceptance(self) -> Sequence[float]:
        """The same of tokens that were found in the text."""
        return self.looked_up.chances

    @property
    def known(self) -> bool:
        """Whether drafts have said often enough how fast they are."""
        return len(self._narrow) + len(self._wide) >= ENOUGH

    @property
    def tried(self) -> bool:
        """Whether it is known how fast they are when they are waited for."""
        return len(self._narrow) >= ENOUGH

    @property
    def step_ms(self) -> float:
        """Milliseconds of a draft step that runs a chain."""
        return median(self._narrow or self._wide or [0.0])

    @property
    def wide_ms(self) -> float:
        """Milliseconds of a draft step that runs branches."""
        return median(self._wide or self._narrow or [0.0])

    @property
    def delay_ms(self) -> float:
        """Milliseconds of a message's way and of the draft's reaction."""
        return median(self._delays)

    def saw_decision(self, n: int, accepted: int, *, looked_up: bool = False, whole: bool = False) -> None:
        """Learn from a row that verified n tokens, drafted or found in the text, and ``whole`` from the start."""
        if not whole:
            (self.looked_up if looked_up else self.drafted).saw(n, accepted)

    def saw_round(self, tokens: int, milliseconds: float, host_ms: float) -> None:
        """Learn from a round that gave so many tokens, over all rows, in so long."""
        self.arrival += 0.002 * (1.0 - self.arrival)
        self.rate = _blend(self.rate, tokens / max(milliseconds, 1e-9))
        self.host_ms = _blend(self.host_ms, host_ms)

    def saw_step(self, milliseconds: float, *, narrow: bool = False) -> None:
        """Learn from a draft's report of its step time."""
        if milliseconds > 0.0:
            (self._narrow if narrow else self._wide).append(milliseconds)

    def saw_outcomes(self, prepared: int) -> None:
        """Learn from how many outcomes a round was prepared for."""
        self.outcomes = _blend(self.outcomes, float(prepared))

    def saw_wait(self, milliseconds: float, steps: int, *, came: bool) -> None:
        """Learn from a wait for ``steps`` draft steps, and from whether they came."""
        self._delays.append(max(milliseconds - steps * self.step_ms, 0.0))
        self.arrival += 0.2 * (came - self.arrival)

    def forget_delays(self) -> None:
        """Begin anew: drafts that have other work, or none any more, react in another time."""
        self._delays.extend([DELAY_MS] * LATEST)

    def wait_ms(self, steps: int) -> float:
        """Milliseconds of waiting for so many draft steps."""
        return steps * self.step_ms + self.delay_ms if steps else 0.0

    def patience_ms(self, steps: int, verify_ms: float) -> float:
        """How long to wait for ``steps`` draft steps before giving up: they may take twice what they usually do, but
        whatever drafts report, no row waits much longer than a round."""
        return min(2.0 * self.wait_ms(steps), verify_ms + MOST_PATIENCE_MS)


def _blend(old: float, new: float) -> float:
    return new if old == 0.0 else old + _SMOOTHING * (new - old)
