"""The HTTP face of an engine: OpenAI's paths over :class:`~ssd_ray.AsyncLLM`, as an ASGI application."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ssd_ray.async_llm import AsyncLLM, AsyncTextStream
from ssd_ray.cluster.openai import (
    ChatRequest,
    CompletionRequest,
    Document,
    Reply,
    Request,
    UnknownModelError,
    error_body,
    error_reply,
    model_card,
)
from ssd_ray.errors import SsdRayError
from ssd_ray.text import spelling


class Json(JSONResponse):
    """JSON in ASCII: what repeats words of a request may hold halves of characters, which UTF-8 has not."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def make_app(engine: Callable[[], AsyncLLM]) -> FastAPI:
    """An application that serves the engine; it is asked for when a request comes."""
    server = Server(engine)
    app = FastAPI(title="ssd-ray", docs_url=None, redoc_url=None)
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", server.model, methods=["GET"])
    app.add_api_route("/v1/completions", server.completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", server.chat_completions, methods=["POST"], response_model=None)
    for error in (SsdRayError, Exception):
        app.add_exception_handler(error, _tell)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_exception_handler(HTTPException, _tell_http)
    return app


class Server:
    """What the paths do."""

    def __init__(self, engine: Callable[[], AsyncLLM]) -> None:
        self._engine = engine
        self._created = int(time.time())

    @property
    def name(self) -> str:
        """The model's name: its folder or hub id."""
        return self._engine().config.target or "ssd-ray"

    async def health(self) -> Document:
        """The figures of the engine, as long as it works."""
        return {"status": "ok", "stats": (await self._engine().stats()).as_dict()}

    async def models(self) -> Document:
        """The one model."""
        return {"object": "list", "data": [model_card(self.name, self._created)]}

    async def model(self, name: str) -> Document:
        """The one model, if it is called so."""
        self._check_model(name)
        return model_card(name, self._created)

    async def completions(self, request: CompletionRequest) -> Response:
        """Go on from prompts."""
        return await self._answer(request)

    async def chat_completions(self, request: ChatRequest) -> Response:
        """Go on with a conversation."""
        return await self._answer(request)

    async def _answer(self, request: Request) -> Response:
        """Answer at once or in parts. Whoever is cancelled here, because the client has left, cancels its texts."""
        self._check_model(request.model)
        llm = self._engine()
        params = request.params(llm.max_model_len, llm.default_sampling_params)
        texts = params.texts()
        known = spelling(llm.tokenizer, skip_special_tokens=params.skip_special_tokens)
        reply = Reply(request, self.name, known, len(texts))
        async with AsyncExitStack() as stack:
            streams = []
            for prompt in request.prompts(llm.tokenizer):
                for text in texts:
                    streams.append(llm.stream(prompt, text))
                    stack.push_async_callback(streams[-1].aclose)
            if request.stream:
                events = _events(reply, streams, stack.pop_all())
                return StreamingResponse(events, media_type="text/event-stream")
            return Json(reply.whole([await stream.wait() for stream in streams]))

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise UnknownModelError(f"the model {name!r} does not exist; {self.name!r} does")


async def _events(reply: Reply, streams: Sequence[AsyncTextStream], stack: AsyncExitStack) -> AsyncGenerator[str, None]:
    """The parts of a reply as server-sent events."""
    async with stack:
        try:
            for part in reply.openings(len(streams)):
                yield _event(part)
            async for index, piece in _merge(streams):
                yield _event(reply.piece(index, piece) if piece else reply.end(index, streams[index].output))
            for part in reply.usage([stream.output for stream in streams]):
                yield _event(part)
        except Exception as error:  # the status has been sent
            yield _event(error_reply(error)[1])
        yield "data: [DONE]\n\n"


async def _merge(streams: Sequence[AsyncTextStream]) -> AsyncGenerator[tuple[int, str], None]:
    """The pieces of several texts as they come; an empty one ends a text."""
    arrived: asyncio.Queue[tuple[int, str] | Exception] = asyncio.Queue()
    readers = [asyncio.create_task(_read(index, stream, arrived)) for index, stream in enumerate(streams)]
    try:
        left = len(readers)
        while left:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            left -= not item[1]
            yield item
    finally:
        for reader in readers:
            reader.cancel()


async def _read(index: int, stream: AsyncTextStream, arrived: asyncio.Queue[tuple[int, str] | Exception]) -> None:
    try:
        async for piece in stream:
            arrived.put_nowait((index, piece))
        arrived.put_nowait((index, ""))
    except Exception as error:  # whatever it is, somebody waits
        arrived.put_nowait(error)


def _event(document: Document) -> str:
    return f"data: {json.dumps(document)}\n\n"


async def _tell(_: HttpRequest, error: Exception) -> Response:
    status, body = error_reply(error)
    return Json(body, status)


async def _tell_invalid(_: HttpRequest, error: RequestValidationError) -> Response:
    first: Any = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]) or None
    message = f"{place or 'body'}: {first['msg']}"
    return Json(error_body(message, "invalid_request_error", param=place, code="invalid_type"), 400)


async def _tell_http(_: HttpRequest, error: HTTPException) -> Response:
    return Json(error_body(str(error.detail), "invalid_request_error"), error.status_code)
