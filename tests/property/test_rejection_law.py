"""Rejection mode, one verification at a time: the law of what is committed is the target's, whatever was proposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from ssd_ray.sampling import rejection
from ssd_ray.sampling.noise import gumbel
from ssd_ray.sampling.rejection import (
    Proposal,
    Proposing,
    proposal_of,
    saguaro,
    sound,
    stream_seed,
    truncate,
    verify_by_rejection,
    weigh,
)
from ssd_ray.sampling.verify import Outcome

torch.set_num_threads(1)

VOCABULARY = 6
TRIALS = 1200
Propose = Callable[[torch.Tensor, torch.Tensor], tuple[int, Proposal | None]]


def laws(seed: int) -> torch.Tensor:
    """Distributions after no token and after each token, float32 [1 + V, V]."""
    generator = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(1 + VOCABULARY, VOCABULARY, generator=generator)).softmax(-1)


P, Q = laws(1), laws(2)


def noise(stream: str, positions: Sequence[int], seeds: torch.Tensor) -> torch.Tensor:
    """Float32 [positions, trials, V]."""
    keys = torch.tensor([stream_seed(int(seed), stream) for seed in seeds])
    return torch.stack([gumbel(keys, torch.full_like(keys, at), VOCABULARY, device="cpu") for at in positions])


SEEDS = torch.arange(TRIALS)
NOISE = {stream: noise(stream, range(3), SEEDS) for stream in rejection.STREAMS}


def p_value(propose: Propose, length: int = 2, verify: Callable[..., Outcome] = verify_by_rejection) -> float:
    """Chi-square of the first two committed tokens against P, over all trials."""
    pairs = np.zeros((1 + VOCABULARY, VOCABULARY))
    for trial in range(TRIALS):
        tokens, proposals, last = [], [], -1
        for depth in range(length):
            token, proposal = propose(Q[1 + last], NOISE["draft"][depth, trial])
            tokens.append(token)
            proposals.append(proposal)
            last = token
        probabilities = torch.stack([P[0], *(P[1 + token] for token in tokens)])
        coins = torch.exp(-torch.exp(-NOISE["accept"][: length + 1, trial, 0]))
        draft_noise, noise = (NOISE[stream][: length + 1, trial] for stream in ("draft", "bonus"))
        outcome = verify(tokens, probabilities, proposals, draft_noise, coins, noise)
        committed = [*tokens[: outcome.accepted], outcome.bonus_token]
        pairs[0, committed[0]] += 1
        if len(committed) > 1:
            pairs[1 + committed[0], committed[1]] += 1
    rows = pairs.sum(1) > 50
    expected = P.numpy()[rows] * pairs[rows].sum(1, keepdims=True)
    return float(chi2.sf(((pairs[rows] - expected) ** 2 / expected).sum(), rows.sum() * (VOCABULARY - 1)))


def sampled(c: float = 1.0, most: int = 0, guesses: int = 2) -> Propose:
    """Drawn from the draft's law, changed by C and cut to its top M."""

    def propose(law: torch.Tensor, noise: torch.Tensor) -> tuple[int, Proposal | None]:
        (token,), (drawn_from,) = Proposing(most).draw(law[None], [guesses], c, noise[None])
        return token, proposal_of(drawn_from, VOCABULARY)

    return propose


def fixed(law: torch.Tensor, noise: torch.Tensor) -> tuple[int, Proposal | None]:
    return int(law.argmax()), None


def liar(law: torch.Tensor, noise: torch.Tensor) -> tuple[int, Proposal | None]:
    """Always the same token, said to come from a law in which it is rare."""
    weights = torch.full((VOCABULARY,), 0.98 / (VOCABULARY - 1)).index_fill(0, torch.tensor([3]), 0.02)
    return 3, Proposal(torch.arange(VOCABULARY), weights)


@pytest.mark.parametrize(("c", "most"), [(1.0, 0), (0.5, 4), (0.0, 2)])
def test_the_law_is_the_targets(c: float, most: int) -> None:
    assert p_value(sampled(c, most)) > 0.001


@pytest.mark.parametrize("propose", [fixed, liar], ids=["a fixed guess", "a lie"])
@pytest.mark.parametrize("length", [0, 1, 2])
def test_what_was_not_sampled_changes_nothing(propose: Propose, length: int) -> None:
    assert p_value(propose, length) > 0.001


def test_a_lie_that_is_believed_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "draw", lambda tokens, weights, noise: torch.tensor([3]))
    assert p_value(liar) < 0.001


