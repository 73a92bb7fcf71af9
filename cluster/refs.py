"""The object-ref channel: frames travel in Ray actor calls alone, large ones in the object store.

A call costs about a millisecond, so this is the channel for large frames, and for clusters where nothing but Ray may
open connections.

Every actor that takes part derives from :class:`RefEndpoint` where it is launched, whose ``refs`` is its channel::

    class Draft(RefEndpoint):
        def __init__(self, name): super().__init__(name)
        def run(self): ...  # uses self.refs

    ray.remote(num_cpus=1, concurrency_groups=CONCURRENCY_GROUPS)(Draft).remote("draft-0")

Frames then arrive on a thread of their own while ``run()`` holds the actor's main one. Ray keeps the order of calls
from one caller only in a group of one thread: "inbox" must stay at 1. The driver is not an actor and cannot be called:
the hub keeps an outbox for it, which its :class:`DrainChannel` empties with one long call after the other.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping
from time import monotonic, sleep
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayError

from ssd_ray.transport.channel import HUB, MAX_FRAME_BYTES, Channel, Frame
from ssd_ray.transport.inbox import QUEUE_FRAMES, Inbox, InboxChannel

CONCURRENCY_GROUPS = {"inbox": 1, "outbox": 8}
"""Threads for calls that arrive beside ``run()``; "outbox" bounds how many drivers can wait for frames at once."""

INLINE_MAX_BYTES = 1 << 16

_WAKE_SECONDS = 0.1
"""How often a driver that waits for frames looks whether it was woken."""

_DRAIN_SECONDS = 1.0
"""How long one drain waits at the hub. A driver that has died holds a thread of "outbox" for as long."""

Payload = bytes | NDArray[np.uint8]
"""A frame as an argument of a call: a large one is an array, which Ray maps from the object store without a copy."""


class _Calls:
    """Calls of ``deliver`` on one actor, of which a bounded number may be unanswered."""

    def __init__(self, handle: Any, inline_max_bytes: int, limit: int = QUEUE_FRAMES) -> None:
        self._handle = handle
        self._inline_max_bytes = inline_max_bytes
        self._limit = limit
        self._pending: deque[ray.ObjectRef[None]] = deque()
        self._sent = 0
        self._gone = False

    def put(self, sender: str, frame: bytes) -> bool:
        """Call without waiting; False if the actor is dead or too many calls are unanswered."""
        self._sent += 1
        # Looking at the answers costs as much as a call, so it is done for many at a time.
        if len(self._pending) >= self._limit or self._sent % (self._limit // 4) == 0:
            self._reap()
        if self._gone or len(self._pending) >= self._limit:
            return False
        try:
            argument = frame if len(frame) <= self._inline_max_bytes else ray.put(np.frombuffer(frame, np.uint8))
            self._pending.append(self._handle.deliver.remote(sender, argument))
        except RayError:
            return False  # the object store is full, or the actor's death is known here already
        return True

    def _reap(self) -> None:
        refs = list(self._pending)
        if not refs:
            return
        done, waiting = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        self._pending = deque(waiting)
        try:
            ray.get(done)
        except RayActorError:
            self._gone = True
        except RayError:
            pass  # that frame is lost; the next may arrive


class _Outbox(Inbox):
    """Frames for a peer that is no actor and comes to fetch them. ``reader`` tells it from others of its name."""

    def __init__(self, reader: str) -> None:
        super().__init__()
        self.reader = reader


class RefChannel(InboxChannel):
    """An actor's endpoint: sends by calling its peers' ``deliver``, receives from its own inbox.

    A peer's death is noticed from the answers to earlier frames, so the first sends after it still return True.
    """

    def __init__(
        self,
        name: str,
        inbox: Inbox,
        peers: Mapping[str, Any] | None = None,
        inline_max_bytes: int = INLINE_MAX_BYTES,
    ) -> None:
        """Make the endpoint of an actor whose ``deliver`` fills ``inbox``.

        Args:
            name: its own name.
            inbox: where its frames arrive.
            peers: actor handles by peer name.
            inline_max_bytes: frames above it go through the object store.
        """
        super().__init__(name, inbox)
        self._inline_max_bytes = inline_max_bytes
        self._peers: dict[str, _Calls | _Outbox] = {}
        self._closed = False
        self._refused = 0
        for peer, handle in (peers or {}).items():
            self.add_peer(peer, handle)

    def add_peer(self, name: str, handle: Any) -> None:
        """Connect an actor by its handle, from any thread. It replaces whoever had the name."""
        self._peers[name] = _Calls(handle, self._inline_max_bytes)

    def add_reader(self, name: str, reader: str) -> None:
        """Connect a peer that is no actor and drains, from any thread. It replaces whoever had the name."""
        self._peers[name] = _Outbox(reader)

    def remove_peer(self, name: str) -> None:
        """Drop further frames for a peer, from any thread; nothing happens if it is unknown."""
        self._peers.pop(name, None)

    def deliver(self, sender: str, frame: Payload) -> None:
        """Put a frame into the inbox, from one thread at a time; one that is too long is dropped."""
        if len(frame) > MAX_FRAME_BYTES:
            self._refused += 1
            return
        # A view: the object store keeps a large frame until whoever received it lets go of it, and of its parts.
        self.inbox.put(sender, frame if isinstance(frame, bytes) else frame.data)

    @property
    def refused(self) -> int:
        return self._refused

    def drain(self, name: str, reader: str, timeout: float) -> list[Frame]:
        """Take what waits for a peer that is no actor, from any thread; wait up to ``timeout`` seconds for the first.

        Only the latest reader of that name gets anything: the last call of one that is gone takes no frames with it.
        """
        outbox = self._peers.get(name)
        if not isinstance(outbox, _Outbox) or outbox.reader != reader:
            sleep(min(timeout, _WAKE_SECONDS))  # it asks again and again
            return []
        return [frame for _, frame in outbox.get_all(timeout)]

    def send(self, peer: str, frame: bytes) -> bool:
        outlet = None if self._closed or len(frame) > MAX_FRAME_BYTES else self._peers.get(peer)
        if outlet is not None and outlet.put(self.name, frame):
            return True
        self.dropped += 1
        return False

    def close(self) -> None:
        self._closed = True
        self.inbox.close()
        self._peers.clear()


class DrainChannel(Channel):
    """The endpoint of a process that is no actor, such as the driver: a spoke that fetches its frames from the hub."""

    def __init__(self, name: str, hub: Any, inline_max_bytes: int = INLINE_MAX_BYTES) -> None:
        """Connect to the hub actor of this handle."""
        self.name = name
        self._hub = hub
        self._calls = _Calls(hub, inline_max_bytes)
        self._frames: deque[Frame] = deque()
        self._closed = False
        self._woken = False
        self._reader = secrets.token_hex(8)
        # It runs in the hub's "inbox" group before the first frame does, so that the answer finds an outbox.
        hub.add_reader.remote(name, self._reader)
        self._drain: ray.ObjectRef[list[Frame]] = hub.drain.remote(name, self._reader, 0.0)

    def send(self, peer: str, frame: bytes) -> bool:
        accepted = not self._closed and peer == HUB and len(frame) <= MAX_FRAME_BYTES
        if accepted and self._calls.put(self.name, frame):
            return True
        self.dropped += 1
        return False

    def receive(self, timeout: float = 0.0) -> tuple[str, Frame] | None:
        if self._closed:
            return None
        deadline = monotonic() + timeout
        while not self._frames:
            left = max(0.0, deadline - monotonic())
            if not self._fetch(min(left, _WAKE_SECONDS)) and (self._woken or not left):
                self._woken = self._woken and not timeout
                return None
        return HUB, self._frames.popleft()

    def wake(self) -> None:
        self._woken = True

    def close(self) -> None:
        self._closed = True
        self._frames.clear()

    def _fetch(self, timeout: float) -> bool:
        """Wait for the call that is under way and start the next; False if it has not ended in ``timeout`` seconds."""
        if not ray.wait([self._drain], timeout=timeout)[0]:
            return False
        try:
            self._frames.extend(ray.get(self._drain))
        except RayError:
            sleep(timeout)  # the hub is dead: nothing comes any more
            return False
        self._drain = self._hub.drain.remote(self.name, self._reader, _DRAIN_SECONDS)
        return True


class RefEndpoint:
    """Base of an actor's class: the methods that others call for frames to pass, beside whatever ``run()`` does."""

    def __init__(self, name: str, inline_max_bytes: int = INLINE_MAX_BYTES) -> None:
        """Make ``refs``, this actor's channel, without peers."""
        self.refs = RefChannel(name, Inbox(), inline_max_bytes=inline_max_bytes)

    @ray.method(concurrency_group="inbox")
    def deliver(self, sender: str, frame: Payload) -> None:
        """Take a frame from another actor or a driver."""
        self.refs.deliver(sender, frame)

    @ray.method(concurrency_group="inbox")
    def add_peer(self, name: str, handle: Any) -> None:
        """Connect an actor."""
        self.refs.add_peer(name, handle)

    @ray.method(concurrency_group="inbox")
    def add_reader(self, name: str, reader: str) -> None:
        """Connect a peer that is no actor."""
        self.refs.add_reader(name, reader)

    @ray.method(concurrency_group="inbox")
    def remove_peer(self, name: str) -> None:
        """Drop further frames for a peer."""
        self.refs.remove_peer(name)

    @ray.method(concurrency_group="outbox")
    def drain(self, name: str, reader: str, timeout: float) -> list[Frame]:
        """Hand over the frames for a peer that is no actor, waiting up to ``timeout`` seconds for the first."""
        return self.refs.drain(name, reader, timeout)
