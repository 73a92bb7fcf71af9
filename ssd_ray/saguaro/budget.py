"""Which tokens a round verifies, and how long it waits for more: what adds most tokens per millisecond.

Let g_i(j) be the probability that row i reaches its j-th speculated token and accepts it. A round that verifies n_i of
row i yields sum(1 + g_i(1) + .. + g_i(n_i)) tokens in the milliseconds that a verification of sum(1 + n_i) takes. g_i
falls along a row, so the best N tokens are the N with the largest g: one pass over them in that order finds the best N,
whatever the curve of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

IN_VAIN = 2
"""Steps of waiting in a row each of which makes a round worse than the one before, after which longer waits are not looked at."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """What one row could verify.

    Attributes:
        there: for each token that is there, the probability of accepting it when it is reached.
        coming: the same of the tokens that drafts would add, one a step.
    """

    there: Sequence[float]
    coming: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """What a round does.

    Attributes:
        lengths: tokens that each row verifies beside its bonus token.
        steps: draft steps to wait for before.
        tokens: expected, over all rows.
        ms: expected milliseconds.
        least: the smallest probability of reaching and accepting a token that is verified; 1 if none is.
    """

    lengths: Sequence[int]
    steps: int
    tokens: float
    ms: float
    least: float = 1.0

    @property
    def rate(self) -> float:
        """Tokens per millisecond."""
        return self.tokens / self.ms


def best_lengths(rows: Sequence[Sequence[float]], verify_ms: Callable[[int], float], other_ms: float = 0.0) -> Budget:
    """The best tokens to verify of what is there.

    Args:
        rows: for each row the probabilities of accepting its tokens when they are reached.
        verify_ms: milliseconds of a verification of so many tokens.
        other_ms: what the round takes besides.
    """
    reached = [(gain, row) for row, chances in enumerate(rows) for gain in _gains(chances)]
    reached.sort(key=_gain, reverse=True)
    tokens = float(len(rows))
    best, best_count, best_tokens, best_ms = 0.0, 0, tokens, max(1e-9, verify_ms(len(rows)) + other_ms)
    best = tokens / best_ms
    for count, (gain, _) in enumerate(reached, 1):
        tokens += gain
        ms = max(1e-9, verify_ms(len(rows) + count) + other_ms)
        if tokens > best * ms:
            best, best_count, best_tokens, best_ms = tokens / ms, count, tokens, ms
    lengths = [0] * len(rows)
    for _, row in reached[:best_count]:
        lengths[row] += 1
    return Budget(lengths, 0, best_tokens, best_ms, reached[best_count - 1][0] if best_count else 1.0)


def best_budget(
    rows: Sequence[Prospect],
    verify_ms: Callable[[int], float],
    wait_ms: Callable[[int], float],
    other_ms: float = 0.0,
    arrival: float = 1.0,
) -> Budget:
    """The best tokens to verify, of what is there and what comes if all rows wait for some draft steps.

    Args:
        rows: what each row could verify.
        verify_ms, other_ms: as for :func:`best_lengths`.
        wait_ms: milliseconds of waiting for so many steps, 1 and more.
        arrival: probability that what is waited for comes in time.
    """
    best = best_lengths([row.there for row in rows], verify_ms, other_ms)
    before, worse = 0.0, 0
    for steps in range(1, 1 + max((len(row.coming) for row in rows), default=0)):
        extended = [_with(row, steps, arrival) for row in rows]
        found = best_lengths(extended, verify_ms, other_ms + wait_ms(steps))
        if found.rate > best.rate:
            best = Budget(found.lengths, steps, found.tokens, found.ms, found.least)
        # Against the step before: the first one pays for the whole delay, and may only begin to be worth it.
        worse = worse + 1 if found.rate <= before else 0
        before = found.rate
        if worse == IN_VAIN:
            break
    return best


def _with(row: Prospect, steps: int, arrival: float) -> list[float]:
    """The chances of a row after so many steps."""
    added = list(row.coming[:steps])
    return [*row.there, *(chance * (1.0 if index else arrival) for index, chance in enumerate(added))]


def _gains(chances: Sequence[float]) -> list[float]:
    """From the chance of accepting each token once it is reached, that of reaching and accepting it."""
    gains, reach = [], 1.0
    for chance in chances:
        reach *= min(1.0, chance)
        gains.append(reach)
    return gains


def _gain(pair: tuple[float, int]) -> float:
    return pair[0]
