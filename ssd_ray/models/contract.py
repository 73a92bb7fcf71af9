"""The contract of a model runner: a causal LM whose KV lives in slots that the caller addresses.

A runner holds ``rows`` independent KV rows of ``slots`` slots each. *Slot is not position*: a token may be written to
any slot of its row, and sees exactly the slots that its mask names. By convention the trunk of a sequence (its
committed tokens) has slot = position, and tree nodes sit in scratch slots beyond it. Rolling back is writing again from
an earlier slot: nothing is cleared, since a slot that no mask names is never seen.

Rows are virtual. Their memory is a pool of pages of ``page_slots`` slots, and ``bind`` says which page stands behind
which part of a row; several rows may share a page that none of them writes. Layers that see equally far have a pool of
their own, since what lies behind their windows can be given back. A runner that was made without a number of pages has
enough for all rows, bound from the start.

A *head* is a draft that goes on from what its target knows: it reads hidden states that the target's runner shows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, device, dtype

from ssd_ray.models.reach import Reach
from ssd_ray.saguaro.costs import Measured

PAGE_SLOTS = 64
"""Slots of a page where nothing else is said; what a row reads grows in steps of it."""

UNBOUND = -1
"""In place of a page: nothing stands behind this part of the row."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Memory for what layers keep that see equally far.

    Attributes:
        reach: how far back they see: pages of a row before what its next tokens see may be unbound.
        pages: how many there are, numbered from 0.
        page_bytes: bytes that one takes over these layers.
    """

    reach: Reach
    pages: int
    page_bytes: int


class ModelRunner(ABC):
    """A causal LM with slot-addressed KV. Shapes: R rows, T tokens a row, E slots read, V vocabulary."""

    vocab_size: int
    max_length: int
    """Positions that the model can take."""
    rows: int
    slots: int
    """Slots a row has: ``max_length`` and scratch, rounded up to whole pages."""
    page_slots: int
    """Slots of a page: slot s of a row lies in its virtual page ``s // page_slots``."""
    pools: Sequence[Pool]
    """Memory, one for each reach that layers have."""
    measured: Measured | None = None
    """What :meth:`append` costs, if that was measured."""
    shows: int = 0
    """Numbers that :meth:`show` tells of each token; 0: it shows nothing."""
    reads: int = 0
    """Numbers of its target's that :meth:`read` takes of each token; 0: it is no head."""
    dtype: dtype
    device: device
    """Where logits lie. Tensors that are handed in may lie anywhere."""

    @property
    def num_pages(self) -> int:
        """Pages that each pool has."""
        return min(pool.pages for pool in self.pools)

    @property
    def page_bytes(self) -> int:
        """Bytes that one page of each pool takes together."""
        return sum(pool.page_bytes for pool in self.pools)

    @abstractmethod
    def extent(self, needed: int) -> int:
        """Round a number of slots up to whole pages."""

    def padded(self, tokens: int) -> int:
        """How many tokens a row to hand to ``extend`` for that many: more where every shape has to be prepared."""
        return tokens

    def bits(self, counts: Sequence[int]) -> list[bytes]:
        """What tells how :meth:`append` rounds with so many tokens of each row: equal where it rounds alike."""
        return []

    @abstractmethod
    def bind(self, row: int, first: int, pages: Sequence[int], pool: int | None = None) -> None:
        """Let the row's virtual pages ``first``, ``first + 1``, .. be these pages of the pool from now on.

        Nothing is copied or cleared. Rows may share a page as long as none of them writes to it. Tokens are written to
        bound pages only; an unbound page may be read where no mask names its slots. A row whose pages follow one
        another in the pool is read without a copy, another one is gathered.

        Args:
            row: the row.
            first: a virtual page.
            pages: pages of the pool, or :data:`UNBOUND`.
            pool: which one; None: of each of them these.

        Raises:
            ValueError: a virtual page beyond the row's, or a page that the pool does not have.
        """

    @abstractmethod
    def extend(self, rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, visible: Tensor) -> Tensor:
        """Run tokens anywhere: the tree forward.

        Args:
            rows: R distinct KV rows.
            tokens, positions, slots: int64 [R, T].
            visible: bool [R, T, E]; ``visible[r, t, e]`` lets token t of row r see slot e, its own slot included.
                E must be a value that ``extent`` returned. A token that sees nothing gives unspecified logits, not NaN
                in other rows.

        Returns:
            Logits, float32 [R, T, V], after each token.

        Raises:
            ValueError: a token would be written to a page that is not bound.
        """

    @abstractmethod
    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        """Run trunk tokens, as many of each row as there are: those of row r take positions and slots
        ``starts[r] + 0, 1, ..`` and see all slots up to their own.

        Returns logits for each row, float32 [tokens of the row, V]. A token's are the same, bit for bit in half
        precision, whoever runs beside it.

        Raises:
            ValueError: a token would lie beyond the row's slots, or on a page that is not bound.
        """

    @abstractmethod
    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> None:
        """Write the KV of trunk tokens at positions and slots ``start ..``, and of no others; computes no logits.

        Raises:
            ValueError: as :meth:`append`.
        """

    @abstractmethod
    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy KV between slots of a row as if all were read before any is written. Positions go with the KV.

        Raises:
            ValueError: a slot lies on a page that is not bound.
        """

    def show(self, row: int, start: int, end: int) -> Tensor:
        """The hidden states that were kept of trunk tokens ``start .. end - 1``, [tokens, ``shows``] on the device."""
        raise NotImplementedError("a model that shows nothing")

    def read(self, row: int, start: int, states: Tensor) -> None:
        """Take the target's hidden states, [tokens, ``reads``], of trunk tokens from ``start`` on. Those of all tokens
        before were read, for this row or for one that shares the pages.

        What is run after such a token goes on from them; after another one it goes on from what the head itself made of
        that token, or, behind a token that it never ran, from nothing.

        Raises:
            ValueError: a slot lies on a page that is not bound.
        """
        raise NotImplementedError("a model that reads nothing")


class Wrapper(ModelRunner):
    """A runner that does what another one does, but for what a subclass does otherwise."""

    def __init__(self, runner: ModelRunner) -> None:
        self.measured = runner.measured
        self.shows, self.reads = runner.shows, runner.reads
        self.rows, self.slots, self.max_length = runner.rows, runner.slots, runner.max_length
        self.vocab_size, self.dtype, self.device = runner.vocab_size, runner.dtype, runner.device
        self.page_slots, self.pools = runner.page_slots, runner.pools
        self._runner = runner

    def extent(self, needed: int) -> int:
        return self._runner.extent(needed)

    def padded(self, tokens: int) -> int:
        return self._runner.padded(tokens)

    def bits(self, counts: Sequence[int]) -> list[bytes]:
        return self._runner.bits(counts)

    def bind(self, row: int, first: int, pages: Sequence[int], pool: int | None = None) -> None:
        self._runner.bind(row, first, pages, pool)

    def extend(self, rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, visible: Tensor) -> Tensor:
        return self._runner.extend(rows, tokens, positions, slots, visible)

    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        return self._runner.append(rows, tokens, starts)

    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> None:
        self._runner.prefill(row, tokens, start)

    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        self._runner.move(row, source, destination)

    def show(self, row: int, start: int, end: int) -> Tensor:
        return self._runner.show(row, start, end)

    def read(self, row: int, start: int, states: Tensor) -> None:
        self._runner.read(row, start, states)
