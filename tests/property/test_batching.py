"""Many requests at once: whatever arrives, leaves, is cancelled or has to give its memory back, every text is
the one that the request has alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_ray.actors import uplink
from ssd_ray.actors.verifying import MOST_TOKENS
from ssd_ray.config import SamplingParams
from ssd_ray.models.reach import EVERYTHING, Reach
from ssd_ray.models.table import TableModel
from ssd_ray.sampling.rejection import Proposing
from ssd_ray.speculation.window import SCRATCH
from ssd_ray.transport import memory
from ssd_ray.wire import Close, decode
from tests.support.pump import SESSION, LossyHub, Pump, Text

MODEL = {"vocab_size": 24, "contexts": 256, "order": 2, "max_length": 192, "sharpness": 3.0}
PREFIX = [5, 4, 3, 2] * 12


def prompt(dice: random.Random) -> list[int]:
    """Short, long, and with a beginning that others have, too."""
    own = [dice.randrange(24) for _ in range(dice.choice([1, 3, 20, 70]))]
    return PREFIX[: dice.choice([0, 16, 48])] + own


def request(dice: random.Random) -> tuple[list[int], SamplingParams]:
    params = SamplingParams(
        temperature=dice.choice([0.0, 1.0]), max_tokens=dice.randrange(1, 50), seed=dice.randrange(1000)
    )
    return prompt(dice), params


SIGHTS: dict[str, dict[str, object]] = {
    "all": {},
    "windows": {"order": None, "reaches": [Reach(20)]},
    "windows and all": {"order": None, "reaches": [Reach(20), EVERYTHING]},
    "all and chunks": {"order": None, "reaches": [EVERYTHING, Reach(24, chunked=True)]},
}


def pump(
    rows: int,
    drafts: int,
    pages: int | None,
    draft_pages: int | None = None,
    sight: str = "all",
    **options: object,
) -> Pump:
    model = MODEL | SIGHTS[sight]
    target = TableModel(rows=rows, scratch=8, pages=pages, **model)  # type: ignore[arg-type]
    model = TableModel(rows=rows, scratch=SCRATCH, pages=draft_pages, **model)  # type: ignore[arg-type]
    models = [model.perturbed(0.8, seed) for seed in range(drafts)]
    return Pump(target, models, concurrency=rows, **options)  # type: ignore[arg-type]


ALONE = {sight: pump(1, 0, None, sight=sight, lookahead=0, prefix_cache=False) for sight in SIGHTS}


def alone(tokens: list[int], params: SamplingParams, sight: str = "all") -> list[int]:
    return ALONE[sight].run(tokens, params).tokens


def drain(engine: Pump, numbers: set[int], turns: int = 20_000) -> None:
    for _ in range(turns):
        if all(engine.texts.get(number, Text()).finish_reason for number in numbers):
            return
        engine.turn()
        engine.validate()
    raise TimeoutError("some request did not end")


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([1, 2, 5]),
    drafts=st.integers(0, 2),
    pages=st.sampled_from([13, 20, None]),
    chunk=st.sampled_from([8, 32, 256]),
    caching=st.booleans(),
    trouble=st.sampled_from([0.0, 0.1]),
    sight=st.sampled_from([*SIGHTS]),
)
def test_every_text_is_the_one_of_the_request_alone(
    seed: int,
    rows: int,
    drafts: int,
    pages: int | None,
    chunk: int,
    caching: bool,
    trouble: float,
    sight: str,
) -> None:
    dice = random.Random(seed)
    engine = pump(
        rows,
        drafts,
        pages,
        dice.choice([24, 40, None]),
        sight,
        prefill_chunk=chunk,
        prefix_cache=caching,
        trouble=trouble,
        seed=seed,
        draft_turns=lambda: dice.randrange(5),
    )
    requests = [request(dice) for _ in range(8)]
    cancelled = set()
    for number, (tokens, params) in enumerate(requests):
        engine.target.submit(number, tokens, params)
        for _ in range(dice.choice([0, 0, 1, 9])):
            engine.turn()
        if dice.random() < 0.2:
            victim = dice.randrange(number + 1)
            engine.target.cancel(victim)
            cancelled.add(victim)
    drain(engine, set(range(len(requests))))
    for number, (tokens, params) in enumerate(requests):
        text, expected = engine.texts[number], alone(tokens, params, sight)
        if text.finish_reason == "cancelled":
            assert number in cancelled
            assert text.tokens == expected[: len(text.tokens)]
        else:
            assert text.tokens == expected
    stats = engine.target.stats()
    assert stats.kv_pages_free == stats.kv_pages > 0


def test_a_full_pool_takes_turns_and_all_end() -> None:
    """Twelve pages hold one text of full length, and there are six of them."""
    engine = pump(6, 1, 13)
    params = SamplingParams(temperature=1.0, max_tokens=1000, ignore_eos=True)
    for number in range(6):
        engine.target.submit(number, [number, 7], replace(params, seed=number))
    drain(engine, set(range(6)))
    assert engine.target.stats().preemptions > 0
    for number in range(6):
        text = engine.texts[number]
        assert text.finish_reason == "length"
        assert len(text.tokens) == 190
        assert text.tokens == alone([number, 7], replace(params, seed=number))


@pytest.mark.parametrize(("sight", "pages"), [("windows", 12), ("windows and all", 28)])
def test_a_long_text_behind_windows_takes_memory_for_the_windows_alone(sight: str, pages: int) -> None:
    """Twelve pages of 16 hold two windows of 20 and what is written beside them, and not one text of 190; where some
    layers see everything, theirs hold two texts."""
    engine = pump(2, 1, pages, sight=sight, prefill_chunk=16)
    params = SamplingParams(temperature=1.0, max_tokens=1000, ignore_eos=True)
    windowed, most = engine.target.batch.pool.pools[0], 0
    requests = [([number, 7] * 60, replace(params, seed=number)) for number in range(2)]
    for number, (tokens, each) in enumerate(requests):
        engine.target.submit(number, tokens, each)
    while len(engine.texts) < 2 or not all(text.finish_reason for text in engine.texts.values()):
        engine.turn()
        most = max(most, sum(len(lease.pages) - lease.first for lease in windowed._leases))
    assert most <= 2 * 6
    stats = engine.target.stats()
    assert stats.preemptions == 0
    assert stats.sums.tree_used > 0
    for number, (tokens, each) in enumerate(requests):
        assert engine.texts[number].tokens == alone(tokens, each, sight)


def test_a_text_that_goes_on_finds_its_window() -> None:
    sight = "windows and all"
    engine = pump(1, 1, None, sight=sight)
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    tokens = [1, 2, 3] * 20
    for number in range(3):
        text = engine.run(tokens, params, number)
        assert text.tokens == alone(tokens, params, sight)
        assert text.stats.cached_tokens == ((len(tokens) - 2) // 16 * 16 if number else 0)
        tokens = [*tokens, *text.tokens, 9]


def test_what_was_decoded_is_written_again_as_it_was_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """By verifications, so that it has the same bits in half precision, too: prefills round otherwise."""
    engine = pump(6, 1, 13, prefill_chunk=32, prefix_cache=False, lookahead=7)
    prefill, append = engine.target._runner.prefill, engine.target._runner.append
    ends, again = set(), set()

    def watched_prefill(row: int, tokens: Sequence[int], start: int = 0) -> None:
        ends.add(start + len(tokens))
        prefill(row, tokens, start)

    def watched_append(
        rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[torch.Tensor]:
        # No verification with this lookahead has as many.
        again.update(start for some, start in zip(tokens, starts, strict=True) if len(some) == MOST_TOKENS)
        return append(rows, tokens, starts)

    monkeypatch.setattr(engine.target.batch._runner, "prefill", watched_prefill)
    monkeypatch.setattr(engine.target.batch._runner, "append", watched_append)
    params = SamplingParams(temperature=1.0, max_tokens=1000, ignore_eos=True)
    for number in range(6):
        engine.target.submit(number, [number, *range(20)], replace(params, seed=number))
    drain(engine, set(range(6)))
    assert engine.target.stats().preemptions > 0
    assert max(ends) == 20
    assert min(again) == 20
    for number in range(6):
        assert engine.texts[number].tokens == alone([number, *range(20)], replace(params, seed=number))


def test_a_long_prompt_does_not_stall_the_others() -> None:
    engine = pump(2, 0, None, prefill_chunk=16, lookahead=0)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    engine.target.submit(1, [1], params)
    engine.turn()
    engine.target.submit(2, [2] * 120, params)
    before = len(engine.texts[1].tokens)
    while 2 not in engine.texts:
        engine.turn()
    assert len(engine.texts[1].tokens) - before >= 120 // 16


def test_a_chat_that_grows_does_not_prefill_its_past_again() -> None:
    engine = pump(1, 1, None)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    tokens = [1, 2, 3] * 10
    for number in range(3):
        text = engine.run(tokens, params, number)
        assert text.stats.cached_tokens == ((len(tokens) - 2) // 16 * 16 if number else 0)
        tokens = [*tokens, *text.tokens, 9]
    assert engine.drafts[0].pool.cached(tokens) > 0


def test_requests_with_equal_beginnings_share_pages_while_they_run() -> None:
    engine = pump(4, 1, None)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    engine.target.submit(0, [*PREFIX, 1], params)
    for _ in range(2):
        engine.turn()
    for number in range(1, 4):
        engine.target.submit(number, [*PREFIX, number + 1], params)
    engine.turn()
    pages = [row.lease.leases[0].pages[:3] for row in engine.target.batch.rows if row.lease]
    assert len(pages) == 4
    assert all(each == pages[0] for each in pages)
    drain(engine, set(range(4)))
    for number in range(4):
        assert engine.texts[number].tokens == alone([*PREFIX, number + 1], params)


class Forgetful(LossyHub):
    """Loses the first word that a sequence has ended."""

    def __init__(self, hub: LossyHub) -> None:
        self.__dict__ = hub.__dict__
        self._ended: set[int] = set()

    def send(self, peer: str, frame: bytes) -> bool:
        ended = {message.sequence for message in decode(SESSION, frame) if isinstance(message, Close)}
        lost = ended - self._ended
        self._ended |= ended
        return bool(lost) or super().send(peer, frame)


def test_a_draft_that_missed_the_end_of_requests_has_room_for_others() -> None:
    engine = pump(2, 1, None)
    links = engine.target._links
    links.channel = Forgetful(links.channel)  # type: ignore[arg-type]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    for number in range(6):
        assert engine.run([number, 3], params, number).stats.tree_tokens > 0


def test_laws_of_many_rows_that_no_frame_holds_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pump(4, 1, None, proposing=Proposing())
    params = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True)
    for module in (uplink, memory):
        monkeypatch.setattr(module, "MAX_FRAME_BYTES", 1500)
    for number in range(4):
        engine.target.submit(number, [number, 3], replace(params, seed=number))
    drain(engine, set(range(4)))
    assert all(engine.texts[number].stats.tree_tokens > 0 for number in range(4))
    assert engine.drafts[0]._uplink.channel.dropped == 0


def test_figures_count_a_request_once_whenever_they_are_asked_for() -> None:
    """They come from another thread, also while a request is on its way from one place to the next."""
    engine = pump(rows=1, drafts=0, pages=None)
    counts: list[int] = []
    threads: list[Thread] = []

    def ask() -> None:
        stats = engine.target.stats()
        counts.append(stats.requests + stats.running + stats.waiting)

    def asked_behind(owner: object, name: str) -> None:
        call = getattr(owner, name)

        def called(*arguments: object) -> object:
            result = call(*arguments)
            threads.append(Thread(target=ask))
            threads[-1].start()
            threads[-1].join(0.05)
            return result

        setattr(owner, name, called)

    for owner, name in ((engine.target, "_row"), (engine.target.batch, "add"), (engine.target.batch, "remove")):
        asked_behind(owner, name)
    engine.run([1, 2, 3], SamplingParams(max_tokens=2))
    for thread in threads:
        thread.join()
    assert counts == [1] * 3
