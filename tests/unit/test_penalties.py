"""Penalties against a naive reference; the same bits however tokens are parted into committed and speculated."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.config import SamplingParams
from ssd_ray.sampling.penalties import Penalties, penalties

V = 12
token_lists = st.lists(st.integers(0, V - 1), max_size=20)
all_params = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3, 7.0]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 0.4]),
    frequency_penalty=st.sampled_from([-0.7, 0.0, 1.9]),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, -1.0, 0.5, 100.0]), max_size=3),
    min_tokens=st.integers(0, 25),
    stop_token_ids=st.lists(st.integers(0, V - 1), max_size=2),
    bad_words_ids=st.lists(st.lists(st.integers(0, V + 1), min_size=1, max_size=3), max_size=4),
)


def random_logits(rows, seed=0):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def reference(row, params, prompt, text):
    """One row in float64, token by token, as vLLM's documentation has it."""
    counts, changed = Counter(text), []
    for token, logit in enumerate(np.asarray(row, np.float64)):
        logit += dict(params.logit_bias).get(token, 0.0)
        if len(text) < params.min_tokens and token in params.stop_token_ids:
            logit = -np.inf
        if any([*text, token][-len(word) :] == list(word) for word in params.bad_words_ids):
            logit = -np.inf
        if token in prompt or token in text:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        changed.append(logit - params.frequency_penalty * counts[token] - params.presence_penalty * (token in text))
    return changed


@given(all_params, token_lists, token_lists, st.lists(token_lists, min_size=1, max_size=4))
def test_every_row_is_penalised_by_its_own_path(params, prompt, text, paths):
    logits = random_logits(len(paths))
    before = logits.clone()
    changed = Penalties(params, len(prompt), V).apply(logits, prompt + text, paths)
    for row, path in enumerate(paths):
        expected = reference(logits[row], params, prompt, text + path)
        np.testing.assert_allclose(changed[row].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits, before)


@given(all_params, token_lists, token_lists, st.lists(st.integers(0, 5), max_size=10))
def test_committed_and_speculated_tokens_give_the_same_bits(params, prompt, text, steps):
    """Token by token, in rounds of any length and at once: what coupled mode's promise rests on."""
    plain, rounds = (Penalties(params, len(prompt), V) for _ in range(2))
    logits = random_logits(len(text) + 1)
    expected = [plain.apply(logits[i : i + 1], prompt + text[:i], [[]]) for i in range(len(text) + 1)]
    done = 0
    for step in [*steps, len(text)]:
        count = min(step, len(text) - done)
        paths = [text[done : done + i] for i in range(count + 1)]
        changed = rounds.apply(logits[done : done + count + 1], prompt + text[:done], paths)
        assert torch.equal(changed, torch.cat(expected[done : done + count + 1]))
        done += count


def test_the_prompt_counts_for_the_repetition_penalty_alone():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    once = Penalties(SamplingParams(repetition_penalty=2.0), 2, 3)
    assert once.apply(logits, [0, 1], [[]]).tolist() == [[1.0, -4.0, 1.0]]
    others = Penalties(SamplingParams(presence_penalty=1.0, frequency_penalty=0.5), 2, 3)
    assert others.apply(logits, [0, 1], [[]]).tolist() == logits.tolist()
    assert others.apply(logits, [0, 1, 2], [[2]]).tolist() == [[2.0, -2.0, -1.0]]


def test_a_bias_comes_before_the_penalties():
    params = SamplingParams(logit_bias={0: 1.0, 1: 3.0}, repetition_penalty=2.0)
    assert Penalties(params, 2, 2).apply(torch.tensor([[1.0, -4.0]]), [0, 1], [[]]).tolist() == [[1.0, -2.0]]


def test_the_last_token_of_a_bad_word_is_barred():
    """Where the text, not the prompt, has the others, also those that are only speculated."""
    params = SamplingParams(bad_words_ids=[[3], [0, 1, 2], [1, 0]], logit_bias={3: 100.0})
    paths = [[], [1], [1, 1], [0], [0, 1], [4]]
    changed = Penalties(params, 2, 5).apply(torch.zeros(6, 5), [0, 1, 0], paths)
    barred = [row.nonzero().ravel().tolist() for row in changed.isinf()]
    assert barred == [[3], [0, 2, 3], [0, 3], [3], [0, 2, 3], [3]]
    changed = Penalties(params, 2, 5).apply(torch.zeros(1, 5), [0, 1], [[]])
    assert changed.isinf()[0].nonzero().ravel().tolist() == [3]


def test_barred_tokens_stay_barred():
    params = SamplingParams(repetition_penalty=0.5, frequency_penalty=-2.0, logit_bias={0: 100.0})
    changed = Penalties(params, 1, 2).apply(torch.full((1, 2), -torch.inf), [0, 0, 1], [[0, 1]])
    assert changed.tolist() == [[-np.inf, -np.inf]]


def test_tokens_that_a_smaller_model_does_not_know_are_no_concern_of_it():
    params = SamplingParams(
        repetition_penalty=2.0, logit_bias={5: 3.0}, min_tokens=5, stop_token_ids=(6,), bad_words_ids=((0, 5),)
    )
    changed = Penalties(params, 1, 2).apply(torch.ones(1, 2), [0, 7], [[8]])
    assert changed.tolist() == [[0.5, 1.0]]


def test_without_penalties_there_is_nothing():
    assert penalties(SamplingParams(temperature=0.3, top_p=0.5, logprobs=3), 4, V) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_give_the_same_bits():
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.1, logit_bias={3: 0.3})
    logits, paths = random_logits(3), [[], [1], [1, 1]]
    on_gpu = Penalties(params, 2, V).apply(logits.cuda(), [0, 1, 2, 2], paths).cpu()
    assert torch.equal(on_gpu, Penalties(params, 2, V).apply(logits, [0, 1, 2, 2], paths))
