"""Whether an actor gets on. An answer proves little: the thread that answers is not the one that works."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from ssd_ray.actors.pulse import Pulse

LOOK_SECONDS = 1.0
"""How often actors are looked at."""

TURNS = 50.0
"""Times that the longest turn may be exceeded before a loop counts as stuck."""


class Watch:
    """Watches one loop.

    Args:
        patience_s: seconds without progress that are no cause for alarm, however quick the loop has been.
        clock: seconds.
    """

    def __init__(self, patience_s: float, clock: Callable[[], float] = monotonic) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._looked = clock()
        self._last = Pulse(-1, 0.0)
        self._silent_s = 0.0

    def look(self, pulse: Pulse | None) -> float | None:
        """Take what the loop says now, None if it does not answer.

        Returns:
            Seconds for which it has made no progress, if these are too many.
        """
        now = self._clock()
        # Who watches may have stood still, too, or have been busy. That says nothing about others.
        self._silent_s += min(now - self._looked, 2.0 * LOOK_SECONDS)
        self._looked = now
        if pulse is not None and pulse.turns != self._last.turns:
            self._last, self._silent_s = pulse, 0.0
        return self._silent_s if self._silent_s > self.limit_s else None

    @property
    def limit_s(self) -> float:
        """Seconds without progress that are too many."""
        return max(self._patience_s, TURNS * self._last.longest_s)
