"""A bounded queue of frames between threads of one process, and the channels that receive from one."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from threading import Condition

from ssd_ray.transport.channel import Channel, Frame

QUEUE_FRAMES = 256
"""Frames of one peer that wait for a slow reader at most; further ones are dropped."""


class Inbox:
    """Frames that wait to be received. Any number of threads put, one gets.

    The bound holds for each sender by itself: one that floods loses its own frames, not those of others.
    """

    def __init__(self, limit: int = QUEUE_FRAMES) -> None:
        self.on_put: Callable[[], None] = lambda: None  # told of every frame, in the thread that puts it
        self._limit = limit
        self._frames: deque[tuple[str, Frame]] = deque()
        self._waiting: Counter[str] = Counter()
        self._changed = Condition()
        self._closed = False
        self._woken = False

    def put(self, sender: str, frame: Frame) -> bool:
        """Append a frame; False if it was dropped because the sender has too many here or the inbox is closed."""
        with self._changed:
            if self._closed or self._waiting[sender] >= self._limit:
                return False
            self._waiting[sender] += 1
            self._frames.append((sender, frame))
            self._changed.notify()
        self.on_put()
        return True

    def get(self, timeout: float = 0.0) -> tuple[str, Frame] | None:
        """Take the oldest (sender, frame), waiting up to ``timeout`` seconds for one; None if there is none."""
        with self._changed:
            if not self._frames and timeout > 0:
                self._changed.wait_for(self._has_news, timeout)
                self._woken = False
            if not self._frames:
                return None
            sender, frame = self._frames.popleft()
            self._waiting[sender] -= 1
            if not self._waiting[sender]:
                del self._waiting[sender]
            return sender, frame

    def get_all(self, timeout: float = 0.0) -> list[tuple[str, Frame]]:
        """Take everything that is here, waiting up to ``timeout`` seconds for the first; empty if there is nothing."""
        item, items = self.get(timeout), []
        while item is not None:
            items.append(item)
            item = self.get()
        return items

    def wake(self) -> None:
        """End the wait of a ``get``, or of the next one that would wait."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        """Drop all frames, refuse further ones and wake whoever waits."""
        with self._changed:
            self._closed = True
            self._frames.clear()
            self._waiting.clear()
            self._changed.notify_all()

    def _has_news(self) -> bool:
        return bool(self._frames) or self._closed or self._woken


class InboxChannel(Channel):
    """Base of the channels whose frames arrive in an :class:`Inbox`, ``inbox``."""

    def __init__(self, name: str, inbox: Inbox) -> None:
        self.name = name
        self.inbox = inbox

    def receive(self, timeout: float = 0.0) -> tuple[str, Frame] | None:
        return self.inbox.get(timeout)

    def wake(self) -> None:
        self.inbox.wake()
