"""Packed weights: the same products, bit for bit in half precision, where they are faster."""

from math import inf
from pathlib import Path

import pytest
import torch
from torch import nn

from ssd_ray.models import packing
from ssd_ray.models.packing import PackedLinear, find_siblings, pack_linears, packable
from ssd_ray.models.runner import HFRunner
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not packable(CPU, torch.bfloat16), reason="this CPU does not compute in bfloat16")


@pytest.fixture(params=[True, False])
def faster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether packed products are found to be faster."""
    monkeypatch.setattr(packing, "CLEARLY", inf if request.param else 0.0)
    return request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 16, 100])
@torch.inference_mode()
def test_a_packed_layer_gives_the_same_bits(tokens: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias, dtype=torch.bfloat16)
    packed = PackedLinear(linear)
    inputs = torch.randn(2, tokens, 48, dtype=torch.bfloat16)
    assert torch.equal(packed(inputs), linear(inputs))
    assert torch.equal(packed.weight, linear.weight)
    assert (packed.in_features, packed.out_features) == (48, 80)


@pytest.mark.parametrize("tokens", [1, 8, 100])
@torch.inference_mode()
def test_layers_that_read_the_same_input_are_one_product(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CLEARLY", inf)
    model = tiny_model("qwen2").to(torch.bfloat16)
    siblings = find_siblings(model)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert siblings[:2] == [[attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]]
    linears = siblings[0]
    assert pack_linears(model, siblings)
    packed = [attention.q_proj, attention.k_proj, attention.v_proj]
    first, second = torch.randn(2, 1, tokens, 32, dtype=torch.bfloat16)
    for layer in (0, 1, 2, 0):  # another input, out of turn
        assert torch.equal(packed[layer](second), linears[layer](second))
    for ours, theirs in zip(packed, linears, strict=True):
        assert torch.equal(ours(first), theirs(first))
        assert ours(first).is_contiguous()
        assert torch.equal(ours.weight, theirs.weight)


def test_only_plain_linear_layers_are_packed(faster: bool) -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Special(8, 8)), nn.LayerNorm(8)).to(torch.bfloat16)
    assert pack_linears(model) == faster
    first = PackedLinear if faster else nn.Linear
    assert [type(module) for module in model.modules()][1:] == [first, nn.Sequential, Special, nn.LayerNorm]


def test_what_was_found_to_be_faster_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that measured otherwise would round otherwise."""
    monkeypatch.setenv("SSD_RAY_CACHE", str(tmp_path))
    times = iter([1.0, 2.0, 3.0, 2.0])
    monkeypatch.setattr(packing, "seconds", lambda layers: next(times))
    for dtype, packed in ((torch.float32, True), (torch.float32, True), (torch.bfloat16, False)):
        assert pack_linears(nn.Sequential(nn.Linear(8, 8)).to(dtype)) == packed


def test_a_model_without_linear_layers_is_left_alone() -> None:
    assert not pack_linears(nn.Sequential(nn.LayerNorm(8)))


@torch.inference_mode()
def test_a_packed_layer_in_single_precision_is_as_exact() -> None:
    linear, inputs = nn.Linear(48, 80), torch.randn(2, 8, 48)
    packed = PackedLinear(linear)
    torch.testing.assert_close(packed(inputs), linear(inputs))
    assert torch.equal(packed.weight, linear.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_runners_pack_what_is_faster_so(dtype: torch.dtype, faster: bool) -> None:
    model = tiny_model("llama").to(dtype)
    assert HFRunner(model, rows=1, max_length=32, scratch=16).packed == faster
    assert any(isinstance(module, PackedLinear) for module in model.modules()) == faster


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_not_packed(dtype: torch.dtype) -> None:
    assert not packable(CPU, dtype)
