"""Recorded calls: a replay is the function, for all inputs of a shape, or there is none."""

from __future__ import annotations

from inspect import signature
from math import inf

import pytest
import torch
from torch import Tensor

from ssd_ray.models import packing
from ssd_ray.models.graphs import CACHE_NAMES, RECORDED_AT, EagerLine, ReplayedLine
from ssd_ray.models.replay import CannotRecordError, opaque, record
from ssd_ray.models.runner import HFRunner
from tests.support.tiny import tiny_model

SIZE = {"rows": 4, "max_length": 128, "scratch": 64}
WEIGHT = torch.arange(12.0).view(3, 4)


def inplace(x: Tensor) -> Tensor:
    total = torch.zeros(2, 4)
    view = total[:1]
    total.add_(x @ WEIGHT)
    total[1, 2] = 7.0
    return view + total


def parts(x: Tensor) -> Tensor:
    low, *others = x.split([1, 1, 1], dim=-1)
    values, places = x.topk(2)
    return torch.cat([low, *others, values, places.float()], dim=-1)[..., None].expand(-1, -1, 2)


def untouched(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("function", [inplace, parts, untouched])
def test_a_replay_gives_what_the_function_gives(function) -> None:
    replay = record(function, x=torch.zeros(2, 3))
    for seed in range(3):
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(replay(x), function(x=x))


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
        record(look, x=torch.ones(2, 3))


def test_an_opaque_function_runs_anew_each_time() -> None:
    asked: list[int] = []

    @opaque(lambda factors, x: (x,))
    def scaled(factors: list[float], x: Tensor) -> tuple[Tensor, list[Tensor]]:
        asked.append(len(factors))
        return x * sum(factors), [x + factor for factor in factors]

    factors = [2.0]

    def function(x: Tensor) -> Tensor:
        product, sums = scaled(factors, x)
        return product + sums[0]

    replay = record(function, x=torch.ones(2))
    factors[:] = [3.0, 1.0]
    assert torch.equal(replay(torch.ones(2)), torch.tensor([8.0, 8.0]))
    assert asked == [1, 2]


def run_plainly(runner: HFRunner) -> HFRunner:
    runner._line = EagerLine(runner._line._model, runner._kv)
    return runner


def exercise(runner: HFRunner, rounds: int) -> list[Tensor]:
    """Logits of forwards of few shapes: rows of all kinds, growing extents, trees."""
    for row in range(4):
        runner.prefill(row, [(7 * row + token) % 96 for token in range(40)])
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
    got = exercise(runner, RECORDED_AT + 4)
    assert len(forward._replays) >= 3
    plain = run_plainly(HFRunner(tiny_model(architecture).to(dtype), **SIZE))
    assert all(map(torch.equal, got, exercise(plain, RECORDED_AT + 4)))


def test_a_model_that_looks_at_values_is_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CLEARLY", inf)  # both alike
    runner, plain = (HFRunner(tiny_model("llama"), **SIZE) for _ in range(2))
    run_plainly(plain)
    kind = type(plain._line._model.model.layers[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * (1.0 + float(x.sum()) % 1.0))
    got = exercise(runner, RECORDED_AT + 1)
    assert not runner._line._replays
    assert all(map(torch.equal, got, exercise(plain, RECORDED_AT + 1)))


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
    for _ in range(RECORDED_AT + 1):
        runner.append([0], [[1, 1]], [0])
    assert not runner._line._replays
