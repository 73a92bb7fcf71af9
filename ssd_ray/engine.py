"""What :class:`~ssd_ray.LLM` and :class:`~ssd_ray.AsyncLLM` share: an engine that runs, and requests to it."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat, zip_longest
from typing import get_args

from ssd_ray.cluster.driver import Driver
from ssd_ray.cluster.preflight import check
from ssd_ray.config import EngineConfig, OnError, SamplingParams, check_timeout
from ssd_ray.errors import ConfigError, RequestError, SsdRayError
from ssd_ray.outputs import RequestOutput, Transcript, failure
from ssd_ray.prompts import Prompt, Prompts, several
from ssd_ray.stats import EngineStats
from ssd_ray.text import Characters, Detokenizer, spelling
from ssd_ray.wire import Output

Params = SamplingParams | Iterable[SamplingParams] | None
"""For all prompts, or one for each."""

WINDOW = 8
"""Requests that one ``generate`` has under way, as a multiple of ``max_num_seqs``. Results come in order, so it says
how much longer than others a text may be before the target runs dry. Memory does not grow with their number."""


@dataclass(frozen=True, slots=True)
class Task:
    """A request that has been checked.

    Attributes:
        prompt: as it was given.
        tokens: its tokens.
        params: how to go on.
        timeout: seconds, waiting included, after which each text ends with what has come so far.
        on_error: what becomes of an error.
        refused: why it cannot be served; there are no tokens then.
    """

    prompt: Prompt
    tokens: list[int]
    params: SamplingParams
    timeout: float | None
    on_error: OnError = "stop"
    refused: RequestError | None = None

    def texts(self) -> list[Task]:
        """A task for each text that is asked for; none if it cannot be served."""
        return [] if self.refused else [replace(self, params=params) for params in self.params.texts()]

    def result(self, error: RequestError) -> RequestOutput:
        """The result of a prompt that cannot be served: its error, or, if that is to end everything, none."""
        if self.on_error == "stop":
            raise error
        return failure(self.prompt, error)


class Engine:
    """Models that have been checked and the actors that run them, until :meth:`close` or the end of the process."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.models = check(config)
        self.driver = Driver(self.models.config, self.models.fingerprints)
        self._finalizer = weakref.finalize(self, self.driver.close)
        # At exit it has to come before Ray's own end, so it is registered after that, and not by weakref.
        self._finalizer.atexit = False
        atexit.register(self._finalizer)

    @property
    def window(self) -> int:
        """Texts that one ``generate`` may have under way."""
        return min(WINDOW * self.config.max_num_seqs, self.config.max_queue)

    def task(self, prompt: Prompt, params: SamplingParams | None, timeout: float | None) -> Task:
        """Check a request.

        Raises:
            RequestError: the prompt or a parameter is none for this model.
            ConfigError: the timeout is none, or the parameters are something else.
        """
        check_timeout(timeout)
        checked = self.models.params(_params(params, self.models.sampling))
        return Task(prompt, self.models.prompt(prompt), checked, timeout)

    def tasks(
        self, prompts: Prompts, params: Params, timeout: float | None, on_error: OnError = "stop"
    ) -> Iterable[Task]:
        """Check many requests: prompts that are all there at once, others as they come.

        Raises:
            RequestError: a prompt cannot be served.
            ConfigError: prompts and parameters differ in number, or are something else, or the timeout is none.
        """
        check_timeout(timeout)
        if on_error not in get_args(OnError):
            raise ConfigError("on_error", "'stop' or 'continue'", on_error)
        given = several(prompts)
        tasks = (
            self._attempt(prompt, each, timeout, on_error)
            for prompt, each in _pairs(given, params, self.models.sampling)
        )
        return list(tasks) if isinstance(given, Sequence) else tasks

    def _attempt(self, prompt: Prompt, params: SamplingParams, timeout: float | None, on_error: OnError) -> Task:
        """Check a request of several; what is refused is a task, too, if the others go on."""
        try:
            return replace(self.task(prompt, params, timeout), on_error=on_error)
        except RequestError as error:
            if on_error == "stop":
                raise
            return Task(prompt, [], params, timeout, on_error, error)

    def stats(self) -> EngineStats:
        """Figures of all requests so far."""
        return replace(self.driver.stats(), shared_vocabulary=self.models.shared_vocabulary)

    def close(self) -> None:
        """Stop the actors and whatever else was started; requests under way raise EngineClosedError. Idempotent."""
        self._finalizer()
        atexit.unregister(self._finalizer)


class Generation:
    """A text under way. Whoever reads it decides how to wait for what ``deliver`` is handed, from another thread.

    Forgetting it cancels the request.

    Raises:
        ConfigError: the task is more than one text.
    """

    def __init__(self, engine: Engine, task: Task, deliver: Callable[[Output | SsdRayError], None]) -> None:
        if task.params.n > 1:
            raise ConfigError("n", "1 for a stream, which is one text", task.params.n)
        (params,) = task.params.texts()  # with a seed
        self._engine = engine
        self._transcript = _transcript(engine, task, params)
        self._number = engine.driver.number()
        self._closed = False
        # First, since Ctrl-C may come anywhere in what follows.
        weakref.finalize(self, engine.driver.cancel, self._number).atexit = False
        engine.driver.submit(self._number, task.tokens, params, deliver, timeout=task.timeout)

    @property
    def output(self) -> RequestOutput | None:
        """The whole result, once the iteration has ended."""
        return self._transcript.output

    @property
    def _over(self) -> bool:
        return self._closed or self.output is not None

    def cancel(self) -> None:
        """End the text early, from any thread; the iteration ends soon, and the result has what has come so far."""
        self._engine.driver.cancel(self._number)

    def _leave(self) -> None:
        self._closed = True
        self.cancel()

    def _take(self, item: Output | SsdRayError) -> str:
        """The text that an item adds; an error ends the iteration, and the request."""
        try:
            if isinstance(item, SsdRayError):
                raise item
            return self._transcript.push(item)
        except Exception:
            self._leave()
            raise


def _transcript(engine: Engine, task: Task, params: SamplingParams) -> Transcript:
    tokenizer = engine.models.tokenizer
    detokenizer = Detokenizer(tokenizer, params.ending_with(engine.models.end_tokens), task.tokens)
    characters = None
    if params.logprobs is not None:
        known = spelling(tokenizer, skip_special_tokens=params.skip_special_tokens)
        characters = Characters(known, task.tokens)
    return Transcript(task.prompt, detokenizer, characters, seed=params.seed)


_END = object()


def _params(params: object, usual: SamplingParams) -> SamplingParams:
    if params is None or isinstance(params, SamplingParams):
        return params or usual
    raise ConfigError("params", "a SamplingParams", params)


def _pairs(prompts: Iterable[Prompt], params: Params, usual: SamplingParams) -> Iterator[tuple[Prompt, SamplingParams]]:
    """Each prompt with its parameters, the ``usual`` ones where there are none."""
    if params is None or isinstance(params, SamplingParams):
        yield from zip(prompts, repeat(params or usual))
        return
    if not isinstance(params, Iterable) or isinstance(params, str | Mapping):
        raise ConfigError("params", "a SamplingParams, or one for each prompt", params)
    for prompt, each in zip_longest(prompts, params, fillvalue=_END):
        if prompt is _END or each is _END:
            surplus = "more parameters than prompts" if prompt is _END else "fewer parameters than prompts"
            raise ConfigError("params", "one SamplingParams, or one for each prompt", surplus)
        yield prompt, _params(each, usual)  # type: ignore[misc]
