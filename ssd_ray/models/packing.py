"""Weights in the order in which the CPU's matrix kernels read them.

PyTorch's bfloat16 products on a CPU bring the weight into that order at every call, which for the few tokens of a
decoding forward takes longer than the product itself. Done once, products of 1 to 16 tokens take half to three quarters
of the time, and the results are the same bit for bit. Starting a product then takes as long as computing it, so layers
that read the same input (a query's, a key's and a value's, say) are one product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_FEW_TOKENS = 8
"""Tokens for which the order is chosen; it serves any other number."""


class Product:
    """The packed weights of layers that read the same input; whichever asks first computes it for all."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        weights: list[Tensor] = [linear.weight for linear in linears]
        self._bias = torch.cat(biases) if biases else None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), _FEW_TOKENS)
        sizes = [linear.out_features for linear in linears]
        self._parts = [(end - size, size) for end, size in zip(accumulate(sizes), sizes, strict=True)]
        self._inputs: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}  # of these inputs, as far as they were not asked for

    def weight(self, index: int) -> Tensor:
        """A layer's weight in the usual order, a copy."""
        whole: Tensor = self._packed.to_dense()
        return whole.narrow(0, *self._parts[index])

    def output(self, index: int, inputs: Tensor) -> Tensor:
        """A layer's output, [.., in_features] to [.., out_features]."""
        if inputs is not self._inputs or index not in self._outputs:
            whole: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self._bias, "none", [], "")
            if len(self._parts) == 1:
                return whole
            self._inputs = inputs
            self._outputs = {index: whole.narrow(-1, *part) for index, part in enumerate(self._parts)}
        output = self._outputs.pop(index)
        if not self._outputs:
            self._inputs = None
        return output.contiguous()


class PackedLinear(nn.Module):
    """An ``nn.Linear`` for inference that holds nothing but its part of a product."""

    def __init__(self, linear: nn.Linear, product: Product | None = None, index: int = 0) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._product, self._index = product or Product([linear]), index

    @property
    def weight(self) -> Tensor:
        """A copy in the usual order, for code that looks at it."""
        return self._product.weight(self._index)

    def forward(self, inputs: Tensor) -> Tensor:
        """The product, [.., in_features] to [.., out_features]."""
        return self._product.output(self._index, inputs)


def packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing is possible, and of use: bfloat16 on a CPU that computes in it."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@torch.inference_mode()
def pack_linears(model: nn.Module, siblings: Sequence[Sequence[nn.Linear]] = ()) -> None:
    """Replace every ``nn.Linear`` of a model, in place. Layers of other classes stay as they are.

    Args:
        siblings: layers that read the same input, as :func:`find_siblings` has them.
    """
    packed: dict[nn.Linear, PackedLinear] = {}
    for group in siblings:
        product = Product(group)
        packed.update({linear: PackedLinear(linear, product, index) for index, linear in enumerate(group)})
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, packed.get(child) or PackedLinear(child))


@torch.inference_mode()
def find_siblings(model: PreTrainedModel) -> list[list[nn.Linear]]:
    """The plain linear layers that read the very same tensor in a forward, which one token is run to see."""
    calls: list[tuple[nn.Linear, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append((cast(nn.Linear, module), args[0]))

    hooks = [each.register_forward_pre_hook(note) for each in model.modules() if type(each) is nn.Linear]
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    times = Counter(linear for linear, _ in calls)
    groups: dict[tuple[int, bool], list[nn.Linear]] = {}
    for linear, inputs in calls:
        if times[linear] == 1:
            groups.setdefault((id(inputs), linear.bias is None), []).append(linear)
    return [group for group in groups.values() if len(group) > 1]
