"""Drafts that read hidden states of the target: what they are told is true, and what they run goes on from it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_ray.actors.states import MOST, PATIENCE, Aside
from ssd_ray.config import SamplingParams
from ssd_ray.models.table import TableModel
from ssd_ray.speculation.window import SCRATCH
from ssd_ray.wire import States
from tests.support.pump import Pump, Text

MODEL = {"vocab_size": 24, "contexts": 256, "order": 2, "max_length": 192, "sharpness": 3.0}


def stated(hashes: Tensor | np.ndarray) -> Tensor:
    """The state of a token of this hash, [.., 1]."""
    return torch.from_numpy((np.asarray(hashes) % np.uint64(1 << 20)).astype(np.float32))[..., None]


class Telling(TableModel):
    """A target that shows a state of each token."""

    shows = 1

    def show(self, row: int, start: int, end: int) -> Tensor:
        layer = self._layers[0]
        return stated(layer._hashes[layer.pages.locate_trunk(row, start, end)])


class Reading(TableModel):
    """A draft that insists on the target's state of each token before it runs the one after it at its place."""

    reads = 1

    def _allocate(self) -> None:
        super()._allocate()
        self._told = torch.full((self._layers[0].pages.size, 1), torch.nan)
        self.ran = 0

    def read(self, row: int, start: int, states: Tensor) -> None:
        self._told[self._layers[0].pages.locate(row, range(start, start + len(states)))] = states

    def extend(self, rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, visible: Tensor) -> Tensor:
        logits = super().extend(rows, tokens, positions, slots, visible)
        for row, of_row, places in zip(rows, slots.tolist(), positions.tolist(), strict=True):
            for slot, position in zip(of_row, places, strict=True):
                if slot == position > 0:
                    layer = self._layers[0]
                    before = layer.pages.locate(row, [slot - 1])
                    assert torch.equal(self._told[before], stated(layer._hashes[before])), (row, slot)
                    self.ran += 1
        return logits

    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        assert not source, "what was run ahead of the target is run again"


def pump(
    rows: int = 1, pages: int | None = None, draft_pages: int | None = None, drafts: int = 1, **options: object
) -> Pump:
    target = Telling(rows=rows, scratch=SCRATCH, pages=pages, **MODEL)  # type: ignore[arg-type]
    model = Reading(rows=rows, scratch=SCRATCH, pages=draft_pages, **MODEL)  # type: ignore[arg-type]
    return Pump(target, [model.perturbed(0.8, seed) for seed in range(drafts)], concurrency=rows, **options)


def alone(tokens: Sequence[int], params: SamplingParams) -> list[int]:
    return Pump(Telling(scratch=SCRATCH, **MODEL), []).run(tokens, params).tokens  # type: ignore[arg-type]


def test_a_head_is_told_of_its_prompt_in_chunks_and_of_outcomes_as_they_come() -> None:
    engine = pump(prefill_chunk=16)
    prompt, params = [token % 24 for token in range(77)], SamplingParams(temperature=0.0, max_tokens=110)
    text = engine.run(prompt, params)
    runner = engine.drafts[0]._runner
    assert isinstance(runner, Reading)
    assert runner.ran > 77 + 110 - 20
    model = TableModel(scratch=SCRATCH, **MODEL)  # type: ignore[arg-type]
    other = Pump(model, [model.perturbed(0.8, 0)], concurrency=1, prefill_chunk=16).run(prompt, params)
    assert text.tokens == other.tokens
    # Run again or moved, its tokens and their rankings are the same for a model that knows no states.
    assert (text.stats.rounds, text.stats.hits) == (other.stats.rounds, other.stats.hits)
    assert text.stats.hits > text.stats.rounds / 3


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([1, 3]),
    drafts=st.integers(1, 2),
    pages=st.sampled_from([13, None]),
    caching=st.booleans(),
    trouble=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_whatever_happens_to_messages_states_are_true(
    seed: int, rows: int, drafts: int, pages: int | None, caching: bool, trouble: float
) -> None:
    dice = random.Random(seed)
    sizes = dice.choice([24, None]), drafts
    options = {"trouble": trouble, "seed": seed, "prefix_cache": caching, "prefill_chunk": dice.choice([8, 64])}
    engine = pump(rows, pages, *sizes, draft_turns=lambda: dice.randrange(5), **options)
    prefix = [5, 4, 3, 2] * 8
    requests = [
        (
            prefix[: dice.choice([0, 16, 32])] + [dice.randrange(24) for _ in range(dice.choice([1, 2, 40]))],
            SamplingParams(temperature=dice.choice([0.0, 1.0]), max_tokens=dice.randrange(1, 40), seed=number),
        )
        for number in range(5)
    ]
    for text, request in zip(engine.run_all(requests), requests, strict=True):
        assert text.error is None
        assert text.tokens == alone(*request)


def test_a_head_comes_back_when_states_were_lost() -> None:
    engine = pump(seed=1)
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    hub = engine.target._links.channel
    engine.run([1, 2, 3], replace(params, max_tokens=5), number=0)  # the two have met
    hub._trouble = 0.5
    engine.target.submit(1, [1, 2, 3] * 20, params)
    engine.texts[1] = Text()
    for _ in range(12):
        engine.turn()
    hub._trouble = 0.0
    while engine.texts[1].finish_reason is None:
        engine.turn()
    assert engine.texts[1].stats.hits > engine.texts[1].stats.rounds / 4


def test_what_comes_before_its_turn_is_laid_aside() -> None:
    def message(start: int, count: int = 2) -> States:
        return States(1, start, count, "float32", memoryview(b""))

    aside, read = Aside(), [0]
    for start in (4, 2, 8):
        aside.put(message(start))
    assert list(aside.take(1, lambda: read[0], 20)) == []
    aside.put(message(0))
    assert aside.overdue(1) == (PATIENCE == 4)
    taken = []
    for each in aside.take(1, lambda: read[0], 20):
        taken.append(each.start)
        read[0] = each.start + each.count
    assert taken == [0, 2, 4]
    assert [each.start for each in aside.take(1, lambda: 8, 9)] == [], "the tokens are not known yet"
    assert len(aside) == 1
    assert list(aside.take(1, lambda: 10, 20)) == [], "known by now"
    assert len(aside) == 0
    for sequence in range(MOST + 10):
        aside.put(States(sequence, 5, 1, "float32", memoryview(b"")))
    assert len(aside) == MOST
