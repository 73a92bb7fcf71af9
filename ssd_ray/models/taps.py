"""Hidden states of a target, kept by slot as its KV is, for drafts that read them.

They are taken where they pass between two layers. A token's lie under the address of its K and V, so they are as good
as these: found by rows that share a page, kept with what is cached, written over with what is rolled back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssd_ray.errors import UnsupportedModelError
from ssd_ray.models.contract import Pool
from ssd_ray.models.replay import opaque
from ssd_ray.models.slots import SlotCache, Window

LAST = -1
"""In place of a number of layers: behind all of them and the norm after them."""


class Taps:
    """What is taken from a model's forwards over a cache.

    Args:
        model: its decoder's layers are watched from now on.
        places: after how many layers states are taken, 0 being the embeddings, or :data:`LAST`.
        kv: where the forwards write.

    Attributes:
        numbers: of each token, over all places.

    Raises:
        UnsupportedModelError: the decoder's layers are not found, or none of them sees all: what all have forgotten is
            not kept.
    """

    def __init__(self, model: PreTrainedModel, places: Sequence[int], kv: SlotCache) -> None:
        text = model.config.get_text_config()
        pool = next((index for index, each in enumerate(kv.pools) if each.reach.whole), None)
        if pool is None:
            raise UnsupportedModelError("all layers of the target have windows, which a head cannot read beyond")
        self._width, self._window, self._index = int(text.hidden_size), kv.window, pool
        self._table = kv.pools[pool].table
        self.numbers = len(places) * self._width
        self._pool = torch.zeros(self._table.size, self.numbers, dtype=model.dtype, device=model.device)
        body = model.get_decoder()
        layers = _layers(body, int(text.num_hidden_layers))
        for index, place in enumerate(places):
            part = self._pool.narrow(1, index * self._width, self._width)
            self._watch(body, layers, place, part)

    def counted(self, pools: Sequence[Pool]) -> list[Pool]:
        """The runner's pools with what is kept here."""
        own = self._pool[:1].nbytes * self._table.page_slots
        return [replace(each, page_bytes=each.page_bytes + own * (i == self._index)) for i, each in enumerate(pools)]

    def of(self, row: int, start: int, end: int) -> Tensor:
        """What was kept of tokens of a row, [tokens, numbers]."""
        addresses = self._table.locate(row, range(start, end))
        return self._pool[torch.tensor(addresses, dtype=torch.int64, device=self._pool.device)]

    def _watch(self, body: nn.Module, layers: nn.ModuleList, place: int, part: Tensor) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            keep(args[0] if args else kwargs["hidden_states"], part, self._window, self._index)

        def behind(module: nn.Module, args: Any, output: Any) -> None:
            keep(output if isinstance(output, Tensor) else output[0], part, self._window, self._index)

        if place == LAST:
            body.register_forward_hook(behind)
        elif place < len(layers):
            layers[place].register_forward_pre_hook(before, with_kwargs=True)
        else:
            layers[-1].register_forward_hook(behind)


@opaque(lambda states, *args: (states,))
def keep(states: Tensor, kept: Tensor, window: Window, pool: int) -> None:
    """Write states [R, T or more, width] of a forward to [slots, width], where it writes in a pool of the KV."""
    written = window.written[pool]
    kept.index_copy_(0, written, of_tokens(states, written))


def of_tokens(states: Tensor, written: Tensor) -> Tensor:
    """The states [R, T or more, width] of the tokens whose KV is written, [R * T, width]: of all but the padding."""
    return states[:, : len(written) // len(states)].reshape(-1, states.shape[-1])


def _layers(body: nn.Module, count: int) -> nn.ModuleList:
    for child in body.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise UnsupportedModelError(
        f"{type(body).__name__} has no list of its {count} layers, between which a head could read hidden states"
    )
