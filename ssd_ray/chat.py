"""A conversation as a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssd_ray.config import is_text
from ssd_ray.errors import RequestError, shown
from ssd_ray.prompts import Prompt

OURS = {
    "conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors",
    "padding", "truncation", "max_length", "tokenizer_kwargs", "return_assistant_tokens_mask", "chat_template",
}  # fmt: skip
"""What a template's arguments cannot be called: it is said elsewhere, or is ours to say."""

Message = Mapping[str, str]
"""Who speaks (``role``) and what (``content``)."""


@dataclass(frozen=True, slots=True)
class Template:
    """How a chat template is filled in.

    Attributes:
        arguments: what it takes beside the messages, such as ``enable_thinking``.
        opens: it ends with the beginning of the assistant's message.
        goes_on: it ends with the last message, which the model goes on with.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    opens: bool = True
    goes_on: bool = False


def chat_prompt(tokenizer: Any, messages: Sequence[Message], template: Template = Template()) -> Prompt:
    """Write a conversation down so that the model goes on as the assistant.

    A tokenizer with a chat template says how, in tokens. Without one each message is a line ``role: content``, and the
    last line is ``assistant:``.

    Raises:
        RequestError: a message is no text that UTF-8 can write, or the template does not take these messages, or there
            is none for the arguments.
    """
    if template.goes_on and template.opens:
        raise RequestError("continue_final_message: expected add_generation_prompt=False beside it")
    for name in template.arguments:
        if name in OURS:
            raise RequestError(f"chat_template_kwargs: expected arguments of the template, got {name!r}")
    for text in (text for message in messages for text in message.values()):
        if not is_text(text):
            raise RequestError(f"messages: expected texts that UTF-8 can write, got {shown(text)}")
    if getattr(tokenizer, "chat_template", None) is None:
        return _as_lines(messages, template)
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=template.opens,
            continue_final_message=template.goes_on,
            return_dict=True,
            **template.arguments,
        )
    except Exception as error:  # a template raises what its author liked
        raise RequestError(f"messages: the model's chat template does not take them: {error}") from error
    return [int(token) for token in encoded["input_ids"]]


def _as_lines(messages: Sequence[Message], template: Template) -> str:
    if template.arguments:
        raise RequestError("chat_template_kwargs: the model has no chat template that would take them")
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n".join([*lines, *(["assistant:"] if template.opens else [] if template.goes_on else [""])])
