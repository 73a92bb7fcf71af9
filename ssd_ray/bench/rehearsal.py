"""A target and its drafts in one process and in virtual time.

Everything is real, the loops, the protocol, the models, but the clock: a forward takes as long as it is said to take,
and a draft's forwards run beside the target's. So a run does not depend on the machine and its noise, repeats to the
last bit, and answers what other hardware would do: policies, waits and plans are compared by it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from heapq import heappop, heappush
from itertools import count
from math import inf
from statistics import median
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from ssd_ray.actors.drafting import Draft
from ssd_ray.actors.links import DRIVER
from ssd_ray.actors.process import BUDGET
from ssd_ray.actors.verifying import Target
from ssd_ray.bench.simulate import Hardware
from ssd_ray.config import MAX_LOOKAHEAD, SamplingParams
from ssd_ray.models.contract import ModelRunner, Wrapper
from ssd_ray.saguaro.costs import Measured
from ssd_ray.saguaro.fanout import POLICIES, FanOutPolicy
from ssd_ray.sampling.rejection import Proposing
from ssd_ray.transport.channel import HUB, Channel, Frame
from ssd_ray.wire import Output, RequestStats, decode

SESSION = 1

HOST_MS, MESSAGE_MS = 0.6, 0.3
"""What the loop around a verification takes, and a message's way there and back, on a machine of today."""


class Hooked(Wrapper):
    """A runner that tells of its forwards: ``on_append(rows, tokens)`` before a verification of so many tokens in all,
    ``on_extend(tokens)`` after a step."""

    def __init__(
        self,
        runner: ModelRunner,
        on_append: Callable[[int, int], None] = lambda rows, tokens: None,
        on_extend: Callable[[int], None] = lambda tokens: None,
        measured: Measured | None = None,
    ) -> None:
        super().__init__(runner)
        self.measured = measured
        self._on_append, self._on_extend = on_append, on_extend

    def bits(self, counts: Sequence[int]) -> list[bytes]:
        return []

    def extend(self, rows: Sequence[int], tokens: Tensor, positions: Tensor, slots: Tensor, visible: Tensor) -> Tensor:
        logits = super().extend(rows, tokens, positions, slots, visible)
        self._on_extend(tokens.numel())
        return logits

    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        self._on_append(len(rows), sum(map(len, tokens)))
        return super().append(rows, tokens, starts)


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
        self.busy_until = 0.0  # when its last step ends, or ended
        self.resting = False  # nothing to do before another frame arrives
        self._stage = stage
        self._delay = delay

    def clock(self) -> float:
        """This draft's time in seconds."""
        return self.now

    def work(self, seconds: float) -> None:
        """Let a step take its time."""
        self.now += seconds
        self.busy_until = self.now

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


class Stretch:
    """Some work of the target beside drafts that slow it down.

    Args:
        start: when it begins.
        seconds: what it takes alone.
        drag: by which fraction it takes longer while some draft works.

    Attributes:
        end: when it ends, by what is known of the drafts.
    """

    def __init__(self, start: float, seconds: float, drag: float) -> None:
        self.end = start + seconds
        self._known = start
        self._drag = drag

    def beside(self, start: float, end: float) -> None:
        """A draft works from start to end; to be told in the order of starts. Where several work, one counts."""
        start = max(start, self._known)
        if self._drag and end > start:
            within = min(end - start, (1.0 + self._drag) * max(0.0, self.end - start))
            self.end += within * self._drag / (1.0 + self._drag)
            self._known = end


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

    def elapse(self, seconds: float, drag: float = 0.0) -> None:
        """Let the target be busy, and the drafts meanwhile; while one of these works, the target's work progresses at
        1 / (1 + drag)."""
        stretch = Stretch(self.now, seconds, drag)
        for each in self.parts.values():
            stretch.beside(self.now, each.busy_until)
        while self._meanwhile and (part := self._earliest()) is not None and part.now < stretch.end:
            start = part.now
            part.play(stretch.end)
            stretch.beside(start, part.busy_until)
        self.now = stretch.end
        for each in self.parts.values():
            each.now = max(each.now, self.now)

    def verify(self, seconds: float, drag: float = 0.0) -> None:
        """Let the target verify; the round's other work is done when its tokens are sent."""
        self._owed = self._host
        self.elapse(seconds, drag)

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
            part = self._earliest()
            if part is None or part.now >= horizon:
                return arrival
            part.play(horizon)

    def _earliest(self) -> Part | None:
        """The draft whose time is the earliest of those that have something to do, or will have."""
        return min((part for part in self.parts.values() if not part.resting), key=Part.clock, default=None)


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


