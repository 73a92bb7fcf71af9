"""The contract of a model runner: a causal LM whose KV lives in slots that the caller addresses.

A runner holds ``rows`` independent KV rows of ``slots`` slots each. *Slot is not position*: a token may be written to
any slot of its row, and sees exactly the slots that its mask names. By convention the trunk of a sequence (its
committed tokens) has slot = position, and tree nodes sit in scratch slots beyond it. Rolling back is writing again from
an earlier slot: nothing is cleared, since a slot that no mask names is never seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, device, dtype


class ModelRunner(ABC):
    """A causal LM with slot-addressed KV. Shapes: R rows, T tokens a row, E slots read, V vocabulary."""

    vocab_size: int
    max_length: int
    """Positions that the model can take."""
    rows: int
    slots: int
    """Slots a row has: ``max_length`` and scratch."""
    dtype: dtype
    device: device
    """Where logits lie. Tensors that are handed in may lie anywhere."""

    @abstractmethod
    def extent(self, needed: int) -> int:
        """Round a number of slots up to the next read bucket (at most ``slots``)."""

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
        """

    @abstractmethod
    def append(self, rows: Sequence[int], tokens: Tensor, starts: Sequence[int]) -> Tensor:
        """Run trunk tokens: row r's tokens take positions and slots ``starts[r] + 0 .. T-1`` and see all slots up to
        their own. The caller pads to a fixed T: what a padding token writes is overwritten or never seen later.

        Returns logits, float32 [R, T, V].

        Raises:
            ValueError: a token would lie beyond the row's slots.
        """

    @abstractmethod
    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> None:
        """Write the KV of trunk tokens at positions and slots ``start ..``, and of no others; computes no logits."""

    @abstractmethod
    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy KV between slots of a row as if all were read before any is written. Positions go with the KV."""
