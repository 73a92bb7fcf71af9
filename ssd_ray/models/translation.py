"""A draft that speaks another vocabulary than its target.

A speculation is accepted by equality with what the target chooses, so any token may be proposed: a draft need only
speak of those that both vocabularies have. Tokens are the same where they write the same bytes. What the draft knows no
token for it never proposes, and reads as the last of the tokens that it would write it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from ssd_ray.models.contract import ModelRunner, Wrapper
from ssd_ray.text import written

LEAST_SHARED = 0.1
"""Part of the target's vocabulary that a draft has to know at least."""

MISSING = -1


@dataclass(frozen=True, slots=True)
class Translation:
    """The tokens of a draft for those of its target.

    Attributes:
        same: by target token, the draft's token that writes the same, or :data:`MISSING`.
        read: by target token, what the draft reads for it.
        shared: part of the target's tokens that the draft has.
    """

    same: list[int]
    read: list[int]
    shared: float

    @classmethod
    def between(cls, target: Any, draft: Any, vocab_size: int) -> Translation:
        """Compare two tokenizers; the target's model has ``vocab_size`` tokens, some of them perhaps unused."""
        # Of several that write the same the one with the shortest name counts: a letter, and no byte of it.
        names = {token: name for name, token in draft.get_vocab().items()}
        theirs = sorted(written(draft).items(), key=lambda entry: (-len(names[entry[0]]), -entry[0]))
        known = {text: token for token, text in theirs}
        ours = written(target)
        if target.eos_token_id is not None and draft.eos_token_id is not None:  # however they are called
            known[ours[target.eos_token_id]] = draft.eos_token_id
        same = [known.get(ours[token], MISSING) if token in ours else MISSING for token in range(vocab_size)]
        read = list(same)
        lacking = [token for token in ours if token < vocab_size and same[token] == MISSING]
        texts = [ours[token][1].decode(errors="ignore") for token in lacking]
        for token, tokens in zip(lacking, _encoded(draft, texts), strict=True):
            read[token] = tokens[-1] if tokens else 0
        read = [max(0, token) for token in read]
        return cls(same, read, sum(token != MISSING for token in same) / max(1, len(ours)))


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    tokens: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return tokens


class Translated(Wrapper):
    """A draft's runner that takes and gives tokens of the target; logits of those that it lacks are minus infinity."""

    def __init__(self, runner: ModelRunner, translation: Translation) -> None:
        super().__init__(runner)
        self.vocab_size = len(translation.same)
        self._read_list = translation.read
        self._read = torch.tensor(translation.read)
        same = torch.tensor(translation.same, device=self.device)
        self._same, self._lacking = same.clamp(min=0), same == MISSING

    def extend(self, rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, visible: Tensor) -> Tensor:
        return self._logits(super().extend(rows, self._read[tokens.cpu()], positions, slots, visible))

    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        return [self._logits(each) for each in super().append(rows, [self._known(some) for some in tokens], starts)]

    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> None:
        super().prefill(row, self._known(tokens), start)

    def _known(self, tokens: Sequence[int]) -> list[int]:
        return [self._read_list[token] for token in tokens]

    def _logits(self, logits: Tensor) -> Tensor:
        return logits[..., self._same].masked_fill_(self._lacking, -inf)
