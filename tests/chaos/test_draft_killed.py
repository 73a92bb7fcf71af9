"""A draft that is killed or stopped under 16 running requests: no text changes, and no request waits long for it.

How long requests waited is told apart from what a noisy machine does to everybody: `wait_ms` is the time in which the
target did nothing but wait for drafts.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest

from ssd_ray import LLM, EngineStats, SamplingParams
from ssd_ray.bench.batches import Arrivals
from ssd_ray.bench.prompts import held_out_prompts
from ssd_ray.saguaro.backup import MOST_PATIENCE_MS
from tests.support.actors import info, wait_until
from tests.support.engines import at_rest, in_time, stopped

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ROWS = 16
TOKENS = 48
NOISE_MS = 10_000.0
"""What a busy machine may add to the time between two messages of a request. Several times as many processes as cores
made gaps of 4.6 s between rounds of 1.2 s, draft or no draft; a wait without end would last until the test's timeout.
What the dead draft adds is measured by :func:`check_waits`, which does not depend on others."""

WAITS = 3
"""Rounds that may wait for a draft that says nothing any more: the running one, the next, and one for good measure."""


class Recorded(Arrivals):
    """Messages with the gaps between them."""

    @property
    def longest_gap_ms(self) -> float:
        """The longest time between two messages."""
        return 1e3 * max(after - before for (before, _), (after, _) in pairwise(self.times))


@pytest.fixture(scope="module")
def engine(cluster) -> Iterator[LLM]:
    with LLM(dtype="float32", device="cpu", max_num_seqs=ROWS) as llm:
        yield llm


@pytest.fixture(autouse=True)
def no_page_is_held(engine: LLM) -> Iterator[None]:
    yield
    at_rest(lambda: engine.stats().as_dict())


@pytest.fixture(scope="module")
def calm(engine) -> list[Recorded]:
    """What the requests are without a fault."""
    requests = start(engine)
    texts(requests)
    return requests


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one draft", "two drafts"])
def llm(request, engine, calm) -> LLM:
    engine.scale_drafts(request.param)
    wait_until(lambda: len(engine.stats().drafts) == request.param, 30.0)
    return engine


def start(llm: LLM) -> list[Recorded]:
    """16 different requests, half of them greedy, at once."""
    prompts = held_out_prompts(llm._engine.models.tokenizer, count=ROWS, tokens=48)
    driver, requests = llm._engine.driver, [Recorded() for _ in prompts]
    for number, (prompt, recorded) in enumerate(zip(prompts, requests, strict=True)):
        params = SamplingParams(temperature=number % 2, seed=number, max_tokens=TOKENS, ignore_eos=True)
        driver.submit(driver.number(), prompt[: 3 * (1 + number)], params, recorded)
    return requests


def texts(requests: Sequence[Recorded]) -> list[list[int]]:
    for recorded in requests:
        recorded.wait()
    return [recorded.tokens for recorded in requests]


def in_the_middle(llm: LLM) -> list[Recorded]:
    """Requests that have all begun; some may be quick, but most are not near their end."""

    def attempt() -> list[Recorded]:
        at_rest(lambda: llm.stats().as_dict())
        requests = start(llm)
        wait_until(lambda: all(recorded.tokens for recorded in requests), 30.0)
        return requests

    return in_time(attempt, lambda each: sum(len(recorded.tokens) < TOKENS // 2 for recorded in each) >= ROWS // 2)


def check_gaps(calm: Sequence[Recorded], troubled: Sequence[Recorded]) -> None:
    """No gap is longer than the longest round without a fault, a whole wait, and what the machine may do."""
    round_ms = max(recorded.longest_gap_ms for recorded in calm)
    assert max(recorded.longest_gap_ms for recorded in troubled) < round_ms + MOST_PATIENCE_MS + NOISE_MS


def check_waits(requests: Sequence[Recorded], before: EngineStats, after: EngineStats) -> None:
    """The target has waited for no more than the few rounds in which it could not know, however long a round was."""
    round_ms = max(recorded.longest_gap_ms for recorded in requests)
    assert after.wait_ms - before.wait_ms < WAITS * (round_ms + MOST_PATIENCE_MS)


def test_a_killed_draft(llm: LLM, calm: list[Recorded]) -> None:
    victim, *others = llm.stats().drafts
    process = info(llm, victim)["pid"]
    requests = in_the_middle(llm)
    before = llm.stats()
    os.kill(process, signal.SIGKILL)
    assert texts(requests) == texts(calm)
    after = llm.stats()
    check_gaps(calm, requests)
    assert victim not in after.drafts  # the one that takes its place may be there already
    assert set(others) <= set(after.drafts)
    if others:
        assert after.misses["no_draft"] == before.misses["no_draft"]
        assert after.sums.hits > before.sums.hits
    else:
        check_waits([*calm, *requests], before, after)
        assert after.misses["no_draft"] > before.misses["no_draft"]


@pytest.mark.slow
def test_a_stopped_draft(llm: LLM, calm: list[Recorded]) -> None:
    """It is not dead, so it keeps its place; when it goes on, what it slept through is of no matter."""
    victim, *others = llm.stats().drafts
    requests = in_the_middle(llm)
    with stopped(llm, victim):
        before = llm.stats()
        assert texts(requests) == texts(calm)
        after = llm.stats()
    check_gaps(calm, requests)
    if not others:
        check_waits([*calm, *requests], before, after)
    assert texts(start(llm)) == texts(calm)

    def drafted() -> int:
        again = start(llm)
        assert texts(again) == texts(calm)
        return sum(recorded.stats.tree_tokens > 0 for recorded in again)

    # Of a text that is mostly looked up a draft may see nothing in time.
    in_time(drafted, lambda texts: texts >= ROWS // 2)
    assert set(llm.stats().drafts) == {victim, *others}
