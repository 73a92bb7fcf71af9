"""A target and its drafts in one thread, over memory channels, with a schedule that the test chooses."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from ssd_ray.actors.batch import Batch
from ssd_ray.actors.drafting import Draft
from ssd_ray.actors.links import DRIVER
from ssd_ray.actors.verifying import Target
from ssd_ray.bench.rehearsal import Hooked
from ssd_ray.config import SamplingParams
from ssd_ray.models.contract import ModelRunner
from ssd_ray.models.table import TableModel
from ssd_ray.saguaro.fanout import Histogram
from ssd_ray.sampling.rejection import Proposing
from ssd_ray.speculation.window import SCRATCH
from ssd_ray.tracing import Lane, Recorder
from ssd_ray.transport.channel import HUB
from ssd_ray.transport.memory import MemoryAddress, MemoryHub, MemorySpoke
from ssd_ray.wire import Output, RequestStats, TokenLogprobs, decode

SESSION = 7


@dataclass
class Text:
    """What came out of one request."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stats: RequestStats = field(default_factory=RequestStats)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: str | None = None


def ticking() -> Callable[[], float]:
    """A clock on which every look takes a millisecond."""
    ticks = count()
    return lambda: 1e-3 * next(ticks)


class LossyHub(MemoryHub):
    """A hub whose drafts' frames, both ways, are lost, repeated, delayed and mixed with garbage.

    Who waits for a frame lets others work.
    """

    def __init__(self, address: MemoryAddress, dice: random.Random, trouble: float, work: Callable[[], None]) -> None:
        super().__init__(address)
        self._work = work
        self._dice = dice
        self._trouble = trouble
        self._held: list[tuple[str, bytes]] = []

    def send(self, peer: str, frame: bytes) -> bool:
        if peer == DRIVER:
            return super().send(peer, frame)
        if self._dice.random() < self._trouble:
            return True  # lost, and the sender does not know
        sent = super().send(peer, frame)
        if self._dice.random() < self._trouble:
            super().send(peer, frame)
        return sent

    def receive(self, timeout: float = 0.0) -> tuple[str, bytes] | None:
        if timeout > 0.0:
            self._work()
        received = super().receive(0.0)
        if received is None:
            return self._held.pop(self._dice.randrange(len(self._held))) if self._held else None
        if self._dice.random() >= self._trouble:
            return received
        match self._dice.randrange(5):
            case 0:
                return self.receive()  # lost
            case 1:
                self._held += [received, received]  # repeated, late
            case 2:
                self._held.append(received)  # late
            case 3:
                return received[0], received[1][: self._dice.randrange(len(received[1]))]
            case _:
                return received[0], garbage(received[1], self._dice)
        return self.receive()


def garbage(frame: bytes, dice: random.Random) -> bytes:
    """The frame with some bytes changed: often still a message, with other numbers."""
    changed = bytearray(frame)
    for _ in range(dice.randrange(1, 6)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed)


