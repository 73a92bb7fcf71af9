"""The loop of a draft: messages in, one batched forward at a time, nodes out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from math import inf
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssd_ray.actors.handover import Handover
from ssd_ray.actors.isolation import Isolation
from ssd_ray.actors.states import Aside, from_message
from ssd_ray.config import MAX_LOOKAHEAD, SamplingParams
from ssd_ray.errors import ProtocolError
from ssd_ray.models.contract import ModelRunner
from ssd_ray.models.leases import KVMemory, RowLease
from ssd_ray.saguaro.costs import Costs, Load
from ssd_ray.saguaro.fanout import MAX_RANK, FanOutPolicy
from ssd_ray.sampling.logits import scores, scores_by_row, top
from ssd_ray.sampling.noise import NoiseRows
from ssd_ray.sampling.penalties import Penalties, penalties
from ssd_ray.sampling.rejection import Proposing, stream_seed
from ssd_ray.speculation.draft import DraftSession
from ssd_ray.speculation.nodes import Item, Ranking
from ssd_ray.speculation.past import CATCH_UP, Past
from ssd_ray.speculation.window import SCRATCH
from ssd_ray.tracing import Recorder
from ssd_ray.transport.channel import HUB, MAX_FRAME_BYTES, Channel
from ssd_ray.transport.traced import traced
from ssd_ray.wire import (
    Begin,
    Close,
    Declined,
    Goodbye,
    Hello,
    Lost,
    Message,
    Nodes,
    Open,
    Outcome,
    States,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

ToDraft = Open | Outcome | Begin | States | Close
"""What a target tells a draft, of one sequence each."""

RANKED = 32
"""Tokens that are kept of each distribution, best first."""

WIDTH = 4
"""Tokens of branches that each of many sequences gets in one forward at least."""

HELLO_SECONDS = 1.0
KNOCK_SECONDS = 0.02
"""How soon a greeting is said again: one that was sent, and one for which no connection was there yet."""

LOST_ROUNDS = 8
"""Rounds after which a sequence that is unknown is asked for again."""

MOST_ASKED = 4096
"""Sequences of which a draft remembers that it has asked for them, or declined them, at most."""

SILENT_ROUNDS = 2
"""Rounds of all sequences after which one of which nothing was heard is doubted, where its row is needed."""


@dataclass(slots=True, eq=False)
class Seat:
    """One sequence: its session, its noise, and where its KV is."""

    session: DraftSession
    noise: NoiseRows
    penalties: Penalties | None
    row: int
    lease: RowLease
    heard: int  # outcomes that had come, of all sequences, when the last one of this one came

    @property
    def sequence(self) -> int:
        """The sequence's number."""
        return self.session.sequence

    @property
    def past(self) -> Past:
        """Its committed tokens."""
        return self.session.past


class Step(NamedTuple):
    """How long a step took, how many sequences it served, and how many tokens it ran."""

    step_ms: float = 0.0
    sequences: int = 1
    step_tokens: int = 0


