"""Working ahead against working when asked: the better way is found, kept, and found again when it changes."""

from __future__ import annotations

import random

import pytest

from ssd_ray.saguaro.contest import FIRST_ROUNDS, SETTLING, Contest


def play(contest: Contest, ahead: float, asked: float, *, rows: int, rounds: int, noise: float, seed: int = 0) -> float:
    """Rounds whose scores are those of the way that they go; the part of them that worked ahead."""
    dice, count = random.Random(seed), 0
    for _ in range(rounds):
        count += contest.ahead
        mean = sum(dice.gauss(ahead if contest.ahead else asked, noise) for _ in range(rows)) / rows
        contest.saw_round(rows, mean)
    return count / rounds


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize(("ahead", "asked"), [(1.3, 1.0), (1.0, 1.3), (2.0, 1.5), (1.2, 2.0)])
def test_the_better_way_is_found_and_kept(ahead: float, asked: float, rows: int, seed: int) -> None:
    contest = Contest()
    play(contest, ahead, asked, rows=rows, rounds=100, noise=0.2, seed=seed)
    share = play(contest, ahead, asked, rows=rows, rounds=400, noise=0.2, seed=seed + 100)
    assert share > 0.9 if ahead > asked else share < 0.1


@pytest.mark.parametrize("rows", [1, 16])
def test_what_trying_costs_is_little(rows: int) -> None:
    """Over the first rounds, and later on."""
    for rounds, least in ((60, 0.9), (1000, 0.985)):
        contest = Contest()
        share = play(contest, 1.0, 1.25, rows=rows, rounds=rounds, noise=0.2)
        assert (share + (1.0 - share) * 1.25) / 1.25 > least


def test_a_change_is_followed() -> None:
    contest = Contest()
    play(contest, 1.0, 1.3, rows=16, rounds=300, noise=0.1)
    assert not contest.ahead
    play(contest, 1.5, 1.3, rows=16, rounds=800, noise=0.1)
    assert contest.ahead


def test_rounds_after_a_change_do_not_count() -> None:
    contest = Contest()
    for _ in range(FIRST_ROUNDS):
        contest.saw_round(100, 1e9)
    while contest.ahead:
        contest.saw_round(100, 1.0)
    for _ in range(SETTLING):
        contest.saw_round(100, 0.0)
    play(contest, 1.0, 1.5, rows=100, rounds=20, noise=0.0)
    assert not contest.ahead


def test_a_way_that_is_taken_from_outside_is_another_one_or_not() -> None:
    contest = Contest()
    assert not contest.take(ahead=True)
    assert contest.take(ahead=False)
    assert contest.take(ahead=True)
