"""Which shapes of a forward leave a token's bits alone, whoever is run beside it.

Kernels group their sums by the shape of what they compute, so the same token may round otherwise among more tokens, or
where more slots are read. In half precision that changes a text every hundred tokens or so. Which shapes are alike is
found at load, by computing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ssd_ray.models.attention import NAME, PERIOD, Heads, steady_extents, steady_queries
from ssd_ray.models.slots import LayerShape

MOST_QUERIES = 32
"""Tokens of one row in a line at most."""


@dataclass(frozen=True, slots=True)
class Steadiness:
    """What attention may be asked.

    Attributes:
        extents: numbers of slots up to a period.
        queries: numbers of tokens of one row.
    """

    extents: Sequence[int]
    queries: Sequence[int]

    def extent(self, needed: int) -> int:
        """Slots to read so that tokens get the same bits in whichever forward they come."""
        start = (needed - 1) // PERIOD * PERIOD
        return start + next(extent for extent in self.extents if extent >= needed - start)


def steadiness(model: PreTrainedModel, shape: LayerShape, page_slots: int) -> Steadiness:
    """Probe a model's attention; of another one than ours nothing is known."""
    if model.config._attn_implementation != NAME:
        return Steadiness(range(page_slots, PERIOD + 1, page_slots), range(1, MOST_QUERIES + 1))
    query_heads = model.config.get_text_config().num_attention_heads // shape.heads
    heads = Heads(query_heads, shape.key_dim, model.dtype, model.device)
    return Steadiness(steady_extents(heads, page_slots), steady_queries(heads, MOST_QUERIES))
