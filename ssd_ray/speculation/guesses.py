"""The guesses of a round: what may come instead of each token of its trunk, and how likely.

An outcome is a depth of the trunk and a token. The ranks of a depth's tokens, the likeliest first, are dealt out over
the drafts, beginning with another one at each depth: none needs to know what the others do.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssd_ray.saguaro.fanout import FanOutPolicy, Situation, Source, shape
from ssd_ray.speculation.nodes import DraftNode


class Allowance:
    """How many guesses a round has, over all drafts.

    Args:
        guesses: so many to begin with.
        strict: it stays so, and no more are opened; else it becomes what there usually is time for.
    """

    def __init__(self, guesses: int, *, strict: bool = False) -> None:
        self._guesses = float(guesses)
        self._strict = strict

    @property
    def guesses(self) -> int:
        """How many that is."""
        return max(1, round(self._guesses))

    def of_share(self, share: int, shares: int) -> int:
        """How many of them a draft may open that takes share ``share`` of ``shares``; -1: any number."""
        return len(range(share, self.guesses, shares)) if self._strict else -1

    def saw(self, opened: int) -> None:
        """Learn how many a round had time for."""
        if not self._strict and opened:
            self._guesses += 0.1 * (opened - self._guesses)


class Guesses:
    """One draft's share of the guesses of one round. A guess is a depth of the trunk and a rank there.

    Attributes:
        trunk: what the round verifies.

    Args:
        policy: knows how likely each guess is; it learns from the outcome.
        after_hit: whether the round began with a prepared speculation.
        allowance: guesses of a round.
        share, shares: which of the guesses are this draft's.
    """

    def __init__(
        self,
        policy: FanOutPolicy,
        trunk: Sequence[DraftNode],
        after_hit: bool,
        allowance: Allowance,
        share: int,
        shares: int,
    ) -> None:
        self._policy = policy
        self.trunk = trunk
        self._share, self._shares = share, shares
        self._opened, self._allowed = 0, allowance.of_share(share, shares)
        self._tokens: dict[int, list[int]] = {}  # by depth, best first
        self._ranks: dict[int, Sequence[float]] = {}  # probabilities of these, given the depth
        self._weights: Sequence[float] = ()  # probabilities of the depths
        self._planned: Sequence[int] = ()  # guesses by depth, as fan_out has it
        depths = len(trunk)
        self._situation = Situation([()] * depths, after_hit, [Source.MODEL] * depths, allowance.guesses)

    @property
    def spent(self) -> bool:
        """Whether no more guesses may be opened."""
        return self._opened == self._allowed

    @property
    def opened(self) -> int:
        """Guesses that were opened, over all drafts, if others had as much time."""
        return self._opened * self._shares

    def rank(self) -> list[int]:
        """Rank what may come at every depth whose logits are there and were not ranked yet; returns these depths."""
        new = [depth for depth, node in enumerate(self.trunk) if node.ranking.tokens and depth not in self._tokens]
        for depth in new:
            self._rank_at(depth)
        if new:
            self._weights = self._policy.depths(self._situation)
        self._ranks |= {depth: self._policy.ranks(self._situation, depth) for depth in new}
        return new

    def _rank_at(self, depth: int) -> None:
        """Guess every ranked token but the drafted one, and note how far behind the best each is."""
        trunk = self.trunk
        ranking, drafted = trunk[depth].ranking, -1 if depth == len(trunk) - 1 else trunk[depth + 1].token
        scored = list(zip(ranking.tokens, ranking.scores, strict=True))
        guesses = [(token, score) for token, score in scored if token != drafted]
        best = next((score for token, score in scored if token == drafted), guesses[0][1])
        self._tokens[depth] = [token for token, _ in guesses]
        self._situation.gaps[depth] = [best - score for _, score in guesses]
        self._situation.sources[depth] = ranking.source

    def chance(self, depth: int, rank: int) -> float:
        """Probability of a guess."""
        ranks = self._ranks[depth]
        return self._weights[depth] * (ranks[rank] if rank < len(ranks) else 0.0)

    def first(self, depth: int) -> int | None:
        """The likeliest guess of this draft at a depth, if it has any: its rank."""
        return self._own(depth, (self._share - depth) % self._shares)

    def following(self, depth: int, rank: int) -> int | None:
        """The one that comes after it."""
        return self._own(depth, rank + self._shares)

    def _own(self, depth: int, rank: int) -> int | None:
        return rank if rank < len(self._tokens[depth]) else None

    def open(self, depth: int, rank: int) -> int:
        """Count a guess as opened; returns its token."""
        self._opened += 1
        return self._tokens[depth][rank]

    def plan(self, lookahead: int) -> Sequence[int]:
        """How many guesses there are to be at each depth of a trunk of ``lookahead`` tokens, before any has run."""
        if not self._planned:
            weights = self._policy.depths(Situation([()] * (lookahead + 1)))
            self._planned = shape(weights, self._policy.exponent, self._situation.budget)
        return self._planned

    def learn(self, accepted: int, bonus_token: int) -> None:
        """Have the policy learn from the outcome, if its depth was ranked."""
        guesses = self._tokens.get(accepted)
        if guesses is not None:
            rank = guesses.index(bonus_token) if bonus_token in guesses else None
            self._policy.observe(self._situation, accepted, rank)
