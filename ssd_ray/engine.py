"""What :class:`~ssd_ray.LLM` and :class:`~ssd_ray.AsyncLLM` share: an engine that runs, and requests to it."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat, zip_longest

from ssd_ray.cluster.driver import Driver
from ssd_ray.cluster.preflight import check
from ssd_ray.config import EngineConfig, SamplingParams, check_timeout
from ssd_ray.errors import ConfigError, SsdRayError
from ssd_ray.outputs import Prompt, RequestOutput, Transcript
from ssd_ray.text import Characters, Detokenizer, spelling
from ssd_ray.wire import Output

Prompts = Prompt | Iterable[Prompt]
"""One prompt, or several, which may be made as they are needed."""

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
    """

    prompt: Prompt
    tokens: list[int]
    params: SamplingParams
    timeout: float | None

    def texts(self) -> list[Task]:
        """A task for each text that is asked for."""
        return [replace(self, params=params) for params in self.params.texts()]


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
            ConfigError: the timeout is none.
        """
        check_timeout(timeout)
        return Task(prompt, self.models.prompt(prompt), self.models.params(params or SamplingParams()), timeout)

    def tasks(self, prompts: Prompts, params: Params, timeout: float | None) -> Iterable[Task]:
        """Check many requests: prompts that are all there at once, others as they come.

        Raises:
            RequestError: a prompt cannot be served.
            ConfigError: prompts and parameters differ in number, or the timeout is none.
        """
        check_timeout(timeout)
        several = _several(prompts)
        tasks = (self.task(prompt, each, timeout) for prompt, each in _pairs(several, params))
        return list(tasks) if isinstance(several, Sequence) else tasks

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
        params = task.params
        if params.n > 1:
            raise ConfigError("n", "1 for a stream, which is one text", params.n)
        self._engine = engine
        self._transcript = _transcript(engine, task)
        self._number = engine.driver.submit(task.tokens, params, deliver, timeout=task.timeout)
        self._closed = False
        weakref.finalize(self, engine.driver.cancel, self._number).atexit = False

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
        """The text that an item adds; an error ends the iteration."""
        try:
            if isinstance(item, SsdRayError):
                raise item
            return self._transcript.push(item)
        except SsdRayError:
            self._closed = True
            raise


def _transcript(engine: Engine, task: Task) -> Transcript:
    params, tokenizer = task.params.ending_with(engine.models.end_tokens), engine.models.tokenizer
    detokenizer = Detokenizer(tokenizer, params, task.tokens)
    if params.logprobs is None:
        return Transcript(task.prompt, detokenizer)
    known = spelling(tokenizer, skip_special_tokens=params.skip_special_tokens)
    return Transcript(task.prompt, detokenizer, Characters(known, task.tokens))


def _several(prompts: Prompts) -> Iterable[Prompt]:
    """Prompts, also if it is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    tokens = isinstance(prompts, Sequence) and len(prompts) > 0 and all(isinstance(token, int) for token in prompts)
    return [prompts] if tokens else prompts  # type: ignore[list-item,return-value]


def _pairs(prompts: Iterable[Prompt], params: Params) -> Iterator[tuple[Prompt, SamplingParams]]:
    """Each prompt with its parameters."""
    if params is None or isinstance(params, SamplingParams):
        yield from zip(prompts, repeat(params or SamplingParams()))
        return
    for prompt, each in zip_longest(prompts, params):
        if prompt is None or each is None:
            surplus = "more parameters than prompts" if prompt is None else "fewer parameters than prompts"
            raise ConfigError("params", "one SamplingParams, or one for each prompt", surplus)
        yield prompt, each
