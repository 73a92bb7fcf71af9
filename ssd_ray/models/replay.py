"""A forward as the list of its calls: traced twice, and replayed for any number of tokens without the model's Python.

For few tokens a model's Python takes as long as its arithmetic: modules, configurations, caches, and shapes that are
worked out anew in every layer. What remains of it are the calls of torch's functions that handed tensors on, in their
order and with their constants, so a replay gives the same bits. Functions of ours that look at what shapes do not tell
(where KV is written and read) are one call each, and run as ever: see :func:`opaque`. Numbers that differ between
traces of two lengths are multiples of the length, and are worked out in a replay.

Not every model can be replayed: one that looks at values to decide what to do next (routing to experts, say) is found
out, and so is one whose calls depend on what its inputs' shapes do not tell, or on the length in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, wrap_torch_function
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

F = TypeVar("F", bound=Callable[..., Any])

_LOOKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Operators from which values come back as numbers or as shapes."""

_READS = (torch.Tensor.tolist, torch.Tensor.numpy)
"""The same, without an operator."""


class CannotRecordError(Exception):
    """The function looks at values, or does something else with another length: another call may, too."""


class Call(NamedTuple):
    """One call of a trace."""

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any


class Trace(NamedTuple):
    """One run of a function."""

    inputs: Mapping[str, Tensor]
    calls: Sequence[Call]
    result: Tensor


def opaque(tensors: Callable[..., Sequence[Tensor]]) -> Callable[[F], F]:
    """Make a function one call in a recording, whatever it does. ``tensors`` picks some tensor of its arguments."""
    decorate: Callable[[F], F] = wrap_torch_function(tensors)  # type: ignore[assignment]

    def mark(function: F) -> F:
        decorated = decorate(function)
        _OPAQUE.add(decorated)
        return decorated

    return mark


_OPAQUE: set[Callable[..., Any]] = set()


def trace(function: Callable[..., Tensor], **inputs: Tensor) -> Trace:
    """Run a function of inputs by name, and note its calls.

    Raises:
        CannotRecordError: it looks at values.
    """
    with _Guard(), _Recorder() as recorder:  # type: ignore[no-untyped-call]
        result = function(**inputs)
    return Trace(inputs, recorder.calls, result)


def replay(one: Trace, other: Trace) -> Callable[..., Tensor]:
    """Make a function of the same inputs that repeats the calls of two traces, which differ in the last dimension of
    the first input, the length, and for any other length, too.

    Constants are what these were when it was traced: every number that is no multiple of the length, and whatever
    tensors did not come from the inputs.

    Raises:
        CannotRecordError: the traces differ in another way.
    """
    if len(one.calls) != len(other.calls):
        raise CannotRecordError("another length takes another number of calls")
    source = _Source(one, other)
    for pair in zip(one.calls, other.calls, strict=True):
        source.add(*pair)
    first, *_ = one.inputs
    head = f"def replay({', '.join(one.inputs)}):\n    n = {first}.shape[-1]"
    exec("\n    ".join([head, *source.finish(one.result, other.result)]), source.constants)
    made: Callable[..., Tensor] = source.constants["replay"]
    return made


class _Recorder(TorchFunctionMode):
    """Notes the calls that hand tensors on, or change some."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            raise CannotRecordError(f"it calls {func.__name__}")
        with _disable_current_modes() if func in _OPAQUE else nullcontext():
            result = func(*args, **kwargs)
        if _has_tensors(result) or (result is None and _has_tensors(args)):
            self.calls.append(Call(func, args, kwargs, result))
        return result


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operators that look at values."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _LOOKS.intersection(func.tags):
            raise CannotRecordError(f"it calls {func}")
        return func(*args, **kwargs or {})


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a call's arguments or result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))


def _has_tensors(value: Any) -> bool:
    return next(tensors(value), None) is not None


class _Source:
    """Python source of the calls that two traces have in common. Objects are told apart by identity, so all must be
    alive until it is done."""

    def __init__(self, one: Trace, other: Trace) -> None:
        self.constants: dict[str, Any] = {}
        self.lines: list[str] = []
        self._names: dict[int, str] = {}
        self._others: dict[int, str] = {}
        self._last_use: dict[str, int] = {}
        self._lengths = tuple(next(iter(each.inputs.values())).shape[-1] for each in (one, other))
        for name, value in one.inputs.items():
            self._bind(value, other.inputs[name], name)

    def add(self, call: Call, other: Call) -> None:
        function = self._expression(call.function, other.function)
        args = [self._expression(*pair) for pair in _pairs(call.args, other.args)]
        if call.kwargs.keys() != other.kwargs.keys():
            raise CannotRecordError("another length takes other arguments")
        args += [f"{name}={self._expression(each, other.kwargs[name])}" for name, each in call.kwargs.items()]
        variable = f"v{len(self.lines)}"
        self.lines.append(f"{variable} = {function}({', '.join(args)})")
        self._last_use[variable] = len(self.lines) - 1
        self._bind(call.result, other.result, variable)

    def finish(self, result: Tensor, other: Tensor) -> list[str]:
        """The lines of a function's body; what is not needed any more is dropped, as the model itself did."""
        body = [*self.lines, f"return {self._expression(result, other)}"]
        for variable, line in self._last_use.items():
            if line < len(self.lines):
                body[line] += f"; {variable} = None"
        return body

    def _bind(self, value: Any, other: Any, expression: str) -> None:
        """Call a value, and all tensors in it, by this expression from now on."""
        if isinstance(value, (list, tuple)):
            for index, pair in enumerate(_pairs(value, other)):
                self._bind(*pair, f"{expression}[{index}]")
        if _has_tensors(value):
            self._names[id(value)] = self._others[id(other)] = expression

    def _expression(self, value: Any, other: Any) -> str:
        known = self._names.get(id(value))
        if known != self._others.get(id(other)):
            raise CannotRecordError("another length takes other tensors")
        if known is not None:
            self._last_use[known.split("[")[0]] = len(self.lines)
            return known
        if type(value) is not type(other):
            raise CannotRecordError("another length takes other arguments")
        if type(value) is list:
            return f"[{self._several(value, other)}]"
        if type(value) in (tuple, torch.Size):
            return f"({self._several(value, other)})"
        if type(value) is dict:
            return f"dict([{self._several(list(value.items()), list(other.items()))}])"
        if type(value) is slice:
            ends = [(value.start, other.start), (value.stop, other.stop), (value.step, other.step)]
            return f"slice({', '.join(self._expression(*pair) for pair in ends)})"
        if type(value) is int and value != other:
            return self._multiple(value, other)
        return self._constant(value, other)

    def _several(self, values: Sequence[Any], others: Sequence[Any]) -> str:
        """Expressions with a comma behind each."""
        return "".join(f"{self._expression(*pair)}, " for pair in _pairs(values, others))

    def _multiple(self, value: int, other: int) -> str:
        length, other_length = self._lengths
        if value % length or other * length != value * other_length:
            raise CannotRecordError(f"{value} becomes {other} where {length} tokens become {other_length}")
        return f"{value // length} * n"

    def _constant(self, value: Any, other: Any) -> str:
        if value is not other and (isinstance(value, Tensor) or value != other):
            raise CannotRecordError(f"another length takes another {type(value).__name__}")
        if value is None or type(value) in (int, bool, str):
            return repr(value)
        name = f"c{id(value)}"
        self.constants[name] = value
        return name


def _pairs(values: Any, others: Any) -> Iterator[tuple[Any, Any]]:
    if type(values) is not type(others) or len(values) != len(others):
        raise CannotRecordError("another length takes other arguments")
    return zip(values, others, strict=True)
