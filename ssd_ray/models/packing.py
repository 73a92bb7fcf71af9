"""Weights in the order in which the CPU's matrix kernels read them, where that is faster.

PyTorch's products in half precision on a CPU bring the weight into that order at every call, which for the few tokens
of a decoding forward takes longer than the product itself; those in float32 may go through another library. Done once,
the products of 4 to 16 tokens often take half to three quarters of the time. Not on every processor: both ways are
timed. Starting a product then takes as long as computing it, so layers that read the same input (a query's, a key's and
a value's, say) are one product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssd_ray.models.calibration import cache_path, keep, machine_name, read
from ssd_ray.models.clock import forward_clock

_FEW_TOKENS = 8
"""Tokens for which the order is chosen; it serves any other number."""

TIMED_TOKENS = (1, 4, 8, 16)
TIMED_BYTES = 256 * 2**20
"""Weights that are timed, one after the other as in a forward, so that they come from memory where they do there."""

CLEARLY = 0.97
"""Part of the time that packed products must not exceed."""


class Matrix(Protocol):
    """A weight [out_features, in_features], kept in some way."""

    def __init__(self, weight: Tensor) -> None: ...

    def of(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """The product with inputs, [.., in_features] to [.., out_features], with a bias."""

    def whole(self) -> Tensor:
        """The weight itself, or what it stands for."""


class Packed:
    """A matrix in oneDNN's order."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _FEW_TOKENS)

    def of(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`Matrix`."""
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, bias, "none", [], "")
        return outputs

    def whole(self) -> Tensor:
        """A copy in the usual order."""
        whole: Tensor = self._packed.to_dense()
        return whole


class Product:
    """The weights of layers that read the same input, as one matrix; whichever asks first computes it for all.

    Args:
        linears: these layers.
        matrix: how their weights are kept.
        dtype: of inputs and outputs; None is that of the weights.
    """

    def __init__(
        self, linears: Sequence[nn.Linear], matrix: type[Matrix] = Packed, dtype: torch.dtype | None = None
    ) -> None:
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        weights: list[Tensor] = [linear.weight for linear in linears]
        self.like = weights[0].new_empty(0, dtype=dtype)
        self._bias = torch.cat(biases).to(self.like.dtype) if biases else None
        self.out_features = sum(linear.out_features for linear in linears)
        self._matrix = matrix(torch.cat(weights))
        sizes = [linear.out_features for linear in linears]
        self._parts = [(end - size, size) for end, size in zip(accumulate(sizes), sizes, strict=True)]
        self._inputs: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}  # of these inputs, as far as they were not asked for

    def of(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """All layers' outputs, [.., in_features] to [.., sum of out_features], with a bias."""
        return self._matrix.of(inputs, bias)

    def weight(self, index: int) -> Tensor:
        """A layer's weight in the usual order, a copy."""
        return self._matrix.whole().narrow(0, *self._parts[index]).to(self.like.dtype)

    def output(self, index: int, inputs: Tensor) -> Tensor:
        """A layer's output, [.., in_features] to [.., out_features]."""
        if inputs is not self._inputs or index not in self._outputs:
            whole = self.of(inputs, self._bias)
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
        self.product, self._index = product or Product([linear]), index
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """A copy in the usual order, for code that looks at it."""
        return self.product.weight(self._index)

    def forward(self, inputs: Tensor) -> Tensor:
        """The product, [.., in_features] to [.., out_features]."""
        return self.product.output(self._index, inputs)


def packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing is possible: on a CPU that computes in this dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


@torch.inference_mode()
def pack_linears(model: nn.Module, siblings: Sequence[Sequence[nn.Linear]] = ()) -> bool:
    """Replace every ``nn.Linear`` of a model, in place, if products are faster so; returns whether. Layers of other
    classes stay as they are.

    Args:
        siblings: layers that read the same input, as :func:`find_siblings` has them.
    """
    places = plain_linears(model)
    packing = Packing(siblings)
    sample = list(_sample([linear for _, _, linear in places]))
    if not sample or not _packing_pays(packing, sample):
        return False
    for module, name, linear in places:
        setattr(module, name, packing.packed(linear))
    return True


def plain_linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of a model whose weights are plain tensors, and where they are."""
    return [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if is_plain(child)
    ]


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer, and neither its class nor that of its weight is another one's."""
    return (
        type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, Tensor) and layer.weight.is_floating_point()
    )


def is_quantised(layer: nn.Module) -> bool:
    """Whether it is a linear layer of a quantised checkpoint: its weight is none of plain numbers of 16 bits."""
    if isinstance(layer, PackedLinear) or not (hasattr(layer, "in_features") and hasattr(layer, "out_features")):
        return False
    weight = layer._parameters.get("weight")
    return weight is None or type(weight) not in (nn.Parameter, Tensor) or weight.dtype.itemsize < 2


def _packing_pays(packing: Packing, sample: Sequence[nn.Linear]) -> bool:
    """Whether products are faster packed. Kept from start to start: in single precision they round otherwise."""
    shapes = [tuple(linear.weight.shape) for linear in sample]
    path = cache_path(machine_name("packing", str(sample[0].weight.dtype), shapes))
    times = read(path, tuple[float, float])
    if times is None:
        times = seconds(list(map(packing.packed, sample))), seconds(sample)
        keep(path, times)
    packed, plain = times
    return packed <= CLEARLY * plain


class Packing:
    """Packed layers, made when they are asked for, siblings together. Arguments as of :class:`Product`."""

    def __init__(
        self,
        siblings: Sequence[Sequence[nn.Linear]],
        matrix: type[Matrix] = Packed,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._siblings = {linear: group for group in siblings for linear in group}
        self._matrix, self._dtype = matrix, dtype
        self._made: dict[nn.Linear, PackedLinear] = {}

    def packed(self, linear: nn.Linear) -> PackedLinear:
        """The layer in place of another."""
        if linear not in self._made:
            group = self._siblings.get(linear, [linear])
            product = Product(group, self._matrix, self._dtype)
            self._made.update({each: PackedLinear(each, product, index) for index, each in enumerate(group)})
        return self._made[linear]


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


@torch.inference_mode()
def find_siblings(model: PreTrainedModel) -> list[list[nn.Linear]]:
    """The plain linear layers that read the very same tensor in a forward, which one token is run to see."""
    calls: list[tuple[nn.Linear, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append((cast(nn.Linear, module), args[0]))

    hooks = [each.register_forward_pre_hook(note) for each in model.modules() if is_plain(each)]
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    times = Counter(linear for linear, _ in calls)
    groups: dict[tuple[int, bool], list[nn.Linear]] = {}
    for linear, inputs in calls:
        if times[linear] == 1:
            groups.setdefault((id(inputs), linear.bias is None), []).append(linear)
    return [group for group in groups.values() if len(group) > 1]
