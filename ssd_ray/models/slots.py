"""The slot-addressed KV cache: transformers writes through it, the caller says where.

``update(keys, values, layer)`` is all that a model tells its cache. So before each forward the runner aims the cache:
at which rows, which slots to write, how many to read. The mask alone says which slots a token sees.

Layers that see equally far have a pool of pages of their own, and what they read begins where their windows do. A pool
is [1, heads, slots, dim] for each layer's K and V. Pages that follow one another are one part of it and read as they
lie; others are gathered. Where the attention takes them so (:mod:`~ssd_ray.models.attention`), the tokens of all
rows stand in one line, however many each row has, and rows are read in parts at their own extents, those that lie at
equal distances as one; else rows are gathered at the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ssd_ray.models.attention import Part, Parts, Read
from ssd_ray.models.contract import Pool
from ssd_ray.models.pages import PageTable
from ssd_ray.models.reach import Reach, Sight
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
        reads: slots that they read, E of them, for each reach of the model's layers.
        masks: additive, [count or more, E]: what each of them sees, as many.
    """

    row: int
    count: int
    reads: Sequence[range]
    masks: Sequence[Tensor]


@dataclass(slots=True)
class Window:
    """Where a forward writes and reads, for each reach of the layers; one object, shared by all of them."""

    written: Sequence[Tensor] = ()
    """int64 [R * T]: addresses of the leading T tokens of each row; what follows is padding."""
    extents: Sequence[int] = ()
    """Slots that are read of a row at most."""
    places: Sequence[Sequence[Place]] = ()
    """What is read; each place becomes one attention call."""
    layouts: Sequence[Parts] = ()
    """Whose tokens read what, if they stand in a line."""
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
        self.reach = reach
        self._views: dict[tuple[range, int], KeysValues] = {}

    @opaque(lambda self, key_states, *args, **kwargs: (key_states,))
    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> Any:
        """Write [R, heads, T, dim] to the window's slots; return what it reads, [R, heads, extent, dim], or such
        parts of a line of tokens."""
        written = self._window.written[self.reach]
        write(self.keys, written, key_states)
        write(self.values, written, value_states)
        pairs = [self._read(place) for place in self._window.places[self.reach]]
        if not self._window.layouts:
            return pairs[0]
        layout = self._window.layouts[self.reach]
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
        return self._window.extents[self.reach], 0

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


class LayerPool:
    """The pages of layers that see equally far, allocated once and zeroed.

    Zeroed since a masked slot still enters the softmax with weight 0, and 0 times an uninitialised NaN is NaN.

    Args:
        shapes: what each of these layers keeps, by its number.
        reach: how far they see.
        table: which page is whose.
    """

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        reach: Reach,
        table: PageTable,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.reach, self.table, self.device = reach, table, device
        # Tensors of equal shape share one bank [n, heads, slots, dim], so that a move is one gather and one scatter
        # for all layers of nearly every model.
        members: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for layer, shape in shapes.items():
            members.setdefault((shape.heads, shape.key_dim), []).append((layer, 0))
            members.setdefault((shape.heads, shape.value_dim), []).append((layer, 1))
        self.banks: list[Tensor] = []
        self.tensors: dict[tuple[int, int], Tensor] = {}
        """By layer and 0 for K, 1 for V, [1, heads, slots, dim]."""
        for (heads, dim), owners in members.items():
            bank = torch.zeros(len(owners), heads, table.size, dim, dtype=dtype, device=device)
            self.banks.append(bank)
            self.tensors.update(zip(owners, bank[:, None], strict=True))
        # Which position each slot holds: how far back a layer sees is told by positions.
        self.held = torch.zeros(table.size, dtype=torch.int64, device=device) if not reach.whole else None

    @property
    def described(self) -> Pool:
        """What it is."""
        page_bytes = sum(bank.nbytes for bank in self.banks) * self.table.page_slots // self.table.size
        return Pool(self.reach, self.table.num_pages, page_bytes)

    def place(self, rows: Sequence[int], reads: Sequence[range], firsts: Sequence[int | None]) -> Place:
        """Where equally many slots of each of some rows lie, which begin at these addresses; None: lie scattered."""
        together, extent = _progression(firsts), len(reads[0])
        return Place(extent, pages=self.pages(rows, reads)) if together is None else Place(extent, together)

    def firsts(self, rows: Sequence[int], reads: Sequence[range]) -> list[int | None]:
        """Where in the pool what is read of each row begins; None: it lies scattered."""
        return [self.table.run(row, read.stop, read.start) for row, read in zip(rows, reads, strict=True)]

    def pages(self, rows: Sequence[int], reads: Sequence[range]) -> Tensor:
        """The pages behind equally many slots of each of some rows, int64 [R, P]."""
        found = [self.table.of(row, read.stop, read.start) for row, read in zip(rows, reads, strict=True)]
        return torch.tensor(found, dtype=torch.int64, device=self.device)

    def positions(self, rows: Sequence[int], extent: int) -> Tensor | None:
        """Positions of the first slots of rows, int64 [R, extent], where there are windows to which they matter."""
        if self.held is None:
            return None
        return self.held.view(-1, self.table.page_slots)[self.pages(rows, [range(extent)] * len(rows))].flatten(1)[
            :, :extent
        ]

    def locate_trunk(self, row: int, start: int, end: int) -> list[int]:
        """See :meth:`~ssd_ray.models.pages.PageTable.locate_trunk`."""
        return self.table.locate_trunk(row, start, end, self.reach.start(start))

    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        """See :meth:`SlotCache.move`."""
        pairs = [self.table.locate(row, slots) for slots in (source, destination)]
        origin, goal = torch.tensor(pairs, dtype=torch.int64, device=self.device)
        for bank in self.banks:
            bank.index_copy_(2, goal, bank.index_select(2, origin))
        if self.held is not None:
            self.held[goal] = self.held[origin]


