"""The attention that decoding uses: torch's fused kernels under an explicit mask, without copying K and V.

Transformers' own function repeats K and V for every group of query heads as soon as a mask is given. Here the groups
are folded into the query's token dimension where a row has few tokens, as in decoding: measured on a CPU, the kernel,
which reads K and V once for each head, then takes a third to nine tenths of the time, and for a single token in half
precision as little as a twentieth. For the many tokens of a prompt the groups are left to the kernel on a CPU, and are
folded elsewhere (CUDA's fused kernels take a mask or groups, not both).

K and V may come in parts, rows of one extent each, whose queries stand in one line of tokens. The cost then follows
every row's own length, and a row's result is bit for bit what it is without the others. At steady extents
(:func:`steady_extents`) it is also what it is however many slots are read that nobody may see, behind those that are
seen or, in whole periods, before them (:func:`steady_beginning`), and with steady numbers of queries
(:func:`steady_queries`) however many tokens of a row are run together.

Soft caps and sinks, which the fused kernels lack, take a softmax of our own, folded in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, reduce
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

_UNSUPPORTED = ("position_bias", "head_mask")


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
        _, heads, length, dim = line.shape
        count = self.rows * self.tokens
        if self.take is not None:
            line = line.index_select(2, self.take)
        elif count < length:
            line = line[:, :, self.start : self.start + count]
        return line if self.rows == 1 else line.view(heads, self.rows, self.tokens, dim).transpose(0, 1)


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


@dataclass(frozen=True, slots=True)
class Terms:
    """What scores go through before they weigh values.

    Attributes:
        scaling: factor; None: one over the square root of the head's size.
        softcap: bound that they approach as a hyperbolic tangent does (Gemma 2).
        sinks: [heads], for each a score of nothing, which takes its part of the weights (gpt-oss).
    """

    scaling: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def fused(self) -> bool:
        """Whether torch's kernels do it."""
        return self.softcap is None and self.sinks is None


@opaque(lambda module, query, *args, **kwargs: (query,))
def masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query [R, heads, T, D] over key and value [R, kv_heads, E, D] under an additive mask [., 1, T, E].
    Without a mask it is causal where the module is. Key and value may be :class:`Read`; the query is a line of tokens
    then, [1, heads, N, D], and the masks are those of its parts.

    Returns ([R, T, heads, D], None), as transformers wants it.

    Raises:
        UnsupportedModelError: the model asks for another term.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"the model's attention needs {name}, which ours does not have")
    terms = Terms(scaling, softcap, s_aux)
    _note(query, key, value, terms)
    if isinstance(key, Read):
        return _by_parts(query, key, value, terms), None
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return _attend(query, key, value, attention_mask, terms, causal).transpose(1, 2).contiguous(), None


def _by_parts(query: Tensor, keys: Read, values: Sequence[Tensor], terms: Terms) -> Tensor:
    layout, outputs = keys.layout, []
    for part, key, value in zip(layout.parts, keys, values, strict=True):
        queries = part.queries(query)
        if part.folds:
            output = _folded(queries, key, value, part.folded_mask(queries.shape[1] // key.shape[1]), terms)
        else:
            output = _attend(queries, key, value, part.mask, terms)
        outputs.append(output.transpose(1, 2).reshape(1, -1, output.shape[1], output.shape[3]))  # [1, G * T, heads, D]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return joined.contiguous() if layout.restore is None else joined.index_select(1, layout.restore)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, terms: Terms, causal: bool = False
) -> Tensor:
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    if not terms.fused and mask is None:
        mask = _causal_mask(query, key) if causal else query.new_zeros(1, 1, tokens, key.shape[2])
    folds = groups > 1 and mask is not None and (query.device.type != "cpu" or tokens == 1)
    if mask is not None and (folds or not terms.fused):
        return _folded(query, key, value, _folded_mask(mask, groups), terms)
    output: Tensor = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and mask is None and tokens > 1,
        scale=terms.scaling,
        enable_gqa=groups > 1,
    )
    return output


