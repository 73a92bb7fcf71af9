"""OpenAI's completions and chat completions as data: requests in, replies and errors out. No I/O.

Fields that :class:`~ssd_ray.config.SamplingParams` has are taken under its names, those that OpenAI does not have
included (``top_k``, ``min_p``, ``ignore_eos`` and others). Fields that change nothing here, such as ``user``, are
ignored. Fields that ask for what is not done here may have their neutral value; unknown ones are refused.
"""

from __future__ import annotations

import secrets
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Annotated, Any, ClassVar, NamedTuple, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Strict, create_model

from ssd_ray.chat import Template, chat_prompt
from ssd_ray.config import SamplingParams
from ssd_ray.errors import ConfigError, PromptTooLongError, QueueFullError, RequestError, RequestFailedError
from ssd_ray.prompts import Prompt
from ssd_ray.text import Spelling

Document = dict[str, Any]
"""A JSON object."""

IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
)

NEUTRAL: Document = {
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
"""What fields that are not done here may be, beside null."""

FINISH_REASONS = {"stop": "stop", "length": "length", "timeout": "length", "cancelled": "length"}
"""Ours in OpenAI's words: a text that was cut off ends with "length"."""

COMPLETION_TOKENS = 16
"""OpenAI's default of ``max_tokens`` for completions. A chat may go on to the end of the context."""


UNLIKELY = -9999.0
"""The log-probability of what is as good as impossible; JSON has no infinity."""


def _optional_sampling() -> Any:
    """Every field of the sampling, none of them required.

    Numbers and truth values are what they are in JSON, and not what they could be read as. The rest is looked at by
    the sampling itself.
    """
    hints = get_type_hints(SamplingParams)
    optional: Any = {each.name: (_strict(hints[each.name]), None) for each in fields(SamplingParams)}
    return create_model("Sampling", **optional)


def _strict(hint: Any) -> Any:
    kinds = set(get_args(hint) or (hint,)) - {type(None)}
    return Annotated[kinds.pop(), Strict()] | None if kinds <= {int, float, bool} else Any


Sampling: Any = _optional_sampling()


class Token(NamedTuple):
    """A token of a text, or a candidate for its place, as a reply has it.

    Attributes:
        id: its number.
        text: what it adds to the text; a candidate by its name.
        data: the bytes of UTF-8 that it writes, which may be a part of a character.
        logprob: in nats.
        top: the likeliest candidates for its place, best first.
    """

    id: int
    text: str
    data: bytes
    logprob: float
    top: Sequence[Token] = ()


Scored = Sequence[Token] | None
"""The tokens of a text, if their log-probabilities were asked for."""


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    include_usage: bool = False


class Request(Sampling):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="allow")

    kind: ClassVar[str]  # in ids
    whole: ClassVar[str]  # the type of a reply
    part: ClassVar[str]  # the type of a part of one

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: Any = None  # in a chat whether, in a completion how many; False is none

    @abstractmethod
    def prompts(self, tokenizer: Any) -> list[Prompt]:
        """What to go on from."""

    def params(self, max_length: int, sampling: SamplingParams) -> SamplingParams:
        """The sampling, which is the model's ``sampling`` where nothing else is said. Without a seed every request gets
        another one.

        Raises:
            ConfigError: a field is unknown, or has a value that it does not take.
        """
        _refuse_unknown(self.model_extra or {})
        given = {each.name: getattr(self, each.name) for each in fields(SamplingParams)} | self._renamed()
        defaults = {"seed": secrets.randbits(63), "max_tokens": self._default_tokens(max_length)}
        return replace(sampling, **defaults | {name: value for name, value in given.items() if value is not None})

    @abstractmethod
    def choice(self, text: str, tokens: Scored) -> Document:
        """A text as a reply has it."""

    @abstractmethod
    def delta(self, text: str | None, tokens: Scored) -> Document:
        """A piece of a text as a part has it; None is the empty piece that ends a text."""

    def opening(self) -> Document | None:
        """What a stream says before the first piece."""
        return None

    def _renamed(self) -> Document:
        """Fields of the sampling that have another name here."""
        return {}

    def _default_tokens(self, max_length: int) -> int:
        return COMPLETION_TOKENS


