"""Compiled and graphed forwards do what the plain one does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ssd_ray.models.graphs import CudaGraphForward, caller, eager_forward, static_step
from ssd_ray.models.runner import HFRunner
from ssd_ray.models.slots import SlotCache
from tests.support.tiny import tiny_model

SIZE = {"rows": 4, "max_length": 128, "scratch": 64}


def tokens_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def caches(model: PreTrainedModel) -> tuple[HFRunner, SlotCache, SlotCache]:
    """A runner (for its masks) and two KV caches with equal contents."""
    runner = HFRunner(model, **SIZE)
    for row in range(4):
        runner.prefill(row, tokens_of(1, 40, seed=row)[0].tolist())
    return runner, runner._kv, copy.deepcopy(runner._kv)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "gpt2"])
@pytest.mark.parametrize(("rows", "gather"), [([0], False), ([0], True), ([0, 1], True), ([2, 0], True)])
@pytest.mark.parametrize("starts", [(40, 40), (40, 33)])
def test_the_static_step_is_the_plain_forward(
    architecture: str, rows: list[int], gather: bool, starts: tuple[int, int]
) -> None:
    model = tiny_model(architecture)
    runner, plain, static = caches(model)
    tokens = tokens_of(len(rows), 8, seed=9)
    with torch.inference_mode():
        reads = [range(64)] * len(static.pools)
        positions, masks = runner._trunk(starts[: len(rows)], 8, reads)
        slots = [range(start, start + 8) for start in starts[: len(rows)]]
        written = list(map(torch.tensor, static.locate(rows, slots)))
        want = eager_forward(model, plain)(rows, reads, tokens, positions, written, masks)
        sizes = [pool.table.size if gather else 64 for pool in static.pools]
        pools = static.parts([0] * len(sizes), sizes)
        pages = [pool.pages(rows, reads[:1] * len(rows)) if gather else None for pool in static.pools]
        got = static_step(model, 64, static.sight)(pools, pages, tokens, positions, *written, *masks)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(static.banks, plain.banks, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class Newer(nn.Module):
    def forward(self, input_ids, attention_mask, position_ids, cache, use_cache):
        return cache


class Older(nn.Module):
    def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache):
        return past_key_values


class HandsOn(Older):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind", [Newer, Older, HandsOn])
def test_a_forward_gets_the_cache_by_the_name_that_it_has(kind: type[nn.Module]) -> None:
    zeros, cache = torch.zeros(1, 1), Cache(layers=[])
    assert caller(kind())(zeros, zeros, [zeros], cache) is cache


def exercise(plain: HFRunner, graphed: HFRunner) -> None:
    """The same operations on both give the same logits."""
    for runner in (plain, graphed):
        for row in range(4):
            runner.prefill(row, tokens_of(1, 50, seed=row)[0].tolist())
    cases = (([0], [50]), ([2], [49]), ([0, 1], [51, 51]), ([1, 2], [20, 60]), ([3, 0], [50, 51]))
    for runner in (plain, graphed):
        runner.bind(3, 0, [11, 9, 10])  # not one after the other
        runner.prefill(3, tokens_of(1, 70, seed=3)[0].tolist())
    for rows, starts, first in (
        *((*case, 4) for case in cases),
        ([1], [100], 4),
        ([1], [186], 4),
        ([1], [61], 3),  # the padding is on the next page
        ([3, 0], [70, 54], 3),
    ):
        tokens = tokens_of(len(rows), 4, seed=sum(starts)).tolist()
        tokens[0] = tokens[0][:first]
        want, got = (runner.append(rows, tokens, starts) for runner in (plain, graphed))
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-4, atol=1e-4)
        for runner in (plain, graphed):
            runner.move(rows[0], [starts[0] + first - 1], [starts[0] + 1])
    (logits,) = graphed.append([0], tokens_of(1, 4).tolist(), [50])
    kept = logits.clone()
    graphed.append([0], tokens_of(1, 4, seed=5).tolist(), [50])
    assert torch.equal(logits, kept)


def test_steps_are_padded_only_where_each_shape_has_to_be_prepared() -> None:
    plain, compiled = (HFRunner(tiny_model("llama"), **SIZE, compile=each) for each in (False, True))
    assert [plain.padded(tokens) for tokens in (1, 3, 17)] == [1, 3, 17]
    assert [compiled.padded(tokens) for tokens in (1, 3, 17)] == [1, 4, 32]


def test_padding_lies_within_what_is_read() -> None:
    """A step at fixed shapes writes to no more of the pool than it reads."""
    runner = HFRunner(tiny_model("llama"), **SIZE, compile=True)
    runner.prefill(0, list(range(61)))
    forwards = []
    runner._decode = lambda *inputs: forwards.append(inputs) or torch.zeros(1, inputs[2].shape[1], 96)
    for count in (1, 2, 3):
        runner.append([0], [[5] * count], [61])
    for _, reads, _, _, written, masks in forwards:
        assert written[0].max() < reads[0].stop == masks[0].shape[-1]


def test_what_cannot_be_captured_is_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)

    class Capturing(CudaGraphForward):
        fails = True

        def _capture(self, inputs, reaches, in_place):
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super()._capture(inputs, reaches, in_place)

    model = tiny_model("llama")
    plain, failing = (HFRunner(model, **SIZE, compile=True) for _ in range(2))
    plain._decode = eager_forward(model, plain._kv)
    failing._decode = Capturing(model, failing._kv, compile=False)
    exercise(plain, failing)
    other = Capturing(model, failing._kv, compile=False)
    other._graphs[(0,)] = object()
    failing._decode = other
    with pytest.raises(RuntimeError, match="capturing"):  # a model of which there are graphs
        failing.append([0], [[1]], [50])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")
def test_compiled_forwards() -> None:
    model = tiny_model("llama", layers=1)
    compiled = HFRunner(model, **SIZE, compile=True)
    exercise(HFRunner(model, **SIZE), compiled)
    assert compiled._decode._known == {4}  # once, with an open extent


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen2", "gpt2"])
def test_cuda_graphs(architecture: str) -> None:
    model = tiny_model(architecture)
    plain = HFRunner(copy.deepcopy(model), **SIZE)
    exercise(plain, HFRunner(model.to("cuda"), **SIZE))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_cuda_graphs() -> None:
    model = tiny_model("llama", layers=1)
    exercise(HFRunner(copy.deepcopy(model), **SIZE), HFRunner(model.to("cuda"), **SIZE, compile=True))
