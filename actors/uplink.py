"""What a draft says to its target, and what it hears from it: frames out of messages, and messages out of frames."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from ssd_ray.errors import ProtocolError
from ssd_ray.tracing import Recorder
from ssd_ray.transport.channel import HUB, MAX_FRAME_BYTES, Channel, Frame
from ssd_ray.transport.traced import traced
from ssd_ray.wire import Begin, Close, Goodbye, Hello, Message, Open, Outcome, States, decode, encode

logger = logging.getLogger(__name__)

ToDraft = Open | Outcome | Begin | States | Close
"""What a target tells a draft, of one sequence each."""

HELLO_SECONDS = 1.0
KNOCK_SECONDS = 0.02
"""How soon a greeting is said again: one that was sent, and one for which no connection was there yet."""


class Uplink:
    """The connection of one draft to the target that it works for.

    Args:
        channel: to the target.
        session: the engine's number on the wire.
        reads: whether the draft reads the target's hidden states.
        clock: seconds.
        trace: notes what is said and heard; None: nobody does.
    """

    def __init__(
        self, channel: Channel, session: int, *, reads: bool, clock: Callable[[], float], trace: Recorder | None
    ) -> None:
        self.channel = traced(channel, trace)
        self._session = session
        self._reads = reads
        self._clock = clock
        self._trace = trace
        self._hello_due = 0.0
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Frames, and messages in them, that were dropped; see :attr:`~ssd_ray.actors.drafting.Draft.dropped`."""
        return self._dropped + self.channel.refused

    def follow(self, channel: Channel, session: int) -> None:
        """Lead to another target from now on; the one before has gone."""
        self.channel.close()
        self.channel, self._session = traced(channel, self._trace), session
        self._hello_due = 0.0

    # To the target

    def greet(self) -> None:
        """Say hello, if it is time to."""
        # Again and again: the target may not be there yet, or may have given this draft up while it was stopped.
        now = self._clock()
        if now >= self._hello_due:
            sent = self.send(Hello(self.channel.name, self._reads, self.dropped))
            self._hello_due = now + (HELLO_SECONDS if sent else KNOCK_SECONDS)

    @property
    def quiet_seconds(self) -> float:
        """How long it is until the next greeting."""
        return max(0.0, self._hello_due - self._clock())

    def leave(self) -> None:
        """Say that the draft goes."""
        self.send(Goodbye(self.channel.name))

    def send(self, *messages: Message) -> bool:
        """Send messages in one frame, or, where that is too long (laws over a whole vocabulary are), one by one."""
        frame = encode(self._session, *messages)
        if len(frame) <= MAX_FRAME_BYTES or len(messages) == 1:
            return self.channel.send(HUB, frame)
        sent = [self.send(message) for message in messages]
        return all(sent)

    # From the target

    def receive(self, timeout: float) -> Iterator[list[ToDraft]]:
        """The messages of each frame that has arrived, waiting for the first one."""
        received = self.channel.receive(timeout)
        while received is not None:
            if messages := self._read(received[1]):
                yield messages
            else:
                self.drop()
            received = self.channel.receive(0.0)

    def _read(self, frame: Frame) -> list[ToDraft]:
        """What a frame tells a draft; nothing if it is none of this protocol."""
        try:
            return [each for each in decode(self._session, frame) if isinstance(each, ToDraft)]
        except ProtocolError as error:
            logger.debug("dropped a frame: %s", error)
            return []

    def drop(self) -> None:
        """Count a message that does nothing."""
        self._dropped += 1
