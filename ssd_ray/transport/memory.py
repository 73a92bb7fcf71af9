"""Channels inside one process: each endpoint may live in a thread of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from ssd_ray.transport.channel import HUB, MAX_FRAME_BYTES
from ssd_ray.transport.inbox import Inbox, InboxChannel


@dataclass(frozen=True, slots=True)
class MemoryAddress:
    """Where a hub and its spokes find one another: the inboxes of those that are open, by name."""

    inboxes: dict[str, Inbox] = field(default_factory=dict, repr=False)


class _MemoryChannel(InboxChannel):
    def __init__(self, address: MemoryAddress, name: str) -> None:
        super().__init__(name, Inbox())
        self.address = address
        address.inboxes[name] = self.inbox

    def send(self, peer: str, frame: bytes) -> bool:
        inbox = self._connected(peer)
        if inbox is None or len(frame) > MAX_FRAME_BYTES or not inbox.put(self.name, frame):
            self.dropped += 1
            return False
        return True

    def close(self) -> None:
        if self.address.inboxes.get(self.name) is self.inbox:
            del self.address.inboxes[self.name]
        self.inbox.close()

    def _connected(self, peer: str) -> Inbox | None:
        inboxes = self.address.inboxes
        if (self.name == HUB) == (peer == HUB):
            return None  # spokes talk to the hub alone
        if inboxes.get(self.name) is not self.inbox:
            return None  # closed, or a newer endpoint has taken the name over
        return inboxes.get(peer)


class MemoryHub(_MemoryChannel):
    """The hub; its ``address`` is what its spokes are made with."""

    def __init__(self, address: MemoryAddress | None = None) -> None:
        super().__init__(address or MemoryAddress(), HUB)


class MemorySpoke(_MemoryChannel):
    """A spoke. One made under a name that is in use takes that name over."""

    def __init__(self, address: MemoryAddress, name: str) -> None:
        super().__init__(address, name)
