"""The weights of heads, and what they borrow of their targets, from the files in which these are published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import cached_file

from ssd_ray.errors import ModelError
from ssd_ray.models.checkpoint import LAYOUTS, checkpoint_folder, is_gguf, weight_files
from ssd_ray.models.eagle import EagleHead, make_head
from ssd_ray.models.heads import Head
from ssd_ray.models.mtp import MtpHead, make_mtp, mtp_config, prefixes
from ssd_ray.models.sources import find_source, read_config, silence

EMBEDDING, OUTPUT = "embed_tokens.weight", "lm_head.weight"


def load_head(source: str, head: Head, target: str | None, dtype: torch.dtype, trust_remote_code: bool) -> EagleHead:
    """Load a head; the embedding and the output layer that it lacks are its target's.

    Raises:
        ModelError: weights are missing, or have another shape.
    """
    files = _files(source)
    weights = {name: tensor for file in files for name, tensor in _read(file)}
    names = {name.removeprefix("model.") for name in weights}
    borrowed = _borrow(target, [name for name in (EMBEDDING, OUTPUT) if name not in names], trust_remote_code)
    return make_head(head, weights, borrowed, dtype)


def load_mtp(source: str, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> MtpHead:
    """Load the head in a target's checkpoint; ``config`` is the target's.

    Raises:
        ModelError: there is none, or it lacks weights.
    """
    begins = prefixes(config)
    found = [part for file in _files(source) for part in _read(file, lambda name: name.startswith(begins))]
    weights = {name[len(next(filter(name.startswith, begins))) :]: weight for name, weight in found}
    if not weights:
        raise no_mtp(source)
    borrowed = _borrow(source, [EMBEDDING, OUTPUT], trust_remote_code)
    weights.setdefault(EMBEDDING, borrowed[EMBEDDING])
    weights.setdefault("shared_head.head.weight", borrowed[OUTPUT])
    return make_mtp(mtp_config(config), weights, dtype)


def check_mtp(source: str, config: PreTrainedConfig) -> None:
    """Look whether there is a head in a target's checkpoint, as far as its files are here.

    Raises:
        ModelError: there is none.
    """
    if is_gguf(source):
        raise ModelError("draft: a .gguf file has no head for multi-token prediction")
    folder = checkpoint_folder(source)
    files = [file for file in weight_files(folder) if file.is_file()] if folder else []
    whole = folder is not None and files and len(files) == len(weight_files(folder))
    if whole and not any(name.startswith(prefixes(config)) for file in files for name in _names(file)):
        raise no_mtp(source)


def no_mtp(source: str) -> ModelError:
    """What is said of a checkpoint without a head."""
    return ModelError(f"draft: there is no head for multi-token prediction in {source}")


def _borrow(target: str | None, names: Sequence[str], trust_remote_code: bool) -> dict[str, Tensor]:
    """The target's embedding and output layer, as far as they are asked for."""
    if not names:
        return {}
    source = find_source(target, "target")
    if is_gguf(source):
        raise ModelError(f"draft: the head lacks {names[0]}, which cannot be read from a .gguf file")
    config = read_config(source, trust_remote_code)
    with torch.device("meta"), silence():
        outline = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    parts = {EMBEDDING: outline.get_input_embeddings(), OUTPUT: outline.get_output_embeddings()}
    found = {}
    for name in names:
        own = _name_of(outline, parts[name]), _name_of(outline, parts[EMBEDDING])  # the latter if they are one
        found[name] = _find(source, own if name == OUTPUT else own[:1])
    return found


def _name_of(outline: Any, part: Any) -> str:
    return next(f"{name}.weight" for name, module in outline.named_modules() if module is part)


def _find(source: str, names: Sequence[str]) -> Tensor:
    """The first of these weights that a checkpoint has; it may call what they are part of otherwise."""
    files = _files(source)
    for name in names:
        for wanted in (name, ".".join(name.split(".")[-2:])):
            found = [tensor for file in files for _, tensor in _read(file, partial(_ends, wanted))]
            if found:
                return found[0]
    raise ModelError(f"draft: the head needs {names[0]} of its target, which {source} does not have")


def _files(source: str) -> list[Path]:
    """The weight files of a folder, or of a hub id, fetched if need be."""
    if Path(source).is_dir():
        return weight_files(Path(source))
    for layout in LAYOUTS:
        file = cached_file(source, layout, _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        shards = weight_files(Path(file).parent) if Path(file).suffix == ".json" else [Path(file)]
        return [Path(cached_file(source, shard.name) or shard) for shard in shards]
    raise ModelError(f"draft: {source} has no weights")


def _ends(end: str, name: str) -> bool:
    return name.endswith(end)


def _names(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return [name for name, _ in _read(file)]
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _read(file: Path, wanted: Callable[[str], bool] = bool) -> list[tuple[str, Tensor]]:
    """The weights in a file whose names are wanted."""
    if file.suffix != ".safetensors":
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return [(name, weight) for name, weight in weights.items() if wanted(name)]
    with safe_open(file, framework="pt") as opened:
        names = [name for name in list(opened.keys()) if wanted(name)]
        return [(name, opened.get_tensor(name)) for name in names]
