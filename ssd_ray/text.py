"""From tokens to text as they come: never half a character, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no character, also for one whose other bytes are still to come."""

CONTEXT_TOKENS = 8


class Detokenizer:
    """Turns the tokens of one text into pieces of it. Target and driver use it alike, so they agree where a text ends.

    The pieces, :meth:`finish` included, make up the decoding of all tokens, cut before the first stop string. How the
    tokens are split over :meth:`push` changes neither the text nor where it stops.

    Args:
        tokenizer: a Hugging Face tokenizer.
        stop: strings that end the text.
        context: tokens before the text. Some tokenizers write a token differently when it comes first; with the end of
            the prompt before it, it comes out as it continues the prompt.
        min_tokens: tokens whose text is no part of a stop string.

    Attributes:
        stopped: a stop string has come; further tokens are ignored.
        count: tokens that belong to the text: all so far, or those up to the one that completed the stop string.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), context: Sequence[int] = (), min_tokens: int = 0
    ) -> None:
        self.stopped = False
        self.count = 0
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        # Only the tokens near the end are decoded: those behind the last piece, and, so that they come out as they do
        # in the middle of a text, those of the last piece.
        self._window = [int(token) for token in context[-CONTEXT_TOKENS:]]
        self._read = len(self._window)
        self._known = self._decode()
        self._held = ""

    def push(self, tokens: Iterable[int]) -> str:
        """Take tokens; return the text that is certain now."""
        if not self._stop:
            fresh = list(tokens)
            self.count += len(fresh)
            return self._extend(fresh)
        pieces = []
        for token in tokens:
            if self.stopped:
                break
            self.count += 1
            pieces.append(self._cut(self._extend([token])))
        return "".join(pieces)

    def finish(self) -> str:
        """Return the text that was held back; no more tokens may come."""
        if self.stopped:
            return ""
        rest, self._known = self._decode()[len(self._known) :], self._decode()
        return self._cut(rest, last=True)

    def _extend(self, tokens: list[int]) -> str:
        self._window += tokens
        text = self._decode()
        if text.endswith(REPLACEMENT):
            return ""
        piece = text[len(self._known) :]
        if piece:
            del self._window[: self._read]
            self._read = len(self._window)
            self._known = self._decode()
        else:  # special tokens, which are no text
            del self._window[self._read :]
        return piece

    def _cut(self, piece: str, *, last: bool = False) -> str:
        """Hold back what may be the beginning of a stop string, drop what follows one."""
        if self.count <= self._min_tokens:
            return piece
        self._held += piece
        found = [start for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            end = min(found)
        else:
            end = len(self._held) - (0 if last else self._begun())
        certain, self._held = self._held[:end], "" if found else self._held[end:]
        return certain

    def _begun(self) -> int:
        """Length of the longest beginning of a stop string at the end of the held text."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stop)), 0)

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)
