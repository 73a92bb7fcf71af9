"""The slot-addressed KV cache: transformers writes through it, the caller says where.

``update(keys, values, layer)`` is all that a model tells its cache. So before each forward the runner aims the cache:
at which rows, which slots to write, how many to read. The mask alone says which slots a token sees.

A pool is [1, heads, slots, dim] for each layer's K and V. Pages that follow one another are one part of it and read as
they lie; others are gathered. Where the attention takes them so (:mod:`~ssd_ray.models.attention`), the tokens of all
rows stand in one line, however many each row has, and rows are read in parts at their own extents, those that lie at
equal distances as one; else rows are gathered at the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ssd_ray.models.attention import Part, Parts, Read
from ssd_ray.models.pages import PageTable
from ssd_ray.models.reach import Sight
from ssd_ray.models.replay import opaque

SHORT = 384
"""Slots up to which rows of equal extent whose pages lie scattered are gathered into one tensor: measured on a CPU,
copying them then costs less than an attention call for each."""

MAX_VIEWS = 128
"""Views that a layer keeps: each takes a kilobyte, and a row needs another one every page."""

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token."""

    heads: int
    key_dim: int
    value_dim: int


ALL = Sight()
"""What models see whose layers all see everything."""


@dataclass(frozen=True, slots=True)
class Place:
    """What is read of some rows: ``extent`` slots of each."""

    extent: int
    firsts: range = range(0)
    """Where in the pool the rows' slots begin, if they follow one another there, and at equal distances."""
    pages: Tensor | None = None
    """int64 [R, P]: pages to gather, if they do not."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens of one row that follow one another in a line of tokens.

    Attributes:
        row: KV row.
        count: tokens.
        extent: slots that they read.
        masks: additive, [count or more, extent]: what each of them sees, for each reach of the model's layers.
    """

    row: int
    count: int
    extent: int
    masks: Sequence[Tensor]


@dataclass(slots=True)
class Window:
    """Where a forward writes and reads; one object, shared by all layers."""

    written: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """int64 [R * T]: addresses of the leading T tokens of each row; what follows is padding."""
    extent: int = 0
    places: list[Place] = field(default_factory=list)
    """What is read; each place becomes one attention call."""
    layouts: Sequence[Parts] = ()
    """Whose tokens read what, for each reach of the layers, if they stand in a line."""
    asked: bool = False
    """Whether a model has asked how many slots are read, so that its calls may depend on it."""


class SlotLayer(CacheLayerMixin):
    """K and V of one layer, [1, heads, slots of the pool, dim] each, allocated by :class:`SlotCache`; ``reach`` says
    which of the model's it has."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, page_slots: int, window: Window, reach: int = 0) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self._window = window
        self._page_slots = page_slots
        self._reach = reach
        self._views: dict[tuple[range, int], KeysValues] = {}

    @opaque(lambda self, key_states, *args, **kwargs: (key_states,))
    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> Any:
        """Write [R, heads, T, dim] to the window's slots; return what it reads, [R, heads, extent, dim], or such
        parts of a line of tokens."""
        write(self.keys, self._window.written, key_states)
        write(self.values, self._window.written, value_states)
        pairs = [self._read(place) for place in self._window.places]
        if not self._window.layouts:
            return pairs[0]
        layout = self._window.layouts[self._reach]
        return [Read(tensors, layout) for tensors in zip(*pairs, strict=True)]

    def _read(self, place: Place) -> KeysValues:
        if place.pages is not None:
            where = place.pages, self._page_slots, place.extent
            return gather(self.keys, *where), gather(self.values, *where)
        lie = place.firsts, place.extent
        if lie not in self._views:
            # Kept, since making them costs as much as writing.
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            self._views[lie] = strided(self.keys, *lie), strided(self.values, *lie)
        return self._views[lie]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: everything was allocated at the start."""

    def get_seq_length(self) -> int:
        """0: a row has no length of its own. Positions and masks are always explicit."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(slots read, offset): asked only by models that build masks of their own."""
        self._window.asked = True
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


