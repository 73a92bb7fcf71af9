"""A target and its drafts in one process and in virtual time.

Everything is real, the loops, the protocol, the models, but the clock: a forward takes as long as it is said to take,
and a draft's forwards run beside the target's. So a run does not depend on the machine and its noise, repeats to the
last bit, and answers what other hardware would do: policies, waits and plans are compared by it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import inf
from statistics import median
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from ssd_ray.actors.drafting import Draft
from ssd_ray.actors.process import BUDGET
from ssd_ray.actors.verifying import DRIVER, Target
from ssd_ray.bench.simulate import Hardware
from ssd_ray.config import MAX_LOOKAHEAD, SamplingParams
from ssd_ray.models.contract import ModelRunner
from ssd_ray.saguaro.fanout import POLICIES, FanOutPolicy
from ssd_ray.sampling.rejection import Proposing
from ssd_ray.transport.channel import HUB, Channel, Frame
from ssd_ray.wire import Output, RequestStats, decode

SESSION = 1

HOST_MS, MESSAGE_MS = 0.6, 0.3
"""What the loop around a verification takes, and a message's way there and back, on a machine of today."""


class Hooked(ModelRunner):
    """A runner that tells of its forwards: ``on_append(rows)`` before a verification, ``on_extend(tokens)`` after a
    step."""

    def __init__(
        self,
        runner: ModelRunner,
        on_append: Callable[[int], None] = lambda rows: None,
        on_extend: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.rows, self.slots, self.max_length = runner.rows, runner.slots, runner.max_length
        self.vocab_size, self.dtype, self.device = runner.vocab_size, runner.dtype, runner.device
        self.page_slots, self.num_pages, self.page_bytes = runner.page_slots, runner.num_pages, runner.page_bytes
        self._runner, self._on_append, self._on_extend = runner, on_append, on_extend

    def extent(self, needed: int) -> int:
        return self._runner.extent(needed)

    def padded(self, tokens: int) -> int:
        return self._runner.padded(tokens)

    def bind(self, row: int, first: int, pages: Sequence[int]) -> None:
        self._runner.bind(row, first, pages)

    def extend(self, rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, visible: Tensor) -> Tensor:
        logits = self._runner.extend(rows, tokens, positions, slots, visible)
        self._on_extend(tokens.numel())
        return logits

    def append(self, rows: Sequence[int], tokens: Tensor, starts: Sequence[int]) -> Tensor:
        self._on_append(len(rows))
        return self._runner.append(rows, tokens, starts)

    def prefill(self, row: int, tokens: Sequence[int], start: int = 0) -> None:
        self._runner.prefill(row, tokens, start)

    def move(self, row: int, source: Sequence[int], destination: Sequence[int]) -> None:
        self._runner.move(row, source, destination)


class Turning(Protocol):
    """What a draft is here: something that takes turns; a turn says whether a step ran."""

    def turn(self, idle_seconds: float = 0.0) -> bool: ...


class Absent:
    """Nobody."""

    def turn(self, idle_seconds: float = 0.0) -> bool:
        return False


class Part(Channel):
    """One draft's place: its own time, which is ahead of the target's while a step runs, and its frames.

    Frames arrive ``delay`` seconds after they were sent.
    """

    def __init__(self, stage: Stage, name: str, delay: float) -> None:
        self.name = name
        self.now = 0.0
        self.inbox: deque[tuple[float, Frame]] = deque()
        self.player: Turning = Absent()
        self.resting = False  # nothing to do before another frame arrives
        self._stage = stage
        self._delay = delay

    def clock(self) -> float:
        """This draft's time in seconds."""
        return self.now

    def play(self, until: float) -> None:
        """Take one turn; without work go on to the next frame, though not beyond ``until``, or rest."""
        if not self.player.turn(0.0):
            self.resting = not self.inbox
            if self.inbox:
                self.now = max(self.now, min(until, self.inbox[0][0]))

    def deliver(self, time: float, frame: Frame) -> None:
        """Note a frame of the target that arrives at that time."""
        self.inbox.append((time, frame))
        self.now = max(self.now, self._stage.now)
        self.resting = False

    def send(self, peer: str, frame: bytes) -> bool:
        self._stage.arrive(self.now + self._delay, self.name, frame)
        return peer == HUB

    def receive(self, timeout: float = 0.0) -> tuple[str, Frame] | None:
        if self.inbox and self.inbox[0][0] <= self.now:
            return HUB, self.inbox.popleft()[1]
        return None

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


class Stage(Channel):
    """The target's channel and its time.

    Args:
        delay: seconds that a frame takes from the target to a draft, or back.
        host: seconds of a round's other work.
        meanwhile: drafts work while the target verifies, not only while it waits for them.
    """

    def __init__(self, *, delay: float, host: float, meanwhile: bool) -> None:
        self.name = HUB
        self.now = 0.0
        self.outputs: deque[Output] = deque()
        self.parts: dict[str, Part] = {}
        self._delay, self._host = delay, host
        self._owed = 0.0  # seconds of other work in this round
        self._meanwhile = meanwhile
        self._arriving: list[tuple[float, int, str, Frame]] = []
        self._tie = count()

    def clock(self) -> float:
        """The target's time in seconds."""
        return self.now

    def cast(self, name: str) -> Part:
        """A place for another draft."""
        part = self.parts[name] = Part(self, name, self._delay)
        part.now = self.now
        return part

    def arrive(self, time: float, sender: str, frame: Frame) -> None:
        """Note a frame of a draft that arrives at that time."""
        heappush(self._arriving, (time, next(self._tie), sender, frame))

    def elapse(self, seconds: float) -> None:
        """Let the target be busy, and the drafts meanwhile."""
        self.now += seconds
        for part in self.parts.values():
            while self._meanwhile and not part.resting and part.now < self.now:
                part.play(self.now)
            part.now = max(part.now, self.now)

    def verify(self, seconds: float) -> None:
        """Let the target verify; the round's other work is done when its tokens are sent."""
        self._owed = self._host
        self.elapse(seconds)

    def send(self, peer: str, frame: bytes) -> bool:
        if peer == DRIVER:
            self.outputs.extend(output for output in decode(SESSION, frame) if isinstance(output, Output))
            owed, self._owed = self._owed, 0.0
            self.elapse(owed)
        elif peer in self.parts:
            self.parts[peer].deliver(self.now + self._delay, frame)
        return True

    def receive(self, timeout: float = 0.0) -> tuple[str, Frame] | None:
        arrival = self._wait(self.now + timeout)
        if not self._arriving or arrival > self.now + timeout:
            self.now += timeout if self._meanwhile else 0.0  # else nobody works and nothing will ever come
            return None
        self.now = max(self.now, arrival)
        _, _, sender, frame = heappop(self._arriving)
        return sender, frame

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _wait(self, deadline: float) -> float:
        """When the next frame arrives, if by the deadline: until then the drafts play, in the order of their times."""
        while True:
            arrival = self._arriving[0][0] if self._arriving else inf
            horizon = min(arrival, deadline)
            part = min((part for part in self.parts.values() if not part.resting), key=Part.clock, default=None)
            if part is None or part.now >= horizon:
                return arrival
            part.play(horizon)


@dataclass(frozen=True, slots=True)
class Play:
    """How to decode.

    Attributes:
        method: "ssd", "sd" or "ar".
        policy: makes a draft's fan-out policy.
        budget: guesses of a round.
        strict: no more than these; else as many as there is time for.
        proposing: how tokens are drawn in rejection mode; None is coupled mode.
        text_lookup: drafts heed the text.
        target: further arguments of :class:`~ssd_ray.actors.verifying.Target`.
    """

    method: str = "ssd"
    policy: Callable[[], FanOutPolicy] = POLICIES["auto"]
    budget: int = 16
    strict: bool = False
    proposing: Proposing | None = None
    text_lookup: bool = True
    target: dict[str, Any] = field(default_factory=dict)


class Rehearsal:
    """A target and drafts in one process.

    Args:
        target, drafts: their models; "ar" uses no draft and "sd" one.
        hardware: what takes how long.
        play: how to decode.
    """

    def __init__(
        self, target: ModelRunner, drafts: Sequence[ModelRunner], hardware: Hardware, play: Play = Play()
    ) -> None:
        self.hardware = hardware
        ssd = play.method == "ssd"
        delay = 1e-3 * hardware.message_ms / 2 if ssd else 0.0
        self.stage = Stage(delay=delay, host=1e-3 * hardware.host_ms, meanwhile=ssd)
        options = {"patient": play.method == "sd"} | play.target
        if play.method == "ar":
            options, drafts = options | {"lookahead": 0}, []
        if play.proposing is not None:
            options["sampler"] = "rejection"
        runner = Hooked(target, on_append=self._verify)
        self.target = Target(runner, self.stage, SESSION, clock=self.stage.clock, **options)
        self._lookahead: int = options.get("lookahead", MAX_LOOKAHEAD)
        for number, draft in enumerate(drafts[: None if ssd else 1]):
            self.join(f"draft-{number}", draft, play)
        self._number = 0

    def join(self, name: str, runner: ModelRunner, play: Play) -> None:
        """Add a draft."""
        part = self.stage.cast(name)

        def step(tokens: int) -> None:
            part.now += 1e-3 * self.hardware.step(tokens)

        part.player = Draft(
            Hooked(runner, on_extend=step),
            part,
            SESSION,
            play.policy,
            width=min(BUDGET, play.budget),
            lookahead=self._lookahead,
            branching=play.method == "ssd",
            proposing=play.proposing,
            budget=play.budget,
            strict=play.strict,
            text_lookup=play.text_lookup,
            clock=part.clock,
        )
        part.player.turn(0.0)  # it says hello

    def run(self, prompt: Sequence[int], params: SamplingParams) -> tuple[list[int], RequestStats]:
        """Decode one prompt; its tokens and figures, whose milliseconds are virtual."""
        (result,) = self.run_all([(prompt, params)])
        return result

    def run_all(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[tuple[list[int], RequestStats]]:
        """Decode prompts together; the tokens and figures of each."""
        self.stage.elapse(1e-3 * self.hardware.message_ms)  # whoever has just come is heard
        first = self._number + 1
        for prompt, params in requests:
            self._number += 1
            self.target.submit(self._number, prompt, params)
        texts: dict[int, list[int]] = {number: [] for number in range(first, self._number + 1)}
        figures: dict[int, RequestStats] = {}
        while len(figures) < len(requests):
            self.target.turn(0.0)
            while self.stage.outputs:
                output = self.stage.outputs.popleft()
                texts[output.request] += output.tokens
                if output.stats is not None:
                    figures[output.request] = output.stats
        return [(tokens, figures[number]) for number, tokens in texts.items()]

    def _verify(self, rows: int) -> None:
        self.stage.verify(1e-3 * self.hardware.verify(rows))


class _Timed(Hooked):
    """A target's runner whose verifications are timed, in milliseconds of this machine."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        self.ms: list[float] = []

    def append(self, rows: Sequence[int], tokens: Tensor, starts: Sequence[int]) -> Tensor:
        start = perf_counter()
        logits = super().append(rows, tokens, starts)
        self.ms.append(1e3 * (perf_counter() - start))
        return logits


class _TimedTurns:
    """A draft whose steps are timed, all that belongs to them included."""

    def __init__(self, player: Turning) -> None:
        self._player = player
        self.ms: list[float] = []

    def turn(self, idle_seconds: float = 0.0) -> bool:
        start = perf_counter()
        stepped = self._player.turn(idle_seconds)
        if stepped:
            self.ms.append(1e3 * (perf_counter() - start))
        return stepped


def measure(target: ModelRunner, draft: ModelRunner, prompt: Sequence[int], *, max_tokens: int = 64) -> Hardware:
    """What verifications and draft steps take on this machine, wide steps and narrow ones."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    timed = _Timed(target)
    steps = {}
    for width in (1, BUDGET):
        rehearsal = Rehearsal(timed, [draft], Hardware(verify_ms=10.0, step_ms=1.0), Play(budget=width))
        (part,) = rehearsal.stage.parts.values()
        part.player = turns = _TimedTurns(part.player)
        rehearsal.run(prompt, params)
        steps[width] = median(turns.ms)
    wider = max(0.0, steps[BUDGET] - steps[1]) / (BUDGET - 1)
    return Hardware(median(timed.ms), steps[1], HOST_MS, MESSAGE_MS, wider)