class CompletionRequest(Request):
    """``POST /v1/completions``."""

    kind = "cmpl"
    whole = part = "text_completion"

    prompt: str | list[int] | list[str] | list[list[int]]

    def prompts(self, tokenizer: Any) -> list[Prompt]:
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or all(isinstance(token, int) for token in prompt)
        return [prompt] if one else prompt

    def choice(self, text: str, tokens: Scored) -> Document:
        return {"text": text, "logprobs": None if tokens is None else _completion_logprobs(tokens)}

    def delta(self, text: str | None, tokens: Scored) -> Document:
        return self.choice(text or "", tokens)


class TextPart(BaseModel):
    """A part of a message's content; only text is read."""

    type: str = "text"
    text: str


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    role: str
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """With its content as one string."""
        parts = self.content
        return {"role": self.role, "content": parts if isinstance(parts, str) else "".join(part.text for part in parts)}


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    kind = "chatcmpl"
    whole = "chat.completion"
    part = "chat.completion.chunk"

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    chat_template_kwargs: Document | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def prompts(self, tokenizer: Any) -> list[Prompt]:
        messages = [message.plain() for message in self.messages]
        how = Template(self.chat_template_kwargs or {}, self.add_generation_prompt, self.continue_final_message)
        return [chat_prompt(tokenizer, messages, how)]

    def choice(self, text: str, tokens: Scored) -> Document:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": None if tokens is None else _chat_logprobs(tokens)}

    def delta(self, text: str | None, tokens: Scored) -> Document:
        content = {} if text is None else {"content": text}
        return {"delta": content, "logprobs": None if tokens is None else _chat_logprobs(tokens)}

    def opening(self) -> Document | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def _renamed(self) -> Document:
        tokens = {} if self.max_completion_tokens is None else {"max_tokens": self.max_completion_tokens}
        return tokens | {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}

    def _default_tokens(self, max_length: int) -> int:
        return max_length


