"""Log-probabilities of the tokens of a text and of the likeliest ones."""

from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.sampling.logprobs import logprobs

LOGITS = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]]).log() + 3.0


def test_chosen_rank_and_likeliest():
    first, second = logprobs(LOGITS, [1, 3], 2)
    assert first[0::2] == (1, 2)
    assert first[1] == pytest.approx(log(0.25))
    assert list(first[3]) == [0, 1]
    assert first[3] == pytest.approx({0: log(0.5), 1: log(0.25)})
    assert second[0::2] == (3, 1)
    assert second[3] == pytest.approx({3: log(0.4), 2: log(0.3)})


def test_tokens_as_likely_share_a_rank():
    assert [logprobs(LOGITS, [token], 0)[0][2] for token in range(4)] == [1, 2, 3, 3]


def test_no_likeliest_tokens_need_be_named():
    assert logprobs(LOGITS, [0], 0)[0][3] == {}
    assert len(logprobs(LOGITS, [0], 20)[0][3]) == 4


def test_no_tokens_no_entries():
    assert logprobs(LOGITS, [], 5) == []


@given(st.lists(st.lists(st.floats(-50, 50), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(0, 5))
def test_a_row_does_not_depend_on_the_others(rows, most):
    logits = torch.tensor(rows)
    tokens = [number % 5 for number in range(len(rows))]
    together = logprobs(logits, tokens, most)
    assert together == [logprobs(logits[i : i + 1], tokens[i : i + 1], most)[0] for i in range(len(rows))]
    for _, chosen, rank, likeliest in together:
        assert sum(value > chosen for value in likeliest.values()) == min(rank - 1, most)
