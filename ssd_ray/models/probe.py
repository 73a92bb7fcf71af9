"""What a config does not tell about a model is found by running it: what it caches, and whether slots can be any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ssd_ray.errors import UnsupportedModelError
from ssd_ray.models.attention import NAME
from ssd_ray.models.float32 import in_float32
from ssd_ray.models.formats import weights_alone
from ssd_ray.models.graphs import EagerLine, caller, eager_forward
from ssd_ray.models.reach import Sight, shortened
from ssd_ray.models.slots import LayerShape, SlotCache, Stretch

NUM_CHECKED = 16
"""Tokens that are compared: enough that one layer that takes no heed of positions shows."""

TOLERANCE = 1e-3
"""Relative error of the logits that rounding in float32 may cause. Real models stay below 1e-5; one layer of them that
does not obey a mask or a position gives 1e-2 and more."""

CHECKED_WINDOW = 5
"""Length of windows while they are checked: some of the checked tokens are outside."""

CHECKED = 1
"""The row of two that is compared: not the first, which a model might take for all."""


@torch.inference_mode()
def probe_layers(model: PreTrainedModel) -> list[LayerShape]:
    """Run one token and see what each layer puts into the cache.

    Raises:
        UnsupportedModelError: some layer puts nothing there (recurrent or shared state, or the cache is ignored), or
            something of another dtype than the model's.
    """
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
    try:
        caller(model)(zero, zero, [mask], cache)
    except Exception as error:  # whatever a foreign model raises means the same: it cannot run this way
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run with a custom KV cache, a 4-D mask and explicit positions: {error}"
        ) from error
    text = model.config.get_text_config()
    # The last layers may read what those before them keep.
    expected = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
    shapes = [shape for layer in cache.layers if (shape := _shape(layer))]
    if len(shapes) != expected:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps keys and values of {len(shapes)} of its {expected} layers in the KV cache; "
            "recurrent state cannot be addressed by slot"
        )
    dtypes = {states.dtype for layer in cache.layers for states in (layer.keys, layer.values)}
    if dtypes != {model.dtype}:
        kept = ", ".join(sorted(map(str, dtypes)))
        raise UnsupportedModelError(f"{type(model).__name__} keeps keys and values as {kept}, but is {model.dtype}")
    return shapes


def _shape(layer: DynamicLayer) -> LayerShape | None:
    if not layer.is_initialized or layer.keys.shape[2] != 1:
        return None
    return LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])


@torch.inference_mode()
def check_addressing(model: PreTrainedModel, shapes: Sequence[LayerShape], length: int) -> None:
    """Compare a plain forward over a few tokens, by the model's own attention, with two over one half of them each,
    whose KV lies scattered over a row, among others that nobody may see, and beside a row whose positions reach up to
    ``length``. Windows that matter at this length are made so short for it that they matter here.

    Both in float32, whatever the model is held in: outliers in a model's weights can make rounding to half precision
    look like a mask that is not obeyed.

    Raises:
        UnsupportedModelError: the logits differ: the model takes positions from the cache, makes its own mask, or looks
            at who else is in the forward.
    """
    try:
        with in_float32(model), weights_alone(model), _windows_that_show(model, length) as sight:
            want, got = _plain(model, length), _scattered(model, shapes, length, sight)
    except Exception as error:  # as above
        name = type(model).__name__
        raise UnsupportedModelError(f"{name} does not run over a slot-addressed KV cache: {error}") from error
    difference = _relative_error(got, want)
    if not difference < TOLERANCE:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take positions and mask as they are given, each row for itself: over a "
            f"slot-addressed KV cache its logits differ (relative error {difference:.2g})"
        )


def _tokens(model: PreTrainedModel, length: int) -> Tensor:
    """Tokens for both rows, int64 [2, N], from all of the vocabulary: neighbours in it may be alike, as unused ones
    are, and then their order does not matter."""
    count = min(NUM_CHECKED, length)
    last = model.config.get_text_config().vocab_size - 1
    return torch.linspace(1, last, 2 * count, device=model.device).long().view(2, count)


@contextmanager
def _windows_that_show(model: PreTrainedModel, length: int) -> Iterator[Sight]:
    """What a model's layers see for now."""
    sight = Sight.of(model.config, length)
    if not sight.windowed:
        yield sight
        return
    with shortened(model.config, CHECKED_WINDOW):
        yield Sight.of(model.config, length)


