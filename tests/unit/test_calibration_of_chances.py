"""What a draft says of its tokens is believed until the outcomes say otherwise."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.saguaro.calibration import EVERY, Calibration, to_byte


@given(st.floats(0.0, 1.0))
def test_a_probability_survives_its_byte(chance: float) -> None:
    assert 1 <= to_byte(chance) <= 255  # 0 says nothing
    assert to_byte(chance) / 255 == pytest.approx(chance, abs=1 / 255)


@given(st.integers(1, 255), st.integers(0, 20))
def test_at_first_a_draft_is_believed(said: int, depth: int) -> None:
    assert Calibration().chance(said, depth) == pytest.approx(said / 255)


@pytest.mark.parametrize(("says", "is_right"), [(0.95, 0.5), (0.5, 0.95), (0.8, 0.8)])
def test_what_it_is_worth_is_learned(says: float, is_right: float) -> None:
    calibration, dice, said = Calibration(), random.Random(0), to_byte(says)
    for _ in range(1000):
        calibration.saw(said, 2, accepted=dice.random() < is_right)
        calibration.end_round()
    assert calibration.chance(said, 2) == pytest.approx(is_right, abs=0.08)


def test_the_first_token_says_nothing_of_late_ones_nor_sure_ones_of_unsure_ones() -> None:
    calibration = Calibration()
    for _ in range(50):
        calibration.saw(250, 0, accepted=False)
    assert calibration.chance(250, 0) < 0.2
    assert calibration.chance(250, 5) == pytest.approx(250 / 255)
    assert calibration.chance(60, 0) == pytest.approx(60 / 255)


def test_a_draft_that_has_become_better_is_found_out() -> None:
    calibration = Calibration()
    for accepted in (False, True):
        for _ in range(20 * EVERY):
            calibration.saw(128, 1, accepted=accepted)
            calibration.end_round()
    assert calibration.chance(128, 1) > 0.9


def test_what_was_not_tried_for_long_goes_back_to_what_the_draft_says() -> None:
    calibration = Calibration()
    for _ in range(100):
        calibration.saw(128, 1, accepted=False)
    assert calibration.chance(128, 1) < 0.1
    for _ in range(40 * EVERY):
        calibration.end_round()
    assert calibration.chance(128, 1) == pytest.approx(128 / 255, abs=0.01)


@given(st.lists(st.tuples(st.integers(1, 255), st.integers(0, 20), st.booleans()), max_size=200))
def test_chances_are_probabilities_whatever_comes(seen: list[tuple[int, int, bool]]) -> None:
    calibration = Calibration()
    for said, depth, accepted in seen:
        calibration.saw(said, depth, accepted=accepted)
        calibration.end_round()
    for said, depth, _ in seen:
        assert 0.0 <= calibration.chance(said, depth) <= 1.0
