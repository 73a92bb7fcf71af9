"""What becomes of a prompt: its result, and how it is put together from the messages of the target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ssd_ray.errors import EngineError, RequestError, RequestFailedError
from ssd_ray.prompts import Prompt
from ssd_ray.stats import Stats
from ssd_ray.text import Characters, Detokenizer
from ssd_ray.wire import Output, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One text.

    Attributes:
        text: what follows the prompt, without special tokens and without the stop string that ended it.
        token_ids: the tokens generated, with those that ended the text.
        finish_reason: "length", "stop", "cancelled" or "timeout"; "error" if there is no text.
        stats: its figures.
        logprobs: an entry for each token, if ``SamplingParams.logprobs`` asked for them.
        pieces: then also what each token adds to the text; joined they are the text. A character of several tokens
            comes with the last of them.
        seed: names the noise that chose the tokens: with it the same request gives the same text.
        error: why there is no text.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats
    logprobs: list[TokenLogprobs] | None = None
    pieces: list[str] | None = None
    seed: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What became of one prompt. The first text's attributes can be asked for here.

    Attributes:
        prompt: as it was given.
        outputs: its texts, ``SamplingParams.n`` of them.
    """

    prompt: Prompt
    outputs: list[Completion]

    @property
    def text(self) -> str:
        """See :class:`Completion`, also for the following ones."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def stats(self) -> Stats:
        return self.outputs[0].stats

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.outputs[0].logprobs

    @property
    def pieces(self) -> list[str] | None:
        return self.outputs[0].pieces

    @property
    def seed(self) -> int | None:
        return self.outputs[0].seed

    @property
    def error(self) -> str | None:
        return self.outputs[0].error


def join(texts: Sequence[RequestOutput]) -> RequestOutput:
    """The result of a prompt from those of its texts."""
    return RequestOutput(prompt=texts[0].prompt, outputs=[text.outputs[0] for text in texts])


def failure(prompt: Prompt, error: RequestError) -> RequestOutput:
    """The result of a prompt that cannot be served."""
    nothing = Completion(text="", token_ids=[], finish_reason="error", stats=Stats(), error=str(error))
    return RequestOutput(prompt=prompt, outputs=[nothing])


class Transcript:
    """One text as it is written: messages go in, pieces of text and in the end the result come out.

    Args:
        prompt: as it was given.
        detokenizer: of this text.
        characters: of this text, too, if log-probabilities are wanted; tells what each token adds.
        seed: names the noise that chooses its tokens.

    Attributes:
        output: the result, once the last message was taken.
    """

    def __init__(
        self,
        prompt: Prompt,
        detokenizer: Detokenizer,
        characters: Characters | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        self.output: RequestOutput | None = None
        self._seed = seed
        self._prompt = prompt
        self._detokenizer = detokenizer
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._characters = characters
        self._logprobs: list[TokenLogprobs] = []

    def push(self, message: Output) -> str:
        """Take the next message; return the text that is certain now, possibly none.

        Raises:
            RequestFailedError: the target could not serve the request.
        """
        self._tokens += message.tokens
        self._logprobs += message.logprobs
        piece = self._detokenizer.push(message.tokens)
        if message.finish_reason is not None:
            piece += self._detokenizer.finish()
        self._pieces.append(piece)
        if message.finish_reason is not None:
            self.output = self._result(message)
        return piece

    def _result(self, last: Output) -> RequestOutput:
        if last.finish_reason == "error":
            raise RequestFailedError(last.error or "the target could not serve the request")
        stats = Stats() if last.stats is None else Stats(sums=last.stats)
        if last.stats is not None and last.stats.tokens != len(self._tokens):
            raise EngineError(f"{last.stats.tokens} tokens were generated, {len(self._tokens)} arrived")
        text = "".join(self._pieces)
        completion = Completion(
            text=text,
            token_ids=self._tokens,
            finish_reason=last.finish_reason or "",
            stats=stats,
            logprobs=None if self._characters is None else self._logprobs,
            pieces=None if self._characters is None else list(self._by_token(self._characters, text)),
            seed=self._seed,
        )
        return RequestOutput(prompt=self._prompt, outputs=[completion])

    def _by_token(self, characters: Characters, text: str) -> Iterator[str]:
        """What each token adds to the text, which may end before the last token or within one."""
        start, last = 0, len(self._tokens) - 1
        for index, token in enumerate(self._tokens):
            piece = characters.push(token) + (characters.finish() if index == last else "")
            yield text[start : start + len(piece)]
            start += len(piece)
