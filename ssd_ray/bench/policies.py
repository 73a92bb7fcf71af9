"""Fan-out policies on the same rounds: how many outcomes each would have prepared for at equal budgets.

Target and draft run in one process, in turn, with as many draft steps a verification as asked for, so that nothing
depends on the machine. What the draft knew of each round is written down, and every policy is then led through the
same rounds, learning as it goes: the differences are the policies' alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ssd_ray.actors.drafting import Draft
from ssd_ray.actors.verifying import DRIVER, Target
from ssd_ray.config import SamplingParams
from ssd_ray.models.contract import ModelRunner
from ssd_ray.saguaro.fanout import POLICIES, Auto, FanOutPolicy, Situation
from ssd_ray.transport.channel import Channel
from ssd_ray.transport.memory import MemoryHub, MemorySpoke
from ssd_ray.wire import Output, RequestStats, decode

_SESSION = 1


@dataclass(frozen=True, slots=True)
class Record:
    """A round as its draft saw it, and how it ended."""

    situation: Situation
    accepted: int
    rank: int | None


class Recorder(Auto):
    """A policy that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Record] = []

    def observe(self, situation: Situation, accepted: int, rank: int | None) -> None:
        super().observe(situation, accepted, rank)
        self.records.append(Record(situation, accepted, rank))


class Meanwhile(ModelRunner):
    """A target's runner that lets the draft work while it verifies."""

    def __init__(self, runner: ModelRunner, work: Callable[[], None]) -> None:
        self.rows, self.slots, self.max_length = runner.rows, runner.slots, runner.max_length
        self.vocab_size, self.dtype, self.device = runner.vocab_size, runner.dtype, runner.device
        self._runner, self._work = runner, work

    def extent(self, needed: int) -> int:
        return self._runner.extent(needed)

    def extend(self, rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, visible: Tensor) -> Tensor:
        return self._runner.extend(rows, tokens, positions, slots, visible)

    def append(self, rows: Sequence[int], tokens: Tensor, starts: Sequence[int]) -> Tensor:
        self._work()
        return self._runner.append(rows, tokens, starts)

    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> None:
        self._runner.prefill(row, tokens, start)

    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        self._runner.move(row, source, destination)


class Rehearsal:
    """A target and a draft in one process, in turn.

    Args:
        target, draft: their models.
        steps: draft steps during a verification.
        text_lookup: see :class:`~ssd_ray.config.EngineConfig`.
    """

    def __init__(self, target: ModelRunner, draft: ModelRunner, *, steps: int = 6, text_lookup: bool = True) -> None:
        self.recorder = Recorder()
        hub = MemoryHub()
        self._driver: Channel = MemorySpoke(hub.address, DRIVER)
        channel = MemorySpoke(hub.address, "draft")
        self._draft = Draft(draft, channel, _SESSION, lambda: self.recorder, text_lookup=text_lookup)
        self._steps = steps
        self._target = Target(Meanwhile(target, self._work), hub, _SESSION, backup="none")
        self._number = 0
        self._draft.turn(0.0)

    def run(self, prompt: Sequence[int], params: SamplingParams) -> RequestStats:
        """Decode one prompt; its figures."""
        self._number += 1
        self._target.submit(self._number, prompt, params)
        while True:
            self._target.turn(0.0)
            while (received := self._driver.receive()) is not None:
                output = decode(_SESSION, received[1])
                if isinstance(output, Output) and output.stats is not None:
                    return output.stats

    def _work(self) -> None:
        for _ in range(self._steps):
            self._draft.turn(0.0)


def replay(policy: FanOutPolicy, records: Sequence[Record], budgets: Sequence[int]) -> list[float]:
    """Lead a policy through the rounds; the share of outcomes that it would have prepared for under each budget."""
    places = []
    for record in records:
        places.append(policy.place(record.situation, record.accepted, record.rank))
        policy.observe(record.situation, record.accepted, record.rank)
    return [sum(place is not None and place < budget for place in places) / len(places) for budget in budgets]


def compare_policies(records: Sequence[Record], budgets: Sequence[int]) -> dict[str, list[float]]:
    """Hit rates of all policies on the same rounds, by name, one for each budget."""
    return {name: replay(policy(), records, budgets) for name, policy in POLICIES.items()}
