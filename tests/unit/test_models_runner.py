"""What HFRunner promises beyond the contract: equal shapes give equal bits, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch

from ssd_ray.models.runner import HFRunner
from tests.support.tiny import tiny_model

SIZE = {"rows": 3, "max_length": 128, "scratch": 32}


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def runner() -> HFRunner:
    return HFRunner(tiny_model("llama").to(torch.bfloat16), **SIZE)


def test_what_padding_holds_changes_no_bit(runner: HFRunner) -> None:
    runner.prefill(0, text(40))
    logits = [runner.append([0], torch.tensor([[5, 6, *padding]]), [40])[0, :2] for padding in ([0] * 6, [9] * 6)]
    assert torch.equal(*logits)


def test_what_unseen_slots_hold_changes_no_bit(runner: HFRunner) -> None:
    runner.prefill(0, text(50))
    runner.prefill(1, text(40))
    logits = [runner.append([row], torch.tensor([text(8, seed=1)]), [40])[0] for row in (0, 1)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("length", [1, 7, 8, 100])
def test_equal_prompts_give_equal_bits(runner: HFRunner, length: int) -> None:
    for row in (2, 0):
        runner.prefill(row, text(length))
    logits = [runner.append([row], torch.tensor([text(8, seed=1)]), [length]) for row in (2, 0)]
    assert torch.equal(*logits)


def test_half_precision_is_close_to_single(runner: HFRunner) -> None:
    single = HFRunner(tiny_model("llama"), **SIZE)
    tokens = torch.tensor([text(20)])
    half = runner.append([0], tokens, [0])
    assert half.dtype == torch.float32
    want = single.append([0], tokens, [0])
    assert (half - want).abs().max() < 0.05 * want.abs().max()


def test_more_tokens_than_a_prefill_chunk_can_be_appended() -> None:
    model = tiny_model("llama")
    small, large = (HFRunner(model, **SIZE, prefill_chunk=chunk) for chunk in (8, 64))
    tokens = torch.tensor([text(30)])
    torch.testing.assert_close(small.append([0], tokens, [3]), large.append([0], tokens, [3]))


def test_logits_survive_the_next_forward(runner: HFRunner) -> None:
    first = runner.append([0], torch.tensor([[1, 2]]), [0])
    kept = first.clone()
    runner.append([0], torch.tensor([[3, 4]]), [0])
    assert torch.equal(first, kept)
