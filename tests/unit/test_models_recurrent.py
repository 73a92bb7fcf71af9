"""States of recurrent layers: what is not kept is computed again, and who cannot go on from one is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from ssd_ray.errors import UnsupportedModelError
from ssd_ray.models.recurrent import MOST_AGAIN, RecurrentRunner
from ssd_ray.models.runner import HFRunner
from ssd_ray.models.runners import make_runner
from tests.support.tiny import tiny_model

SIZE: dict[str, Any] = {"rows": 2, "max_length": 128, "scratch": 32, "page_slots": 16}
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
TOKENS = torch.randint(1, 96, (60,), generator=torch.Generator().manual_seed(0)).tolist()


def plain(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


@pytest.mark.parametrize("architecture", ["lfm2", "falcon_h1", "mamba"])
@pytest.mark.parametrize("again", [1, MOST_AGAIN, MOST_AGAIN + 1, 40])
def test_states_that_were_not_kept_are_computed_again(architecture: str, again: int) -> None:
    model = tiny_model(architecture)
    want = plain(model, TOKENS)
    runner = RecurrentRunner(model, **SIZE)
    runner.prefill(0, TOKENS[: 56 - again])
    runner.append([0], [TOKENS[56 - again : 56]], [56 - again])
    for address in runner._addresses(0, range(56 - again, 56)):
        runner._states.pop(address, None)
    before = [bank.clone() for bank in runner._kv.banks]
    (got,) = runner.append([0], [TOKENS[56:]], [56])
    torch.testing.assert_close(got, want[56:], rtol=1e-3, atol=1e-3)
    written = runner._addresses(0, range(56, 60))
    for bank, old in zip(runner._kv.banks, before, strict=True):  # K and V that were there are what they were
        kept = [at for at in range(runner.num_pages * runner.page_slots) if at not in written]
        assert torch.equal(bank[:, :, kept], old[:, :, kept])


def test_a_tree_forks_from_a_state_that_was_not_kept() -> None:
    model = tiny_model("lfm2")
    runner = RecurrentRunner(model, **SIZE)
    runner.prefill(0, TOKENS[:30])
    runner._states.clear()
    visible = torch.zeros(1, 2, runner.extent(132), dtype=torch.bool)
    visible[..., :30] = True
    slots = torch.tensor([[130, 131]])
    visible[0, [0, 1], slots[0]] = True
    positions = torch.full_like(slots, 30)
    logits = runner.extend([0], torch.tensor([[7, 8]]), positions, slots, visible)[0]
    for token, got in zip((7, 8), logits, strict=True):
        torch.testing.assert_close(got, plain(model, [*TOKENS[:30], token])[-1], rtol=1e-3, atol=1e-3)


def test_few_states_are_enough() -> None:
    model = tiny_model("lfm2")
    want = plain(model, TOKENS)
    runner = RecurrentRunner(model, **SIZE)
    runner._most = 1
    for row in (0, 1):
        runner.prefill(row, TOKENS[:20])
    for start in range(20, 60, 4):
        for got in runner.append([0, 1], [TOKENS[start : start + 4]] * 2, [start] * 2):
            torch.testing.assert_close(got, want[start : start + 4], rtol=1e-3, atol=1e-3)
        assert len(runner._states) == 1


def test_a_state_takes_no_more_memory_than_its_own() -> None:
    runner = RecurrentRunner(tiny_model("lfm2"), **SIZE)
    runner.append([0, 1], [[1, 2], [3, 4]], [0, 0])
    assert len(runner._states) == 2
    for state in runner._states.values():
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in state)


@pytest.mark.parametrize(
    ("name", "stepwise"),
    [
        ("mamba", True),
        ("mamba2", False),
        ("lfm2", False),
        pytest.param("nemotron_h", True, marks=pytest.mark.skipif(OLD, reason="keeps more than is in its cache")),
        ("zamba2", True),
    ],
)
def test_who_takes_no_heed_of_a_state_beside_several_tokens_is_found(name: str, stepwise: bool) -> None:
    """Or computes something else then, as two of these do for some tokens."""
    assert RecurrentRunner(tiny_model(name), **SIZE)._stepwise == stepwise


def test_who_takes_no_heed_of_a_state_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("lfm2")
    given = RecurrentRunner._set
    monkeypatch.setattr(RecurrentRunner, "_set", lambda runner, states: given(runner, [runner._begin] * len(states)))
    with pytest.raises(UnsupportedModelError, match="does not go on from a state as it is given"):
        RecurrentRunner(model, **SIZE)


def test_windows_beside_states_are_refused() -> None:
    model = tiny_model("lfm2")
    model.config.layer_types = ["conv", "sliding_attention"]
    model.config.sliding_window = 16
    with pytest.raises(UnsupportedModelError, match="has recurrent layers and windows"):
        RecurrentRunner(model, **SIZE)


def test_each_model_gets_the_runner_that_it_needs() -> None:
    assert type(make_runner(tiny_model("falcon_h1"), **SIZE)) is RecurrentRunner
    assert type(make_runner(tiny_model("llama"), **SIZE)) is HFRunner
