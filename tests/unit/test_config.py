"""Configurations refuse what they do not take, naming the field."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from ssd_ray import config as config_module
from ssd_ray import wire
from ssd_ray.config import SEED_MASK, EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError
from ssd_ray.saguaro.fanout import POLICIES

BAD_SAMPLING = {
    "temperature": [-0.1, 101.0, float("nan"), "hot", True],
    "repetition_penalty": [0.0, 1e-45, -1.0, float("inf"), 10**400],
    "presence_penalty": [-2.1, 2.1, "much"],
    "frequency_penalty": [-2.1, 2.1, 10**400],
    "logit_bias": [3, "42", {"x": 1.0}, {-1: 1.0}, {True: 1.0}, {1: 101.0}, {1: "a"}, {1: float("nan")}, [(1,)], [1]],
    "top_p": [0.0, 1.1, [0.5]],
    "top_k": [-2, 0.5, 2**31],
    "min_p": [-0.1, 1.5],
    "max_tokens": [0, -1, 1.5, True, 2**31],
    "min_tokens": [-1, 129, 0.5],
    "stop": ["", [1], ["a", ""], "\ud83d", ["a", "\udfff"], {"a"}, b"a", [None]],
    "stop_token_ids": [[-1], ["a"], 3, [True], [2**31], [2**70], [None], [1.0]],
    "include_stop_str_in_output": [1, "yes"],
    "skip_special_tokens": [0, "no"],
    "bad_words": ["", [1], ["a", ""], ["\ud83d"], {"a": 1}],
    "bad_words_ids": [[1], [[]], [[-1]], [["a"]], [[2**31]], [[True]], "ab"],
    "seed": [0.5, "x", True, [1]],
    "ignore_eos": [1, "yes"],
    "logprobs": [-1, 21, True, 0.5],
    "n": [0, 1025, 1.0],
}
BAD_ENGINE = {
    "target": ["", 3],
    "adapter": ["", 3],
    "quantize": ["int3", None, 8],
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
    "spare_targets": [-1, 65, 1.0, None],
    "stall_timeout": [0, -1.0, float("nan"), "30", None],
    "max_restarts": [-1, 0.5, "3", None],
    "max_model_len": [1],
    "prefill_chunk": [4],
    "kv_memory": [0, -1.0, "all"],
    "prefix_cache": ["yes"],
    "inline_max_bytes": [0],
    "generation_config": ["vllm", None],
    "trust_remote_code": ["yes", 1, None],
    "trace": ["", 3, True, b"t.json", "a\0b"],
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


@pytest.mark.parametrize("field", ["target", "draft"])
def test_folders_become_absolute_where_they_are_given(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(value: object) -> str | None:
        path: str | None = getattr(EngineConfig.from_kwargs(**{field: value}), field)
        return path

    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "ngram").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = str(tmp_path / "there")
    assert [kept(each) for each in ("there", "./there", "~/there", folder, Path("there"))] == [folder] * 5
    assert kept("there/deep") == f"{folder}/deep"
    assert kept(Path("not/there")) == f"{tmp_path}/not/there", "a Path is never a hub id"
    assert [kept(each) for each in ("owner/model", "./missing", None)] == ["owner/model", "./missing", None]
    assert kept("ngram") == "ngram"
    assert kept(Path("ngram")) == kept("./ngram") == f"{tmp_path}/ngram"


def test_what_the_text_is_the_draft_of() -> None:
    config = EngineConfig(draft="ngram", num_drafts=3)
    assert (config.drafts_from_text, config.draft_actors) == (True, 0)
    assert not replace(config, method="ar").drafts_from_text
    assert replace(config, draft=None).draft_actors == 3
    assert replace(config, draft=None, method="sd").draft_actors == 0


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


def test_bad_words_are_kept_as_tuples() -> None:
    params = SamplingParams(bad_words=["a", "b"], bad_words_ids=[[3, 4], (5,)])  # type: ignore[arg-type]
    assert (params.bad_words, params.bad_words_ids) == (("a", "b"), ((3, 4), (5,)))
    assert SamplingParams(bad_words="a").bad_words == ("a",)  # type: ignore[arg-type]
    assert SamplingParams(bad_words=None, bad_words_ids=None) == SamplingParams()  # type: ignore[arg-type]


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
        {"bad_words_ids": [[3, 4]]},
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


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"stop": None}, {"stop": ()}),
        ({"stop_token_ids": None}, {"stop_token_ids": ()}),
        ({"logit_bias": None}, {"logit_bias": ()}),
        ({"top_p": None}, {"top_p": 1.0}),
        ({"max_tokens": None}, {"max_tokens": None}),
        ({"max_tokens": None, "min_tokens": 500}, {"max_tokens": None, "min_tokens": 500}),
        ({"logprobs": False}, {"logprobs": None}),
        ({"seed": None}, {"seed": None}),
        ({"seed": -1}, {"seed": SEED_MASK}),
        ({"seed": 2**100 + 5}, {"seed": 5}),
        ({"seed": -(10**400)}, {"seed": -(10**400) & SEED_MASK}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
    ],
)
def test_habits_of_callers(given: dict[str, Any], kept: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    assert {name: getattr(params, name) for name in kept} == kept


class Named(StrEnum):
    END = "end"


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("temperature", np.float64(0.5), 0.5),
        ("top_p", np.float32(0.5), 0.5),
        ("top_k", np.int64(3), 3),
        ("seed", np.int32(-1), SEED_MASK),
        ("max_tokens", torch.tensor(3), 3),
        ("ignore_eos", np.bool_(True), True),
        ("stop", np.str_("x"), ("x",)),
        ("stop", [Named.END], ("end",)),
        ("stop", np.array(["x", "y"]), ("x", "y")),
        ("stop_token_ids", np.array([3, 4]), (3, 4)),
        ("stop_token_ids", [np.int64(3), torch.tensor(4)], (3, 4)),
        ("logit_bias", {np.int64(3): np.float32(1.5)}, ((3, 1.5),)),
        ("logit_bias", np.array([[3, 1]]), ((3, 1.0),)),
    ],
)
def test_values_of_other_libraries_become_pythons_own_which_alone_pass_a_wire(
    field: str, value: object, kept: object
) -> None:
    params = SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert getattr(params, field) == kept
    message = wire.Open(1, 0, [1], [], params)
    assert wire.decode(7, wire.encode(7, message)) == [message]


def test_without_a_seed_texts_get_one_each_time() -> None:
    params = SamplingParams(seed=None, n=3)
    first, second = params.texts(), params.texts()
    assert {each.seed is not None for each in first} == {True}
    assert [each.seed for each in first] != [each.seed for each in second]
    assert len({each.seed for each in first}) == 3


@pytest.mark.parametrize(("name", "near"), [("temprature", "temperature"), ("max_token", "max_tokens")])
def test_an_unknown_keyword_is_refused_with_the_nearest_one(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected a field of the sampling: .*\(perhaps '{near}'\), got 1"):
        SamplingParams(**{name: 1})
    with pytest.raises(ConfigError, match=f"^{name}: expected"):
        replace(SamplingParams(), **{name: 1})


def test_fields_go_by_their_names() -> None:
    with pytest.raises(ConfigError, match=r"SamplingParams: expected its fields by name, got 0\.7"):
        SamplingParams(0.7)  # type: ignore[call-arg,misc]


class Unwritable:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("value", ["x" * 10**6, [10**5000], Unwritable(), [["\ud83d"] * 1000]], ids=type)
def test_whatever_the_value_the_message_is_short(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(temperature=value)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300
    str(caught.value).encode()
