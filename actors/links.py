"""What a target says to its drafts and to the driver, and what it hears from them.

Nothing in it asks anybody anything: drafts push, and what they have pushed is looked up in the target's own memory.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Literal

from torch import Tensor

from ssd_ray.actors.batch import Batch, Row
from ssd_ray.actors.isolation import Isolation
from ssd_ray.actors.states import to_messages
from ssd_ray.errors import FrameFault, ProtocolError
from ssd_ray.saguaro.backup import NARROW, Pace
from ssd_ray.saguaro.planner import Planner
from ssd_ray.transport.channel import MAX_FRAME_BYTES, Channel, Frame
from ssd_ray.wire import (
    MAX_SHARES,
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
    Output,
    States,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

MOST_OUTPUTS = 64
"""Messages of tokens in one frame."""

DropCause = FrameFault | Literal["unexpected", "stale"]
"""Why a frame does nothing; see :class:`~ssd_ray.stats.EngineStats`."""

DROP_CAUSES: tuple[DropCause, ...] = ("malformed", "version", "session", "unexpected", "stale")

DRIVER = "driver"
"""The driver's name on the channel."""


class Links:
    """The connections of one target.

    Args:
        channel: the hub of the drafts and the driver.
        session: the engine's number on the wire.
        batch: the rows that messages are about.
        pace: learns how fast drafts are.
        isolation: takes out rows that cannot take what drafts say.
        show: the hidden states of tokens of a KV row, from one position to another, for drafts that read them; None:
            nobody does.

    Attributes:
        drafts: names of the drafts that are connected.
        drafted_ms: milliseconds of steps that drafts have told of; whoever asks sets it back.
    """

    def __init__(
        self,
        channel: Channel,
        session: int,
        batch: Batch,
        pace: Pace,
        isolation: Isolation,
        show: Callable[[int, int, int], Tensor] | None = None,
    ) -> None:
        self.channel = channel
        self.drafts: list[str] = []
        self._dropped: dict[str, int] = dict.fromkeys(DROP_CAUSES, 0)
        self._dropped_by: dict[str, int] = {}  # drafts, by their own word
        self.drafted_ms = 0.0
        self._session = session
        self._batch = batch
        self._pace = pace
        self._isolation = isolation
        self._show = show
        self._readers: set[str] = set()
        self._outbox: deque[Output] = deque()

    # From drafts

    def receive(self, timeout: float) -> bool:
        """Take what has arrived, waiting for the first frame; returns whether anything came."""
        received = self.channel.receive(timeout)
        came = received is not None
        while received is not None:
            if (cause := self._read(*received)) is not None:
                self._dropped[cause] += 1
            received = self.channel.receive(0.0)
        return came

    @property
    def dropped(self) -> dict[str, int]:
        """Frames that were dropped, by cause; :class:`~ssd_ray.stats.EngineStats` explains each. From any thread."""
        counts = dict(self._dropped)
        counts["malformed"] += self.channel.refused
        return counts | {"by_drafts": sum(tuple(self._dropped_by.values()))}

    def _read(self, peer: str, frame: Frame) -> DropCause | None:
        """Take what a frame says; why not, if nothing of it is of use."""
        try:
            messages = decode(self._session, frame)
        except ProtocolError as error:
            logger.debug("dropped a frame of %s: %s", peer, error)
            return error.fault
        causes = [self._handle(peer, message) for message in messages]
        return None if None in causes else next(iter(causes), "unexpected")

    def _handle(self, peer: str, message: Message) -> DropCause | None:
        """Take a message; why not, if it is not taken."""
        match message:
            case Hello() if message.name == peer:
                return self._greet(peer, message)
            case Nodes() if peer in self.drafts:
                return self._take(peer, message)
            case Lost() if peer in self.drafts:
                self._open_again(peer, message.sequence, message.known)
            case Declined() if peer in self.drafts:
                self._leave_alone(peer, message.sequence)
            case Goodbye() if peer in self.drafts:
                self.remove(peer)
            case _:
                return "unexpected"
        return None

    def _greet(self, peer: str, hello: Hello) -> DropCause | None:
        if peer not in self.drafts:
            if len(self.drafts) == MAX_SHARES:
                return "unexpected"
            self.drafts.append(peer)
            if hello.reads:
                self._readers.add(peer)
            for row in self._batch.rows:
                row.unaware.append(peer)
        self._dropped_by[peer] = hello.dropped
        return None

    def _leave_alone(self, draft: str, sequence: int) -> None:
        row = self._batch.running(sequence)
        if row is not None:
            row.declined.add(draft)
            row.session.cache.forget(draft)

    def _open_again(self, draft: str, sequence: int, known: int) -> None:
        row = self._batch.running(sequence)
        if row is None:
            self._send(draft, Close(sequence))
        elif draft not in row.unaware:
            row.unaware.append(draft)
            row.shown[draft] = known

    def _take(self, draft: str, nodes: Nodes) -> DropCause | None:
        self.drafted_ms += nodes.step_ms / nodes.sequences
        self._pace.saw_step(nodes.step_ms, narrow=nodes.step_tokens <= NARROW * nodes.sequences)
        row = self._batch.running(nodes.sequence)
        if row is None:  # it may have missed the end, and would keep a row and memory for ever
            self._send(draft, Close(nodes.sequence))
            return "stale"
        taken = self._isolation.each([row], lambda row: row.session.add(draft, nodes))
        return None if any(new for _, new in taken) else "stale"

    def remove(self, draft: str) -> None:
        """Forget a draft. The guesses are dealt anew with the next outcome."""
        if draft in self.drafts:
            self.drafts.remove(draft)
            self._dropped_by.pop(draft, None)
            self._readers.discard(draft)
            for row in self._batch.rows:
                row.shown.pop(draft, None)
                row.session.cache.forget(draft)
                row.unaware = [name for name in row.unaware if name != draft]
                row.declined.discard(draft)

    def drafters(self, row: Row) -> list[str]:
        """The drafts that take part in a row."""
        return [draft for draft in self.drafts if draft not in row.declined]

    # To drafts

    def introduce(self, row: Row, c: float) -> None:
        """Open a sequence, as it stands, to the drafts that do not know of it."""
        for draft in row.unaware:
            self._send(draft, self._opening(draft, row, c))
            self._send(draft, *self._states(draft, row))
        row.unaware.clear()

    def show(self, row: Row) -> None:
        """Send the hidden states of a row's tokens, as far as they are there, to the drafts that read them."""
        for draft in self._readers.intersection(self.drafters(row)).difference(row.unaware):
            self._send(draft, *self._states(draft, row))

    def _states(self, draft: str, row: Row) -> list[States]:
        """What a draft has not been sent yet of a row's hidden states."""
        start, end = min(row.shown.get(draft, 0), row.filled), row.filled
        if self._show is None or draft not in self._readers or start == end:
            return []
        row.shown[draft] = end
        return list(to_messages(row.session.sequence, start, self._show(row.number, start, end)))

    def _opening(self, draft: str, row: Row, c: float) -> Open:
        session = row.session
        omitted = session.prompt_tokens if draft in row.holders else 0
        row.holders.discard(draft)  # should it not have the prompt after all, it asks, and is sent everything
        return Open(
            session.sequence,
            session.round,
            session.tokens[omitted:],
            session.cache.speculation,
            session.params,
            c,
            self.drafts.index(draft),
            len(self.drafts),
            session.prompt_tokens,
            omitted,
        )

    def begin(self, changed: Sequence[Row]) -> None:
        """Tell the drafts what is verified where that is not what they were told."""
        for share, draft in enumerate(self.drafts):
            self._send(draft, *(self._begun(row, share) for row in changed))

    def _begun(self, row: Row, share: int) -> Begin:
        session = row.session
        return Begin(session.sequence, session.round, session.cache.speculation, share, len(self.drafts))

    def announce(self, rows: Sequence[Row], planner: Planner) -> None:
        """Tell the drafts outcomes, what is verified next and what further drafting is worth."""
        price = planner.price / max(1, len(rows))  # a step serves all rows
        for share, draft in enumerate(self.drafts):
            known = [row for row in rows if draft not in row.unaware and draft not in row.declined]
            outcomes = [self._outcome(row, share, planner, price) for row in known]
            self._send(draft, *outcomes, *chain.from_iterable(self._states(draft, row) for row in known))

    def _outcome(self, row: Row, share: int, planner: Planner, price: float) -> Outcome:
        session = row.session
        return Outcome(
            session.sequence,
            session.round - 1,
            session.position,
            row.accepted,
            session.tokens[-1],
            row.announced,
            session.hit,
            row.wanted,
            planner.c or 0.0,
            share,
            len(self.drafts),
            price,
            planner.floor,
        )

    def tell(self, message: Message) -> None:
        """Say something to all drafts."""
        for draft in self.drafts:
            self._send(draft, message)

    def _send(self, draft: str, *messages: Message) -> None:
        frame = encode(self._session, *messages) if messages else b""
        if len(frame) > MAX_FRAME_BYTES and len(messages) > 1:
            for message in messages:
                self._send(draft, message)
        elif messages:
            self.channel.send(draft, frame)

    # To the driver

    def put(self, output: Output) -> None:
        """Queue something for the driver."""
        self._outbox.append(output)

    def flush(self) -> None:
        """Tokens must not get lost: what the channel does not take now is sent later, in order."""
        while outputs := list(islice(self._outbox, MOST_OUTPUTS)):
            if not self.channel.send(DRIVER, encode(self._session, *outputs)):
                return
            for _ in outputs:
                self._outbox.popleft()
