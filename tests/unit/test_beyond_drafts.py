"""A draft of a smaller vocabulary or a shorter context narrows nothing: rows beyond it go on without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ssd_ray.config import EngineConfig, Method, SamplingParams
from ssd_ray.models.loader import load_runner
from ssd_ray.models.table import TableModel
from ssd_ray.speculation.window import SCRATCH
from tests.support.engines import engine, target_alone
from tests.support.pump import Pump, Text, ticking
from tests.support.tiny import save_model, tiny_model

TARGET = TableModel(32, order=2, scratch=SCRATCH, rows=3, sharpness=4.0)
PARAMS = SamplingParams(max_tokens=60, temperature=0.7, seed=3, repetition_penalty=1.1, logit_bias={31: 1.0})


class Bounded(TableModel):
    """A table model that fails on what it does not know, as a model with tables of tokens and positions does."""

    def extend(self, rows, tokens, positions, slots, visible):  # type: ignore[no-untyped-def]
        assert int(tokens.max()) < self.vocab_size, "an unknown token"
        assert int(positions.max()) < self.max_length, "an unknown position"
        return super().extend(rows, tokens, positions, slots, visible)


def draft(vocab_size: int = 32, max_length: int = 256) -> Bounded:
    """The target, but for what it does not know."""
    model = Bounded(32, order=2, scratch=SCRATCH, rows=3, sharpness=4.0, max_length=max_length)
    model._table, model.vocab_size = model._table[:, :vocab_size], vocab_size
    return model


def texts(drafts: list[TableModel], prompts: list[list[int]], params: SamplingParams = PARAMS) -> list[Text]:
    pump = Pump(TARGET.perturbed(1.0), drafts, concurrency=3, clock=ticking)
    for number, prompt in enumerate(prompts):
        pump.target.submit(number, prompt, params)
    while len(pump.texts) < len(prompts) or any(text.finish_reason is None for text in pump.texts.values()):
        pump.turn()
    for each in pump.drafts:
        each.turn(0.0)
        assert not each.sequences
        assert each.pool.available == each.pool.size
    return [pump.texts[number] for number in range(len(prompts))]


def test_a_row_longer_than_the_draft_can_take_goes_on_without_it() -> None:
    prompts = [[1, 2, 3], list(range(30)), [5, 6] * 30]
    plain, drafted = texts([], prompts), texts([draft(max_length=40)], prompts)
    assert [text.tokens for text in drafted] == [text.tokens for text in plain]
    short, longer, beyond = (text.stats for text in drafted)
    assert short.hits > 5
    assert short.misses.no_draft > 5, "from the 40th token on"
    assert longer.tree_tokens > 0
    assert beyond.tree_tokens == 0
    assert beyond.misses.no_draft >= beyond.rounds - 3, "from when the draft has said so"


def test_a_row_with_a_token_that_the_draft_does_not_know_goes_on_without_it() -> None:
    prompts = [[1, 2, 3], [1, 30, 3]]
    params = replace(PARAMS, logit_bias={31: 1.5})
    plain, drafted = texts([], prompts, params), texts([draft(vocab_size=28)], prompts, params)
    assert [text.tokens for text in drafted] == [text.tokens for text in plain]
    assert max(drafted[0].tokens) >= 28, "it is written, too"
    assert drafted[0].stats.tree_tokens > 0
    assert drafted[0].stats.misses.no_draft > 0
    assert drafted[1].stats.tree_tokens == 0


def test_a_larger_draft_serves_the_rows_beyond_a_smaller_one() -> None:
    prompts = [[1, 30, 3]]
    (text,) = texts([draft(vocab_size=28), draft()], prompts)
    assert text.tokens == texts([], prompts)[0].tokens
    assert text.stats.tokens > 3 * text.stats.rounds
    assert text.stats.misses.no_draft == 0


def cut(model: PreTrainedModel, vocab: int, context: int) -> PreTrainedModel:
    """The model with the first tokens and positions alone."""
    small = tiny_model("gpt2", vocab=vocab, context=context)
    whole = model.state_dict()
    with torch.no_grad():
        for name, weight in small.state_dict().items():
            weight.copy_(whole[name][tuple(slice(size) for size in weight.shape)])
    return small


def test_a_draft_with_smaller_tables_changes_no_text(tmp_path: Path) -> None:
    model = tiny_model("gpt2", vocab=120, context=160)
    target = str(save_model(tmp_path / "target", model))
    small = str(save_model(tmp_path / "draft", cut(model, vocab=110, context=64)))
    prompts = [[5, 6, 7, 8] * 3, [115, 3, 4, 5], list(range(1, 80))]
    greedy = SamplingParams(max_tokens=70, ignore_eos=True, temperature=0.0)
    biased = replace(greedy, temperature=1.0, repetition_penalty=1.2, logit_bias={118: 2.0}, min_tokens=5)
    params = [greedy, biased, greedy]
    expected = target_alone(target, prompts, params)
    assert [len(tokens) for tokens in expected] == [70, 70, 70]
    methods: list[Method] = ["sd", "ssd"]
    for method in methods:
        config = EngineConfig(target=target, draft=small, method=method, max_model_len=160)
        with engine(config, "memory") as generate:
            assert generate(prompts, params)[0] == expected
            # The draft is there still; a text this short may be over before it says anything.
            short = replace(greedy, max_tokens=8)
            assert any(generate(prompts[:1], short)[1][0].tree_tokens for _ in range(30))


def test_a_draft_keeps_its_own_limits(tmp_path: Path) -> None:
    folder = str(save_model(tmp_path, tiny_model("gpt2", context=48)))
    runner = load_runner(folder, role="draft", rows=1, scratch=SCRATCH, max_length=4096, device="cpu")
    assert runner.max_length == 48
    assert load_runner(folder, role="draft", rows=1, scratch=SCRATCH, max_length=20, device="cpu").max_length == 20
