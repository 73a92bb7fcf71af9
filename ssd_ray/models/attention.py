"""The attention that decoding uses: torch's fused kernels under an explicit mask, without copying K and V.

Transformers' own function repeats K and V for every group of query heads as soon as a mask is given. Here the groups
are folded into the query's token dimension where a row has few tokens, as in decoding: measured on a CPU, the kernel,
which reads K and V once for each head, then takes a third to nine tenths of the time, and for a single token in half
precision as little as a twentieth. For the many tokens of a prompt the groups are left to the kernel on a CPU, and are
folded elsewhere (CUDA's fused kernels take a mask or groups, not both).

K and V may come in parts, rows of one extent each, whose queries stand in one line of tokens. The cost then follows
every row's own length, and a row's result is bit for bit what it is without the others. At steady extents
(:func:`steady_extents`) it is also what it is however many slots are read that nobody may see, and with steady numbers
of queries (:func:`steady_queries`) however many tokens of a row are run together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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

PROBE_ROWS, PROBE_TOKENS, PROBE_SLOTS = 4, 8, 64

_UNSUPPORTED = ("softcap", "position_bias", "s_aux", "head_mask")


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a forward that are read together: G rows, of which T tokens each are asked about E slots.

    Attributes:
        rows, tokens: G and T.
        mask: additive, [1 or G, 1, T, E].
        start: where in the line their tokens begin, if they follow one another there, T to each row.
        take: int64 [G * T], where in the line each query stands, if they do not; queries may be there twice.
        folds: whether query heads that share one of keys are asked as if they were tokens: faster for a few tokens; the
            mask is copied for each of them.
    """

    rows: int
    tokens: int
    mask: Tensor
    start: int = 0
    take: Tensor | None = None
    folds: bool = True
    _folded: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def folded_mask(self, groups: int) -> Tensor:
        """The mask for queries of so many groups of heads, one group after the other; made once for all layers."""
        if groups not in self._folded:
            self._folded[groups] = _folded_mask(self.mask, groups)
        return self._folded[groups]

    def queries(self, line: Tensor) -> Tensor:
        """The part's queries, [G, heads, T, D], of a line's, [1, heads, N, D]."""
        _, heads, _, dim = line.shape
        taken = line[0, :, self.start : self.start + self.rows * self.tokens]
        if self.take is not None:
            taken = line[0].index_select(1, self.take)
        return taken.view(heads, self.rows, self.tokens, dim).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Parts:
    """All parts of a forward, and the way back.

    Attributes:
        parts: in any order.
        restore: int64 [N], where among the queries of all parts, one part after the other, each token of the line
            stands; None: in this very order.
    """

    parts: Sequence[Part]
    restore: Tensor | None = None


class Read(list[Tensor]):
    """Keys or values of the parts of a forward, [G, kv_heads, E, D] each."""

    def __init__(self, tensors: Sequence[Tensor], layout: Parts) -> None:
        super().__init__(tensors)
        self.layout = layout


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
    Without a mask it is causal where the module is. Key and value may be :class:`Read`; the query is a line of tokens
    then, [1, heads, N, D], and the masks are those of its parts.

    Returns ([R, T, heads, D], None), as transformers wants it.

    Raises:
        UnsupportedModelError: the model asks for a term that the fused kernels lack.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"the model's attention needs {name}, which fused attention does not have")
    if isinstance(key, Read):
        return _by_parts(query, key, value, scaling), None
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return _fused(query, key, value, attention_mask, scaling, causal).transpose(1, 2).contiguous(), None


