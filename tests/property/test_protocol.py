"""Whatever happens to messages, whoever drafts, the text is the target's own."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_ray.config import SamplingParams
from ssd_ray.models.table import TableModel
from ssd_ray.speculation.window import SCRATCH
from tests.support.pump import Pump, Text, table_pair

PROMPT = [1, 2, 3, 4, 5]


def alone(params: SamplingParams, prompt: Sequence[int] = PROMPT) -> Text:
    target, _ = table_pair()
    return Pump(target, []).run(prompt, params)


def transcript(target: TableModel, params: SamplingParams, prompt: Sequence[int]) -> list[int]:
    """The greedy text by the model's own definition, without runner, session or loop."""
    tokens = list(prompt)
    for _ in range(params.max_tokens):
        tokens.append(int(target.distribution(tokens).argmax()))
    return tokens[len(prompt) :]


def test_autoregressive_decoding_follows_the_model() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60)
    assert alone(params).tokens == transcript(TableModel(), params, PROMPT)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_drafts_do_not_change_the_text(temperature: float, drafts: int) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=120, seed=11)
    target, models = table_pair(0.9, drafts)
    text = Pump(target, models).run(PROMPT, params)
    assert text.tokens == alone(params).tokens
    assert text.stats.hits > text.stats.rounds / 3
    assert text.stats.tokens == sum((k + 1) * count for k, count in enumerate(text.stats.accepted)) == 120


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32),
    trouble=st.floats(0.0, 0.6),
    drafts=st.integers(0, 3),
    agreement=st.floats(0.0, 1.0),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([1.0, 0.9]),
    lookahead=st.integers(1, 7),
)
def test_no_message_can_change_the_text(
    seed: int, trouble: float, drafts: int, agreement: float, temperature: float, top_p: float, lookahead: int
) -> None:
    """Frames are lost, repeated, reordered, late, cut off and overwritten; drafts work at any pace."""
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=40, seed=seed)
    dice = random.Random(seed)
    target, models = table_pair(agreement, drafts)
    pump = Pump(target, models, draft_turns=lambda: dice.randrange(8), trouble=trouble, seed=seed, lookahead=lookahead)
    text = pump.run(PROMPT, params)
    assert text.tokens == alone(params).tokens
    assert text.finish_reason == "length"


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), temperature=st.sampled_from([0.0, 1.0]))
def test_drafts_that_join_and_leave_do_not_change_the_text(seed: int, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=60, seed=seed)
    dice = random.Random(seed)
    target, models = table_pair(0.8, 6)
    pump = Pump(target, [models.pop()])
    pump.target.submit(1, PROMPT, params)
    for number in range(300):
        if models and dice.random() < 0.2:
            pump.join(f"late-{number}", models.pop())
        if pump.drafts and dice.random() < 0.2:
            draft = pump.drafts.pop(dice.randrange(len(pump.drafts)))
            draft.leave() if dice.random() < 0.5 else pump.target.detach(draft.name)
        pump.turn()
        if pump.texts.get(1) and pump.texts[1].finish_reason:
            break
    assert pump.texts[1].tokens == alone(params).tokens


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**32),
    drafts=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 1.0]),
    lookahead=st.integers(1, 7),
    width=st.integers(1, 8),
)
def test_a_perfect_draft_is_always_right(
    seed: int, drafts: int, temperature: float, lookahead: int, width: int
) -> None:
    """A draft whose model is the target's is never wrong, so any slip in its KV, masks, positions or noise shows."""
    dice = random.Random(seed)
    target, models = table_pair(1.0, drafts)
    pump = Pump(target, models, draft_turns=lambda: dice.randrange(12), seed=seed, width=width, lookahead=lookahead)
    for number, (prompt, count) in enumerate([(PROMPT, 20), ([seed % 32] * 126, 120)]):
        params = SamplingParams(temperature=temperature, max_tokens=count, seed=seed)
        stats = pump.run(prompt, params, number).stats
        assert stats.accepted == stats.speculated
        assert sum(stats.speculated[1:]) > 0


def test_a_draft_that_joins_late_brings_hits() -> None:
    target, models = table_pair(0.95, 1)
    pump = Pump(target, [])
    pump.target.submit(1, PROMPT, SamplingParams(temperature=0.0, max_tokens=120))
    while len(pump.texts.setdefault(1, Text()).tokens) < 30:
        pump.turn()
    assert pump.target.stats().hit_rate == 0.0
    pump.join("late", models[0])
    while pump.texts[1].finish_reason is None:
        pump.turn()
    assert pump.texts[1].stats.hits > 5
    assert pump.texts[1].tokens == alone(SamplingParams(temperature=0.0, max_tokens=120)).tokens


