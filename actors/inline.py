"""The draft inside the target's process, as plain speculative decoding has it: no wire, strictly in turn."""

from __future__ import annotations

from math import inf

from ssd_ray.actors.drafting import Draft
from ssd_ray.transport.channel import Channel, Frame
from ssd_ray.transport.memory import MemoryAddress, MemoryHub

INLINE = "inline"
"""The name of the draft in the target's process."""


class InlineChannel(Channel):
    """A hub of which one spoke is a draft that runs when the hub waits, and whose others are on ``outer``."""

    def __init__(self, outer: Channel) -> None:
        self.name = outer.name
        self.address = MemoryAddress()
        self._hub = MemoryHub(self.address)
        self._outer = outer
        self._draft: Draft | None = None

    def host(self, draft: Draft) -> None:
        """Run this draft, whose channel is a spoke at ``address``, from now on."""
        self._draft = draft
        draft.turn(0.0)

    def send(self, peer: str, frame: bytes) -> bool:
        return self._hub.send(peer, frame) if peer == INLINE else self._outer.send(peer, frame)

    def receive(self, timeout: float = 0.0) -> tuple[str, Frame] | None:
        """A wait without end is one for the draft: it ends when the draft has nothing left to do."""
        received = self._hub.receive() or self._outer.receive()
        while received is None and timeout > 0.0 and self._draft is not None and self._draft.turn(0.0):
            received = self._hub.receive()
        return received or self._outer.receive(0.0 if timeout == inf else timeout)

    @property
    def refused(self) -> int:
        return self._outer.refused

    def wake(self) -> None:
        self._outer.wake()

    def close(self) -> None:
        self._hub.close()
        self._outer.close()