def _by_parts(query: Tensor, keys: Read, values: Sequence[Tensor], scaling: float | None) -> Tensor:
    layout, outputs = keys.layout, []
    for part, key, value in zip(layout.parts, keys, values, strict=True):
        queries = part.queries(query)
        if part.folds:
            output = _folded(queries, key, value, part.folded_mask(queries.shape[1] // key.shape[1]), scaling)
        else:
            output = _fused(queries, key, value, part.mask, scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # [G * T, heads, D]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (joined if layout.restore is None else joined.index_select(0, layout.restore))[None].contiguous()


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, causal: bool = False
) -> Tensor:
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    if groups > 1 and mask is not None and (query.device.type != "cpu" or tokens == 1):
        return _folded(query, key, value, _folded_mask(mask, groups), scaling)
    output: Tensor = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and mask is None and tokens > 1,
        scale=scaling,
        enable_gqa=groups > 1,
    )
    return output


def _folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Attention of queries [R, kv_heads*groups, T, D], as if [R, kv_heads, groups*T, D], under the mask that fits."""
    rows, heads, tokens, dim = query.shape
    query = query.reshape(rows, key.shape[1], -1, dim)
    output: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(rows, heads, tokens, -1)


def _folded_mask(mask: Tensor, groups: int) -> Tensor:
    """A mask [., 1, T, E] for groups of heads that are folded into the tokens, [., 1, groups*T, E]."""
    return mask.repeat(1, 1, groups, 1) if mask.shape[2] > 1 else mask.expand(-1, -1, groups, -1)


@dataclass(frozen=True, slots=True)
class Heads:
    """What one layer's attention looks like to its kernel: ``query_heads`` share one head of keys and values of size
    ``dim``."""

    query_heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    def inputs(self, rows: int, queries: int, slots: int) -> list[list[Tensor]]:
        """Random query, key and value, in float32 and in the dtype: half precision rounds most differences away, so
        that a probe would miss some. There float32 has to be steady, too."""
        random = torch.Generator().manual_seed(0)
        shapes = (self.query_heads, queries), (1, slots), (1, slots)
        drawn = [torch.randn(rows, *shape, self.dim, generator=random) for shape in shapes]
        return [[tensor.to(self.device, kind) for tensor in drawn] for kind in {torch.float32, self.dtype}]


@torch.inference_mode()
def steady_extents(heads: Heads, step: int) -> list[int]:
    """Find the multiples of ``step`` up to :data:`PERIOD` at which hidden slots beyond them change no bit.

    A kernel sums over all slots that are read, those with weight 0 included, and how it groups the terms may depend on
    their number. The same token would then have other bits when it is read with more slots after it. Extents repeat
    after a period, which is checked for the first two.
    """
    inputs = heads.inputs(PROBE_ROWS, PROBE_TOKENS, 3 * PERIOD)

    def steady(extent: int) -> bool:
        return all(torch.equal(_among(each, extent, extent), _among(each, extent, 3 * PERIOD)) for each in inputs)

    return [each for each in range(step, PERIOD, step) if steady(each) and steady(PERIOD + each)] + [PERIOD]


@torch.inference_mode()
def steady_queries(heads: Heads, most: int) -> list[int]:
    """Find the numbers of queries of a row, up to ``most``, with which each of them gets the bits that it gets among
    ``most``."""
    inputs = heads.inputs(PROBE_ROWS, most, 3 * PROBE_SLOTS)

    def steady(count: int) -> bool:
        return all(
            torch.equal(_among(_first(each, count), extent, extent), _among(each, extent, extent)[:, :, :count])
            for each in inputs
            for extent in range(PROBE_SLOTS, 3 * PROBE_SLOTS + 1, PROBE_SLOTS)
        )

    return [count for count in range(1, most) if steady(count)] + [most]


def _first(inputs: Sequence[Tensor], queries: int) -> Sequence[Tensor]:
    return inputs[0][:, :, :queries], *inputs[1:]


def _among(inputs: Sequence[Tensor], seen: int, extent: int) -> Tensor:
    """Attention over the first ``seen`` slots where ``extent`` are read, as decoding asks for it."""
    query, key, value = inputs
    mask = query.new_zeros(1, 1, query.shape[2], extent)
    mask[..., seen:] = torch.finfo(query.dtype).min
    return _folded(query, key[:, :, :extent], value[:, :, :extent], _folded_mask(mask, query.shape[1]), None)


def choose_attention(model: PreTrainedModel) -> str:
    """The attention implementation for a model: ours, or the model's own eager one where it is more than a softmax."""
    kind = type(model)
    if not getattr(kind, "_supports_sdpa", False):
        return "eager"
    return NAME if getattr(kind, "_supports_attention_backend", False) else "sdpa"


AttentionInterface.register(NAME, masked_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
