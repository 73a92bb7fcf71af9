"""The asynchronous face of an engine, for servers: as :class:`~ssd_ray.LLM`, but nothing blocks the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Any, Self

from ssd_ray.config import EngineConfig, ModelPath, OnError, SamplingParams
from ssd_ray.engine import Engine, Generation, Params, Task
from ssd_ray.errors import EngineError, QueueFullError, RequestError, SsdRayError
from ssd_ray.outputs import RequestOutput, join
from ssd_ray.prompts import Prompt, Prompts
from ssd_ray.stats import EngineStats
from ssd_ray.wire import Output


class AsyncTextStream(Generation, AsyncIterator[str]):
    """The pieces of one text as they come; concatenated, they are ``output.text``.

    Leaving the iteration, by :meth:`aclose`, by forgetting it or because the reading task is cancelled, cancels the
    request.
    """

    def __init__(self, engine: Engine, task: Task) -> None:
        self._arrived: asyncio.Queue[Output | SsdRayError] = asyncio.Queue()
        super().__init__(engine, task, _to_loop(self._arrived.put_nowait))

    async def __anext__(self) -> str:
        while not self._over:
            if piece := self._take(await self._next()):
                return piece
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request unless it has ended, and read no further."""
        self._leave()

    async def wait(self) -> RequestOutput:
        """Read to the end and return the whole result."""
        async for _ in self:
            pass
        if self.output is None:
            raise EngineError("the stream was closed before its end")
        return self.output

    async def _next(self) -> Output | SsdRayError:
        try:
            return await self._arrived.get()
        except asyncio.CancelledError:
            self._leave()
            raise


class AsyncLLM:
    """An engine for programs with an event loop. ``async with AsyncLLM(...) as llm`` starts and stops it.

    Arguments, results and errors are those of :class:`~ssd_ray.LLM`; those of the configuration come at once, those of
    models and machine when it starts.
    """

    def __init__(self, target: ModelPath = None, draft: ModelPath = None, **options: Any) -> None:
        self.config = EngineConfig.from_kwargs(target=target, draft=draft, **options)
        self._started: Engine | None = None

    async def start(self) -> Self:
        """Start the engine, unless that was done."""
        if self._started is None:
            self._started = await asyncio.to_thread(Engine, self.config)
        return self

    @property
    def tokenizer(self) -> Any:
        """The target's tokenizer."""
        return self._engine.models.tokenizer

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and text together at most."""
        return self._engine.models.max_length

    @property
    def default_sampling_params(self) -> SamplingParams:
        """How a request is sampled that says nothing of it: as the target's generation config has it."""
        return self._engine.models.sampling

    async def generate(
        self, prompts: Prompts, params: Params = None, *, timeout: float | None = None
    ) -> list[RequestOutput]:
        """Generate a text for each prompt; see :meth:`LLM.generate`."""
        return [output async for output in self.outputs(prompts, params, timeout=timeout)]

    def outputs(
        self,
        prompts: Prompts,
        params: Params = None,
        *,
        timeout: float | None = None,
        on_error: OnError = "stop",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Each result as soon as it and those before it are ready; see :meth:`LLM.outputs`."""
        return self._in_order(self._engine.tasks(prompts, params, timeout, on_error))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, timeout: float | None = None
    ) -> AsyncTextStream:
        """The pieces of a text as they come; see :meth:`LLM.stream`. The request starts at once."""
        return AsyncTextStream(self._engine, self._engine.task(prompt, params, timeout))

    async def scale_drafts(self, count: int) -> None:
        """Change the number of draft actors; see :meth:`LLM.scale_drafts`."""
        await asyncio.to_thread(self._engine.driver.scale_drafts, count)

    async def stats(self) -> EngineStats:
        """Figures of all requests so far."""
        return await asyncio.to_thread(self._engine.stats)

    async def close(self) -> None:
        """Stop the actors and whatever else was started; requests under way raise EngineClosedError. Idempotent."""
        if self._started is not None:
            await asyncio.to_thread(self._started.close)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _engine(self) -> Engine:
        if self._started is None:
            raise EngineError("the engine has not been started: use `async with`, or await start()")
        return self._started

    async def _in_order(self, tasks: Iterable[Task]) -> AsyncGenerator[RequestOutput, None]:
        prompts: deque[tuple[Task, list[AsyncTextStream]]] = deque()  # each with its texts
        try:
            for task in tasks:
                while prompts and sum(len(texts) or 1 for _, texts in prompts) >= self._engine.window:
                    yield await self._result(*prompts[0])
                    prompts.popleft()
                prompts.append((task, [await self._start(text) for text in task.texts()]))
            while prompts:
                yield await self._result(*prompts[0])
                prompts.popleft()
        finally:
            for text in chain.from_iterable(texts for _, texts in prompts):
                await text.aclose()

    async def _result(self, task: Task, texts: list[AsyncTextStream]) -> RequestOutput:
        """The result of a prompt, once all its texts are there."""
        try:
            if task.refused is not None:
                raise task.refused
            return join([await text.wait() for text in texts])
        except RequestError as error:
            return task.result(error)

    async def _start(self, task: Task) -> AsyncTextStream:
        """Start a stream as soon as there is room for it."""
        while True:
            try:
                return AsyncTextStream(self._engine, task)
            except QueueFullError:
                room = asyncio.Event()
                self._engine.driver.when_room(_to_loop(room.set))
                await room.wait()


def _to_loop(call: Callable[..., None]) -> Callable[..., None]:
    """A function for other threads that makes the running loop call this one."""
    return partial(_hand_over, asyncio.get_running_loop(), call)


def _hand_over(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: Any) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody listens any more
        loop.call_soon_threadsafe(call, *args)
