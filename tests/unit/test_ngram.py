"""Prompt lookup against its definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.saguaro.ngram import LONGEST, SHORTEST, NgramIndex


def naive(tokens: list[int], limit: int) -> list[int]:
    for length in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if len(tokens) >= length and tokens[end - length : end] == tokens[-length:]:
                proposal = list(tokens)
                for place in range(end, end + limit):
                    proposal.append(proposal[place])
                return proposal[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 60), st.integers(0, 7))
def test_it_is_the_latest_place_of_the_longest_ngram(tokens: list[int], prompt: int, limit: int) -> None:
    index = NgramIndex(tokens[:prompt])
    for token in tokens[prompt:]:
        index.extend([token])
    assert index.propose(limit) == naive(tokens, limit)


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=6))
def test_what_follows_a_tail_is_what_would_be_proposed_after_it(tokens: list[int], tail: list[int]) -> None:
    following = NgramIndex(tokens).follows(tuple(tail))
    places = [
        tokens[end]
        for length in range(min(LONGEST, len(tail)), SHORTEST - 1, -1)
        for end in range(len(tokens) - 1, length - 1, -1)
        if tokens[end - length : end] == tail[-length:]
    ]
    assert following == (places[0] if places else None)


@pytest.mark.parametrize(
    ("tokens", "proposal"),
    [
        ([1, 2, 3, 4, 9, 1, 2], [3, 4, 9]),
        ([1, 2, 5, 1, 2, 6, 1, 2], [6, 1, 2]),  # the latest place
        ([7, 1, 2, 5, 1, 2, 6, 7, 1, 2], [5, 1, 2]),  # the longer n-gram first
        ([8, 8, 8], [8, 8, 8]),  # a loop is unrolled
        ([1, 2, 3], []),
        ([], []),
    ],
)
def test_examples(tokens: list[int], proposal: list[int]) -> None:
    assert NgramIndex(tokens).propose(3) == proposal
