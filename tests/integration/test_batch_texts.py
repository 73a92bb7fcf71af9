"""16 different requests write the same texts, token for token, alone and together, with any memory and drafts.

Real models with random weights, in float32 unless a test says otherwise, in threads over memory channels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ssd_ray.config import EngineConfig, Method, SamplingParams
from ssd_ray.models.info import load_tokenizer
from tests.support.engines import engine, in_time
from tests.support.tiny import save_model, tiny_model, tiny_pair

ROWS = 16
CONTEXT = 256
TOKENS = 120
PAGE_GIB = 64 * 256 / 2**30
"""A page of either model: 64 tokens of 2 layers, 2 heads, 8 numbers each of K and V."""

SMALL = 10 * PAGE_GIB
"""Room for one of the longest sequences on a draft; all texts together take four times as much."""

Requests = tuple[list[list[int]], list[SamplingParams]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """The reference: one request after the other, without speculation."""
    target, draft = tiny_pair(tmp_path_factory.mktemp("pair"), context=CONTEXT)
    return EngineConfig(
        target=target, draft=draft, method="ar", dtype="float32", device="cpu", max_num_seqs=ROWS, prefill_chunk=64
    )


def prompt(number: int) -> list[int]:
    """1 to 79 tokens; half of the prompts begin alike."""
    begin = list(range(1, 51)) if number % 4 < 2 else []
    return [*begin, number + 1, *((7 * number + place) % 90 + 1 for place in range(7 * (number % 4) * (number % 5)))]


def params(number: int) -> SamplingParams:
    """Temperatures 0 and 1; penalties and a bias on every third."""
    plain = SamplingParams(temperature=number % 2, seed=number, max_tokens=TOKENS, ignore_eos=True)
    if number % 3:
        return plain
    return replace(plain, repetition_penalty=1.2, frequency_penalty=0.3, logit_bias={7: 2.0})


def alone(config: EngineConfig, requests: Requests) -> list[list[int]]:
    with engine(config, "memory") as generate:
        return [generate([prompt], params)[0][0] for prompt, params in zip(*requests, strict=True)]


@dataclass(frozen=True)
class Case:
    """Requests, and the text of each alone."""

    requests: Requests
    expected: list[list[int]]


@pytest.fixture(scope="module")
def case(config: EngineConfig) -> Case:
    """Every fifth text ends at a string that it would have in the middle."""
    prompts, several = [prompt(number) for number in range(ROWS)], [params(number) for number in range(ROWS)]
    texts = alone(config, (prompts, several))
    decode = load_tokenizer(config.target).decode
    ending = range(0, ROWS, 5)
    for number in ending:
        tail = decode(texts[number][TOKENS // 2 :], skip_special_tokens=True)
        several[number] = replace(several[number], stop=tail[:3])
    for number, text in zip(ending, alone(config, (prompts[::5], several[::5])), strict=True):
        assert text == texts[number][: len(text)] != texts[number]
        texts[number] = text
    assert len({tuple(text) for text in texts}) == ROWS
    return Case((prompts, several), texts)


@pytest.mark.parametrize("kv_memory", ["auto", SMALL], ids=["much memory", "little memory"])
@pytest.mark.parametrize("drafts", [1, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 2))])
def test_together(config: EngineConfig, case: Case, drafts: int, kv_memory: float) -> None:
    config = replace(config, method="ssd", num_drafts=drafts, kv_memory=kv_memory)
    with engine(config, "memory") as generate:

        def serve() -> tuple[bool, bool]:
            texts, stats = generate(*case.requests)
            assert texts == case.expected
            return sum(each.preemptions for each in stats) > 0, sum(each.tree_tokens for each in stats) > 0

        in_time(serve, lambda seen: seen == (kv_memory == SMALL, drafts > 0))


@pytest.mark.slow
def test_together_in_half_precision(config: EngineConfig) -> None:
    """Also of requests that gave their memory back: their texts' KV is written again as it was written first."""
    config = replace(config, dtype="bfloat16")
    requests = [prompt(number) for number in range(0, ROWS, 2)], [params(number) for number in range(0, ROWS, 2)]
    with engine(replace(config, method="ssd", num_drafts=1, kv_memory=SMALL / 2), "memory") as generate:
        texts, stats = generate(*requests)
    assert sum(each.preemptions for each in stats) > 0
    assert texts == alone(config, requests)


def test_alone_with_a_draft(config: EngineConfig, case: Case) -> None:
    prompts, params = case.requests
    assert alone(replace(config, method="ssd"), (prompts[::3], params[::3])) == case.expected[::3]


def test_together_with_a_draft_in_turn(config: EngineConfig, case: Case) -> None:
    """Its tokens always come in time, so that many are accepted."""
    with engine(replace(config, method="sd", lookahead=4), "memory") as generate:
        texts, stats = generate(*case.requests)
    assert texts == case.expected
    assert sum(each.rounds for each in stats) < 0.7 * sum(each.tokens for each in stats)


def test_a_draft_in_turn_without_memory_is_not_waited_for(config: EngineConfig, case: Case) -> None:
    prompts, params = case.requests
    brief = [replace(each, max_tokens=TOKENS // 8) for each in params]
    with engine(replace(config, method="sd", kv_memory=SMALL), "memory") as generate:
        assert generate(prompts, brief)[0] == [text[: TOKENS // 8] for text in case.expected]


@pytest.mark.parametrize("method", ["ar", "sd"])
def test_the_tokenizers_own_end_token_ends_a_text(tmp_path: Path, method: Method) -> None:
    folder = save_model(tmp_path, tiny_model())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [95]}))  # the tokenizer's is 0
    with engine(EngineConfig(target=folder, draft=folder, method=method, device="cpu"), "memory") as generate:
        assert generate([[1, 2, 3]], SamplingParams(max_tokens=5, logit_bias={0: 100}))[0] == [[0]]
