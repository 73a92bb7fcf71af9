"""The contract of a channel: frames between named peers, without blocking and without trust.

A channel is one endpoint. One *hub* (the target) talks to any number of *spokes* (drafts, the driver). A frame is a
``bytes`` object that :mod:`ssd_ray.wire` made. What every implementation promises, and its conformance suite checks:

- ``send`` never blocks. It returns False when the frame was dropped: peer unknown or gone, its queue full, the frame
  longer than the limit, the channel closed. A dropped frame is not an error: the protocol above lives with losses.
  True is no promise: a frame may still be lost on its way, or in the queue of a peer that dies;
- frames of one peer arrive at most once, whole, and in the order in which they were sent (some may be missing); what
  arrives and is no frame, or one above the limit, is dropped and counted in ``refused``;
- spokes reach the hub alone; a name belongs to one live spoke at a time, and a restarted one takes it over;
- a spoke needs no hub to start: frames that it sends before the hub is there may be dropped;
- ``receive`` returns at once with what is there, or waits up to ``timeout`` seconds for the first frame. ``wake`` ends
  such a wait, or the next one if nobody waits;
- a peer that dies without a word changes nothing for the others;
- ``close`` is idempotent, drops what is unsent within 100 ms, wakes nobody else, and leaves no file, socket or thread.

One thread uses a channel at a time; ``wake`` alone may be called from any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

HUB = "target"
"""The peer name under which a spoke addresses its hub."""

MAX_FRAME_BYTES = 1 << 24

Frame = bytes | memoryview
"""A frame as it is received: one that came through shared memory is a read-only view of it."""


class Channel(ABC):
    """One endpoint; see the module's docstring for the contract."""

    name: str
    """This endpoint's own name, unique among the peers of one hub."""

    dropped: int = 0
    """Frames that ``send`` dropped."""

    @property
    def refused(self) -> int:
        """How much has arrived that is no frame, or one above the limit, and was dropped."""
        return 0

    @abstractmethod
    def send(self, peer: str, frame: bytes) -> bool:
        """Hand a frame over for ``peer``; False if it was dropped."""

    @abstractmethod
    def receive(self, timeout: float = 0.0) -> tuple[str, Frame] | None:
        """Return the next (peer, frame), waiting up to ``timeout`` seconds for it; None if there is none."""

    @abstractmethod
    def wake(self) -> None:
        """Let the ``receive`` that waits, or the next one, return None; from any thread, even once closed."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
