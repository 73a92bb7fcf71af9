"""The requests of an engine that are under way, and what their clients have of them.

A target may die at any time. What it has handed out is kept here, so that the next one goes on behind it: nobody who
waits for a text notices more than a pause.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from math import inf
from time import monotonic
from typing import Any

from ssd_ray.cluster.metrics import Ended
from ssd_ray.config import SamplingParams
from ssd_ray.errors import QueueFullError, SsdRayError
from ssd_ray.stats import EngineStats, add
from ssd_ray.wire import Output, RequestStats

Deliver = Callable[[Output | SsdRayError], None]
"""Takes what comes of a request: its messages, the last one included, or the error that ends it. It is called from
another thread, and returns at once."""


@dataclass(slots=True, eq=False)
class Request:
    """A request that is under way.

    Attributes:
        number: under which the target knows it.
        prompt: its tokens as a target is given them.
        prompt_tokens: how many they are.
        params: how to go on.
        deliver: takes what comes of it.
        deadline: when it ends, however far it has come.
        text: the tokens that have been delivered.
        cancelled: nobody wants it any more.
        arrived, first: when it was submitted, and when its first token came.
    """

    number: int
    prompt: Any
    prompt_tokens: int
    params: SamplingParams
    deliver: Deliver
    deadline: float = inf
    text: list[int] = field(default_factory=list)
    cancelled: bool = False
    arrived: float = field(default_factory=monotonic)
    first: float | None = None

    def ended(self, message: Output) -> Ended | None:
        """What its last message says of it; None if it goes on, or no target has had it."""
        if message.finish_reason is None or message.stats is None:
            return None
        first = None if self.first is None else self.first - self.arrived
        return Ended(message.finish_reason, message.stats, monotonic() - self.arrived, first)

    @property
    def timeout(self) -> float | None:
        """Seconds that are left to it; None is any number."""
        return None if self.deadline == inf else self.deadline - monotonic()

    def end(self) -> Output | None:
        """Its last message, should it have to end though no target is there; None if it may go on."""
        if not self.cancelled and self.deadline > monotonic():
            return None
        written = len(self.text)
        stats = RequestStats(tokens=written, prompt_tokens=self.prompt_tokens, resumed_tokens=written)
        return Output(self.number, [], "cancelled" if self.cancelled else "timeout", stats)


class Requests:
    """All that are under way, by number, and the figures of those that have ended. One thread at a time.

    Args:
        most: requests under way at the same time at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._numbers = count()
        self._under_way: dict[int, Request] = {}
        self._ended = EngineStats()  # under the present target, which knows it, too
        self._before = EngineStats()  # under those before it

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def full(self) -> bool:
        """Whether there is no room for another one."""
        return len(self) >= self._most

    def number(self) -> int:
        """A number for a request that is to come."""
        return next(self._numbers)

    def add(
        self,
        number: int,
        prompt: Any,
        prompt_tokens: int,
        params: SamplingParams,
        deliver: Deliver,
        timeout: float | None,
    ) -> Request:
        """Take a request in.

        Raises:
            QueueFullError: there is no room.
        """
        if self.full:
            raise QueueFullError(f"{self._most} requests are under way, as many as max_queue allows")
        deadline = inf if timeout is None else monotonic() + timeout
        request = self._under_way[number] = Request(number, prompt, prompt_tokens, params, deliver, deadline)
        return request

    def cancel(self, number: int) -> bool:
        """Note that nobody wants a request any more; returns whether it is under way."""
        request = self._under_way.get(number)
        if request is not None:
            request.cancelled = True
        return request is not None

    def take(self, message: Output) -> Request | None:
        """Note what is delivered; returns whose it is, None if nobody's."""
        request = self._under_way.get(message.request)
        if request is None:
            return None
        request.text += message.tokens
        if request.text and request.first is None:
            request.first = monotonic()
        if message.finish_reason is not None:
            del self._under_way[message.request]
            if message.stats is not None:
                self._ended = _sum(self._ended, EngineStats(sums=message.stats, requests=1))
        return request

    def hand_over(self) -> list[Request]:
        """The requests that the next target goes on with, the oldest first; the one before it is gone."""
        self._before, self._ended = _sum(self._before, self._ended), EngineStats()
        return list(self._under_way.values())

    def overdue(self) -> list[Output]:
        """The last messages of requests that cannot wait for the next target."""
        ends = [request.end() for request in self._under_way.values()]
        return [end for end in ends if end is not None]

    def give_up(self) -> list[Request]:
        """Forget all; returns who they were."""
        requests, self._under_way = list(self._under_way.values()), {}
        return requests

    def figures(self, target: EngineStats | None) -> EngineStats:
        """The figures of all requests so far.

        Args:
            target: those of the present target; None if there is none.
        """
        return _sum(target or replace(self._ended, waiting=len(self)), self._before)


def _sum(now: EngineStats, before: EngineStats) -> EngineStats:
    """The figures of an engine, with the sums of ``before``."""
    return replace(now, sums=add(now.sums, before.sums), requests=now.requests + before.requests)
