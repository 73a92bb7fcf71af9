"""Which outcomes to prepare for: how likely is "exactly k accepted", and how likely is the f-th guess then.

The draft opens branches in the order of P(exactly k accepted) * P(the bonus token is the f-th guess), the greedy form
of the paper's general solution F_k ~ w_k^(1/(1+r)) (section 4.1): with rank probabilities that fall as f^-(1+r), the B
largest products are that very allocation, and the next-best outcome is known at every moment.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

MAX_RANK = 64
_DECAY = 0.98
"""Weight that a round keeps for each later round of its kind: about the last fifty count."""


class FanOutPolicy(ABC):
    """Gives a weight to each outcome of a round. One policy serves all rounds of one sequence, or of many."""

    def __init__(self) -> None:
        # Prior of the rank law: r = 1, the middle of what was measured. Rank 0 after a rejection and after full
        # acceptance differ: in the first case the likeliest token is excluded.
        self._ranks = {full: [40.0 / (rank + 1) ** 2 for rank in range(MAX_RANK)] for full in (False, True)}

    @abstractmethod
    def depths(self, n: int) -> Sequence[float]:
        """Weights of "exactly k accepted" for k = 0..n in a round that verifies n tokens."""

    def ranks(self, full: bool) -> Sequence[float]:
        """Probability that the bonus token is the f-th guess, after full acceptance or after a rejection."""
        counts = self._ranks[full]
        total = sum(counts)
        return [count / total for count in counts]

    def observe(self, n: int, accepted: int, rank: int | None) -> None:
        """Learn from a round: n tokens verified, ``accepted`` of them right, and the rank of the bonus token among the
        guesses at that depth (None: not among them)."""
        counts = self._ranks[accepted == n]
        if rank is not None and rank < MAX_RANK:
            counts[rank] += 1.0


class Uniform(FanOutPolicy):
    """As many guesses at every depth: the reference policy."""

    def depths(self, n: int) -> Sequence[float]:
        return [1.0 / (n + 1)] * (n + 1)


class Geometric(FanOutPolicy):
    """The paper's closed form: every token is accepted with the same probability a, measured online."""

    def __init__(self) -> None:
        super().__init__()
        self._accepted, self._offered = 6.0, 10.0

    def depths(self, n: int) -> Sequence[float]:
        a = self._accepted / self._offered
        return [a**k * (1 - a) for k in range(n)] + [a**n]

    def observe(self, n: int, accepted: int, rank: int | None) -> None:
        super().observe(n, accepted, rank)
        self._accepted = _DECAY * self._accepted + accepted
        self._offered = _DECAY * self._offered + accepted + (accepted < n)


class Histogram(FanOutPolicy):
    """The general form on what was measured: one probability of acceptance per depth, given that depth was reached."""

    def __init__(self) -> None:
        super().__init__()
        self._accepted: list[float] = []
        self._reached: list[float] = []

    def depths(self, n: int) -> Sequence[float]:
        self._grow(n)
        weights, reach = [], 1.0
        for accepted, reached in zip(self._accepted[:n], self._reached[:n], strict=True):
            weights.append(reach * (1.0 - accepted / reached))
            reach *= accepted / reached
        return [*weights, reach]

    def observe(self, n: int, accepted: int, rank: int | None) -> None:
        super().observe(n, accepted, rank)
        self._grow(n)
        for depth in range(min(accepted + 1, n)):
            self._accepted[depth] = _DECAY * self._accepted[depth] + (depth < accepted)
            self._reached[depth] = _DECAY * self._reached[depth] + 1.0

    def _grow(self, n: int) -> None:
        missing = n - len(self._reached)
        self._accepted += [6.0] * missing
        self._reached += [10.0] * missing


POLICIES: dict[str, type[FanOutPolicy]] = {
    "auto": Histogram,
    "uniform": Uniform,
    "geometric": Geometric,
    "histogram": Histogram,
}
"""Policies by their name in the configuration."""
