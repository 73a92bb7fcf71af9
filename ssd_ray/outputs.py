"""What becomes of a prompt: its result, and how it is put together from the messages of the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssd_ray.errors import EngineError, RequestError
from ssd_ray.stats import Stats
from ssd_ray.text import Detokenizer
from ssd_ray.wire import Output

Prompt = str | Sequence[int]
"""A text, or its token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What became of one prompt.

    Attributes:
        prompt: as it was given.
        text: the text that follows the prompt, without special tokens and without the stop string that ended it.
        token_ids: the tokens generated, with those that ended the text.
        finish_reason: "length", "stop", "cancelled" or "timeout".
        stats: the request's figures.
    """

    prompt: Prompt
    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats


class Transcript:
    """One text as it is written: messages go in, pieces of text and in the end the result come out.

    Attributes:
        output: the result, once the last message was taken.
    """

    def __init__(self, prompt: Prompt, detokenizer: Detokenizer) -> None:
        self.output: RequestOutput | None = None
        self._prompt = prompt
        self._detokenizer = detokenizer
        self._pieces: list[str] = []
        self._tokens: list[int] = []

    def push(self, message: Output) -> str:
        """Take the next message; return the text that is certain now, possibly none.

        Raises:
            RequestError: the target could not serve the request.
        """
        self._tokens += message.tokens
        piece = self._detokenizer.push(message.tokens)
        if message.finish_reason is not None:
            piece += self._detokenizer.finish()
        self._pieces.append(piece)
        if message.finish_reason is not None:
            self.output = self._result(message)
        return piece

    def _result(self, last: Output) -> RequestOutput:
        if last.finish_reason == "error":
            raise RequestError(last.error or "the target could not serve the request")
        stats = Stats() if last.stats is None else Stats(sums=last.stats)
        if last.stats is not None and last.stats.tokens != len(self._tokens):
            raise EngineError(f"{last.stats.tokens} tokens were generated, {len(self._tokens)} arrived")
        return RequestOutput(
            prompt=self._prompt,
            text="".join(self._pieces),
            token_ids=self._tokens,
            finish_reason=last.finish_reason or "",
            stats=stats,
        )
