"""How a decoding forward is launched: eagerly, replayed, compiled at fixed shapes, or as a CUDA graph.

All write the KV and return logits. On a CPU the tokens of all rows stand in a line of N, whose torch calls are
replayed. The others have rows of T tokens, and hold shapes fixed, too, so that launching costs less: one compilation
for each (R, T), one CUDA graph for each (R, T, E), made when the shape is first met, or has been met a few times.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ssd_ray.models.fusions import fused
from ssd_ray.models.reach import Sight
from ssd_ray.models.replay import CannotRecordError, replay, trace
from ssd_ray.models.slots import ALL, KeysValues, SlotCache, Stretch, gather, write

logger = logging.getLogger(__name__)

Forward = Callable[[Sequence[int], Sequence[range], Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""(rows, reads, tokens, positions, written, masks) -> logits: R distinct rows; which E slots of all of them are read;
int64 [R, T]; positions int64 [1, T] (the same for every row) or [R, T]; addresses int64 [R, T]; an additive mask
[1 or R, 1, T, E]. Reads, addresses and masks are there for each reach of the model's layers."""

LineForward = Callable[[Sequence[Stretch], Tensor, Tensor, Sequence[Tensor], Sequence[int]], Tensor]
"""(stretches, tokens, positions, written, queries) -> logits [N, V]: tokens and positions int64 [N], of the stretches
one after the other and then padding, which is computed and not written; addresses int64 [tokens but the padding] for
each reach of the model's layers; queries as in :meth:`~ssd_ray.models.slots.SlotCache.aim_line`."""

Replay = Callable[[Tensor, Tensor], Tensor]
"""(tokens, positions) -> logits or states, [1, N] and [1, N] to [N, ..]."""

Pools = list[KeysValues]
"""K and V of each layer."""

TRACED_AT = 3
"""Forwards before they are traced, which takes as long as a few."""

TRACED = 5, 8
"""Tokens of the forwards that are traced."""

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What a forward may call its KV cache: the models of transformers from 5.24 on; those before, and with code of their
own; those that keep nothing but states."""

MAX_SHAPES = 1024
"""Shapes that are compiled at most; torch's own limit is 8."""


def caller(module: nn.Module, sight: Sight = ALL) -> Callable[[Tensor, Tensor, Sequence[Tensor], Cache], Any]:
    """A model's forward, or its decoder's, as (tokens, positions, masks, cache) -> output, whatever its signature calls
    the cache; there is a mask for each reach that the model's layers have by ``sight``."""
    name = cache_name(module)

    def call(tokens: Tensor, positions: Tensor, masks: Sequence[Tensor], cache: Cache) -> Any:
        kwargs = {"attention_mask": sight.argument(masks), "position_ids": positions, name: cache}
        return module(input_ids=tokens, use_cache=True, **kwargs)

    return call


def cache_name(module: nn.Module) -> str:
    """What a module's forward calls its cache."""
    taken = inspect.signature(module.forward).parameters
    # A forward that names none hands all keywords on, or keeps no KV, which is found by running it.
    return next((each for each in CACHE_NAMES if each in taken), "past_key_values")


def eager_forward(model: PreTrainedModel, kv: SlotCache) -> Forward:
    """The plain forward of a model."""
    call = caller(model, kv.sight)

    def forward(
        rows: Sequence[int],
        reads: Sequence[range],
        tokens: Tensor,
        positions: Tensor,
        written: Sequence[Tensor],
        masks: Sequence[Tensor],
    ) -> Tensor:
        kv.aim(rows, reads, written)
        logits: Tensor = call(tokens, positions, masks, kv).logits
        return logits

    return forward


