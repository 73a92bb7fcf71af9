"""What HFRunner promises beyond the contract: a token has the same bits, whoever is run beside it."""

from __future__ import annotations

from itertools import cycle, pairwise

import pytest
import torch
from transformers.cache_utils import Cache

from ssd_ray.models.calibration import PER_ROW, Calibration, calibrate
from ssd_ray.models.probe import probe_layers, takes_lines
from ssd_ray.models.runner import HFRunner
from ssd_ray.saguaro.costs import Measured
from tests.support.tiny import tiny_model

SIZE = {"rows": 3, "max_length": 128, "scratch": 32}


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def steady_runner(dtype: torch.dtype, architecture: str = "llama", head_dim: int = 8, **size: int) -> HFRunner:
    """A runner that is calibrated, as the engine's are, and runs numbers of tokens that are alike alone."""
    model = tiny_model(architecture, context=size.get("max_length", 128), head_dim=head_dim).to(dtype)
    runner = HFRunner(model, **(SIZE | size))
    found = calibrate(runner, bound="pages" not in size)
    runner.adopt(found)
    runner.line_sizes = [each for each in found.steady if each not in found.unsteady]
    return runner


@pytest.fixture
def runner() -> HFRunner:
    return HFRunner(tiny_model("llama").to(torch.bfloat16), **SIZE)


