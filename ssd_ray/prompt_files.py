"""Many prompts from a file, results to a file: at constant memory, and so that an interrupted run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from ssd_ray.config import EngineConfig, SamplingParams, check_fields
from ssd_ray.errors import ConfigError

TEXT_FIELDS = ("target", "dtype", "max_model_len", "sampler")
"""What of the engine a text depends on. Whatever else is changed between two runs of one file changes their speed."""

JSON_SUFFIXES = (".jsonl", ".json")


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
    """Read a file as it is needed: a prompt a line. In a file named .jsonl or .json each line is a JSON string, or an
    object with a ``prompt`` and, if need be, sampling fields of its own; or the file is one JSON array of these, which
    is read at once.

    Raises:
        ConfigError: the file cannot be read, or a line is none of these.
    """
    is_json = path.suffix.lower() in JSON_SUFFIXES
    try:
        with path.open(encoding="utf-8-sig") as file:  # a byte order mark is no text
            entries = _json_entries(file) if is_json else _lines(file)
            for index, entry in enumerate(entries):
                yield Item(index, *_prompt_of(entry, params)) if is_json else Item(index, entry, params)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("prompt_file", "a text file in UTF-8", f"{path}: {error}") from None


def _lines(file: Iterable[str]) -> Iterator[str]:
    """The lines that have something on them."""
    return (text for line in file if (text := line.rstrip("\n")).strip())


def _json_entries(file: TextIO) -> Iterator[Any]:
    """What stands on the lines of a file, or in its one array."""
    lines = _lines(file)
    first = next(lines, None)
    if first is not None and first.lstrip().startswith("["):
        yield from _parsed("\n".join([first, *file]))
        return
    for line in chain([] if first is None else [first], lines):
        yield _parsed(line)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("prompt_file", f"JSON lines, or one JSON array ({error})", text) from None


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
        failed: how many of all results are errors.
        left: the prompts without a result.

    Raises:
        ConfigError: the file holds something else, or results of other prompts or parameters.
    """

    figures = False  # they differ from run to run

    def __init__(self, path: Path, items: Iterator[Item], config: EngineConfig) -> None:
        self._config = config
        self.done, self.failed, self.left = 0, 0, items
        try:
            if path.exists():
                os.truncate(path, self._read(path, items))
            self._file = path.open("ab")
        except OSError as error:
            raise ConfigError("output", "a file to read and write", f"{path}: {error}") from None

    def write(self, item: Item, result: dict[str, Any]) -> None:
        """Append a result. That of a prompt that could not be served begins with an ``error``."""
        self.failed += "error" in result
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
                self.failed += item is not None and line.startswith(self._head(item) + b', "error": ')
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


def _prompt_of(entry: Any, params: SamplingParams) -> tuple[str, SamplingParams]:
    """What an entry of a JSON file asks for."""
    values = dict(entry) if isinstance(entry, dict) else {"prompt": entry}
    prompt = values.pop("prompt", None)
    if not isinstance(prompt, str):
        raise ConfigError("prompt_file", "a string, or an object with a prompt, for each prompt", entry)
    check_fields(values, SamplingParams, "sampling")
    return prompt, replace(params, **values)
