"""The simulator against closed forms, and against what was published."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ssd_ray.bench.simulate import Hardware, Pair, ar, sd, several_drafts, ssd

PAPER_ACCEPTED = [0.130, 0.094, 0.070, 0.058, 0.048, 0.042, 0.035, 0.523]
LLAMA = Pair(PAPER_ACCEPTED, PAPER_ACCEPTED, hit_rate=0.88)
"""Llama-3.1-70B and 1B, greedy, K = 7: accept lengths and hit rate as the paper's engine measured them."""

H100 = Hardware(verify_ms=17.8, step_ms=1.9, host_ms=3.3, message_ms=0.3)
"""4 + 1 H100: the verification from plain decoding, the rest from the share of a round spent verifying (0.79)."""


@pytest.mark.parametrize(
    ("forecast", "published"),
    [(ar(replace(H100, host_ms=0.5)), 54.7), (sd(H100, LLAMA), 161.8), (ssd(H100, LLAMA, whole_trees=True), 255.8)],
    ids=["ar", "sd", "ssd"],
)
def test_the_published_speeds_are_within_ten_percent(forecast, published):
    assert forecast.tokens_per_s == pytest.approx(published, rel=0.1)


def test_the_published_duty_cycle():
    assert ssd(H100, LLAMA, whole_trees=True).duty_cycle == pytest.approx(0.79, abs=0.03)


@pytest.mark.parametrize("hit_rate", [0.0, 0.5, 0.9, 1.0])
def test_one_row_follows_the_closed_form(hit_rate):
    """The paper's speedup: expected tokens over expected time, a hit at 1, a miss at 1 + T_b verifications."""
    pair = Pair([1, 1, 2], [2, 1, 1], hit_rate)
    hardware = Hardware(verify_ms=10.0, step_ms=2.0)
    tokens = hit_rate * (1 + 1.25) + (1 - hit_rate) * (1 + 0.75)
    time = hit_rate * 10.0 + (1 - hit_rate) * 14.0
    assert ssd(hardware, pair).tokens_per_s == pytest.approx(1e3 * tokens / time, rel=0.02)


def test_a_slow_draft_sets_the_pace():
    slow = ssd(Hardware(verify_ms=10.0, step_ms=10.0), Pair([0, 0, 1], [0, 0, 1], 1.0), whole_trees=True)
    assert slow.tokens_per_s == pytest.approx(1e3 * 3 / 30.0)


def test_a_slow_draft_makes_short_branches_and_no_delay():
    hardware = Hardware(verify_ms=10.0, step_ms=3.0)
    assert ssd(hardware, Pair([0, 0, 0, 1], [0, 0, 0, 1], 1.0)).tokens_per_s == pytest.approx(1e3 * 3 / 10.0)


def test_lock_step_loses_with_the_batch_and_independent_rows_do_not():
    duty = {
        (rows, lock_step): ssd(H100, LLAMA, rows, lock_step=lock_step, rounds=3000).duty_cycle
        for rows in (1, 16)
        for lock_step in (False, True)
    }
    assert duty[16, True] < 0.65 < 0.8 < duty[16, False]


def test_more_drafts_hit_more():
    rates = [several_drafts(LLAMA, drafts, 0.7).hit_rate for drafts in (1, 2, 4)]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(0.88)
    assert rates[2] < 1.0
