"""Linear layers in few bits: made at load, or so in the checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ssd_ray.cluster import preflight
from ssd_ray.cluster.preflight import check
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError, UnsupportedModelError
from ssd_ray.models import dtypes, formats, quantize
from ssd_ray.models.describe import describe
from ssd_ray.models.loader import load_runner
from ssd_ray.models.packing import Matrix
from ssd_ray.models.quantize import GROUP, Int4, Int8, Int8Weight, quantised_bytes, quantize_linears, refuse_kind
from tests.support.engines import engine
from tests.support.tiny import save_model, tiny_model

CPU = torch.device("cpu")
SIZE: dict[str, Any] = {"rows": 2, "scratch": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = tiny_model("llama", hidden_size=64, intermediate_size=96, head_dim=16)
    return str(save_model(tmp_path_factory.mktemp("plain"), model))


needs_vnni = pytest.mark.skipif(not quantize.multiplies_int8(), reason="this CPU lacks VNNI")


@pytest.mark.parametrize(
    ("matrix", "error"), [pytest.param(Int8, 0.01, marks=needs_vnni), (Int8Weight, 0.01), (Int4, 0.1)]
)
@torch.inference_mode()
def test_a_product_is_near_and_a_row_does_not_depend_on_others(matrix: type[Matrix], error: float) -> None:
    random = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(48, 2 * GROUP, generator=random), torch.randn(9, 2 * GROUP, generator=random)
    inputs[1:] *= torch.logspace(-3, 3, 8)[:, None]  # rows of other sizes share no scale
    kept, bias = matrix(weight), torch.randn(48, generator=random)
    got, want = kept.of(inputs, bias), inputs @ weight.t() + bias
    assert ((got - want).norm(dim=1) < 2 * error * want.norm(dim=1)).all()
    assert (kept.whole() - weight).norm() < error * weight.norm()
    for count in range(1, 9):
        assert torch.equal(kept.of(inputs[:count], bias), got[:count])


@needs_vnni
@torch.inference_mode()
def test_int8_is_what_its_integers_say() -> None:
    random = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(16, 24, generator=random), torch.randn(3, 24, generator=random)
    inputs[:, 0] = 100.0  # beside which one number of 8 bits has little left for the others
    want = inputs @ Int8(weight).whole().t()
    torch.testing.assert_close(Int8(weight).of(inputs, None), want, rtol=0.0, atol=0.02)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((Int8(weight).whole() - weight).abs() < 0.501 * step).all()


@pytest.mark.parametrize(("there", "matrix"), [(True, Int8), (False, Int8Weight)])
def test_int8_suits_the_instructions(monkeypatch: pytest.MonkeyPatch, there: bool, matrix: type[Matrix]) -> None:
    monkeypatch.setattr(quantize, "multiplies_int8", lambda: there)
    assert quantize._matrix("int8", nn.Linear(8, 8), None) is matrix


@pytest.mark.parametrize("limit", ["", "AVX512_CORE_VNNI", "AVX512_CORE", "avx2"])
def test_whether_there_are_instructions_for_int8(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert dtypes.has_instructions(torch.int8) == (limit in ("", "AVX512_CORE_VNNI"))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not dtypes.has_instructions(torch.int8)
    assert not quantize.multiplies_int8.__wrapped__()


def test_sums_that_are_cut_off_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "has_instructions", lambda dtype: True)
    monkeypatch.setattr(torch, "_int_mm", lambda some, others: some.int() @ others.int())
    assert quantize.multiplies_int8.__wrapped__()
    monkeypatch.setattr(torch, "_int_mm", lambda some, others: (some.int() @ others.int()).clamp(min=-(2**15)))
    assert not quantize.multiplies_int8.__wrapped__()


@torch.inference_mode()
def test_int8_weights_are_as_near_as_eight_bits_are() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 64)[:, None]
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((Int8Weight(weight).whole() - weight).abs() < 0.76 * step).all()  # the largest may lose a quarter


@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.inference_mode()
def test_what_is_replaced_and_what_it_takes(kind: Any) -> None:
    model = tiny_model("qwen2", hidden_size=64, tie_word_embeddings=True).to(torch.bfloat16)
    before, embedding = quantised_bytes(model, kind, torch.float32), model.get_input_embeddings().weight
    linears = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    head = model.get_output_embeddings().weight.numel()
    quantize_linears(model, kind, torch.float32)
    assert not any(isinstance(layer, nn.Linear) for layer in model.modules())
    assert model.dtype == torch.float32
    assert embedding.dtype == torch.float32
    others = sum(each.numel() for each in model.parameters()) * 4
    of_linears = linears if kind == "int8" else (linears - head) * 5 // 8 + head
    assert of_linears < before - others < 1.3 * of_linears
    assert torch.isfinite(model(torch.arange(5)[None]).logits).all()


@pytest.mark.parametrize("kind", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_ar_sd_and_ssd_write_the_same(plain: str, kind: Any) -> None:
    config = EngineConfig(target=plain, draft=plain, quantize=kind, dtype="float32", device="cpu", max_num_seqs=2)
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=16, ignore_eos=True)
    texts = []
    for method in ("ar", "sd", "ssd"):
        with engine(replace(config, method=method), "memory") as generate:
            texts.append(generate([[5, 6, 7], [9]], params)[0])
    assert texts[0] == texts[1] == texts[2]


def test_tokens_have_the_same_bits_in_any_number(plain: str) -> None:
    runner = load_runner(plain, role="target", quantize="int8", **SIZE)
    assert len({tuple(runner._products.bits(count)) for count in range(1, 17)}) == 1


def test_what_a_device_cannot_do_is_refused(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="quantize: expected 'int8' or 'int4' on a CPU"):
        check(EngineConfig(target=plain, method="ar", quantize="fp8", device="cpu"))
    with pytest.raises(ConfigError, match="quantize: expected one of"):
        EngineConfig(quantize="int3")  # type: ignore[arg-type]
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ssd-ray\[quantize\]'"):
        refuse_kind("int8", torch.device("cuda"))


def test_less_memory_is_enough(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = EngineConfig(target=plain, method="ar", device="cpu")
    infos = [describe(plain, quantize=kind).weight_bytes for kind in (None, "int8")]
    assert infos[1] < infos[0] / 2
    seen: list[int] = []
    monkeypatch.setattr(preflight, "is_private", lambda: True)
    monkeypatch.setattr(preflight, "_require_memory", lambda _, found, __: seen.append(found["target"].parameter_bytes))
    for kind in ("none", "int8"):
        check(replace(asked, quantize=kind))
    assert seen == infos


def said(folder: Path, source: str, **config: Any) -> Path:
    """A copy of a checkpoint whose config says that it is quantised."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    whole = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def test_the_package_that_a_checkpoint_needs_is_named(
    plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(said(tmp_path, plain, quant_method="gptq", bits=4, group_size=32))
    assert describe(folder).quantised == "gptq"
    monkeypatch.setattr(formats, "_installed", lambda name: name != "gptqmodel")
    with pytest.raises(
        UnsupportedModelError, match="quantised by gptq, which needs more packages: pip install gptqmodel"
    ):
        load_runner(folder, role="target", **SIZE)
    monkeypatch.setattr(preflight, "is_private", lambda: True)
    with pytest.raises(UnsupportedModelError, match="pip install gptqmodel"):
        check(EngineConfig(target=folder, method="ar", device="cpu"))
    other = str(said(tmp_path, plain, quant_method="unheard"))
    with pytest.raises(UnsupportedModelError, match="quantised by unheard, which cannot be loaded here"):
        load_runner(other, role="target", **SIZE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_a_checkpoint_in_fp8_is_widened_on_a_cpu(plain: str, tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("accelerate")
    folder = said(
        tmp_path, plain, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[64, 64], fmt="e4m3"
    )
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "_proj" in name]:
        weight = weights[name]
        blocks = [-(-size // 64) for size in weight.shape]
        scale = weight.abs().max() / 448
        weights[name] = (weight / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale.expand(blocks).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    runner = load_runner(str(folder), role="target", dtype=dtype, **SIZE)
    model = AutoModelForCausalLM.from_pretrained(plain)
    tokens = [3, 4, 5, 6]
    got, want = runner.append([0], [tokens], [0])[0], model(torch.tensor([tokens])).logits[0]
    assert 0 < (got - want).norm() < 0.2 * want.norm()
    assert runner.dtype == getattr(torch, dtype)
    found = describe(str(folder))
    assert (found.quantised, found.weight_bytes) == ("fp8", found.parameters * 4)  # what is not fp8 is float32


@torch.inference_mode()
def test_a_checkpoint_of_torchao_with_int8_activations(plain: str, tmp_path: Path) -> None:
    """Its logits over scattered KV are compared by what its weights stand for: rounding inputs would hide much more."""
    ao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(ao.Int8DynamicActivationInt8WeightConfig())
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.bfloat16
    )
    save_model(tmp_path, model)
    runner = load_runner(str(tmp_path), role="target", dtype="bfloat16", **SIZE)
    tokens = [3, 4, 5, 6]
    got, want = runner.append([0], [tokens], [0])[0], model(torch.tensor([tokens])).logits[0].float()
    assert (got - want).norm() < 0.05 * want.norm()
    found = describe(str(tmp_path), quantize="int8")  # which it is already
    assert found.quantised == "torchao"
    assert found.weight_bytes < describe(plain).weight_bytes / 2


def test_layers_that_look_at_their_neighbours_are_refused() -> None:
    class Apart(nn.Module):
        in_features = out_features = 32
        dim: int | None = -1

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            scale = inputs.abs().amax() if self.dim is None else inputs.abs().amax(self.dim, keepdim=True)
            return (inputs / scale * 127).round() * scale

    class Together(Apart):
        dim = None

    formats.refuse_company(nn.Sequential(nn.Linear(32, 8), Apart()), "target")
    with pytest.raises(UnsupportedModelError, match="Together, round a token by what is beside it"):
        formats.refuse_company(nn.Sequential(nn.Linear(32, 8), Together()), "target")
