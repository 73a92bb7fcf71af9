"""Whatever one sequence raises, and wherever: in the target it ends that request with its own error, on a draft that
sequence alone goes on without it. Nobody else notices."""

from __future__ import annotations

import pytest
import torch

from ssd_ray.actors import isolation
from ssd_ray.actors.batch import Batch, Row
from ssd_ray.actors.isolation import Isolation, told
from ssd_ray.actors.rounds import Rounds
from ssd_ray.actors.seats import Seats
from ssd_ray.actors.stepping import Rankings, Steps
from ssd_ray.actors.verifying import Target
from ssd_ray.config import SamplingParams
from ssd_ray.errors import EngineError
from ssd_ray.models.table import TableModel
from ssd_ray.sampling.penalties import Penalties
from ssd_ray.sampling.verifier import CoupledVerifier
from ssd_ray.speculation.draft import DraftSession
from ssd_ray.speculation.target import TargetSession
from ssd_ray.speculation.window import SCRATCH
from ssd_ray.text import Detokenizer
from tests.support.pump import Pump, ticking
from tests.support.tiny import tiny_tokenizer

BAD = 2
"""The number of the request that raises."""

VOCAB = 96
SEEDS = {1: 11, BAD: 666, 3: 13}
PROMPTS = {1: [1, 2, 3], BAD: [4, 5, 6, 7], 3: [8, 9]}


def params(number):
    return SamplingParams(seed=SEEDS[number], max_tokens=24, stop="~~~", ignore_eos=True, presence_penalty=0.1)


@pytest.fixture
def pump():
    target = TableModel(VOCAB, rows=3, max_length=64, scratch=SCRATCH, contexts=256)
    drafts = [target.perturbed(0.8, seed) for seed in (1, 2)]
    return Pump(target, drafts, concurrency=3, tokenizer=tiny_tokenizer(VOCAB), backup="auto", clock=ticking)


def run(pump):
    texts = pump.run_all([(PROMPTS[number], params(number)) for number in SEEDS])
    for _ in range(4):
        pump.turn()
    pump.validate()
    assert pump.target.stats().running == 0
    assert not any(draft.sequences for draft in pump.drafts)
    assert pump.target.stats().dropped_frames["malformed"] == sum(draft.dropped for draft in pump.drafts) == 0
    return dict(zip(SEEDS, texts, strict=True))


@pytest.fixture(scope="module")
def alone():
    target = TableModel(VOCAB, rows=3, max_length=64, scratch=SCRATCH, contexts=256)
    pump = Pump(target, [], tokenizer=tiny_tokenizer(VOCAB))
    return {number: pump.run(PROMPTS[number], params(number), number).tokens for number in SEEDS}


class Trap:
    """Makes a function raise for the bad request, from the so-manieth time on that it is called for it."""

    def __init__(self, monkeypatch, owner, name, is_bad, after=0):
        self.sprung = 0
        before = getattr(owner, name)

        def trapped(*args, **kwargs):
            if is_bad(*args):
                self.sprung += 1
                if self.sprung > after:
                    raise ArithmeticError("as \ud83d has it")
            return before(*args, **kwargs)

        monkeypatch.setattr(owner, name, trapped)


def by_session(session, *_):
    return session.sequence == BAD


def by_row(_, row, *__):
    return row.session.sequence == BAD


def by_seed(verifier, *_):
    return verifier._params.seed == SEEDS[BAD]


def by_prompt(detokenizer, tokenizer, stop, context, *_):
    return list(context) == PROMPTS[BAD]


IN_TARGET = {
    "made": (Target, "_row", lambda _, request: request.number == BAD),
    "its detokenizer": (Detokenizer, "__init__", by_prompt),
    "opened to drafts": (Rounds, "introduce", by_row),
    "prefilled": (Batch, "prefill", by_row),
    "begun": (TargetSession, "begin", by_session),
    "decided": (CoupledVerifier, "_verify", by_seed),
    "committed": (TargetSession, "commit", by_session),
    "its stop strings": (Row, "look_for_stop", lambda row: row.session.sequence == BAD),
    "given nodes": (TargetSession, "add", by_session),
    "looked up": (TargetSession, "look_up", by_session),
    "reported": (Rounds, "_report", by_row),
}

ON_DRAFTS = {
    "opened": (DraftSession, "__init__", lambda _, message, *__: message.sequence == BAD),
    "its noise": (Seats, "_noise", lambda _, params: params.seed == SEEDS[BAD]),
    "given pages": (Seats, "make_room", lambda _, seat: seat.sequence == BAD),
    "prefilled": (Steps, "_prefill_chunk_of", lambda _, seat: seat.sequence == BAD),
    "planned": (DraftSession, "next_step", by_session),
    "ranked": (Rankings, "of", lambda _, work: any(seat.sequence == BAD for seat, _ in work)),
    "completed": (DraftSession, "complete", by_session),
    "advanced": (DraftSession, "advance", by_session),
    "told what begins": (DraftSession, "begin", by_session),
}


