"""Which outcomes to prepare for: how likely is "exactly k accepted", and how likely is the f-th guess then.

The best hit rate under a budget of B guesses opens F_k ~ w_k^(1/(1+r)) of them at depth k, where w_k is the probability
of exactly k accepted tokens and F^-r the one that the bonus token is not among F guesses (paper, section 4.1, with
measured w_k). :func:`shape` computes that. A draft opens its branches one after the other and does not know how many
there will be time for, so it takes them in the order of P(exactly k accepted) * P(the bonus token is the f-th guess),
of which the first B are that very allocation, for every B.

A policy is what gives these two probabilities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate, pairwise
from math import exp, log, sqrt

MAX_RANK = 64
_DECAY = 0.98
"""Weight that a round keeps for each later round of its kind: about the last fifty count."""

_SLOW_DECAY = 0.995
"""The same for what is told apart finely: about the last two hundred."""

_PRIOR_ACCEPTANCE, _PRIOR_ROUNDS = 0.6, 10.0
_PRIOR_CONTINUATION = 0.7


class Source(IntEnum):
    """Where a drafted token comes from: the model, what the text says (:mod:`~ssd_ray.saguaro.ngram`), or both."""

    MODEL = 0
    """The text says nothing."""
    BOTH = 1
    """They agree."""
    OVERRULED = 2
    """The model's; the text says something else, which is the first guess then."""
    TEXT = 3
    """The text's; the model says something else."""


@dataclass(slots=True)
class Situation:
    """What a draft knows of a round before its outcome.

    Attributes:
        gaps: for each depth of the trunk, 0 to n, how far the score of each guess lies behind the best one's, in nats,
            noise included. At depths below n that best one is the drafted token's, which is no guess: the first gap
            says how sure the draft was of it. Empty where the draft has not run that token yet.
        after_hit: whether the round began with a prepared speculation.
        sources: of the token that the draft would draft at each depth; empty: the model.
        budget: guesses that there usually is time for, over all drafts.
    """

    gaps: list[Sequence[float]]
    after_hit: bool = True
    sources: list[Source] = field(default_factory=list)
    budget: int = 16

    @property
    def n(self) -> int:
        """Tokens that are verified."""
        return len(self.gaps) - 1

    def source(self, depth: int) -> Source:
        """Where the token that is drafted at a depth comes from."""
        return self.sources[depth] if self.sources else Source.MODEL


class FanOutPolicy(ABC):
    """Gives a probability to each outcome of a round. One policy serves all rounds of one draft."""

    def __init__(self) -> None:
        # Prior of the rank law: r = 1, the middle of what was measured. After a rejection and after full acceptance
        # it differs: in the first case the likeliest token is excluded. And it does by where that one comes from.
        kinds = [(full, source) for full in (False, True) for source in Source]
        self._counts = {kind: [20.0 / (rank + 1) ** 2 for rank in range(MAX_RANK)] for kind in kinds}
        self._ranks = {kind: _normalised(counts) for kind, counts in self._counts.items()}
        self._estimates = 0
        self.typical = _PRIOR_CONTINUATION
        """How often a token is accepted of which nothing is known yet."""

    def saw_estimate(self, chance: float) -> None:
        """Learn from a token of which something is known now."""
        self._estimates += 1
        self.typical += max(0.005, 1.0 / (20 + self._estimates)) * (chance - self.typical)

    @abstractmethod
    def depths(self, situation: Situation) -> Sequence[float]:
        """Probabilities of "exactly k accepted" for k = 0..n."""

    def ranks(self, situation: Situation, depth: int) -> Sequence[float]:
        """Probability that the bonus token is the f-th guess, given that exactly ``depth`` tokens are accepted; not
        rising in f, and as long as there may be guesses."""
        return self._ranks[depth == situation.n, situation.source(depth)]

    def acceptance(self, gap: float, source: Source) -> float:
        """Probability that a drafted token is accepted that leads the next one by ``gap`` nats."""
        return _PRIOR_CONTINUATION

    def observe(self, situation: Situation, accepted: int, rank: int | None) -> None:
        """Learn from an outcome.

        Args:
            situation: what was known of the round.
            accepted: tokens of it that were right.
            rank: of the bonus token among the guesses at that depth; None if it was not among them.
        """
        if rank is not None and rank < MAX_RANK:
            kind = accepted == situation.n, situation.source(accepted)
            self._counts[kind][rank] += 1.0
            self._ranks[kind] = _falling(_normalised(self._counts[kind]))

    @property
    def exponent(self) -> float:
        """r of the chance F^-r that the bonus token is not among F guesses, from the ranks seen after a rejection."""
        misses, missing = [], 1.0
        for chance in self._ranks[False, Source.MODEL]:
            missing -= chance
            misses.append(missing)
        return fit_exponent(misses[:16])

    def place(self, situation: Situation, accepted: int, rank: int | None) -> int | None:
        """How many guesses come before that outcome: it is a hit if and only if the budget is larger. None: never."""
        weights = self.depths(situation)
        ranks = self.ranks(situation, accepted)
        if rank is None or rank >= len(ranks):
            return None
        value = weights[accepted] * ranks[rank]
        before = 0
        for depth, weight in enumerate(weights):
            if depth == accepted:
                before += rank
            elif weight > 0.0:
                before += bisect_left(self.ranks(situation, depth), -value / weight, key=_negative)
        return before


