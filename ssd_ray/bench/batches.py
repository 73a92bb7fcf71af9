"""Many requests at once: total speed and time per token of ar, sd and ssd, by the number of requests, in one run.

All requests of a batch come at the same moment. Methods take turns batch by batch, so that a machine whose speed drifts
does not favour anybody. Figures are medians over repetitions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import fmean, median
from time import perf_counter

from ssd_ray.bench.methods import OWN, cores_of, on_cores
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import SsdRayError
from ssd_ray.stats import Stats, add
from ssd_ray.wire import Output, RequestStats

SHORTEST, LONGEST = 16, 1500
"""Tokens of the shortest and the longest prompt of a mix."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Figure:
    """What a method did with a batch.

    Attributes:
        method, rows: which, and how many requests at once.
        mixed: prompts of very different lengths.
        tokens_per_s: all tokens over the time from the first request to the last token, prefill included.
        median_ms, p99_ms: time per token after a request's first ones: the time between two messages over the tokens of
            the second.
        slowest: time per token of the slowest request over the median one's; some texts are harder to guess.
        slowest_round: the same of the time per round, which no text changes.
        same: fraction of texts that are those of the smallest batch and first method with the same prompt.
        duty_cycle, hit_rate, tokens_per_round, verified_per_token: see :class:`~ssd_ray.stats.Stats`.
        processor_seconds: of target and drafts, for 1,000 tokens.
    """

    method: str
    rows: int
    mixed: bool
    tokens_per_s: float
    median_ms: float
    p99_ms: float
    slowest: float
    slowest_round: float
    same: float
    duty_cycle: float
    hit_rate: float
    tokens_per_round: float
    verified_per_token: float
    processor_seconds: float


class Arrivals:
    """The messages of one request, with the times at which they came."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.times: list[tuple[float, int]] = []  # (seconds, tokens)
        self.stats = RequestStats()
        self._ended = threading.Event()
        self._error: SsdRayError | None = None

    def __call__(self, item: Output | SsdRayError) -> None:
        """Take a message, or what ends the request."""
        if isinstance(item, SsdRayError):
            self._error = item
        elif item.tokens:
            self.times.append((perf_counter(), len(item.tokens)))
            self.tokens += item.tokens
        if isinstance(item, SsdRayError) or item.finish_reason is not None:
            self.stats = getattr(item, "stats", None) or self.stats
            self._ended.set()

    def wait(self) -> None:
        """Wait for the end.

        Raises:
            SsdRayError: the engine failed.
        """
        self._ended.wait()
        if self._error is not None:
            raise self._error

    @property
    def token_ms(self) -> list[float]:
        """Milliseconds per token, for every token after the first message."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [1e3 * (now - before) / count for (before, _), (now, count) in pairs for _ in range(count)]

    @property
    def mean_ms(self) -> float:
        """Milliseconds per token over the whole request, after the first message."""
        return sum(self.token_ms) / max(1, len(self.token_ms))

    @property
    def round_ms(self) -> float:
        """Milliseconds per message over the whole request, after the first one."""
        return 1e3 * (self.times[-1][0] - self.times[0][0]) / max(1, len(self.times) - 1)


Served = tuple[list[Arrivals], float, float]
"""What arrived, the seconds that it took, and those of all processors."""

Serve = Callable[[Sequence[Sequence[int]], SamplingParams], Served]
"""Serve prompts at once."""


def compare_batches(
    config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    sizes: Sequence[int],
    *,
    methods: Sequence[str] = OWN,
    repeat: int = 3,
    progress: Progress = lambda _: None,
) -> list[Figure]:
    """The figures of each method for batches of each size; with the largest size also for a mix of prompt lengths.

    Prompts are cut to equal length, or to the mix's.
    """
    most = max(sizes)
    chosen = [prompts[index % len(prompts)] for index in range(most)]
    loads = [(size, False, [prompt[:192] for prompt in chosen[:size]]) for size in sizes]
    loads.append((most, True, [prompt[:length] for prompt, length in zip(chosen, mixture(most), strict=True)]))
    with ExitStack() as stack:
        servers: dict[str, Serve] = {}
        for method in sorted(methods, key=lambda method: method != "ssd"):  # see methods.compare
            progress(f"starting {method}")
            servers[method] = stack.enter_context(_server(replace(config, method=method)))  # type: ignore[arg-type]
        figures = []
        texts: dict[tuple[int, int], list[int]] = {}  # by request and length of its prompt, the first that came
        for size, mixed, load in loads:
            progress(f"{size} at once{', of all lengths' if mixed else ''}")
            turns = [{method: servers[method](load, params) for method in methods} for _ in range(repeat)]
            for method in methods:
                runs = [turn[method] for turn in turns]
                same = [
                    texts.setdefault((number, len(prompt)), each.tokens) == each.tokens
                    for requests, *_ in runs
                    for number, (prompt, each) in enumerate(zip(load, requests, strict=True))
                ]
                figures.append(_figure(method, size, mixed, runs, fmean(same)))
        return figures


def mixture(count: int) -> list[int]:
    """Lengths of prompts from the shortest to the longest, evenly by their logarithms, in a mixed order."""
    ratio = LONGEST / SHORTEST
    lengths = [round(SHORTEST * ratio ** (index / max(1, count - 1))) for index in range(count)]
    return [lengths[(7 * index) % count] for index in range(count)] if count % 7 else lengths


@contextmanager
def _server(config: EngineConfig) -> Iterator[Serve]:
    # Imported late: the command line is to be quick without Ray.
    from ssd_ray.engine import Engine

    with on_cores(cores_of(config)):
        engine = Engine(config)

    def serve(prompts: Sequence[Sequence[int]], params: SamplingParams) -> Served:
        start, used = perf_counter(), engine.driver.processor_seconds()
        requests = [Arrivals() for _ in prompts]
        for number, (prompt, arrivals) in enumerate(zip(prompts, requests, strict=True)):
            engine.driver.submit(engine.driver.number(), prompt, replace(params, seed=number), arrivals)
        for arrivals in requests:
            arrivals.wait()
        seconds = perf_counter() - start
        return requests, seconds, engine.driver.processor_seconds() - used

    try:
        serve([[1, 2, 3]], SamplingParams(max_tokens=16))
        yield serve
    finally:
        engine.close()


def _figure(method: str, rows: int, mixed: bool, runs: Sequence[Served], same: float) -> Figure:
    total = RequestStats()
    for requests, *_ in runs:
        for each in requests:
            total = add(total, each.stats)
    stats = Stats(sums=total)
    times = sorted(ms for requests, *_ in runs for each in requests for ms in each.token_ms)
    return Figure(
        method,
        rows,
        mixed,
        median(sum(each.stats.tokens for each in requests) / seconds for requests, seconds, _ in runs),
        median(times),
        times[int(0.99 * (len(times) - 1))],
        median(_unevenness([each.mean_ms for each in requests]) for requests, *_ in runs),
        median(_unevenness([each.round_ms for each in requests]) for requests, *_ in runs),
        same,
        stats.duty_cycle,
        stats.hit_rate,
        stats.tokens_per_round,
        stats.verified_per_token,
        1e3 * sum(used for _, _, used in runs) / max(1, stats.tokens),
    )


def _unevenness(times: Sequence[float]) -> float:
    """The largest over the median."""
    return max(times) / (median(times) or 1.0)
