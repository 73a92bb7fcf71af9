"""What a loop did lately: one tuple for each event, in the memory of its process, for a timeline of all actors.

Times are a loop's own seconds (``perf_counter``, which only goes forward); a lane says what they are on a common clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, NamedTuple

MOST_EVENTS = 1 << 17
"""Events that are kept of one loop, some 30 MB of memory; the oldest go first."""

ANCHOR_TRIES = 8
"""Looks at both clocks."""

FIGURES: Mapping[str, tuple[str, ...]] = {
    "verify": ("tokens", "rows"),
    "prefill": ("request", "tokens"),
    "wait for drafts": ("rows", "steps"),
    "outcome": ("request", "accepted", "tokens", "next"),
    "step": ("tokens", "sequences"),
    "idle": (),
    "send": ("peer", "kinds", "messages", "bytes", "digest"),
    "receive": ("peer", "kinds", "messages", "bytes", "digest"),
}
"""Kinds of events, and what is said of each:

- verify: one forward of the target over so many tokens of so many requests (rows).
- prefill: so many tokens of a prompt, or of a text that is read again, are written.
- wait for drafts: for so many of their steps at first, before a verification of so many rows.
- outcome: a verification accepted so many speculated tokens of a request, and added so many to its text. Next: "hit" if
  what follows was prepared, or why not (a miss's cause), or why the request has ended.
- step: one forward of a draft over so many tokens of so many sequences.
- idle: nothing to do but to wait for a message.
- send, receive: a frame to or from this peer: kinds and number of its messages, its bytes, and what tells it from
  others.
"""

Event = tuple[Any, ...]
"""Its kind, when it began, when it ended (None: it is a moment), and its figures."""


class Lane(NamedTuple):
    """The events of one loop.

    Attributes:
        name: the loop's name on the channel.
        events: oldest first, by when they were noted, which is when they ended or a little later.
        dropped: older ones that there was no room for.
        anchor: seconds to be added to their times for seconds since 1970.
    """

    name: str
    events: list[Event]
    dropped: int
    anchor: float


class Recorder:
    """Notes what one loop does, from its thread.

    Args:
        name: the loop's name on the channel.
        clock: seconds, the loop's own.
        limit: events that are kept at most.
    """

    def __init__(self, name: str, clock: Callable[[], float] = perf_counter, limit: int = MOST_EVENTS) -> None:
        self.clock = clock
        self._name = name
        self._events: deque[Event] = deque(maxlen=limit)
        self._noted = 0

    def span(self, kind: str, start: float, end: float, *figures: object) -> None:
        """Note something that took from ``start`` to ``end``, with the figures that :data:`FIGURES` names."""
        self._noted += 1
        self._events.append((kind, start, end, *figures))

    def mark(self, kind: str, *figures: object) -> None:
        """Note something that happens now."""
        self._noted += 1
        self._events.append((kind, self.clock(), None, *figures))

    @property
    def lane(self) -> Lane:
        """What is there of it."""
        events = list(self._events)
        return Lane(self._name, events, self._noted - len(events), _anchor(self.clock))


def _anchor(clock: Callable[[], float]) -> float:
    """What makes a clock's seconds seconds since 1970. Of several tries the one in which least came between counts: on
    a busy machine that may be milliseconds."""
    tries = []
    for _ in range(ANCHOR_TRIES):
        before, now, after = clock(), time.time(), clock()
        tries.append((after - before, now - 0.5 * (before + after)))
    return min(tries)[1]