class Uniform(FanOutPolicy):
    """As many guesses at every depth: the reference policy."""

    def depths(self, situation: Situation) -> Sequence[float]:
        return [1.0 / (situation.n + 1)] * (situation.n + 1)

    def ranks(self, situation: Situation, depth: int) -> Sequence[float]:
        return _UNIFORM_RANKS


class Geometric(FanOutPolicy):
    """The paper's closed form: every token is accepted with the same probability a, measured online."""

    def __init__(self) -> None:
        super().__init__()
        self._accepted, self._offered = _PRIOR_ACCEPTANCE * _PRIOR_ROUNDS, _PRIOR_ROUNDS

    def depths(self, situation: Situation) -> Sequence[float]:
        return _stops([self._accepted / self._offered] * situation.n)

    def observe(self, situation: Situation, accepted: int, rank: int | None) -> None:
        super().observe(situation, accepted, rank)
        self._accepted = _DECAY * self._accepted + accepted
        self._offered = _DECAY * self._offered + accepted + (accepted < situation.n)


@dataclass(slots=True)
class _Rates:
    """Frequencies of an event by an index, which forget."""

    happened: list[float] = field(default_factory=list)
    tried: list[float] = field(default_factory=list)

    def grow(self, size: int) -> None:
        missing = size - len(self.tried)
        self.happened += [_PRIOR_ACCEPTANCE * _PRIOR_ROUNDS] * missing
        self.tried += [_PRIOR_ROUNDS] * missing

    def add(self, index: int, happened: bool, decay: float = _DECAY) -> None:
        self.happened[index] = decay * self.happened[index] + happened
        self.tried[index] = decay * self.tried[index] + 1.0

    def rate(self, index: int) -> float:
        return self.happened[index] / self.tried[index]


class Histogram(FanOutPolicy):
    """The general form on what was measured: one probability of acceptance for each depth, given that it was reached;
    others after a hit than after a miss."""

    def __init__(self) -> None:
        super().__init__()
        self._rates = {after_hit: _Rates() for after_hit in (False, True)}

    def depths(self, situation: Situation) -> Sequence[float]:
        rates = self._rates[situation.after_hit]
        rates.grow(situation.n)
        return _stops([rates.rate(depth) for depth in range(situation.n)])

    def observe(self, situation: Situation, accepted: int, rank: int | None) -> None:
        super().observe(situation, accepted, rank)
        rates = self._rates[situation.after_hit]
        rates.grow(situation.n)
        for depth in range(min(accepted + 1, situation.n)):
            rates.add(depth, depth < accepted)


class Confidence(FanOutPolicy):
    """The draft's own confidence at the very position, calibrated online.

    A drafted token is accepted as often as others were that led by about as many nats and came from the same source.
    Guesses are ranked by what was measured for their ranks and by how far each lies behind, half and half.
    """

    EDGES = (0.1, 0.25, 0.5, 0.8, 1.2, 1.7, 2.3, 3.0, 4.0, 5.5, 8.0)
    """Leads in nats that separate the bins."""

    def __init__(self) -> None:
        super().__init__()
        middles = [0.05, *((low + high) / 2 for low, high in pairwise(self.EDGES)), 10.0]
        prior = [_PRIOR_ROUNDS * (1.0 - 0.6 * exp(-middle / 1.5)) for middle in middles]
        self._rates = {source: _Rates(list(prior), [_PRIOR_ROUNDS] * len(prior)) for source in Source}

    def acceptance(self, gap: float, source: Source) -> float:
        return self._rates[source].rate(bisect_left(self.EDGES, gap))

    def depths(self, situation: Situation) -> Sequence[float]:
        return _stops([self._chance(situation, depth) for depth in range(situation.n)])

    def ranks(self, situation: Situation, depth: int) -> Sequence[float]:
        gaps = situation.gaps[depth]
        measured = super().ranks(situation, depth)
        if not gaps:
            return measured
        # The geometric mean of the two; cut to never rise, since what is looked up stands out of turn.
        weights = [sqrt(chance * exp(gaps[0] - gap)) for chance, gap in zip(measured, gaps, strict=False)]
        return list(accumulate(_normalised(weights), min))

    def observe(self, situation: Situation, accepted: int, rank: int | None) -> None:
        super().observe(situation, accepted, rank)
        for depth in range(min(accepted + 1, situation.n)):
            if situation.gaps[depth]:
                rates = self._rates[situation.source(depth)]
                rates.add(bisect_left(self.EDGES, situation.gaps[depth][0]), depth < accepted, _SLOW_DECAY)

    def _chance(self, situation: Situation, depth: int) -> float:
        gaps = situation.gaps[depth]
        return self.acceptance(gaps[0], situation.source(depth)) if gaps else _PRIOR_ACCEPTANCE


