"""Thousands of short requests of all kinds, one after the other: what memory does, and whether all of it comes back.

Requests have random lengths; some begin alike, some are cancelled wherever they are by then, some are forgotten. What
grows with their number is a leak, so memory is taken after a warm-up, in which caches fill, and at the end.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING

from psutil import Process

from ssd_ray.bench.prompts import any_params, any_prompt
from ssd_ray.config import EngineConfig
from ssd_ray.errors import EngineError
from ssd_ray.stats import EngineStats

if TYPE_CHECKING:
    from ssd_ray.llm import LLM, TextStream

Progress = Callable[[str], None]

CANCELLED, FORGOTTEN = 0.06, 0.06
"""Shares of the requests that somebody cancels, and that nobody reads to the end."""

ALIKE = 0.3
"""Share of the requests that begin as others do."""

TOKENS = 8, 24
"""Tokens of a text at least and at most."""

SAMPLE_EVERY = 250
"""Requests between two looks at the memory."""

DRAIN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of one process, in MiB.

    Attributes:
        start: after the warm-up.
        end: after the last request.
        growth: per 1,000 requests in between.
    """

    start: float
    end: float
    growth: float


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it.

    Attributes:
        requests: how many there were, and in ``ends`` how they ended: by finish reason, or "forgotten".
        requests_per_s, tokens_per_s: from the first request to the last end.
        memory: of each process by name.
        samples: requests so far, and MiB of each process then.
        kv_pages: pages of the target, and ``kv_pages_held`` those that were not given back.
        preemptions: times that a request had to give its memory back.
    """

    requests: int
    ends: dict[str, int]
    requests_per_s: float
    tokens_per_s: float
    memory: dict[str, Memory]
    samples: list[tuple[int, dict[str, float]]]
    kv_pages: int
    kv_pages_held: int
    preemptions: int


class Load:
    """Makes requests, keeps as many under way as fill the rows twice, and disturbs some.

    Args:
        llm: where they go.
        texts: token ids of which prompts are parts.
        dice: chooses everything.
    """

    def __init__(self, llm: LLM, texts: Sequence[Sequence[int]], dice: Random) -> None:
        self.ends: Counter[str] = Counter()
        self._llm = llm
        self._texts = texts
        self._dice = dice
        self._under_way: list[TextStream] = []
        self._most = 2 * llm.config.max_num_seqs

    def add(self) -> None:
        """Start a request as soon as there is room for it."""
        while len(self._under_way) >= self._most:
            self._finish()
        self._under_way.append(self._llm.stream(self._prompt(), any_params(self._dice, TOKENS)))
        self._disturb()

    def finish(self) -> None:
        """Read all that is under way."""
        while self._under_way:
            self._finish()

    def _finish(self) -> None:
        self.ends[self._under_way.pop(0).wait().finish_reason] += 1

    def _disturb(self) -> None:
        """Cancel or forget one of the texts under way, which may wait, decode, or have ended."""
        victim, chance = self._dice.randrange(len(self._under_way)), self._dice.random()
        if chance < CANCELLED:
            self._under_way[victim].cancel()
        elif chance < CANCELLED + FORGOTTEN:
            del self._under_way[victim]
            self.ends["forgotten"] += 1

    def _prompt(self) -> list[int]:
        dice = self._dice
        begin = dice.choice(self._texts[:4])[:96] if dice.random() < ALIKE else []
        return [*begin, *any_prompt(self._texts, dice)]


def soak(
    config: EngineConfig,
    texts: Sequence[Sequence[int]],
    requests: int,
    *,
    warm_up: int = 2000,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> Report:
    """Serve so many requests.

    Args:
        config: the engine.
        texts: token ids of which prompts are parts, at least four.
        requests: how many.
        warm_up: requests before memory counts; fewer than ``requests``.
        seed: of everything that is chosen.

    Raises:
        EngineError: a request goes on after all have been read or cancelled.
    """
    # Imported late: the command line is to be quick without Ray.
    from ssd_ray.llm import LLM

    progress("starting")
    with LLM(**asdict(config)) as llm:
        load = Load(llm, texts, Random(seed))
        processes = dict(_processes(llm))
        samples: list[tuple[int, dict[str, float]]] = []
        start = perf_counter()
        for number in range(requests):
            if number == warm_up or number % SAMPLE_EVERY == 0:
                samples.append((number, _memory(processes)))
                progress(f"{number} of {requests} requests, {number / (perf_counter() - start):.1f} per second")
            load.add()
        load.finish()
        seconds = perf_counter() - start
        stats = _idle(llm)
        samples.append((requests, _memory(processes)))
        return _report(load.ends, stats, samples, warm_up, seconds)


def _report(
    ends: Counter[str], stats: EngineStats, samples: list[tuple[int, dict[str, float]]], warm_up: int, seconds: float
) -> Report:
    (first, start), (last, end) = next(each for each in samples if each[0] == warm_up), samples[-1]
    growth = {name: 1e3 * (end[name] - start[name]) / (last - first) for name in end}
    return Report(
        last,
        dict(ends),
        last / seconds,
        stats.tokens / seconds,
        {name: Memory(start[name], end[name], growth[name]) for name in end},
        samples,
        stats.kv_pages,
        stats.kv_pages - stats.kv_pages_free,
        stats.sums.preemptions,
    )


def _idle(llm: LLM) -> EngineStats:
    """The engine's figures once it has nothing to do."""
    deadline = monotonic() + DRAIN_SECONDS
    while (stats := llm.stats()).running or stats.waiting:
        if monotonic() > deadline:
            raise EngineError(f"{stats.running} requests go on, {stats.waiting} wait, and nobody reads them")
        sleep(0.05)
    return stats


def _processes(llm: LLM) -> Iterator[tuple[str, int]]:
    """Name and process id of the driver and of each actor."""
    import ray

    yield "driver", os.getpid()
    for name, handle in llm._engine.driver.actors.items():
        info = handle.info.remote()
        yield name, ray.get(info)["pid"]


def _memory(processes: dict[str, int]) -> dict[str, float]:
    """MiB of each process that are resident."""
    return {name: Process(process).memory_info().rss / 2**20 for name, process in processes.items()}
