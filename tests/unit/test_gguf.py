"""Models in one file, as llama.cpp has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ssd_ray.cluster.preflight import check
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import ModelError, ResourceError
from ssd_ray.models import sources
from ssd_ray.models.describe import describe
from ssd_ray.models.info import load_tokenizer, model_fingerprint
from tests.support.engines import engine
from tests.support.gguf import save_gguf
from tests.support.tiny import tiny_model, tiny_tokenizer

VOCAB, TEXT = 320, "def f(x):"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen2", vocab=VOCAB, use_sliding_window=False, sliding_window=None)


@pytest.fixture(scope="module")
def file(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model))


@torch.inference_mode()
def test_the_weights_are_those_of_the_file(file: str, model: PreTrainedModel) -> None:
    """In 8 bits, so nearly those that it was made of."""
    folder, _, name = file.rpartition("/")
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
    tokens = torch.arange(9)[None]
    got, want = (each(tokens).logits for each in (loaded, model))
    assert 0.0 < (got - want).abs().max() < 0.1 * want.abs().max()


def test_ar_sd_and_ssd_write_the_same(file: str) -> None:
    config = EngineConfig(target=file, draft=file, dtype="float32", device="cpu", max_num_seqs=1)
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=24, ignore_eos=True)
    texts = []
    for method in ("ar", "sd", "ssd"):
        with engine(replace(config, method=method), "memory") as generate:
            texts.append(generate([[5, 6, 7]], params)[0])
    assert texts[0] == texts[1] == texts[2]


def test_what_is_known_before_weights_are_read(file: str, model: PreTrainedModel) -> None:
    models = check(EngineConfig(target=file, method="ar"))
    assert models.prompt(TEXT) == tiny_tokenizer(VOCAB)(TEXT)["input_ids"]
    assert models.end_tokens == (0,)
    found = describe(file)
    assert (found.kind, found.parameters) == ("qwen2", model.num_parameters())
    assert found.weight_bytes == 2 * found.parameters  # as bfloat16, not what the file has


def test_its_tokenizer_is_in_it(file: str) -> None:
    words = load_tokenizer(file).convert_ids_to_tokens(range(VOCAB))
    assert words == [*tiny_tokenizer(VOCAB).convert_ids_to_tokens(range(VOCAB - 1)), "in"]


def test_it_is_known_again(file: str, tmp_path: Path) -> None:
    copy = tmp_path / "other.gguf"
    copy.write_bytes(Path(file).read_bytes()[:-4] + b"abcd")
    same, other = model_fingerprint(file), model_fingerprint(str(copy))
    assert same == model_fingerprint(file)
    assert same[1] != other[1]


def test_a_relative_file_is_made_absolute(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(file).parent)
    assert EngineConfig(target="tiny.gguf").target == file


def test_what_is_no_such_file(tmp_path: Path) -> None:
    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"model\.gguf is no GGUF file, or damaged"):
        describe(str(damaged))
    damaged.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="this is a Git LFS pointer, not weights"):
        describe(str(damaged))
    with pytest.raises(ModelError, match="no folder at"):
        describe(str(tmp_path / "missing.gguf"))


def test_the_package_that_reads_it_is_named(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"needs one more package: pip install 'ssd-ray\[gguf\]'"):
        describe(file)