def _plain(model: PreTrainedModel, length: int) -> Tensor:
    """Logits [N, V] of the checked tokens as the model itself has them."""
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        logits: Tensor = model(input_ids=_tokens(model, length)[CHECKED][None], use_cache=False).logits
    finally:
        model.set_attn_implementation(chosen)
    return logits[0]


def _scattered(model: PreTrainedModel, shapes: Sequence[LayerShape], length: int, sight: Sight) -> Tensor:
    """The same over scattered slots, in two forwards, beside a neighbour."""
    tokens = _tokens(model, length)
    count = tokens.shape[1]
    kv = SlotCache(shapes, rows=2, slots=64, page_slots=16, dtype=torch.float32, device=model.device, sight=sight)
    _spoil(kv)
    for row, pages in enumerate(([2, 0, 3, 1], [7, 5, 4, 6])):
        kv.bind(row, 0, pages)
    near = torch.arange(count, device=kv.device)
    far = torch.linspace(length - 1, 0, count, device=kv.device).long()  # the first forward has the last position
    positions = torch.stack([far, near])
    slots = torch.stack([torch.linspace(*ends, count, device=kv.device).long() for ends in ((0, 62), (63, 1))])
    order = torch.full((2, kv.slots), count, device=kv.device).scatter_(1, slots, near.expand(2, -1))
    visible = order[:, None] <= near[:, None]  # [2, N, E]: a token sees itself and those before it
    hidden = torch.full((), torch.finfo(torch.float32).min, device=kv.device)
    masks = [
        torch.where(visible & reach.sees(near, order), torch.zeros_like(hidden), hidden)[:, None]
        for reach in sight.reaches
    ]
    forward = partial(eager_forward(model, kv), [0, 1], [range(kv.slots)] * len(sight.reaches))
    written = torch.tensor(kv.locate([0, 1], slots.tolist()), device=kv.device)  # [reaches, 2, N]
    parts = slice(0, count // 2), slice(count // 2, count)
    got = [
        forward(tokens[:, part], positions[:, part], written[:, :, part].unbind(), [mask[:, :, part] for mask in masks])
        for part in parts
    ]
    return torch.cat(got, 1)[CHECKED]


def _spoil(kv: SlotCache) -> None:
    """Fill the memory with what a layer would notice if it looked at it."""
    random = torch.Generator().manual_seed(0)
    for bank in kv.banks:
        bank.copy_(10.0 * torch.randn(bank.shape, generator=random))


@torch.inference_mode()
def takes_lines(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> bool:
    """Whether a model hands K and V on to our attention as it gets them, so that rows can have as many tokens as they
    like, and extents of their own."""
    if model.device.type != "cpu" or model.config._attn_implementation != NAME:
        return False
    kv = SlotCache(shapes, rows=2, slots=32, page_slots=16, dtype=model.dtype, device=model.device)
    masks = [torch.zeros(count, extent, dtype=model.dtype) for count, extent in ((1, 16), (2, 32))]
    stretches = [Stretch(row, len(mask), [range(mask.shape[1])], [mask]) for row, mask in enumerate(masks)]
    zeros, written = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 32, 33])
    try:
        EagerLine(model, kv)(stretches, zeros, zeros, [written], [1, 2])
    except (AttributeError, TypeError):  # it does something to them; what is read has no shape
        return False
    return True


def _relative_error(got: Tensor, want: Tensor) -> float:
    # Logits count up to a constant.
    want = want - want.mean(-1, keepdim=True)
    got = got - got.mean(-1, keepdim=True)
    return float((got - want).norm() / want.norm().clamp(min=1e-30))
