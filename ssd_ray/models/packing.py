"""Weights in the order in which the CPU's matrix kernels read them, where that is faster.

PyTorch's products in half precision on a CPU bring the weight into that order at every call, which for the few tokens of
a decoding forward takes longer than the product itself; those in float32 may go through another library. Done once, the
products of 4 to 16 tokens often take half to three quarters of the time. Not on every processor: both ways are timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ssd_ray.models.clock import forward_clock

_FEW_TOKENS = 8
"""Tokens for which the order is chosen; it serves any other number."""

TIMED_TOKENS = (1, 4, 8, 16)
TIMED_BYTES = 256 * 2**20
"""Weights that are timed, one after the other as in a forward, so that they come from memory where they do there."""

CLEARLY = 0.97
"""Part of the time that packed products must not exceed."""

class PackedLinear(nn.Module):
    """An ``nn.Linear`` for inference that holds nothing but the packed weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight, _FEW_TOKENS)

    @property
    def weight(self) -> Tensor:
        """A copy in the usual order, for code that looks at it."""
        weight: Tensor = self._packed.to_dense()
        return weight

    def forward(self, inputs: Tensor) -> Tensor:
        """The product, [.., in_features] to [.., out_features]."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, "none", [], "")
        return output


def packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing is possible: on a CPU that computes in this dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@torch.inference_mode()
def pack_linears(model: nn.Module) -> bool:
    """Replace every ``nn.Linear`` of a model, in place, if products are faster so; returns whether. Layers of other
    classes stay as they are."""
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear
    ]
    sample = list(_sample([linear for _, _, linear in places]))
    packed = [PackedLinear(linear) for linear in sample]
    if not sample or seconds(packed) > CLEARLY * seconds(sample):
        return False
    for index, (module, name, linear) in enumerate(places):
        setattr(module, name, packed[index] if index < len(packed) else PackedLinear(linear))
    return True


def _sample(linears: Sequence[nn.Linear]) -> Iterator[nn.Linear]:
    """The first layers, up to :data:`TIMED_BYTES`."""
    size = 0
    for linear in linears:
        if size > TIMED_BYTES:
            return
        size += linear.weight.nbytes
        yield linear


def seconds(layers: Sequence[nn.Linear | PackedLinear], repeats: int = 3) -> float:
    """What products of :data:`TIMED_TOKENS` take with all of the layers, the quickest of several times each."""
    weight = layers[0].weight
    clock, dtype = forward_clock(weight.device), weight.dtype
    total = 0.0
    for tokens in TIMED_TOKENS:
        inputs = {size: torch.ones(tokens, size, dtype=dtype) for size in {layer.in_features for layer in layers}}
        times = []
        for _ in range(repeats):
            start = clock()
            for layer in layers:
                layer(inputs[layer.in_features])
            times.append(clock() - start)
        total += min(times)
    return total
