"""What a Python user holds: a target and its pool of drafts, behind :meth:`LLM.generate` and :meth:`LLM.stream`."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import Any, Self

from ssd_ray.cluster.driver import Driver, Request
from ssd_ray.cluster.preflight import check
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError, EngineError, RequestError
from ssd_ray.stats import EngineStats, Stats
from ssd_ray.text import Detokenizer
from ssd_ray.wire import Output, TokenLogprobs

__all__ = ["LLM", "Completion", "EngineStats", "RequestOutput", "TextStream", "TokenLogprobs"]

Prompt = str | Sequence[int]
"""A text, or its token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One text.

    Attributes:
        text: what follows the prompt, without special tokens and without the stop string that ended it.
        token_ids: the tokens generated, with those that ended the text.
        finish_reason: "length", "stop" or "cancelled".
        stats: its figures.
        logprobs: an entry for each token, if ``SamplingParams.logprobs`` asked for them.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats
    logprobs: list[TokenLogprobs] | None = None


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


class TextStream(Iterator[str]):
    """The pieces of one text as they come; concatenated, they are ``output.text``.

    One thread iterates. Leaving the iteration, by :meth:`close` or by forgetting it, cancels the request.
    """

    output: RequestOutput | None = None
    """The whole result, once the iteration has ended."""

    def __init__(
        self, driver: Driver, request: Request, prompt: Prompt, detokenizer: Detokenizer, *, with_logprobs: bool = False
    ) -> None:
        self._driver = driver
        self._request = request
        self._prompt = prompt
        self._detokenizer = detokenizer
        self._logprobs: list[TokenLogprobs] | None = [] if with_logprobs else None
        self._pieces = self._read()

    def __next__(self) -> str:
        return next(self._pieces)

    def cancel(self) -> None:
        """End the text early, from any thread; the iteration ends soon, and the result has what has come so far."""
        self._driver.cancel(self._request)

    def close(self) -> None:
        """Cancel the request unless it has ended, and read no further."""
        self._pieces.close()
        self.cancel()

    def wait(self) -> RequestOutput:
        """Read to the end and return the whole result."""
        for _ in self:
            pass
        if self.output is None:
            raise EngineError("the stream was closed before its end")
        return self.output

    def _read(self) -> Generator[str, None, None]:
        text, tokens = "", []
        try:
            for message in self._request:
                tokens += message.tokens
                if self._logprobs is not None:
                    self._logprobs += message.logprobs
                piece = self._detokenizer.push(message.tokens)
                if message.finish_reason is not None:
                    piece += self._detokenizer.finish()
                    self.output = self._result(text + piece, tokens, message)
                text += piece
                if piece:
                    yield piece
        finally:
            if not self._request.done:
                self._driver.cancel(self._request)

    def _result(self, text: str, tokens: list[int], last: Output) -> RequestOutput:
        if last.finish_reason == "error":
            raise RequestError(last.error or "the target could not serve the request")
        stats = Stats() if last.stats is None else Stats(sums=last.stats)
        if last.stats is not None and last.stats.tokens != len(tokens):
            raise EngineError(f"{last.stats.tokens} tokens were generated, {len(tokens)} arrived")
        reason = last.finish_reason or ""
        completion = Completion(text=text, token_ids=tokens, finish_reason=reason, stats=stats, logprobs=self._logprobs)
        return RequestOutput(prompt=self._prompt, outputs=[completion])


class LLM:
    """An engine: one target actor and its draft actors, started here and stopped by :meth:`close`.

    ``LLM()`` takes the bundled pair of models. All methods may be called from any thread.

    Args:
        target, draft: folders or hub ids of models with one vocabulary; None is the bundled model.
        options: the other fields of :class:`~ssd_ray.config.EngineConfig`.

    Raises:
        ConfigError: a field is unknown or has a value that it does not take.
        ModelError: a model is not there, cannot work here, or the two do not match.
        ResourceError: memory, cores or GPUs are missing.
        EngineError: something else kept the engine from starting.
    """

    def __init__(self, target: str | None = None, draft: str | None = None, **options: Any) -> None:
        self.config = EngineConfig.from_kwargs(target=target, draft=draft, **options)
        self._models = check(self.config)
        self._driver = Driver(replace(self.config, max_model_len=self._models.max_length))
        self._finalizer = weakref.finalize(self, self._driver.close)
        # At exit it has to come before Ray's own end, so it is registered after that, and not by weakref.
        self._finalizer.atexit = False
        atexit.register(self._finalizer)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Generate a text for each prompt, and wait for all.

        Args:
            prompts: one prompt or several.
            params: for all prompts, or one for each.

        Raises:
            RequestError: a prompt cannot be served; nothing has been started then.
            EngineError: the engine failed or was closed.
        """
        return list(self.outputs(prompts, params))

    def outputs(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """As :meth:`generate`, but hand out each result as soon as it and those before it are ready."""
        several = _several(prompts)
        each = [self._models.params(one) for one in _one_for_each(params, len(several))]
        tokens = [self._models.prompt(prompt) for prompt in several]
        streams: list[TextStream] = []
        try:
            for prompt, ids, one in zip(several, tokens, each, strict=True):
                for single in one.texts():
                    streams.append(self._submit(prompt, ids, single))
        except BaseException:
            _close(streams)
            raise
        return _wait_for(streams, [one.n for one in each])

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> TextStream:
        """Generate a text and hand out its pieces as they come.

        Raises:
            ConfigError: ``params`` asks for several texts; :meth:`SamplingParams.texts` parts them.
            RequestError: the prompt cannot be served.
            EngineError: the engine failed or was closed.
        """
        params = self._models.params(params or SamplingParams())
        if params.n > 1:
            raise ConfigError("n", "1 for a stream, which is one text", params.n)
        return self._submit(prompt, self._models.prompt(prompt), params)

    def scale_drafts(self, count: int) -> None:
        """Change the number of draft actors, at any time; 0 decodes without speculation.

        New drafts load while requests run; the call returns when they are ready.

        Raises:
            ConfigError: ``count`` is out of range, or the method has no draft actors.
            ResourceError: there is no room for so many. The pool is as it was.
        """
        self._driver.scale_drafts(count)

    def stats(self) -> EngineStats:
        """Figures of all requests so far."""
        return self._driver.stats()

    def close(self) -> None:
        """Stop the actors and whatever else was started; requests under way raise EngineClosedError. Idempotent."""
        self._finalizer()
        atexit.unregister(self._finalizer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, prompt: Prompt, tokens: list[int], params: SamplingParams) -> TextStream:
        detokenizer = Detokenizer(self._models.tokenizer, params.stop, tokens, params.min_tokens)
        request = self._driver.submit(tokens, params)
        return TextStream(self._driver, request, prompt, detokenizer, with_logprobs=params.logprobs is not None)


def _wait_for(streams: list[TextStream], counts: Sequence[int]) -> Iterator[RequestOutput]:
    """The results of several prompts, which have so many streams each."""
    left = iter(streams)
    try:
        for count in counts:
            singles = [stream.wait() for stream in islice(left, count)]
            yield replace(singles[0], outputs=[single.outputs[0] for single in singles])
    finally:
        _close(streams)


def _close(streams: list[TextStream]) -> None:
    for stream in streams:
        stream.close()


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, also if it is one prompt."""
    if isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(token, int) for token in prompts)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_for_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ConfigError("params", f"one SamplingParams, or one for each of {count} prompts", f"{len(params)} of them")
    return list(params)
