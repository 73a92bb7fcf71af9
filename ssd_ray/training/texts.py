"""Text as one array of token ids, cut into rows; and what it means to learn it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

GOLDEN = 0.6180339887498949


def windows(ids: np.ndarray, first: int, rows: int, length: int) -> Tensor:
    """Rows number ``first``, ``first + 1``, .. of a text: golden-ratio offsets cover it evenly without a shuffle.

    Args:
        ids: [tokens], of any integer type.

    Returns:
        int64 [rows, length].
    """
    offsets = [int((first + row) * GOLDEN % 1.0 * (len(ids) - length)) for row in range(rows)]
    return torch.from_numpy(np.stack([ids[at : at + length] for at in offsets]).astype(np.int64))


class Text:
    """Token ids in a file, to be learned one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def ids(self) -> np.ndarray:
        """All of them, [tokens]."""
        ids: np.ndarray = np.load(self.path, mmap_mode="r")
        return ids

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def loss(self, model: Any, first: int, rows: int, length: int) -> Tensor:
        """Mean cross-entropy in nats a token."""
        ids = windows(self.ids, first, rows, length).to(next(model.parameters()).device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
