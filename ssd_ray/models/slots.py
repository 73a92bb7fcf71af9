"""The slot-addressed KV cache: transformers writes through it, the caller says where.

``update(keys, values, layer)`` is all that a model tells its cache. So before each forward the runner aims the cache:
at which rows, at which slots to write, how many slots to read. What a layer returns is then
``[R, heads, extent, dim]``, however long the sequences are; the mask alone says which slots a token sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

MAX_VIEWS = 256
"""Windows whose views a layer keeps."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def elements(self) -> int:
        """Numbers kept for one token."""
        return self.heads * (self.key_dim + self.value_dim)


class SlotWindow:
    """Where a forward reads and writes; one object, shared by all layers."""

    def __init__(self) -> None:
        self.rows: slice | Tensor = slice(0, 0)
        """A range of rows is read as a view; other rows (int64 [R]) are gathered."""
        self.extent = 0
        self.slots: Tensor | None = None
        """int64 [T]: the slots that every row writes to, or None if rows differ or are gathered."""
        self.flat: dict[int, Tensor] = {}
        """By number of heads: int64 [R*heads*T], which of all [rows*heads*slots] vectors are written."""
        self.num_written = 0
        """T: leading tokens of the forward that are written; what follows is padding."""


class SlotLayer(CacheLayerMixin):
    """K and V of one layer: [rows, heads, slots, dim] each, allocated by :class:`SlotCache`."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, window: SlotWindow) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self._window = window
        self._heads = keys.shape[1]
        self._flat_keys, self._flat_values = keys.view(-1, keys.shape[-1]), values.view(-1, values.shape[-1])
        self._views: dict[tuple[tuple[int, ...], int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def look(self, rows: tuple[int, ...], extent: int) -> None:
        """Take the views of a window; those met before are kept, since making them costs as much as writing."""
        views = self._views.get((rows, extent))
        if views is None:
            span = self._window.rows if isinstance(self._window.rows, slice) else slice(None)
            keys, values = self.keys[span], self.values[span]
            views = keys, values, keys[:, :, :extent], values[:, :, :extent]
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            self._views[rows, extent] = views
        self._row_keys, self._row_values, self._read_keys, self._read_values = views

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write [R, heads, T, dim] to the window's slots; return what the window reads, [R, heads, extent, dim]."""
        window = self._window
        if key_states.shape[2] != window.num_written:
            key_states, value_states = key_states[:, :, : window.num_written], value_states[:, :, : window.num_written]
        if window.slots is not None:
            self._row_keys.index_copy_(2, window.slots, key_states)
            self._row_values.index_copy_(2, window.slots, value_states)
        else:
            flat = window.flat[self._heads]
            self._flat_keys.index_copy_(0, flat, key_states.reshape(len(flat), -1))
            self._flat_values.index_copy_(0, flat, value_states.reshape(len(flat), -1))
        if isinstance(window.rows, slice):
            return self._read_keys, self._read_values
        return self._read_keys.index_select(0, window.rows), self._read_values.index_select(0, window.rows)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: everything was allocated at the start."""

    def get_seq_length(self) -> int:
        """0: a row has no length of its own. Positions and masks are always explicit."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(slots read, offset): asked only by models that build masks of their own."""
        return self._window.extent, 0

    def get_max_length(self) -> int:
        """Slots of a row."""
        return int(self.keys.shape[2])


class SlotCache(Cache):
    """KV of ``rows`` rows of ``slots`` slots for every layer, allocated once and zeroed.

    Zeroed since a masked slot still enters the softmax with weight 0, and 0 times an uninitialised NaN is NaN.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], *, rows: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows, self.slots, self.device = rows, slots, device
        self._window = SlotWindow()
        self._aimed: tuple[tuple[int, ...], int] = ((), 0)
        self._heads = sorted({shape.heads for shape in shapes})
        # Tensors of equal shape share one bank [n, rows, heads, slots, dim], so that a move is one gather and one
        # scatter for all layers of nearly every model.
        members: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for layer, shape in enumerate(shapes):
            members.setdefault((shape.heads, shape.key_dim), []).append((layer, 0))
            members.setdefault((shape.heads, shape.value_dim), []).append((layer, 1))
        self.banks: list[Tensor] = []
        tensors: dict[tuple[int, int], Tensor] = {}
        for (heads, dim), owners in members.items():
            bank = torch.zeros(len(owners), rows, heads, slots, dim, dtype=dtype, device=device)
            self.banks.append(bank)
            tensors.update(zip(owners, bank, strict=True))
        layers = [SlotLayer(tensors[i, 0], tensors[i, 1], self._window) for i in range(len(shapes))]
        super().__init__(layers=layers)

    def aim(self, rows: Sequence[int], slots: Tensor, extent: int) -> None:
        """Set where the next forward goes.

        Args:
            rows: R distinct rows.
            slots: int64 [1, T] (the same for every row) or [R, T], on the cache's device. A forward of more than T
                tokens a row writes its first T.
            extent: slots to read, from slot 0.
        """
        window = self._window
        wanted = (tuple(rows), extent)
        if wanted != self._aimed:
            self._aimed = wanted
            window.rows, window.extent = self._span(rows), extent
            for layer in self.layers:
                layer.look(*wanted)
        window.num_written = slots.shape[1]
        window.slots = slots[0] if len(slots) == 1 and isinstance(window.rows, slice) else None
        if window.slots is None:
            window.flat = self._flat(rows, slots)

    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy the KV of slots to other slots of the same row, all read before any is written."""
        sources = torch.tensor(source, dtype=torch.int64, device=self.device)
        destinations = torch.tensor(destination, dtype=torch.int64, device=self.device)
        for bank in self.banks:
            of_row = bank[:, row]  # [n, heads, slots, dim]
            of_row.index_copy_(2, destinations, of_row.index_select(2, sources))

    def _span(self, rows: Sequence[int]) -> slice | Tensor:
        first, count = rows[0], len(rows)
        if list(rows) == list(range(first, first + count)):
            return slice(first, first + count)
        return torch.tensor(list(rows), dtype=torch.int64, device=self.device)

    def _flat(self, rows: Sequence[int], slots: Tensor) -> dict[int, Tensor]:
        first = torch.tensor(list(rows), dtype=torch.int64, device=self.device)[:, None, None]  # [R, 1, 1]
        flat = {}
        for heads in self._heads:
            head = torch.arange(heads, device=self.device)[:, None]  # [heads, 1]
            flat[heads] = ((first * heads + head) * self.slots + slots[:, None]).reshape(-1)  # [R, heads, T]
        return flat
