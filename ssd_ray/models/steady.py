"""Which shapes of a forward leave a token's bits alone, whoever is run beside it.

Kernels group their sums by the shape of what they compute, so the same token may round otherwise among more tokens, or
where more slots are read. In half precision that changes a text every hundred tokens or so. Which shapes are alike is
found at load, by computing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssd_ray.models.attention import PERIOD, find_heads, steady_beginning, steady_extents, steady_queries
from ssd_ray.models.experts import routers
from ssd_ray.models.packing import PackedLinear, is_quantised

MOST_QUERIES = 32
"""Tokens of one row in a line at most."""

SMALLEST_CHUNK = 8
"""Tokens to which fewer of a prompt are padded at least."""

ASKED = 4096
"""Outputs of a product that are looked at, in all inputs together; one whole input at least, and no more than four."""


@dataclass(frozen=True, slots=True)
class Steadiness:
    """What attention may be asked.

    Attributes:
        extents: numbers of slots up to a period.
        queries: numbers of tokens of one row.
        begins: whether slots before those that are seen may be left out, in whole periods.
    """

    extents: Sequence[int]
    queries: Sequence[int]
    begins: bool = True

    def begin(self, first: int) -> int:
        """Where to begin to read if nothing is seen before the slot ``first``; otherwise as :meth:`extent`."""
        return first // PERIOD * PERIOD if self.begins else 0

    def extent(self, needed: int) -> int:
        """Slots to read so that tokens get the same bits in whichever forward they come."""
        start = (needed - 1) // PERIOD * PERIOD
        return start + next(extent for extent in self.extents if extent >= needed - start)


def steadiness(model: PreTrainedModel, page_slots: int) -> Steadiness:
    """Probe the attention of a model's layers; of another one than ours nothing is known."""
    found = find_heads(model)
    extents, queries = range(page_slots, PERIOD + 1, page_slots), range(1, MOST_QUERIES + 1)
    steady = [(steady_extents(heads, page_slots), steady_queries(heads, MOST_QUERIES)) for heads in found]
    return Steadiness(
        [each for each in extents if all(each in of_heads for of_heads, _ in steady)],
        [each for each in queries if all(each in of_heads for _, of_heads in steady)],
        all(steady_beginning(heads) for heads in found),
    )


def steady_chunks(body: nn.Module, largest: int) -> list[int]:
    """The numbers of tokens up to ``largest`` among which a token of a prompt gets the bits that it gets among so many,
    in steps of a third to a half."""
    products = Products(body)
    steps = (size for power in range(largest.bit_length()) for size in (1 << power, 3 << power >> 1))
    wanted = products.bits(largest)
    return [*(size for size in steps if SMALLEST_CHUNK <= size < largest and products.bits(size) == wanted), largest]


_Product = Callable[[Tensor, Tensor | None], Tensor]


class Products:
    """The linear layers of a module, one of each shape, asked how they round."""

    @torch.inference_mode()
    def __init__(self, module: nn.Module) -> None:
        random = torch.Generator().manual_seed(0)
        self._asked: list[tuple[_Product, Tensor, Tensor]] = []
        for (inputs, outputs), (product, like) in _products(module).items():
            draws = min(4, -(-ASKED // outputs))
            for drawn in torch.randn(draws, 1, inputs, generator=random).to(like.device, like.dtype):
                self._asked.append((product, drawn, -product(drawn, None)[0]))

    @torch.inference_mode()
    def bits(self, tokens: int) -> list[bytes]:
        """What is equal for two numbers of tokens that round alike.

        Half precision rounds most differences away: one token in hundreds shows them, and changes its text all the
        same. So each product is asked for the rest when its own result is subtracted, as a bias is: that has as many
        bits as the result had. All tokens are the same one, and so must be their rests.
        """
        return [_one(product(token.repeat(tokens, 1), bias)) for product, token, bias in self._asked]


def _products(module: nn.Module) -> dict[tuple[int, int], tuple[_Product, Tensor]]:
    """By inputs and outputs, how to compute a product with a bias, and a tensor of its dtype and device."""
    found: dict[tuple[int, int], tuple[_Product, Tensor]] = {}
    for layer in module.modules():
        if type(layer) is nn.Linear:
            found.setdefault((layer.in_features, layer.out_features), (partial(_plain, layer.weight), layer.weight))
        elif isinstance(layer, PackedLinear):
            product = layer.product
            found.setdefault((layer.in_features, product.out_features), (product.of, product.like))
        elif is_quantised(layer):
            like = next(each for each in module.parameters() if each.is_floating_point())
            shape = int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
            found.setdefault(shape, (partial(_called, layer), like))
    for weight in routers(module):
        found.setdefault((weight.shape[1], weight.shape[0]), (partial(_plain, weight), weight))
    return found


def _plain(weight: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(inputs, weight, bias)


def _called(layer: nn.Module, inputs: Tensor, bias: Tensor | None) -> Tensor:
    outputs: Tensor = layer(inputs)
    return outputs if bias is None else outputs + bias


def _one(rows: Tensor) -> bytes:
    """The bytes of rows that are equal, of one of them."""
    alike = torch.equal(rows, rows[:1].expand_as(rows))
    return (rows[:1] if alike else rows).contiguous().view(torch.uint8).cpu().numpy().tobytes()
