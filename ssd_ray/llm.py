"""What a Python user holds: a target and its pool of drafts, behind :meth:`LLM.generate` and :meth:`LLM.stream`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from queue import SimpleQueue
from threading import Event
from types import TracebackType
from typing import Any, Self

from ssd_ray.chat import Message, Template, chat_prompt
from ssd_ray.config import EngineConfig, ModelPath, OnError, SamplingParams
from ssd_ray.engine import Engine, Generation, Params, Task
from ssd_ray.errors import EngineError, QueueFullError, RequestError, SsdRayError
from ssd_ray.outputs import Completion, RequestOutput, join
from ssd_ray.progress import track
from ssd_ray.prompts import Prompt, Prompts
from ssd_ray.stats import EngineStats
from ssd_ray.wire import Output, TokenLogprobs

__all__ = ["LLM", "Completion", "EngineStats", "RequestOutput", "TextStream", "TokenLogprobs"]


class TextStream(Generation, Iterator[str]):
    """The pieces of one text as they come; concatenated, they are ``output.text``.

    One thread iterates. Leaving the iteration, by :meth:`close` or by forgetting it, cancels the request.
    """

    def __init__(self, engine: Engine, task: Task) -> None:
        self._arrived: SimpleQueue[Output | SsdRayError] = SimpleQueue()
        super().__init__(engine, task, self._arrived.put)

    def __next__(self) -> str:
        while not self._over:
            if piece := self._take(self._arrived.get()):
                return piece
        raise StopIteration

    def close(self) -> None:
        """Cancel the request unless it has ended, and read no further."""
        self._leave()

    def wait(self) -> RequestOutput:
        """Read to the end and return the whole result."""
        for _ in self:
            pass
        if self.output is None:
            raise EngineError("the stream was closed before its end")
        return self.output


class LLM:
    """An engine: one target actor and its draft actors, started here and stopped by :meth:`close`.

    ``LLM()`` takes the bundled pair of models. All methods may be called from any thread.

    Args:
        target, draft: folders or hub ids of models with one vocabulary; None is the bundled model. Without a draft that
            fits, the text itself is the draft; see :class:`~ssd_ray.config.EngineConfig`.
        options: the other fields of :class:`~ssd_ray.config.EngineConfig`.

    Raises:
        ConfigError: a field is unknown or has a value that it does not take.
        ModelError: a model is not there, cannot work here, or the two do not match.
        ResourceError: memory, cores or GPUs are missing.
        EngineError: something else kept the engine from starting.
    """

    def __init__(self, target: ModelPath = None, draft: ModelPath = None, **options: Any) -> None:
        self.config = EngineConfig.from_kwargs(target=target, draft=draft, **options)
        self._engine = Engine(self.config)

    def generate(
        self, prompts: Prompts, params: Params = None, *, timeout: float | None = None, progress: bool | None = None
    ) -> list[RequestOutput]:
        """Generate a text for each prompt, and wait for all.

        Args:
            prompts: one prompt or several, which may be made while earlier ones are served.
            params: for all prompts, or one for each.
            timeout: seconds that each text may take from when it is handed to the target. It ends then with the reason
                "timeout" and what has come so far.
            progress: show on standard error how far it is; None does so if that is a terminal.

        Raises:
            RequestError: a prompt cannot be served; of prompts that were all there, nothing has been started then.
            EngineError: the engine failed or was closed.
        """
        tasks = self._engine.tasks(prompts, params, timeout)
        total = len(tasks) if isinstance(tasks, list) else None
        return list(track(self._in_order(tasks), total=total, show=progress))

    def outputs(
        self,
        prompts: Prompts,
        params: Params = None,
        *,
        timeout: float | None = None,
        on_error: OnError = "stop",
    ) -> Iterator[RequestOutput]:
        """As :meth:`generate`, but hand out each result as soon as it and those before it are ready.

        Prompts are taken as they are needed, a few times ``max_num_seqs`` ahead, so there may be any number of them.
        With ``on_error="continue"`` a prompt that cannot be served is a result whose ``error`` says why, and the others
        go on.
        """
        return self._in_order(self._engine.tasks(prompts, params, timeout, on_error))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        timeout: float | None = None,
        progress: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Go on with a conversation, or with several, as the model's chat template writes them; see :meth:`generate`.

        Args:
            messages: dicts with a ``role`` and a ``content``, or one list of them for each conversation.
            add_generation_prompt: begin the assistant's message.
            continue_final_message: go on with the last message instead.
            chat_template_kwargs: what the template takes beside, such as ``enable_thinking``.

        Raises:
            RequestError: the template does not take the messages, and as :meth:`generate`.
        """
        template = Template(chat_template_kwargs or {}, add_generation_prompt, continue_final_message)
        one = all(isinstance(message, Mapping) for message in messages)
        conversations: Any = [messages] if one else messages
        tokenizer = self._engine.models.tokenizer
        prompts = [chat_prompt(tokenizer, conversation, template) for conversation in conversations]
        return self.generate(prompts, params, timeout=timeout, progress=progress)

    @property
    def default_sampling_params(self) -> SamplingParams:
        """How a request is sampled that says nothing of it: as the target's generation config has it."""
        return self._engine.models.sampling

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, timeout: float | None = None
    ) -> TextStream:
        """Generate a text and hand out its pieces as they come.

        Raises:
            QueueFullError: ``max_queue`` requests are under way.
            ConfigError: ``params`` asks for several texts; :meth:`SamplingParams.texts` parts them.
            RequestError: the prompt cannot be served.
            EngineError: the engine failed or was closed.
        """
        return TextStream(self._engine, self._engine.task(prompt, params, timeout))

    def scale_drafts(self, count: int) -> None:
        """Change the number of draft actors, at any time; 0 decodes without speculation.

        New drafts load while requests run; the call returns when they are ready.

        Raises:
            ConfigError: ``count`` is out of range, or the method has no draft actors.
            ResourceError: there is no room for so many. The pool is as it was.
        """
        self._engine.driver.scale_drafts(count)

    def processor_seconds(self) -> float:
        """Processor seconds that target and drafts have used so far, loading included."""
        return self._engine.driver.processor_seconds()

    def stats(self) -> EngineStats:
        """Figures of all requests so far."""
        return self._engine.stats()

    def close(self) -> None:
        """Stop the actors and whatever else was started; requests under way raise EngineClosedError. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _in_order(self, tasks: Iterable[Task]) -> Iterator[RequestOutput]:
        prompts: deque[tuple[Task, list[TextStream]]] = deque()  # each with its texts
        try:
            for task in tasks:
                while prompts and sum(len(texts) or 1 for _, texts in prompts) >= self._engine.window:
                    yield self._result(*prompts[0])
                    prompts.popleft()
                prompts.append((task, [self._start(text) for text in task.texts()]))
            while prompts:
                yield self._result(*prompts[0])
                prompts.popleft()
        finally:
            for text in chain.from_iterable(texts for _, texts in prompts):
                text.close()

    def _result(self, task: Task, texts: list[TextStream]) -> RequestOutput:
        """The result of a prompt, once all its texts are there."""
        try:
            if task.refused is not None:
                raise task.refused
            return join([text.wait() for text in texts])
        except RequestError as error:
            return task.result(error)

    def _start(self, task: Task) -> TextStream:
        """Start a stream as soon as there is room for it."""
        while True:
            try:
                return TextStream(self._engine, task)
            except QueueFullError:
                room = Event()
                self._engine.driver.when_room(room.set)
                room.wait()