def _causal_mask(query: Tensor, key: Tensor) -> Tensor:
    shape = query.shape[2], key.shape[2]
    hidden = torch.full(shape, torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    return hidden.triu(key.shape[2] - query.shape[2] + 1)[None, None]


def _folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, terms: Terms) -> Tensor:
    """Attention of queries [R, kv_heads*groups, T, D], as if [R, kv_heads, groups*T, D], under the mask that fits."""
    rows, heads, tokens, dim = query.shape
    query = query.reshape(rows, key.shape[1], -1, dim)
    if terms.fused:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=terms.scaling)
    else:
        output = _weighted(_softmax(query, key, mask, terms, tokens).to(value.dtype), value)
    return output.reshape(rows, heads, tokens, -1)


def _weighted(weights: Tensor, value: Tensor) -> Tensor:
    """Values [R, kv_heads, E, D] by weights [R, kv_heads, Q, E], summed period by period, as the fused kernels do: what
    nobody sees of whole periods then changes no bit."""
    pairs = zip(torch.split(weights, PERIOD, -1), torch.split(value, PERIOD, -2), strict=True)
    return reduce(torch.add, (some @ of for some, of in pairs))


def _softmax(query: Tensor, key: Tensor, mask: Tensor, terms: Terms, tokens: int) -> Tensor:
    """Weights, float32 [R, kv_heads, groups*T, E], of queries [R, kv_heads, groups*T, D] with T ``tokens`` each."""
    scaling = query.shape[-1] ** -0.5 if terms.scaling is None else terms.scaling
    parts = [query @ some.transpose(-1, -2) for some in torch.split(key, PERIOD, -2)]
    scores = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).float() * scaling
    if terms.softcap is not None:
        scores = terms.softcap * torch.tanh(scores / terms.softcap)
    scores = scores + mask
    if terms.sinks is None:
        return scores.softmax(-1)
    rows, heads, _, slots = scores.shape
    sinks = terms.sinks.float().view(1, heads, -1, 1).repeat_interleave(tokens, 2)
    return torch.cat([scores, sinks.expand(rows, -1, -1, -1)], -1).softmax(-1)[..., :slots]


def _folded_mask(mask: Tensor, groups: int) -> Tensor:
    """A mask [., 1, T, E] for groups of heads that are folded into the tokens, [., 1, groups*T, E]."""
    return mask.repeat(1, 1, groups, 1) if mask.shape[2] > 1 else mask.expand(-1, -1, groups, -1)


@dataclass(frozen=True, slots=True)
class Heads:
    """What a layer's attention looks like to its kernel: ``query_heads`` share one head of keys of size ``dim`` and of
    values of size ``value_dim``, 0 being the same. Scores may be capped, and some go into sinks."""

    query_heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    value_dim: int = 0
    softcap: float | None = None
    sinks: bool = False

    @property
    def terms(self) -> Terms:
        """Terms of such an attention."""
        return Terms(None, self.softcap, torch.zeros(self.query_heads, device=self.device) if self.sinks else None)

    def inputs(self, rows: int, queries: int, slots: int) -> list[list[Tensor]]:
        """Random query, key and value, in float32 and in the dtype: half precision rounds most differences away, so
        that a probe would miss some. There float32 has to be steady, too."""
        random = torch.Generator().manual_seed(0)
        shapes = (
            (self.query_heads, queries, self.dim),
            (1, slots, self.dim),
            (1, slots, self.value_dim or self.dim),
        )
        drawn = [torch.randn(rows, *shape, generator=random) for shape in shapes]
        return [[tensor.to(self.device, kind) for tensor in drawn] for kind in {torch.float32, self.dtype}]


@cache
@torch.inference_mode()
def steady_extents(heads: Heads, step: int) -> Sequence[int]:
    """Find the multiples of ``step`` up to :data:`PERIOD` at which hidden slots beyond them change no bit.

    A kernel sums over all slots that are read, those with weight 0 included, and how it groups the terms may depend on
    their number. The same token would then have other bits when it is read with more slots after it. Extents repeat
    after a period, which is checked for the first two.
    """
    inputs, terms = heads.inputs(PROBE_ROWS, PROBE_TOKENS, 3 * PERIOD), heads.terms

    def steady(extent: int) -> bool:
        return all(
            torch.equal(_among(each, extent, extent, terms), _among(each, extent, 3 * PERIOD, terms)) for each in inputs
        )

    return [each for each in range(step, PERIOD, step) if steady(each) and steady(PERIOD + each)] + [PERIOD]


