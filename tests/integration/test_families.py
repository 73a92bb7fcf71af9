"""What a family of models has to do here, for each of them: as transformers' generate, for all methods, together with
others where memory is scarce, and over a prefix that is there already. Windows are shorter than the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest

from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.models.contract import PAGE_SLOTS
from ssd_ray.models.info import model_info
from tests.integration.test_exactness import generated
from tests.support.engines import engine
from tests.support.tiny import FAMILIES, RECURRENT, WINDOW, tiny_pair

CONTEXT, COUNT = 192, 24
PROMPTS = [list(range(1, 61)), [5, 6, 7]]
EIGHT = [[*range(number, number + 45 + number)] for number in range(8)]
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=COUNT)
SAMPLED = SamplingParams(temperature=1.0, seed=3, ignore_eos=True, max_tokens=COUNT)

UNLIKE = ("gpt_oss", "lfm2")
"""The first has windows, sinks and experts, the second recurrent layers; what others need, the runner's suite has."""


@pytest.fixture(
    scope="module",
    params=[name if name in UNLIKE else pytest.param(name, marks=pytest.mark.slow) for name in (*FAMILIES, *RECURRENT)],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = tmp_path_factory.mktemp(request.param)
    target, draft = tiny_pair(folder, architecture=request.param, context=CONTEXT, noise=0.01)
    return EngineConfig(target=target, draft=draft, dtype="float32", device="cpu", max_num_seqs=1)


def texts(config: EngineConfig, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[int]]:
    with engine(config, "memory") as generate:
        return generate(prompts, params)[0]


@pytest.fixture(scope="module")
def plainly(pair: EngineConfig) -> tuple[list[list[int]], list[list[int]]]:
    """What plain decoding writes, greedy and sampled."""
    with engine(replace(pair, method="ar"), "memory") as generate:
        greedy, sampled = (generate(PROMPTS, params)[0] for params in (GREEDY, SAMPLED))
    return greedy, sampled


def test_ar_writes_what_transformers_writes(pair: EngineConfig, plainly: tuple[list[list[int]], ...]) -> None:
    assert len(PROMPTS[0]) > 2 * WINDOW
    assert plainly[0] == generated(str(pair.target), PROMPTS, COUNT)


@pytest.mark.parametrize("method", ["sd", "ssd"])
def test_sd_and_ssd_write_what_ar_writes(
    pair: EngineConfig, plainly: tuple[list[list[int]], ...], method: Literal["sd", "ssd"]
) -> None:
    config = replace(pair, method="sd", lookahead=4) if method == "sd" else replace(pair, method="ssd")
    with engine(config, "memory") as generate:
        assert generate(PROMPTS, GREEDY)[0] == plainly[0]
        texts, stats = generate(PROMPTS, SAMPLED)
    assert texts == plainly[1]
    if method == "sd":  # it waits for its draft
        assert sum(each.tokens for each in stats) > sum(each.rounds for each in stats)


def test_eight_at_once_where_memory_is_scarce(pair: EngineConfig) -> None:
    params = replace(GREEDY, max_tokens=100)
    expected = texts(replace(pair, method="ar", max_num_seqs=8), EIGHT, params)
    rows = 2 * (CONTEXT // PAGE_SLOTS + 1) * PAGE_SLOTS
    memory = rows * model_info(pair.target).kv_bytes_per_slot / 2**30
    with engine(replace(pair, method="ssd", max_num_seqs=8, kv_memory=memory), "memory") as generate:
        written, stats = generate(EIGHT, params)
    assert written == expected
    assert sum(each.preemptions for each in stats) > 0


@pytest.mark.slow
def test_a_prefix_that_is_there_already(pair: EngineConfig) -> None:
    longer = [*PROMPTS[0], *range(30, 70)]
    (expected,) = texts(replace(pair, method="ar"), [longer], GREEDY)
    with engine(replace(pair, method="ssd"), "memory") as generate:
        generate([longer[:80]], GREEDY)
        (written,), (stats,) = generate([longer], GREEDY)
    assert written == expected
    assert stats.cached_tokens >= PAGE_SLOTS
