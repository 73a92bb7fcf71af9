"""A device that is none: tensors of this processor that keep to themselves as those of a GPU do.

What a GPU refuses is refused: to compute with tensors of two devices, and to be read as a NumPy array. What is made on
"cuda" is made there. So code that mixes devices fails on any machine; what a GPU computes otherwise does not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ssd_ray.models.contract import ModelRunner, Wrapper

CUDA = torch.device("cuda", 0)


class There(Tensor):
    """A tensor on the device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class Elsewhere(TorchFunctionMode):
    """While it is entered, "cuda" can be asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class RunnerThere(Wrapper):
    """A runner whose logits lie on the device."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        self.device = CUDA

    def extend(self, *args: Any) -> Tensor:
        return there(super().extend(*args))

    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        return [there(logits) for logits in super().append(rows, tokens, starts)]


def there(tensor: Tensor) -> Tensor:
    """The tensor, on the device."""
    return tensor.as_subclass(There)


def here(tensor: Tensor) -> Tensor:
    """The tensor, on the processor."""
    return tensor.as_subclass(Tensor)


READS_INDICES = {Tensor.__getitem__, Tensor.__setitem__}
"""What takes indices of either device."""

CROSSES = {Tensor.copy_}


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    on_device = any(isinstance(each, There) for each in tensors)
    with torch._C.DisableTorchFunction():
        if func == Tensor.device.__get__:
            return CUDA if on_device else func(*args)
        if func == Tensor.is_cuda.__get__:
            return on_device
        if func is Tensor.cpu:
            return here(args[0])
        if func is Tensor.numpy and on_device:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.to and (device := _device(args[1:], kwargs)) is not None:
            rest = [each for each in args[1:] if not isinstance(each, torch.device | str | Tensor)]
            moved = here(args[0]).to(*rest) if rest else here(args[0])
            return there(moved) if device.type == "cuda" else moved
        _check(func, args, tensors)
        if (device := kwargs.get("device")) is not None:
            on_device = torch.device(device).type == "cuda"
            kwargs = kwargs | {"device": "cpu"}
        result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
        return tree_map(lambda each: there(each) if isinstance(each, Tensor) else each, result) if on_device else result


def _device(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.device | None:
    for each in (*args, *kwargs.values()):
        if isinstance(each, torch.device | str):
            return torch.device(each)
        if isinstance(each, Tensor):
            return CUDA if isinstance(each, There) else torch.device("cpu")
    return None


def _check(func: Any, args: Any, tensors: Sequence[Tensor]) -> None:
    """A number of the processor may go with tensors of the device."""
    if func in READS_INDICES:
        tensors = [args[0], *(each for each in args[2:] if isinstance(each, Tensor))]
    kinds = {isinstance(each, There) for each in tensors if each.dim() > 0}
    if len(kinds) > 1 and func not in CROSSES:
        raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device, but found cuda:0 and cpu")


def _here(value: Any) -> Any:
    return here(value) if isinstance(value, Tensor) else value
