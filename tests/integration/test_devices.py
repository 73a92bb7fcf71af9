"""Logits on a device that is not the processor: whatever a request asks for, the text is the one that it has here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ssd_ray.config import SamplingParams
from ssd_ray.sampling.rejection import Proposing
from tests.support.elsewhere import CUDA, Elsewhere, RunnerThere, there
from tests.support.pump import Pump, table_pair

PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(temperature=1.0, seed=3),
    "filtered": SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=4),
    "penalised": SamplingParams(
        temperature=0.8,
        seed=5,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={3: 2.0},
        bad_words_ids=[[4], [5, 6]],
        stop_token_ids=[7],
        min_tokens=4,
    ),
    "told": SamplingParams(temperature=1.0, seed=6, logprobs=3),
}
SIZES = {"order": 2, "rows": 2, "max_length": 96}
PROMPTS = [[1, 2, 3], [9, 8, 7, 6]]


def texts(params: SamplingParams, proposing: Proposing | None, *, away: bool) -> list[tuple[object, ...]]:
    target, drafts = table_pair(vocab_size=24, **SIZES)
    runners = [RunnerThere(each) if away else each for each in (target, *drafts)]
    pump = Pump(runners[0], runners[1:], proposing=proposing)
    requests = [(prompt, replace(params, max_tokens=8)) for prompt in PROMPTS]
    return [(text.tokens, text.error, len(text.logprobs)) for text in pump.run_all(requests)]


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("proposing", [None, Proposing(most=8)], ids=["coupled", "rejection"])
def test_texts_are_the_same(params: SamplingParams, proposing: Proposing | None) -> None:
    expected = texts(params, proposing, away=False)
    assert all(error is None and tokens for tokens, error, _ in expected)
    with Elsewhere():
        assert texts(params, proposing, away=True) == expected


def test_the_device_keeps_to_itself() -> None:
    with Elsewhere():
        away, near = there(torch.ones(3)), torch.ones(3)
        assert away.is_cuda
        assert (away + 1).device == CUDA
        assert torch.zeros(3, device="cuda").is_cuda
        assert not away.cpu().is_cuda
        assert near.to(away.device).is_cuda
        assert away.to(torch.int64).is_cuda
        assert away[torch.tensor([0, 2])].tolist() == [1.0, 1.0]
        for mixed in (lambda: away + near, lambda: near.add_(away), lambda: torch.cat([near, away])):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            away.numpy()
