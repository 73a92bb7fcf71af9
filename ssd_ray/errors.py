"""Every exception that leaves ssd_ray.

    SsdRayError
    ├── ConfigError            a field of a config or of SamplingParams has a value that it does not take
    ├── ModelError             a model cannot be loaded or cannot be used
    │   ├── UnsupportedModelError   its architecture cannot work here; the message names the reason
    │   └── VocabularyMismatchError the draft does not share the target's vocabulary
    ├── RequestError           one request cannot be served; the engine goes on
    │   ├── PromptTooLongError      prompt and max_tokens do not fit the context
    │   ├── RequestFailedError      something went wrong with it while it ran
    │   └── QueueFullError          as many requests as may wait or run are under way; try again later
    ├── ResourceError          the machine or the cluster lacks what the engine needs (memory, cores, GPUs)
    ├── EngineError            the engine failed while it ran
    │   └── EngineClosedError       it was used after close()
    ├── StoppedError           work was asked to end before it was done; what was done is kept
    └── ProtocolError          a frame is not a message of this protocol version

The command line maps ConfigError, ModelError, ResourceError and RequestError, RequestFailedError aside, to exit code 2,
the others to 1.
"""

from __future__ import annotations

import re
from typing import Literal

FrameFault = Literal["malformed", "version", "session"]
"""What is wrong with a frame: it has no messages of ours, or they are of another version or session."""

LONGEST_SHOWN = 200
"""Characters of a value that a message has at most."""


def shown(value: object) -> str:
    """A value as a message has it, also one that is long or cannot be written."""
    try:
        text = repr(value)
    except Exception:  # what a caller hands over may raise anything; so do integers of many digits
        text = f"some {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


class SsdRayError(Exception):
    """Base of all errors of this package."""


class ConfigError(SsdRayError):
    """A field has a value that it does not take.

    The message always reads ``field: what it takes, got value``.
    """

    def __init__(self, field: str, expected: str, value: object) -> None:
        super().__init__(f"{field}: expected {expected}, got {shown(value)}")
        self.field = field
        self.expected = expected
        self.value = value

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, str, object]]:
        return type(self), (self.field, self.expected, self.value)


class ModelError(SsdRayError):
    """A model cannot be loaded or used."""


class UnsupportedModelError(ModelError):
    """The architecture cannot work with slot-addressed KV; the message names the reason."""


class VocabularyMismatchError(ModelError):
    """Target and draft do not share one vocabulary."""


class RequestError(SsdRayError):
    """One request cannot be served."""


class PromptTooLongError(RequestError):
    """The prompt does not fit the context."""


class RequestFailedError(RequestError):
    """Something went wrong with the request while it ran; others did not notice."""


class QueueFullError(RequestError):
    """No more requests may wait: the engine is behind."""


class ResourceError(SsdRayError):
    """Memory, cores or GPUs are missing."""


class EngineError(SsdRayError):
    """The engine failed while it ran."""


class EngineClosedError(EngineError):
    """The engine was used after it was closed."""


class StoppedError(SsdRayError):
    """Work was asked to end before it was done; what was done is kept."""


class ProtocolError(SsdRayError):
    """A frame is not a message of this protocol; ``fault`` says in which way."""

    def __init__(self, message: str, fault: FrameFault = "malformed") -> None:
        super().__init__(message)
        self.fault: FrameFault = fault


def quoted_error(text: str) -> SsdRayError | None:
    """The last error of this package that is quoted in a text such as a traceback, if one is.

    It has its class and its words, and none of its attributes.
    """
    quotes = re.findall(rf"^\W*{re.escape(__name__)}\.(\w+Error): (.*(?:\n(?! |Traceback).+)*)", text, re.MULTILINE)
    if not quotes:
        return None
    name, words = quotes[-1]
    kind = globals().get(name, SsdRayError)
    error: SsdRayError = kind.__new__(kind)
    error.args = (words.strip(),)
    return error
