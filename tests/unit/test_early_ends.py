"""Requests that end early, by a cancellation or a deadline: within a round, and with what has come."""

import pytest

from ssd_ray.config import SamplingParams
from tests.support.pump import Pump, Text, table_pair

LONG = SamplingParams(max_tokens=100, temperature=1.0, seed=3, ignore_eos=True)
PROMPT = [1, 2, 3]


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pump(clock):
    """Two requests run at a time, a third one waits."""
    target, drafts = table_pair(rows=2)
    return Pump(target, drafts, concurrency=2, clock=lambda: clock)


def submit(pump, number, **options):
    text = pump.texts[number] = Text()
    pump.target.submit(number, PROMPT, LONG, **options)
    return text


def counts(pump):
    stats = pump.target.stats()
    return stats.running, stats.waiting, stats.requests


def turn(pump, times=1):
    for _ in range(times):
        pump.turn()


def full_text():
    target, drafts = table_pair()
    return Pump(target, drafts).run(PROMPT, LONG).tokens


def end_by(way, pump, clock, number):
    """End the request, which was submitted with a deadline of 10 seconds."""
    if way == "timeout":
        clock.now = 10.0
    else:
        pump.target.cancel(number)


@pytest.mark.parametrize("way", ["timeout", "cancelled"])
def test_a_running_request_gives_its_row_to_the_next_within_a_round(pump, clock, way):
    ending, other, waiting = submit(pump, 1, timeout=10.0), submit(pump, 2), submit(pump, 3)
    turn(pump, 3)
    clock.now = 9.9
    turn(pump)
    assert counts(pump) == (2, 1, 0)
    end_by(way, pump, clock, 1)
    turn(pump)
    assert counts(pump) == (2, 0, 1)
    assert ending.finish_reason == way
    assert ending.tokens == full_text()[: len(ending.tokens)]
    assert 0 < ending.stats.tokens == len(ending.tokens) < 100
    turn(pump, 120)
    assert other.tokens == waiting.tokens == full_text()
    assert counts(pump) == (0, 0, 3)


@pytest.mark.parametrize("way", ["timeout", "cancelled"])
def test_a_waiting_request_leaves_the_queue_within_a_round(pump, clock, way):
    others = [submit(pump, number) for number in (1, 2)]
    turn(pump)
    ending = submit(pump, 3, timeout=10.0)
    last = submit(pump, 4)
    turn(pump)
    assert counts(pump) == (2, 2, 0)
    end_by(way, pump, clock, 3)
    turn(pump)
    assert counts(pump) == (2, 1, 1)
    assert (ending.finish_reason, ending.tokens, ending.stats.prompt_tokens) == (way, [], 3)
    turn(pump, 250)
    assert [text.tokens for text in (*others, last)] == [full_text()] * 3


def test_a_request_that_never_came_is_ended_too(pump):
    never = pump.texts[1] = Text()
    pump.target.cancel(1)
    turn(pump)
    assert (never.finish_reason, counts(pump)) == ("cancelled", (0, 0, 0))


def test_drafts_forget_a_request_that_has_ended_early(pump):
    submit(pump, 1)
    turn(pump, 3)
    assert len(pump.drafts[0].sequences) == 1
    pump.target.cancel(1)
    turn(pump, 2)
    assert len(pump.drafts[0].sequences) == 0


def test_a_request_that_has_ended_cannot_be_ended_again(pump, clock):
    text = submit(pump, 1, timeout=10.0)
    turn(pump, 120)
    assert (text.finish_reason, counts(pump)) == ("length", (0, 0, 1))
    pump.target.cancel(1)
    clock.now = 11.0
    turn(pump, 2)
    assert (text.finish_reason, counts(pump)) == ("length", (0, 0, 1))
