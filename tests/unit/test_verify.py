"""Verification is token equality: the longest prefix that agrees, then the target's own choice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.sampling.verify import Outcome, verify

tokens = st.integers(0, 3)


@pytest.mark.parametrize(
    ("speculation", "choices", "outcome"),
    [
        ([], [7], Outcome(0, 7)),
        ([5], [5, 8], Outcome(1, 8)),
        ([5], [4, 8], Outcome(0, 4)),
        ([1, 2, 3], [1, 2, 3, 4], Outcome(3, 4)),
        ([1, 2, 3], [1, 9, 3, 4], Outcome(1, 9)),  # what agrees after a rejection does not count
    ],
)
def test_outcomes(speculation, choices, outcome):
    assert verify(speculation, choices) == outcome


@given(st.lists(st.tuples(tokens, tokens)), tokens)
def test_what_is_committed_is_what_the_target_chose(pairs, last):
    speculation, choices = [guess for guess, _ in pairs], [choice for _, choice in pairs] + [last]
    outcome = verify(speculation, choices)
    committed = [*speculation[: outcome.accepted], outcome.bonus_token]
    assert committed == choices[: outcome.accepted + 1]
    assert outcome.accepted == len(speculation) or speculation[outcome.accepted] != outcome.bonus_token


@pytest.mark.parametrize("choices", [[], [1], [1, 2, 3]])
def test_one_more_choice_than_guesses_is_needed(choices):
    with pytest.raises(ValueError, match="one choice more"):
        verify([1], choices)


def test_outcomes_are_keys():
    assert {Outcome(1, 2): "branch"}[Outcome(1, 2)] == "branch"
    with pytest.raises(AttributeError):
        Outcome(1, 2).accepted = 3
