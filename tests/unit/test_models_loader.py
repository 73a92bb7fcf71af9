"""From a path to a runner: what works, and that whatever does not is refused in our own words."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ssd_ray.errors import (
    ConfigError,
    ModelError,
    ResourceError,
    SsdRayError,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from ssd_ray.models import loader, sources
from ssd_ray.models.describe import describe
from ssd_ray.models.info import (
    Kept,
    check_pair,
    count_parameters,
    end_tokens,
    kv_bytes,
    load_tokenizer,
    model_info,
)
from ssd_ray.models.loader import count_pages, kv_size, load_runner
from ssd_ray.models.reach import EVERYTHING, Reach
from tests.support.tiny import WINDOW, save_model, tiny_config, tiny_model, tiny_pair

SIZE = {"rows": 2, "scratch": 32, "device": "cpu"}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    return tiny_pair(tmp_path)


def save_config(folder: Path, architecture: str, **values: object) -> str:
    AutoConfig.for_model(architecture, **values).save_pretrained(folder)
    return str(folder)


def test_model_info_reads_the_config_alone(pair: tuple[str, str]) -> None:
    info = model_info(pair[0])
    assert (info.vocab_size, info.max_length, info.eos_token_ids) == (96, 128, (0,))
    assert info.parameter_bytes == (Path(pair[0]) / "model.safetensors").stat().st_size
    assert info.kv_bytes_per_slot == 2 * 2 * 2 * 8 * 4  # K and V, layers, heads, dim, float32
    (Path(pair[0]) / "model.safetensors").unlink()
    assert model_info(pair[0]).parameter_bytes == 0


def test_end_tokens_of_the_generation_config_come_first(pair: tuple[str, str]) -> None:
    (Path(pair[0]) / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert model_info(pair[0]).eos_token_ids == (3, 5)
    (Path(pair[0]) / "generation_config.json").unlink()
    assert model_info(pair[0]).eos_token_ids == (0,)


def test_the_tokenizers_own_end_token_ends_a_text_too(pair: tuple[str, str]) -> None:
    (Path(pair[0]) / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    tokenizer = load_tokenizer(pair[0])
    assert end_tokens(model_info(pair[0]), tokenizer) == (0, 3, 5)
    tokenizer.eos_token = None
    assert end_tokens(model_info(pair[0]), tokenizer) == (3, 5)


def test_load_runner(pair: tuple[str, str]) -> None:
    runner = load_runner(pair[0], role="target", **SIZE)
    assert (runner.rows, runner.max_length, runner.slots) == (2, 128, 192)  # whole pages
    assert (runner.vocab_size, runner.dtype) == (96, torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(pair[0])
    tokens = torch.arange(10)[None]
    runner.prefill(1, tokens[0, :6].tolist())
    (got,) = runner.append([1], tokens[:, 6:].tolist(), [6])
    torch.testing.assert_close(got, plain(tokens).logits[0, 6:], rtol=1e-5, atol=1e-5)


def test_loading_draws_nothing_on_the_terminal(pair: tuple[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    load_runner(pair[0], role="target", **SIZE)
    assert capfd.readouterr() == ("", "")


def test_length_and_dtype_can_be_chosen(pair: tuple[str, str]) -> None:
    runner = load_runner(pair[0], role="target", max_length=50, dtype="bfloat16", **SIZE)
    assert (runner.max_length, runner.slots, runner.dtype) == (50, 128, torch.bfloat16)
    assert runner.append([0], [[1]], [0])[0].dtype == torch.float32


def test_the_pool_can_be_smaller_than_its_rows(pair: tuple[str, str]) -> None:
    page_bytes = 64 * model_info(pair[0]).kv_bytes_per_slot
    runner = load_runner(pair[0], role="target", kv_memory=3.5 * page_bytes / 2**30, **SIZE)
    assert (runner.num_pages, runner.page_slots, runner.slots) == (3, 64, 192)
    assert runner.page_bytes == page_bytes
    runner.bind(1, 0, [2])
    assert runner.append([1], [[1]], [0])[0].shape == (1, 96)


def test_the_pair_agrees_often(pair: tuple[str, str]) -> None:
    tokens = torch.randint(0, 96, (1, 100), generator=torch.Generator().manual_seed(0)).tolist()
    best = [load_runner(path, role="draft", **SIZE).append([0], tokens, [0])[0].argmax(-1) for path in pair]
    assert 0.5 < (best[0] == best[1]).float().mean() < 1


def test_logits_can_be_cut_to_the_shared_vocabulary(pair: tuple[str, str]) -> None:
    runner = load_runner(pair[0], role="target", vocab_size=90, **SIZE)
    assert runner.append([0], [[1]], [0])[0].shape == (1, 90)


def test_the_tokenizer_comes_back(pair: tuple[str, str]) -> None:
    tokenizer = load_tokenizer(pair[0])
    assert tokenizer.decode(tokenizer("def add(a, b):").input_ids) == "def add(a, b):"


def test_a_pair_shares_one_vocabulary(pair: tuple[str, str], tmp_path: Path) -> None:
    check_pair(*pair)
    # Embeddings may be padded differently, as in families of one tokenizer.
    padded = save_model(tmp_path / "padded", tiny_model(vocab=104))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(pair[0]) / name, padded / name)
    check_pair(pair[0], str(padded))


def test_other_tokenizers_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", tiny_model(vocab=80))
    with pytest.raises(VocabularyMismatchError, match=r"^draft: .*16 of 96 entries"):
        check_pair(pair[0], str(other))


def test_without_tokenizers_sizes_decide(tmp_path: Path) -> None:
    target = save_config(tmp_path / "a", "llama", vocab_size=96)
    same, other = (save_config(tmp_path / name, "llama", vocab_size=size) for name, size in (("b", 96), ("c", 97)))
    check_pair(target, same)
    with pytest.raises(VocabularyMismatchError, match=r"^draft: .* 97 tokens, .* 96"):
        check_pair(target, other)


@pytest.mark.parametrize("path", ["/nowhere/model", "./missing", "~/missing-model", "a/b/c"])
def test_a_missing_folder_is_named(path: str) -> None:
    with pytest.raises(ModelError, match=f"^draft: no folder at {path}"):
        model_info(path, role="draft")


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^target: no config.json in {tmp_path}"):
        load_runner(str(tmp_path), role="target", **SIZE)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"^target: no folder at"):
        load_runner(str(tmp_path / "model.safetensors"), role="target", **SIZE)


def test_asking_what_a_model_keeps_leaves_its_config_alone() -> None:
    config = tiny_config("llama")
    before = config.to_json_string()
    assert kv_bytes(config, torch.float32) == 2 * kv_bytes(config, torch.bfloat16)
    assert count_parameters(config) == sum(weight.numel() for weight in tiny_model().parameters())
    assert config.to_json_string() == before


def test_a_hub_id_that_cannot_be_had_is_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"^target: cannot load nobody/no-such-model"):
        model_info("nobody/no-such-model")


def test_a_missing_bundled_model_is_a_model_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "ASSETS", tmp_path)
    with pytest.raises(ModelError, match=r"^draft: the bundled model"):
        model_info(None, role="draft")


def test_none_is_the_bundled_model(monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str]) -> None:
    monkeypatch.setattr(sources, "ASSETS", Path(pair[0]).parent)
    assert model_info(None, role="draft").vocab_size == 96


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
def test_broken_files_raise_model_errors(pair: tuple[str, str], broken: str) -> None:
    (Path(pair[0]) / broken).write_bytes(b"{ nothing of use")
    load = load_tokenizer if broken == "tokenizer.json" else partial(load_runner, **SIZE)
    with pytest.raises(ModelError, match=r"^target: cannot load"):
        load(pair[0], role="target")


def test_missing_weights_raise_a_model_error(pair: tuple[str, str]) -> None:
    (Path(pair[0]) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"^target: cannot load"):
        load_runner(pair[0], role="target", **SIZE)


def test_more_positions_than_the_model_has_are_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^max_model_len: expected at most 128") as caught:
        load_runner(pair[0], role="target", max_length=129, **SIZE)
    assert caught.value.field == "max_model_len"


UNSUPPORTED = {
    "t5": ({}, "encoder-decoder"),
    "bart": ({}, "encoder-decoder"),
    "rwkv": ({}, "recurrent state"),
    "deepseek_v32": ({}, "layers of type indexed_attention"),
    "vit": ({}, "no causal language model"),
}


@pytest.mark.parametrize("architecture", UNSUPPORTED)
def test_unsupported_architectures_are_refused_by_their_config(tmp_path: Path, architecture: str) -> None:
    values, reason = UNSUPPORTED[architecture]
    path = save_config(tmp_path, architecture, **values)
    with pytest.raises(UnsupportedModelError, match=rf"^draft: {architecture} models cannot be served: .*{reason}"):
        load_runner(path, role="draft", max_length=64, **SIZE)
    with pytest.raises(UnsupportedModelError, match=reason):
        model_info(path, role="draft")


@pytest.mark.parametrize(
    ("architecture", "values", "field"),
    [
        ("doge", {"keep_window_size": 32, "num_key_value_heads": 4}, "keep_window_size"),
        ("llama4_text", {"attn_temperature_tuning": True, "floor_scale": 32}, "floor_scale"),
    ],
)
def test_what_no_mask_says_beyond_some_length_is_refused_there(
    tmp_path: Path, architecture: str, values: dict[str, Any], field: str
) -> None:
    config = tiny_config(architecture, context=128, **values)
    save_model(tmp_path, AutoModelForCausalLM.from_config(config))
    with pytest.raises(UnsupportedModelError, match=rf"{field}=32 is shorter .* max_model_len to at most 32"):
        load_runner(str(tmp_path), role="target", **SIZE)
    assert load_runner(str(tmp_path), role="target", max_length=32, **SIZE).max_length == 32


def test_a_window_that_no_layer_uses_is_no_obstacle(tmp_path: Path) -> None:
    config = tiny_config("qwen2", context=128, sliding_window=16, use_sliding_window=False)
    save_model(tmp_path, AutoModelForCausalLM.from_config(config))
    assert load_runner(str(tmp_path), role="target", **SIZE).max_length == 128


@pytest.mark.parametrize("architecture", ["bloom", "bert", "cpmant"])
def test_models_that_do_not_obey_are_found_out_by_running_them(tmp_path: Path, architecture: str) -> None:
    names = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    names |= {"n_layer": 2, "n_head": 4, "dim_head": 8, "dim_ff": 48, "initializer_range": 0.3, "vocab_size": 96}
    known = AutoConfig.for_model(architecture)
    config = AutoConfig.for_model(architecture, **{key: names[key] for key in names if hasattr(known, key)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"KV cache"):
        load_runner(str(tmp_path), role="target", max_length=64, **SIZE)


def test_too_little_memory_is_found_before_anything_is_allocated(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "free_bytes", lambda device: 1 << 20)
    with pytest.raises(ResourceError, match=r"^target: .* GiB of KV .* max_num_seqs or max_model_len"):
        load_runner(pair[0], role="target", rows=100, scratch=32, device="cpu")


def test_the_pool_fits_the_memory_that_is_free(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def pages(free_pages: float) -> int:
        free = int(free_pages * page_bytes / loader.FREE_SHARE) + weights
        monkeypatch.setattr(loader, "free_bytes", lambda device: free)
        many = load_runner(pair[0], role="target", kv_memory="auto", rows=100, scratch=32, device="cpu")
        return many.num_pages

    page_bytes = 64 * model_info(pair[0]).kv_bytes_per_slot
    weights = sources.source_bytes(pair[0])
    per_row = (load_runner(pair[0], role="target", rows=1, scratch=32).slots) // 64
    assert pages(20.5) == 20
    assert pages(1e6) == 100 * per_row
    with pytest.raises(ConfigError, match="kv_memory: expected at least"):
        load_runner(pair[0], role="target", kv_memory=1e-9, rows=2, scratch=32, device="cpu")


def test_free_memory_is_measured() -> None:
    assert 1 << 24 < loader.free_bytes(torch.device("cpu")) < 1 << 48


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(ResourceError, match=r"^device: cuda"):
        load_runner(pair[0], role="target", rows=1, scratch=8, device="cuda")


def test_nothing_foreign_escapes(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("kernel"), KeyError("weight"), MemoryError(), torch.OutOfMemoryError("8 GiB")):

        def fail(*args: object, error: Exception = error, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
        with pytest.raises(SsdRayError):
            load_runner(pair[0], role="target", **SIZE)


def test_windowed_layers_get_pages_for_their_windows() -> None:
    """A row of 32,000 slots takes 500 pages of layers that see all, and 22 of those with a window of 1,024."""
    windowed, full = Kept(Reach(1024), 8), Kept(EVERYTHING, 2)
    size = {"rows": 4, "slots": 32_000, "ahead": 256}
    page_bytes = [64 * each.slot_bytes for each in (windowed, full)]
    assert count_pages("auto", [windowed, full], **size, free=1 << 60) == [4 * 2 * 22, 4 * 500]
    assert count_pages("auto", [windowed, full], **size, free=0) == [22, 500]
    least = sum(count * one for count, one in zip((22, 500), page_bytes, strict=True))
    assert count_pages(least / 2**30, [windowed, full], **size, free=0) == [22, 500]
    assert count_pages((least + 10 * sum(page_bytes)) / 2**30, [windowed, full], **size, free=0) == [32, 510]
    with pytest.raises(ConfigError, match="kv_memory: expected at least"):
        count_pages((least - 1) / 2**30, [windowed, full], **size, free=0)
    for memory in (least, 2 * least, 30 * least):
        pages = count_pages(memory / 2**30, [windowed, full], **size, free=0)
        assert memory - sum(page_bytes) < kv_size([windowed, full], pages) <= memory


def test_a_windowed_model_takes_less_memory(tmp_path: Path) -> None:
    target, _ = tiny_pair(tmp_path, "gemma2", context=2048)
    info = model_info(target)
    assert [each.reach for each in info.kept] == [Reach(WINDOW), EVERYTHING]
    assert sum(each.slot_bytes for each in info.kept) == info.kv_bytes_per_slot
    runner = load_runner(target, role="target", rows=2, scratch=16, kv_memory="auto", device="cpu")
    assert [pool.pages for pool in runner.pools] == [2 * 2 * 7, 2 * 33]
    assert describe(target).kv_bytes(2000) == info.kept[0].slot_bytes * WINDOW + info.kept[1].slot_bytes * 2000
