"""Where a model lies, and what its config says, with errors in our own words."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from ssd_ray.errors import ModelError, ResourceError, SsdRayError, UnsupportedModelError
from ssd_ray.models.checkpoint import (
    CheckpointError,
    bytes_on_disk,
    check_texts,
    check_weights,
    checkpoint_folder,
    is_gguf,
)
from ssd_ray.models.heads import Head, parse_head

Role = Literal["target", "draft"]

ASSETS = Path(__file__).parent.parent / "assets"


def find_source(path: str | None, role: Role) -> str:
    """A folder that exists, or a hub id."""
    if path is None:
        folder = ASSETS / role
        if not folder.is_dir():
            raise ModelError(f"{role}: the bundled model is not in this installation ({folder}); give a path")
        return str(folder)
    folder = Path(os.path.expanduser(path))
    if is_gguf(folder):
        if find_spec("gguf") is None:
            raise ResourceError(f"{role}: {folder} needs one more package: pip install 'ssd-ray[gguf]'")
        with in_our_words(role, path):
            check_weights(folder)
        return str(folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{role}: no config.json in {folder}")
        with in_our_words(role, path):
            check_texts(folder)
        return str(folder)
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"{role}: no folder at {path}")
    return path


def place(source: str) -> dict[str, Any]:
    """How transformers is told where a model is."""
    if is_gguf(source):
        folder, name = os.path.split(source)
        return {"pretrained_model_name_or_path": folder, "gguf_file": name, "local_files_only": True}
    return {"pretrained_model_name_or_path": source, "local_files_only": os.path.isdir(source)}


def check_source(source: str) -> None:
    folder = checkpoint_folder(source)
    if folder is not None:
        check_weights(folder, complete=os.path.exists(source) or hub.HF_HUB_OFFLINE)


def source_bytes(source: str) -> int:
    folder = checkpoint_folder(source)
    return bytes_on_disk(folder) if folder else 0


def checkpoint_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a checkpoint says it is in; float32 if it says nothing."""
    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))


def read_head(source: str) -> Head | None:
    """What there is to know of a head; None if the source is a whole model.

    Raises:
        UnsupportedModelError: it is a head of a kind that does not work.
    """
    if is_gguf(source):
        return None
    with silence():
        config, _ = PreTrainedConfig.get_config_dict(**place(source))
    return parse_head(config)


def read_config(source: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a model, or of a head's own layers."""
    if (head := read_head(source)) is not None:
        return head.config
    with silence():  # the hub's client reports each of its tries
        config = AutoConfig.from_pretrained(**place(source), trust_remote_code=trust_remote_code)
    if is_gguf(source):
        config.dtype = torch.bfloat16  # of its own it has none: numbers of a few bits, and scales
    return config


@contextmanager
def silence() -> Iterator[None]:
    """Let nobody else draw a progress bar or print a report on somebody's terminal: we say what there is to say."""
    shown = transformers_logging.is_progress_bar_enabled()
    libraries = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [library.level for library in libraries]
    transformers_logging.disable_progress_bar()
    for library in libraries:
        library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.setLevel(level)
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def in_our_words(role: Role, source: str) -> Iterator[None]:
    """Turn whatever a foreign library raises into our errors."""
    try:
        yield
    except SsdRayError:
        raise
    except CheckpointError as error:
        raise ModelError(f"{role}: cannot load {source}: {error}") from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(f"{role}: out of memory while loading {source}: {error}") from error
    except Exception as error:  # a broken file raises nearly anything
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{role}: {source} comes with Python code of its own, which only trust_remote_code=True runs"
            ) from error
        raise ModelError(f"{role}: cannot load {source}: {_reason(source, error)}") from error


def _reason(source: str, error: Exception) -> str:
    if isinstance(error, OSError) and not os.path.exists(source):  # what transformers says of it is a page long
        if isinstance(error.__cause__, GatedRepoError):
            return str(error).splitlines()[0]
        if checkpoint_folder(source) is None:
            return "it is no folder here, and no hub model that is on this machine or can be fetched"
    return f"{type(error).__name__}: {error}"
