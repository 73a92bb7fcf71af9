"""Two channels as one: small frames take the fast one, large frames the roomy one."""

from __future__ import annotations

from time import monotonic

from ssd_ray.transport.channel import Channel

_SLICE_SECONDS = 0.002
"""How long one look at the fast channel lasts while waiting. Large frames can be late by as much."""


class HybridChannel(Channel):
    """An endpoint of both channels, whose two halves have the same name.

    Order holds among a peer's small frames and among its large ones, not between the two.
    """

    def __init__(self, small: Channel, large: Channel, inline_max_bytes: int) -> None:
        """Take over two open channels; frames above ``inline_max_bytes`` go through ``large``."""
        self.name = small.name
        self._small = small
        self._large = large
        self._inline_max_bytes = inline_max_bytes

    def send(self, peer: str, frame: bytes) -> bool:
        channel = self._small if len(frame) <= self._inline_max_bytes else self._large
        if channel.send(peer, frame):
            return True
        self.dropped += 1
        return False

    def receive(self, timeout: float = 0.0) -> tuple[str, bytes] | None:
        item = self._small.receive() or self._large.receive()
        if item is not None or timeout <= 0:
            return item
        deadline = monotonic() + timeout
        while item is None and (left := deadline - monotonic()) > 0:
            item = self._small.receive(min(left, _SLICE_SECONDS)) or self._large.receive()
        return item

    def close(self) -> None:
        self._small.close()
        self._large.close()
