"""A tiny model with known probabilities, for tests: the runner's contract in exact arithmetic, without a network.

It works like a transformer of two layers whose attention is a sum of hashes. Layer 1 keeps a hash of (token, position)
in the token's slot. Layer 2 keeps a hash of that and of everything that the token saw when it was run. The logits after
a token are a row of a fixed random table, picked by a hash of all that it sees in layer 2. So they change whenever a
token, a position, a mask, a slot or a move is wrong, and when a slot still holds KV of another context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssd_ray.models.contract import ModelRunner, Pool
from ssd_ray.models.pages import PageTable
from ssd_ray.models.reach import EVERYTHING, Reach

Hashes = NDArray[np.uint64]


class TableModel(ModelRunner):
    """The contract of :class:`~ssd_ray.models.contract.ModelRunner` over a table of logits.

    Args:
        vocab_size: V.
        contexts: rows of the table; contexts that pick the same row have the same distribution.
        order: the distribution depends on the last ``order`` tokens alone (the visible ones of highest position,
            whatever the position is); None: on all tokens, their positions and order.
        seed: names the table and the hash. Models with equal seeds and contexts see the world alike.
        rows, max_length, scratch: a row has ``max_length + scratch`` slots, in whole pages.
        page_slots, pages: slots of a page, and pages of each pool; None is enough for all rows.
        reaches: how far back both layers see, or each of them; with an ``order``, both.
        sharpness: standard deviation of the logits; 0 is the uniform distribution.
    """

    def __init__(
        self,
        vocab_size: int = 32,
        *,
        contexts: int = 1024,
        order: int | None = None,
        seed: int = 0,
        rows: int = 1,
        max_length: int = 256,
        scratch: int = 128,
        page_slots: int = 16,
        pages: int | None = None,
        sharpness: float = 2.0,
        reaches: Sequence[Reach] = (EVERYTHING,),
    ) -> None:
        self.vocab_size, self.max_length = vocab_size, max_length
        self.rows, self.slots = rows, -(-(max_length + scratch) // page_slots) * page_slots
        self.page_slots = page_slots
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.order, self._salt = order, np.uint64(seed)
        normal = np.random.default_rng(seed).standard_normal((contexts, vocab_size))
        self._table = torch.from_numpy((sharpness * normal).astype(np.float32))  # [contexts, V]
        self._count = pages
        self._reaches = reaches[0], reaches[-1]
        self._allocate()

    def _allocate(self) -> None:
        size = self.rows, self.slots, self.page_slots, self._count
        self._layers = [_Layer(reach, PageTable(*size)) for reach in self._reaches]
        kinds = list(dict.fromkeys(self._reaches))
        self._pool_of = [kinds.index(reach) for reach in self._reaches]
        page_bytes = 2 * 2 * 8 * self.page_slots // len(kinds)
        self.pools = [Pool(reach, self._layers[0].pages.num_pages, page_bytes) for reach in kinds]

    def perturbed(self, agreement: float, seed: int = 1) -> Self:
        """A fresh model of the same size that has this one's logits in a fraction of contexts, other ones elsewhere."""
        random = np.random.default_rng(seed)
        contexts = len(self._table)
        agrees = torch.from_numpy(random.random((contexts, 1)) < agreement)
        return self._with_table(torch.where(agrees, self._table, self._table[random.permutation(contexts)]))

    def blurred(self, noise: float, seed: int = 1) -> Self:
        """A fresh model of the same size with this one's logits and normal noise of this standard deviation: as in real
        pairs, a wrong guess is a near miss."""
        normal = np.random.default_rng(seed).standard_normal(self._table.shape).astype(np.float32)
        return self._with_table(self._table + noise * torch.from_numpy(normal))

    def agreement(self, other: TableModel) -> float:
        """The fraction of contexts in which another model of this size has the same likeliest token."""
        return float((self._table.argmax(-1) == other._table.argmax(-1)).double().mean())

    def _with_table(self, table: Tensor) -> Self:
        """A fresh model of the same size."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._table = table
        other._allocate()
        return other

    def distribution(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """The true distribution of the token after ``tokens`` (at least one), at positions 0, 1, ..: float64 [V]."""
        count = len(tokens)
        row = np.asarray(tokens, np.int64)[None]
        positions = np.arange(count)[None]
        visible = np.tri(count, dtype=bool)[None]
        near, far = (visible & _sees(reach, positions, positions) for reach in self._reaches)
        first = self._token_hash(row, positions)
        second = _mix(first + self._seen(near, first))
        picked = self._picked(near, positions, first) if self.order is not None else self._hashed(far, second)
        logits = self._table[int(picked[0, -1])].double()
        return np.asarray(torch.softmax(logits, -1).numpy())

    def extent(self, needed: int) -> int:
        return -(-needed // self.page_slots) * self.page_slots

    def bind(self, row: int, first: int, pages: Sequence[int], pool: int | None = None) -> None:
        for layer, own in zip(self._layers, self._pool_of, strict=True):
            if pool in (None, own):
                layer.pages.bind(row, first, pages)

    def extend(self, rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, visible: Tensor) -> Tensor:
        lower, upper = self._layers
        at, places, sees = positions.numpy(), slots.tolist(), visible.numpy()
        # As in a transformer: all tokens write a layer before any of them reads it.
        own = self._token_hash(tokens.numpy(), at)
        lower.write(rows, places, at, own)
        near, placed, first = lower.read(rows, at, sees)
        upper.write(rows, places, at, _mix(own + self._seen(near, first)))
        far, _, second = upper.read(rows, at, sees)
        picked = self._picked(near, placed, first) if self.order is not None else self._hashed(far, second)
        return self._table[torch.from_numpy(picked)]

    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        for row, some, start in zip(rows, tokens, starts, strict=True):
            for layer in self._layers:
                layer.pages.locate_trunk(row, start, start + len(some), layer.reach.start(start))
        longest = max(map(len, tokens))
        # A row's last token stands for those that it has not: running it again changes nothing.
        places = np.minimum(np.arange(longest), np.array([[len(some) - 1] for some in tokens]))
        padded = np.array([[*some, *[some[-1]] * (longest - len(some))] for some in tokens], np.int64)
        slots = torch.from_numpy(np.array(starts, np.int64)[:, None] + places)
        visible = torch.arange(self.extent(int(slots.max()) + 1)) <= slots[..., None]
        logits = self.extend(rows, torch.from_numpy(padded), slots, slots, visible)
        return [some_logits[: len(some)] for some_logits, some in zip(logits, tokens, strict=True)]

    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> None:
        if tokens:
            self.append([row], [tokens], [start])

    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        for layer in self._layers:
            layer.move(row, source, destination)

    def _token_hash(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Hashes:
        if self.order is not None:
            positions = np.zeros_like(positions)
        return _mix(_mix(tokens.astype(np.uint64) + self._salt) + positions.astype(np.uint64))

    @staticmethod
    def _seen(visible: NDArray[np.bool_], hashes: Hashes) -> Hashes:
        """Sum of the visible hashes, uint64 [R, T]: positions are in the hashes, so order counts."""
        return np.asarray(np.where(visible, hashes[:, None], np.uint64(0)).sum(-1, dtype=np.uint64))

    def _picked(self, visible: NDArray[np.bool_], positions: NDArray[np.int64], first: Hashes) -> NDArray[np.int64]:
        """The table's row for each token by the last ones that it sees, int64 [R, T]."""
        return self._row_of(self._latest(visible, positions, first))

    def _hashed(self, visible: NDArray[np.bool_], second: Hashes) -> NDArray[np.int64]:
        """The same by all that it sees."""
        return self._row_of(self._seen(visible, second))

    def _row_of(self, seen: Hashes) -> NDArray[np.int64]:
        return np.asarray((_mix(seen) % np.uint64(len(self._table))).astype(np.int64))

    def _latest(self, visible: NDArray[np.bool_], positions: NDArray[np.int64], first: Hashes) -> Hashes:
        """A hash of the ``order`` visible tokens of highest position, uint64 [R, T]."""
        age = np.where(visible, -positions[:, None], np.iinfo(np.int64).max)  # [R, T, E]
        newest = np.argsort(age, -1, kind="stable")[..., : self.order]
        there = np.take_along_axis(visible, newest, -1)
        hashes = np.take_along_axis(np.broadcast_to(first[:, None], visible.shape), newest, -1)
        total = np.zeros(visible.shape[:2], np.uint64)
        for place in range(newest.shape[-1]):
            total = np.where(there[..., place], _mix(total + hashes[..., place]), total)
        return total


