"""Whether a loop gets on: what it has done lately, for somebody else to watch."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

FADING = 0.99
"""What is left with each turn of how long one took: a machine that was once busy is not slow for ever."""


class Pulse(NamedTuple):
    """What a loop has done.

    Attributes:
        turns: how many turns it has made. One without work takes a second or so.
        longest_s: seconds of the longest turn lately that had work, or, before any, what is expected of one.
    """

    turns: int
    longest_s: float


class Heart:
    """Counts the turns of a loop, from its thread. :attr:`pulse` is for any.

    Args:
        expected_s: seconds that a turn may take by what was measured before the first.
        clock: seconds.
    """

    def __init__(self, expected_s: float, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self.pulse = Pulse(0, expected_s)

    def begin(self) -> None:
        """The loop begins: what was before is no turn."""
        self._last = self._clock()

    def beat(self, *, worked: bool) -> None:
        """A turn has ended."""
        now = self._clock()
        turns, longest_s = self.pulse
        self.pulse = Pulse(turns + 1, max(now - self._last, FADING * longest_s) if worked else longest_s)
        self._last = now
