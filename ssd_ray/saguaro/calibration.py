"""How likely a speculated token is to be accepted when it is reached, from what its draft says of it.

A draft says a byte, its own estimate. What it is worth is learned from the outcomes: tokens of about the same byte at
about the same depth were accepted so often. What was not tried for long goes back to what the draft says.
"""

from __future__ import annotations

from bisect import bisect_right

EDGES = (0.05, 0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.87, 0.92, 0.96, 0.985)
"""Estimates that separate the bins."""

DEPTHS = (1, 2, 4)
"""Depths that separate the bins; 0 is the first token of a speculation."""

PRIOR = 8.0
"""Tokens that a draft's word counts for."""

FORGETTING, EVERY = 0.8, 64
"""What is left of the past after so many rounds."""

UNSAID = 0
"""The byte of a draft that says nothing."""


def to_byte(chance: float) -> int:
    """A probability as it travels, 1 to 255."""
    return max(1, min(255, round(255 * chance)))


class Calibration:
    """The estimates of one target, of all its rows and drafts together."""

    def __init__(self) -> None:
        shape = range(len(DEPTHS) + 1)
        self._accepted = [[0.0] * (len(EDGES) + 1) for _ in shape]
        self._tried = [[0.0] * (len(EDGES) + 1) for _ in shape]
        self._rounds = 0

    def chance(self, said: int, depth: int) -> float:
        """Probability of accepting the token at a depth for which a draft said this byte, 1 to 255."""
        row, column, prior = _place(said, depth)
        return (PRIOR * prior + self._accepted[row][column]) / (PRIOR + self._tried[row][column])

    def saw(self, said: int, depth: int, *, accepted: bool) -> None:
        """Learn from a token that was reached."""
        row, column, _ = _place(said, depth)
        self._accepted[row][column] += accepted
        self._tried[row][column] += 1.0

    def end_round(self) -> None:
        """Let the past fade."""
        self._rounds += 1
        if self._rounds % EVERY == 0:
            for table in (self._accepted, self._tried):
                table[:] = [[FORGETTING * value for value in row] for row in table]


def _place(said: int, depth: int) -> tuple[int, int, float]:
    """Row and column of the tables, and the probability that was said."""
    prior = min(255, said) / 255
    return bisect_right(DEPTHS, depth), bisect_right(EDGES, prior), prior
