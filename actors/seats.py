"""Which sequences a draft works on: who has one of its rows, what it knows of them, and what it asks for.

A sequence that lacks a row, memory, or a place in the model is left alone: it goes on without this draft. What was lost
on the way is asked for, and so is a sequence of which nothing is heard while others need its row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from ssd_ray.actors.handover import Handover
from ssd_ray.actors.states import Aside, from_message
from ssd_ray.actors.uplink import ToDraft, Uplink
from ssd_ray.config import SamplingParams
from ssd_ray.errors import ProtocolError
from ssd_ray.models.contract import ModelRunner
from ssd_ray.models.leases import KVMemory, RowLease
from ssd_ray.sampling.noise import NoiseRows
from ssd_ray.sampling.penalties import Penalties, penalties
from ssd_ray.sampling.rejection import stream_seed
from ssd_ray.speculation.draft import DraftSession
from ssd_ray.speculation.past import Past
from ssd_ray.speculation.window import SCRATCH
from ssd_ray.wire import Begin, Declined, Lost, Open, Outcome, States

logger = logging.getLogger(__name__)

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


class Seats:
    """The sequences of one draft.

    Args:
        runner: the model; each sequence takes one of its rows.
        pool: deals out its pages.
        uplink: to the target.
        handover: prompts and messages that wait for each other; those of sequences that end are forgotten.
        new_session: makes the session of a sequence, given the message that opens it and ``filled``.
        coupled: sequences draw their tokens with the target's noise; else each draft with its own.
        caching: keep the KV of what has ended for what begins alike.
    """

    def __init__(
        self,
        runner: ModelRunner,
        pool: KVMemory,
        uplink: Uplink,
        handover: Handover,
        new_session: Callable[..., DraftSession],
        *,
        coupled: bool,
        caching: bool,
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._uplink = uplink
        self._handover = handover
        self._new_session = new_session
        self._coupled, self._caching = coupled, caching
        self._seats: dict[int, Seat] = {}
        self._aside = Aside()
        self._asked: dict[int, float] = {}  # the round in which a sequence was last asked for; inf: never again
        self._outcomes = 0  # that have come, of all sequences

    @property
    def all(self) -> list[Seat]:
        """All of them, in the order in which they came."""
        return list(self._seats.values())

    @property
    def ready(self) -> list[Seat]:
        """Those that a step can run."""
        return [seat for seat in self._seats.values() if seat.past.complete]

    # Coming

    def open(self, message: Open) -> None:
        """Take a sequence, or take it up again as the target has it; its tokens are whole."""
        self._asked.pop(message.sequence, None)
        if not message.tokens:
            return
        if self._is_beyond(len(message.tokens), message.tokens):
            self._decline(message.sequence)
            return
        seat = self._seats.get(message.sequence)
        if seat is None or not self._agrees(seat, message):
            self.close(message.sequence)
            self._take(message)
            return
        seat.session.reopen(message)
        seat.penalties = self._penalties(message)
        self._settle(seat)

    def _is_beyond(self, length: int, added: Sequence[int]) -> bool:
        """Whether a sequence is too long for the model, or got a token that it does not know."""
        return length > self._runner.max_length or max(added) >= self._runner.vocab_size

    def _agrees(self, seat: Seat, message: Open) -> bool:
        """Whether what others may read of a sequence's KV is as the message has it, and all is there that tokens see
        where it goes on."""
        common = seat.past.common(message.tokens)
        return common >= seat.lease.published * self._pool.slots and seat.lease.reaches(common)

    def _take(self, message: Open) -> None:
        """Give a sequence a row, if one is free."""
        free = set(range(self._runner.rows)) - {seat.row for seat in self._seats.values()}
        if not free:
            self._doubt()
            return
        noise, penalties, row = self._noise(message.params), self._penalties(message), min(free)
        asked = message.params.max_tokens
        longest = self._runner.max_length if asked is None else message.prompt_tokens + asked + SCRATCH
        lease = self._pool.lease(row, message.tokens[:-1] if self._caching else (), longest)
        try:
            session = self._new_session(message, filled=lease.shared * self._pool.slots)
            seat = Seat(session, noise, penalties, row, lease, self._outcomes)
        except Exception:
            lease.release()
            raise
        self._seats[message.sequence] = seat
        self._settle(seat)

    def _noise(self, params: SamplingParams) -> NoiseRows:
        if self._coupled:
            return NoiseRows(params.noise_seed, self._runner.vocab_size, device=self._runner.device)
        return NoiseRows(stream_seed(params.noise_seed, "draft"), self._runner.vocab_size)

    def _penalties(self, message: Open) -> Penalties | None:
        return penalties(message.params, message.prompt_tokens, self._runner.vocab_size)

    # Going on

    def expecting(self, message: Outcome) -> Seat | None:
        """The sequence that goes on with this outcome. One that is unknown, or that missed another, is asked for."""
        self._outcomes += 1
        seat = self._seats.get(message.sequence)
        if seat is not None:
            seat.heard = self._outcomes
        if seat is not None and message.round < seat.session.round:
            self._uplink.drop()  # said before
            return None
        if seat is None or not seat.session.expects(message):
            self._ask(message)
            return None
        return seat

    def advance(self, seat: Seat, message: Outcome) -> None:
        """Let a sequence go on with the outcome that it expects."""
        moves = seat.session.advance(message)
        self._runner.move(seat.row, moves.source, moves.destination)
        if self._is_beyond(len(seat.past.tokens), seat.past.tokens[-message.accepted - 1 :]):
            self._decline(message.sequence)
            return
        self._settle(seat)

    def begin(self, message: Begin) -> None:
        """Take what is verified of a sequence after all."""
        seat = self._seats.get(message.sequence)
        if seat is not None:
            seat.session.begin(message)

    def show(self, message: States) -> None:
        """Take the target's hidden states of some tokens, and ask for those that are missing if they are due."""
        self._aside.put(message)
        seat = self._seats.get(message.sequence)
        if seat is None:
            return
        self._read(seat)
        if self._aside.overdue(message.sequence):
            self._uplink.send(Lost(message.sequence, seat.past.read_tokens))

    def _settle(self, seat: Seat) -> None:
        """See to what a sequence needs now that it has other tokens."""
        if self.make_room(seat):
            self._read(seat)

    def make_room(self, seat: Seat) -> bool:
        """See that a sequence has pages for its window, and none that it does not see any more; without them it is left
        alone."""
        if seat.lease.cover(seat.past.filled, seat.session.slots, lambda: self._known(seat)):
            return True
        self.close(seat.sequence)
        return False

    def publish(self, seat: Seat) -> None:
        """Let others that begin alike have a sequence's KV."""
        if self._caching:
            seat.lease.publish(seat.past.known)

    def _read(self, seat: Seat) -> None:
        """Read the target's hidden states of a sequence as far as they are there and its tokens are known."""
        past = seat.past
        for message in self._aside.take(seat.sequence, lambda: past.read_tokens, past.position):
            try:
                states = from_message(message, self._runner.reads)
            except ProtocolError as error:
                self._uplink.drop()
                logger.debug("dropped states: %s", error)
                continue
            known = past.read(message.start, message.count)
            self._runner.read(seat.row, message.start + known, states[known:])

    # Asking

    def _ask(self, message: Outcome) -> None:
        """Ask for the sequence of an outcome that cannot be taken, now and then."""
        if message.round >= self._asked.get(message.sequence, -LOST_ROUNDS) + LOST_ROUNDS:
            self._remember(message.sequence, message.round)
            seat = self._seats.get(message.sequence)
            self._uplink.send(Lost(message.sequence, seat.past.read_tokens if seat else 0))

    def _doubt(self) -> None:
        """Ask for the sequence of which nothing has come for longest, if all others have been heard of since: it may
        have ended, and the word of it been lost. The target says so then."""
        number, seat = min(self._seats.items(), key=lambda item: item[1].heard)
        if self._outcomes - seat.heard > SILENT_ROUNDS * len(self._seats):
            self._uplink.send(Lost(number, seat.past.read_tokens))

    def _remember(self, sequence: int, asked: float) -> None:
        """Note the round in which a sequence was asked for; the oldest note goes if there are too many."""
        self._asked[sequence] = asked
        if len(self._asked) > MOST_ASKED:
            self._asked.pop(next(iter(self._asked)))

    # Going

    def give_up(self, failed: Seat | ToDraft, error: Exception) -> None:
        """Leave a sequence alone because of an error of its own: it goes on without this draft."""
        seat = self._seats.pop(failed.sequence, None)
        if seat is not None:
            seat.lease.release()  # what it wrote may not be as it should be
        self._decline(failed.sequence)

    def _decline(self, sequence: int) -> None:
        self.close(sequence)
        self._remember(sequence, inf)
        self._uplink.send(Declined(sequence))

    def close(self, sequence: int) -> None:
        """Forget a sequence."""
        self._handover.drop(sequence)
        self._aside.drop(sequence)
        self._asked.pop(sequence, None)
        seat = self._seats.pop(sequence, None)
        if seat is not None:
            seat.lease.release(self._known(seat))

    def clear(self) -> None:
        """Forget all sequences: the target has gone."""
        for seat in self._seats.values():
            seat.lease.release(self._known(seat))
        self._seats.clear()
        self._asked.clear()
        self._handover.forget()
        self._aside = Aside()

    def _known(self, seat: Seat) -> Sequence[int]:
        """The tokens of a sequence whose KV is kept for what begins alike."""
        return seat.past.known if self._caching else ()
