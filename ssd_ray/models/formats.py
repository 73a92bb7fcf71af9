"""Checkpoints that are quantised already: what they need to be loaded, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from ssd_ray.errors import UnsupportedModelError
from ssd_ray.models.packing import is_quantised

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

COMPANY = 3e-3
"""Relative error by which a product may change for what is beside it: kernels for other shapes stay below 2e-3, int8
activations with a common scale, or with outliers taken out together, exceed 5e-3."""

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


@torch.inference_mode()
def refuse_company(model: nn.Module, role: str) -> None:
    """Refuse layers of a quantised checkpoint that round a token by what is beside it.

    Raises:
        UnsupportedModelError: some do, so a text would depend on its neighbours.
    """
    random = torch.Generator().manual_seed(0)
    seen: set[tuple[type, int]] = set()
    like = next(each for each in model.parameters() if each.is_floating_point())
    for layer in model.modules():
        if not is_quantised(layer):
            continue
        inputs, name = int(layer.in_features), type(layer).__name__  # type: ignore[arg-type]
        if (type(layer), inputs) in seen:
            continue
        seen.add((type(layer), inputs))
        rows = torch.randn(2, inputs, generator=random).to(like.device, like.dtype)
        rows[1] *= 30
        alone, beside = layer(rows[:1]).float(), layer(rows)[:1].float()
        if not (alone - beside).norm() <= COMPANY * alone.norm():
            hint = "; llm_int8_threshold: 0 in its config.json keeps them apart" if name == "Linear8bitLt" else ""
            raise UnsupportedModelError(
                f"{role}: its layers, {name}, round a token by what is beside it, so a text would depend on its "
                f"neighbours{hint}"
            )


@contextmanager
def weights_alone(model: nn.Module) -> Iterator[None]:
    """While this lasts, layers that quantise their inputs multiply them as they are with what their weights stand for.
    Last bits of float32 are large where they are rounded to integers, and what is compared then differs."""
    layers = [layer for layer in model.modules() if type(layer).__name__ in _WEIGHTS]
    forwards = [layer.forward for layer in layers]
    for layer in layers:
        layer.forward = partial(_multiplied, layer)
    try:
        with torch._C.DisableTorchFunctionSubclass():  # where torchao's weights choose what a product is
            yield
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward


def _multiplied(layer: Any, inputs: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(inputs.float(), _WEIGHTS[type(layer).__name__](layer), bias)


def _of_bitsandbytes(layer: Any) -> Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight: Tensor = dequantize_bnb_weight(layer.weight, state=layer.state)
    return weight.float()


def _of_blocks(layer: Any) -> Tensor:
    """One scale for each block of rows and columns."""
    weight, scales = layer.weight.float(), layer.weight_scale_inv.float()
    for dim in range(scales.dim()):
        block = -(-weight.shape[dim] // scales.shape[dim])
        scales = scales.repeat_interleave(block, dim).narrow(dim, 0, weight.shape[dim])
    return weight * scales  # type: ignore[no-any-return]


_WEIGHTS: dict[str, Callable[[Any], Tensor]] = {"Linear8bitLt": _of_bitsandbytes, "FP8Linear": _of_blocks}


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
