"""Engines whose drafts are heads of EAGLE-3: the texts are the target's, and the heads are of use."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ssd_ray.config import EngineConfig, Method, SamplingParams
from tests.support.engines import engine, in_time, target_alone
from tests.support.heads import authors_config, layer_config, save_head, speculators_config
from tests.support.tiny import save_model, tiny_model
from tests.support.train_head import new_head, published, train

VOCAB, CONTEXT = 96, 160
PROMPTS = [[5, 6, 7, 8] * 4, list(range(1, 80)), [9], [11, 3] * 30]
GREEDY = SamplingParams(max_tokens=50, ignore_eos=True, temperature=0.0)
DRAWN = replace(GREEDY, temperature=1.0, seed=7, repetition_penalty=1.1)
PARAMS = [GREEDY, DRAWN, DRAWN, GREEDY]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A target of four layers, and a head that was trained for a second or two on what the target itself writes."""
    folder = tmp_path_factory.mktemp("pair")
    target = tiny_model("llama", vocab=VOCAB, context=CONTEXT, layers=4, initializer_range=0.1)
    save_model(folder / "target", target)
    config = authors_config(layer_config(target.config), VOCAB)
    head = new_head(target, config)
    texts = target.generate(
        torch.randint(1, VOCAB, (64, 4), generator=torch.Generator().manual_seed(0)), max_new_tokens=40, do_sample=False
    )
    right = train(target, head, lambda number: texts[number % 4 :: 4], batches=30, rate=1e-2, steps=2)
    assert min(right) > 0.3
    weights = published(head)
    save_head(folder / "authors", config, weights)
    save_head(folder / "speculators", speculators_config(layer_config(target.config), VOCAB), weights)
    return str(folder / "target"), str(folder)


@pytest.mark.parametrize(("method", "form"), [("sd", "authors"), ("ssd", "speculators")])
def test_texts_are_the_targets(pair: tuple[str, str], method: Method, form: str) -> None:
    target, folder = pair
    draft = f"{folder}/{form}"
    # With a given lookahead sd waits for it, whether it pays or not.
    config = EngineConfig(target=target, draft=draft, method=method, lookahead=3, prefill_chunk=32, max_num_seqs=4)
    config = replace(config, text_lookup=False)
    expected = target_alone(target, PROMPTS, PARAMS)
    with engine(config, "memory") as generate:

        def attempt() -> tuple[float, int]:
            texts, stats = generate(PROMPTS, PARAMS)
            assert texts == expected
            rounds = sum(each.rounds for each in stats)
            return sum(each.tokens for each in stats) / rounds, sum(each.tree_tokens for each in stats)

        # Whether what a draft makes beside a verification is in time, and pays, is a matter of the machine.
        in_time(attempt, lambda came: came[0] > 1.2 if method == "sd" else came[1] > 0)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_states_travel_by_reference(pair: tuple[str, str]) -> None:
    """Between processes, in frames of which most are too large to be sent as they are."""
    target, folder = pair
    config = EngineConfig(target=target, draft=f"{folder}/authors", text_lookup=False, inline_max_bytes=1024)
    expected = target_alone(target, PROMPTS, PARAMS)
    with engine(config, "ray") as generate:

        def attempt() -> int:
            texts, stats = generate(PROMPTS, PARAMS)
            assert texts == expected
            return sum(each.tree_used for each in stats)

        in_time(attempt, lambda used: used > 0)