@pytest.mark.parametrize("place", IN_TARGET)
def test_in_the_target_the_request_ends_with_its_own_error(pump, alone, monkeypatch, place):
    once = place in ("made", "its detokenizer", "opened to drafts", "prefilled")
    trap = Trap(monkeypatch, *IN_TARGET[place], after=0 if once else 1)
    texts = run(pump)
    assert trap.sprung
    bad = texts.pop(BAD)
    assert bad.finish_reason == "error"
    assert bad.error == "the target could not go on with it: ArithmeticError: as \\ud83d has it"
    assert bad.tokens == alone[BAD][: len(bad.tokens)]
    assert {number: text.tokens for number, text in texts.items()} == {1: alone[1], 3: alone[3]}


@pytest.mark.parametrize("place", ON_DRAFTS)
def test_on_a_draft_the_sequence_goes_on_without_it(pump, alone, monkeypatch, place):
    once = place in ("opened", "its noise")
    trap = Trap(monkeypatch, *ON_DRAFTS[place], after=0 if once else 1)
    texts = run(pump)
    assert trap.sprung
    assert {number: text.tokens for number, text in texts.items()} == alone
    assert texts[1].stats.hits > 0
    assert trap.sprung <= 1 + 2 * len(pump.drafts)  # nor is it tried again and again


@pytest.mark.parametrize("where", ["target", "draft"])
def test_a_forward_that_fails_is_tried_for_each_alone(pump, alone, monkeypatch, where):
    """Somebody's token makes the model raise: it is found out whose."""
    runner = pump.target._runner if where == "target" else pump.drafts[0]._runner
    name, last = ("append", PROMPTS[BAD][-1]) if where == "target" else ("extend", PROMPTS[BAD][-1])
    before = getattr(runner, name)

    def failing(rows, tokens, *rest):
        if any(last in (some.tolist() if isinstance(some, torch.Tensor) else some) for some in tokens):
            raise MemoryError("no room for this")
        return before(rows, tokens, *rest)

    monkeypatch.setattr(runner, name, failing)
    texts = run(pump)
    bad = texts[BAD]
    if where == "target":
        assert (bad.finish_reason, bad.error) == (
            "error",
            "the target could not go on with it: MemoryError: no room for this",
        )
    else:
        assert bad.tokens == alone[BAD]
    assert [texts[number].tokens for number in (1, 3)] == [alone[1], alone[3]]


def test_what_failed_is_not_found_by_those_that_begin_alike(pump, alone, monkeypatch):
    """The KV of a row that raised may be wrong, so it is not kept."""
    trap = Trap(monkeypatch, TargetSession, "commit", by_session, after=1)
    run(pump)
    assert trap.sprung
    again = pump.run(PROMPTS[BAD] * 8, params(BAD), number=9)
    assert again.stats.cached_tokens == 0


def test_what_breaks_the_engine_ends_the_loop(pump, monkeypatch):
    def broken(*_):
        raise EngineError("the channel is gone")

    monkeypatch.setattr(Batch, "prefill", broken)
    with pytest.raises(EngineError):
        run(pump)


def test_torchs_own_word_for_a_broken_device_is_known():
    assert getattr(torch, "AcceleratorError", EngineError) in isolation.BROKEN


def test_the_penalties_of_one_row_are_its_own(pump, alone, monkeypatch):
    Trap(monkeypatch, Penalties, "apply", by_seed)
    texts = run(pump)
    assert texts[BAD].finish_reason == "error"
    assert [texts[number].tokens for number in (1, 3)] == [alone[1], alone[3]]


class TestIsolation:
    @pytest.fixture
    def ended(self):
        return []

    @pytest.fixture
    def isolation(self, ended):
        return Isolation(lambda number, error: ended.append((number, str(error))))

    def test_those_that_raise_are_ended_and_left_out(self, isolation, ended):
        assert isolation.each([1, 0, 2], lambda number: 2 // number) == [(1, 2), (2, 1)]
        assert [number for number, _ in ended] == [0]

    def test_what_works_for_all_is_done_once(self, isolation, ended):
        calls = []
        assert isolation.together([1, 2], lambda numbers: calls.append(numbers) or numbers) == [(1, 1), (2, 2)]
        assert (calls, ended) == ([[1, 2]], [])

    def test_what_does_not_is_done_for_each(self, isolation, ended):
        assert isolation.together([1, 0, 2], lambda numbers: [2 // number for number in numbers]) == [(1, 2), (2, 1)]
        assert [number for number, _ in ended] == [0]

    def test_nothing_for_nobody(self, isolation):
        assert isolation.together([], lambda numbers: pytest.fail("there is nobody")) == []

    def test_an_error_is_told_in_few_words_that_can_be_written(self):
        assert told(ValueError("x" * 10**6 + "\ud83d")).startswith("ValueError: xxx")
        assert len(told(ValueError("\ud83d" * 10**5))) == 1000
        told(ValueError("\ud83d")).encode()
