"""Bad input is refused in our own words before anything starts, and the command line exits with 2."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ssd_ray import LLM, SamplingParams
from ssd_ray.cli import app
from ssd_ray.cluster import driver, preflight
from ssd_ray.config import EngineConfig
from ssd_ray.errors import ConfigError, ModelError, ResourceError, UnsupportedModelError, VocabularyMismatchError
from tests.support.tiny import save_model, tiny_model


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    """Ray is not even looked at."""

    def start():
        raise AssertionError("Ray was started")

    monkeypatch.setattr(driver, "RayRuntime", start)


@pytest.fixture
def edited(pair, tmp_path):
    """A copy of the target with a changed config."""

    def edit(**values):
        folder = shutil.copytree(pair[0], tmp_path / "edited")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return str(folder)

    return edit


@pytest.fixture
def other_vocabulary(tmp_path):
    return str(save_model(tmp_path / "other", tiny_model(vocab=80, context=512)))


def test_good_input_would_start(pair):
    with pytest.raises(AssertionError, match="Ray was started"):
        LLM(*pair)


def test_a_missing_path(pair):
    with pytest.raises(ModelError, match="target: no folder at /no/such/folder"):
        LLM("/no/such/folder", pair[1])
    with pytest.raises(ModelError, match=r"draft: no folder at \./here"):
        LLM(pair[0], "./here")


def test_a_folder_without_a_model(pair, tmp_path):
    with pytest.raises(ModelError, match=r"draft: no config\.json in"):
        LLM(pair[0], str(tmp_path))


def test_a_broken_config(pair, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="target: cannot load"):
        LLM(str(tmp_path), pair[1])


def test_an_unsupported_architecture(pair, edited):
    with pytest.raises(UnsupportedModelError, match="target"):
        LLM(edited(model_type="rwkv", architectures=["RwkvForCausalLM"]), pair[1])


def test_a_draft_with_another_vocabulary(pair, other_vocabulary):
    with pytest.raises(VocabularyMismatchError, match="draft: its tokenizer is not the target's"):
        LLM(pair[0], other_vocabulary, sampler="rejection")


def test_a_draft_that_fits_is_taken_and_else_the_text_itself(pair, tmp_path, caplog):
    def chosen(**fields):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            config = preflight.check(EngineConfig(**fields)).config
        return config.draft, config.draft_actors, "the text itself is the draft" in caplog.text

    assert chosen() == (None, 1, False)
    assert chosen(target=pair[0], draft=pair[1]) == (pair[1], 1, False)
    assert chosen(target=pair[0], method="ar") == (None, 0, False)
    assert chosen(target=pair[0]) == ("ngram", 0, True)
    assert (
        "the bundled one does not fit, so the text itself is the draft (draft: its tokenizer is not the target's"
        in caplog.text
    )
    assert chosen(draft="ngram", num_drafts=2) == ("ngram", 0, True)
    assert chosen(draft="ngram", method="sd") == ("ngram", 0, True)
    for fields in ({"target": pair[0]}, {"draft": "ngram"}):
        with pytest.raises(ConfigError, match="text_lookup: expected True where the text itself is the draft"):
            chosen(**fields, text_lookup=False)


def test_a_draft_narrows_nothing(pair, tmp_path):
    """Neither with its vocabulary nor with its context."""
    save_model(tmp_path, tiny_model(vocab=90, context=64))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(pair[0]) / name, tmp_path / name)
    for method in ("ssd", "sd"):
        checked = preflight.check(EngineConfig(target=pair[0], draft=str(tmp_path), method=method))
        assert (checked.vocab_size, checked.max_length) == (96, 512)
        assert checked.prompt([95] * 511) == [95] * 511
        assert checked.params(SamplingParams(logit_bias={95: 1.0})).logit_bias == ((95, 1.0),)


def test_without_a_draft_its_vocabulary_does_not_matter(pair, other_vocabulary):
    with pytest.raises(AssertionError, match="Ray was started"):
        LLM(pair[0], other_vocabulary, method="ar")


def test_an_unknown_field(pair):
    with pytest.raises(
        ConfigError, match="num_draft: expected a field of the engine: target, draft, method, num_drafts"
    ):
        LLM(*pair, num_draft=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lookahead", 16),
        ("lookahead", 0),
        ("num_drafts", -1),
        ("num_drafts", True),
        ("method", "magic"),
        ("device", "tpu"),
        ("max_model_len", 1),
        ("max_model_len", 513),
        ("max_num_seqs", 0),
        ("dtype", "int4"),
    ],
)
def test_a_value_out_of_range(pair, field, value):
    with pytest.raises(ConfigError, match=f"{field}: expected .*, got {value!r}"):
        LLM(*pair, **{field: value})


def test_too_little_memory(pair, monkeypatch):
    size = sum(Path(folder, "model.safetensors").stat().st_size for folder in pair)
    # One longest sequence, in pages of 64 slots: the target's, and the draft's with its window.
    kv = (9 + 13) * 64 * (2 * 2 * 2 * 8 * 4)  # (K and V, layers, heads, head size, bytes)
    monkeypatch.setattr(preflight, "SHARE_OF_MEMORY", 1.0)
    monkeypatch.setattr(preflight, "free_bytes", lambda device: size + kv)
    with pytest.raises(AssertionError, match="Ray was started"):
        LLM(*pair, device="cpu")
    with pytest.raises(ResourceError, match=r"memory: .* do not fit .*; lower kv_memory"):
        LLM(*pair, device="cpu", kv_memory=1.0)
    with pytest.raises(ResourceError, match="memory"):
        LLM(*pair, device="cpu", num_drafts=2)


def test_no_gpu(pair, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ResourceError, match="device: 'cuda' needs a GPU"):
        LLM(*pair, device="cuda")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "/no/such/folder"], "ssd-ray: target: no folder at /no/such/folder"),
        (["--draft", "{other}", "--sampler", "rejection"], "ssd-ray: draft: its tokenizer is not the target's"),
        (["--max-model-len", "513"], "ssd-ray: max_model_len: expected at most 512"),
        (["--device", "cpu", "--kv-memory", "4"], "ssd-ray: memory: "),
        (["--device", "cpu", "--kv-memory", "0.0001"], "ssd-ray: kv_memory: expected at least 0."),
    ],
)
def test_the_command_line_exits_with_2(pair, other_vocabulary, monkeypatch, flags, message):
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 1 << 30)
    models = ["--target", pair[0], "--draft", pair[1]]
    flags = [flag.replace("{other}", other_vocabulary) for flag in flags]
    result = CliRunner().invoke(app, ["generate", *models, *flags, "x"])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
