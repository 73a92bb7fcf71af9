"""Packed weights: the same products, bit for bit."""

import pytest
import torch
from torch import nn

from ssd_ray.models.packing import PackedLinear, find_siblings, pack_linears, packable
from ssd_ray.models.runner import HFRunner
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not packable(CPU, torch.bfloat16), reason="this CPU does not compute in bfloat16")


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
def test_layers_that_read_the_same_input_are_one_product(tokens: int) -> None:
    model = tiny_model("qwen2").to(torch.bfloat16)
    siblings = find_siblings(model)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert siblings[:2] == [[attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]]
    linears = siblings[0]
    pack_linears(model, siblings)
    packed = [attention.q_proj, attention.k_proj, attention.v_proj]
    first, second = torch.randn(2, 1, tokens, 32, dtype=torch.bfloat16)
    for layer in (0, 1, 2, 0):  # another input, out of turn
        assert torch.equal(packed[layer](second), linears[layer](second))
    for ours, theirs in zip(packed, linears, strict=True):
        assert torch.equal(ours(first), theirs(first))
        assert ours(first).is_contiguous()
        assert torch.equal(ours.weight, theirs.weight)


def test_only_plain_linear_layers_are_packed() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Special(8, 8)), nn.LayerNorm(8)).to(torch.bfloat16)
    pack_linears(model)
    assert [type(module) for module in model.modules()][1:] == [PackedLinear, nn.Sequential, Special, nn.LayerNorm]


@pytest.mark.parametrize(("dtype", "packed"), [(torch.bfloat16, True), (torch.float32, False)])
def test_runners_pack_what_is_packable(dtype: torch.dtype, packed: bool) -> None:
    model = tiny_model("llama").to(dtype)
    HFRunner(model, rows=1, max_length=32, scratch=16)
    assert any(isinstance(module, PackedLinear) for module in model.modules()) == packed
