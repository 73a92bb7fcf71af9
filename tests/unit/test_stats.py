"""Figures add up, and ratios over nothing are nothing."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.stats import EngineStats, Stats, add
from ssd_ray.wire import Misses, RequestStats

counts = st.integers(0, 1000)
histograms = st.lists(counts, max_size=8).map(tuple)
figures = st.builds(
    RequestStats,
    rounds=counts,
    tokens=counts,
    hits=counts,
    misses=st.builds(Misses, fan_out=counts, late=counts, stale=counts, cold=counts, no_draft=counts),
    accepted=histograms,
    speculated=histograms,
    verify_ms=counts.map(float),
    waits=counts,
)


@given(figures, figures, figures)
def test_adding_is_a_sum(a, b, c):
    assert add(a, b) == add(b, a)
    assert add(add(a, b), c) == add(a, add(b, c))
    assert add(a, RequestStats()) == a


def test_every_field_is_added():
    def ones(kind):
        values = {"misses": Misses(*[1] * 5), "accepted": (1, 1), "speculated": (1,)}
        return RequestStats(**{name: values.get(name, 1) for name in kind.__struct_fields__})

    double = msgspec.to_builtins(add(ones(RequestStats), ones(RequestStats)))
    flat = [number for value in double for number in (value if isinstance(value, list | tuple) else [value])]
    assert set(flat) == {2}


def test_histograms_of_different_lengths():
    assert add(RequestStats(accepted=(1, 2)), RequestStats(accepted=(1, 0, 5))).accepted == (2, 2, 5)


def test_ratios():
    sums = RequestStats(
        rounds=4, tokens=10, hits=3, misses=Misses(late=1), verify_ms=60.0, wait_ms=30.0, host_ms=10.0, accepted=(1, 3)
    )
    stats = Stats(sums=sums)
    assert (stats.tokens, stats.rounds, stats.tokens_per_round) == (10, 4, 2.5)
    assert stats.hit_rate == 0.75
    assert stats.duty_cycle == 0.6
    assert stats.misses == {"fan_out": 0, "late": 1, "stale": 0, "cold": 0, "no_draft": 0}
    assert stats.accepted == (1, 3)


def test_what_came_of_the_trees():
    sums = RequestStats(rounds=4, partial=1, tree_tokens=20, tree_used=5, draft_ms=40.0, draft_used_ms=30.0)
    stats = Stats(sums=sums)
    assert (stats.partial_rate, stats.tree_use, stats.draft_waste) == (0.25, 0.25, 0.25)


def test_what_memory_did():
    stats = Stats(sums=RequestStats(cached_tokens=64, preemptions=2))
    assert (stats.cached_tokens, stats.preemptions) == (64, 2)
    assert stats.as_dict().items() >= {"cached_tokens": 64, "preemptions": 2}.items()


@pytest.mark.parametrize(
    "name", ["hit_rate", "duty_cycle", "tokens_per_round", "tokens_per_s", "partial_rate", "tree_use", "draft_waste"]
)
def test_a_ratio_over_nothing_is_zero(name):
    assert getattr(EngineStats(), name) == 0.0


def test_figures_are_ready_for_json():
    stats = EngineStats(sums=RequestStats(tokens=3, rounds=1), requests=2, drafts=("draft-0",), draft_restarts=1)
    loaded = json.loads(json.dumps(stats.as_dict()))
    assert (loaded["tokens"], loaded["requests"], loaded["drafts"]) == (3, 2, ["draft-0"])
    assert loaded["misses"]["no_draft"] == 0
    assert loaded["tokens_per_round"] == 3.0
