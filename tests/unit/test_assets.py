"""The bundled pair is what its card says: small, in bfloat16, one vocabulary, thirty held-out prompts."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

import ssd_ray

ASSETS = Path(ssd_ray.__file__).parent / "assets"
MODELS = ("target", "draft")


def config(name: str) -> dict:
    return json.loads((ASSETS / name / "config.json").read_text())


def tensors(name: str) -> dict[str, tuple[str, list[int]]]:
    with safe_open(ASSETS / name / "model.safetensors", "pt") as weights:
        keys = weights.keys()
        return {key: (weights.get_slice(key).get_dtype(), weights.get_slice(key).get_shape()) for key in keys}


def test_the_pair_is_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 40_000_000


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_bfloat16_and_their_count_is_in_the_card(name: str) -> None:
    shapes = tensors(name)
    assert {dtype for dtype, _ in shapes.values()} == {"BF16"}
    count = sum(rows * (columns[0] if columns else 1) for _, (rows, *columns) in shapes.values())
    assert f"{count:,}" in (ASSETS / "README.md").read_text()


def test_the_target_is_deep_and_the_draft_is_shallow() -> None:
    assert config("target")["num_hidden_layers"] == 20
    assert config("draft")["num_hidden_layers"] == 2
    for name in MODELS:
        assert config(name)["architectures"] == ["LlamaForCausalLM"]


def test_both_models_share_one_vocabulary() -> None:
    target, draft = (AutoTokenizer.from_pretrained(ASSETS / name) for name in MODELS)
    assert target.get_vocab() == draft.get_vocab()
    assert len(target) == config("target")["vocab_size"] == config("draft")["vocab_size"] == 4096
    assert target.eos_token_id == config("target")["eos_token_id"] == config("draft")["eos_token_id"]


@pytest.mark.parametrize(
    "text", ["def f(x):\n\treturn x\n", "naïve 中文 \U0001f600\r\n\x00 \x7f", "  a   b \n\n\n  c", ""]
)
def test_any_text_comes_back(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "target")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_thirty_prompts_fit_the_context_with_room_to_write() -> None:
    prompts = sorted((ASSETS / "prompts").glob("*.txt"))
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "target")
    lengths = [len(tokenizer(path.read_text(encoding="utf-8"))["input_ids"]) for path in prompts]
    assert len(prompts) == 30
    assert all(1000 < length <= 1500 for length in lengths)


@pytest.mark.parametrize("word", ["licence", "PSF-2.0", "Apache-2.0", "nats a token", "held-out", "train_pair.py"])
def test_the_card_tells_sources_licences_and_losses(word: str) -> None:
    assert word in (ASSETS / "README.md").read_text()
