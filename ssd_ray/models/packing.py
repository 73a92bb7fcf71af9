"""Weights in the order in which the CPU's matrix kernels read them.

PyTorch's bfloat16 products on a CPU bring the weight into that order at every call, which for the few tokens of a
decoding forward takes longer than the product itself. Done once, products of 1 to 16 tokens take half to three quarters
of the time, and the results are the same bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FEW_TOKENS = 8
"""Tokens for which the order is chosen; it serves any other number."""


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
    """Whether packing is possible, and of use: bfloat16 on a CPU that computes in it."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@torch.inference_mode()
def pack_linears(model: nn.Module) -> None:
    """Replace every ``nn.Linear`` of a model, in place. Layers of other classes stay as they are."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
