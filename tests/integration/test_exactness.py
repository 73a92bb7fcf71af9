"""ssd = sd = ar = transformers, token for token, whatever drafts, lookahead and channel.

The short tests run on tiny random models and on a few prompts of the bundled pair; the slow ones are the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssd_ray.bench.prompts import held_out_prompts
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.models.info import load_tokenizer
from ssd_ray.models.loader import load_runner
from ssd_ray.models.sources import ASSETS
from ssd_ray.speculation.window import SCRATCH
from tests.support.engines import engine, variants
from tests.support.pump import Pump
from tests.support.tiny import tiny_pair

PROMPTS = [[5, 6, 7], list(range(1, 40)), [9]]
LAWS = [
    SamplingParams(temperature=0.0, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=5, ignore_eos=True),
    SamplingParams(temperature=0.7, top_p=0.95, seed=6, ignore_eos=True),
]
BUNDLED = EngineConfig(dtype="float32", device="cpu")

needs_pair = pytest.mark.skipif(
    not (ASSETS / "target" / "model.safetensors").is_file(), reason="the bundled pair is not in this checkout"
)


def name(value: object) -> str:
    if isinstance(value, EngineConfig):
        return f"{value.method}-{value.lookahead}-{value.num_drafts}"
    if isinstance(value, SamplingParams):
        return f"t{value.temperature:g}-p{value.top_p:g}"
    return str(value)


def generated(target: str | Path, prompts: Sequence[list[int]], count: int, **options: Any) -> list[list[int]]:
    """What transformers' own greedy generate writes, in float32."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    texts = []
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        whole = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        texts.append(whole[0, len(prompt) :].tolist())
    return texts


