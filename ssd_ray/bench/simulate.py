"""What will I get: a simulator of rounds, from measured distributions and times to tokens per second.

It is the model of the paper's section 3 with what it leaves out: accept lengths as measured, host work, partial trees,
many rows. It draws rounds at random instead of solving for the mean, so that rows of a batch which miss at different
times can be put together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ssd_ray.config import MAX_LOOKAHEAD
from ssd_ray.saguaro.costs import Measured


@dataclass(frozen=True, slots=True)
class Hardware:
    """Milliseconds of a pair on some machine.

    Attributes:
        verify_ms: a verification forward of one row and one token.
        step_ms: a draft step that runs one token.
        host_ms: a round's other work on the target, rows together.
        message_ms: an outcome's way to the draft and a token's way back.
        token_ms: what every further token of a draft step adds.
        row_ms: what every further row of a verification adds.
        verify_token_ms: what every further token of a verification adds, of whatever row.
        drag: by which fraction a verification takes longer while some draft works beside it.
    """

    verify_ms: float
    step_ms: float
    host_ms: float = 0.0
    message_ms: float = 0.0
    token_ms: float = 0.0
    row_ms: float = 0.0
    verify_token_ms: float = 0.0
    drag: float = 0.0

    def verify(self, rows: int, tokens: int) -> float:
        """Milliseconds of a verification of so many rows and tokens in all, with no draft at work."""
        return self.verify_ms + (rows - 1) * self.row_ms + (tokens - 1) * self.verify_token_ms

    def verifications(self, rows: int) -> Measured:
        """What a target would find out at load."""
        sizes = tuple(range(1, rows * (MAX_LOOKAHEAD + 1) + 1))
        return Measured(sizes, tuple(self.verify(1, size) for size in sizes), self.row_ms)

    def steps(self) -> Measured:
        """What a draft would find out at load."""
        sizes = (1, 64)
        return Measured(sizes, tuple(map(self.step, sizes)))

    def step(self, tokens: int) -> float:
        """Milliseconds of a draft step that runs so many tokens."""
        return self.step_ms + (tokens - 1) * self.token_ms

    def beside(self, verify_ms: float, draft_ms: float) -> float:
        """Milliseconds of a verification beside which a draft works for ``draft_ms`` from its begin."""
        work = min(draft_ms, verify_ms * (1.0 + self.drag))
        return verify_ms + work * self.drag / (1.0 + self.drag)


@dataclass(frozen=True, slots=True)
class Pair:
    """How well a draft guesses a target.

    Attributes:
        after_hit: weights of "exactly k accepted" for k = 0..K, in rounds that verify a prepared speculation.
        after_miss: the same in rounds that verify what was drafted after a miss; shorter, if one waits for less.
        hit_rate: probability that an outcome was prepared for.
    """

    after_hit: Sequence[float]
    after_miss: Sequence[float]
    hit_rate: float

    @property
    def lookahead(self) -> int:
        """Tokens in one speculation."""
        return len(self.after_hit) - 1


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a simulation came to.

    Attributes:
        tokens_per_s: of all rows together.
        tokens_per_round: of one row.
        duty_cycle: share of the time inside verification forwards.
    """

    tokens_per_s: float
    tokens_per_round: float
    duty_cycle: float


def ar(hardware: Hardware, rows: int = 1) -> Forecast:
    """Autoregressive decoding: a forward for each token of each row."""
    verify_ms = hardware.verify(rows, rows)
    round_ms = verify_ms + hardware.host_ms
    return Forecast(1e3 * rows / round_ms, 1.0, verify_ms / round_ms)


def sd(hardware: Hardware, pair: Pair, rows: int = 1) -> Forecast:
    """Plain speculative decoding: every round drafts K tokens first."""
    tokens = 1.0 + _mean(pair.after_miss)
    verify_ms = hardware.verify(rows, rows * (1 + pair.lookahead))
    round_ms = verify_ms + hardware.host_ms + pair.lookahead * hardware.step(rows)
    return Forecast(1e3 * rows * tokens / round_ms, tokens, verify_ms / round_ms)


