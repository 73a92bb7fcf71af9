"""A channel that notes what passes through it, and how long was waited for it."""

from __future__ import annotations

from zlib import crc32

from ssd_ray.tracing import Recorder
from ssd_ray.transport.channel import Channel, Frame
from ssd_ray.wire import kinds

DIGESTED = 4096
"""Bytes of a frame that tell it from others: its messages begin with numbers of sequences and rounds."""


def traced(channel: Channel, trace: Recorder | None) -> Channel:
    """The channel as it is, or, with a recorder, one that notes what passes."""
    return channel if trace is None else TracedChannel(channel, trace)


class TracedChannel(Channel):
    """An endpoint that hands everything on to another one, which it takes over."""

    def __init__(self, channel: Channel, trace: Recorder) -> None:
        self.name = channel.name
        self._channel = channel
        self._trace = trace

    def send(self, peer: str, frame: bytes) -> bool:
        start = self._trace.clock()
        if not self._channel.send(peer, frame):
            self.dropped += 1
            return False
        self._note("send", start, peer, frame)
        return True

    def receive(self, timeout: float = 0.0) -> tuple[str, Frame] | None:
        start = self._trace.clock()
        received = self._channel.receive(timeout)
        if timeout > 0.0:
            self._trace.span("idle", start, self._trace.clock())
        if received is not None:
            self._note("receive", self._trace.clock(), *received)
        return received

    @property
    def refused(self) -> int:
        return self._channel.refused

    def wake(self) -> None:
        self._channel.wake()

    def close(self) -> None:
        self._channel.close()

    def _note(self, kind: str, start: float, peer: str, frame: Frame) -> None:
        named = kinds(frame)
        figures = ", ".join(dict.fromkeys(named)), len(named), len(frame), crc32(frame[:DIGESTED])
        self._trace.span(kind, start, self._trace.clock(), peer, *figures)
