"""A forward as the list of its calls: recorded once for each shape of its inputs, replayed without the model's Python.

For few tokens a model's Python takes as long as its arithmetic: modules, configurations, caches, and shapes that are
worked out anew in every layer. What remains of it in a recording are the calls of torch's functions that handed tensors
on, in their order and with their constants, so a replay gives the same bits. Functions of ours that look at what shapes
do not tell (where KV is written and read) are recorded as one call each, and run as ever: see :func:`opaque`.

Not every model can be recorded: one that looks at values to decide what to do next (routing to experts, say) is found
out, and so is one whose calls depend on what its inputs' shapes do not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, wrap_torch_function
from torch.utils._python_dispatch import TorchDispatchMode

F = TypeVar("F", bound=Callable[..., Any])

_LOOKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Operators from which values come back as numbers or as shapes."""

_READS = (torch.Tensor.tolist, torch.Tensor.numpy)
"""The same, without an operator."""


class CannotRecordError(Exception):
    """The function looks at values: another call may do something else."""


class _Call(NamedTuple):
    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any


def opaque(tensors: Callable[..., Sequence[Tensor]]) -> Callable[[F], F]:
    """Make a function one call in a recording, whatever it does. ``tensors`` picks some tensor of its arguments."""
    decorate: Callable[[F], F] = wrap_torch_function(tensors)  # type: ignore[assignment]
    return decorate


def record(function: Callable[..., Tensor], **inputs: Any) -> Callable[..., Tensor]:
    """Run a function, and make one of the same inputs, by name, that repeats its calls.

    Constants are what these were when it ran: every number, also those that came from a shape of the inputs, and
    whatever tensors did not come from them.

    Raises:
        CannotRecordError: the function looks at values.
    """
    with _Guard(), _Recorder() as recorder:  # type: ignore[no-untyped-call]
        result = function(**inputs)
    return _compile(recorder.calls, inputs, result)


class _Recorder(TorchFunctionMode):
    """Notes the calls that hand tensors on, or change some."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            raise CannotRecordError(f"it calls {func.__name__}")
        result = func(*args, **kwargs)
        if any(_tensors(result)) or (result is None and any(_tensors(args))):
            self.calls.append(_Call(func, args, kwargs, result))
        return result


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operators that look at values."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _LOOKS.intersection(func.tags):
            raise CannotRecordError(f"it calls {func}")
        return func(*args, **kwargs or {})


def _tensors(value: Any) -> Iterator[bool]:
    """True for each tensor in it."""
    if isinstance(value, Tensor):
        yield True
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


class _Source:
    """Python source of the calls. Objects are told apart by identity, so all must be alive until it is done."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.constants: dict[str, Any] = {}
        self.lines: list[str] = []
        self._names: dict[int, str] = {}
        self._last_use: dict[str, int] = {}
        for name, value in inputs.items():
            self._bind(value, name)

    def add(self, call: _Call) -> None:
        function = self._constant(call.function)
        args = [self._expression(each) for each in call.args]
        args += [f"{name}={self._expression(each)}" for name, each in call.kwargs.items()]
        variable = f"v{len(self.lines)}"
        self.lines.append(f"{variable} = {function}({', '.join(args)})")
        self._last_use[variable] = len(self.lines) - 1
        self._bind(call.result, variable)

    def finish(self, result: Tensor) -> list[str]:
        """The lines of a function's body; what is not needed any more is dropped, as the model itself did."""
        body = [*self.lines, f"return {self._expression(result)}"]
        for variable, line in self._last_use.items():
            if line < len(self.lines):
                body[line] += f"; {variable} = None"
        return body

    def _bind(self, value: Any, expression: str) -> None:
        """Call a value, and all tensors in it, by this expression from now on."""
        if isinstance(value, (list, tuple)):
            for index, each in enumerate(value):
                self._bind(each, f"{expression}[{index}]")
        if any(_tensors(value)):
            self._names[id(value)] = expression

    def _expression(self, value: Any) -> str:
        known = self._names.get(id(value))
        if known is not None:
            self._last_use[known.split("[")[0]] = len(self.lines)
            return known
        if type(value) in (list, tuple) and any(_tensors(value)):
            return f"[{', '.join(map(self._expression, value))}]"
        if value is None or type(value) in (int, bool, str):
            return repr(value)
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        name = f"c{id(value)}"
        self.constants[name] = value
        return name


def _compile(calls: Sequence[_Call], inputs: Mapping[str, Any], result: Tensor) -> Callable[..., Tensor]:
    source = _Source(inputs)
    for call in calls:
        source.add(call)
    head = f"def replay({', '.join(inputs)}):"
    code = "\n    ".join([head, *source.finish(result)])
    exec(code, source.constants)
    replay: Callable[..., Tensor] = source.constants["replay"]
    return replay
