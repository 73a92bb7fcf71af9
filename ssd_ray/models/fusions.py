"""Fewer calls for what a trace has: others that give the same bits, and none where nothing is done.

For few tokens starting a call takes longer than what it computes. What models have in common in their own words, norms
and rotations, takes seven calls where one or three do it. A change is taken only where it gives the very tensor that
was recorded; that a whole replay gives the model's bits is still found out when it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_ray.models.replay import Call, Trace, tensors

Rule = Callable[["_Flow", Call], "Sequence[Call] | None"]
"""A call that something ends with -> what is called in place of all of it, or None. The last of these has the call's
result."""

_MAY_DO_NOTHING = {Tensor.to, Tensor.float, Tensor.contiguous}
"""They give back the very tensor that they are given if it is as it is asked for."""

_TAKES_ANY_STRIDES = {Tensor.view, Tensor.mul, F.silu, F.gelu}


def fused(trace: Trace) -> Trace:
    """The trace with fewer calls."""
    calls = [each for each in trace.calls if not _does_nothing(each)]
    for rule in (_norm, _scaled_norm, _rotation, _no_copy):
        calls = _apply(rule, calls, trace.result)
    return Trace(trace.inputs, *_once(calls, trace.result))


def _does_nothing(call: Call) -> bool:
    return call.function in _MAY_DO_NOTHING and call.result is call.args[0]


class _Flow:
    """Where the tensors of a trace come from."""

    def __init__(self, calls: Sequence[Call], result: Tensor) -> None:
        self._makers = {id(call.result): call for call in calls}
        self._uses = Counter(id(each) for call in calls for each in tensors([call.args, call.kwargs]))
        self._uses[id(result)] += 1
        self.taken: list[Call] = []
        """What was found on the way to a rule's answer."""

    def made(self, value: Any, *functions: Callable[..., Any]) -> Call | None:
        """The call of one of these functions that made a value for one use alone."""
        maker = self._makers.get(id(value))
        if maker is None or maker.function not in functions or self._uses[id(value)] != 1:
            return None
        self.taken.append(maker)
        return maker

    def either(self, call: Call, *functions: Callable[..., Any]) -> tuple[Call, Any] | None:
        """The one of two arguments that one of these functions made, and the other one."""
        for index in (0, 1):
            if len(call.args) == 2 and (maker := self.made(call.args[index], *functions)):
                return maker, call.args[1 - index]
        return None


def _apply(rule: Rule, calls: Sequence[Call], result: Tensor) -> list[Call]:
    flow, changed = _Flow(calls, result), []
    gone: set[int] = set()
    for call in calls:
        flow.taken = []
        others = rule(flow, call)
        if others is None or not _same(others, call.result):
            changed.append([call])
        else:
            changed.append(list(others))
            gone.update(id(each.result) for each in flow.taken)
    kept = [call for some in changed for call in some]
    return [call for call in kept if id(call.result) not in gone]


def _same(calls: Sequence[Call], want: Tensor) -> bool:
    """Whether the last of these calls gives this tensor, to the bit; the ones before it have their results."""
    function, args, kwargs, _ = calls[-1]
    try:
        got = function(*args, **kwargs)
    except (RuntimeError, TypeError):
        return False
    return got.dtype == want.dtype and got.shape == want.shape and torch.equal(got, want)


def _norm(flow: _Flow, call: Call) -> Sequence[Call] | None:
    """``x * rsqrt(mean(x^2) + epsilon)``."""
    if call.function is not Tensor.mul or not (found := flow.either(call, torch.rsqrt)):
        return None
    root, states = found
    total = flow.made(root.args[0], Tensor.add)
    mean = total and flow.made(total.args[0], Tensor.mean)
    power = mean and flow.made(mean.args[0], Tensor.pow)
    if not (total and mean and power) or power.args[0] is not states or power.args[1:] != (2,):
        return None
    if mean.args[1:] != (-1,) or dict(mean.kwargs) != {"keepdim": True} or not isinstance(total.args[1], float):
        return None
    return [Call(F.rms_norm, (states, (states.shape[-1],), None, total.args[1]), {}, call.result)]


