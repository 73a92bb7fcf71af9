"""What a draft has of a sequence's committed tokens: their KV and, if it reads them, their hidden states on the target.

Committed tokens have slot = position. Most get their KV as nodes of the tree, from which it is moved; those that were
committed without this draft are prefilled if they are many, and else run with the next step.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssd_ray.speculation.nodes import DraftNode, Item, Moves, Prefill

CATCH_UP = 16
"""More committed tokens than this without KV are prefilled, not run in a step."""


class Past:
    """The committed tokens of one sequence on one draft.

    Attributes:
        tokens: all of them. The last one is the bonus token, whose KV is the tree's.
        filled: tokens, from the first on, whose KV is in place.
        read_tokens: tokens, from the first on, whose hidden states on the target are known.
        reads: whether tokens are run only behind those whose hidden states :meth:`read` was told of.
    """

    def __init__(self, tokens: Sequence[int], filled: int = 0, *, reads: bool = False) -> None:
        self.tokens = list(tokens)
        self.filled = filled
        self.read_tokens = max(0, filled - 1)  # what is filled was run behind these
        self.reads = reads

    @property
    def position(self) -> int:
        """Position of the bonus token."""
        return len(self.tokens) - 1

    @property
    def known(self) -> Sequence[int]:
        """The tokens whose KV is in place."""
        return self.tokens[: self.filled]

    @property
    def complete(self) -> bool:
        """Whether so few tokens lack their KV that a step can run them, with all that they go on from."""
        return self.position - self.filled <= CATCH_UP and not (self.reads and self.read_tokens < self.position)

    def common(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, the last one aside, are there with their KV."""
        return min(self.filled, _alike(self.tokens, tokens))

    def restart(self, tokens: Sequence[int]) -> None:
        """Take other tokens; what is there of the common beginning stays."""
        self.filled = self.common(tokens)
        if (alike := _alike(self.tokens, tokens)) < len(self.tokens):
            self.read_tokens = min(self.read_tokens, alike)
        self.tokens = list(tokens)

    def read(self, start: int, count: int) -> int:
        """Take note that the target's hidden states of so many tokens are there, from at most :attr:`read_tokens` on;
        returns how many of them were there before."""
        known = min(self.read_tokens - start, count)
        self.read_tokens = max(self.read_tokens, start + count)
        return known

    def prefill(self, most: int) -> Prefill | None:
        """Up to ``most`` tokens to prefill before the next step, if many lack their KV."""
        if self.complete:
            return None
        start, end = self.filled, self.position
        if self.reads:
            end = min(end, self.read_tokens + 1)
        if end <= start:
            return None
        self.filled = min(end, start + most - start % most)  # chunks end at multiples of their size
        return Prefill(start, self.tokens[start : self.filled])

    def catch_up(self) -> list[Item]:
        """The tokens that still lack their KV, to be run in the next step."""
        start, self.filled = self.filled, self.position
        return [
            Item(self.tokens[position], position, position, position + 1, (), None)
            for position in range(start, self.position)
        ]

    def fall_back(self, count: int) -> None:
        """Take note that the last tokens, so many, were not run after all."""
        self.filled -= count

    def commit(self, nodes: Sequence[DraftNode], bonus_token: int) -> Moves:
        """Take the tokens that an outcome adds: those of the nodes behind the first one, which is the old bonus token,
        and the new one; returns the KV to bring to their positions.

        Nodes run after their ancestors, so those of the trunk that ran are its beginning. Where the target is read they
        are run again.
        """
        start = self.position
        self.tokens += [*(node.token for node in nodes[1:]), bonus_token]
        source = [] if self.reads else [node.slot for node in nodes if node.placed]
        self.filled += len(source)
        return Moves(source, range(start, start + len(source)))


def _alike(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts have in common from the first on, but the last one of the second."""
    limit = min(len(tokens), len(others) - 1)
    return next((i for i in range(limit) if tokens[i] != others[i]), limit)
