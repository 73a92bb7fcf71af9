"""PEFT adapters: checked against the model that they are for, by outlines alone, and merged into its weights."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ssd_ray.errors import ConfigError, ModelError, SsdRayError, UnsupportedModelError
from ssd_ray.models.checkpoint import digest, few, sampled
from ssd_ray.models.sources import silence

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

OTHERS = ("chat_template.jinja", "tokenizer_config.json", "generation_config.json")
"""What may lie beside an adapter and is the target's own all the same."""


def adapter_folder(adapter: str) -> Path:
    """Where an adapter's files are on this machine; those of a hub id may be fetched.

    Raises:
        ConfigError: the package that merges adapters is not installed.
        ModelError: there is none.
    """
    if find_spec("peft") is None:
        raise ConfigError("adapter", "None without peft (pip install 'ssd-ray[adapter]')", adapter)
    folder = Path(os.path.expanduser(adapter))
    if folder.is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise ModelError(f"adapter: no {name} in {folder}")
        return folder
    if folder.exists() or adapter.startswith((".", "/", "~")) or adapter.count("/") > 1:
        raise ModelError(f"adapter: no folder at {adapter}")
    with silence():
        files = [_from_hub(adapter, name) for name in (CONFIG, WEIGHTS)]
    return Path(files[0]).parent


def _from_hub(adapter: str, name: str) -> str:
    try:
        return str(cached_file(adapter, name))
    except OSError as error:
        raise ModelError(
            f"adapter: no {name} of {adapter}, which is no folder here, and no hub model that is on this machine or "
            "can be fetched"
        ) from error


def adapter_fingerprint(folder: Path) -> tuple[str, str]:
    """Digests of an adapter's config and of its weights, as of a model's."""
    return digest(folder / CONFIG), sampled(folder / WEIGHTS)


def check_adapter(folder: Path, outline: PreTrainedModel) -> None:
    """Look whether an adapter's weights are those that a model takes, by names and shapes.

    Raises:
        ModelError: weights are missing, or of another shape, or for layers that the model does not have.
        UnsupportedModelError: it is of a kind that cannot be merged.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    config = _read(folder, lambda: PeftConfig.from_pretrained(str(folder)))
    said = f"{folder} (for {config.base_model_name_or_path})"
    try:
        with torch.device("meta"), _quiet():
            adapted = get_peft_model(outline, config)
    except (ValueError, KeyError) as error:  # no layer of the model has a name that it asks for
        raise ModelError(f"adapter: {said} does not fit the target: {error}") from error
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise UnsupportedModelError(f"adapter: {said} is {config.peft_type.value}, which cannot be merged into weights")
    wanted = {name: tuple(weight.shape) for name, weight in get_peft_model_state_dict(adapted).items()}
    _compare(said, wanted, _read(folder, lambda: _shapes(folder / WEIGHTS)))
    if beside := [name for name in OTHERS if (folder / name).is_file()]:
        logger.info("adapter: %s of %s are not read: the target's own serve", ", ".join(beside), folder)


def _compare(said: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    if surplus := found.keys() - wanted.keys():
        raise ModelError(f"adapter: {said} has weights for what the target does not have: {few(surplus)}")
    if missing := wanted.keys() - found.keys():
        raise ModelError(f"adapter: {said} lacks weights that its config names: {few(missing)}")
    other = few(f"{name} {found[name]}, not {shape}" for name, shape in wanted.items() if found[name] != shape)
    if other:
        raise ModelError(f"adapter: {said} is for a model of other shapes than the target: {other}")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def _read(folder: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except SsdRayError:
        raise
    except Exception as error:  # a broken file raises nearly anything
        raise ModelError(f"adapter: cannot read {folder}: {type(error).__name__}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither progress nor what peft is warned of that it uses in transformers."""
    with silence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with an adapter's changes in its weights, in place."""
    from peft import PeftModel

    with _quiet():
        merged: PreTrainedModel = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return merged
