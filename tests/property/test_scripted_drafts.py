"""Drafts that misbehave: the text stays, and the target soon stops waiting for them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod

import pytest

from ssd_ray.config import SamplingParams
from ssd_ray.models.table import TableModel
from ssd_ray.transport.channel import HUB
from ssd_ray.transport.memory import MemorySpoke
from ssd_ray.wire import Hello, Nodes, Open, Outcome, decode, encode
from tests.support.pump import SESSION, Pump

PROMPT = [1, 2, 3, 4, 5]
VOCABULARY = TableModel().vocab_size


class Scripted(ABC):
    """A draft that knows the protocol and nothing else; it answers every outcome with whatever its script says."""

    def __init__(self, pump: Pump, name: str = "scripted") -> None:
        self.name = name
        self._channel = MemorySpoke(pump._address, name)
        self._dice = random.Random(1)
        self._next = 0
        self._send(Hello(name))

    def turn(self, idle_seconds: float = 0.0) -> None:
        while (received := self._channel.receive()) is not None:
            message = decode(SESSION, received[1])
            if isinstance(message, Open | Outcome):
                round = message.round + isinstance(message, Outcome)
                self.answer(message.sequence, round, len(message.speculation))

    @abstractmethod
    def answer(self, sequence: int, round: int, speculated: int) -> None:
        """React to what is verified now."""

    def push(self, sequence: int, round: int, depth: int) -> None:
        """A branch of random tokens for the outcome of that depth."""
        tokens = [self._dice.randrange(VOCABULARY) for _ in range(8)]
        first, self._next = self._next, self._next + 8
        parents = [-1 - depth, *range(first, first + 7)]
        self._send(Nodes(sequence, max(0, round), first, parents, tokens, step_ms=0.01))

    def _send(self, message: Hello | Nodes) -> None:
        self._channel.send(HUB, encode(SESSION, message))


class Garbage(Scripted):
    def answer(self, sequence: int, round: int, speculated: int) -> None:
        for depth in range(speculated + 1):
            self.push(sequence, round, depth)


class WrongRound(Scripted):
    def answer(self, sequence: int, round: int, speculated: int) -> None:
        for wrong in (round - 3, round - 1, round + 1, round + 100):
            self.push(sequence, wrong, self._dice.randrange(8))


class Silent(Scripted):
    def answer(self, sequence: int, round: int, speculated: int) -> None:
        pass


def alone(params: SamplingParams) -> list[int]:
    return Pump(TableModel(), [], backup="draft").run(PROMPT, params).tokens


@pytest.mark.parametrize(("script", "waits"), [(Garbage, 180), (WrongRound, 60), (Silent, 0)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_misbehaviour_changes_no_token(script: type[Scripted], waits: int, temperature: float) -> None:
    """Garbage that comes at once costs no time here, so nothing says how often it may be waited for."""
    params = SamplingParams(temperature=temperature, max_tokens=180, seed=3)
    pump = Pump(TableModel(), [], backup="draft")
    pump.drafts.append(script(pump))  # type: ignore[arg-type]
    stats = pump.run(PROMPT, params).stats
    assert pump.texts[1].tokens == alone(params)
    assert pump.target.stats().drafts == ("scripted",)
    assert stats.rounds <= 180
    assert stats.waits <= waits


def test_a_draft_ten_times_slower_is_taken_as_it_comes() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=180)
    target = TableModel()
    paces = {}
    for slowness in (1, 10):
        calls = iter(range(100_000))
        pump = Pump(target, [target.perturbed(0.9)], draft_turns=lambda: 6 if next(calls) % slowness == 0 else 0)  # noqa: B023
        text = pump.run(PROMPT, params)
        assert text.tokens == alone(params)
        paces[slowness] = text.stats.rounds
    assert paces[1] < paces[10] <= 180


def test_a_misbehaving_draft_does_not_spoil_a_good_one() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=180, seed=3)
    target = TableModel()
    pump = Pump(target, [target.perturbed(0.9)], backup="draft")
    pump.drafts.insert(0, Garbage(pump))  # type: ignore[arg-type]
    stats = pump.run(PROMPT, params).stats
    assert pump.texts[1].tokens == alone(params)
    assert stats.hits > stats.rounds / 6
