"""Whether drafts work ahead, beside verifications, or only when they are waited for: whichever has turned out better.

Where drafting beside a verification slows it down, what it is worth hangs on too much to be worked out well: hits of
many rows at once, waits that one row's miss brings upon all, tokens of which a narrow step makes as many. So both ways
are tried in stints, and the tokens that they give for a millisecond are compared. Evidence fades, and the way with the
higher upper bound is taken (discounted UCB, Garivier and Moulines 2011): the worse one is tried again ever more rarely
the worse it is.
"""

from __future__ import annotations

from math import inf, sqrt

FIRST_ROUNDS = 12
"""Rounds before any count: all estimates are new."""

SETTLING = 2
"""Rounds after a change that do not count: trees of the old way are used up, those of the new one grow."""

LEAST_ROUNDS, LEAST_YIELDS = 4, 16
"""Rounds of a stint, and rows of all its rounds together, at least."""

SPREAD = 0.2
"""Standard deviation of what is expected of a row in a round, as a part of it."""

HORIZON = 2048.0
"""Rows of rounds after which evidence has faded to a third."""


class Contest:
    """The two ways of drafting of one target.

    Attributes:
        ahead: whether drafts work ahead now.
    """

    def __init__(self) -> None:
        self.ahead = True
        self._evidence = {True: [0.0, 0.0], False: [0.0, 0.0]}  # of each way: rows of rounds, and their scores
        self._unsettled = FIRST_ROUNDS
        self._rounds, self._yields = 0, 0

    def saw_round(self, rows: int, score: float) -> bool:
        """Learn from a round of so many rows, whose tokens for a millisecond come to ``score`` times those of plain
        decoding; returns whether the way has changed, since the other one promises more."""
        if self._unsettled > 0:
            self._unsettled -= 1
            return False
        kept = 1.0 - min(0.5, rows / HORIZON)
        for evidence in self._evidence.values():
            evidence[:] = [kept * each for each in evidence]
        self._evidence[self.ahead][0] += rows
        self._evidence[self.ahead][1] += rows * score
        self._rounds, self._yields = self._rounds + 1, self._yields + rows
        enough = self._rounds >= LEAST_ROUNDS and self._yields >= LEAST_YIELDS
        return enough and self.take(max((True, False), key=self._bound))

    def take(self, ahead: bool) -> bool:
        """Change to a way; returns whether that is another one."""
        if ahead == self.ahead:
            return False
        self.ahead, self._unsettled = ahead, SETTLING
        self._rounds, self._yields = 0, 0
        return True

    def _bound(self, way: bool) -> float:
        count, scores = self._evidence[way]
        return scores / count * (1.0 + SPREAD / sqrt(count)) if count else inf