class Reply:
    """The answer to one request, whole or in parts.

    Args:
        request: what was asked.
        model: the model's name.
        spelling: what tokens write.
        texts: texts of each prompt.
    """

    def __init__(self, request: Request, model: str, spelling: Spelling, texts: int = 1) -> None:
        self._request = request
        self._spelling = spelling
        self._texts = texts
        self._head = {"id": f"{request.kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        asked = request.stream_options is not None and request.stream_options.include_usage
        self._null_usage: Document = {"usage": None} if asked else {}

    def whole(self, outputs: Sequence[Any]) -> Document:
        """All texts at once."""
        choices = [
            self._choice(index, self._request.choice(output.text, _scored(output, self._spelling)), output)
            for index, output in enumerate(outputs)
        ]
        return self._head | {"object": self._request.whole, "choices": choices, "usage": self._usage(outputs)}

    def openings(self, count: int) -> list[Document]:
        """The parts that come before ``count`` texts."""
        opening = self._request.opening()
        return [] if opening is None else [self._part(self._choice(index, opening)) for index in range(count)]

    def piece(self, index: int, text: str) -> Document:
        """A part with a piece of a text."""
        return self._part(self._choice(index, self._request.delta(text, None)))

    def end(self, index: int, output: Any) -> Document:
        """The last part of a text; it has the log-probabilities of all of it."""
        return self._part(self._choice(index, self._request.delta(None, _scored(output, self._spelling)), output))

    def usage(self, outputs: Sequence[Any]) -> list[Document]:
        """The part that ends a stream, if it was asked for."""
        part = self._head | {"object": self._request.part, "choices": [], "usage": self._usage(outputs)}
        return [part] if self._null_usage else []

    def _part(self, choice: Document) -> Document:
        return self._head | {"object": self._request.part, "choices": [choice]} | self._null_usage

    def _choice(self, index: int, content: Document, output: Any = None) -> Document:
        return {"index": index, "finish_reason": output and FINISH_REASONS[output.finish_reason]} | content

    def _usage(self, outputs: Sequence[Any]) -> Document:
        prompts = [output.stats.sums for output in outputs[:: self._texts]]
        prompt = sum(sums.prompt_tokens for sums in prompts)
        # One that was preempted may have found KV twice, also of its own text.
        cached = sum(min(sums.cached_tokens, sums.prompt_tokens) for sums in prompts)
        completion = sum(len(output.token_ids) for output in outputs)
        return {
            "prompt_tokens": prompt,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


def model_card(name: str, created: int) -> Document:
    """An entry of the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "ssd-ray"}


class UnknownModelError(RequestError):
    """There is no such model here."""


def error_reply(error: Exception) -> tuple[int, Document]:
    """The status and the body that tell of an error."""
    status, kind, code = 500, "server_error", None
    if isinstance(error, RequestError | ConfigError) and not isinstance(error, RequestFailedError):
        status, kind = 400, "invalid_request_error"
    match error:
        case QueueFullError():
            status, kind, code = 429, "rate_limit_error", "rate_limit_exceeded"
        case UnknownModelError():
            status, code = 404, "model_not_found"
        case PromptTooLongError():
            code = "context_length_exceeded"
        case ConfigError():
            code = "invalid_value"
        case _:
            pass
    param = error.field if isinstance(error, ConfigError) else None
    return status, error_body(str(error), kind, param=param, code=code)


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> Document:
    """An error as JSON has it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _refuse_unknown(extra: Document) -> None:
    for name, value in extra.items():
        if name in NEUTRAL and value not in (None, NEUTRAL[name]):
            raise ConfigError(name, f"null or {NEUTRAL[name]!r}, since nothing else is supported", value)
        if name not in NEUTRAL and name not in IGNORED and value is not None:
            raise ConfigError(name, "no such field", value)


def _scored(output: Any, spelling: Spelling) -> Scored:
    """The tokens of a text with their log-probabilities; None if they were not asked for."""
    if output.logprobs is None:
        return None
    return [_token(entry, piece, spelling) for entry, piece in zip(output.logprobs, output.pieces, strict=True)]


def _token(entry: Any, piece: str, spelling: Spelling) -> Token:
    """A token of the text, which adds ``piece`` to it: there it is written so, and among its candidates, too."""

    def token(number: int, logprob: float) -> Token:
        text = piece if number == entry.token_id else spelling.name(number)
        return Token(number, text, spelling.data(number), max(logprob, UNLIKELY))

    top = [token(*pair) for pair in entry.top.items()]
    return token(entry.token_id, entry.logprob)._replace(top=top)


def _completion_logprobs(tokens: Sequence[Token]) -> Document:
    pieces = [token.text for token in tokens]
    return {
        "tokens": pieces,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_by_name(token) for token in tokens],
        "text_offset": list(accumulate(map(len, pieces[:-1]), initial=0)) if pieces else [],
    }


def _by_name(token: Token) -> dict[str, float]:
    """The candidates for a place, itself included, each under a name of its own; the token's is what it adds."""
    named: dict[str, float] = {}
    for each in [*token.top, *([] if token.id in {each.id for each in token.top} else [token])]:
        taken = each.text in named or (each.text == token.text and each.id != token.id)
        named[f"token_id:{each.id}" if taken else each.text] = each.logprob
    return named


def _chat_logprobs(tokens: Sequence[Token]) -> Document:
    def item(token: Token) -> Document:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}

    content = [item(token) | {"top_logprobs": [item(each) for each in token.top]} for token in tokens]
    return {"content": content, "refusal": None}