def test_what_unseen_slots_hold_changes_no_bit(runner: HFRunner) -> None:
    runner.prefill(0, text(50))
    runner.prefill(1, text(40))
    logits = [runner.append([row], [text(8, seed=1)], [40])[0] for row in (0, 1)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("length", [1, 7, 8, 100])
def test_equal_prompts_give_equal_bits(runner: HFRunner, length: int) -> None:
    for row in (2, 0):
        runner.prefill(row, text(length))
    logits = [runner.append([row], [text(8, seed=1)], [length])[0] for row in (2, 0)]
    assert torch.equal(*logits)


COUNTS = ([8] * 8, [1] * 8, [1, 16, 3, 8, 2, 1, 5, 11], [4, 1, 1, 2, 7, 16, 1, 16])


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("gpt_oss", torch.float32),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llama", torch.float32),
                ("gpt_oss", torch.bfloat16),
                ("gemma2", torch.bfloat16),
                ("gemma2", torch.float32),
            )
        ),
    ],
)
def test_the_rest_of_a_line_changes_no_bit(architecture: str, dtype: torch.dtype) -> None:
    """Rows of other lengths and numbers of tokens, in another order, on other pages: a row's logits and KV are what
    they are alone. Also with a softmax of our own, windows, and experts."""
    size = {"head_dim": 64, "rows": 8, "max_length": 512, "scratch": 0}
    alone, batch = steady_runner(dtype, architecture, **size), steady_runner(dtype, architecture, pages=40, **size)
    batch.line_sizes = alone.line_sizes  # two calibrations may find other ones cheap
    lengths = [400, 3, 117, 64, 290, 5, 220, 233]
    pages = iter(torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist())
    for row, length in enumerate(lengths):
        batch.bind(row, 0, [next(pages) for _ in range(batch.extent(length + 32) // 64)])
        for runner in (alone, batch):
            runner.prefill(row, text(length, seed=row))
    for counts in COUNTS:
        tokens = [text(count, seed=100 + row) for row, count in enumerate(counts)]
        want = [alone.append([row], [tokens[row]], [lengths[row]])[0] for row in range(8)]
        for rows in ([6, 7, 2, 0, 5, 1], [4, 3, 5]):  # 6 and 7, 5 and 1 read equally many slots
            got = batch.append(rows, [tokens[row] for row in rows], [lengths[row] for row in rows])
            for of_row, row in zip(got, rows, strict=True):
                assert torch.equal(of_row, want[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cuts", [[300], [64, 310], [8, 9, 290], [256, 257]])
def test_a_prompt_cut_anywhere_gives_equal_bits(dtype: torch.dtype, cuts: list[int]) -> None:
    """As where its beginning is shared, or other work comes in between."""
    model = tiny_model("llama", context=448, head_dim=64).to(dtype)
    runner = HFRunner(model, rows=2, max_length=448, scratch=0)
    tokens = text(400)
    runner.prefill(0, tokens)
    for start, end in pairwise([0, *cuts, 400]):
        runner.prefill(1, tokens[start:end], start=start)
    logits = [runner.append([row], [text(8, seed=1)], [400])[0] for row in (0, 1)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_how_tokens_are_dealt_into_forwards_changes_no_bit(dtype: torch.dtype) -> None:
    """One a forward, or five, or any number: so no speculation changes a text, however close two tokens are.

    The positions pass the extents at which CPU kernels group their sums in another way.
    """
    runner = steady_runner(dtype, head_dim=64, rows=3, max_length=704, scratch=0)
    tokens, begin, end = text(680), 170, 680

    def logits(row: int, strides: list[int]) -> torch.Tensor:
        runner.prefill(row, tokens[:begin])
        parts, start = [], begin
        for stride in cycle(strides):
            if start == end:
                return torch.cat(parts)
            stop = min(end, start + stride)
            parts += runner.append([row], [tokens[start:stop]], [start])
            start = stop
        raise AssertionError

    want = logits(0, [1])
    assert torch.equal(logits(1, [5]), want)
    assert torch.equal(logits(2, [1, 2, 16, 3, 7, 11, 4]), want)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_where_reading_begins_changes_no_bit(architecture: str) -> None:
    """Behind slot 536 a window of 24 lies beyond the first period of slots, and what one token reads begins there; what
    several read that begin before it does not."""
    model = tiny_model(architecture, context=640, head_dim=64).to(torch.bfloat16)
    runner = HFRunner(model, rows=2, max_length=640, scratch=0)
    runner.line_sizes = (16,)
    tokens, begin, end = text(570), 520, 570

    def logits(row: int, stride: int) -> torch.Tensor:
        runner.prefill(row, tokens[:begin])
        starts = range(begin, end, stride)
        return torch.cat([runner.append([row], [tokens[at : min(end, at + stride)]], [at])[0] for at in starts])

    assert runner._reads(534, 576)[0] == range(576)
    assert runner._reads(535, 576)[0] == range(512, 576)
    assert torch.equal(logits(0, 1), logits(1, 11))


@pytest.mark.parametrize("in_line", [True, False])
def test_fewer_tokens_are_padded_to_a_number_that_is_run(in_line: bool) -> None:
    runner = HFRunner(tiny_model("deepseek_v3" if not in_line else "llama"), **SIZE)
    assert (runner._line is not None) == in_line
    runner.line_sizes = (2, 8, 16)
    assert [runner.line_size(count) for count in (1, 2, 3, 8, 9, 16, 17, 40, 41)] == [2, 2, 8, 8, 16, 16, 20, 40, 48]
    runner.prefill(0, text(40))
    runner.prefill(1, text(50))
    padded = runner.append([0, 1], [text(3, seed=1), text(2, seed=2)], [40, 50])
    runner.line_sizes = ()
    plain = runner.append([0, 1], [text(3, seed=1), text(2, seed=2)], [40, 50])
    assert [len(logits) for logits in padded] == [3, 2]
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(runner.append([0], [text(4, seed=3)], [43]), runner.append([0], [text(4, seed=3)], [43]))


def test_a_line_may_be_padded_beyond_the_longest_row() -> None:
    runner = HFRunner(tiny_model("llama"), **(SIZE | {"prefill_chunk": 8}))
    runner.prefill(0, text(40))
    plain = runner.append([0], [text(3, seed=1)], [40])
    runner.line_sizes = (512,)
    torch.testing.assert_close(runner.append([0], [text(3, seed=1)], [40]), plain)


def test_a_row_of_a_batch_is_not_padded_beyond_the_tokens_that_it_may_have() -> None:
    """Others may have the page after them."""
    runner = HFRunner(tiny_model("deepseek_v3"), rows=2, max_length=48, scratch=16, page_slots=16, pages=6)
    assert runner._line is None
    runner.adopt(Calibration(Measured((20,), (1.0,)), (20,)))
    runner.bind(0, 0, [0, 1])
    runner.prefill(0, text(16))
    assert len(runner.append([0], [text(PER_ROW)], [16])[0]) == PER_ROW


def test_models_that_look_at_k_and_v_get_them_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    tokens = [text(9), text(5, seed=1)]
    want = HFRunner(model, **SIZE).append([0, 2], tokens, [0, 0])
    attention = type(model.model.layers[0].self_attn)
    plain = attention.forward

    class Looking:
        def __init__(self, cache: Cache) -> None:
            self.cache = cache

        def update(self, *args: object, **kwargs: object) -> list[torch.Tensor]:
            return [states.clone() for states in self.cache.update(*args, **kwargs)]

    def looks(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        seen = {name: Looking(value) if isinstance(value, Cache) else value for name, value in kwargs.items()}
        return plain(self, *args, **seen)

    monkeypatch.setattr(attention, "forward", looks)
    assert not takes_lines(model, probe_layers(model))
    torch.testing.assert_close(HFRunner(model, **SIZE).append([0, 2], tokens, [0, 0]), want)
    monkeypatch.undo()
    assert takes_lines(model, probe_layers(model))


def test_half_precision_is_close_to_single(runner: HFRunner) -> None:
    single = HFRunner(tiny_model("llama"), **SIZE)
    (half,) = runner.append([0], [text(20)], [0])
    assert half.dtype == torch.float32
    (want,) = single.append([0], [text(20)], [0])
    assert (half - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_token_that_sees_nothing_stays_finite_whatever_its_scores(dtype: torch.dtype) -> None:
    """In float16 a mask of the lowest number overflows as soon as a score below -16 is added to it."""
    model = tiny_model("gemma2", attn_logit_softcapping=None)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(30)
            layer.self_attn.k_proj.weight.copy_(-layer.self_attn.q_proj.weight[:16])
    runner = HFRunner(model.to(dtype), **SIZE)
    tokens, slots, visible = torch.full((1, 2), 3), torch.tensor([[0, 1]]), torch.zeros(1, 2, 64, dtype=torch.bool)
    visible[0, 0, 0] = True
    runner.prefill(0, [3] * 64)
    for _ in range(2):  # what the second token wrote lies there now, hidden
        logits = runner.extend([0], tokens, torch.zeros_like(slots), slots, visible)
        assert logits[0, 0].isfinite().all()


def test_more_tokens_than_a_prefill_chunk_can_be_appended() -> None:
    model = tiny_model("llama")
    small, large = (HFRunner(model, **SIZE, prefill_chunk=chunk) for chunk in (8, 64))
    torch.testing.assert_close(small.append([0], [text(30)], [3]), large.append([0], [text(30)], [3]))


def test_logits_survive_the_next_forward(runner: HFRunner) -> None:
    (first,) = runner.append([0], [[1, 2]], [0])
    kept = first.clone()
    runner.append([0], [[3, 4]], [0])
    assert torch.equal(first, kept)
