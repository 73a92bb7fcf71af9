"""What Prometheus finds at a Ray on which an engine has served."""

from __future__ import annotations

import re
from pathlib import Path
from time import sleep
from urllib.request import urlopen

import pytest
import ray

from ssd_ray import LLM, SamplingParams
from ssd_ray.stats import EngineStats
from tests.support.engines import in_time

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # agents report every ten seconds


def scraped(model: str) -> dict[str, float]:
    """The sums of an engine's metrics, labels apart, a moment from now."""
    sleep(1.0)
    (node,) = ray.nodes()
    with urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    sums: dict[str, float] = {}
    for line in lines:
        if (found := re.match(r"ray_(\w+)\{(.*)\} (\S+)$", line)) and f'model_name="{model}"' in found[2]:
            sums[found[1]] = sums.get(found[1], 0.0) + float(found[3])
    return sums


def test_sums_are_those_of_the_engine(cluster: object, pair: tuple[str, str], tmp_path: Path) -> None:
    target = tmp_path / "of-this-test"  # others have served in this Ray, too
    target.symlink_to(pair[0])
    with LLM(target, pair[1]) as llm:
        llm.generate(["a", "b"], SamplingParams(max_tokens=24, ignore_eos=True))
        llm.generate("a", SamplingParams(max_tokens=9, ignore_eos=True))
        stats: EngineStats = llm.stats()
        found = in_time(
            lambda: scraped(target.name),
            lambda sums: sums.get("vllm_request_success_total") == 3,
        )
    assert found["vllm_generation_tokens_total"] == stats.tokens == 57
    # Ray adds up the middles of buckets: twice that of 16 to 32, and that of 8 to 16.
    assert found["vllm_request_generation_tokens_sum"] == 60
    assert found["vllm_request_generation_tokens_count"] == found["vllm_time_to_first_token_seconds_count"] == 3
    assert found["ssd_ray_rounds_total"] == stats.rounds == sum(stats.accepted)
    accepted = sum(tokens * rounds for tokens, rounds in enumerate(stats.accepted))
    assert found.get("vllm_spec_decode_num_accepted_tokens_total", 0) == accepted
    assert found.get("vllm_spec_decode_num_accepted_tokens_per_pos_total", 0) == accepted
