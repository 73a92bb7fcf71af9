"""What a draft computes: one batched forward after the other, out of which come the nodes that it pushes.

What is done for a sequence is done alone: should it raise, the draft leaves that sequence alone, and the others do not
notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssd_ray.actors.isolation import Isolation
from ssd_ray.actors.seats import Seat, Seats
from ssd_ray.actors.uplink import Uplink
from ssd_ray.models.contract import ModelRunner
from ssd_ray.saguaro.costs import Costs, Load
from ssd_ray.saguaro.fanout import MAX_RANK
from ssd_ray.sampling.logits import scores, scores_by_row, top
from ssd_ray.sampling.rejection import Proposing
from ssd_ray.speculation.nodes import Item, Ranking
from ssd_ray.tracing import Recorder
from ssd_ray.wire import Nodes

RANKED = 32
"""Tokens that are kept of each distribution, best first."""

WIDTH = 4
"""Tokens of branches that each of many sequences gets in one forward at least."""

Work = Sequence[tuple[Seat, Sequence[Item]]]
"""Sequences, and what to run of each."""


class Step(NamedTuple):
    """How long a step took, how many sequences it served, and how many tokens it ran."""

    step_ms: float = 0.0
    sequences: int = 1
    step_tokens: int = 0


class Steps:
    """The steps of one draft, and the prefills between them.

    Args:
        runner: the model.
        seats: the sequences.
        uplink: to the target.
        costs: what steps cost, learned from each.
        isolation: takes out sequences that raise.
        proposing: how tokens are drawn in rejection mode; None is coupled mode.
        width: tokens of branches in one forward; see :class:`~ssd_ray.actors.drafting.Draft`. None: no branches.
        chunk: tokens of prompts that are prefilled between two steps.
        clock: seconds.
        trace: notes what is done; None: nobody does.
    """

    def __init__(
        self,
        runner: ModelRunner,
        seats: Seats,
        uplink: Uplink,
        costs: Costs,
        isolation: Isolation,
        *,
        proposing: Proposing | None,
        width: int | None,
        chunk: int,
        clock: Callable[[], float],
        trace: Recorder | None,
    ) -> None:
        self._runner = runner
        self._rankings = Rankings(runner, proposing)
        self._seats = seats
        self._uplink = uplink
        self._costs = costs
        self._isolation = isolation
        self._width, self._chunk = width, chunk
        self._clock = clock
        self._trace = trace
        self._last = Step()
        self._last_rate = 0.0  # value that the last step added, by the millisecond
        self._time_is_worth = 0.0  # the same of the last step of a round: what another millisecond would have brought

    def end_round(self) -> None:
        """Learn from the last step of a round what time is worth."""
        self._time_is_worth += 0.1 * (self._last_rate - self._time_is_worth)

    # Prefills

    def prefill(self) -> bool:
        """Prefill a chunk of the first sequence that lacks its past; returns whether there was one."""
        for seat in self._seats.all:
            if any(wrote for _, wrote in self._isolation.each([seat], self._prefill_chunk_of)):
                return True
        return False

    def _prefill_chunk_of(self, seat: Seat) -> bool:
        """Write the KV of a sequence's next tokens, if many lack it."""
        if not seat.past.complete and not self._seats.make_room(seat):
            return False
        prefill = seat.past.prefill(self._chunk)
        if prefill is None:
            return False
        start = self._clock()
        self._runner.prefill(seat.row, prefill.tokens, prefill.start)
        if self._trace is not None:
            self._trace.span("prefill", start, self._clock(), seat.sequence, len(prefill.tokens))
        self._seats.publish(seat)
        self._seats.make_room(seat)
        return True

    # Steps

    def step(self) -> bool:
        """Run one step: of the sequences that the target waits for, if there are any, else of all. Returns whether
        there was anything to run."""
        start = self._clock()
        work = self._plan()
        if not work:
            self._last_rate = 0.0
            return False
        rankings = self._isolation.together(
            list(work), lambda seats: self._rankings.of([(seat, work[seat]) for seat in seats])
        )
        self._push(work, dict(rankings))
        self._learn(work, start)
        return True

    def _plan(self) -> dict[Seat, list[Item]]:
        """What to run next of each sequence that has anything to be run."""
        seats = self._seats.ready
        seats = [seat for seat in seats if seat.session.urgent] or seats
        count = max(1, len(seats))
        width = 1 if self._width is None else max(1, max(self._width, WIDTH * len(seats)) // count)
        costs = self._step_ms(len(seats)), self._time_is_worth / count
        planned = self._isolation.each(seats, lambda seat: seat.session.next_step(width, *costs))
        return {seat: items for seat, items in planned if items}

    def _step_ms(self, sequences: int) -> Callable[[int], float]:
        """Milliseconds of a step by the tokens of each of some sequences."""
        load = Load(sequences)
        return cache(lambda tokens: self._costs.alone_ms(tokens * sequences, load))

    def _push(self, work: Mapping[Seat, Sequence[Item]], rankings: Mapping[Seat, list[Ranking]]) -> None:
        """Grow the trees by what the model has said, and send what is new."""
        last = self._last._asdict()

        def complete(seat: Seat) -> Nodes | None:
            return seat.session.complete(work[seat], rankings[seat], **last)

        if nodes := [made for _, made in self._isolation.each(rankings, complete) if made is not None]:
            self._uplink.send(*nodes)

    def _learn(self, work: Mapping[Seat, Sequence[Item]], start: float) -> None:
        """Learn from a step that began then what steps cost, and what they are worth."""
        self._last = Step(1e3 * (self._clock() - start), len(work), sum(map(len, work.values())))
        if self._trace is not None:
            end = start + 1e-3 * self._last.step_ms
            self._trace.span("step", start, end, self._last.step_tokens, self._last.sequences)
        self._costs.saw(self._last.step_tokens, Load(len(work)), self._last.step_ms, beside=0.0)
        self._last_rate = sum(seat.session.worth for seat in work) / max(self._last.step_ms, 1e-9)


class Rankings:
    """What a draft's model says, and in rejection mode draws, after some items.

    Args:
        runner: the model.
        proposing: how tokens are drawn in rejection mode; None is coupled mode.
    """

    def __init__(self, runner: ModelRunner, proposing: Proposing | None) -> None:
        self._runner = runner
        self._proposing = proposing

    @torch.inference_mode()
    def of(self, work: Work) -> list[list[Ranking]]:
        """Run the items of some sequences in one forward; what the draft says after each."""
        logits = self._forward(work)
        parts = [self._penalised(*part, logits[index]) for index, part in enumerate(work)]
        if self._proposing is not None:
            return [self._drawn(*part, each) for part, each in zip(work, parts, strict=True)]
        params = [seat.session.params for seat, items in work for _ in items]
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        tokens, values = _best(scores_by_row(together, params, _noise(work)))
        rankings = (Ranking(row, row_values, row[0]) for row, row_values in zip(tokens, values, strict=True))
        return [list(islice(rankings, len(items))) for _, items in work]

    @staticmethod
    def _penalised(seat: Seat, items: Sequence[Item], logits: Tensor) -> Tensor:
        """Logits after each item, float32 [items, V], without padding and with the sequence's penalties."""
        logits = logits[: len(items)]
        if seat.penalties is None:
            return logits
        return seat.penalties.apply(logits, seat.past.tokens, seat.session.paths(items))

    def _drawn(self, seat: Seat, items: Sequence[Item], logits: Tensor) -> list[Ranking]:
        """What the draft says after each item in rejection mode; logits are float32 [items, V]."""
        noise = _noise([(seat, items)])
        ranked = scores(logits, seat.session.params)
        best = _best(ranked)
        if noise is None or self._proposing is None:
            return [Ranking(row, values, row[0]) for row, values in zip(*best, strict=True)]
        drawn = self._proposing.draw(ranked.softmax(-1).cpu(), seat.session.fan_out(items), seat.session.c, noise)
        return [Ranking(*row) for row in zip(*best, *drawn, strict=True)]

    def _forward(self, work: Work) -> Tensor:
        """Logits, float32 [R, padded items, V]. Padding repeats a row's last item."""
        count = self._runner.padded(max(len(items) for _, items in work))
        padded = [[*items, *[items[-1]] * (count - len(items))] for _, items in work]
        extent = self._runner.extent(1 + max(item.highest for _, items in work for item in items))
        visible = np.arange(extent) < np.array([[[item.trunk] for item in row] for row in padded])  # [R, T, extent]
        for index, row in enumerate(padded):
            seeing = [token for token, item in enumerate(row) for _ in item.path]
            visible[index, seeing, [slot for item in row for slot in item.path]] = True
        flat = [item for row in padded for item in row]
        fields = [*(item.token for item in flat), *(item.position for item in flat), *(item.slot for item in flat)]
        tokens, positions, slots = torch.tensor(fields).view(3, len(padded), count)  # one call: each costs microseconds
        # Others may guess tokens that this model does not know, and guesses may lie beyond its last position. They are
        # run as something else: a sequence that gets there goes on without this draft.
        tokens = tokens.clamp(max=self._runner.vocab_size - 1)
        positions = positions.clamp(max=self._runner.max_length - 1)
        rows = [seat.row for seat, _ in work]
        return self._runner.extend(rows, tokens, positions, slots, torch.from_numpy(visible))


def _noise(work: Work) -> Tensor | None:
    """The noise of the token after each item, float32 [all items, V]; None if nobody needs any."""
    if all(seat.session.params.greedy for seat, _ in work):
        return None
    rows = [seat.noise.rows([item.position + 1 for item in items]) for seat, items in work]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _best(scores: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """The best tokens of each row and their scores."""
    values, tokens = top(scores, min(RANKED, MAX_RANK, scores.shape[-1]))
    return tokens.tolist(), values.tolist()
