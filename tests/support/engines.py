"""Engines to compare: actors in threads over memory channels, and the real ones, behind one function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread
from time import monotonic, sleep
from typing import Any, Protocol

from ssd_ray.actors.draft import DraftActor
from ssd_ray.actors.links import DRIVER
from ssd_ray.actors.target import TargetActor
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.llm import LLM
from ssd_ray.transport.memory import MemoryHub, MemorySpoke
from ssd_ray.wire import Output, RequestStats, decode

SESSION = 11


Params = SamplingParams | Sequence[SamplingParams]
"""For all prompts, or one for each."""


class Generate(Protocol):
    """Decode prompts that come at once; token ids of each, and figures in the order in which they end."""

    def __call__(self, prompts: Sequence[list[int]], params: Params) -> tuple[list[list[int]], list[RequestStats]]: ...


@contextmanager
def engine(config: EngineConfig, channel: str = "zmq") -> Iterator[Generate]:
    """An engine whose actors talk over "memory", "zmq" or "ray"."""
    if channel == "memory":
        with _in_threads(config) as generate:
            yield generate
        return
    fields = {name: getattr(config, name) for name in EngineConfig.__dataclass_fields__} | {"transport": channel}
    with LLM(**fields) as llm:

        def run(prompts: Sequence[list[int]], params: Params) -> tuple[list[list[int]], list[RequestStats]]:
            outputs = llm.generate(prompts, params)
            return [output.token_ids for output in outputs], [output.stats.sums for output in outputs]

        yield run


@contextmanager
def _in_threads(config: EngineConfig) -> Iterator[Generate]:
    hub = MemoryHub()
    driver = MemorySpoke(hub.address, DRIVER)
    target = TargetActor(config, hub, session=SESSION, cores=None)
    drafts = [
        DraftActor(config, MemorySpoke(hub.address, f"draft-{number}"), session=SESSION, cores=None)
        for number in range(config.num_drafts if config.method == "ssd" else 0)
    ]
    threads = [Thread(target=actor.run, daemon=True) for actor in (target, *drafts)]
    for thread in threads:
        thread.start()

    def run(prompts: Sequence[list[int]], params: Params) -> tuple[list[list[int]], list[RequestStats]]:
        several = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        for number, (prompt, each) in enumerate(zip(prompts, several, strict=True)):
            target.submit(number, prompt, each)
        return _collect(driver, len(prompts))

    try:
        yield run
    finally:
        for actor in (target, *drafts):
            actor.stop()
        for thread in threads:
            thread.join(10.0)
    for pool in (target._target.batch.pool, *(draft._draft.pool for draft in drafts)):
        pool.validate()


def _collect(driver: MemorySpoke, requests: int) -> tuple[list[list[int]], list[RequestStats]]:
    """What comes until all requests have ended."""
    texts: list[list[int]] = [[] for _ in range(requests)]
    stats: list[RequestStats] = []
    while len(stats) < requests:
        received = driver.receive(60.0)
        if received is None:
            raise TimeoutError("the engine fell silent")
        for output in decode(SESSION, received[1]):
            if isinstance(output, Output):
                texts[output.request] += output.tokens
                stats += [output.stats] if output.stats is not None else []
    return texts, stats


def target_alone(target: str, prompts: Sequence[list[int]], params: Params) -> list[list[int]]:
    """Token ids that the target writes without any draft."""
    with engine(EngineConfig(target=target, method="ar"), "memory") as generate:
        return generate(prompts, params)[0]


def at_rest(figures: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of an engine once nothing runs or waits: nobody holds a page of its KV memory then."""
    deadline = monotonic() + 20.0
    while (now := figures())["running"] + now["waiting"]:
        assert monotonic() < deadline, now
        sleep(0.02)
    assert now["kv_pages_free"] == now["kv_pages"] > 0
    return now


def variants(config: EngineConfig, lookaheads: Sequence[int], drafts: Sequence[int]) -> list[EngineConfig]:
    """The configurations whose texts have to be those of ar."""
    sd = [replace(config, method="sd", lookahead=lookahead) for lookahead in lookaheads]
    ssd = [
        replace(config, method="ssd", lookahead=lookahead, num_drafts=number)
        for lookahead in lookaheads
        for number in drafts
    ]
    return [*sd, *ssd]
