"""Files that are no model, or not the one that was meant, are refused in words, before anything is started."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssd_ray.cluster.preflight import check
from ssd_ray.cluster.processes import require_same
from ssd_ray.config import EngineConfig
from ssd_ray.errors import ModelError, UnsupportedModelError
from ssd_ray.models.checkpoint import fingerprint, same_model
from ssd_ray.models.info import model_info
from ssd_ray.models.loader import load_runner
from tests.support.tiny import save_model, tiny_model, tiny_tokenizer

SIZE = {"rows": 1, "scratch": 32, "device": "cpu"}

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 269060552\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", tiny_model())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = tiny_model()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    tiny_tokenizer(96).save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


def refused(folder: Path, match: str) -> None:
    """Before anything is started, and where it is loaded."""
    with pytest.raises(ModelError, match=match) as caught:
        check(EngineConfig(target=str(folder), method="ar"))
    assert str(caught.value).startswith("target: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=match):
        load_runner(str(folder), role="target", **SIZE)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_git_lfs_pointer(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    what = "weights" if name == "model.safetensors" else "the file itself"
    refused(folder, f"{name}: this is a Git LFS pointer, not {what}; `git lfs pull`")


def test_a_git_lfs_pointer_among_shards(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_text(POINTER)
    refused(sharded, f"{shard.name}: this is a Git LFS pointer, not weights")


def test_pointers_that_nobody_reads_do_not_matter(folder: Path) -> None:
    for name in ("consolidated.safetensors", "model.gguf", "picture.png"):
        (folder / name).write_text(POINTER)
    assert check(EngineConfig(target=str(folder), method="ar")).vocab_size == 96
    assert load_runner(str(folder), role="target", **SIZE).vocab_size == 96


def test_shards_that_are_missing(sharded: Path) -> None:
    assert load_runner(str(sharded), role="target", **SIZE).vocab_size == 96
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[2].unlink()
    refused(sharded, f"lacks {shards[2].name}, which its index names")
    for shard in shards[1:]:
        shard.unlink(missing_ok=True)
    refused(sharded, rf"lacks {shards[1].name}, .* and {len(shards) - 5} more, which its index names")


def test_an_index_that_is_none(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{}")
    refused(sharded, r"model.safetensors.index.json is no index of weights")


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, r"no weights in .*; expected one of model.safetensors, ")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_file_that_was_cut(folder: Path, kept: float) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])
    refused(folder, r"model.safetensors is cut short or damaged")


def test_an_archive_of_torch_that_was_cut(folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), file)
    (folder / "model.safetensors").unlink()
    assert load_runner(str(folder), role="target", **SIZE).vocab_size == 96
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    refused(folder, r"pytorch_model.bin is cut short or damaged")


def test_weights_that_are_missing_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    lost = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    save_file({name: weight for name, weight in weights.items() if name not in lost}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=rf"^target: .* lacks weights that the model has: {', '.join(lost)}$"):
        load_runner(str(folder), role="target", **SIZE)


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors") | {"model.norm.weight": torch.zeros(7)}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"another shape than the model: model\.norm\.weight \(\(7,\), not \(32,\)\)$"):
        load_runner(str(folder), role="target", **SIZE)


def test_weights_that_are_too_many_are_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(folder / "model.safetensors")
    weights |= {f"model.layers.{layer}.extra.weight": torch.zeros(2) for layer in range(6)}
    save_file(weights, folder / "model.safetensors")
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        load_runner(str(folder), role="draft", **SIZE)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"draft: {folder} has weights that the model has not: model.layers.0.extra.weight, ")
    assert message.endswith(" and 2 more")
    assert capfd.readouterr().err == ""


class TestFingerprints:
    """The same model is told from others, wherever it lies."""

    def test_copies_are_the_same(self, sharded: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(sharded, tmp_path / "copy")
        assert fingerprint(copy) == fingerprint(sharded)

    def test_another_config_or_other_weights_are_not(self, folder: Path, tmp_path: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        other = shutil.copytree(folder, tmp_path / "config")
        (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
        assert not same_model(fingerprint(folder), fingerprint(other))
        tuned = save_model(tmp_path / "tuned", tiny_model(seed=1))
        assert fingerprint(tuned)[0] == fingerprint(folder)[0]
        assert not same_model(fingerprint(folder), fingerprint(tuned))

    def test_weights_that_are_not_here_are_not_compared(self, folder: Path, tmp_path: Path) -> None:
        light = shutil.copytree(folder, tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))
        assert fingerprint(light)[1] == ""
        assert same_model(fingerprint(folder), fingerprint(light))

    def test_an_actor_refuses_another_model_in_the_place(self, folder: Path) -> None:
        checked = check(EngineConfig(target=str(folder), method="ar"))
        require_same(checked.config, checked.fingerprints, ["target", "draft"])
        save_model(folder, tiny_model(seed=1))
        with pytest.raises(ModelError, match=rf"^target: {folder} on .* is not the one that was looked at"):
            require_same(checked.config, checked.fingerprints, ["target"])
        shutil.rmtree(folder)
        with pytest.raises(ModelError, match=rf"^target: no folder at {folder}, on .*, where the target is to run"):
            require_same(checked.config, checked.fingerprints, ["target"])


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


class TestOwnCode:
    """Models that come with Python code."""

    @pytest.fixture
    def own(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        config = json.loads((folder / "config.json").read_text())
        names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        (folder / "own.py").write_text(CODE)
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
        return folder

    def test_they_are_refused_at_once(self, own: Path) -> None:
        with pytest.raises(UnsupportedModelError, match=r"^target: .* which only trust_remote_code=True runs$"):
            check(EngineConfig(target=own))  # type: ignore[arg-type]

    def test_they_run_where_they_are_trusted(self, own: Path) -> None:
        checked = check(EngineConfig(target=str(own), method="ar", trust_remote_code=True))
        assert checked.vocab_size == 96
        runner = load_runner(str(own), role="target", trust_remote_code=True, **SIZE)
        expected = tiny_model()(torch.arange(8)[None]).logits
        torch.testing.assert_close(runner.append([0], [range(8)], [0])[0][None], expected, rtol=1e-5, atol=1e-5)

    def test_code_for_a_kind_that_transformers_has_half(self, own: Path) -> None:
        config = json.loads((own / "config.json").read_text())
        (own / "config.json").write_text(json.dumps(config | {"model_type": "vit", "hidden_size": 32}))
        with pytest.raises(UnsupportedModelError, match="which only trust_remote_code=True runs"):
            model_info(str(own))

    def test_a_tokenizer_with_code(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))
        settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(UnsupportedModelError, match=r"^target: .* which only trust_remote_code=True runs$"):
            check(EngineConfig(target=str(folder), method="ar"))


def test_a_hub_id_that_is_not_here_is_one_short_sentence() -> None:
    with pytest.raises(ModelError) as caught:
        check(EngineConfig(target="nobody/no-such-model"))
    assert str(caught.value) == (
        "target: cannot load nobody/no-such-model: "
        "it is no folder here, and no hub model that is on this machine or can be fetched"
    )