class EagerLine:
    """The plain forward of a model over a line of tokens of several rows; see :data:`LineForward`. A model without a
    head, which a prompt does not need, returns its last hidden states, [N, hidden]."""

    def __init__(self, model: PreTrainedModel, kv: SlotCache) -> None:
        self._model, self._call, self._kv = model, caller(model, kv.sight), kv
        # Attention has the masks of its parts. These only keep the model from making its own.
        self._masks = [torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=kv.device) for _ in kv.sight.reaches]

    def __call__(
        self,
        stretches: Sequence[Stretch],
        tokens: Tensor,
        positions: Tensor,
        written: Sequence[Tensor],
        queries: Sequence[int],
    ) -> Tensor:
        self._kv.aim_line(stretches, written, len(tokens), queries)
        return self._run(tokens[None], positions[None])

    def _run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The model over what the cache is aimed at."""
        output = self._call(tokens, positions, self._masks, self._kv)
        states: Tensor = output.logits if "logits" in output else output.last_hidden_state
        return states[0]


class ReplayedLine(EagerLine):
    """The plain forward's calls without the model's Python, and fewer of them.

    A replay has to give the model's bits for each number of tokens when that is first met, and is not used for one with
    which it does not; a model that cannot be traced is left to the plain forward. What is read of the KV is no part of
    a trace: only our attention looks at it.

    Attributes:
        replayed: by numbers of tokens that were met since there is a replay, the one that is used, if any.
    """

    def __init__(self, model: PreTrainedModel, kv: SlotCache) -> None:
        super().__init__(model, kv)
        self._until_traced = TRACED_AT
        self._replays: list[Replay] = []
        self.replayed: dict[int, Replay | None] = {}

    def __call__(
        self,
        stretches: Sequence[Stretch],
        tokens: Tensor,
        positions: Tensor,
        written: Sequence[Tensor],
        queries: Sequence[int],
    ) -> Tensor:
        self._until_traced -= 1
        if self._until_traced == 0:
            first = replace(stretches[0], count=1)
            self._trace(lambda length: self._kv.aim_line([first], [each[:1] for each in written], length, queries))
        return super().__call__(stretches, tokens, positions, written, queries)

    def _run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if not self._replays:
            return super()._run(tokens, positions)
        count = tokens.shape[1]
        if count not in self.replayed:
            return self._choose(tokens, positions)
        replayed = self.replayed[count]
        return super()._run(tokens, positions) if replayed is None else replayed(tokens, positions)

    def _choose(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Find out which replay gives the plain forward's bits for so many tokens; returns these."""
        count, logits = tokens.shape[1], super()._run(tokens, positions)
        self.replayed[count] = next((each for each in self._replays if _gives(each, tokens, positions, logits)), None)
        if self.replayed[count] is None:
            logger.info("%d tokens are run plainly: a replay gives other bits", count)
        return logits

    def _trace(self, aim: Callable[[int], None]) -> None:
        """Trace forwards of zeros of two lengths, whose KV the real one then writes over."""
        traces = []
        try:
            for count in TRACED:
                aim(count)
                inputs = torch.zeros(1, count, dtype=torch.int64, device=self._kv.device)
                traces.append(trace(super()._run, tokens=inputs, positions=inputs.clone()))
            if self._kv.window.asked:
                raise CannotRecordError("it asks how much KV is read")
            self._replays = [replay(*traces)]
        except Exception as error:  # whatever it is, the plain forward decides whether it is one
            logger.info("%s is run plainly, not replayed: %s", type(self._model).__name__, error)
            return
        try:
            self._replays.insert(0, replay(*map(fused, traces)))
        except Exception as error:  # then all of its calls are made
            logger.info("%s is replayed as it is: %s", type(self._model).__name__, error)


def _gives(replayed: Replay, tokens: Tensor, positions: Tensor, want: Tensor) -> bool:
    try:
        return torch.equal(replayed(tokens, positions), want)
    except Exception:  # the plain forward has decided that it is none
        return False


