"""A conversation as a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssd_ray.config import is_text
from ssd_ray.errors import RequestError, shown
from ssd_ray.prompts import Prompt

Message = Mapping[str, str]
"""Who speaks (``role``) and what (``content``)."""


def chat_prompt(tokenizer: Any, messages: Sequence[Message]) -> Prompt:
    """Write a conversation down so that the model goes on as the assistant.

    A tokenizer with a chat template says how, in tokens. Without one each message is a line ``role: content``, and the
    last line is ``assistant:``.

    Raises:
        RequestError: a message is no text that UTF-8 can write, or the template does not take these messages.
    """
    for text in (text for message in messages for text in message.values()):
        if not is_text(text):
            raise RequestError(f"messages: expected texts that UTF-8 can write, got {shown(text)}")
    if getattr(tokenizer, "chat_template", None) is None:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"
    try:
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except Exception as error:  # a template raises what its author liked
        raise RequestError(f"messages: the model's chat template does not take them: {error}") from error
    return [int(token) for token in encoded["input_ids"]]