@dataclass(slots=True)
class Forwards:
    """What has been run.

    Attributes:
        verifications, rows, tokens: verifications, their rows and their tokens.
        steps, drafted: draft steps, and their tokens.
    """

    verifications: int = 0
    rows: int = 0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0

    def since(self, before: Forwards) -> Forwards:
        """What has been run since then."""
        return Forwards(*(getattr(self, each.name) - getattr(before, each.name) for each in fields(self)))

    def one_by_one_ms(self, hardware: Hardware) -> float:
        """Milliseconds, one forward after the other, with the other work of each round."""
        verifying = self.verifications * (hardware.verify_ms + hardware.host_ms)
        verifying += (self.rows - self.verifications) * hardware.row_ms
        verifying += (self.tokens - self.verifications) * hardware.verify_token_ms
        return verifying + self.steps_ms(hardware)

    def steps_ms(self, hardware: Hardware) -> float:
        """Milliseconds of the draft steps."""
        return self.steps * hardware.step_ms + (self.drafted - self.steps) * hardware.token_ms


class Rehearsal:
    """A target and drafts in one process.

    Args:
        target, drafts: their models; "ar" uses no draft and "sd" one.
        hardware: what takes how long.
        play: how to decode.

    Attributes:
        forwards: what has been run.
    """

    def __init__(
        self, target: ModelRunner, drafts: Sequence[ModelRunner], hardware: Hardware, play: Play = Play()
    ) -> None:
        self.hardware = hardware
        self.forwards = Forwards()
        ssd = play.method == "ssd"
        delay = 1e-3 * hardware.message_ms / 2 if ssd else 0.0
        self.stage = Stage(delay=delay, host=1e-3 * hardware.host_ms, meanwhile=ssd)
        options: dict[str, Any] = {
            "patient": play.method == "sd",
            "measured": hardware.verifications(target.rows),
        } | play.target
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
            self.forwards.steps += 1
            self.forwards.drafted += tokens
            part.work(1e-3 * self.hardware.step(tokens))

        part.player = Draft(
            Hooked(runner, on_extend=step, measured=self.hardware.steps()),
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
        texts: dict[int, list[int]] = {number: [] for number in self.submit(requests)}
        figures: dict[int, RequestStats] = {}
        while len(figures) < len(requests):
            for output in self.turn():
                texts[output.request] += output.tokens
                if output.stats is not None:
                    figures[output.request] = output.stats
        return [(tokens, figures[number]) for number, tokens in texts.items()]

    def submit(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> range:
        """Queue prompts; the numbers under which their tokens come."""
        self.stage.elapse(1e-3 * self.hardware.message_ms)  # whoever has just come is heard
        first = self._number + 1
        for prompt, params in requests:
            self._number += 1
            self.target.submit(self._number, prompt, params)
        return range(first, self._number + 1)

    def turn(self) -> list[Output]:
        """Run a round; what the driver is told in it."""
        self.target.turn(0.0)
        told = list(self.stage.outputs)
        self.stage.outputs.clear()
        return told

    def _verify(self, rows: int, tokens: int) -> None:
        self.forwards.verifications += 1
        self.forwards.rows += rows
        self.forwards.tokens += tokens
        self.stage.verify(1e-3 * self.hardware.verify(rows, tokens), self.hardware.drag)


class _Timed(Hooked):
    """A target's runner whose verifications are timed, in milliseconds of this machine."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        self.ms: list[float] = []

    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
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
