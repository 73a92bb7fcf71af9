"""How a decoding forward is launched: eagerly, compiled at fixed shapes, or as a CUDA graph.

All have one signature and one effect: they write the KV and return logits [R, T, V]. The others hold shapes fixed,
so that launching costs few calls instead of hundreds: one compilation for each (R, T), one CUDA graph for each
(R, T, E), made when the shape is first met.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ssd_ray.models.slots import SlotCache

logger = logging.getLogger(__name__)

Forward = Callable[[Sequence[int], Tensor, Tensor, Tensor, Tensor], Tensor]
"""(rows, tokens, positions, slots, mask) -> logits: R distinct rows; int64 [R, T]; positions and slots int64 [1, T]
(the same for every row) or [R, T]; additive mask [1 or R, 1, T, E]."""

MAX_SHAPES = 1024
"""Shapes that are compiled at most; torch's own limit is 8."""


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


def decoding_forward(model: PreTrainedModel, kv: SlotCache, *, compile: bool) -> Forward:
    """The forward that suits the device: CUDA graphs on CUDA, else compiled if asked for, else the plain one."""
    if kv.device.type == "cuda":
        return CudaGraphForward(model, kv, compile=compile)
    return CompiledForward(model, kv) if compile else eager_forward(model, kv)


class WindowLayer(CacheLayerMixin):
    """K and V of one layer as a graph sees them: all that varies between calls is in tensors."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, extent: int, gather: bool) -> None:
        super().__init__()
        self.keys, self.values = keys, values  # [rows, heads, slots, dim]
        self.is_initialized = True
        heads = torch.arange(keys.shape[1], device=keys.device)
        self._where = (rows[:, None, None], heads[None, :, None], slots[:, None])  # [R, heads, T] together
        self._rows = rows if gather else None
        self._extent = extent

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write [R, heads, T, dim], return [R, heads, extent, dim]."""
        self.keys.index_put_(self._where, key_states)
        self.values.index_put_(self._where, value_states)
        keys, values = self.keys[:, :, : self._extent], self.values[:, :, : self._extent]
        if self._rows is None:
            return keys, values
        return keys.index_select(0, self._rows), values.index_select(0, self._rows)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def get_seq_length(self) -> int:
        """0; see SlotLayer."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(slots read, offset)."""
        return self._extent, 0

    def get_max_length(self) -> int:
        """Slots of a row."""
        return int(self.keys.shape[2])


def static_step(model: PreTrainedModel, *, gather: bool) -> Callable[..., Tensor]:
    """A forward without Python state. ``rows``, int64 [R], index the tensors that are handed in; without ``gather``
    they are all of them, and what is read is not copied."""

    def step(
        keys: list[Tensor],
        values: list[Tensor],
        rows: Tensor,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        mask: Tensor,
    ) -> Tensor:
        extent = mask.shape[-1]
        layers = [WindowLayer(k, v, rows, slots, extent, gather) for k, v in zip(keys, values, strict=True)]
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits

    return step


class CompiledForward:
    """torch.compile at fixed shapes. Rows that are not a range go through the plain forward."""

    def __init__(self, model: PreTrainedModel, kv: SlotCache) -> None:
        self._kv = kv
        self._eager = eager_forward(model, kv)
        self._step = torch.compile(static_step(model, gather=False), dynamic=False, fullgraph=True)
        self._known: set[tuple[int, ...]] = set()
        self._spans: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}

    def __call__(self, rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        """See :data:`Forward`."""
        first, count = rows[0], len(rows)
        if list(rows) != list(range(first, first + count)):
            return self._eager(rows, tokens, positions, slots, mask)
        # One layout for each shape: strides are part of what is compiled for. Which rows they are is not.
        inputs = [torch.arange(count), tokens, positions.expand_as(tokens), slots.expand_as(tokens)]
        inputs = [tensor.contiguous() for tensor in (*inputs, mask.expand(count, -1, -1, -1))]
        keys, values = self._views(first, count)
        # Reading all slots is not a slice, hence another graph.
        shape = (*tokens.shape, mask.shape[-1] == self._kv.slots)
        if shape in self._known:
            return self._step(keys, values, *inputs)
        self._known.add(shape)
        logger.info("compiling the forward of %d rows of %d tokens", count, tokens.shape[1])
        return _run_compiled(self._step, keys, values, inputs)

    def _views(self, first: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
        if (first, count) not in self._spans:
            span = slice(first, first + count)
            views = [layer.keys[span] for layer in self._kv.layers], [layer.values[span] for layer in self._kv.layers]
            self._spans[first, count] = views
        return self._spans[first, count]


def _run_compiled(
    step: Callable[..., Tensor], keys: list[Tensor], values: list[Tensor], inputs: Sequence[Tensor]
) -> Tensor:
    """Run a step that may have to be compiled first. The extent is left open: measured, that costs nothing."""
    torch._dynamo.maybe_mark_dynamic(inputs[-1], 3)
    with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES, accumulated_recompile_limit=MAX_SHAPES):
        return step(keys, values, *inputs)


class CudaGraphForward:
    """One CUDA graph for each (R, T, E), replayed over static buffers; rows other than 0 .. R-1 are gathered."""

    def __init__(self, model: PreTrainedModel, kv: SlotCache, *, compile: bool) -> None:
        self._kv = kv
        steps = [static_step(model, gather=gather) for gather in (False, True)]
        self._steps = [torch.compile(step, dynamic=False, fullgraph=True) for step in steps] if compile else steps
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, ...], tuple[Any, list[Tensor], Tensor]] = {}

    def __call__(self, rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        """See :data:`Forward`."""
        gather = list(rows) != list(range(len(rows)))
        index = torch.tensor(list(rows), dtype=torch.int64, device=self._kv.device)
        inputs = [index, tokens, positions, slots, mask]
        shape = (*tokens.shape, mask.shape[-1], int(gather))
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(inputs, gather)
        graph, buffers, logits = self._graphs[shape]
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        return logits.clone()  # the next replay writes to the same place

    def _capture(self, inputs: Sequence[Tensor], gather: bool) -> tuple[Any, list[Tensor], Tensor]:
        index, tokens, positions, slots, mask = inputs
        count = len(index)
        buffers = [index, tokens, positions.expand_as(tokens), slots.expand_as(tokens), mask.expand(count, -1, -1, -1)]
        buffers = [tensor.clone(memory_format=torch.contiguous_format) for tensor in buffers]
        span = slice(None) if gather else slice(count)
        keys = [layer.keys[span] for layer in self._kv.layers]
        values = [layer.values[span] for layer in self._kv.layers]
        step = self._steps[gather]
        # Kernels are chosen and workspaces made outside the graph. Running it twice does what running it once does.
        stream: Any = torch.cuda.Stream(self._kv.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._kv.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                _run_compiled(step, keys, values, buffers)
        torch.cuda.current_stream(self._kv.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = step(keys, values, *buffers)
        return graph, buffers, logits
