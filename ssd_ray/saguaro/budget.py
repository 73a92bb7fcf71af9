"""Which tokens a round verifies, and how long it waits for more: what adds most tokens per millisecond.

Let g_i(j) be the probability that row i reaches its j-th speculated token and accepts it. A round that verifies n_i of
row i yields sum(1 + g_i(1) + .. + g_i(n_i)) tokens in the milliseconds that a verification of sum(1 + n_i) takes. g_i
falls along a row, so the best N tokens are the N with the largest g: one pass over them in that order finds the best N,
whatever the curve of the cost. Waiting adds tokens at the ends of rows, whose g have their places in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

Curve = Callable[[Integers], Floats | float]
"""Milliseconds of verifications by their tokens."""


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


def best_lengths(rows: Sequence[Sequence[float]], verify_ms: Curve, other_ms: float = 0.0) -> Budget:
    """The best tokens to verify of what is there.

    Args:
        rows: for each row the probabilities of accepting its tokens when they are reached.
        verify_ms: milliseconds of verifications of so many tokens, of several at once.
        other_ms: what the round takes besides.
    """
    return best_budget([Prospect(row) for row in rows], verify_ms, lambda steps: 0.0, other_ms)


def best_budget(
    rows: Sequence[Prospect],
    verify_ms: Curve,
    wait_ms: Callable[[int], float],
    other_ms: float = 0.0,
    arrival: float = 1.0,
) -> Budget:
    """The best tokens to verify, of what is there and what comes if all rows wait for some draft steps.

    Args:
        rows: what each row could verify.
        verify_ms, other_ms: as for :func:`best_lengths`.
        wait_ms: milliseconds of waiting for so many steps; for none, what going on at once costs.
        arrival: probability that what is waited for comes in time.
    """
    gains, of_row, after = _best_first(rows, arrival)
    ms = np.empty(1 + len(gains))  # by tokens beside the bonus tokens
    ms[:] = np.maximum(1e-9, verify_ms(len(rows) + np.arange(len(ms))) + other_ms)
    waits = range(1 + max((len(row.coming) for row in rows), default=0))
    waited = np.array([*map(wait_ms, waits)])[:, None]  # [steps, 1]
    there = after <= np.arange(len(waited))[:, None]  # [steps, tokens]
    expected = len(rows) + _sums(there * gains)
    count = _sums(there).astype(np.int64)
    rates = expected / (ms[count] + waited)  # [steps, 1 + tokens]
    steps, place = divmod(int(rates.argmax()), rates.shape[1])
    chosen = np.flatnonzero(there[steps, :place])
    lengths = np.bincount(of_row[chosen], minlength=len(rows)).tolist()
    tokens = float(expected[steps, place])
    least = float(gains[chosen[-1]]) if len(chosen) else 1.0
    return Budget(lengths, steps, tokens, tokens / float(rates[steps, place]), least)


def _best_first(rows: Sequence[Prospect], arrival: float) -> tuple[Floats, Integers, Integers]:
    """For each token the probability of reaching and accepting it, its row, and the steps after which it is there; the
    most probable first."""
    gains: list[float] = []
    after: list[int] = []
    for row in rows:
        chances = [min(1.0, chance) for chance in (*row.there, *row.coming)]
        if row.coming:
            chances[len(row.there)] *= arrival
        gains += accumulate(chances, mul)
        after += [0] * len(row.there)
        after += range(1, 1 + len(row.coming))
    of_row = np.repeat(np.arange(len(rows)), [len(row.there) + len(row.coming) for row in rows])
    values = np.array(gains)
    order = np.argsort(-values, kind="stable")
    return values[order], of_row[order], np.array(after, dtype=np.int64)[order]


def _sums(values: NDArray[Any]) -> Floats:
    """Sums of the first 0, 1, .. values of each row."""
    sums = np.zeros((values.shape[0], 1 + values.shape[1]))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums
