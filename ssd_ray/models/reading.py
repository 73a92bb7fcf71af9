"""The runner of heads, which go on from hidden states of their target where they have been told them.

A token's state lies under its address, as its KV does: the target's once it was read, until then what the head itself
made of the token. Which token comes before another one is seen from its mask: the visible one of the position before.
In one forward tokens of a row may follow one another; they are run level by level then, unless the state between them
was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ssd_ray.models.contract import UNBOUND
from ssd_ray.models.graphs import eager_forward
from ssd_ray.models.memory import HeadModel, Memory
from ssd_ray.models.runner import HFRunner

LACKING = float("-inf")
"""Logit of a token that the head never proposes."""


class HeadRunner(HFRunner):
    """Runs one head; see :class:`~ssd_ray.models.contract.ModelRunner` for the operations.

    Args:
        model: the head.
        sizes: as of :class:`~ssd_ray.models.runner.HFRunner`. It is not compiled.
    """

    def __init__(self, model: HeadModel, **sizes: Any) -> None:
        super().__init__(model, **(sizes | {"compile": False, "vocab_size": model.config.vocab_size}))
        self._decode = eager_forward(model, self._kv)  # states are read and kept on the way
        self._combine, self.reads = model.combine, model.reads
        self._table = self._kv.pools[0].table
        size, hidden = self._table.size, model.config.hidden_size
        spare = self._table.spare * self.page_slots
        self._nothing, self._nowhere = spare, spare + 1  # a state of zeros, and one that nobody reads
        self._memory = Memory(
            torch.zeros(size, hidden, dtype=self.dtype, device=self.device),
            torch.full((size,), self._nothing, device=self.device),
            torch.full((size,), self._nowhere, device=self.device),
            self._kv.window,
        )
        model.get_decoder().memory = self._memory
        own = self._memory.states[0].nbytes * self.page_slots
        self.pools = [replace(self.pools[0], page_bytes=self.pools[0].page_bytes + own), *self.pools[1:]]
        held = self._kv.pools[0].held
        if held is None:
            raise ValueError("a head whose config lets tokens see the first one")
        self._held = held  # positions, by address
        self._known = [0] * self.rows  # tokens of each row whose states were read
        self._columns = _columns(model)

    def bind(self, row: int, first: int, pages: Sequence[int], pool: int | None = None) -> None:
        super().bind(row, first, pages, pool)
        if first == 0 and not any(page == UNBOUND for page in pages):  # else what is behind a window is given back
            self._known[row] = 0

    @torch.inference_mode()
    def read(self, row: int, start: int, states: Tensor) -> None:
        end = start + len(states)
        written = self._tensor(self._table.locate(row, range(start, end)))
        self._memory.states[written] = self._combine(states.to(self.device, self.dtype))
        self._held[written] = self._counter[start:end]
        self._known[row] = end

    @torch.inference_mode()
    def extend(self, rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, visible: Tensor) -> Tensor:
        levels = self._aim(rows, positions.to(self.device), slots, visible.to(self.device))
        deepest = max(map(max, levels))
        if not deepest:
            return super().extend(rows, tokens, positions, slots, visible)
        logits = torch.empty(*tokens.shape, self.vocab_size, device=self.device)
        for level in range(deepest + 1):
            picked = {
                index: [token for token, own in enumerate(of_row) if own == level]
                for index, of_row in enumerate(levels)
                if level in of_row
            }
            count = self.padded(max(map(len, picked.values())))
            which = torch.tensor(list(picked))[:, None]
            take = torch.tensor([[*some, *[some[-1]] * (count - len(some))] for some in picked.values()])
            there = [each[which, take] for each in (tokens, positions, slots, visible)]
            logits[which, take] = super().extend([rows[index] for index in picked], *there)
        return logits

    @torch.inference_mode()
    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        places = [(row, start, start + len(some)) for row, some, start in zip(rows, tokens, starts, strict=True)]
        self._kv.locate_trunk(places)  # all are there, before any is written
        logits = []
        for row, some, start in zip(rows, tokens, starts, strict=True):
            slots = torch.arange(start, start + len(some))[None]
            visible = torch.arange(self.extent(start + len(some))) <= slots[..., None]
            logits.append(self.extend([row], torch.tensor([list(some)]), slots, slots, visible)[0])
        return logits

    @torch.inference_mode()
    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> None:
        told = max(0, min(len(tokens), self._known[row] + 1 - start))
        if told:
            written = self._table.locate(row, range(start, start + told))
            before = [self._nothing, *written] if not start else [*self._table.locate(row, [start - 1]), *written]
            self._go_on(
                self._tensor(written), self._tensor(before[:told]), self._counter[start:][:told] < self._known[row]
            )
            super().prefill(row, tokens[:told], start)
        if told < len(tokens):
            self.append([row], [tokens[told:]], [start + told])

    @torch.inference_mode()
    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        super().move(row, source, destination)
        pairs = [(one, other) for one, other in zip(source, destination, strict=True) if other >= self._known[row]]
        if pairs:
            origin, goal = (self._tensor(self._table.locate(row, slots)) for slots in zip(*pairs, strict=True))
            self._memory.states[goal] = self._memory.states[origin]

    def _aim(self, rows: Sequence[int], positions: Tensor, slots: Tensor, visible: Tensor) -> list[list[int]]:
        """Set where tokens [R, T] find the states before them and leave their own; returns after how many others of
        this forward each has to be run."""
        table = self._table
        written = self._tensor([table.locate(row, some) for row, some in zip(rows, slots.tolist(), strict=True)])
        self._held[written] = positions
        pages = self._kv.pools[0].pages(rows, [range(visible.shape[-1])] * len(rows))
        places = self._held.view(-1, self.page_slots)[pages].flatten(1)  # [R, E]
        fits = visible & (places[:, None] == positions[..., None] - 1)
        parents = torch.where(fits.any(-1), fits.int().argmax(-1), -1).tolist()
        before = [
            [table.locate(row, [slot])[0] if slot >= 0 else self._nothing for slot in of_row]
            for row, of_row in zip(rows, parents, strict=True)
        ]
        known = self._tensor([self._known[row] for row in rows])
        self._go_on(
            written.flatten(), self._tensor(before).flatten(), (slots.to(self.device) < known[:, None]).flatten()
        )
        return [
            _levels(of_row, before_each, self._known[row])
            for row, of_row, before_each in zip(rows, slots.tolist(), parents, strict=True)
        ]

    def _go_on(self, written: Tensor, before: Tensor, read: Tensor) -> None:
        """Let tokens go on from the states at ``before``, and keep their own unless they were ``read``; int64 and bool
        [N]."""
        self._memory.before[written] = before
        self._memory.after[written] = torch.where(read, self._nowhere, written)

    def _logits(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        if self._columns is None:
            return logits
        columns, lacking = self._columns
        return logits[..., columns].masked_fill_(lacking, LACKING)


def _levels(slots: Sequence[int], before: Sequence[int], known: int) -> list[int]:
    """How many tokens of a forward have to be run before each, by the slots of all and of those before them. A token
    may be there twice."""
    parent = dict(zip(slots, before, strict=True))
    levels: dict[int, int] = {}

    def level(slot: int) -> int:
        if slot not in levels:
            above = parent[slot]
            levels[slot] = level(above) + 1 if above in parent and above >= known else 0
        return levels[slot]

    return [level(slot) for slot in slots]


def _columns(model: HeadModel) -> tuple[Tensor, Tensor] | None:
    """By tokens of the target, where the head's logits have them, and whether they lack them; None: all are there."""
    proposed, size = model.proposed, model.config.vocab_size
    if torch.equal(proposed, torch.arange(size, device=proposed.device)):
        return None
    columns = torch.zeros(size, dtype=torch.int64, device=proposed.device)
    columns[proposed] = torch.arange(len(proposed), device=proposed.device)
    lacking = torch.ones(size, dtype=torch.bool, device=proposed.device)
    lacking[proposed] = False
    return columns, lacking
