"""Many prompts from a file, results to a file: at constant memory, and so that an interrupted run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError

TEXT_FIELDS = ("target", "dtype", "max_model_len", "sampler")
"""What of the engine a text depends on. Whatever else is changed between two runs of one file changes their speed."""


@dataclass(frozen=True, slots=True)
class Item:
    """A line of a file of prompts.

    Attributes:
        index: its number among the prompts of the file, from 0.
        prompt: the prompt.
        params: how to go on.
    """

    index: int
    prompt: str
    params: SamplingParams

    def key(self, config: EngineConfig) -> str:
        """A digest of all that the text depends on."""
        engine = {name: getattr(config, name) for name in TEXT_FIELDS}
        return sha256(json.dumps([engine, self.prompt, asdict(self.params)]).encode()).hexdigest()[:16]


def read_prompts(path: Path, params: SamplingParams) -> Iterator[Item]:
    """Read a file as it is needed: a prompt a line, or in a file named .jsonl a JSON string or an object a line, with
    a ``prompt`` and, if need be, sampling fields of its own.

    Raises:
        ConfigError: the file cannot be read, or a line is none of these.
    """
    read = _read_json_line if path.suffix == ".jsonl" else lambda line, params: (line, params)
    try:
        with path.open(encoding="utf-8") as file:
            lines = (line.rstrip("\n") for line in file)
            for index, line in enumerate(line for line in lines if line.strip()):
                yield Item(index, *read(line, params))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("prompt_file", "a text file", f"{path}: {error}") from None


def count_prompts(path: Path, params: SamplingParams) -> int | None:
    """How many prompts there are, each of them looked at; None if the file can be read only once.

    Raises:
        ConfigError: as :func:`read_prompts`.
    """
    return sum(1 for _ in read_prompts(path, params)) if path.is_file() or not path.exists() else None


class ResultFile:
    """Results, a JSON object a line, in the order of the prompts; each is there for good once it is written.

    A line names the digest of its prompt and parameters. What an interrupted run has left is checked against the
    prompts, half a last line is dropped, and the next result follows.

    Args:
        path: the file; it is made if need be.
        items: the prompts from the first one.
        config: the engine's configuration.

    Attributes:
        done: results that were there already.
        left: the prompts without a result.

    Raises:
        ConfigError: the file holds something else, or results of other prompts or parameters.
    """

    def __init__(self, path: Path, items: Iterator[Item], config: EngineConfig) -> None:
        self._config = config
        self.done, self.left = 0, items
        try:
            if path.exists():
                os.truncate(path, self._read(path, items))
            self._file = path.open("ab")
        except OSError as error:
            raise ConfigError("output", "a file to read and write", f"{path}: {error}") from None

    def write(self, item: Item, result: dict[str, Any]) -> None:
        """Append a result."""
        self._file.write(self._head(item) + b", " + json.dumps(result).encode()[1:] + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self, path: Path, items: Iterator[Item]) -> int:
        """Look at the results that are there; the number of bytes that whole lines take."""
        end = 0
        with path.open("rb") as lines:
            for line in lines:
                item = next(items, None)
                self._check(path, line, item)
                if item is not None and not line.endswith(b"\n"):
                    self.left = chain([item], items)
                    break
                self.done, end = self.done + 1, end + len(line)
        return end

    def _check(self, path: Path, line: bytes, item: Item | None) -> None:
        """Refuse a line, or the beginning of one, that is not this item's result."""
        head = b"" if item is None else self._head(item)
        if not head or not line.startswith(head if line.endswith(b"\n") else head[: len(line)]):
            expected = "no further line" if item is None else f"the result of prompt {item.index}, as it is now"
            raise ConfigError("output", f"results of the same prompts and parameters: {expected}", str(path))

    def _head(self, item: Item) -> bytes:
        """How the line of a result begins."""
        return json.dumps({"index": item.index, "key": item.key(self._config)})[:-1].encode()


def _read_json_line(line: str, params: SamplingParams) -> tuple[str, SamplingParams]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigError("prompt_file", f"JSON lines ({error})", line) from None
    values = dict(entry) if isinstance(entry, dict) else {"prompt": entry}
    prompt = values.pop("prompt", None)
    if not isinstance(prompt, str):
        raise ConfigError("prompt_file", "a string, or an object with a prompt, in each line", line)
    known = [field.name for field in fields(SamplingParams)]
    for name in values.keys() - set(known):
        raise ConfigError(name, "a field of the sampling: " + ", ".join(known), values[name])
    return prompt, replace(params, **values)