class Auto(FanOutPolicy):
    """Whichever of confidence and histogram would have had more hits lately under the rounds' budgets; all learn from
    all."""

    def __init__(self) -> None:
        super().__init__()
        self._policies: list[FanOutPolicy] = [Confidence(), Histogram()]
        self._hits = [0.8, 0.75]  # the prior breaks the tie

    @property
    def best(self) -> FanOutPolicy:
        """The policy that leads."""
        return self._policies[self._hits.index(max(self._hits))]

    def depths(self, situation: Situation) -> Sequence[float]:
        return self.best.depths(situation)

    def ranks(self, situation: Situation, depth: int) -> Sequence[float]:
        return self.best.ranks(situation, depth)

    def acceptance(self, gap: float, source: Source) -> float:
        return self._policies[0].acceptance(gap, source)

    @property
    def exponent(self) -> float:
        return self.best.exponent

    def observe(self, situation: Situation, accepted: int, rank: int | None) -> None:
        for index, policy in enumerate(self._policies):
            place = policy.place(situation, accepted, rank)
            hit = place is not None and place < situation.budget
            self._hits[index] += (1.0 - _SLOW_DECAY) * (hit - self._hits[index])
            policy.observe(situation, accepted, rank)


def shape(weights: Sequence[float], r: float, budget: int) -> list[int]:
    """Deal a budget of guesses out: F_k ~ w_k^(1/(1+r)), rounded by largest remainder.

    The paper's closed form is the case w_k = a^k (1 - a), w_K = a^K. At least one guess goes to every depth with
    w_k > 0, the likeliest first, if the budget allows.

    Args:
        weights: w_k, the probability of exactly k accepted tokens.
        r: exponent of the chance F^-r that the bonus token is not among F guesses.
        budget: guesses; the result sums to it, unless all weights are 0.
    """
    powers = [weight ** (1.0 / (1.0 + r)) if weight > 0.0 else 0.0 for weight in weights]
    possible = sorted((depth for depth, power in enumerate(powers) if power), key=lambda depth: -powers[depth])
    guesses = [0] * len(weights)
    for depth in possible[:budget]:
        guesses[depth] = 1
    spare = budget - sum(guesses)
    if spare <= 0 or not possible:
        return guesses
    scale = budget / sum(powers)
    wanted = [max(0.0, power * scale - 1.0) if guesses[depth] else 0.0 for depth, power in enumerate(powers)]
    shares = [spare * each / (sum(wanted) or 1.0) for each in wanted]
    shares = shares if sum(wanted) else [spare / len(possible) if guess else 0.0 for guess in guesses]
    guesses = [guess + int(share) for guess, share in zip(guesses, shares, strict=True)]
    remainders = sorted(possible, key=lambda depth: int(shares[depth]) - shares[depth])
    for depth in remainders[: budget - sum(guesses)]:
        guesses[depth] += 1
    return guesses


def fit_exponent(misses: Sequence[float]) -> float:
    """Fit r of F^-r to the measured chances ``misses[F - 2]`` that the bonus token is not among F - 1 guesses.

    F counts the drafted token, which is excluded from the guesses. Least squares through the origin of the logarithms.
    """
    points = [(log(fan + 2), -log(miss)) for fan, miss in enumerate(misses) if 0.0 < miss < 1.0]
    return sum(x * y for x, y in points) / sum(x * x for x, _ in points) if points else 1.0


def _stops(acceptance: Sequence[float]) -> list[float]:
    """From the chance of accepting each token once it is reached, that of accepting exactly k."""
    weights, reach = [], 1.0
    for chance in acceptance:
        weights.append(reach * (1.0 - chance))
        reach *= chance
    return [*weights, reach]


def _normalised(counts: Sequence[float]) -> list[float]:
    total = sum(counts)
    return [count / total for count in counts]


def _falling(values: Sequence[float]) -> list[float]:
    """The nearest sequence that does not rise: neighbours that do are averaged (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        total, size = value, 1
        while pools and pools[-1][0] / pools[-1][1] < total / size:
            more, others = pools.pop()
            total, size = total + more, size + others
        pools.append((total, size))
    return [total / size for total, size in pools for _ in range(size)]


def _negative(value: float) -> float:
    return -value


_UNIFORM_RANKS = [exp(-rank) for rank in range(MAX_RANK)]
"""Any falling numbers, the same at all depths: guesses are then opened in turn."""

POLICIES: dict[str, type[FanOutPolicy]] = {
    "auto": Auto,
    "uniform": Uniform,
    "geometric": Geometric,
    "histogram": Histogram,
    "confidence": Confidence,
}
"""Policies by their name in the configuration."""