class _Layer:
    """What one layer keeps: a hash for each slot, and which position it has."""

    def __init__(self, reach: Reach, pages: PageTable) -> None:
        self.reach, self.pages = reach, pages
        self._positions, self._hashes = np.zeros(pages.size, np.int64), np.zeros(pages.size, np.uint64)

    def write(self, rows: Sequence[int], slots: Sequence[Sequence[int]], positions: Any, hashes: Hashes) -> None:
        """Write hashes of tokens, [R, T]."""
        to = [self.pages.locate(row, of_row) for row, of_row in zip(rows, slots, strict=True)]
        self._positions[to], self._hashes[to] = positions, hashes

    def read(self, rows: Sequence[int], queries: NDArray[np.int64], visible: NDArray[np.bool_]) -> tuple[Any, Any, Any]:
        """What tokens at positions [R, T] see of what is visible, bool [R, T, E], and positions and hashes [R, E]."""
        pages = [self.pages.of(row, visible.shape[-1]) for row in rows]
        shape = -1, self.pages.page_slots
        positions = self._positions.reshape(shape)[pages].reshape(len(rows), -1)
        hashes = self._hashes.reshape(shape)[pages].reshape(len(rows), -1)
        if self.reach != EVERYTHING:
            visible = visible & _sees(self.reach, queries, positions)
        return visible, positions, hashes

    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy what slots keep to others."""
        origin, goal = self.pages.locate(row, source), self.pages.locate(row, destination)
        for kept in (self._positions, self._hashes):
            kept[goal] = kept[origin]


def _sees(reach: Reach, queries: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.asarray(reach.sees(torch.from_numpy(queries), torch.from_numpy(keys)).numpy())


def _mix(values: Hashes) -> Hashes:
    """The finaliser of splitmix64: a bijection of 64-bit integers that scatters them."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (values ^ (values >> np.uint64(31))) + np.uint64(0x9E3779B97F4A7C15)