class SlotCache(Cache):
    """KV of ``rows`` rows of ``slots`` slots for every layer.

    Args:
        shapes: what each layer keeps.
        slots: a whole number of pages.
        pages: pages of each pool, or one number for all of them; see :class:`~ssd_ray.models.pages.PageTable`.
        sight: what the layers see; there is a pool for each reach.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        rows: int,
        slots: int,
        page_slots: int,
        pages: Sequence[int] | int | None = None,
        dtype: torch.dtype,
        device: torch.device,
        sight: Sight = ALL,
    ) -> None:
        self.slots, self.device, self.sight = slots, device, sight
        self.window = Window()
        reaches = [*sight.of_layers, *[0] * len(shapes)][: len(shapes)]
        counts = pages if isinstance(pages, Sequence) else [pages] * len(sight.reaches)
        self.pools: list[LayerPool] = []
        for index, (reach, count) in enumerate(zip(sight.reaches, counts, strict=True)):
            members = {layer: shape for layer, shape in enumerate(shapes) if reaches[layer] == index}
            table = PageTable(rows, slots, page_slots, count)
            self.pools.append(LayerPool(members, reach, table, dtype, device))
        self.table = self.pools[0].table
        """That of a cache with one pool."""
        layers = []
        for layer, reach_of in enumerate(reaches):
            tensors = self.pools[reach_of].tensors
            layers.append(SlotLayer(tensors[layer, 0], tensors[layer, 1], page_slots, self.window, reach_of))
        super().__init__(layers=layers)

    @property
    def banks(self) -> list[Tensor]:
        """All memory for K and V."""
        return [bank for pool in self.pools for bank in pool.banks]

    def bind(self, row: int, first: int, pages: Sequence[int], pool: int | None = None) -> None:
        """See :meth:`~ssd_ray.models.contract.ModelRunner.bind`."""
        for each in self.pools if pool is None else [self.pools[pool]]:
            each.table.bind(row, first, pages)

    def locate(self, rows: Sequence[int], slots: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """Addresses in each pool of slots of rows that are to be written."""
        return [[pool.table.locate(*place) for place in zip(rows, slots, strict=True)] for pool in self.pools]

    def locate_trunk(self, places: Sequence[tuple[int, int, int]]) -> list[list[list[int]]]:
        """The same of stretches (row, start, end) of trunks."""
        return [[pool.locate_trunk(*place) for place in places] for pool in self.pools]

    def aim(self, rows: Sequence[int], reads: Sequence[range], written: Sequence[Tensor]) -> None:
        """Set where the next forward goes, whose rows all have as many tokens.

        Args:
            rows: R distinct rows.
            reads: slots to read of each of them, from where a page begins, for each pool.
            written: int64 [R, T], the addresses of each row's tokens, on the cache's device, for each pool. A forward
                of more than T tokens a row writes its first T.
        """
        window = self.window
        window.written, window.extents, window.layouts = [each.flatten() for each in written], list(map(len, reads)), ()
        window.places = [
            [pool.place(rows, [read] * len(rows), pool.firsts(rows, [read] * len(rows)))]
            for pool, read in zip(self.pools, reads, strict=True)
        ]

    def aim_line(
        self, stretches: Sequence[Stretch], written: Sequence[Tensor], length: int, queries: Sequence[int]
    ) -> None:
        """Set where the next forward goes, whose tokens stand in a line of ``length``, one stretch after the other and
        then padding.

        Args:
            stretches: of distinct rows.
            written: int64 [N], the addresses of all tokens but the padding, on the cache's device, for each pool.
            queries: numbers of tokens that attention may be asked about for one row; it is padded to the next one.
                Empty: about as many as there are, which are many, as of a prompt; heads are not folded then.
        """
        rows, places, layouts = [each.row for each in stretches], [], []
        for index, pool in enumerate(self.pools):
            reads = [each.reads[index] for each in stretches]
            firsts = pool.firsts(rows, reads)
            groups = group([len(read) for read in reads], firsts)
            places.append(
                [
                    pool.place([rows[i] for i in some], [reads[i] for i in some], [firsts[i] for i in some])
                    for some in groups
                ]
            )
            masks = [each.masks[index] for each in stretches]
            layouts.append(lay_out([each.count for each in stretches], masks, groups, length, queries))
        self.window.written, self.window.places, self.window.layouts = written, places, layouts
        self.window.extents = [max(place.extent for place in of_pool) for of_pool in places]

    def note(self, written: Sequence[Tensor], positions: Tensor) -> None:
        """Note which positions the tokens have that the next forward writes; all int64, of one shape."""
        for pool, addresses in zip(self.pools, written, strict=True):
            if pool.held is not None:
                pool.held[addresses] = positions

    def parts(self, firsts: Sequence[int], extents: Sequence[int]) -> list[KeysValues]:
        """A part of every layer's pool, [1, heads, extent, dim], for each pool where it begins and how long it is."""
        spans = [slice(first, first + extent) for first, extent in zip(firsts, extents, strict=True)]
        return [(layer.keys[:, :, spans[layer.reach]], layer.values[:, :, spans[layer.reach]]) for layer in self.layers]

    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy the KV of slots to other slots of the same row, all read before any is written."""
        for pool in self.pools:
            pool.move(row, source, destination)


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
    counts: Sequence[int],
    masks: Sequence[Tensor],
    groups: Sequence[Sequence[int]],
    length: int,
    queries: Sequence[int],
) -> Parts:
    """How a line of tokens is cut into the parts that attention is computed for.

    Args:
        counts: tokens of each stretch.
        masks: additive, [tokens or more, E] each.
        groups, length, queries: see :meth:`SlotCache.aim_line`.
    """
    starts, device = [0, *accumulate(counts)], masks[0].device
    parts: list[Part] = []
    order: list[int] = []
    for group in groups:
        longest = max(counts[index] for index in group)
        size = next((each for each in queries if each >= longest), longest)
        # Where there are too few of a row, its last one is asked again.
        take = [starts[index] + min(i, counts[index] - 1) for index in group for i in range(size)]
        in_line = take == list(range(take[0], take[0] + len(take)))
        where = None if in_line else torch.tensor(take, device=device)
        stacked = _stacked([masks[index] for index in group], size)
        parts.append(Part(len(group), size, stacked, take[0], where, folds=bool(queries)))
        order += take
    restore = None
    if order != list(range(length)):
        places = {token: place for place, token in reversed(list(enumerate(order)))}
        restore = torch.tensor([places.get(token, 0) for token in range(length)], device=device)
    return Parts(parts, restore)


def _stacked(masks: Sequence[Tensor], size: int) -> Tensor:
    """The first rows of masks [T, E] as one [1 or G, 1, size, E]."""
    rows = [_rows_of(mask, size) for mask in masks]
    return rows[0][None, None] if len(rows) == 1 else torch.stack(rows)[:, None]


def _rows_of(mask: Tensor, size: int) -> Tensor:
    """The first rows of a mask [T, E]; its last one again where there are too few."""
    if len(mask) >= size:
        return mask[:size]
    return torch.cat([mask, mask[-1:].expand(size - len(mask), -1)])
