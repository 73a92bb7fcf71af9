"""What is said of models and pairs before their weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from ssd_ray.cli import app
from ssd_ray.errors import ResourceError
from ssd_ray.models import loader
from ssd_ray.models.describe import at_best, describe
from ssd_ray.models.info import model_info
from ssd_ray.models.loader import load_runner
from ssd_ray.models.recurrent import RecurrentRunner, bytes_of_states
from tests.support.tiny import WINDOW, save_model, tiny_model, tiny_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny_pair(tmp_path_factory.mktemp("pair"))


def inspect(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_a_pair_in_words(pair: tuple[str, str]) -> None:
    code, said = inspect(*pair)
    assert code == 0, said
    assert "llama, 2 layers" in said
    assert "KV of 128 tokens" in said
    assert "The draft has 100% of the target's parameters." in said


def test_a_pair_as_json(pair: tuple[str, str]) -> None:
    code, said = inspect(*pair, "--json")
    found = json.loads(said)
    assert (code, found["problem"], found["step"]) == (0, None, 1.0)
    target = found["models"]["target"]
    assert target["parameters"] == sum(weight.numel() for weight in tiny_model().parameters())
    assert target["weight_bytes"] >= 4 * target["parameters"]
    assert target["info"]["kv_bytes_per_slot"] == 256


@pytest.mark.parametrize("family", ["mamba", "qwen3_5_text"])
def test_states_are_part_of_what_has_to_fit(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(save_model(tmp_path, tiny_model(family)))
    sizes: dict[str, Any] = {"role": "target", "rows": 3, "max_length": 64, "scratch": 16, "device": "cpu"}
    runner = load_runner(folder, **sizes)
    assert isinstance(runner, RecurrentRunner)
    info = model_info(folder)
    assert info.state_bytes == sum(tensor.nbytes for tensor in runner._begin) > 0
    states = bytes_of_states(info.state_bytes, 3, 80)
    assert states == 3 * 80 * info.state_bytes  # few tokens: fewer states than there is room for
    assert bytes_of_states(1 << 30, 3, 80) == 3 * 8 << 30
    enough = info.parameter_bytes + runner.num_pages * 64 * info.kv_bytes_per_slot + states
    monkeypatch.setattr(loader, "free_bytes", lambda device: enough)
    load_runner(folder, **sizes)
    monkeypatch.setattr(loader, "free_bytes", lambda device: enough - 1)
    with pytest.raises(ResourceError, match="GiB of states and"):
        load_runner(folder, **sizes)
    code, said = inspect(folder, "ngram", "--max-model-len", "64")
    assert code == 0, said
    assert "states of 16 texts" in said


def test_weights_in_few_bits_in_words(pair: tuple[str, str]) -> None:
    code, said = inspect(*pair, "--quantize", "int8")
    assert code == 0, said
    assert "in int8, other weights float32" in said


def test_without_a_draft_the_text_is_one(pair: tuple[str, str]) -> None:
    for arguments in ([pair[0]], [pair[0], "ngram"]):
        code, said = inspect(*arguments)
        assert code == 0, said
        assert "No draft model: what followed the same tokens" in said


def test_what_cannot_work_is_told_with_its_reason(pair: tuple[str, str], tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", tiny_model(vocab=80))
    for file in other.glob("*token*"):
        file.unlink()
    code, said = inspect(pair[0], str(other))
    assert code == 2
    assert "llama, 2 layers" in said  # what is known is told all the same
    assert "its vocabulary has 80 tokens, the target's has 96" in said
    AutoConfig.for_model("rwkv").save_pretrained(tmp_path / "rwkv")
    code, said = inspect(str(tmp_path / "rwkv"))
    assert code == 2
    assert "rwkv models cannot be served: their recurrent state" in said
    code, said = inspect(str(tmp_path / "nowhere"))
    assert (code, "no folder" in said) == (2, True)


def test_windows_and_experts_are_told(tmp_path: Path) -> None:
    gemma = describe(str(save_model(tmp_path / "gemma2", tiny_model("gemma2"))))
    assert gemma.sees == f"1 layers {WINDOW} tokens, 1 layers all"
    mixture = describe(str(save_model(tmp_path / "mixtral", tiny_model("mixtral"))))
    assert (mixture.sees, mixture.experts) == (f"{WINDOW} tokens", "2 of 4")
    llama = describe(str(save_model(tmp_path / "llama", tiny_model("llama4_text"))))
    assert f"3 layers chunks of {WINDOW}" in llama.sees


def test_at_best() -> None:
    assert at_best(0.0, 0.1) == (1.0, 1.0)
    waiting, hidden = at_best(0.8, 0.25)
    assert hidden == pytest.approx(1 + 0.8 + 0.64 + 0.512 + 0.4096)  # four steps beside a verification
    assert 1.0 < waiting < hidden
    assert at_best(0.8, 10.0) == (1.0, 1.0)
