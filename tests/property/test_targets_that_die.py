"""A target may die after any round, with what it has not handed out: texts are those of an undisturbed run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_ray.config import SamplingParams
from ssd_ray.models.table import TableModel
from ssd_ray.speculation.window import SCRATCH
from tests.support.pump import Pump, Text
from tests.support.tiny import tiny_tokenizer

VOCABULARY = 32
MODEL: dict[str, Any] = {"vocab_size": VOCABULARY, "contexts": 256, "order": 2, "max_length": 160, "sharpness": 3.0}
TOKENIZER = tiny_tokenizer(VOCABULARY)
WORDS = [TOKENIZER.decode([token]) for token in range(1, VOCABULARY)]

tokens = st.integers(0, VOCABULARY - 1)
some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    seed=st.integers(0, 2**32),
    max_tokens=st.integers(1, 60) | st.none(),
    min_tokens=st.sampled_from([0, 1]),
    stop=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=2).map("".join), max_size=2),
    stop_token_ids=st.lists(tokens, max_size=2),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    bad_words_ids=st.lists(st.lists(tokens, min_size=1, max_size=2), max_size=3),
    logprobs=st.sampled_from([None, 2]),
)
requests = st.lists(st.tuples(st.lists(tokens, min_size=1, max_size=70), some_params), min_size=1, max_size=4)


def model(rows: int, pages: int | None) -> TableModel:
    return TableModel(rows=rows, scratch=SCRATCH, pages=pages, **MODEL)


def pump(rows: int, drafts: int, pages: int | None = None, **options: object) -> Pump:
    models = [model(rows, None).perturbed(0.8, seed) for seed in range(drafts)]
    return Pump(model(rows, pages), models, concurrency=rows, tokenizer=TOKENIZER, **options)  # type: ignore[arg-type]


def mortal(engine: Pump, deaths: Sequence[tuple[int, bool]], pages: int | None) -> None:
    """Decode until all texts have ended, with a target that dies after so many turns each time, the last of which
    nobody may hear of."""
    for turns, heard in deaths:
        for _ in range(turns):
            engine.turn()
        engine.target.turn(0.0)
        if heard:
            engine.deliver()
        engine.lose_target(model(4, pages))
    for _ in range(20_000):
        if all(text.finish_reason for text in engine.texts.values()):
            return
        engine.turn()
    raise TimeoutError("some request did not end")


def check(text: Text, calm: Text) -> None:
    assert (text.tokens, text.finish_reason, text.logprobs) == (calm.tokens, calm.finish_reason, calm.logprobs)
    assert (text.stats.tokens, text.stats.prompt_tokens) == (calm.stats.tokens, calm.stats.prompt_tokens)
    assert len(text.tokens) == text.stats.tokens


@settings(max_examples=6)
@given(
    requests=requests,
    deaths=st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=4),
    drafts=st.integers(0, 2),
    chunk=st.sampled_from([16, 256]),
    pages=st.sampled_from([None, 13]),
    trouble=st.sampled_from([0.0, 0.1]),
)
def test_every_text_goes_on(
    requests: list[tuple[list[int], SamplingParams]],
    deaths: list[tuple[int, bool]],
    drafts: int,
    chunk: int,
    pages: int | None,
    trouble: float,
) -> None:
    calm = pump(4, 0, lookahead=0).run_all(requests)
    engine = pump(4, drafts, pages, trouble=trouble, prefill_chunk=chunk)
    texts = [engine.submit(number, *request) for number, request in enumerate(requests)]
    mortal(engine, deaths, pages)
    for text, expected in zip(texts, calm, strict=True):
        check(text, expected)
    engine.validate()


def test_a_text_whose_end_was_not_heard_ends_as_it_did() -> None:
    """All tokens have come, and then the target dies before it says why there are no more."""
    prompt = [1, 2, 3, 4]
    free = pump(1, 0).run(prompt, SamplingParams(max_tokens=40, seed=3))
    word = TOKENIZER.decode(free.tokens[5:7])
    for ending in ({"max_tokens": 7}, {"stop": word}, {"stop_token_ids": free.tokens[5:6]}):
        params = SamplingParams(**{"max_tokens": 40, "seed": 3} | ending)  # type: ignore[arg-type]
        calm = pump(1, 0).run(prompt, params)
        engine = pump(1, 0)
        text = engine.texts.setdefault(1, Text())
        engine.submit(1, prompt, params)
        text.tokens += calm.tokens
        engine.lose_target(model(1, None))
        for _ in range(3):
            engine.turn()
        check(text, calm)
        assert text.stats.resumed_tokens == len(calm.tokens)
        assert text.stats.rounds == 0
        assert engine.target.stats().running + engine.target.stats().waiting == 0


def test_drafts_follow_the_next_target() -> None:
    """They know their texts again, and what the dead one says is nobody's."""
    dice = random.Random(0)
    engine = pump(2, 2, draft_turns=lambda: dice.randrange(6))
    params = SamplingParams(max_tokens=100, seed=1)
    texts = [engine.submit(number, [number, 1, 2], params) for number in range(2)]
    for _ in range(5):
        engine.turn()
    engine.target.turn(0.0)
    engine.lose_target(model(2, None))
    for _ in range(5):
        engine.turn()
    assert set(engine.target.stats().drafts) == {"draft-0", "draft-1"}
    while not all(text.finish_reason for text in texts):
        engine.turn()
    assert all(text.stats.hits > 0 for text in texts)
    assert [text.tokens for text in texts] == [pump(1, 0).run([n, 1, 2], params).tokens for n in range(2)]