def strided(pool: Tensor, firsts: range, extent: int) -> Tensor:
    """Slots ``first .. first + extent - 1`` of a pool [1, heads, slots, dim] for each of ``firsts``, as
    [R, heads, extent, dim], without a copy."""
    _, heads, _, dim = pool.shape
    _, by_head, by_slot, by_dim = pool.stride()
    shape, strides = (len(firsts), heads, extent, dim), (firsts.step * by_slot, by_head, by_slot, by_dim)
    return pool.as_strided(shape, strides, pool.storage_offset() + firsts.start * by_slot)


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
        sight: what the layers see.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        rows: int,
        slots: int,
        page_slots: int,
        pages: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
        sight: Sight = ALL,
    ) -> None:
        self.table = PageTable(rows, slots, page_slots, pages)
        self.slots, self.device, self.sight = slots, device, sight
        self.window = Window()
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
        reaches = [*sight.of_layers, *[0] * len(shapes)]
        layers = [
            SlotLayer(tensors[i, 0], tensors[i, 1], page_slots, self.window, reaches[i]) for i in range(len(shapes))
        ]
        # Which position each slot of the pool holds: how far back a layer sees is told by positions.
        self._positions = torch.zeros(size, dtype=torch.int64, device=device) if sight.windowed else None
        super().__init__(layers=layers)

    def aim(self, rows: Sequence[int], extents: Sequence[int], written: Tensor) -> None:
        """Set where the next forward goes, whose rows all have as many tokens.

        Args:
            rows: R distinct rows.
            extents: slots to read of each row, from slot 0.
            written: int64 [R, T], the addresses of each row's tokens, on the cache's device. A forward of more than T
                tokens a row writes its first T.
        """
        window = self.window
        window.written, window.extent, window.layouts = written.flatten(), max(extents), ()
        firsts = [self.table.run(row, window.extent) for row in rows]
        window.places = [self._place(rows, window.extent, firsts)]

    def aim_line(self, stretches: Sequence[Stretch], written: Tensor, length: int, queries: Sequence[int]) -> None:
        """Set where the next forward goes, whose tokens stand in a line of ``length``, one stretch after the other and
        then padding.

        Args:
            stretches: of distinct rows.
            written: int64 [N], the addresses of all tokens but the padding, on the cache's device.
            queries: numbers of tokens that attention may be asked about for one row; it is padded to the next one.
                Empty: about as many as there are, which are many, as of a prompt; heads are not folded then.
        """
        window = self.window
        window.written, window.extent = written, max(each.extent for each in stretches)
        firsts = [self.table.run(each.row, each.extent) for each in stretches]
        groups = group([each.extent for each in stretches], firsts)
        window.places = [
            self._place([stretches[i].row for i in some], stretches[some[0]].extent, [firsts[i] for i in some])
            for some in groups
        ]
        window.layouts = lay_out(stretches, groups, length, queries, self.device)

    def _place(self, rows: Sequence[int], extent: int, firsts: Sequence[int | None]) -> Place:
        together = _progression(firsts)
        return Place(extent, pages=self.pages(rows, extent)) if together is None else Place(extent, together)

    def note(self, written: Tensor, positions: Tensor) -> None:
        """Note which positions the tokens have that the next forward writes; both int64, of one shape."""
        if self._positions is not None:
            self._positions[written] = positions

    def positions(self, row: int, extent: int) -> Tensor:
        """Positions of the first slots of a row, int64 [extent], where there are windows to which they matter."""
        if self._positions is None:
            raise ValueError("no layer has a window")
        pages = torch.tensor(self.table.of(row, extent), device=self.device)
        return self._positions.view(-1, self.table.page_slots)[pages].flatten()[:extent]

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
        if self._positions is not None:
            self._positions[goal] = self._positions[origin]


def group(extents: Sequence[int], firsts: Sequence[int | None]) -> list[list[int]]:
    """Which stretches are read together: those of equal extents whose rows lie at equal distances, and those of equal
    short extents whose pages lie scattered.

    Args:
        extents: slots that each reads.
        firsts: where in the pool its row begins; None: its pages lie scattered.
    """
    in_line: dict[int, list[tuple[int, int]]] = {}
    scattered: dict[tuple[int, int], list[int]] = {}
    for index, (extent, first) in enumerate(zip(extents, firsts, strict=True)):
        if first is not None:
            in_line.setdefault(extent, []).append((first, index))
        else:
            scattered.setdefault((extent, -1 if extent <= SHORT else index), []).append(index)
    return [*chain.from_iterable(map(_at_equal_distances, in_line.values())), *scattered.values()]


def _at_equal_distances(places: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The second numbers of pairs, those together whose first ones rise by equal steps."""
    runs: list[list[tuple[int, int]]] = []
    for place in sorted(places):
        run = runs[-1] if runs else []
        if not run or (len(run) > 1 and place[0] - run[-1][0] != run[1][0] - run[0][0]):
            runs.append([place])
        else:
            run.append(place)
    return [[index for _, index in run] for run in runs]


def _progression(firsts: Sequence[int | None]) -> range | None:
    """Places at equal distances as a range; None if they are not, or one is missing."""
    known = [first for first in firsts if first is not None]
    steps = {after - before for before, after in pairwise(known)} or {1}
    if len(known) < len(firsts) or len(steps) > 1 or min(steps) <= 0:
        return None
    return range(known[0], known[-1] + 1, steps.pop())


def lay_out(
    stretches: Sequence[Stretch],
    groups: Sequence[Sequence[int]],
    length: int,
    queries: Sequence[int],
    device: torch.device,
) -> list[Parts]:
    """How a line of tokens is cut into the parts that attention is computed for, for each reach of the layers."""
    starts = [0, *accumulate(stretch.count for stretch in stretches)]
    parts: list[list[Part]] = [[] for _ in stretches[0].masks]
    order: list[int] = []
    for group in groups:
        members = [stretches[index] for index in group]
        longest = max(stretch.count for stretch in members)
        size = next((each for each in queries if each >= longest), longest)
        # Where there are too few of a row, its last one is asked again.
        take = [starts[index] + min(i, stretches[index].count - 1) for index in group for i in range(size)]
        in_line = take == list(range(take[0], take[0] + len(take)))
        where = None if in_line else torch.tensor(take, device=device)
        for of_reach, masks in zip(parts, zip(*(stretch.masks for stretch in members), strict=True), strict=True):
            of_reach.append(Part(len(group), size, _stacked(masks, size), take[0], where, folds=bool(queries)))
        order += take
    restore = None
    if order != list(range(length)):
        places = {token: place for place, token in reversed(list(enumerate(order)))}
        restore = torch.tensor([places.get(token, 0) for token in range(length)], device=device)
    return [Parts(of_reach, restore) for of_reach in parts]


def _stacked(masks: Sequence[Tensor], size: int) -> Tensor:
    """The first rows of masks [T, E] as one [1 or G, 1, size, E]."""
    rows = [_rows_of(mask, size) for mask in masks]
    return rows[0][None, None] if len(rows) == 1 else torch.stack(rows)[:, None]


def _rows_of(mask: Tensor, size: int) -> Tensor:
    """The first rows of a mask [T, E]; its last one again where there are too few."""
    if len(mask) >= size:
        return mask[:size]
    return torch.cat([mask, mask[-1:].expand(size - len(mask), -1)])
