"""Packed weights: the same products, bit for bit."""

import pytest
import torch
from torch import nn

from ssd_ray.models.packing import PackedLinear, pack_linears, packable
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
