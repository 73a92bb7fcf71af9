"""Recorded calls: a replay is the function, for all inputs of a shape, or there is none."""

from __future__ import annotations

from inspect import signature
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_ray.models import packing
from ssd_ray.models.graphs import CACHE_NAMES, TRACED_AT, EagerLine, ReplayedLine
from ssd_ray.models.replay import CannotRecordError, opaque, replay, trace
from ssd_ray.models.runner import HFRunner
from tests.support.tiny import tiny_model

SIZE = {"rows": 4, "max_length": 128, "scratch": 64}
WEIGHT = torch.arange(12.0).view(3, 4)


def record(function, rows: int = 4):
    """A replay of a function of x [rows, n], from zeros of two lengths."""
    return replay(*(trace(function, x=torch.zeros(rows, length)) for length in (3, 5)))


def inplace(x: Tensor) -> Tensor:
    total = torch.zeros(3, x.shape[-1])
    view = total[:1]
    total.add_(WEIGHT @ x)
    total[1, 0] = 7.0
    return view + total


def parts(x: Tensor) -> Tensor:
    low, *others = x.split([1, 1, 2])
    values, places = x.topk(2, dim=0)
    return torch.cat([low, *others, values, places.float()])[..., None].expand(-1, -1, 2)


def untouched(x: Tensor) -> Tensor:
    return x


def shaped(x: Tensor) -> Tensor:
    length = x.shape[-1]
    heads = x.view(2, 2, -1).transpose(0, 1).reshape(4 * length)
    several = heads.view(length, 4)[slice(0, length)].repeat(1, 2).reshape(torch.Size([2 * length, 4]))
    return several + torch.ones(length * 2, 1)


@pytest.mark.parametrize("function", [inplace, parts, untouched, shaped])
def test_a_replay_gives_what_the_function_gives_whatever_the_length(function) -> None:
    replayed = record(function)
    for length in (1, 2, 3, 5, 8, 13):
        x = torch.randn(4, length, generator=torch.Generator().manual_seed(length))
        assert torch.equal(replayed(x), function(x=x))


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x * int(x.argmax()),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: x * len(x.nonzero()),
        lambda x: x * x.tolist()[0][0],
        lambda x: x * float(x.numpy()[0, 0]),
    ],
    ids=["index", "branch", "mask", "count", "list", "array"],
)
def test_a_function_that_looks_at_values_is_refused(look) -> None:
    with pytest.raises(CannotRecordError):
        trace(look, x=torch.ones(2, 3))


@pytest.mark.parametrize(
    "depends",
    [
        lambda x: x[:, : x.shape[-1] - 1],
        lambda x: x if x.shape[-1] > 3 else x + 1.0,
        lambda x: x.relu() if x.shape[-1] > 3 else x.neg(),
        lambda x: x * (0.5 * x.shape[-1]),
        lambda x: x.sum(-1, keepdim=x.shape[-1] > 3),
        lambda x: torch.cat([x] * x.shape[-1]),
        lambda x: x + torch.tensor([1.0] * x.shape[-1]),
        lambda x: (x + 1.0, x + 2.0)[x.shape[-1] > 3],
    ],
    ids=["less", "branch", "function", "factor", "flag", "list", "new tensor", "result"],
)
def test_a_function_that_depends_on_the_length_in_another_way_is_refused(depends) -> None:
    with pytest.raises(CannotRecordError):
        record(depends)