def test_taking_a_stray_token_because_it_is_the_targets_favourite_is_found_out() -> None:
    def shortcut(speculation, probabilities, proposals, draft_noise, coins, noise):  # type: ignore[no-untyped-def]
        accepted = 0
        while accepted < len(speculation) and speculation[accepted] == int(probabilities[accepted].argmax()):
            accepted += 1
        rest = (each[accepted : accepted + 1] for each in (draft_noise, coins, noise))
        return Outcome(accepted, verify_by_rejection([], probabilities[accepted:], [], *rest).bonus_token)

    assert p_value(lambda law, noise: (int(P[0].argmax()), None), verify=shortcut) < 0.001


def test_a_bonus_token_that_is_not_from_the_residual_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def propose(law: torch.Tensor, noise: torch.Tensor) -> tuple[int, Proposal | None]:
        token, _ = sampled(c=0.2)(law, noise)
        return token, Proposal(torch.tensor([token]), torch.ones(1))

    assert p_value(propose) > 0.001  # a law that names one token is a fixed guess
    monkeypatch.setattr(rejection, "_residual", lambda p, token, proposal: p)
    assert p_value(propose) < 0.001


probabilities = st.lists(st.floats(0.0, 1.0), min_size=2, max_size=12).filter(lambda values: sum(values) > 0.01)


@given(probabilities, st.integers(0, 12), st.floats(0.0, 1.0))
def test_saguaro_moves_mass_away_from_the_guesses_alone(values: list[float], guesses: int, c: float) -> None:
    q = torch.tensor([values], dtype=torch.float32)
    q /= q.sum()
    changed = saguaro(q, [guesses], c)
    assert float(changed.sum()) == pytest.approx(1.0, abs=1e-5)
    top = q.topk(min(guesses + 1, len(values))).indices
    assert float(changed.gather(-1, top).sum()) <= float(q.gather(-1, top).sum()) + 1e-5


@given(probabilities, st.integers(0, 12))
def test_truncation_keeps_the_largest(values: list[float], most: int) -> None:
    q = torch.tensor([values], dtype=torch.float32)
    q /= q.sum()
    tokens, kept = truncate(q, most)
    assert float(kept.sum()) == pytest.approx(1.0, abs=1e-5)
    assert tokens.shape[-1] == (most if 0 < most < len(values) else len(values))
    assert float(q.gather(-1, tokens).min()) >= float(q.sort(descending=True).values[0, tokens.shape[-1] - 1]) - 1e-7


@pytest.mark.parametrize(
    "proposal",
    [
        Proposal(torch.tensor([1, 2]), torch.tensor([1.0])),
        Proposal(torch.tensor([], dtype=torch.int64), torch.tensor([])),
        Proposal(torch.tensor([1, 1]), torch.tensor([0.5, 0.5])),
        Proposal(torch.tensor([1, 2]), torch.tensor([0.5, 0.6])),
        Proposal(torch.tensor([1, 2]), torch.tensor([1.5, -0.5])),
        Proposal(torch.tensor([1, 2]), torch.tensor([1.0, torch.nan])),
        Proposal(torch.tensor([1, 99]), torch.tensor([0.5, 0.5])),
        Proposal(torch.tensor([-1, 1]), torch.tensor([0.5, 0.5])),
    ],
)
def test_what_is_no_law_is_not_sound(proposal: Proposal) -> None:
    assert not sound(proposal, VOCABULARY)


@given(probabilities, probabilities, st.integers(0, 12), st.sampled_from([0, 3]))
def test_what_another_c_would_have_done(ps: list[float], qs: list[float], guesses: int, most: int) -> None:
    """Against the definition, law by law."""
    size = min(len(ps), len(qs))
    p, q = (torch.tensor(values[:size], dtype=torch.float32) + 0.01 for values in (ps, qs))
    p, q = p / p.sum(), q / q.sum()
    tokens, weights = truncate(q[None], most)
    proposal = Proposal(tokens[0], weights[0], weights[0], guesses)
    for c, (accepted, hits) in zip((1.0, 0.5, 0.0), weigh(p, proposal, (1.0, 0.5, 0.0)), strict=True):
        law = torch.zeros(size).scatter(0, tokens[0], saguaro(weights, [guesses], c)[0])
        assert accepted == pytest.approx(float(torch.minimum(p, law).sum()), abs=1e-5)
        residual = (p - law).clamp(min=0.0)
        guessed = tokens[0][weights[0].topk(min(guesses + 1, len(tokens[0]))).indices]
        assert hits * (1.0 - accepted) == pytest.approx(float(residual[guessed].sum()), abs=1e-5)
