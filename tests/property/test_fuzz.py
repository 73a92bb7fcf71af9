"""Thousands of requests of whatever can be expressed: each is refused in our own words or served, and those beside it
do not notice."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import fields

import pytest

from ssd_ray.config import SamplingParams
from ssd_ray.engine import Task
from ssd_ray.errors import SsdRayError
from ssd_ray.prompts import several
from ssd_ray.sampling.rejection import Proposing
from tests.support import fuzz
from tests.support.engines import checked
from tests.support.pump import Pump, Text, table_pair, ticking
from tests.support.tiny import EOS, tiny_tokenizer

VOCAB = 96
CONTEXT = 24
AT_ONCE = 6

pytestmark = pytest.mark.timeout(600)

WITNESSES = (
    ([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)),
    ([5, 6, 7, 8], SamplingParams(seed=11, max_tokens=12, logprobs=2, ignore_eos=True)),
)
"""Requests that run beside all others, again and again."""


class Bench:
    """A target and a draft of table models, a door that checks requests as an engine does, and the witnesses."""

    def __init__(self, proposing: Proposing | None) -> None:
        target, drafts = table_pair(0.7, vocab_size=VOCAB, rows=AT_ONCE, max_length=CONTEXT, contexts=256)
        tokenizer = tiny_tokenizer(VOCAB)
        self.models = checked(tokenizer, VOCAB, CONTEXT)
        options = {"concurrency": AT_ONCE, "tokenizer": tokenizer, "end_tokens": [EOS], "backup": "auto"}
        self.pump = Pump(target, drafts, draft_turns=lambda: 1, proposing=proposing, clock=ticking, **options)
        self.running: dict[int, Text] = {}
        self.ends: Counter[str | None] = Counter()
        self.number = 0

    def submit(self, tokens: list[int], params: SamplingParams) -> Text:
        self.number += 1
        text = self.pump.texts[self.number] = self.running[self.number] = Text()
        self.pump.target.submit(self.number, tokens, params)
        return text

    def turn(self) -> None:
        self.pump.turn()
        for number in [number for number, text in self.running.items() if text.finish_reason is not None]:
            text = self.running.pop(number)
            del self.pump.texts[number]
            self.ends[text.finish_reason] += 1
            assert text.finish_reason in ("stop", "length"), text.error
            assert text.stats.tokens == len(text.tokens)

    def finish(self) -> None:
        for _ in range(10_000):
            if not self.running:
                return
            self.turn()
        raise TimeoutError("some request did not end")

    def request(self, prompt: object, values: dict[str, object]) -> None:
        """Let a request in as an engine does."""
        params = self.models.params(SamplingParams(**values))  # type: ignore[arg-type]
        for each in several(prompt):  # type: ignore[arg-type]
            task = Task(each, self.models.prompt(each), params, None)
            for text in task.texts()[:2]:
                self.submit(text.tokens, text.params)


def test_every_field_is_tried() -> None:
    assert set(fuzz.EDGES) == {each.name for each in fields(SamplingParams)}


@pytest.mark.parametrize(
    ("proposing", "cases"),
    [(None, 600), (Proposing(16), 200), pytest.param(None, 30_000, marks=pytest.mark.slow)],
    ids=["coupled", "rejection", "long"],
)
def test_whatever_is_asked_others_do_not_notice(proposing: Proposing | None, cases: int) -> None:
    dice = random.Random(cases)
    bench = Bench(proposing)
    alone = [bench.submit(*witness) for witness in WITNESSES]
    bench.finish()
    beside = [bench.submit(*witness) for witness in WITNESSES]
    refused = compared = 0
    for _ in range(cases):
        try:
            bench.request(fuzz.prompt(dice, VOCAB), fuzz.parameters(dice))
        except SsdRayError:
            refused += 1
        while len(bench.running) >= AT_ONCE + 2:
            bench.turn()
        for index, text in enumerate(beside):
            if text.finish_reason is not None:
                # With rejection a text depends on what was drafted, and so on when.
                same = (text.tokens, text.logprobs) == (alone[index].tokens, alone[index].logprobs)
                assert same or proposing is not None
                beside[index] = bench.submit(*WITNESSES[index])
                compared += 1
    bench.finish()
    assert (
        bench.pump.target.stats().dropped_frames["malformed"] == sum(draft.dropped for draft in bench.pump.drafts) == 0
    )
    assert bench.pump.target.stats().running == 0
    assert not bench.pump.drafts[0].sequences
    bench.pump.validate()
    assert min(refused, sum(bench.ends.values()), 6 * compared) > cases // 4, (refused, bench.ends, compared)