class Factors:
    """Something whose values are no part of a trace."""

    def __init__(self) -> None:
        self.values = [2.0]
        self.asked: list[int] = []

    @opaque(lambda self, x, more: (x,))
    def scaled(self, x: Tensor, more: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        assert more["same"] is x
        assert more["count"] == x.shape[-1]
        self.asked.append(len(self.values))
        return x * sum(self.values), [x + each for each in self.values]


def test_an_opaque_function_runs_anew_each_time() -> None:
    factors = Factors()

    def function(x: Tensor) -> Tensor:
        product, sums = factors.scaled(x, more={"same": x, "count": x.shape[-1]})
        return product + sums[0]

    replayed = record(function, 1)
    factors.values = [3.0, 1.0]
    assert torch.equal(replayed(torch.ones(1, 2)), torch.tensor([[8.0, 8.0]]))
    assert factors.asked == [1, 1, 2]


def run_plainly(runner: HFRunner) -> HFRunner:
    runner._line, runner._prompt = (EagerLine(line._model, runner._kv) for line in (runner._line, runner._prompt))
    return runner


def exercise(runner: HFRunner, rounds: int) -> list[Tensor]:
    """Logits of forwards of few shapes: rows of all kinds, growing extents, trees."""
    for row, length in enumerate([40, 44, 60, 44, 60, 40]):
        runner.prefill(row % 4, [(7 * row + token) % 96 for token in range(length)])
    logits = []
    for step in range(rounds):
        tokens = torch.arange(8).view(2, 4) + step
        row, other = tokens.tolist()
        logits += runner.append([step % 2], [row], [38 + 4 * step])
        logits += runner.append([2, 3], [row, other[: 2 + step % 2]], [30 + 9 * step, 40])
        positions, slots = torch.full((1, 2), 41 + step), torch.tensor([[150, 170 - step]])
        visible = torch.arange(192) < torch.tensor([[[40], [33]]])
        visible[..., 150] = True
        logits.append(runner.extend([step % 3], tokens[:1, :2], positions, slots, visible))
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_replayed_forwards_give_the_plain_ones_bits(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "CLEARLY", inf)  # both alike
    runner = HFRunner(tiny_model(architecture).to(dtype), **SIZE)
    forward = runner._line
    assert isinstance(forward, ReplayedLine)
    got = exercise(runner, TRACED_AT + 4)
    assert len(forward.replayed) >= 3
    assert all(forward.replayed.values())
    assert runner._prompt.replayed
    assert all(runner._prompt.replayed.values())
    plain = run_plainly(HFRunner(tiny_model(architecture).to(dtype), **SIZE))
    assert all(map(torch.equal, got, exercise(plain, TRACED_AT + 4)))


def test_a_model_that_looks_at_values_is_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CLEARLY", inf)  # both alike
    runner, plain = (HFRunner(tiny_model("llama"), **SIZE) for _ in range(2))
    run_plainly(plain)
    kind = type(plain._line._model.model.layers[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * (1.0 + float(x.sum()) % 1.0))
    got = exercise(runner, TRACED_AT + 1)
    assert not runner._line.replayed
    assert all(map(torch.equal, got, exercise(plain, TRACED_AT + 1)))


def test_a_model_whose_calls_depend_on_extents_is_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = HFRunner(tiny_model("llama"), **SIZE)
    kind = type(runner._line._model)
    forward = kind.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        (cache,) = (kwargs[name] for name in CACHE_NAMES if name in kwargs)
        output.logits = output.logits * cache.get_mask_sizes(2, 0)[0]
        return output

    scaled.__signature__ = signature(forward)

    monkeypatch.setattr(kind, "forward", scaled)
    for _ in range(TRACED_AT + 1):
        runner.append([0], [[1, 1]], [0])
    assert not runner._line.replayed


def test_a_number_of_tokens_with_other_bits_is_run_plainly_and_said(caplog: pytest.LogCaptureFixture) -> None:
    runner, plain = (HFRunner(tiny_model("llama"), **SIZE) for _ in range(2))
    run_plainly(plain)
    line = runner._line
    line._until_traced, line._replays = 0, [lambda tokens, positions: torch.zeros(1)]
    with caplog.at_level("INFO", "ssd_ray"):
        for _ in range(3):
            (got,), (want,) = (each.append([0], [[1, 2]], [0]) for each in (runner, plain))
            assert torch.equal(got, want)
    assert line.replayed == {2: None}
    assert [record.getMessage() for record in caplog.records] == ["2 tokens are run plainly: a replay gives other bits"]