@cache
@torch.inference_mode()
def steady_queries(heads: Heads, most: int) -> Sequence[int]:
    """Find the numbers of queries of a row, up to ``most``, with which each of them gets the bits that it gets among
    ``most``."""
    inputs, terms = heads.inputs(PROBE_ROWS, most, 3 * PROBE_SLOTS), heads.terms

    def steady(count: int) -> bool:
        return all(
            torch.equal(
                _among(_first(each, count), extent, extent, terms), _among(each, extent, extent, terms)[:, :, :count]
            )
            for each in inputs
            for extent in range(PROBE_SLOTS, 3 * PROBE_SLOTS + 1, PROBE_SLOTS)
        )

    return [count for count in range(1, most) if steady(count)] + [most]


@cache
@torch.inference_mode()
def steady_beginning(heads: Heads) -> bool:
    """Find out whether a period of hidden slots before those that are seen changes no bit."""
    inputs, terms = heads.inputs(PROBE_ROWS, PROBE_TOKENS, 3 * PERIOD), heads.terms
    return all(
        torch.equal(_behind(each, PERIOD, terms), _behind(each, skipped, terms))
        for each in inputs
        for skipped in (0, 2 * PERIOD)
    )


def _behind(inputs: Sequence[Tensor], skipped: int, terms: Terms) -> Tensor:
    """Attention over slots beyond two periods and some more, where those from ``skipped`` on are read."""
    query, key, value = inputs
    mask = query.new_zeros(1, 1, query.shape[2], key.shape[2] - skipped)
    mask[..., : 2 * PERIOD + PROBE_SLOTS // 2 - skipped] = torch.finfo(query.dtype).min / 2
    return _folded(query, key[:, :, skipped:], value[:, :, skipped:], _folded_mask(mask, query.shape[1]), terms)


def _first(inputs: Sequence[Tensor], queries: int) -> Sequence[Tensor]:
    return inputs[0][:, :, :queries], *inputs[1:]


def _among(inputs: Sequence[Tensor], seen: int, extent: int, terms: Terms) -> Tensor:
    """Attention over the first ``seen`` slots where ``extent`` are read, as decoding asks for it."""
    query, key, value = inputs
    mask = query.new_zeros(1, 1, query.shape[2], extent)
    mask[..., seen:] = torch.finfo(query.dtype).min
    return _folded(query, key[:, :, :extent], value[:, :, :extent], _folded_mask(mask, query.shape[1]), terms)


_noted: ContextVar[set[Heads] | None] = ContextVar("noted", default=None)


def _note(query: Tensor, key: Any, value: Any, terms: Terms) -> None:
    if torch.compiler.is_compiling():  # which cannot look at the context, and is never asked for this
        return
    noted = _noted.get()
    if noted is not None:
        groups, sinks = query.shape[1] // key.shape[1], terms.sinks is not None
        noted.add(Heads(groups, *_where(query), value.shape[-1], terms.softcap, sinks))


def _where(tensor: Tensor) -> tuple[int, torch.dtype, torch.device]:
    return tensor.shape[-1], tensor.dtype, tensor.device


@torch.inference_mode()
def find_heads(model: PreTrainedModel) -> set[Heads]:
    """What the attention of a model's layers looks like, which one token is run to see; nothing where it is not
    ours."""
    noted: set[Heads] = set()
    token = _noted.set(noted)
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        _noted.reset(token)
    return noted


def choose_attention(model: PreTrainedModel) -> str:
    """The attention implementation for a model: ours where it takes another one, else torch's or its own."""
    if model.device.type == "cuda":
        # cuDNN's compiles a plan for every shape, and a start meets hundreds: 7 ms for each on an H200.
        torch.backends.cuda.enable_cudnn_sdp(False)
    kind = type(model)
    if getattr(kind, "_supports_attention_backend", False):
        return NAME
    return "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"


AttentionInterface.register(NAME, masked_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
