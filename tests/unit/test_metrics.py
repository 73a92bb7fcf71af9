"""What Ray's metrics agents are told of requests that have ended."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.cluster import metrics
from ssd_ray.cluster.metrics import Ended, Metrics, accepted_by_position
from ssd_ray.wire import Misses, RequestStats

counts = st.lists(st.integers(0, 50), max_size=16).map(tuple)


class Ledger:
    """Takes what Ray's metrics take, as strictly, and sums it up."""

    def __init__(self) -> None:
        self.sums: Counter[tuple[str, str]] = Counter()
        self.times: Counter[str] = Counter()

    def metric(self, name: str, *, description: str, tag_keys: tuple[str, ...], **options: Any) -> Any:
        assert name.isidentifier()
        assert description
        ledger = self

        class Metric:
            def set_default_tags(self, tags: dict[str, str]) -> None:
                assert set(tags) == {"model_name"}

            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert value > 0
                assert ("model_name", *tags) == tag_keys
                ledger.sums[name, next(iter(tags.values()), "")] += value

            def observe(self, value: float) -> None:
                ledger.sums[name, ""] += value
                ledger.times[name] += 1

        return Metric()


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    made = Ledger()
    monkeypatch.setattr(metrics.metrics, "Counter", made.metric)
    monkeypatch.setattr(metrics.metrics, "Histogram", made.metric)
    return made


@given(counts)
def test_what_is_accepted_at_all_positions_is_all_that_is_accepted(accepted: tuple[int, ...]) -> None:
    by_position = accepted_by_position(accepted)
    assert sum(by_position.values()) == sum(tokens * rounds for tokens, rounds in enumerate(accepted))
    assert by_position.get("0", 0) == sum(accepted[1:])
    assert sorted(by_position.values(), reverse=True) == list(by_position.values())


def test_counters_and_histograms_have_the_same_sums(ledger: Ledger) -> None:
    told = Metrics("a-model")
    stats = [
        RequestStats(rounds=6, tokens=9, prompt_tokens=5, hits=4, misses=Misses(late=1), accepted=(3, 2, 1)),
        RequestStats(rounds=2, tokens=2, prompt_tokens=7, speculated=(0, 1, 1), accepted=(2,), verify_ms=250.0),
        RequestStats(prompt_tokens=3),
    ]
    for each, reason, first in zip(stats, ("stop", "length", "timeout"), (0.5, 0.25, None), strict=True):
        told.ended(Ended(reason, each, 2.0, first))
    sums = ledger.sums
    assert sums["vllm_generation_tokens", ""] == sums["vllm_request_generation_tokens", ""] == 11
    assert sums["vllm_prompt_tokens", ""] == sums["vllm_request_prompt_tokens", ""] == 15
    assert [sums["vllm_request_success", reason] for reason in ("stop", "length", "timeout", "error")] == [1, 1, 1, 0]
    assert sums["vllm_spec_decode_num_drafts", ""] == 2
    assert sums["vllm_spec_decode_num_draft_tokens", ""] == 3
    assert sums["vllm_spec_decode_num_accepted_tokens", ""] == 4
    assert [sums["vllm_spec_decode_num_accepted_tokens_per_pos", place] for place in "012"] == [3, 1, 0]
    assert (sums["ssd_ray_misses", "late"], sums["ssd_ray_misses", "stale"]) == (1, 0)
    assert (sums["ssd_ray_rounds", ""], sums["ssd_ray_verify_seconds", ""]) == (8, 0.25)
    assert (sums["vllm_e2e_request_latency_seconds", ""], ledger.times["vllm_e2e_request_latency_seconds"]) == (6.0, 3)
    assert (sums["vllm_time_to_first_token_seconds", ""], ledger.times["vllm_time_to_first_token_seconds"]) == (0.75, 2)
