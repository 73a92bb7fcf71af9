"""The slot-addressed KV cache: transformers writes through it, the caller says where.

``update(keys, values, layer)`` is all that a model tells its cache. So before each forward the runner aims the cache:
at which rows, which slots to write, how many to read. The mask alone says which slots a token sees.

A pool is [1, heads, slots, dim] for each layer's K and V. Pages that follow one another are one part of it and read as
they lie; others are gathered. Rows of one forward are read at their own extents where the attention takes them so
(:mod:`~ssd_ray.models.attention`); else they are gathered at the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ssd_ray.models.pages import PageTable

SHORT = 384
"""Slots up to which neighbours of equal extent are gathered into one tensor: measured on a CPU, copying them then costs
less than an attention call for each."""

MAX_VIEWS = 128
"""Views that a layer keeps: each takes a kilobyte, and a row needs another one every page."""

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Part:
    """What is read of some rows: ``extent`` slots of each."""

    extent: int
    first: int = 0
    """Where in the pool a row's slots begin, if they follow one another there."""
    pages: Tensor | None = None
    """int64 [R, P]: pages to gather, if they do not."""


@dataclass(slots=True)
class Window:
    """Where a forward writes and reads; one object, shared by all layers."""

    written: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """int64 [R * T]: addresses of the leading T tokens of each row; what follows is padding."""
    extent: int = 0
    parts: list[Part] = field(default_factory=list)
    """What is read, in the order of the rows; each part becomes one attention call."""


class SlotLayer(CacheLayerMixin):
    """K and V of one layer, [1, heads, slots of the pool, dim] each, allocated by :class:`SlotCache`."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, page_slots: int, window: Window) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self._window = window
        self._page_slots = page_slots
        self._views: dict[tuple[int, int], KeysValues] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> Any:
        """Write [R, heads, T, dim] to the window's slots; return what it reads, [R, heads, extent, dim], or lists
        of such parts of the rows."""
        write(self.keys, self._window.written, key_states)
        write(self.values, self._window.written, value_states)
        parts = self._window.parts
        if len(parts) == 1:
            return self._read(parts[0])
        return tuple(map(list, zip(*map(self._read, parts), strict=True)))

    def _read(self, part: Part) -> KeysValues:
        if part.pages is not None:
            where = part.pages, self._page_slots, part.extent
            return gather(self.keys, *where), gather(self.values, *where)
        span = part.first, part.first + part.extent
        if span not in self._views:
            # Kept, since making them costs as much as writing.
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            self._views[span] = self.keys[:, :, slice(*span)], self.values[:, :, slice(*span)]
        return self._views[span]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: everything was allocated at the start."""

    def get_seq_length(self) -> int:
        """0: a row has no length of its own. Positions and masks are always explicit."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(slots read, offset): asked only by models that build masks of their own."""
        return self._window.extent, 0

    def get_max_length(self) -> int:
        """Slots of the pool."""
        return self.keys.shape[2]


def write(pool: Tensor, addresses: Tensor, states: Tensor) -> None:
    """Write states [R, heads, T or more, dim] to addresses, int64 [R * T], of a pool [1, heads, slots, dim]."""
    rows, heads, tokens, dim = states.shape
    count = len(addresses) // rows
    if count != tokens:
        states = states[:, :, :count]
    if rows > 1:
        states = states.transpose(0, 1).reshape(1, heads, -1, dim)
    pool.index_copy_(2, addresses, states)


def gather(pool: Tensor, pages: Tensor, page_slots: int, extent: int) -> Tensor:
    """Pages, int64 [R, P], of a pool [1, heads, slots, dim], as [R, heads, extent, dim]."""
    _, heads, _, dim = pool.shape
    read = pool.view(heads, -1, page_slots, dim).index_select(1, pages.flatten())
    return read.view(heads, len(pages), -1, dim)[:, :, :extent].transpose(0, 1)


class SlotCache(Cache):
    """KV of ``rows`` rows of ``slots`` slots for every layer, in a pool of pages that is allocated once and zeroed.

    Zeroed since a masked slot still enters the softmax with weight 0, and 0 times an uninitialised NaN is NaN.

    Args:
        shapes: what each layer keeps.
        slots: a whole number of pages.
        pages: pages of the pool; see :class:`~ssd_ray.models.pages.PageTable`.
        apart: read rows in parts of equal extents; False gathers all of them.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        rows: int,
        slots: int,
        page_slots: int,
        pages: int | None = None,
        apart: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.table = PageTable(rows, slots, page_slots, pages)
        self.slots, self.device = slots, device
        self._apart = apart
        self._window = Window()
        size = self.table.size
        # Tensors of equal shape share one bank [n, heads, slots, dim], so that a move is one gather and one scatter
        # for all layers of nearly every model.
        members: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for layer, shape in enumerate(shapes):
            members.setdefault((shape.heads, shape.key_dim), []).append((layer, 0))
            members.setdefault((shape.heads, shape.value_dim), []).append((layer, 1))
        self.banks: list[Tensor] = []
        tensors: dict[tuple[int, int], Tensor] = {}
        for (heads, dim), owners in members.items():
            bank = torch.zeros(len(owners), heads, size, dim, dtype=dtype, device=device)
            self.banks.append(bank)
            tensors.update(zip(owners, bank[:, None], strict=True))
        self.page_bytes = sum(bank.nbytes for bank in self.banks) * page_slots // size
        layers = [SlotLayer(tensors[i, 0], tensors[i, 1], page_slots, self._window) for i in range(len(shapes))]
        super().__init__(layers=layers)

    def aim(self, rows: Sequence[int], extents: Sequence[int], written: Tensor) -> None:
        """Set where the next forward goes.

        Args:
            rows: R distinct rows.
            extents: slots to read of each row, from slot 0.
            written: int64 [R, T], the addresses of each row's tokens, on the cache's device. A forward of more than T
                tokens a row writes its first T.
        """
        window = self._window
        window.written, window.extent = written.flatten(), max(extents)
        window.parts = self._parts(rows, extents) if self._apart else [self._part(rows, window.extent)]

    def _parts(self, rows: Sequence[int], extents: Sequence[int]) -> list[Part]:
        parts = []
        for extent, places in groupby(range(len(rows)), extents.__getitem__):
            group = [rows[place] for place in places]
            groups = [group] if extent <= SHORT else [[row] for row in group]
            parts += [self._part(some, extent) for some in groups]
        return parts

    def _part(self, rows: Sequence[int], extent: int) -> Part:
        first = self.table.run(rows[0], extent) if len(rows) == 1 else None
        return Part(extent, pages=self.pages(rows, extent)) if first is None else Part(extent, first)

    def pages(self, rows: Sequence[int], extent: int) -> Tensor:
        """The pages behind the first slots of rows, int64 [R, P]."""
        return torch.tensor([self.table.of(row, extent) for row in rows], dtype=torch.int64, device=self.device)

    def pools(self, first: int, extent: int) -> list[KeysValues]:
        """A part of every layer's pool, [1, heads, extent, dim]."""
        span = slice(first, first + extent)
        return [(layer.keys[:, :, span], layer.values[:, :, span]) for layer in self.layers]

    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy the KV of slots to other slots of the same row, all read before any is written."""
        pairs = [self.table.locate(row, slots) for slots in (source, destination)]
        origin, goal = torch.tensor(pairs, dtype=torch.int64, device=self.device)
        for bank in self.banks:
            bank.index_copy_(2, goal, bank.index_select(2, origin))
