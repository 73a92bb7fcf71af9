"""Drafts that misbehave: the text stays, and the target soon stops waiting for them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod

import pytest

from ssd_ray.bench import rehearsal
from ssd_ray.bench.rehearsal import Play, Rehearsal
from ssd_ray.bench.simulate import Hardware
from ssd_ray.config import SamplingParams
from ssd_ray.models.table import TableModel
from ssd_ray.speculation.window import SCRATCH
from ssd_ray.stats import Stats
from ssd_ray.transport.channel import HUB, Channel
from ssd_ray.transport.memory import MemorySpoke
from ssd_ray.wire import Hello, Nodes, Open, Outcome, decode, encode
from tests.support.pump import SESSION, Pump

PROMPT = [1, 2, 3, 4, 5]
VOCABULARY = TableModel().vocab_size


class Scripted(ABC):
    """A draft that knows the protocol and nothing else; it answers every outcome with whatever its script says."""

    def __init__(self, channel: Channel, session: int = SESSION) -> None:
        self._channel = channel
        self._session = session
        self._dice = random.Random(1)
        self._next = 0
        self._send(Hello(channel.name))

    def turn(self, idle_seconds: float = 0.0) -> bool:
        while (received := self._channel.receive()) is not None:
            for message in decode(self._session, received[1]):
                if isinstance(message, Open | Outcome):
                    round = message.round + isinstance(message, Outcome)
                    self.answer(message.sequence, round, len(message.speculation))
        return False

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
        self._channel.send(HUB, encode(self._session, message))


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
    pump.drafts.append(script(MemorySpoke(pump.address, "scripted")))  # type: ignore[arg-type]
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


def speed(run: Rehearsal, params: SamplingParams) -> float:
    """Tokens per second in virtual time."""
    _, stats = run.run(PROMPT, params)
    return Stats(sums=stats).tokens_per_s


@pytest.mark.parametrize("backup", ["draft", "auto"])
@pytest.mark.parametrize(
    "script", [Garbage, WrongRound, Silent, None], ids=lambda script: getattr(script, "__name__", "slow")
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_misbehaviour_costs_less_than_a_tenth_of_plain_decoding(
    script: type[Scripted] | None, temperature: float, backup: str
) -> None:
    """``None`` is an honest draft of which one step takes as long as a verification, ten times what it should."""
    params = SamplingParams(temperature=temperature, max_tokens=180, seed=3)
    hardware = Hardware(verify_ms=20.0, step_ms=20.0, host_ms=0.5, message_ms=0.5)
    target = TableModel(scratch=SCRATCH)
    drafts = [] if script else [target.blurred(1.0)]
    run = Rehearsal(target, drafts, hardware, Play(target={"backup": backup}))
    if script is not None:
        part = run.stage.cast("scripted")
        part.player = script(part, rehearsal.SESSION)
    plain = Rehearsal(target, [], hardware, Play(method="ar"))
    assert speed(run, params) > 0.9 * speed(plain, params)


def test_a_misbehaving_draft_does_not_spoil_a_good_one() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=180, seed=3)
    target = TableModel()
    pump = Pump(target, [target.perturbed(0.9)], backup="draft")
    pump.drafts.insert(0, Garbage(MemorySpoke(pump.address, "scripted")))  # type: ignore[arg-type]
    stats = pump.run(PROMPT, params).stats
    assert pump.texts[1].tokens == alone(params)
    assert stats.hits > stats.rounds / 6
