"""Verification in coupled mode: the target has made its own choice everywhere, so a guess is right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a verification decides: guesses accepted, and the token that follows them."""

    accepted: int
    bonus_token: int


def verify(speculation: Sequence[int], choices: Sequence[int]) -> Outcome:
    """Compare a speculation of n tokens with the target's n + 1 choices.

    ``choices[0]`` is the target's token after the last bonus token, ``choices[i]`` its token after guess i. No guess
    (n = 0) is plain autoregressive decoding.

    Raises:
        ValueError: not exactly one more choice than guesses.
    """
    if len(choices) != len(speculation) + 1:
        raise ValueError(f"{len(speculation)} guesses need one choice more, got {len(choices)}")
    # The longest prefix of guesses that equal the choices is accepted; the choice where it stops is the bonus token.
    accepted = 0
    while accepted < len(speculation) and speculation[accepted] == choices[accepted]:
        accepted += 1
    return Outcome(accepted, choices[accepted])
