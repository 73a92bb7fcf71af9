"""Fewer calls with the same bits: what is recorded of a function, changed, gives what the function gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_ray.models.fusions import fused, opposed, rotated
from ssd_ray.models.graphs import TRACED_AT
from ssd_ray.models.replay import Trace, replay, trace
from ssd_ray.models.runner import HFRunner
from tests.support.tiny import tiny_model

HEADS, DIM = 3, 8
WEIGHT, LATER = torch.randn(2, HEADS * DIM, generator=torch.Generator().manual_seed(0))
ANGLES = torch.randn(64, DIM // 2, generator=torch.Generator().manual_seed(1)).repeat(1, 2)


def inputs(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """States [heads * dim, n], whose last dimension is the length."""
    return torch.randn(HEADS * DIM, length, generator=torch.Generator().manual_seed(length)).to(dtype)


def norm(x: Tensor) -> Tensor:
    states = x.mT.float()
    states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)
    return WEIGHT * states.to(x.dtype) + 1.0


def turned(x: Tensor) -> Tensor:
    return torch.cat((-x[..., DIM // 2 :], x[..., : DIM // 2]), dim=-1)


def rotations(x: Tensor) -> Tensor:
    """Two of them share their angles, as a query and a key do."""
    angles = ANGLES[: x.shape[-1]].to(x.dtype)
    cosine, sine = angles.cos(), angles.sin()
    heads = x.mT.view(-1, HEADS, DIM).transpose(0, 1)
    query = (heads * cosine.unsqueeze(0)) + (turned(heads) * sine.unsqueeze(0))
    key = (query * cosine.unsqueeze(0)) + (turned(query) * sine.unsqueeze(0))
    return query + key


def copies(x: Tensor) -> Tensor:
    gate, up = (x.mT.narrow(-1, start, 8).contiguous() for start in (0, 8))
    heads = x.mT.narrow(-1, 16, 8).contiguous().view(-1, 2, 4)
    return (F.silu(gate) * up).view(-1, 2, 4) + heads


def changed(function: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> tuple[list[Trace], list[Trace]]:
    traces = [trace(function, x=inputs(length, dtype)) for length in (5, 8)]
    return traces, [fused(each) for each in traces]


def names(one: Trace) -> list[str]:
    return [getattr(call.function, "__name__", "") for call in one.calls]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [norm, rotations, copies])
def test_fewer_calls_give_the_same_bits(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    traces, fewer = changed(function, dtype)
    assert len(fewer[0].calls) < len(traces[0].calls)
    replayed = replay(*fewer)
    for length in (1, 2, 5, 9):
        x = inputs(length, dtype)
        assert torch.equal(replayed(x), function(x=x))


def test_what_is_left_of_each() -> None:
    _, (one, _) = changed(norm)
    assert [call.function for call in one.calls][-2:] == [F.rms_norm, Tensor.add]
    assert one.calls[-2].args[2] is WEIGHT
    _, (one, _) = changed(rotations)
    assert [call.function for call in one.calls].count(rotated) == 2
    assert [call.function for call in one.calls].count(opposed) == 1
    assert "cat" not in names(one)
    assert "contiguous" not in names(changed(copies)[1][0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mT * torch.rsqrt((x.mT + 1.0).pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda x: x.mT * torch.rsqrt(x.mT.pow(2).mean(-2, keepdim=True) + 1e-6),
        lambda x: (lambda root: x.mT * root + root)(torch.rsqrt(x.mT.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda x: x.mT[..., :8] * ANGLES[0] + torch.cat((x.mT[..., 4:8], x.mT[..., :4]), dim=-1) * ANGLES[1],
        lambda x: x.mT[..., :8] * ANGLES[0] + turned(x.mT[..., 8:16]) * ANGLES[1],
        lambda x: (lambda some: some.view(-1, 2, 4).mT.contiguous().view(-1, 8))(x.mT[..., :8].contiguous()),
        lambda x: x.mT.contiguous() @ x,
    ],
    ids=["another root", "another dimension", "root used twice", "not negated", "others turned", "no view", "product"],
)
def test_what_is_something_else_stays(function: Callable[..., Tensor]) -> None:
    _, (one, other) = changed(function)
    assert not {F.rms_norm, rotated}.intersection(call.function for call in one.calls)
    x = inputs(7)
    assert torch.equal(replay(one, other)(x), function(x=x))


def test_a_change_of_bits_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = F.rms_norm
    monkeypatch.setattr("ssd_ray.models.fusions.F.rms_norm", lambda *args: real(*args) * (1.0 + 1e-6))
    traces, fewer = changed(norm)
    assert names(fewer[0]) == [each for each in names(traces[0]) if each not in ("to", "float")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_models_are_run_with_fewer_calls(architecture: str, dtype: torch.dtype) -> None:
    runner = HFRunner(tiny_model(architecture).to(dtype), rows=1, max_length=64, scratch=16)
    for step in range(TRACED_AT + 2):
        runner.append([0], [[5] * (1 + step % 2)], [step])
    line = runner._line
    assert line is not None
    shorter, plain = line._replays
    assert len(shorter.__code__.co_code) < len(plain.__code__.co_code)
    assert set(line.replayed.values()) == {shorter}