def decoding_forward(model: PreTrainedModel, kv: SlotCache, *, compile: bool) -> Forward:
    """The forward that suits the device: CUDA graphs on CUDA, else compiled if asked for, else the plain one."""
    if kv.device.type == "cuda":
        return CudaGraphForward(model, kv, compile=compile)
    return CompiledForward(model, kv) if compile else eager_forward(model, kv)


class StaticLayer(CacheLayerMixin):
    """K and V of one layer as a graph sees them: all that varies between calls is in tensors."""

    is_sliding = False

    def __init__(self, pools: KeysValues, written: Tensor, pages: Tensor | None, page_slots: int, extent: int) -> None:
        super().__init__()
        self.keys, self.values = pools
        self.is_initialized = True
        self._written, self._pages, self._page_slots, self._extent = written.flatten(), pages, page_slots, extent

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> KeysValues:
        """Write [R, heads, T, dim], return [R, heads, extent, dim]."""
        write(self.keys, self._written, key_states)
        write(self.values, self._written, value_states)
        return self._read(self.keys), self._read(self.values)

    def _read(self, pool: Tensor) -> Tensor:
        return pool if self._pages is None else gather(pool, self._pages, self._page_slots, self._extent)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def get_seq_length(self) -> int:
        """0; see SlotLayer."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(slots read, offset)."""
        return self._extent, 0

    def get_max_length(self) -> int:
        """Slots that can be read."""
        return self._extent


def static_step(model: PreTrainedModel, page_slots: int, sight: Sight) -> Callable[..., Tensor]:
    """A forward without Python state over pools [1, heads, slots, dim]: ``written``, int64 [R, T], are addresses in
    them, ``pages``, int64 [R, P], what is gathered, both for each reach of the layers, and so are the masks. Without
    pages the pools are what one row reads, E slots, and nothing is copied."""
    call, count = caller(model, sight), len(sight.reaches)
    reaches = [*sight.of_layers, *[0] * model.config.get_text_config().num_hidden_layers]

    def step(
        pools: Pools,
        pages: Sequence[Tensor | None],
        tokens: Tensor,
        positions: Tensor,
        *written_and_masks: Tensor,
    ) -> Tensor:
        written, masks = written_and_masks[:count], written_and_masks[count:]
        layers = [
            StaticLayer(pair, written[reach], pages[reach], page_slots, masks[reach].shape[-1])
            for pair, reach in zip(pools, reaches, strict=False)
        ]
        logits: Tensor = call(tokens, positions, masks, Cache(layers=layers)).logits
        return logits

    return step


class CompiledForward:
    """torch.compile at fixed shapes, for one row whose pages follow one another; what else there is goes through the
    plain forward."""

    def __init__(self, model: PreTrainedModel, kv: SlotCache) -> None:
        self._kv = kv
        self._eager = eager_forward(model, kv)
        self._step = torch.compile(static_step(model, kv.table.page_slots, kv.sight), dynamic=False, fullgraph=True)
        self._known: set[int] = set()

    def __call__(
        self,
        rows: Sequence[int],
        reads: Sequence[range],
        tokens: Tensor,
        positions: Tensor,
        written: Sequence[Tensor],
        masks: Sequence[Tensor],
    ) -> Tensor:
        """See :data:`Forward`."""
        firsts = _run_of(self._kv, rows, reads)
        if firsts is None:
            return self._eager(rows, reads, tokens, positions, written, masks)
        # One layout for each shape: strides are part of what is compiled for. Where the row lies is not.
        places = [addresses - first for addresses, first in zip(written, firsts, strict=True)]
        inputs = [tensor.contiguous() for tensor in (tokens, positions, *places, *masks)]
        pools = self._kv.parts(firsts, list(map(len, reads)))
        count, pages = tokens.shape[1], [None] * len(reads)
        if count in self._known:
            return self._step(pools, pages, *inputs)
        self._known.add(count)
        logger.info("compiling the forward of %d tokens", count)
        return _run_compiled(self._step, pools, pages, inputs)