def _scaled_norm(flow: _Flow, call: Call) -> Sequence[Call] | None:
    """A norm by a weight."""
    if call.function is not Tensor.mul or not (found := flow.either(call, F.rms_norm)):
        return None
    norm, weight = found
    states, shape, own, epsilon = norm.args
    return None if own is not None else [Call(F.rms_norm, (states, shape, weight, epsilon), {}, call.result)]


def _rotation(flow: _Flow, call: Call) -> Sequence[Call] | None:
    """``x * cosine + turned(x) * sine`` where what is turned has its halves swapped, and the second one negated."""
    if call.function is not Tensor.add or len(call.args) != 2:
        return None
    straight, across = (flow.made(each, Tensor.mul) for each in call.args)
    joined = across and flow.made(across.args[0], torch.cat)
    if not (straight and across and joined) or dict(joined.kwargs) != {"dim": -1}:
        return None
    states, cosine = straight.args
    negated = flow.made(joined.args[0][0], Tensor.neg)
    halves = [negated and negated.args[0], joined.args[0][1]]
    parts = [flow.made(each, Tensor.__getitem__) for each in halves]
    half = states.shape[-1] // 2
    if not all(
        part and part.args[0] is states and _cut(part) == cut
        for part, cut in zip(parts, (slice(half, None), slice(None, half)), strict=True)
    ):
        return None
    before = Call(opposed, (across.args[1],), {}, opposed(across.args[1]))
    return [before, Call(rotated, (states, cosine, before.result), {}, call.result)]


def _cut(call: Call) -> slice | None:
    """What an index takes of the last dimension, if it is nothing else."""
    index = call.args[1]
    last = index[1] if type(index) is tuple and len(index) == 2 and type(index[0]) is EllipsisType else None
    return last if type(last) is slice else None


def opposed(sine: Tensor) -> Tensor:
    """Sines [.., D], the first half negated."""
    first, second = sine.chunk(2, -1)
    return torch.cat((-first, second), -1)


def rotated(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """States [.., D] turned by angles, halves of them against each other: cosines and opposed sines [.., D]."""
    return (states * cosine).add_(states.roll(states.shape[-1] // 2, -1).mul_(sine))


def _no_copy(flow: _Flow, call: Call) -> Sequence[Call] | None:
    """What takes a tensor with any strides need not have a contiguous copy."""
    if call.function not in _TAKES_ANY_STRIDES:
        return None
    copies = [flow.made(each, Tensor.contiguous) for each in call.args]
    if not any(copies):
        return None
    args = [copy.args[0] if copy else each for copy, each in zip(copies, call.args, strict=True)]
    return [call._replace(args=args)]


_ALWAYS_THE_SAME = {Tensor.unsqueeze, opposed}
"""They give equal results for the same arguments: a view, and something of what nobody writes to."""


def _once(calls: Sequence[Call], result: Tensor) -> tuple[list[Call], Tensor]:
    """What is the same, since it is made in the same way of the same tensor, is made once."""
    same: dict[int, Any] = {}
    made: dict[tuple[Any, ...], Any] = {}
    kept = []
    for call in calls:
        call = call._replace(args=_with(same, call.args), kwargs=_with(same, call.kwargs))
        if call.function in _ALWAYS_THE_SAME:
            key = call.function, id(call.args[0]), *call.args[1:]
            if key in made:
                same[id(call.result)] = made[key]
                continue
            made[key] = call.result
        kept.append(call)
    return kept, _with(same, result)


def _with(others: Mapping[int, Any], value: Any) -> Any:
    """A value with other tensors in it."""
    if not others:
        return value
    if isinstance(value, Tensor):
        return others.get(id(value), value)
    if type(value) in (list, tuple):
        return type(value)(_with(others, each) for each in value)
    if isinstance(value, Mapping):
        return {name: _with(others, each) for name, each in value.items()}
    return value
