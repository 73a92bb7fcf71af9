"""The files of a checkpoint, looked at without reading the weights: are they all there, whole, and of which model?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from ssd_ray.config import GGUF

LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where the weights are: in one file, or in those that an index names. The first that is there counts."""

TEXT_FILES = ("*.json", "*.model", "*.txt")
"""Configs, indices and tokenizers."""

POINTER = b"version https://git-lfs.github.com/spec/"
"""How the file begins that stands in a Git repository for one that is kept elsewhere."""

ZIP = b"PK\x03\x04"

GGUF_START = b"GGUF"

SAMPLES = 16
SAMPLE_BYTES = 1 << 16
"""Of each weight file, how many places go into a fingerprint, and how long each is."""


class CheckpointError(Exception):
    """Files are not what they should be. The loader, who knows which model they are of, makes a ModelError of it."""


def checkpoint_folder(source: str) -> Path | None:
    """Where the files of a folder or of a hub id are on this machine; None if they are not here. A file that is a whole
    model stands for itself."""
    if Path(source).is_dir() or is_gguf(source):
        return Path(source)
    known = cached_file(source, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    return Path(known).parent if known else None


def is_gguf(source: str | Path) -> bool:
    """Whether this is a file in which llama.cpp keeps a whole model."""
    return Path(source).suffix == GGUF and Path(source).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights, also those that only an index knows of."""
    if is_gguf(folder):
        return [folder]
    for file in (folder / name for name in LAYOUTS):
        if file.is_file():
            return _shards(file) if file.suffix == ".json" else [file]
    return []


def bytes_on_disk(folder: Path) -> int:
    """Bytes of the weight files that are there."""
    return sum(file.stat().st_size for file in weight_files(folder) if file.is_file())


def check_texts(folder: Path) -> None:
    """Refuse a config or tokenizer that is a Git LFS pointer.

    Raises:
        CheckpointError: naming the file.
    """
    _refuse_pointers(file for pattern in TEXT_FILES for file in sorted(folder.glob(pattern)))


def check_weights(folder: Path, *, complete: bool = True) -> None:
    """Refuse weight files that are no weights or not whole.

    Args:
        folder: of a checkpoint.
        complete: refuse, too, that files are missing; those of a hub id may still be fetched.

    Raises:
        CheckpointError: naming the file.
    """
    files = weight_files(folder)
    missing = [file.name for file in files if not file.is_file()]
    if complete and not files:
        raise CheckpointError(f"no weights in {folder}; expected one of {', '.join(LAYOUTS)}")
    if complete and missing:
        raise CheckpointError(f"{folder} lacks {few(missing)}, which its index names")
    for file in files:
        if file.is_file():
            _check_whole(file)


def fingerprint(folder: Path) -> tuple[str, str]:
    """Digests of a model's config and of its weights, by the index of these and a few places of each file; of weights
    that are not all there it is empty. Equal ones are the same model, on whichever machine."""
    config = "" if is_gguf(folder) else digest(folder / "config.json")
    files = weight_files(folder)
    if not files or not all(file.is_file() for file in files):
        return config, ""
    return config, sampled(*files)


def digest(file: Path) -> str:
    """That of a file's bytes."""
    return sha256(file.read_bytes()).hexdigest()


def sampled(*files: Path) -> str:
    """A digest of files' names and sizes, and of a few places of each."""
    weights = sha256()
    for file in files:
        weights.update(f"{file.name} {file.stat().st_size} ".encode())
        _sample(file, weights.update)
    return weights.hexdigest()


def same_model(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two fingerprints agree as far as both are known."""
    return all(left == right or not left or not right for left, right in zip(one, other, strict=True))


def few(names: Iterable[str], most: int = 4) -> str:
    """Some names in words: the first of them, and how many there are beside."""
    ordered = sorted(names)
    more = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {more} more" if more > 0 else "")


def _shards(index: Path) -> list[Path]:
    _refuse_pointers([index])
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is no index of weights") from None


def _refuse_pointers(files: Iterable[Path], what: str = "the file itself") -> None:
    for file in files:
        if file.is_file() and _begins_with(file, POINTER):
            raise CheckpointError(
                f"{file}: this is a Git LFS pointer, not {what}; `git lfs pull` fetches what it stands for"
            )


def _check_whole(file: Path) -> None:
    _refuse_pointers([file], "weights")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{file} is cut short or damaged: {error}") from None
    elif file.suffix == GGUF and not _begins_with(file, GGUF_START):
        raise CheckpointError(f"{file} is no GGUF file, or damaged: it does not begin as one")
    elif _begins_with(file, ZIP) and not is_zipfile(file):  # what lists the parts of an archive is at its end
        raise CheckpointError(f"{file} is cut short or damaged: its end is not there")


def _begins_with(file: Path, start: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(start)) == start


def _sample(file: Path, update: Callable[[bytes], None]) -> None:
    """Hand out a few places of a file, its beginning and its end among them."""
    size = file.stat().st_size
    last = max(0, size - SAMPLE_BYTES)
    with file.open("rb") as opened:
        for place in range(SAMPLES):
            opened.seek(last * place // (SAMPLES - 1))
            update(opened.read(SAMPLE_BYTES))
