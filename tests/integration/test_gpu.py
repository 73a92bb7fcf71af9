"""Target and drafts on CUDA: the texts are those of a plain forward there, whatever the method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ssd_ray.bench.prompts import held_out_prompts
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.llm import LLM
from ssd_ray.models.info import load_tokenizer
from tests.integration.test_exactness import LAWS, generated, name
from tests.support.engines import engine, variants
from tests.support.tiny import tiny_pair

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

PROMPTS = [[5, 6, 7], list(range(1, 40)), [9], [3] * 20]


@pytest.fixture(params=["llama", "gemma2", "qwen3"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> EngineConfig:
    target, draft = tiny_pair(tmp_path, architecture=request.param, context=192)
    return EngineConfig(target=str(target), draft=str(draft), dtype="float32", device="cuda", max_num_seqs=1)


@pytest.mark.parametrize("params", LAWS, ids=name)
def test_all_methods_write_the_same(pair: EngineConfig, params: SamplingParams) -> None:
    params = replace(params, max_tokens=48)
    with engine(replace(pair, method="ar"), "memory") as generate:
        expected, _ = generate(PROMPTS, params)
    if params.greedy:
        assert expected == generated(str(pair.target), PROMPTS, 48)
    for config in (*variants(pair, [2, 7], [1]), replace(pair, max_num_seqs=4)):
        with engine(config, "memory") as generate:
            assert generate(PROMPTS, params)[0] == expected, name(config)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_accepted_by_their_probabilities(pair: EngineConfig, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=48, ignore_eos=True)
    for method in ("sd", "ssd"):
        with engine(replace(pair, sampler="rejection", method=method, max_num_seqs=4), "memory") as generate:
            texts, _ = generate(PROMPTS, params)
        assert [len(text) for text in texts] == [48] * len(PROMPTS)


@pytest.mark.ray
@pytest.mark.parametrize("params", LAWS[:2], ids=name)
def test_processes_share_a_gpu(params: SamplingParams) -> None:
    prompts = held_out_prompts(load_tokenizer(None), count=2, tokens=96)
    params = replace(params, max_tokens=48)
    texts = []
    for method in ("ar", "ssd"):
        with LLM(method=method, dtype="float32", device="cuda", max_num_seqs=2) as llm:
            texts.append([output.token_ids for output in llm.generate(prompts, params)])
    assert texts[0] == texts[1]
