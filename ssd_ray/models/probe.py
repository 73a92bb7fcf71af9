"""What a config does not tell about a model is found by running it: what it caches, and whether slots can be any."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ssd_ray.errors import UnsupportedModelError
from ssd_ray.models.attention import NAME
from ssd_ray.models.graphs import EagerLine, eager_forward
from ssd_ray.models.slots import LayerShape, SlotCache, Stretch

NUM_CHECKED = 6

TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.15, torch.float16: 0.15}
"""Relative error of the logits that rounding may cause. A mask or position that is not obeyed gives about 1."""


@torch.inference_mode()
def probe_layers(model: PreTrainedModel) -> list[LayerShape]:
    """Run one token and see what each layer puts into the cache.

    Raises:
        UnsupportedModelError: some layer puts nothing there (recurrent or shared state, or the cache is ignored).
    """
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
    try:
        model(input_ids=zero, attention_mask=mask, position_ids=zero, past_key_values=cache, use_cache=True)
    except Exception as error:  # whatever a foreign model raises means the same: it cannot run this way
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run with a custom KV cache, a 4-D mask and explicit positions: {error}"
        ) from error
    expected = model.config.get_text_config().num_hidden_layers
    shapes = [shape for layer in cache.layers if (shape := _shape(layer))]
    if len(shapes) != expected:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps keys and values of {len(shapes)} of its {expected} layers in the KV cache; "
            "recurrent state and shared layers cannot be addressed by slot"
        )
    return shapes


def _shape(layer: DynamicLayer) -> LayerShape | None:
    if not layer.is_initialized or layer.keys.shape[2] != 1:
        return None
    return LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])


@torch.inference_mode()
def check_addressing(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> None:
    """Compare a plain forward over a few tokens with one whose KV lies scattered over a row, among tokens that nobody
    may see.

    Raises:
        UnsupportedModelError: the logits differ: the model takes positions from the cache, or makes its own mask.
    """
    try:
        got, want = _scattered(model, shapes)
    except Exception as error:  # as above
        name = type(model).__name__
        raise UnsupportedModelError(f"{name} does not run over a slot-addressed KV cache: {error}") from error
    difference = _relative_error(got, want)
    if not difference < TOLERANCE[model.dtype]:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take positions and mask as they are given: over a slot-addressed KV "
            f"cache its logits differ (relative error {difference:.2g})"
        )


def _scattered(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> tuple[Tensor, Tensor]:
    """Logits [1, NUM_CHECKED, V] over scattered slots, and those of a plain forward."""
    count = NUM_CHECKED
    kv = SlotCache(shapes, rows=1, slots=64, page_slots=16, dtype=model.dtype, device=model.device)
    kv.table.bind(0, 0, [2, 0, 3, 1])
    tokens = torch.arange(1, count + 1, device=kv.device)[None]
    positions = torch.arange(count, device=kv.device)[None]
    slots = torch.linspace(kv.slots - 1, 1, count, device=kv.device).long()[None]  # backwards; slot 0 is hidden
    hidden = torch.finfo(model.dtype).min
    mask = torch.full((1, 1, count, kv.slots), hidden, dtype=model.dtype, device=kv.device)
    for token in range(count):
        mask[0, 0, token, slots[0, : token + 1]] = 0
    want: Tensor = model(input_ids=tokens, use_cache=False).logits
    forward = partial(eager_forward(model, kv), [0], [kv.slots])
    written = torch.tensor([kv.table.locate(0, slots[0].tolist())], device=kv.device)
    hidden_slot = torch.tensor([kv.table.locate(0, [0])], device=kv.device)
    forward(tokens[:, :1], positions[:, -1:], hidden_slot, mask[:, :, -1:])
    parts = slice(0, count // 2), slice(count // 2, count)
    got = [forward(tokens[:, part], positions[:, part], written[:, part], mask[:, :, part]) for part in parts]
    return torch.cat(got, 1).float(), want.float()


@torch.inference_mode()
def takes_lines(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> bool:
    """Whether a model hands K and V on to our attention as it gets them, so that rows can have as many tokens as they
    like, and extents of their own."""
    if model.device.type != "cpu" or model.config._attn_implementation != NAME:
        return False
    kv = SlotCache(shapes, rows=2, slots=32, page_slots=16, dtype=model.dtype, device=model.device)
    masks = [torch.zeros(count, extent, dtype=model.dtype) for count, extent in ((1, 16), (2, 32))]
    stretches = [Stretch(row, mask.shape[0], mask.shape[1], mask) for row, mask in enumerate(masks)]
    zeros, written = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 32, 33])
    try:
        EagerLine(model, kv)(stretches, zeros, zeros, written, [1, 2])
    except (AttributeError, TypeError):  # it does something to them; what is read has no shape
        return False
    return True


def _relative_error(got: Tensor, want: Tensor) -> float:
    # Logits count up to a constant.
    want = want - want.mean(-1, keepdim=True)
    got = got - got.mean(-1, keepdim=True)
    return float((got - want).norm() / want.norm().clamp(min=1e-30))
