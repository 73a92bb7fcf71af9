"""What a caller may hand over as a prompt, or as several, brought into one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from ssd_ray.config import is_text
from ssd_ray.errors import RequestError, shown


class Array(Protocol):
    """An array of NumPy or PyTorch."""

    def tolist(self) -> Any: ...


Prompt = str | Sequence[int] | Array | Mapping[str, Any]
"""A text, or its token ids as a sequence or an array; or one of them in a dict, as vLLM has it:
``{"prompt": text}`` or ``{"prompt_token_ids": ids}``."""

Prompts = Prompt | Iterable[Prompt]
"""One prompt, or several, which may be made as they are needed; the rows of an array are several."""

EXPECTED = "a text, token ids, or a dict with 'prompt' or 'prompt_token_ids'"


def several(prompts: Prompts) -> Iterable[Prompt]:
    """Prompts, also if it is one prompt.

    Raises:
        RequestError: it is neither one prompt nor several.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    values: Any = _plain(prompts)
    if not isinstance(values, Iterable) or isinstance(values, bytes | bytearray):
        raise RequestError(f"prompts: expected {EXPECTED}, or several of them; got {shown(prompts)}")
    if not isinstance(values, Sequence):
        return values
    return [prompts] if len(values) and all(map(_is_token, values)) else values  # type: ignore[list-item]


def plain(prompt: Prompt) -> str | list[Any]:
    """A prompt as a text, or as what should be its token ids.

    Raises:
        RequestError: it is none.
    """
    value: Any = _inside(prompt) if isinstance(prompt, Mapping) else _plain(prompt)
    if isinstance(value, str):
        if not is_text(value):
            raise RequestError(f"prompt: expected a text that UTF-8 can write, got {shown(value)}")
        return str.__str__(value)
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray):
        raise RequestError(f"prompt: expected {EXPECTED}; got {shown(prompt)}")
    return [_plain(token) for token in value]


def _inside(prompt: Mapping[str, Any]) -> Any:
    """What a dict has; one that vLLM has filled in has the text beside its tokens."""
    given = {name: _plain(value) for name, value in prompt.items() if value is not None}
    if not given or given.keys() - {"prompt_token_ids", "prompt"}:
        raise RequestError(f"prompt: expected {EXPECTED}; got {shown(prompt)}")
    return given.get("prompt_token_ids", given.get("prompt"))


def _plain(value: Any) -> Any:
    """Arrays, and their elements, as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_token(value: Any) -> bool:
    return isinstance(_plain(value), int)