def ssd(
    hardware: Hardware,
    pair: Pair,
    rows: int = 1,
    *,
    whole_trees: bool = False,
    lock_step: bool = False,
    rounds: int = 20_000,
    seed: int = 0,
) -> Forecast:
    """Speculative speculative decoding, with drafts that never rest.

    Args:
        hardware, pair: as measured.
        rows: sequences of the batch.
        whole_trees: a round lasts until all branches have K tokens, as in the paper; else branches are taken as long as
            they have come.
        lock_step: one row's miss makes all rows wait, as in the paper; else a row that missed goes on alone, without a
            speculation, and the others do not notice. A lone row waits for what ``pair.after_miss`` has.
        rounds: to simulate.
        seed: of the random numbers.
    """
    dice = random.Random(seed)
    cumulative = {hit: list(accumulate(weights)) for hit, weights in ((True, pair.after_hit), (False, pair.after_miss))}
    hits = [True] * rows
    tokens, time, verifying = 0.0, 0.0, 0.0
    dragged, step_ms = 1.0 + hardware.drag, hardware.step(rows)
    verified = dragged * hardware.verify(rows, rows) + hardware.host_ms
    tree_ms = (pair.lookahead + 1) * step_ms + hardware.message_ms
    # The first step runs the trunk, after the second a branch has its first token.
    drawn = max(0, int((verified - hardware.message_ms) / step_ms) - 1)
    longest = pair.lookahead if whole_trees else drawn
    backup_ms = (len(pair.after_miss) - 1) * step_ms + hardware.message_ms
    drafted = len(pair.after_miss) > 1 and (rows == 1 or lock_step)
    lengths = {True: min(pair.lookahead, longest), False: len(pair.after_miss) - 1 if drafted else 0}
    for _ in range(rounds):
        missed = not all(hits)
        verify_ms = dragged * hardware.verify(rows, rows + sum(lengths[hit] for hit in hits))
        verifying += verify_ms
        time += max(verify_ms + hardware.host_ms, tree_ms if whole_trees else 0.0)
        time += backup_ms if missed and drafted else 0.0
        for row, hit in enumerate(hits):
            tokens += 1.0
            if hit or drafted:
                accepted = dice.choices(range(len(cumulative[hit])), cum_weights=cumulative[hit])[0]
                tokens += min(accepted, longest) if hit else accepted
            hits[row] = dice.random() < pair.hit_rate
    return Forecast(1e3 * tokens / time, tokens / rounds / rows, verifying / time)


def plain(hardware: Hardware, acceptance: float, rows: int = 1) -> Forecast:
    """The better of autoregressive decoding and plain speculative decoding with its best lookahead, where every token
    is accepted with the same probability."""
    pairs = (geometric_pair(acceptance, 0.0, lookahead) for lookahead in _LOOKAHEADS)
    return max([ar(hardware, rows), *(sd(hardware, pair, rows) for pair in pairs)], key=_speed)


def ideal(hardware: Hardware, acceptance: float, rows: int = 1) -> Forecast:
    """What speculative speculative decoding cannot surpass where every token is accepted with the same probability:
    every outcome is prepared for, by as many draft steps as the best lookahead has tokens, and by no other work."""

    def known_before(lookahead: int) -> Forecast:
        tokens = 1.0 + _mean(geometric_pair(acceptance, 1.0, lookahead).after_hit)
        draft_ms = lookahead * hardware.step(rows)
        verify_ms = hardware.beside(hardware.verify(rows, rows * (1 + lookahead)), draft_ms)
        round_ms = max(verify_ms + hardware.host_ms, draft_ms + hardware.message_ms)
        return Forecast(1e3 * rows * tokens / round_ms, tokens, verify_ms / round_ms)

    return max([plain(hardware, acceptance, rows), *map(known_before, _LOOKAHEADS)], key=_speed)


def several_drafts(pair: Pair, drafts: int, exponent: float) -> Pair:
    """The pair with that many drafts: together they guess ``drafts`` times as many outcomes, and the chance of a miss
    falls as the power law F^-r does."""
    return replace(pair, hit_rate=1.0 - (1.0 - pair.hit_rate) * drafts**-exponent)


def forecast(hardware: Hardware, acceptance: float, hit_rate: float, exponent: float) -> dict[int, dict[str, Forecast]]:
    """What to expect, by rows of a batch and by method: "ar", "sd", and "ssd" with one draft and with several.

    Plain speculation drafts the best number of tokens, and speculative speculation waits for the best number of them
    after a miss, as the planner has it. A step of a draft is taken to serve all rows.
    """

    def best_ssd(rows: int, drafts: int) -> Forecast:
        waits = range(MAX_LOOKAHEAD + 1) if rows == 1 else [0]
        pairs = [several_drafts(geometric_pair(acceptance, hit_rate, wait=wait), drafts, exponent) for wait in waits]
        return max((ssd(hardware, pair, rows, rounds=4000) for pair in pairs), key=_speed)

    return {
        rows: {
            "ar": ar(hardware, rows),
            "sd": max((sd(hardware, geometric_pair(acceptance, 0.0, k), rows) for k in _LOOKAHEADS), key=_speed),
        }
        | {"ssd" if drafts == 1 else f"ssd, {drafts} drafts": best_ssd(rows, drafts) for drafts in (1, 2, 4)}
        for rows in (1, 4, 16)
    }


def geometric_pair(acceptance: float, hit_rate: float, lookahead: int = MAX_LOOKAHEAD, wait: int | None = None) -> Pair:
    """A pair that accepts every token with the same probability.

    Args:
        acceptance: that probability.
        hit_rate: probability that an outcome was prepared for.
        lookahead: tokens in one speculation.
        wait: tokens that are drafted after a miss; None: ``lookahead``.
    """

    def weights(most: int) -> list[float]:
        return [*(acceptance**k * (1.0 - acceptance) for k in range(most)), acceptance**most]

    return Pair(weights(lookahead), weights(lookahead if wait is None else wait), hit_rate)


_LOOKAHEADS = range(1, MAX_LOOKAHEAD + 1)


def _speed(forecast: Forecast) -> float:
    return forecast.tokens_per_s


def _mean(weights: Sequence[float]) -> float:
    return sum(k * weight for k, weight in enumerate(weights)) / sum(weights)