class TestTinyModels:
    """Random weights of two architectures, threads and memory channels: fast, and merciless about KV."""

    @pytest.fixture(scope="class", params=["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
    @classmethod
    def pair(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
        target, draft = tiny_pair(tmp_path_factory.mktemp(request.param), architecture=request.param, context=192)
        return EngineConfig(target=str(target), draft=str(draft), dtype="float32", device="cpu", max_num_seqs=1)

    @pytest.mark.parametrize("params", LAWS[:2], ids=name)
    def test_all_methods_write_the_same(self, pair: EngineConfig, params: SamplingParams) -> None:
        self.check(pair, params, variants(pair, [2, 7], [1]))

    @pytest.mark.slow
    @pytest.mark.parametrize("params", LAWS, ids=name)
    def test_all_methods_write_the_same_with_any_lookahead(self, pair: EngineConfig, params: SamplingParams) -> None:
        self.check(pair, params, variants(pair, [1, 4, 7], [1, 2]))

    @staticmethod
    def check(pair: EngineConfig, params: SamplingParams, configs: Sequence[EngineConfig]) -> None:
        params = replace(params, max_tokens=48)
        with engine(replace(pair, method="ar"), "memory") as generate:
            expected, _ = generate(PROMPTS, params)
        if params.greedy:
            assert expected == generated(str(pair.target), PROMPTS, 48)
        for config in configs:
            with engine(config, "memory") as generate:
                texts, stats = generate(PROMPTS, params)
            assert texts == expected, name(config)
            # A draft of its own may come too late with models this quick; one that is waited for may not.
            assert config.method != "sd" or sum(figures.rounds for figures in stats) < 3 * 48, name(config)

    def test_penalty_and_bias_are_those_of_transformers(self, pair: EngineConfig) -> None:
        params = SamplingParams(
            temperature=0.0, repetition_penalty=1.3, logit_bias={7: 4.0, 9: -3.0}, max_tokens=48, ignore_eos=True
        )
        bias = [[[token], value] for token, value in params.logit_bias]
        expected = generated(str(pair.target), PROMPTS, 48, repetition_penalty=1.3, sequence_bias=bias)
        assert expected != generated(str(pair.target), PROMPTS, 48, repetition_penalty=1.3)
        assert expected != generated(str(pair.target), PROMPTS, 48, sequence_bias=bias)
        for config in (replace(pair, method="ar"), *variants(pair, [7], [2])):
            with engine(config, "memory") as generate:
                assert generate(PROMPTS, params)[0] == expected, name(config)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_a_draft_that_is_the_target_is_always_right(self, pair: EngineConfig, temperature: float) -> None:
        """So any slip in the draft's KV, masks, positions or noise shows, which no text would."""
        runners = [
            load_runner(pair.target, role=role, rows=1, scratch=SCRATCH, dtype="float32")
            for role in ("target", "draft")
        ]
        pump = Pump(runners[0], runners[1:])
        params = SamplingParams(
            temperature=temperature, repetition_penalty=1.1, seed=4, max_tokens=100, ignore_eos=True
        )
        stats = pump.run(list(range(1, 60)), params).stats
        assert stats.accepted == stats.speculated
        assert stats.tokens / stats.rounds > 3


@needs_pair
class TestBundledPair:
    """Real parts: Ray actors, and each channel."""

    def test_a_few_prompts(self) -> None:
        self.check_a_few_prompts("memory")

    @pytest.mark.slow
    @pytest.mark.ray
    @pytest.mark.usefixtures("cluster")
    @pytest.mark.parametrize("channel", ["zmq", "ray"])
    def test_a_few_prompts_in_processes(self, channel: str) -> None:
        self.check_a_few_prompts(channel)

    @staticmethod
    def check_a_few_prompts(channel: str) -> None:
        prompts = held_out_prompts(load_tokenizer(None), count=1, tokens=96)
        params = [replace(law, max_tokens=32) for law in LAWS[::2]]
        with engine(replace(BUNDLED, method="ar"), "memory") as generate:
            expected = [generate(prompts, each)[0] for each in params]
        assert expected[0] == generated(ASSETS / "target", prompts, 32)
        with engine(BUNDLED, channel) as generate:
            assert [generate(prompts, each)[0] for each in params] == expected

    @staticmethod
    @cache
    def expected(params: SamplingParams) -> list[list[int]]:
        with engine(replace(BUNDLED, method="ar"), "memory") as generate:
            return generate(held_out_prompts(load_tokenizer(None), count=20), params)[0]

    @pytest.mark.slow
    @pytest.mark.ray
    @pytest.mark.timeout(7200)
    @pytest.mark.parametrize("channel", ["memory", "zmq", "ray"])
    @pytest.mark.parametrize("params", LAWS, ids=name)
    def test_the_whole_matrix(self, channel: str, params: SamplingParams) -> None:
        prompts = held_out_prompts(load_tokenizer(None), count=20)
        params = replace(params, max_tokens=128)
        expected = self.expected(params)
        if params.greedy and channel == "memory":
            assert expected == generated(ASSETS / "target", prompts, 128)
        for config in variants(BUNDLED, [1, 4, 7], [1, 2]):
            if config.method == "sd" and channel != "memory":
                continue  # its draft needs no channel
            with engine(config, channel) as generate:
                texts, _ = generate(prompts, params)
            assert texts == expected, name(config)

    @pytest.mark.slow
    @pytest.mark.timeout(7200)
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_bfloat16_writes_the_same_at_fixed_shapes(self, temperature: float) -> None:
        prompts = held_out_prompts(load_tokenizer(None), count=30)
        params = SamplingParams(temperature=temperature, seed=3, max_tokens=128, ignore_eos=True)
        bundled = replace(BUNDLED, dtype="bfloat16")
        with engine(replace(bundled, method="ar"), "memory") as generate:
            expected, _ = generate(prompts, params)
        for config in variants(bundled, range(1, 8), [1]):
            with engine(config, "memory") as generate:
                texts, _ = generate(prompts, params)
            assert texts == expected, name(config)
