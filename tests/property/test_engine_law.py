"""The law of what the whole loop writes, drafts and all, is the target's."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import chi2

from ssd_ray.config import SamplingParams
from ssd_ray.models.table import TableModel
from ssd_ray.sampling import rejection, verifier
from ssd_ray.sampling.rejection import Proposing
from ssd_ray.sampling.verify import Outcome
from ssd_ray.speculation.window import SCRATCH
from tests.support.pump import Pump

VOCABULARY = 5
REQUESTS, LENGTH, ROWS = 100, 210, 10


def p_value(
    *, temperature: float, requests: int = REQUESTS, trouble: float = 0.0, lives: int = 0, **options: object
) -> float:
    """Chi-square of requests * LENGTH tokens against the target's law, given the token before each.

    The number of turns that a draft gets varies, so that speculations are whole, partial and missing. A target lives
    for some number of turns, ``lives`` on an average, 0 for ever.
    """
    model = TableModel(VOCABULARY, contexts=64, order=1, max_length=224, rows=ROWS, scratch=SCRATCH, sharpness=1.0)
    dice = random.Random(0)
    turns = lambda: dice.choice([0, 0, 1, 2, 3])  # noqa: E731
    draft = model.perturbed(0.0)
    options |= {"concurrency": ROWS, "draft_turns": turns, "trouble": trouble}
    pump = Pump(model, [draft], width=2, **options)  # type: ignore[arg-type]
    params = [SamplingParams(temperature=temperature, max_tokens=LENGTH, seed=seed) for seed in range(requests)]
    if lives:
        turn = pump.turn

        def mortal() -> None:
            turn()
            if dice.random() < 1.0 / lives:
                pump.target.turn(0.0)  # of which nobody hears
                pump.lose_target(model.perturbed(1.0))

        pump.turn = mortal  # type: ignore[method-assign]
    texts = pump.run_all([([each.seed % VOCABULARY], each) for each in params])
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for each, text in zip(params, texts, strict=True):
        for before, token in pairwise([each.seed % VOCABULARY, *text.tokens]):
            counts[before][token] += 1
    assert sum(sum(row.values()) for row in counts.values()) == requests * LENGTH
    assert trouble or lives or pump.target.stats().tokens_per_round > 1.05  # with a C of 0 little is accepted
    statistic = sum(_statistic(model, before, row, temperature) for before, row in counts.items())
    return float(chi2.sf(statistic, len(counts) * (VOCABULARY - 1)))


def _statistic(model: TableModel, before: int, row: Counter[int], temperature: float) -> float:
    law = model.distribution([before]) ** (1.0 / temperature)
    expected = law / law.sum() * sum(row.values())
    observed = np.array([row[token] for token in range(VOCABULARY)])
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.7])
@pytest.mark.parametrize("requests", [15, pytest.param(REQUESTS, marks=pytest.mark.slow)])
def test_the_law_is_the_targets(temperature: float, requests: int) -> None:
    assert p_value(temperature=temperature, requests=requests) > 0.001


@pytest.mark.parametrize(("c", "most"), [pytest.param(1.0, 0, marks=pytest.mark.slow), ("auto", 4)])
def test_the_law_is_the_targets_in_rejection_mode(c: float | str, most: int) -> None:
    assert p_value(temperature=1.0, requests=12, proposing=Proposing(most), saguaro_c=c) > 0.001


def test_targets_that_die_do_not_change_the_law_in_rejection_mode() -> None:
    assert p_value(temperature=1.0, requests=5, proposing=Proposing(4), lives=20) > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("c", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("most", [0, 64, 4])
def test_the_law_is_the_targets_in_rejection_mode_at_length(temperature: float, c: float, most: int) -> None:
    assert p_value(temperature=temperature, proposing=Proposing(most), saguaro_c=c) > 0.001


def test_troubled_messages_do_not_change_the_law() -> None:
    assert p_value(temperature=1.0, requests=12, proposing=Proposing(4), saguaro_c=0.7, trouble=0.2) > 0.001


@pytest.mark.slow
def test_drafts_that_know_the_coin_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Independence of the streams is what makes rejection exact: with one stream for all it is not."""
    monkeypatch.setattr(rejection, "STREAMS", dict.fromkeys(rejection.STREAMS, 1))
    assert p_value(temperature=1.0, requests=22, proposing=Proposing()) < 0.001


def test_a_verification_that_favours_the_draft_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepting a wrong guess when it is one certain token must not pass."""

    def lenient(speculation: Sequence[int], choices: Sequence[int]) -> Outcome:
        accepted = 0
        while accepted < len(speculation):
            if speculation[accepted] not in (choices[accepted], 0):
                break
            accepted += 1
        return Outcome(accepted, choices[accepted])

    monkeypatch.setattr(verifier, "verify", lenient)
    assert p_value(temperature=1.0, requests=12) < 0.001


def test_noise_that_is_used_twice_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(self: object, positions: Sequence[int]) -> object:
        return rows(self, [position // 2 * 2 for position in positions])  # type: ignore[arg-type]

    rows = verifier.NoiseRows.rows
    monkeypatch.setattr(verifier.NoiseRows, "rows", stuck)
    assert p_value(temperature=1.0, requests=12) < 0.001
