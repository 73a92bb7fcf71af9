"""How far back the layers of a model see: all of the text, a window that slides, or the chunk that a token is in.

A mask says which slots a token may see; which of these a layer does see depends on the positions that they hold. Layers
that reach equally far share a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SLIDING, CHUNKED = "sliding_attention", "chunked_attention"

SIZES = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}
"""Kinds of layers that do not see all, and the field of a config with how much they see."""

UNSEEN = "unseen_positions"
"""The field of a config with the number of first positions that nobody sees but they themselves, as heads have it."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far back tokens see.

    Attributes:
        size: tokens of the window, the token itself included, or of a chunk; 0: all before it.
        chunked: in chunks.
        unseen: the first so many positions are seen by themselves alone.
    """

    size: int = 0
    chunked: bool = False
    unseen: int = 0

    @property
    def whole(self) -> bool:
        """Whether all is seen."""
        return not self.size and not self.unseen

    def first(self, positions: Tensor) -> Tensor:
        """The first position that tokens at these positions see, int64 of the same shape."""
        least = positions.clamp(max=self.unseen)
        if not self.size:
            return least
        if self.chunked:
            return torch.maximum(positions // self.size * self.size, least)
        return torch.maximum(positions - (self.size - 1), least)

    def start(self, position: int) -> int:
        """The same of one position."""
        if self.chunked:
            return position // self.size * self.size
        return max(0, position - (self.size - 1)) if self.size else 0

    def pages(self, length: int, ahead: int, page_slots: int) -> int:
        """How many pages a sequence of ``length`` slots needs at once at most, that is written to slots up to ``ahead``
        beyond the first one whose token is still to be run."""
        whole = -(-length // page_slots)
        return min(whole, -(-(self.size + ahead) // page_slots) + 2) if self.size else whole

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether tokens at positions [.., T] reach back to those at positions [.., E]; bool [.., T, E]."""
        return keys[..., None, :] >= self.first(queries)[..., None]


EVERYTHING = Reach()


@dataclass(frozen=True, slots=True)
class Sight:
    """What all layers of a model see.

    Attributes:
        reaches: distinct ones; a forward has a mask for each.
        of_layers: which of them each layer has.
        of_kinds: which of them each kind of layers has that the model's config names.
    """

    reaches: Sequence[Reach] = (EVERYTHING,)
    of_layers: Sequence[int] = ()
    of_kinds: dict[str, int] | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig, length: int) -> Sight:
        """As a config has it; what no text of ``length`` tokens shows is everything."""
        text = config.get_text_config()
        kinds = layer_kinds(text)
        by_kind = {kind: _reach(text, kind, length) for kind in kinds}
        distinct = list(dict.fromkeys(by_kind.values()))
        return cls(
            distinct,
            [distinct.index(by_kind[kind]) for kind in kinds],
            {kind: distinct.index(reach) for kind, reach in by_kind.items()},
        )

    @property
    def windowed(self) -> bool:
        """Whether some layer does not see everything."""
        return not all(reach.whole for reach in self.reaches)

    def argument(self, masks: Sequence[Tensor]) -> Tensor | dict[str, Tensor]:
        """What a model takes for its mask, of a mask for each reach."""
        if len(masks) == 1 or self.of_kinds is None:
            return masks[0]
        return {kind: masks[index] for kind, index in self.of_kinds.items()}


def layer_kinds(text: PreTrainedConfig) -> list[str]:
    """The kind of each layer. A config that names none has one kind: with a window, if it has a size for it."""
    if kinds := getattr(text, "layer_types", None):
        return list(kinds)
    slides = getattr(text, "use_sliding_window", True) and getattr(text, SIZES[SLIDING], None)
    return [SLIDING if slides else "full_attention"] * int(text.num_hidden_layers)


def _reach(text: PreTrainedConfig, kind: str, length: int) -> Reach:
    size = getattr(text, SIZES.get(kind, ""), None)
    unseen = getattr(text, UNSEEN, 0)
    return Reach(size, kind == CHUNKED, unseen) if isinstance(size, int) and size < length else Reach(unseen=unseen)


@contextmanager
def shortened(config: PreTrainedConfig, size: int) -> Iterator[None]:
    """Let all windows and chunks of a config be no longer than ``size``, for a while."""
    text = config.get_text_config()
    before = {name: longest for name in SIZES.values() if isinstance(longest := getattr(text, name, None), int)}
    for name, longest in before.items():
        setattr(text, name, min(longest, size))
    try:
        yield
    finally:
        for name, longest in before.items():
            setattr(text, name, longest)
