"""Policies: which outcomes, and how long to wait."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.saguaro.backup import Pace, best_length
from ssd_ray.saguaro.fanout import MAX_RANK, POLICIES, FanOutPolicy, Geometric, Histogram


@pytest.mark.parametrize("name", POLICIES)
@given(rounds=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.none() | st.integers(0, 99)), max_size=30))
def test_weights_are_a_distribution_whatever_was_seen(name: str, rounds: list[tuple[int, int, int | None]]) -> None:
    policy: FanOutPolicy = POLICIES[name]()
    for n, accepted, rank in rounds:
        policy.observe(n, min(accepted, n), rank)
    for n in range(8):
        weights = policy.depths(n)
        assert len(weights) == n + 1
        assert sum(weights) == pytest.approx(1.0)
        assert min(weights) > 0.0
    for full in (False, True):
        ranks = policy.ranks(full)
        assert len(ranks) == MAX_RANK
        assert sum(ranks) == pytest.approx(1.0)


def test_histogram_learns_what_it_sees() -> None:
    policy = Histogram()
    for accepted in itertools.islice(itertools.cycle([0, 4, 4, 4]), 400):
        policy.observe(4, accepted, 0)
    weights = policy.depths(4)
    assert weights[0] == pytest.approx(0.25, abs=0.05)
    assert weights[4] == pytest.approx(0.75, abs=0.05)


def test_geometric_is_the_closed_form() -> None:
    policy = Geometric()
    for _ in range(500):
        policy.observe(4, 4, 0)
        policy.observe(4, 0, 0)
    a = 4 / 5
    expected = [a**k * (1 - a) for k in range(4)] + [a**4]
    assert list(policy.depths(4)) == pytest.approx(expected, rel=0.05)


def test_without_speculation_all_weight_is_on_none_accepted() -> None:
    assert all(list(policy().depths(0)) == [1.0] for policy in POLICIES.values())


@given(
    available=st.integers(0, 7),
    most=st.integers(0, 7),
    acceptance=st.lists(st.floats(0.0, 1.0), min_size=7, max_size=7),
    verify_ms=st.floats(1, 100),
    step_ms=st.floats(0.1, 100),
    delay_ms=st.floats(0, 10),
)
def test_best_length_is_the_best_of_all(
    available: int, most: int, acceptance: list[float], verify_ms: float, step_ms: float, delay_ms: float
) -> None:
    chosen = best_length(available, most, acceptance, verify_ms=verify_ms, step_ms=step_ms, delay_ms=delay_ms)

    def rate(length: int) -> float:
        gain = sum(_product(acceptance[:n]) for n in range(length + 1))
        steps = max(0, length - available)
        return gain / (verify_ms + steps * step_ms + (delay_ms if steps else 0.0))

    lengths = range(min(available, most), most + 1)
    assert chosen in lengths
    assert rate(chosen) >= max(map(rate, lengths)) * 0.999


def _product(values: list[float]) -> float:
    result = 1.0
    for value in values:
        result *= value
    return result


def test_a_slow_draft_is_not_waited_for_and_a_fast_one_is() -> None:
    pace = Pace()
    assert pace.best_length(2, 7) == 7
    pace.saw_verification(20.0, 0, 0)
    pace.saw_step(200.0)
    assert pace.best_length(0, 7) == 0
    for _ in range(200):
        pace.saw_step(1.0)
    assert pace.best_length(0, 7) >= 3
    assert pace.patience_ms(3) < 20.0
