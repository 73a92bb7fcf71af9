"""Penalties and biases: what the tokens of a sequence do to the logits of the next one.

Order and meaning are vLLM's: tokens that would complete a bad word are barred, and end tokens before there are
``min_tokens``; then the bias, the repetition penalty over prompt and text, and frequency and presence penalty over the
text alone. Every logit is changed by its own arithmetic, in which no other row or token has a part, so the same text
gives the same bits in a verification of any length and on a draft.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssd_ray.config import SamplingParams


class Penalties:
    """Counts the tokens of one sequence as they are committed, and changes logits by them.

    A position that is speculated on depends on tokens that are not committed: those come along with its logits, as the
    path that leads to it. The work grows with the different tokens of the sequence, not with the vocabulary.

    Args:
        params: penalties, bias, ``bad_words_ids`` and ``min_tokens``; ``stop_token_ids`` are all tokens that end the
            text.
        prompt_tokens: tokens that the sequence begins with and that are no part of the text.
        vocab_size: V; tokens beyond it are no concern of this model.
    """

    def __init__(self, params: SamplingParams, prompt_tokens: int, vocab_size: int) -> None:
        self._params = params
        self._prompt_tokens = prompt_tokens
        self._vocab_size = vocab_size
        known = [(token, bias) for token, bias in params.logit_bias if token < vocab_size]
        self._biased = torch.tensor([token for token, _ in known], dtype=torch.int64)
        self._bias = torch.tensor([bias for _, bias in known])
        self._ends = torch.tensor([token for token in params.stop_token_ids if token < vocab_size], dtype=torch.int64)
        self._bad_words = BadWords(params.bad_words_ids, vocab_size)
        self._shortest = prompt_tokens + params.min_tokens  # a sequence of so many tokens may end
        # How often the text has a token; 0 if only the prompt has it, which the repetition penalty alone looks at.
        self._counts: dict[int, int] = {}
        self._counted = 0 if params.repetition_penalty != 1.0 else prompt_tokens
        self._committed = torch.empty(2, 0, dtype=torch.int64)  # the same as token ids and counts

    def apply(self, logits: Tensor, tokens: Sequence[int], paths: Sequence[Sequence[int]]) -> Tensor:
        """Change logits.

        Args:
            logits: float32 [R, V], not changed themselves.
            tokens: all committed tokens; every call has those of the one before, and maybe more.
            paths: for each row the tokens after the committed ones that lead to it.

        Returns:
            float32 [R, V].
        """
        self._count(tokens)
        device = logits.device
        changed = logits.clone()
        changed[:, self._biased.to(device)] += self._bias.to(device)
        early = [row for row, path in enumerate(paths) if len(tokens) + len(path) < self._shortest]
        if early:
            changed[torch.tensor(early, device=device)[:, None], self._ends.to(device)] = -torch.inf
        end = max(self._prompt_tokens, len(tokens) - self._bad_words.memory)
        self._bad_words.bar(changed, tokens[end:], paths)
        columns, counts = self._committed.to(device)  # [S] each
        rows, ids, more = self._counts_on(paths).to(device)  # [P] each
        committed = self._penalised(changed.index_select(-1, columns), counts)  # [R, S]
        speculated = self._penalised(changed[rows, ids], more)  # [P]
        changed.index_copy_(-1, columns, committed)
        changed[rows, ids] = speculated
        return changed

    def _count(self, tokens: Sequence[int]) -> None:
        """Take the tokens that were committed since the last call."""
        for position in range(self._counted, len(tokens)):
            token = tokens[position]
            if token < self._vocab_size:
                self._counts[token] = self._counts.get(token, 0) + (position >= self._prompt_tokens)
        if self._counted < len(tokens):
            self._counted = len(tokens)
            self._committed = torch.from_numpy(
                np.array([np.fromiter(part, np.int64) for part in (self._counts.keys(), self._counts.values())])
            )

    def _counts_on(self, paths: Sequence[Sequence[int]]) -> Tensor:
        """Row, token and count of every token that a path adds to, int64 [3, P]."""
        entries = [
            (row, token, self._counts.get(token, 0) + count)
            for row, path in enumerate(paths)
            for token, count in Counter(path).items()
            if token < self._vocab_size
        ]
        return torch.tensor(entries, dtype=torch.int64).reshape(-1, 3).T

    def _penalised(self, logits: Tensor, counts: Tensor) -> Tensor:
        """Logits of tokens that the sequence has, by how often the text has them."""
        params = self._params
        # Multiplied, not divided: CPU and CUDA then round alike.
        factors = torch.where(logits > 0.0, 1.0 / params.repetition_penalty, params.repetition_penalty)
        taken = params.frequency_penalty * counts + params.presence_penalty * (counts > 0.0)
        return logits * factors - taken


class BadWords:
    """Sequences of tokens that a text must not have: where all but the last are there, the last one is barred.

    Args:
        words: the sequences.
        vocab_size: V; tokens beyond it cannot be chosen anyway.

    Attributes:
        memory: how many tokens of the text may matter to the next one.
    """

    def __init__(self, words: Sequence[Sequence[int]], vocab_size: int) -> None:
        self._begun: dict[int, list[tuple[list[int], int]]] = {}  # by the last token but one
        self.memory = max(map(len, words), default=1) - 1
        known = [list(word) for word in words if word[-1] < vocab_size]
        self._always = torch.tensor([word[0] for word in known if len(word) == 1], dtype=torch.int64)
        for *begin, last in known:
            if begin:
                self._begun.setdefault(begin[-1], []).append((begin, last))

    def bar(self, logits: Tensor, end: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Set logits, float32 [R, V], to -inf.

        Rows and ``paths`` are those of :meth:`Penalties.apply`. ``end`` is that of the committed text, without the
        prompt: a word that the prompt begins is none of the text.
        """
        logits[:, self._always.to(logits.device)] = -torch.inf
        entries = [(row, last) for row, path in enumerate(paths) for last in self._completing([*end, *path])]
        if entries:
            rows, columns = torch.tensor(entries, device=logits.device).T
            logits[rows, columns] = -torch.inf

    def _completing(self, text: list[int]) -> list[int]:
        """Tokens that would complete a word of several."""
        begun = self._begun.get(text[-1], ()) if text else ()
        return [last for begin, last in begun if text[-len(begin) :] == begin]


def penalties(params: SamplingParams, prompt_tokens: int, vocab_size: int) -> Penalties | None:
    """The penalties of a sequence; None if it has none, so that they cost nothing."""
    return Penalties(params, prompt_tokens, vocab_size) if params.penalises else None