class Pump:
    """Runs a target and drafts turn by turn: the drafts take their turns while the target verifies.

    Args:
        target: the target's model.
        drafts: the drafts' models.
        draft_turns: how many turns a draft gets during a verification.
        trouble: probability that something happens to a frame.
        proposing: how drafts draw their tokens in rejection mode; None is coupled mode.
        clock: makes the clock of each part. With the default a run repeats to the last token, and drafting costs the
            target no time, though it is done in its thread.
        trace: note what each part does.
    """

    def __init__(
        self,
        target: ModelRunner,
        drafts: Sequence[ModelRunner],
        *,
        draft_turns: Callable[[], int] = lambda: 6,
        trouble: float = 0.0,
        seed: int = 0,
        width: int = 8,
        proposing: Proposing | None = None,
        clock: Callable[[], Callable[[], float]] = ticking,
        trace: bool = False,
        **options: object,
    ) -> None:
        self._hub = lambda address: LossyHub(address, random.Random(seed), trouble, self._run_drafts)
        self._options = options
        if proposing is not None:
            options["sampler"] = "rejection"
        self._proposing = proposing
        self._clock = clock
        self._recorders: list[Recorder] | None = [] if trace else None
        self._width, self._draft_turns = width, draft_turns
        self.session = SESSION
        self._start(target)
        self.drafts = [self._draft(f"draft-{number}", model) for number, model in enumerate(drafts)]
        self.texts: dict[int, Text] = {}
        self._requests: dict[int, tuple[Sequence[int], SamplingParams]] = {}

    def _start(self, model: ModelRunner) -> None:
        """Make a target, and an address of its own."""
        self.address = MemoryAddress()
        self.driver = MemorySpoke(self.address, DRIVER)
        runner = Hooked(model, on_append=lambda rows, tokens: self._run_drafts())
        timed = self._timed(HUB)
        self.target = Target(runner, self._hub(self.address), self.session, **timed, **self._options)  # type: ignore[arg-type]

    def _timed(self, name: str) -> dict[str, Any]:
        """The clock of a part, and what notes its events."""
        clock = self._clock()
        if self._recorders is None:
            return {"clock": clock}
        self._recorders.append(Recorder(name, clock))
        return {"clock": clock, "trace": self._recorders[-1]}

    @property
    def traces(self) -> list[tuple[str, list[Lane]]]:
        """What each part did, as actors hand it over."""
        lanes = [recorder.lane for recorder in self._recorders or ()]
        return [(lane.name, [lane]) for lane in lanes]

    def lose_target(self, model: ModelRunner) -> None:
        """Throw the target away, with all that it has not handed out. Another one, of this model, goes on with what
        the texts lack."""
        self.session += 1
        self._start(model)
        for draft in self.drafts:
            draft.follow(MemorySpoke(self.address, draft.name), self.session)
        for number, (prompt, params) in self._requests.items():
            text = self.texts.setdefault(number, Text())
            if text.finish_reason is None:
                self.target.submit(number, prompt, params, text=text.tokens)

    def submit(self, number: int, prompt: Sequence[int], params: SamplingParams) -> Text:
        """Hand a request to the target; what comes of it."""
        self._requests[number] = prompt, params
        self.target.submit(number, prompt, params)
        return self.texts.setdefault(number, Text())

    def _draft(self, name: str, model: ModelRunner) -> Draft:
        return Draft(
            model,
            MemorySpoke(self.address, name),
            self.session,
            Histogram,
            width=self._width,
            proposing=self._proposing,
            **self._timed(name),
        )

    def join(self, name: str, model: ModelRunner) -> Draft:
        """Add a draft while requests run."""
        self.drafts.append(self._draft(name, model))
        return self.drafts[-1]

    def turn(self) -> None:
        """One turn of the target. Whenever a text has ended, no page of KV is lost or has two owners."""
        if not self.target.turn(0.0):
            self._run_drafts()
        self.deliver()

    def deliver(self) -> None:
        """Take what the target has handed out."""
        while (received := self.driver.receive()) is not None:
            for output in decode(self.session, received[1]):
                if isinstance(output, Output):
                    self._take(output)

    def validate(self) -> None:
        """Check the page pools of all."""
        for part in (self.target.batch, *self.drafts):
            if isinstance(part, Batch | Draft):  # others are no drafts of ours
                part.pool.validate()

    def _take(self, output: Output) -> None:
        text = self.texts.setdefault(output.request, Text())
        if text.finish_reason is not None:  # a driver drops it, too
            assert not output.tokens
            return
        text.tokens += output.tokens
        text.logprobs += output.logprobs
        text.finish_reason = output.finish_reason or text.finish_reason
        text.stats = output.stats or text.stats
        text.error = output.error or text.error
        if output.finish_reason is not None:
            self.validate()

    def _run_drafts(self) -> None:
        for draft in self.drafts:
            for _ in range(self._draft_turns()):
                draft.turn(0.0)

    def run(self, prompt: Sequence[int], params: SamplingParams, number: int = 1) -> Text:
        """Run one request to its end."""
        return self.run_all([(prompt, params)], number)[0]

    def run_all(self, requests: Sequence[tuple[Sequence[int], SamplingParams]], number: int = 1) -> list[Text]:
        """Run requests, which get this number and the next ones, to their ends."""
        texts = []
        for each, (prompt, params) in enumerate(requests, number):
            self.texts[each] = Text()
            texts.append(self.submit(each, prompt, params))
        for _ in range(10_000):
            if all(text.finish_reason is not None for text in texts):
                return texts
            self.turn()
        raise TimeoutError("some request did not end")


def table_pair(agreement: float = 0.8, drafts: int = 1, **options: int) -> tuple[TableModel, list[TableModel]]:
    """A target and drafts of table models; drafts agree with the target in a fraction of contexts."""
    target = TableModel(scratch=SCRATCH, **options)  # type: ignore[arg-type]
    return target, [target.perturbed(agreement) for _ in range(drafts)]