def _run_of(kv: SlotCache, rows: Sequence[int], reads: Sequence[range]) -> list[int] | None:
    """Where in each pool what is read of one row begins; None if it lies scattered, or there are several rows."""
    if len(rows) > 1:
        return None
    firsts = [pool.table.run(rows[0], read.stop, read.start) for pool, read in zip(kv.pools, reads, strict=True)]
    return None if None in firsts else [first for first in firsts if first is not None]


def _run_compiled(
    step: Callable[..., Tensor], pools: Pools, pages: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> Tensor:
    """Run a step that may have to be compiled first. The extent is left open: measured, that costs nothing."""
    for mask in inputs[2 + len(pages) :]:
        torch._dynamo.maybe_mark_dynamic(mask, 3)
    for pool in (pool for pair in pools if None in pages for pool in pair):
        torch._dynamo.maybe_mark_dynamic(pool, 2)
    with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES, accumulated_recompile_limit=MAX_SHAPES):
        return step(pools, pages, *inputs)


class CudaGraphForward:
    """One CUDA graph for each (R, T, E), replayed over static buffers. Pages are gathered, but for one row whose pages
    are the pool's first ones. A model that asks the device something in its forward, as mixtures of experts do in
    float32, cannot be captured, and is run plainly."""

    def __init__(self, model: PreTrainedModel, kv: SlotCache, *, compile: bool) -> None:
        self._kv = kv
        self._eager = eager_forward(model, kv)
        self._captures = True
        step = static_step(model, kv.table.page_slots, kv.sight)
        self._step = torch.compile(step, dynamic=False, fullgraph=True) if compile else step
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, ...], tuple[Any, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Any) -> Tensor:
        """See :data:`Forward`."""
        if self._captures:
            try:
                return self._replay(*inputs)
            except RuntimeError as error:
                if self._graphs:  # it is not the model
                    raise
                logger.info("the forward is run plainly, since no CUDA graph can be made of it: %s", error)
                self._captures = False
        return self._eager(*inputs)

    def _replay(
        self,
        rows: Sequence[int],
        reads: Sequence[range],
        tokens: Tensor,
        positions: Tensor,
        written: Sequence[Tensor],
        masks: Sequence[Tensor],
    ) -> Tensor:
        in_place = _run_of(self._kv, rows, reads) == [0] * len(reads)
        pages = [pool.pages(rows, [read] * len(rows)) for pool, read in zip(self._kv.pools, reads, strict=True)]
        inputs = [*pages, tokens, positions, *written, *masks]
        shape = (*tokens.shape, *map(len, reads), int(in_place))
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(inputs, len(reads), in_place)
        graph, buffers, logits = self._graphs[shape]
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        return logits.clone()  # the next replay writes to the same place

    def _capture(self, inputs: Sequence[Tensor], reaches: int, in_place: bool) -> tuple[Any, list[Tensor], Tensor]:
        pages, (tokens, positions, *rest) = inputs[:reaches], inputs[reaches:]
        written, masks = rest[:reaches], rest[reaches:]
        buffers = [*pages, tokens, positions.expand_as(tokens), *written]
        buffers += [mask.expand(len(tokens), -1, -1, -1) for mask in masks]
        buffers = [tensor.clone(memory_format=torch.contiguous_format) for tensor in buffers]
        sizes = [mask.shape[-1] for mask in masks] if in_place else [pool.table.size for pool in self._kv.pools]
        pools = self._kv.parts([0] * reaches, sizes)
        read = [None] * reaches if in_place else buffers[:reaches]
        # Kernels are chosen and workspaces made outside the graph. Running it twice does what running it once does.
        stream: Any = torch.cuda.Stream(self._kv.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._kv.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                _run_compiled(self._step, pools, read, buffers[reaches:])
        torch.cuda.current_stream(self._kv.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._step(pools, read, *buffers[reaches:])
        return graph, buffers, logits
