"""Benchmarks run, and end with one line of JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ssd_ray.bench.chaos import KINDS, Report
from ssd_ray.bench.cli import app
from ssd_ray.bench.methods import Result, Run, cores_of, verdict
from ssd_ray.bench.plot import check_plotting
from ssd_ray.bench.prompts import held_out_prompts, held_out_texts
from ssd_ray.config import EngineConfig
from ssd_ray.errors import ConfigError
from ssd_ray.models.info import load_tokenizer
from ssd_ray.saguaro.fanout import POLICIES
from tests.support.tiny import tiny_pair


def test_prompts_are_the_held_out_files() -> None:
    texts = held_out_texts()
    assert len(texts) == 30
    prompts = held_out_prompts(load_tokenizer(None), count=5, tokens=10)
    assert [len(prompt) for prompt in prompts] == [10] * 5
    assert len({tuple(prompt) for prompt in prompts}) == 5


def test_ratios_are_taken_prompt_by_prompt() -> None:
    fast = Result("ssd", 0.0, [Run(100, 1.0), Run(100, 10.0), Run(100, 1.0)])
    slow = Result("ar", 0.0, [Run(100, 2.0), Run(100, 20.0), Run(100, 3.0)])
    assert fast.ratio(slow) == pytest.approx(2.0)
    assert (fast.rate, slow.rate) == (100.0, pytest.approx(100.0 / 3))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads cannot be pinned")
def test_all_have_the_cores_of_ssds_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without drafts beside it that one has all of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7})
    assert [cores_of(EngineConfig(method=method)) for method in ("ar", "sd", "ssd")] == [[4, 5], [4, 5], None]
    for fields in ({"draft": "ngram"}, {"num_drafts": 0}):
        assert [cores_of(EngineConfig(method=method, **fields)) for method in ("ar", "sd", "ssd")] == [None] * 3


def test_a_sentence_says_what_serves_best() -> None:
    results = [Result("ar", 0.0, [Run(100, 2.0)]), Result("ssd", 0.0, [Run(100, 1.0)])]
    results += [Result("ar", 1.0, [Run(100, 2.0)]), Result("ssd", 1.0, [Run(100, 4.0)])]
    assert verdict(results) == (
        "Served best here by ssd at temperature 0: 100 tokens/s, 2.00 x ar; "
        "ar at temperature 1: 50 tokens/s, 2.00 x ssd."
    )


@pytest.mark.slow
def test_policies(tmp_path: Path) -> None:
    target, draft = tiny_pair(tmp_path, vocab=4096, context=128)
    picture = tmp_path / "policies.png"
    arguments = ["policies", "--target", str(target), "--draft", str(draft), "--prompts", "1", "--plot", str(picture)]
    arguments += ["--prompt-tokens", "16", "--max-tokens", "8", "--temperature", "0", "--temperature", "1"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    figures = json.loads(result.stdout.splitlines()[-1])["results"]
    assert {each["name"] for each in figures if each["study"] == "fan-out"} == set(POLICIES)
    assert {each["budget"] for each in figures if each["study"] == "fan-out"} == {8, 16, 32}
    samplers = [each for each in figures if each["study"] == "sampler"]
    assert [each["name"] for each in samplers if each["temperature"] == 0.0] == ["coupled"]
    assert len(samplers) == 1 + 7
    assert all(each["tokens_per_s"] > 0 and 0 <= each["hit_rate"] <= 1 for each in figures)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_forecast() -> None:
    arguments = ["forecast", "--verify-ms", "18", "--step-ms", "1.9", "--acceptance", "0.7"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    figures = json.loads(result.stdout.splitlines()[-1])["results"]
    assert list(figures) == ["1", "4", "16"]
    for methods in figures.values():
        speeds = [methods[name]["tokens_per_s"] for name in ("ar", "sd", "ssd", "ssd, 4 drafts")]
        assert speeds == sorted(speeds)


def test_a_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"plot.*ssd-ray\[bench\]"):
        check_plotting(tmp_path / "picture.png")


def test_a_picture_needs_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "picture.png"):
        with pytest.raises(ConfigError, match=r"plot.*a folder that exists"):
            check_plotting(path)


@pytest.mark.slow
@pytest.mark.ray
def test_methods(tmp_path: Path) -> None:
    target, draft = tiny_pair(tmp_path, vocab=4096, context=128)
    arguments = ["methods", "--target", str(target), "--draft", str(draft), "--dtype", "float32"]
    arguments += [
        "--prompts",
        "2",
        "--prompt-tokens",
        "16",
        "--max-tokens",
        "24",
        "--temperature",
        "0",
        "--lookahead",
        "3",
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    figures = json.loads(result.stdout.splitlines()[-1])
    by_method = {each["method"]: each for each in figures["results"]}
    assert list(by_method) == ["ar", "sd", "ssd", "transformers", "assisted"]
    assert all(each["tokens_per_s"] > 0 for each in by_method.values())
    assert by_method["ar"]["tokens_per_round"] == 1.0
    assert by_method["sd"]["tokens_per_round"] > 1.0
    assert 0.0 < by_method["ssd"]["duty_cycle"] < 1.0


@pytest.mark.slow
@pytest.mark.ray
def test_soak(tmp_path: Path) -> None:
    target, draft = tiny_pair(tmp_path, vocab=4096, context=512)
    arguments = ["soak", "--target", target, "--draft", draft, "--requests", "120", "--warm-up", "40"]
    result = CliRunner().invoke(app, [*arguments, "--max-num-seqs", "4"], catch_exceptions=False)
    figures = json.loads(result.stdout.splitlines()[-1])["results"]
    assert sum(figures["ends"].values()) == figures["requests"] == 120
    assert figures["ends"]["forgotten"] > 0
    assert figures["ends"]["cancelled"] > 0
    assert figures["kv_pages_held"] == 0
    assert set(figures["memory"]) == {"driver", "target", "draft-0"}
    assert all(each["end"] > 0 for each in figures["memory"].values())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_chaos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("a draft is killed", "the target is killed"):
        monkeypatch.setitem(KINDS, kind, 12)
    target, draft = tiny_pair(tmp_path, vocab=4096, context=512)
    arguments = ["chaos", "--target", target, "--draft", draft, "--faults", "40", "--every", "0.2"]
    result = CliRunner().invoke(app, [*arguments, "--max-num-seqs", "4", "--seed", "3"], catch_exceptions=False)
    figures = json.loads(result.stdout.splitlines()[-1])["results"]
    assert sum(figures["faults"].values()) == 40
    assert figures["texts"] > 0
    assert figures["changed"] == figures["left"] == 0
    assert figures["lost"] == {}
    assert result.exit_code == 0
    assert figures["target_restarts"] + figures["draft_restarts"] > 0


@pytest.mark.parametrize("wrong", [{"changed": 1}, {"lost": {"it died": 1}}, {"left": 1}, {"texts": 0}])
def test_what_chaos_must_not_find(wrong: dict[str, Any]) -> None:
    held = Report({}, 1.0, 5, 0, {}, {}, (1.0, 1.0, 1.0), 0, 0, 0)
    assert held.held
    assert not replace(held, **wrong).held


@pytest.mark.slow
def test_batches(tmp_path: Path) -> None:
    target, draft = tiny_pair(tmp_path, vocab=4096, context=2048)
    arguments = ["batches", "--target", str(target), "--draft", str(draft), "--size", "1", "--size", "3"]
    arguments += ["--max-tokens", "12", "--repeat", "1", "--method", "ar", "--method", "ssd"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    figures = json.loads(result.stdout.splitlines()[-1])["results"]
    loads = [(method, rows, mixed) for rows, mixed in ((1, False), (3, False), (3, True)) for method in ("ar", "ssd")]
    assert [(each["method"], each["rows"], each["mixed"]) for each in figures] == loads
    assert all(0.0 < each["median_ms"] <= each["p99_ms"] for each in figures)
    assert all(each["slowest"] >= 1.0 and each["slowest_round"] >= 1.0 for each in figures)
    assert all(each["same"] == 1.0 for each in figures)
    assert all(each["tokens_per_round"] == 1.0 for each in figures if each["method"] == "ar")
