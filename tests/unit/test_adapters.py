"""PEFT adapters: merged into the target, and refused where they are not for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ssd_ray.cluster.preflight import check
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError, ModelError, UnsupportedModelError
from ssd_ray.models import adapters
from ssd_ray.models.info import check_adapter_of, model_fingerprint
from ssd_ray.models.loader import load_runner
from tests.support.engines import engine
from tests.support.tiny import save_model, tiny_model

peft = pytest.importorskip("peft")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("target"), tiny_model()))


@pytest.fixture(scope="module")
def adapter(target: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_adapter(tmp_path_factory.mktemp("adapter"), target))


def save_adapter(folder: Path, target: str, **config: Any) -> Path:
    """A random one of low rank."""
    model = AutoModelForCausalLM.from_pretrained(target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        values: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
        peft.get_peft_model(model, peft.LoraConfig(**values | config)).save_pretrained(folder)
    return folder


@torch.inference_mode()
def test_the_text_is_that_of_peft(target: str, adapter: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(target)
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    prompt = [5, 6, 7]
    want = merged.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)[0, 3:]
    runner = load_runner(target, role="target", rows=1, scratch=16, dtype="float32", device="cpu", adapter=adapter)
    torch.testing.assert_close(
        runner.append([0], [prompt], [0])[0], merged(torch.tensor([prompt])).logits[0], rtol=1e-5, atol=1e-4
    )
    config = EngineConfig(target=target, draft=target, adapter=adapter, dtype="float32", device="cpu", max_num_seqs=1)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with engine(config, "memory") as generate:
        assert list(generate([prompt], params)[0][0]) == want.tolist()
    plain = AutoModelForCausalLM.from_pretrained(target)(torch.tensor([prompt])).logits[0]
    assert (runner.append([0], [prompt], [0])[0] - plain).norm() > 0.1 * plain.norm()


def test_what_fits_passes_and_is_known_elsewhere(target: str, adapter: str, tmp_path: Path) -> None:
    models = check(EngineConfig(target=target, method="ar", adapter=adapter))
    assert models.fingerprints["target"] == model_fingerprint(target, adapter=adapter) != model_fingerprint(target)
    other = shutil.copytree(adapter, tmp_path / "other")
    weights = {name: weight + 1 for name, weight in load_file(other / WEIGHTS).items()}
    save_file(weights, other / WEIGHTS)
    assert model_fingerprint(target, adapter=str(other)) != models.fingerprints["target"]


def changed(adapter: str, folder: Path, **config: Any) -> Path:
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    whole = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(whole))
    return folder


def test_what_does_not_fit_is_refused(target: str, adapter: str, tmp_path: Path) -> None:
    def refused(path: Path | str, message: str, of: str = target) -> None:
        with pytest.raises(ModelError, match=message):
            check_adapter_of(str(path), of)

    refused(tmp_path / "nowhere", "adapter: no folder at")
    refused(target, f"adapter: no {CONFIG} in")
    empty = changed(adapter, tmp_path / "empty")
    (empty / WEIGHTS).unlink()
    refused(empty, f"adapter: no {WEIGHTS} in")
    refused(changed(adapter, tmp_path / "more", target_modules=["q_proj", "up_proj", "down_proj"]), "lacks weights")
    refused(changed(adapter, tmp_path / "fewer", target_modules=["q_proj"]), "what the target does not have")
    refused(changed(adapter, tmp_path / "other", target_modules=["c_attn"]), "does not fit the target")
    refused(changed(adapter, tmp_path / "rank", r=8), "other shapes than the target")
    wider = str(save_model(tmp_path / "wider", tiny_model(hidden_size=64)))
    refused(adapter, "other shapes than the target", wider)
    deeper = str(save_model(tmp_path / "deeper", tiny_model(layers=3)))
    refused(adapter, "lacks weights that its config names", deeper)
    (cut := changed(adapter, tmp_path / "cut") / WEIGHTS).write_bytes(cut.read_bytes()[:100])
    refused(cut.parent, "cannot read")


def test_what_cannot_be_merged_is_refused(target: str, tmp_path: Path) -> None:
    peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, base_model_name_or_path=target
    ).save_pretrained(tmp_path)
    save_file({}, tmp_path / WEIGHTS)
    with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING, which cannot be merged"):
        check_adapter_of(str(tmp_path), target)


def test_the_package_that_merges_is_named(target: str, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"adapter: .*pip install 'ssd-ray\[adapter\]'"):
        check(EngineConfig(target=target, method="ar", adapter=adapter))
