"""Prompt lookup: what followed the last few tokens when they stood in the text before (Saxena, 2023).

It costs no forward and no message, so it is there at once when a speculation is not.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 4
SHORTEST = 2


class NgramIndex:
    """Where each n-gram of one text ended last. Grows with the text and never looks back."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._latest: list[dict[tuple[int, ...], int]] = [{} for _ in range(SHORTEST, LONGEST + 1)]
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            self._note()
            self._tokens.append(token)

    def follows(self, tail: tuple[int, ...]) -> int | None:
        """The token that followed the longest n-gram that ends ``tail`` where it stood last; None if it never did."""
        for length in range(min(LONGEST, len(tail)), SHORTEST - 1, -1):
            end = self._latest[length - SHORTEST].get(tail[-length:])
            if end is not None:
                return self._tokens[end]
        return None

    def propose(self, limit: int) -> list[int]:
        """Up to ``limit`` tokens that may follow, from the latest place of the longest n-gram that ends the text."""
        for length in range(LONGEST, SHORTEST - 1, -1):
            end = self._latest[length - SHORTEST].get(tuple(self._tokens[-length:]))
            if end is not None:
                return self._continue(end, limit)
        return []

    def _continue(self, end: int, limit: int) -> list[int]:
        """The tokens from ``end`` on. Where the text ends they go on with the proposal itself: a loop is unrolled."""
        proposal: list[int] = []
        period = len(self._tokens) - end
        for place in range(end, end + limit):
            proposal.append(self._tokens[place] if place < len(self._tokens) else proposal[place - end - period])
        return proposal

    def _note(self) -> None:
        """Remember the n-grams that end the text so far: a token now follows them."""
        for length, latest in enumerate(self._latest, SHORTEST):
            if len(self._tokens) >= length:
                latest[tuple(self._tokens[-length:])] = len(self._tokens)
