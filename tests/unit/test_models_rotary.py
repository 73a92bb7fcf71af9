"""Rotary frequencies that depend on the length: the length that is served decides, not who is in a forward."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import UnsupportedModelError
from ssd_ray.models.probe import check_addressing, probe_layers
from ssd_ray.models.runner import HFRunner
from tests.support.engines import engine
from tests.support.tiny import save_model, tiny_model

THRESHOLD, LENGTH = 32, 128
LONG, SHORT = [2.0, 4.0, 8.0, 16.0], [1.0] * 4

KINDS: dict[str, dict[str, Any]] = {
    "longrope": {
        "architecture": "phi3",
        "context": LENGTH,
        "original_max_position_embeddings": THRESHOLD,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "long_factor": LONG,
            "short_factor": SHORT,
            "original_max_position_embeddings": THRESHOLD,
        },
    },
    "dynamic": {
        "architecture": "llama",
        "context": THRESHOLD,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "dynamic, for each type of layer": {
        "architecture": "gemma3_text",
        "context": THRESHOLD,
        "sliding_window": LENGTH,
        "rope_parameters": {
            "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(**KINDS[request.param])


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(model: PreTrainedModel, length: int = LENGTH, **options: Any) -> HFRunner:
    return HFRunner(copy.deepcopy(model), rows=2, max_length=length, scratch=0, **options)


@torch.inference_mode()
def plain(model: PreTrainedModel, tokens: list[int], longest: int) -> torch.Tensor:
    """Logits of the model with the frequencies that it chooses for a text of ``longest`` tokens."""
    return copy.deepcopy(model)(torch.tensor([tokens + [0] * (longest - len(tokens))])).logits[0, : len(tokens)]


@pytest.mark.parametrize("count", [8, 100])
def test_frequencies_are_those_of_the_length_that_is_served(model: PreTrainedModel, count: int) -> None:
    tokens = text(count)
    runner = run(model)
    runner.prefill(0, tokens[:-5])
    got = runner.append([0], torch.tensor([tokens[-5:]]), [count - 5])[0]
    torch.testing.assert_close(got, plain(model, tokens, LENGTH)[-5:], rtol=1e-4, atol=1e-4)


def test_a_length_within_the_threshold_is_served_as_ever(model: PreTrainedModel) -> None:
    tokens = text(THRESHOLD)
    got = run(model, THRESHOLD).append([0], torch.tensor([tokens]), [0])[0]
    torch.testing.assert_close(got, plain(model, tokens, THRESHOLD), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, plain(model, tokens, LENGTH)[:THRESHOLD], rtol=1e-2)


def test_a_neighbour_changes_no_bit(model: PreTrainedModel) -> None:
    short, long = text(20), text(100, seed=1)
    alone, beside = run(model), run(model, prefill_chunk=256)
    for runner in (alone, beside):
        runner.prefill(0, short)
    beside.prefill(1, long)
    tokens = torch.tensor([text(8, seed=2), text(8, seed=3)])
    want = alone.append([0], tokens[:1], [20])
    assert torch.equal(beside.append([0, 1], tokens, [20, 100])[0], want[0])


def test_where_a_long_prompt_is_cut_changes_nothing(model: PreTrainedModel) -> None:
    prompt, tokens = text(100, seed=1), torch.tensor([text(8, seed=2)])
    found = []
    for chunk in (8, 256):
        runner = run(model, prefill_chunk=chunk)
        runner.prefill(0, prompt)
        found.append(runner.append([0], tokens, [100])[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_the_check_at_load_finds_frequencies_that_change(model: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModelError, match="each row for itself"):
        check_addressing(model, probe_layers(model), LENGTH)


@pytest.mark.parametrize("length", [THRESHOLD + 2, 1000])
def test_the_check_finds_it_at_any_length_beyond_the_threshold(length: int) -> None:
    model = tiny_model(**KINDS["dynamic"], layers=4)
    with pytest.raises(UnsupportedModelError, match="each row for itself"):
        check_addressing(model, probe_layers(model), length)


class TestEngines:
    """A pair of the Phi-3 128k kind; texts begin before the threshold and end behind it."""

    PROMPTS = tuple(text(length, seed=length) for length in (3, 60, 20, 31, 33, 90, 10, 28))
    PARAMS = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls, tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
        folder = tmp_path_factory.mktemp("longrope")
        paths = [save_model(folder / str(seed), tiny_model(**KINDS["longrope"], seed=seed)) for seed in (0, 1)]
        return EngineConfig(target=str(paths[0]), draft=str(paths[1]), device="cpu")

    def test_every_row_has_the_text_of_the_served_length(self, pair: EngineConfig) -> None:
        expected = [generated(LONG, prompt) for prompt in self.PROMPTS]
        assert expected != [generated(SHORT, prompt) for prompt in self.PROMPTS]
        for method, chunk in (("ar", 8), ("sd", 16), ("ssd", 256)):
            with engine(replace(pair, method=method, prefill_chunk=chunk), "memory") as generate:
                assert generate(self.PROMPTS, self.PARAMS)[0] == expected, (method, chunk)
                assert [generate([prompt], self.PARAMS)[0][0] for prompt in self.PROMPTS[:2]] == expected[:2]

    def test_below_the_threshold_it_is_the_text_of_transformers(self, pair: EngineConfig) -> None:
        params = replace(self.PARAMS, max_tokens=12)
        prompts = [prompt for prompt in self.PROMPTS if len(prompt) <= THRESHOLD - 12]
        with engine(replace(pair, method="ar", max_model_len=THRESHOLD), "memory") as generate:
            assert generate(prompts, params)[0] == [generated(SHORT, prompt, 12) for prompt in prompts]


def generated(short: list[float], prompt: list[int], count: int = 30) -> list[int]:
    """What transformers' generate writes with these factors below the threshold, and the long ones beyond."""
    kind = KINDS["longrope"]
    model = tiny_model(**kind | {"rope_parameters": kind["rope_parameters"] | {"short_factor": short}})
    inputs = torch.tensor([prompt])
    seen = torch.ones_like(inputs)
    whole = model.generate(inputs, attention_mask=seen, do_sample=False, max_new_tokens=count, eos_token_id=None)
    return whole[0, len(prompt) :].tolist()


def test_folders_of_the_old_form_are_read(tmp_path: Path) -> None:
    """As Phi-3 128k lies on the hub: ``rope_scaling`` of type "longrope", and the threshold beside it."""
    folder = save_model(tmp_path, tiny_model("phi3", context=LENGTH))
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    config["rope_theta"] = 1e4
    config["rope_scaling"] = {"type": "longrope", "long_factor": LONG, "short_factor": SHORT}
    config["original_max_position_embeddings"] = THRESHOLD
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = text(8)
    got = run(model).append([0], torch.tensor([tokens]), [0])[0]
    torch.testing.assert_close(got, plain(model, tokens, LENGTH), rtol=1e-4, atol=1e-4)
