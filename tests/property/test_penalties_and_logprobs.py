"""Penalties and log-probabilities in the whole loop: the text's own, whatever was drafted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2

from ssd_ray.config import SamplingParams
from ssd_ray.models.table import TableModel
from ssd_ray.sampling.noise import gumbel
from ssd_ray.sampling.penalties import Penalties
from ssd_ray.sampling.rejection import Proposing
from ssd_ray.speculation.window import SCRATCH
from tests.support.pump import Pump, Text, table_pair
from tests.support.tiny import tiny_tokenizer

PROMPT = [1, 2, 3, 4, 5, 3, 3]
PENALTIES: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.sampled_from([0.8, 1.0, 1.3, 2.0]),
    "presence_penalty": st.sampled_from([-0.5, 0.0, 1.0]),
    "frequency_penalty": st.sampled_from([-0.2, 0.0, 0.7]),
    "logit_bias": st.dictionaries(st.integers(0, 31), st.sampled_from([-100.0, -1.0, 3.0]), max_size=3),
    "bad_words_ids": st.lists(st.lists(st.integers(0, 31), min_size=1, max_size=2), max_size=6),
}
penalised_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 2**32),
    max_tokens=st.just(40),
    **PENALTIES,
)


def plain_logits(tokens: Sequence[int]) -> torch.Tensor:
    """What the model says after each token, float32 [T, V], without session and loop."""
    return TableModel().append([0], [tokens], [0])[0]


def penalised(logits: NDArray[Any], params: SamplingParams, prompt: Sequence[int], text: Sequence[int]) -> NDArray[Any]:
    """Logits [V] after a text, penalised by the definition, in float64."""
    logits = logits.astype(np.float64)
    for token, bias in params.logit_bias:
        logits[token] += bias
    counts = Counter(text)
    for token in {*prompt, *text}:
        logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
        logits[token] -= params.frequency_penalty * counts[token] + params.presence_penalty * (counts[token] > 0)
    for *begin, last in params.bad_words_ids:
        if list(text)[len(text) - len(begin) :] == begin:
            logits[last] = -np.inf
    return logits


def transcript(params: SamplingParams) -> list[int]:
    """The text by the definition of everything but the model."""
    text: list[int] = []
    for position in range(len(PROMPT), len(PROMPT) + params.max_tokens):
        logits = penalised(plain_logits(PROMPT + text)[-1].numpy(), params, PROMPT, text)
        if params.temperature:
            noise = gumbel(torch.tensor([params.seed]), torch.tensor([position]), len(logits), device="cpu")
            logits = logits / params.temperature + noise[0].numpy()
        text.append(int(logits.argmax()))
    return text


def alone(params: SamplingParams) -> list[int]:
    return Pump(table_pair()[0], []).run(PROMPT, params).tokens


@settings(max_examples=12)
@given(penalised_params)
def test_autoregressive_decoding_follows_the_definition(params: SamplingParams) -> None:
    params = replace(params, top_p=1.0)
    assert alone(params) == transcript(params)


@settings(max_examples=10)
@given(
    params=penalised_params,
    dice=st.randoms(use_true_random=False),
    trouble=st.sampled_from([0.0, 0.3]),
    drafts=st.integers(1, 3),
    agreement=st.sampled_from([0.5, 0.9]),
    lookahead=st.integers(1, 7),
)
def test_no_speculation_changes_a_penalised_text(
    params: SamplingParams, dice: random.Random, trouble: float, drafts: int, agreement: float, lookahead: int
) -> None:
    target, models = table_pair(agreement, drafts)
    turns = lambda: dice.randrange(8)  # noqa: E731
    pump = Pump(target, models, draft_turns=turns, trouble=trouble, seed=params.seed, lookahead=lookahead)
    assert pump.run(PROMPT, params).tokens == alone(params)


@settings(max_examples=6)
@given(params=penalised_params, dice=st.randoms(use_true_random=False), lookahead=st.integers(1, 7))
def test_a_perfect_draft_is_always_right_with_penalties(
    params: SamplingParams, dice: random.Random, lookahead: int
) -> None:
    """So a draft whose penalties look at other tokens than those that lead to an item shows, which no text would."""
    target, models = table_pair(1.0, 2)
    pump = Pump(target, models, draft_turns=lambda: dice.randrange(12), lookahead=lookahead)
    stats = pump.run(PROMPT, replace(params, max_tokens=120)).stats
    assert stats.accepted == stats.speculated


def test_a_perfect_draft_that_joins_late_knows_prompt_and_text_apart() -> None:
    target, models = table_pair(1.0, 1)
    pump = Pump(target, [])
    pump.target.submit(1, PROMPT, SamplingParams(frequency_penalty=0.5, max_tokens=120, seed=1))
    for _ in range(30):
        pump.turn()
    pump.join("late", models[0])
    while pump.texts[1].finish_reason is None:
        pump.turn()
    stats = pump.texts[1].stats
    assert stats.accepted == stats.speculated
    assert stats.hits > 5


@settings(max_examples=12)
@given(
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**32),
    least=st.integers(0, 40),
    lookahead=st.integers(1, 7),
)
def test_a_text_does_not_end_early(temperature: float, seed: int, least: int, lookahead: int) -> None:
    """Drafts know which tokens may not come yet: one that is perfect stays so."""
    params = SamplingParams(
        temperature=temperature, seed=seed, min_tokens=least, max_tokens=60, stop_token_ids=tuple(range(0, 32, 3))
    )
    target, models = table_pair(1.0, 1)
    text = Pump(target, models, lookahead=lookahead, end_tokens=[1]).run(PROMPT, params)
    assert len(text.tokens) >= max(1, least)
    ends = [token == 1 or token % 3 == 0 for token in text.tokens]
    assert not any(ends[:-1])
    assert text.stats.accepted == text.stats.speculated
    assert text.tokens == Pump(target, [], end_tokens=[1]).run(PROMPT, params).tokens


@pytest.mark.parametrize("seed", range(3))
def test_words_that_the_text_is_full_of_do_not_come(seed: int) -> None:
    """Every pair of tokens that it had, one after the other; a perfect draft knows that."""
    params = SamplingParams(seed=seed, max_tokens=60)
    words: set[tuple[int, ...]] = set()
    for _ in range(4):
        target, models = table_pair(1.0, 1)
        barred = replace(params, bad_words_ids=tuple(sorted(words)))
        text = Pump(target, models).run(PROMPT, barred)
        pairs = {*zip(text.tokens, text.tokens[1:], strict=False)}
        assert not pairs & words
        assert text.stats.accepted == text.stats.speculated
        assert text.tokens == alone(barred)
        words |= pairs


# The law of a penalised text in rejection mode

VOCABULARY, LENGTH, ROWS = 3, 4, 10
LAW = SamplingParams(frequency_penalty=1.5, repetition_penalty=1.6, max_tokens=LENGTH)


def small_model() -> TableModel:
    return TableModel(VOCABULARY, contexts=64, order=1, max_length=16, rows=ROWS, scratch=SCRATCH, sharpness=1.0)


def law_of_texts() -> dict[tuple[int, ...], float]:
    """Probabilities of all texts of LENGTH tokens after token 0, by the definition."""
    logits = {t: small_model().append([0], [[t]], [0])[0][0].numpy() for t in range(VOCABULARY)}
    law = {}
    for text in product(range(VOCABULARY), repeat=LENGTH):
        law[text] = 1.0
        for done, token in enumerate(text):
            weights = np.exp(penalised(logits[(0, *text)[done]], LAW, [0], text[:done]))
            law[text] *= weights[token] / weights.sum()
    return law


def p_value(requests: int, **options: Any) -> float:
    """Chi-square of whole texts, so that what one token does to the next ones counts."""
    options |= {"concurrency": ROWS}
    pump = Pump(small_model(), [small_model().perturbed(0.0)], width=2, **options)
    texts = pump.run_all([([0], replace(LAW, seed=seed)) for seed in range(requests)])
    counts = Counter(tuple(text.tokens) for text in texts)
    assert pump.target.stats().tokens_per_round > 1.15
    expected = {text: requests * chance for text, chance in law_of_texts().items()}
    common = [text for text in expected if expected[text] >= 5]
    rare = requests - sum(expected[text] for text in common), requests - sum(counts[text] for text in common)
    statistic = sum((counts[text] - expected[text]) ** 2 / expected[text] for text in common)
    return float(chi2.sf(statistic + (rare[1] - rare[0]) ** 2 / max(rare[0], 1.0), len(common)))


@pytest.mark.parametrize("proposing", [pytest.param(Proposing(), marks=pytest.mark.slow), Proposing(most=2)])
def test_the_law_of_a_penalised_text_is_the_targets(proposing: Proposing) -> None:
    assert p_value(200, proposing=proposing) > 0.001


@pytest.mark.slow
def test_penalties_that_forget_the_speculated_tokens_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: Penalties, logits: torch.Tensor, tokens: Sequence[int], paths: Sequence[Any]) -> torch.Tensor:
        return apply(self, logits, tokens, [[]] * len(paths))

    apply = Penalties.apply
    monkeypatch.setattr(Penalties, "apply", forgetful)
    assert p_value(500, proposing=Proposing()) < 0.001


# Log-probabilities


def check_logprobs(text: Text, most: int) -> None:
    """They are those of the model run plainly over prompt and text."""
    values = plain_logits(PROMPT + text.tokens)[len(PROMPT) - 1 : -1].log_softmax(-1)
    assert [entry.token_id for entry in text.logprobs] == text.tokens
    for row, entry in zip(values, text.logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-5)
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
        top = row.topk(most)
        assert list(entry.top) == top.indices.tolist()
        assert list(entry.top.values()) == pytest.approx(top.values.tolist(), abs=1e-5)


@settings(max_examples=12)
@given(
    params=penalised_params,
    most=st.integers(0, 20),
    drafts=st.integers(0, 2),
    lookahead=st.integers(1, 7),
    proposing=st.sampled_from([None, Proposing()]),
)
def test_log_probabilities_are_the_models_own(
    params: SamplingParams, most: int, drafts: int, lookahead: int, proposing: Proposing | None
) -> None:
    """Before penalties and temperature, in both modes."""
    target, models = table_pair(0.9, drafts)
    pump = Pump(target, models, lookahead=lookahead, proposing=proposing)
    check_logprobs(pump.run(PROMPT, replace(params, logprobs=most)), most)


@pytest.mark.parametrize("lookahead", [4, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 7))])
def test_log_probabilities_end_where_the_text_ends(lookahead: int) -> None:
    """At every token that may end it, in the middle of a round or not, by its id or as text."""
    tokenizer = tiny_tokenizer(32)
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=2)
    free = Pump(*table_pair(0.95, 1), lookahead=lookahead).run(PROMPT, params).tokens
    inside = 0
    for count in range(2, len(free)):
        pair = tokenizer.decode(free[count - 2 : count])
        for stop in ({"stop_token_ids": (free[count - 1],)}, {"stop": pair}):
            if stop == {"stop": ""}:
                continue
            text = Pump(*table_pair(0.95, 1), lookahead=lookahead, tokenizer=tokenizer).run(
                PROMPT, replace(params, **stop)
            )
            assert text.finish_reason == "stop"
            assert text.tokens == free[: len(text.tokens)]
            assert len(text.tokens) <= count
            check_logprobs(text, 2)
            inside += sum((k + 1) * rounds for k, rounds in enumerate(text.stats.accepted)) > len(text.tokens)
    assert inside > 3


def test_log_probabilities_come_only_when_they_are_asked_for() -> None:
    assert Pump(*table_pair()).run(PROMPT, SamplingParams(max_tokens=9)).logprobs == []
