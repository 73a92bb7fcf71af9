"""Prompts that drafts are given by another way than the target's messages: before, after, never or wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssd_ray.actors import handover
from ssd_ray.actors.handover import Handover
from ssd_ray.config import SamplingParams
from ssd_ray.wire import Lost, Open, decode
from tests.support.pump import SESSION, Pump, Text, table_pair

PROMPT = [token % 23 for token in range(90)]
NUMBERS = st.integers(0, 5)


def opened(sequence: int, omitted: int) -> Open:
    return Open(sequence, 0, [*range(omitted, 5)], [], SamplingParams(), prompt_tokens=5, omitted=omitted)


def tokens_of(here: Handover) -> dict[int, list[int]]:
    return {message.sequence: message.tokens for message in here.take()}


@pytest.mark.parametrize("first", ["prompt", "message"])
def test_whichever_comes_first_waits_for_the_other(first: str) -> None:
    halves: list[Callable[[Handover], None]] = [lambda it: it.give(7, range(3)), lambda it: it.put(opened(7, 3))]
    here = Handover()
    for half in halves if first == "prompt" else reversed(halves):
        assert tokens_of(here) == {}
        half(here)
    assert tokens_of(here) == {7: [0, 1, 2, 3, 4]}
    assert len(here) == 0


def test_a_prompt_of_another_length_is_no_half() -> None:
    here = Handover()
    here.give(7, range(4))
    here.put(opened(7, 3))
    assert tokens_of(here) == {}
    assert len(here) == 0


def test_a_prompt_that_comes_after_its_sequence_goes_with_the_next_one() -> None:
    here = Handover()
    here.put(opened(7, 3))
    here.drop(7)
    here.give(7, range(3))
    here.put(opened(8, 0))
    assert tokens_of(here) == {8: [0, 1, 2, 3, 4]}
    assert len(here) == 0


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("give"), NUMBERS, st.integers(0, 4)),
        st.tuples(st.just("put"), NUMBERS, st.integers(0, 4)),
        st.tuples(st.just("drop"), NUMBERS, st.just(0)),
    ),
    max_size=60,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS)
def test_what_comes_out_is_whole_and_what_stays_is_bounded(events: list[tuple[str, int, int]], monkeypatch) -> None:
    monkeypatch.setattr(handover, "MOST", 3)
    here = Handover()
    for kind, number, size in events:
        match kind:
            case "give":
                here.give(number, range(size))
            case "put":
                here.put(opened(number, size))
            case _:
                here.drop(number)
        taken = tokens_of(here)
        assert all(tokens == [0, 1, 2, 3, 4] for tokens in taken.values())
        assert kind != "put" or size or number in taken
        assert len(here) <= 6


class Watched(Pump):
    """Remembers which messages opened sequences, and who was lost."""

    def __init__(self, drafts: int, **options: object) -> None:
        target, models = table_pair(0.9, drafts)
        super().__init__(target, models, **options)  # type: ignore[arg-type]
        self.opens: list[tuple[str, Open]] = []
        self.lost = 0
        hub = self.target._links.channel
        send, receive = hub.send, hub.receive

        def watched_send(peer: str, frame: bytes) -> bool:
            self.opens += [(peer, each) for each in decode(SESSION, frame) if isinstance(each, Open)]
            return send(peer, frame)

        def watched_receive(timeout: float = 0.0) -> tuple[str, bytes] | None:
            received = receive(timeout)
            if received is not None:
                self.lost += sum(isinstance(each, Lost) for each in decode(SESSION, received[1]))
            return received

        hub.send, hub.receive = watched_send, watched_receive  # type: ignore[method-assign]
        while len(self.target.stats().drafts) < drafts:
            self.turn()

    def run_held(self, params: SamplingParams, give: Callable[[int], None], number: int = 1) -> Text:
        """Run a request whose prompt the drafts have by ``give``, which is told the turn."""
        text = self.texts[number] = Text()
        give(-1)
        self.target.submit(number, PROMPT, params, holders=[draft.name for draft in self.drafts])
        for turn in range(10_000):
            if text.finish_reason is not None:
                return text
            self.turn()
            give(turn)
        raise TimeoutError


def alone(params: SamplingParams) -> Text:
    return Pump(table_pair()[0], []).run(PROMPT, params)


@settings(max_examples=12)
@given(
    moments=st.lists(st.sampled_from([-1, 0, 1, 3, None]), min_size=1, max_size=3),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_when_a_draft_is_given_its_prompt_does_not_change_the_text(
    moments: list[int | None], temperature: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=60, seed=seed)
    pump = Watched(len(moments), seed=seed)

    def give(turn: int) -> None:
        for draft, moment in zip(pump.drafts, moments, strict=True):
            if turn == moment:
                draft.give(1, PROMPT)

    text = pump.run_held(params, give)
    assert text.tokens == alone(params).tokens
    first = pump.opens[: len(moments)]
    assert all((each.tokens, each.omitted) == ([], len(PROMPT)) for _, each in first)
    for draft, moment in zip(pump.drafts, moments, strict=True):
        again = [each for name, each in pump.opens[len(moments) :] if name == draft.name]
        assert all(each.omitted == 0 for each in again)
        assert bool(again) == (moment is None or moment > 0)  # the first outcome tells who has nothing
    for _ in range(3):
        pump.turn()
    assert not any(draft.sequences or len(draft._handover) for draft in pump.drafts)


@pytest.mark.parametrize("given", [PROMPT, PROMPT[:-1], None])
def test_a_draft_without_its_prompt_asks_once_and_drafts(given: list[int] | None) -> None:
    pump = Watched(1)
    text = pump.run_held(
        SamplingParams(temperature=0.0, max_tokens=120),
        lambda turn: pump.drafts[0].give(1, given) if turn == -1 and given else None,
    )
    assert text.stats.hits > text.stats.rounds / 4
    assert pump.lost == (0 if given == PROMPT else 1)


def test_a_draft_that_joins_later_is_sent_everything() -> None:
    pump = Watched(1)
    params = SamplingParams(temperature=0.0, max_tokens=120)

    def give(turn: int) -> None:
        if turn == -1:
            pump.drafts[0].give(1, PROMPT)
        if turn == 3:
            pump.join("late", table_pair(0.9)[1][0])

    assert pump.run_held(params, give).tokens == alone(params).tokens
    (late,) = [each for name, each in pump.opens if name == "late"]
    assert late.omitted == 0
    assert late.tokens[: len(PROMPT)] == PROMPT
    assert pump.lost == 0


def test_prompts_of_requests_that_end_while_they_wait_are_dropped() -> None:
    pump = Watched(1, concurrency=1)
    (draft,) = pump.drafts
    for number in (1, 2):
        draft.give(number, PROMPT)
        pump.target.submit(number, PROMPT, SamplingParams(max_tokens=400), holders=[draft.name])
    for _ in range(3):
        pump.turn()
    assert (list(draft.sequences), len(draft._handover)) == ([1], 1)
    pump.target.cancel(2)
    for _ in range(3):
        pump.turn()
    assert (list(draft.sequences), len(draft._handover)) == ([1], 0)


def test_a_troubled_channel_does_not_change_the_text() -> None:
    for seed in range(4):
        params = SamplingParams(max_tokens=40, seed=seed)
        target, models = table_pair(0.8, 2)
        pump = Pump(target, models, trouble=0.3, seed=seed)
        for draft in pump.drafts:
            draft.give(1, PROMPT)
        pump.turn()
        pump.target.submit(1, PROMPT, params, holders=[draft.name for draft in pump.drafts])
        text = pump.texts[1] = Text()
        while text.finish_reason is None:
            pump.turn()
        assert text.tokens == alone(params).tokens
