"""How often what dies is started again, and how soon.

What dies soon after its start would most likely do so again; what has run long has met with an accident. So tries are
counted only as long as nothing has run well, and come ever later.
"""

from __future__ import annotations

GOOD_SECONDS = 300.0
"""How long something has to run to have all its tries back."""

FIRST_SECONDS = 1.0
MOST_SECONDS = 30.0
"""How long the second try waits, and any later one at most; each waits twice as long as the one before. The first
does not wait: somebody does."""


class Tries:
    """The tries of one place in an engine, whoever takes it.

    Args:
        most: how often in a row.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._made = 0

    def next(self, ran: float) -> float | None:
        """Take a try after something that ran for so many seconds has died, or did not start.

        Returns:
            Seconds to wait before it; None if there is none left.
        """
        self._made = 0 if ran >= GOOD_SECONDS else self._made
        if self._made >= self.most:
            return None
        self._made += 1
        return min(MOST_SECONDS, FIRST_SECONDS * 2.0 ** (self._made - 2)) if self._made > 1 else 0.0
