"""The recipe of the bundled pair runs from end to end, and what it exports is a stock transformers pair."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_pair.py"


def recipe(out: Path) -> str:
    command = [sys.executable, str(EXAMPLE), "--out", str(out), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    recipe(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(out: Path) -> object:
    return AutoTokenizer.from_pretrained(out / "pair" / "target")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("name", "layers"), [("target", 4), ("draft", 1)])
def test_the_exported_models_load_and_predict(out: Path, name: str, layers: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(out / "pair" / name)
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == layers
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, model.config.vocab_size)
    assert torch.isfinite(logits).all()


@pytest.mark.slow
def test_both_models_share_one_vocabulary(out: Path, tokenizer: object) -> None:
    draft = AutoTokenizer.from_pretrained(out / "pair" / "draft")
    assert draft.get_vocab() == tokenizer.get_vocab()


@pytest.mark.slow
@given(text=st.text())
def test_any_text_comes_back(tokenizer: object, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_no_held_out_file_was_trained_on(out: Path) -> None:
    trained = json.loads((out / "sources.json").read_text())
    held_out = json.loads((out / "held_out.json").read_text())
    assert held_out
    assert not {s["name"] for s in trained} & {s["name"] for s in held_out}
    assert not {s["text"] for s in trained} & {s["text"] for s in held_out}


@pytest.mark.slow
def test_training_lowers_the_loss_and_the_figures_are_written(out: Path) -> None:
    figures = json.loads((out / "figures.json").read_text())
    assert str(figures["target_loss"]) in (out / "pair" / "README.md").read_text()
    assert 0 < figures["target_loss"] < 6.238  # log(512): a model that knows nothing
    assert set(figures["greedy"]["tokens_per_round"]) == {"3", "5", "7"}


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(out: Path) -> None:
    before = {name: (out / f"{name}.pt").read_bytes() for name in ("target", "draft", "distilled")}
    recipe(out)
    assert before == {name: (out / f"{name}.pt").read_bytes() for name in before}


def test_growing_changes_nothing_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    models = importlib.import_module("pair_recipe.models")
    shape = models.Shape(layers=7, hidden=32, intermediate=48, heads=2, kv_heads=1)
    shallow = models.new_model(shape, 3, vocab_size=64, length=32)
    deep = models.grow(shallow, shape, 7)
    ids = torch.randint(0, 64, (2, 16))
    assert len(deep.model.layers) == 7
    torch.testing.assert_close(deep(ids).logits, shallow(ids).logits)
