"""A model that is held in half precision, run in float32.

Every operation gets its half-precision inputs widened, which changes no value, and so computes and returns float32.
Weights stay as they are: a copy of one lives as long as the operation that reads it, that of a linear layer in parts
that fit a processor's cache. So nothing is rounded to half precision, and it takes little memory and time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HALF = (torch.bfloat16, torch.float16)
WHOLE = (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)

PART = 1024
"""Rows of a linear layer's weight that are widened at a time. Measured on a CPU, widening a whole weight takes five
times as long as widening it in parts; 256 to 2,048 are alike."""


class InFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context bfloat16 and float16 are float32, for whatever a forward computes or makes.

    What is written in place keeps its dtype, and so do views: only what is computed is widened.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation of torch."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.embedding.default:  # few rows of a table that may be the largest weight of all
            return _widened(func(*args, **kwargs))
        if func is torch.ops.aten.linear.default:
            return _linear(*args, **kwargs)
        widen = _widened_dtype if func.is_view or func._schema.is_mutable else _widened
        return func(*_each(widen, args), **{name: _each(widen, value) for name, value in kwargs.items()})


def in_float32(model: torch.nn.Module) -> AbstractContextManager[Any]:
    """Where nothing of a model is in half precision there is nothing to widen, which would cost as much as to compute
    where the model is small."""
    held = list(chain(model.parameters(), model.buffers()))
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) and tensor.dtype in WHOLE for tensor in held)
    return nullcontext() if plain else InFloat32()  # type: ignore[no-untyped-call]


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if hasattr(weight, "dequantize") and type(weight) not in (Tensor, torch.nn.Parameter):  # of torchao
        weight = weight.dequantize()
    parts = [F.linear(_widened(inputs), _widened(part)) for part in weight.split(PART)]  # type: ignore[no-untyped-call]
    output = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    return output if bias is None else output + _widened(bias)


def _each(widen: Callable[[Any], Any], value: Any) -> Any:
    """An argument of an operation, or a list of them."""
    return [widen(each) for each in value] if isinstance(value, (list, tuple)) else widen(value)


def _widened(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return _widened_dtype(value)
    if value.dtype not in HALF:
        return value
    return (value.to_dense() if value.is_mkldnn else value).float()  # a packed weight has an order of its own


def _widened_dtype(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value
