"""Checkpoints that are quantised already: what they need to be loaded, and what they become."""

from __future__ import annotations

from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from ssd_ray.errors import UnsupportedModelError

PACKAGES = {
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel", "accelerate"),
    "compressed-tensors": ("compressed_tensors",),
    "fp8": ("accelerate",),
    "mxfp8": ("accelerate",),
    "mxfp4": ("accelerate",),
    "torchao": ("torchao",),
    "hqq": ("hqq",),
    "quanto": ("optimum.quanto", "accelerate"),
}
"""By the method of a checkpoint, the modules that load it."""

GPU_ONLY = frozenset({"hqq", "fbgemm_fp8"})


def checkpoint_format(config: PreTrainedConfig) -> str | None:
    """By which method a checkpoint is quantised; None if it is not. GGUF is none, since its numbers are widened."""
    method = _said(config).get("quant_method")
    return None if method is None or _word(method) == "gguf" else _word(method)


def refuse_format(config: PreTrainedConfig, role: str, device: torch.device) -> None:
    """Refuse a checkpoint that cannot be loaded here, naming the package or the device that lacks.

    Raises:
        UnsupportedModelError: see the message.
    """
    method = checkpoint_format(config)
    if method is None:
        return
    what = f"{role}: its checkpoint is quantised by {method}"
    missing = [name for name in PACKAGES.get(method, ()) if not _installed(name)]
    if missing:
        names = " ".join(name.replace("_", "-").replace(".", "-") for name in missing)
        raise UnsupportedModelError(f"{what}, which needs more packages: pip install {names}")
    if method in GPU_ONLY and device.type != "cuda":
        raise UnsupportedModelError(f"{what}, which is computed on a GPU alone, not on {device}")
    try:
        _quantizer(config, device)
    except Exception as error:  # what transformers raises where something lacks is of any class
        raise UnsupportedModelError(f"{what}, which cannot be loaded here: {error}") from error


def is_widened(config: PreTrainedConfig, device: torch.device) -> bool:
    """Whether the weights of a quantised checkpoint are brought to the model's dtype when it is loaded."""
    if checkpoint_format(config) is None:
        return False
    try:
        said = _quantizer(config, device).quantization_config
    except Exception:  # it cannot be loaded here, and is refused where it would be
        return False
    compressed = checkpoint_format(config) == "compressed-tensors" and not getattr(said, "run_compressed", False)
    return compressed or bool(getattr(said, "dequantize", False))


def _quantizer(config: PreTrainedConfig, device: torch.device) -> Any:
    """Transformers' own, which has looked whether it can work."""
    # It notes what it decides in what it is given.
    quantizer = AutoHfQuantizer.from_config(deepcopy(config.quantization_config), pre_quantized=True)
    quantizer.validate_environment(device_map={"": device}, dtype=config.dtype)
    return quantizer


def _said(config: PreTrainedConfig) -> dict[str, Any]:
    said = getattr(config, "quantization_config", None)
    said = said if said is None or isinstance(said, dict) else said.to_dict()
    return said or {}


def _word(method: Any) -> str:
    return str(getattr(method, "value", method))


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is a part of
        return False