def blurred_pump(drafts: int) -> Pump:
    target = TableModel(scratch=SCRATCH, vocab_size=64)
    return Pump(target, [target.blurred(1.0) for _ in range(drafts)], width=3)


def test_two_drafts_cover_more_outcomes_than_one() -> None:
    hits = {}
    for drafts in (1, 3):
        stats = [blurred_pump(drafts).run(PROMPT, SamplingParams(max_tokens=200, seed=seed)).stats for seed in (1, 2)]
        hits[drafts] = sum(each.hits for each in stats) / sum(each.rounds for each in stats)
    assert hits[3] > hits[1] + 0.05


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_backups_do_what_they_say_and_do_not_change_the_text(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=150, seed=2)
    figures = {}
    for backup in ("draft", "ngram", "none", "auto"):
        target, models = table_pair(0.6, 1)
        text = Pump(target, models, backup=backup).run(PROMPT, params)
        assert text.tokens == alone(params).tokens
        figures[backup] = text.stats
        assert sum(msgspec.structs.astuple(text.stats.backups)) == sum(msgspec.structs.astuple(text.stats.misses))
    assert figures["draft"].backups.draft > 0 == figures["draft"].backups.ngram
    assert figures["ngram"].backups.ngram > 0 == figures["ngram"].waits
    assert figures["none"].backups.none > 0 == figures["none"].waits


def test_prompt_lookup_speculates_without_any_draft() -> None:
    """A greedy text in which the last token decides the next soon runs in circles."""
    params = SamplingParams(temperature=0.0, max_tokens=150)
    texts = [Pump(TableModel(order=1), [], backup=backup).run(PROMPT, params) for backup in ("auto", "none")]
    assert texts[0].tokens == texts[1].tokens
    assert texts[0].stats.rounds < 60
    assert texts[1].stats.rounds == 150


def test_misses_are_told_by_cause() -> None:
    target, models = table_pair(0.5, 1)
    params = SamplingParams(temperature=1.0, max_tokens=100, seed=2)
    stats = Pump(target, models, width=2).run(PROMPT, params).stats
    assert stats.misses.fan_out > 0
    assert stats.misses.no_draft == 0
    target, _ = table_pair()
    assert Pump(target, []).run(PROMPT, params).stats.misses.no_draft == 99


def test_stop_conditions_cut_the_same_token_for_all() -> None:
    target, models = table_pair(0.9, 1)
    free = alone(SamplingParams(temperature=0.0, max_tokens=80)).tokens
    stop = free[40]
    params = SamplingParams(temperature=0.0, max_tokens=80, stop_token_ids=(stop,))
    text = Pump(target, models).run(PROMPT, params)
    assert text.finish_reason == "stop"
    assert text.tokens == free[: free.index(stop) + 1]


def test_a_sequence_ends_at_the_context_length() -> None:
    target, models = table_pair(0.9, 1, max_length=48)
    text = Pump(target, models).run(PROMPT, SamplingParams(temperature=0.0, max_tokens=500))
    assert len(text.tokens) == 48 - len(PROMPT)
    assert text.finish_reason == "length"


def test_a_cancelled_request_ends_and_frees_its_row() -> None:
    target, models = table_pair(0.9, 1)
    pump = Pump(target, models)
    pump.target.submit(1, PROMPT, SamplingParams(max_tokens=200))
    pump.target.submit(2, PROMPT, SamplingParams(max_tokens=200))
    for _ in range(5):
        pump.turn()
    pump.target.cancel(1)
    pump.target.cancel(2)
    for _ in range(5):
        pump.turn()
    assert pump.texts[1].finish_reason == pump.texts[2].finish_reason == "cancelled"
    assert 0 < len(pump.texts[1].tokens) < 200
    assert not pump.drafts[0].sequences
    params = SamplingParams(temperature=0.0, max_tokens=20)
    assert pump.run(PROMPT, params, number=3).tokens == alone(params).tokens


def test_one_request_after_another() -> None:
    target, models = table_pair(0.9, 1)
    pump = Pump(target, models)
    for number in range(1, 4):
        params = SamplingParams(temperature=1.0, max_tokens=30, seed=number)
        prompt = list(range(number, number + 7))
        assert pump.run(prompt, params, number).tokens == alone(params, prompt).tokens
    assert pump.target.stats().requests == 3
    assert pump.target.stats().tokens == 90