class Draft:
    """A draft without its process: everything but where it runs.

    Args:
        runner: the model; each sequence takes one of its rows. Sequences for which there is no row or no memory are
            left alone, and so are those that are beyond it: longer than it can take, or with a token that it does not
            know.
        channel: to the target.
        session: the engine's number on the wire.
        policy: makes the fan-out policy, which learns from all sequences together.
        width: tokens of branches in one forward, all sequences together. Each of many sequences gets :data:`WIDTH`.
        lookahead: tokens in one speculation at most.
        branching: False drafts the one chain of plain speculative decoding.
        proposing: how tokens are drawn in rejection mode; None is coupled mode.
        prefill_chunk: tokens of prompts that are prefilled between two steps.
        prefix_cache: keep the KV of what has ended for prompts that begin alike.
        budget, strict, text_lookup: see :class:`~ssd_ray.speculation.draft.DraftSession`.
        clock: seconds; another one lets time be simulated.
        trace: notes what is done; None: nobody does.
    """

    def __init__(
        self,
        runner: ModelRunner,
        channel: Channel,
        session: int,
        policy: Callable[[], FanOutPolicy],
        *,
        width: int = 16,
        lookahead: int = MAX_LOOKAHEAD,
        branching: bool = True,
        proposing: Proposing | None = None,
        budget: int = 16,
        strict: bool = False,
        text_lookup: bool = True,
        prefill_chunk: int = 256,
        prefix_cache: bool = True,
        clock: Callable[[], float] = perf_counter,
        trace: Recorder | None = None,
    ) -> None:
        self._clock = clock
        self._trace = trace
        self._budget, self._strict, self._text_lookup = budget, strict, text_lookup
        self._proposing = proposing
        self._runner = runner
        self._channel = traced(channel, trace)
        self._session = session
        self._policy = policy()
        self._width = width if branching else 1
        self._lookahead = lookahead
        self._branching = branching
        self._prefill_chunk, self._prefix_cache = prefill_chunk, prefix_cache
        self.pool = KVMemory(runner, runner.rows, max(prefill_chunk, CATCH_UP) + SCRATCH)
        self._seats: dict[int, Seat] = {}
        self._isolation = Isolation(self._give_up)
        self._handover = Handover()
        self._aside = Aside()
        self._asked: dict[int, float] = {}  # the round in which a sequence was last asked for; inf: never again
        self._hello_due = 0.0
        self._outcomes = 0  # that have come, of all sequences
        self._last = Step()
        self.costs = Costs(runner.measured)
        self._last_rate = 0.0  # value that the last step added, by the millisecond
        self._time_is_worth = 0.0  # the same of the last step of a round: what another millisecond would have brought
        self._dropped = 0

    @property
    def name(self) -> str:
        """The draft's name on the channel."""
        return self._channel.name

    @property
    def sequences(self) -> dict[int, DraftSession]:
        """The open sequences by number."""
        return {number: seat.session for number, seat in self._seats.items()}

    @property
    def dropped(self) -> int:
        """Frames, and messages in them, that were dropped: malformed, not for this draft, or said before."""
        return self._dropped + self._channel.refused

    def turn(self, idle_seconds: float = HELLO_SECONDS) -> bool:
        """Take what has arrived and run one step; without work wait for a message. Returns whether a step ran."""
        self._say_hello()
        self._open_whole()  # prompts may have come
        self._receive(0.0)
        if self._work():
            return True
        self._receive(min(idle_seconds, max(0.0, self._hello_due - self._clock())))
        return False

    def give(self, sequence: int, prompt: Sequence[int]) -> None:
        """Have the prompt of a sequence that is opened without it, sooner or later. From any thread."""
        self._handover.give(sequence, prompt)
        self._channel.wake()

    def follow(self, channel: Channel, session: int) -> None:
        """Work for another target from now on, which is reached by this channel; the one before has gone.

        Its sequences go with it. Their KV is kept for prompts that begin alike: they are most likely to come again.
        """
        for seat in self._seats.values():
            seat.lease.release(seat.past.known if self._prefix_cache else ())
        self._seats.clear()
        self._asked.clear()
        self._handover.forget()
        self._aside = Aside()
        self._channel.close()
        self._channel, self._session = traced(channel, self._trace), session
        self._hello_due = 0.0

    def leave(self) -> None:
        """Tell the target that this draft goes."""
        self._send(Goodbye(self._channel.name))

    def wake(self) -> None:
        """End the wait of :meth:`turn`, or of the next one; from any thread."""
        self._channel.wake()

    def close(self) -> None:
        """Give the channel back."""
        self._channel.close()

    # Messages

    def _say_hello(self) -> None:
        # Again and again: the target may not be there yet, or may have given this draft up while it was stopped.
        now = self._clock()
        if now >= self._hello_due:
            sent = self._send(Hello(self._channel.name, self._runner.reads > 0, self.dropped))
            self._hello_due = now + (HELLO_SECONDS if sent else KNOCK_SECONDS)

    def _send(self, *messages: Message) -> bool:
        """Send messages in one frame, or, where that is too long (laws over a whole vocabulary are), one by one."""
        frame = encode(self._session, *messages)
        if len(frame) <= MAX_FRAME_BYTES or len(messages) == 1:
            return self._channel.send(HUB, frame)
        sent = [self._send(message) for message in messages]
        return all(sent)

    def _receive(self, timeout: float) -> None:
        received = self._channel.receive(timeout)
        while received is not None:
            try:
                messages = [each for each in decode(self._session, received[1]) if isinstance(each, ToDraft)]
                self._dropped += not messages
                self._isolation.each(messages, self._handle)
            except ProtocolError as error:
                self._dropped += 1
                logger.debug("dropped a frame: %s", error)
            received = self._channel.receive(0.0)

    def _handle(self, message: ToDraft) -> None:
        match message:
            case Open():
                self._handover.put(message)
                self._open_whole()
            case Outcome():
                self._advance(message)
            case Begin() if message.sequence in self._seats:
                self._seats[message.sequence].session.begin(message)
            case States() if self._runner.reads:
                self._aside.put(message)
                self._read(message.sequence)
                self._ask_for_states(message.sequence)
            case Close():
                self._close(message.sequence)
            case _:
                pass

    def _give_up(self, failed: Seat | ToDraft, error: Exception) -> None:
        """Leave a sequence alone because of an error of its own: it goes on without this draft."""
        seat = self._seats.pop(failed.sequence, None)
        if seat is not None:
            seat.lease.release()  # what it wrote may not be as it should be
        self._decline(failed.sequence)

    def _open_whole(self) -> None:
        self._isolation.each(self._handover.take(), self._open)

    def _open(self, message: Open) -> None:
        self._asked.pop(message.sequence, None)
        if not message.tokens:
            return
        if self._is_beyond(len(message.tokens), message.tokens):
            self._decline(message.sequence)
            return
        seat = self._seats.get(message.sequence)
        if seat is not None and self._agrees(seat, message):
            seat.session.reopen(message)
            seat.penalties = self._penalties(message)
            self._make_room(message.sequence, seat)
            self._read(message.sequence)
            return
        self._close(message.sequence)
        self._take_seat(message)

    def _is_beyond(self, length: int, added: Sequence[int]) -> bool:
        """Whether a sequence is too long for the model, or got a token that it does not know."""
        return length > self._runner.max_length or max(added) >= self._runner.vocab_size

    def _decline(self, sequence: int) -> None:
        self._close(sequence)
        self._remember(sequence, inf)
        self._send(Declined(sequence))

    def _agrees(self, seat: Seat, message: Open) -> bool:
        """Whether what others may read of a sequence's KV is as the message has it, and all is there that tokens see
        where it goes on."""
        common = seat.past.common(message.tokens)
        return common >= seat.lease.published * self.pool.slots and seat.lease.reaches(common)

    def _take_seat(self, message: Open) -> None:
        free = set(range(self._runner.rows)) - {seat.row for seat in self._seats.values()}
        if not free:
            self._doubt()
            return
        noise, penalties, row = self._noise(message.params), self._penalties(message), min(free)
        asked = message.params.max_tokens
        longest = self._runner.max_length if asked is None else message.prompt_tokens + asked + SCRATCH
        lease = self.pool.lease(row, message.tokens[:-1] if self._prefix_cache else (), longest)
        try:
            session = self._new_session(message, lease)
            seat = Seat(session, noise, penalties, row, lease, self._outcomes)
        except Exception:
            lease.release()
            raise
        self._seats[message.sequence] = seat
        self._make_room(message.sequence, seat)
        self._read(message.sequence)

    def _read(self, sequence: int) -> None:
        """Read the target's hidden states of a sequence as far as they are there and its tokens are known."""
        seat = self._seats.get(sequence)
        if seat is None:
            return
        past = seat.past
        for message in self._aside.take(sequence, lambda: past.read_tokens, past.position):
            try:
                states = from_message(message, self._runner.reads)
            except ProtocolError as error:
                self._dropped += 1
                logger.debug("dropped states: %s", error)
                continue
            known = past.read(message.start, message.count)
            self._runner.read(seat.row, message.start + known, states[known:])

    def _ask_for_states(self, sequence: int) -> None:
        seat = self._seats.get(sequence)
        if seat is not None and self._aside.overdue(sequence):
            self._send(Lost(sequence, seat.past.read_tokens))

    def _new_session(self, message: Open, lease: RowLease) -> DraftSession:
        return DraftSession(
            message,
            self._policy,
            filled=lease.shared * self.pool.slots,
            lookahead=self._lookahead,
            branching=self._branching,
            budget=self._budget,
            strict=self._strict,
            text_lookup=self._text_lookup,
            reads=self._runner.reads > 0,
        )

    def _noise(self, params: SamplingParams) -> NoiseRows:
        if self._proposing is None:
            return NoiseRows(params.noise_seed, self._runner.vocab_size, device=self._runner.device)
        return NoiseRows(stream_seed(params.noise_seed, "draft"), self._runner.vocab_size)

    def _doubt(self) -> None:
        """Ask for the sequence of which nothing has come for longest, if all others have been heard of since: it may
        have ended, and the word of it been lost. The target says so then."""
        number, seat = min(self._seats.items(), key=lambda item: item[1].heard)
        if self._outcomes - seat.heard > SILENT_ROUNDS * len(self._seats):
            self._send(Lost(number, seat.past.read_tokens))

    def _penalties(self, message: Open) -> Penalties | None:
        return penalties(message.params, message.prompt_tokens, self._runner.vocab_size)

    def _make_room(self, number: int, seat: Seat) -> bool:
        """See that a sequence has pages for its window, and none that it does not see any more; without them it is left
        alone."""
        past = seat.past
        if seat.lease.cover(past.filled, seat.session.slots, lambda: past.known if self._prefix_cache else ()):
            return True
        self._close(number)
        return False

    def _advance(self, message: Outcome) -> None:
        self._outcomes += 1
        seat = self._seats.get(message.sequence)
        if seat is not None:
            seat.heard = self._outcomes
        if seat is not None and message.round < seat.session.round:
            self._dropped += 1  # said before
            return
        if seat is None or not seat.session.expects(message):
            self._ask(message)
            return
        self._time_is_worth += 0.1 * (self._last_rate - self._time_is_worth)
        moves = seat.session.advance(message)
        self._runner.move(seat.row, moves.source, moves.destination)
        if self._is_beyond(len(seat.past.tokens), seat.past.tokens[-message.accepted - 1 :]):
            self._decline(message.sequence)
            return
        self._make_room(message.sequence, seat)
        self._read(message.sequence)

    def _ask(self, message: Outcome) -> None:
        if message.round >= self._asked.get(message.sequence, -LOST_ROUNDS) + LOST_ROUNDS:
            self._remember(message.sequence, message.round)
            seat = self._seats.get(message.sequence)
            self._send(Lost(message.sequence, seat.past.read_tokens if seat else 0))

    def _remember(self, sequence: int, asked: float) -> None:
        """Note the round in which a sequence was asked for; the oldest note goes if there are too many."""
        self._asked[sequence] = asked
        if len(self._asked) > MOST_ASKED:
            self._asked.pop(next(iter(self._asked)))

    def _close(self, sequence: int) -> None:
        self._handover.drop(sequence)
        self._aside.drop(sequence)
        self._asked.pop(sequence, None)
        seat = self._seats.pop(sequence, None)
        if seat is not None:
            seat.lease.release(seat.past.known if self._prefix_cache else ())

    # Work

    def _work(self) -> bool:
        """Prefill a chunk of a sequence that lacks its past, and run a step of the others."""
        prefilled = self._prefill()
        return self._step() or prefilled

    def _prefill(self) -> bool:
        for seat in list(self._seats.values()):
            if any(wrote for _, wrote in self._isolation.each([seat], self._prefill_chunk_of)):
                return True
        return False

    def _prefill_chunk_of(self, seat: Seat) -> bool:
        """Write the KV of a sequence's next tokens, if many lack it."""
        if not seat.past.complete and not self._make_room(seat.sequence, seat):
            return False
        prefill = seat.past.prefill(self._prefill_chunk)
        if prefill is None:
            return False
        start = self._clock()
        self._runner.prefill(seat.row, prefill.tokens, prefill.start)
        if self._trace is not None:
            self._trace.span("prefill", start, self._clock(), seat.sequence, len(prefill.tokens))
        if self._prefix_cache:
            seat.lease.publish(seat.past.known)
        self._make_room(seat.sequence, seat)
        return True

    def _step(self) -> bool:
        """Run one step: of the sequences that the target waits for, if there are any, else of all."""
        start = self._clock()
        seats = [seat for seat in self._seats.values() if seat.past.complete]
        seats = [seat for seat in seats if seat.session.urgent] or seats
        width = max(1, (max(self._width, WIDTH * len(seats)) if self._branching else 1) // max(1, len(seats)))
        costs = self._step_ms(len(seats)), self._time_is_worth / max(1, len(seats))
        planned = self._isolation.each(seats, lambda seat: seat.session.next_step(width, *costs))
        work = {seat: items for seat, items in planned if items}
        if not work:
            self._last_rate = 0.0
            return False
        rankings = self._isolation.together(
            list(work), lambda seats: self._rankings([(seat, work[seat]) for seat in seats])
        )
        self._push(work, dict(rankings))
        self._last = Step(1e3 * (self._clock() - start), len(work), sum(map(len, work.values())))
        if self._trace is not None:
            end = start + 1e-3 * self._last.step_ms
            self._trace.span("step", start, end, self._last.step_tokens, self._last.sequences)
        self.costs.saw(self._last.step_tokens, Load(len(work)), self._last.step_ms, beside=0.0)
        self._last_rate = sum(seat.session.worth for seat in work) / max(self._last.step_ms, 1e-9)
        return True

    def _step_ms(self, sequences: int) -> Callable[[int], float]:
        """Milliseconds of a step by the tokens of each of some sequences."""
        load = Load(sequences)
        return cache(lambda tokens: self.costs.alone_ms(tokens * sequences, load))

    def _push(self, work: Mapping[Seat, Sequence[Item]], rankings: Mapping[Seat, list[Ranking]]) -> None:
        """Grow the trees by what the model has said, and send what is new."""
        last = self._last._asdict()

        def complete(seat: Seat) -> Nodes | None:
            return seat.session.complete(work[seat], rankings[seat], **last)

        if nodes := [made for _, made in self._isolation.each(rankings, complete) if made is not None]:
            self._send(*nodes)

    @torch.inference_mode()
    def _rankings(self, work: Work) -> list[list[Ranking]]:
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


Work = Sequence[tuple[Seat, Sequence[Item]]]
"""Sequences, and what to run of each."""


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
