"""Two channels as one: small frames take the fast one, large frames the roomy one."""

from __future__ import annotations

from ssd_ray.transport.channel import Channel, Frame
from ssd_ray.transport.inbox import InboxChannel


class HybridChannel(Channel):
    """An endpoint of both channels, whose two halves have the same name. A peer may be on the small one alone.

    Order holds among a peer's small frames and among its large ones, not between the two.
    """

    def __init__(self, small: Channel, large: InboxChannel, inline_max_bytes: int) -> None:
        """Take over two open channels; frames above ``inline_max_bytes`` go through ``large``."""
        self.name = small.name
        self._small = small
        self._large = large
        self._inline_max_bytes = inline_max_bytes
        large.inbox.on_put = small.wake

    def send(self, peer: str, frame: bytes) -> bool:
        if len(frame) > self._inline_max_bytes and self._large.send(peer, frame):
            return True
        if self._small.send(peer, frame):  # also what the large one does not take: it may not know the peer
            return True
        self.dropped += 1
        return False

    def receive(self, timeout: float = 0.0) -> tuple[str, Frame] | None:
        # A frame that comes through the large one wakes the small one.
        return self._small.receive() or self._large.receive() or self._small.receive(timeout) or self._large.receive()

    @property
    def refused(self) -> int:
        return self._small.refused + self._large.refused

    def wake(self) -> None:
        self._small.wake()

    def close(self) -> None:
        self._small.close()
        self._large.close()
