"""The attention that decoding uses: torch's fused kernels under an explicit mask, without copying K and V.

Transformers' own function repeats K and V for every group of query heads as soon as a mask is given. Here the groups
are left to the kernel on a CPU, and folded into the query's token dimension elsewhere (CUDA's fused kernels take a mask
or groups, not both). So they are for a single token: measured on a CPU, the kernel takes several times as long for one
query a head as for a few in half precision.

K and V may come in parts, rows of one extent each. The cost then follows every row's own length, and a row's result is
bit for bit what it is without the others. At steady extents (:func:`steady_extents`) it is also what it is however many
slots are read that nobody may see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from ssd_ray.errors import UnsupportedModelError
from ssd_ray.models.replay import opaque

NAME = "ssd_ray"

PERIOD = 512
"""Slots that torch's kernels read in one go at most."""

PROBE_ROWS, PROBE_TOKENS = 4, 8

_UNSUPPORTED = ("softcap", "position_bias", "s_aux", "head_mask")


@opaque(lambda module, query, *args, **kwargs: (query,))
def masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query [R, heads, T, D] over key and value [R, kv_heads, E, D] under an additive mask [., 1, T, E].
    Without a mask it is causal where the module is. Key and value may be lists of parts of the rows, each at an extent
    of its own, at most E; there is a mask then.

    Returns ([R, T, heads, D], None), as transformers wants it.

    Raises:
        UnsupportedModelError: the model asks for a term that the fused kernels lack.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"the model's attention needs {name}, which fused attention does not have")
    if isinstance(key, list) and attention_mask is not None:
        outputs = _by_parts(query, key, value, attention_mask, scaling)
    else:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        outputs = _fused(query, key, value, attention_mask, scaling, causal)
    return outputs.transpose(1, 2).contiguous(), None


def _by_parts(query: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor, scaling: float | None) -> Tensor:
    sizes = [len(key) for key in keys]
    masks = torch.split(mask.expand(len(query), -1, -1, -1), sizes)
    parts = zip(torch.split(query, sizes), keys, values, masks, strict=True)
    return torch.cat([_fused(q, k, v, m.narrow(3, 0, k.shape[2]), scaling) for q, k, v, m in parts])


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, causal: bool = False
) -> Tensor:
    rows, heads, tokens, _ = query.shape
    groups = heads // key.shape[1]
    if groups > 1 and mask is not None and (query.device.type != "cpu" or tokens == 1):
        query, mask = fold_groups(query, mask, groups)
        groups = 1
    output: Tensor = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and mask is None and tokens > 1,
        scale=scaling,
        enable_gqa=groups > 1,
    )
    return output.reshape(rows, heads, tokens, -1)


def fold_groups(query: Tensor, mask: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Queries [R, kv_heads*groups, T, D] as [R, kv_heads, groups*T, D], and the mask [., 1, T, E] that fits them."""
    rows, heads, tokens, dim = query.shape
    repeated = mask.repeat(1, 1, groups, 1) if tokens > 1 else mask.expand(-1, -1, groups, -1)
    return query.reshape(rows, heads // groups, groups * tokens, dim), repeated


@torch.inference_mode()
def steady_extents(query_heads: int, dim: int, *, step: int, dtype: torch.dtype, device: torch.device) -> list[int]:
    """Find the multiples of ``step`` up to :data:`PERIOD` at which hidden slots beyond them change no bit.

    A kernel sums over all slots that are read, those with weight 0 included, and how it groups the terms may depend on
    their number. The same token would then have other bits when it is read with more slots after it. Extents repeat
    after a period, which is checked for the first two. Half precision rounds most differences away, so that a probe
    would miss some: there float32 has to be steady, too.

    Args:
        query_heads: that share one head of keys and values.
        dim: of a head.
    """
    random = torch.Generator().manual_seed(0)
    shapes = (query_heads, PROBE_TOKENS), (1, 3 * PERIOD), (1, 3 * PERIOD)
    drawn = [torch.randn(PROBE_ROWS, *shape, dim, generator=random) for shape in shapes]
    inputs = [[tensor.to(device, kind) for tensor in drawn] for kind in {torch.float32, dtype}]

    def steady(extent: int) -> bool:
        return all(torch.equal(_among(each, extent, extent), _among(each, extent, 3 * PERIOD)) for each in inputs)

    return [each for each in range(step, PERIOD, step) if steady(each) and steady(PERIOD + each)] + [PERIOD]


def _among(inputs: Sequence[Tensor], seen: int, extent: int) -> Tensor:
    """Attention over the first ``seen`` slots where ``extent`` are read."""
    query, key, value = inputs
    mask = query.new_zeros(1, 1, query.shape[2], extent)
    mask[..., seen:] = torch.finfo(query.dtype).min
    return _fused(query, key[:, :, :extent], value[:, :, :extent], mask, None)


def choose_attention(model: PreTrainedModel) -> str:
    """The attention implementation for a model: ours, or the model's own eager one where it is more than a softmax."""
    kind = type(model)
    if not getattr(kind, "_supports_sdpa", False):
        return "eager"
    return NAME if getattr(kind, "_supports_attention_backend", False) else "sdpa"


AttentionInterface.register(NAME, masked_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
