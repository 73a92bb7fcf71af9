"""Configurations refuse what they do not take, naming the field."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any, get_args

import pytest

from ssd_ray import config as config_module
from ssd_ray.config import SEED_MASK, EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError
from ssd_ray.saguaro.fanout import POLICIES

BAD_SAMPLING = {
    "temperature": [-0.1, 101.0, float("nan"), "hot", True],
    "repetition_penalty": [0.0, -1.0, float("inf")],
    "presence_penalty": [-2.1, 2.1, "much"],
    "frequency_penalty": [-2.1, 2.1, None],
    "logit_bias": [3, "42", {"x": 1.0}, {-1: 1.0}, {True: 1.0}, {1: 101.0}, {1: "a"}, {1: float("nan")}, [(1,)], [1]],
    "top_p": [0.0, 1.1, None],
    "top_k": [-1, 0.5],
    "min_p": [-0.1, 1.5],
    "max_tokens": [0, -1, 1.5],
    "min_tokens": [-1, 129, 0.5],
    "stop": ["", [1], ["a", ""]],
    "stop_token_ids": [[-1], ["a"], 3],
    "seed": [-1, 2**63, 0.5],
    "ignore_eos": [1, "yes"],
    "logprobs": [-1, 21, True, 0.5],
    "n": [0, 1025, 1.0],
}
BAD_ENGINE = {
    "target": ["", 3],
    "method": ["fast", None],
    "num_drafts": [-1, 1025, 1.0],
    "lookahead": [0, 16, "many"],
    "budget": [0, 4097, "all"],
    "fan_out": ["wide"],
    "backup": ["wait"],
    "text_lookup": ["yes"],
    "sampler": ["greedy"],
    "saguaro_c": [-0.1, 1.5, "0.5", True],
    "law_tokens": [-1, 0.5],
    "transport": ["tcp"],
    "device": ["tpu", 0],
    "dtype": ["int8"],
    "compile": [1],
    "max_num_seqs": [0],
    "max_queue": [0, True, 1 << 21],
    "max_model_len": [1],
    "prefill_chunk": [4],
    "kv_memory": [0, -1.0, "all"],
    "prefix_cache": ["yes"],
    "inline_max_bytes": [0],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, bad in BAD_SAMPLING.items() for value in bad])
def test_sampling_refuses(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: expected .*, got ") as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, bad in BAD_ENGINE.items() for value in bad])
def test_engine_refuses(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: expected "):
        EngineConfig.from_kwargs(**{field: value})


def test_every_field_is_looked_at() -> None:
    assert {field.name for field in fields(SamplingParams)} == set(BAD_SAMPLING)
    assert {field.name for field in fields(EngineConfig)} == set(BAD_ENGINE) | {"draft"}


def test_unknown_fields_are_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="look_ahead: expected a field of the engine: target, draft, method"):
        EngineConfig.from_kwargs(look_ahead=3)


def test_what_the_configuration_offers_exists() -> None:
    assert set(get_args(config_module.FanOut)) == set(POLICIES)


@pytest.mark.parametrize("form", [{7: 2, 3: -100}, {"3": -100.0, "7": 2.0}, [(7, 2), [3, -100]], ((3, -100), (7, 2))])
def test_a_bias_is_kept_as_sorted_pairs(form: object) -> None:
    params = SamplingParams(logit_bias=form)  # type: ignore[arg-type]
    assert params.logit_bias == ((3, -100.0), (7, 2.0))
    assert hash(params) == hash(SamplingParams(logit_bias=params.logit_bias))


def test_a_models_end_tokens_join_those_of_the_request() -> None:
    params = SamplingParams(stop_token_ids=[7, 3])  # type: ignore[arg-type]
    assert params.ending_with([0, 3]).stop_token_ids == (0, 3, 7)
    assert replace(params, ignore_eos=True).ending_with([0]).stop_token_ids == (7, 3)


def test_each_text_has_a_seed_of_its_own() -> None:
    params = SamplingParams(n=3, seed=SEED_MASK - 1, top_k=4)
    assert [each.seed for each in params.texts()] == [SEED_MASK - 1, SEED_MASK, 0]
    assert params.texts()[0] == replace(params, n=1)


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -1},
        {"logit_bias": {1: 1}},
        {"min_tokens": 1},
    ],
)
def test_what_penalises(values: dict[str, Any]) -> None:
    assert SamplingParams(**values).penalises
    assert not SamplingParams(temperature=0.5, top_k=3).penalises


def test_configs_do_not_change() -> None:
    params = SamplingParams(stop="x")
    assert params.stop == ("x",)
    with pytest.raises(FrozenInstanceError):
        params.seed = 3  # type: ignore[misc]
