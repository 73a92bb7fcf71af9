"""What the actors of an engine did, as one file in Chrome's trace event format, for Perfetto and chrome://tracing.

Each actor is a process there, each of its loops a thread; what lies inside something else took place within it. A frame
is an arrow from its sending to its receipt: both ends know its digest, and of equal frames the first to arrive is the
first that was sent.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from ssd_ray.errors import ConfigError
from ssd_ray.tracing import FIGURES, Event, Lane

logger = logging.getLogger(__name__)

Traces = Sequence[tuple[str, Sequence[Lane] | None]]
"""The names of actors and the lanes of their loops; None of one that did not leave in order: its events are lost."""

Json = dict[str, Any]

NANOSECOND = 1e-9

APART = 1 << 16
"""Between the numbers of an actor's threads, the first of which has its process's, as on Linux: to viewers no two of
all processes are the same, and 0 is the idle one."""


def require_writable(path: str) -> None:
    """Refuse a path at which no file can be written.

    Raises:
        ConfigError: its folder is not there or not to be written to, or something else than a file has its place.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise FileExistsError("it is no regular file")
        part = _part(path)
        part.touch()
        part.unlink()
    except OSError as error:
        raise ConfigError("trace", "a file that can be written", f"{path}: {error}") from None


def write_trace(path: str, traces: Traces) -> None:
    """Write a trace, whole or not at all; what keeps it from being written is logged."""
    part = _part(path)
    try:
        part.write_bytes(msgspec.json.encode(document(traces)))
        part.replace(path)
    except OSError as error:
        logger.warning("trace: not written: %s", error)
        with suppress(OSError):
            part.unlink(missing_ok=True)
    else:
        logger.info("the trace is in %s", path)


def _part(path: str) -> Path:
    """Where a trace is until it is whole."""
    return Path(f"{path}.{os.getpid()}")


def document(traces: Traces) -> Json:
    """The trace as a JSON object. Times are microseconds from the first event on, which ``otherData`` dates; it also
    names the actors whose events are lost, and how many older events of others there was no room for."""
    lanes = [lane for _, each in traces for lane in each or ()]
    origin = min((event[1] + lane.anchor for lane in lanes for event in lane.events), default=0.0)
    arrows = _Arrows()
    events = [event for number, each in enumerate(traces, 1) for event in _process(number, *each, origin, arrows)]
    return {
        "traceEvents": [*events, *arrows.events()],
        "displayTimeUnit": "ms",
        "otherData": {
            "start": datetime.fromtimestamp(origin, UTC).isoformat(),
            "lost": [name for name, each in traces if each is None],
            "dropped": {name: sum(lane.dropped for lane in each or ()) for name, each in traces},
        },
    }


def _process(number: int, name: str, lanes: Sequence[Lane] | None, origin: float, arrows: _Arrows) -> Iterator[Json]:
    """The events of one actor, and what it is called."""
    place = {"pid": number, "tid": number}
    label = "its events are lost: it did not leave in order" if lanes is None else ""
    yield _named("process_name", place, name=name)
    yield _named("process_labels", place, labels=label)
    yield _named("process_sort_index", place, sort_index=number)
    for thread, lane in enumerate(lanes or ()):
        place = {"pid": number, "tid": number + APART * thread}
        yield _named("thread_name", place, name=lane.name)
        for event in lane.events:
            made = _made(event, lane.anchor - origin) | place
            arrows.saw(lane.name, event, made)
            yield made


def _named(kind: str, place: Json, **values: object) -> Json:
    return {"ph": "M", "name": kind, **place, "args": values}


def _made(event: Event, shift: float) -> Json:
    """An event; both ends of a span are rounded alike, so that spans which end in turn do not overlap."""
    kind, start, end, *figures = event
    begun = round((start + shift) / NANOSECOND)
    made = {"name": kind, "ts": begun / 1e3, "args": dict(zip(FIGURES[kind], figures, strict=True))}
    if end is None:
        return made | {"ph": "i", "s": "t"}
    return made | {"ph": "X", "dur": (round((end + shift) / NANOSECOND) - begun) / 1e3}


class _Arrows:
    """Finds for each frame that was received where it was sent."""

    def __init__(self) -> None:
        self._sent: defaultdict[tuple[object, ...], deque[Json]] = defaultdict(deque)
        self._received: list[tuple[tuple[object, ...], Json]] = []

    def saw(self, name: str, event: Event, made: Json) -> None:
        """Take an event of the loop ``name``, and what was made of it."""
        kind, (peer, *frame) = event[0], event[3:] or (None,)
        if kind == "send":
            self._sent[name, peer, *frame].append(made)
        elif kind == "receive":
            self._received.append(((peer, name, *frame), made))

    def events(self) -> Iterable[Json]:
        """The two ends of each arrow: when it was sent, before which nobody can have it, and within its receipt.

        Viewers find the spans that they belong to by their times.
        """
        for number, (frame, receipt) in enumerate(self._received):
            sent = self._sent[frame]
            if sent:
                for phase, at, part in (("s", sent.popleft(), 0.0), ("f", receipt, 0.5)):
                    yield {
                        "ph": phase,
                        "bp": "e",
                        "name": "frame",
                        "cat": "frame",
                        "id": number,
                        "ts": at["ts"] + part * at["dur"],
                        "pid": at["pid"],
                        "tid": at["tid"],
                    }
