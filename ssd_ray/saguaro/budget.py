"""Which tokens a round verifies, and how long it waits for more: what adds most tokens per millisecond.

Let g_i(j) be the probability that row i reaches its j-th speculated token and accepts it. A round that verifies n_i of
row i yields sum(1 + g_i(1) + .. + g_i(n_i)) tokens in the milliseconds that a verification of sum(1 + n_i) takes. g_i
falls along a row, so the best N tokens are the N with the largest g: one pass over them in that order finds the best N,
whatever the curve of the cost. Waiting adds tokens at the ends of rows, whose g have their places in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


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
    return best_budget([Prospect(row) for row in rows], verify_ms, lambda steps: 0.0, other_ms)


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
        wait_ms: milliseconds of waiting for so many steps, 1 and more; more steps take no less.
        arrival: probability that what is waited for comes in time.
    """
    table = np.array([token for row, each in enumerate(rows) for token in _tokens(row, each, arrival)]).reshape(-1, 3)
    gains, of_row, after = table[np.argsort(-table[:, 0], kind="stable")].T  # [tokens] each
    ms = np.array([max(1e-9, verify_ms(len(rows) + count) + other_ms) for count in range(len(gains) + 1)])
    best = (0.0, 0, 0)  # tokens per millisecond, steps, tokens beside the bonus tokens
    for steps in range(1 + max((len(row.coming) for row in rows), default=0)):
        waited = wait_ms(steps) if steps else 0.0
        if len(rows) + gains.sum() <= best[0] * (ms.min() + waited):
            break  # not even if all came in that time, and cost nothing to verify
        tokens = len(rows) + np.cumsum(gains[after <= steps])
        rates = np.append(len(rows), tokens) / (ms[: len(tokens) + 1] + waited)
        count = int(rates.argmax())
        best = max(best, (float(rates[count]), steps, count), key=lambda each: each[0])
    rate, steps, count = best
    chosen = np.flatnonzero(after <= steps)[:count]
    lengths = np.bincount(of_row[chosen].astype(np.int64), minlength=len(rows)).tolist()
    expected = len(rows) + float(gains[chosen].sum())
    return Budget(lengths, steps, expected, expected / rate, float(gains[chosen[-1]]) if count else 1.0)


def _tokens(row: int, prospect: Prospect, arrival: float) -> Iterator[tuple[float, int, int]]:
    """For each token of a row the probability of reaching and accepting it, the row, and the steps after which it is
    there."""
    reach = 1.0
    for chance in prospect.there:
        reach *= min(1.0, chance)
        yield reach, row, 0
    reach *= arrival
    for step, chance in enumerate(prospect.coming, 1):
        reach *= min(1.0, chance)
        yield reach, row, step
