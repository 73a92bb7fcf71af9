"""Faults under running requests: processes that stand still or are killed, drafts that come and go.

A few texts are written first, undisturbed. Then clients ask for them again and again, several at once, while one fault
comes after the other. What must not be: a text that has become another one, a request that ends with an error, or a
process that outlives the engine. What a user sees of a fault is a text that stands still for a while.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from random import Random
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

from psutil import NoSuchProcess, Process, wait_procs

from ssd_ray.bench.prompts import any_params, any_prompt
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import SsdRayError

if TYPE_CHECKING:
    from ssd_ray.llm import LLM

Progress = Callable[[str], None]

KINDS = {
    "a draft stands still": 50,
    "the target stands still": 40,
    "a draft is killed": 4,
    "the target is killed": 2,
    "drafts are scaled": 4,
}
"""Faults, and how often of a hundred each is chosen."""

STILL_SECONDS = 0.01, 2.0
"""How long a process stands still at least and at most; the logarithm of it is uniform."""

TOKENS = 24, 120
"""Tokens of a text at least and at most."""

LEAVE_SECONDS = 10.0
"""How long processes may take to be gone once the engine is closed."""

ANSWER_SECONDS = 5.0
"""How long an actor that is about to be disturbed may take to say which process it is."""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it.

    Attributes:
        faults: how many there were of each kind.
        seconds: from the first to the last, and until all texts had ended.
        texts: that came to their end, ``changed`` those that were not what they are without faults.
        lost: requests that ended with an error, by its words.
        refused: changes of the pool that failed, since the draft that was to come was harmed, by the words.
        still_ms: milliseconds for which texts stood still at most: the median, the 99th percentile, the longest.
        draft_restarts, target_restarts: that were replaced.
        left: processes that outlived the engine.
    """

    faults: dict[str, int]
    seconds: float
    texts: int
    changed: int
    lost: dict[str, int]
    refused: dict[str, int]
    still_ms: tuple[float, float, float]
    draft_restarts: int
    target_restarts: int
    left: int

    @property
    def held(self) -> bool:
        """Whether nobody noticed, but by the clock."""
        return not (self.changed or self.lost or self.left) and self.texts > 0


@dataclass(frozen=True, slots=True)
class _Case:
    prompt: Sequence[int]
    params: SamplingParams
    tokens: Sequence[int]


class _Clients:
    """Threads that ask for texts, each for one after the other, until they are told to end."""

    def __init__(self, llm: LLM, cases: Sequence[_Case], count: int, seed: int) -> None:
        self.texts = self.changed = 0
        self.lost: Counter[str] = Counter()
        self.still: list[float] = []
        self._llm, self._cases = llm, cases
        self._ended, self._counting = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=[Random(f"{seed} {n}")]) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Wait for the texts under way; no others begin."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self, dice: Random) -> None:
        while not self._ended.is_set():
            case = dice.choice(self._cases)
            try:
                still, changed = self._read(case)
            except SsdRayError as error:
                with self._counting:
                    self.lost[str(error)] += 1
                self._ended.wait(0.1)  # an engine that has failed refuses at once
                continue
            with self._counting:
                self.texts, self.changed = self.texts + 1, self.changed + changed
                self.still.append(still)

    def _read(self, case: _Case) -> tuple[float, bool]:
        """Milliseconds for which a text stood still at most, and whether it is another one."""
        last, still = perf_counter(), 0.0
        stream = self._llm.stream(case.prompt, case.params)
        for _ in stream:
            now = perf_counter()
            last, still = now, max(still, now - last)
        return 1e3 * still, stream.wait().token_ids != case.tokens


class _Faults:
    """Disturbs an engine's actors.

    Args:
        llm: the engine.
        most_drafts: drafts that there may be.
        dice: chooses everything.
    """

    def __init__(self, llm: LLM, most_drafts: int, dice: Random) -> None:
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._llm, self._most, self._dice = llm, most_drafts, dice
        self._processes: dict[Any, Process] = {}  # by actor
        self._scaling: threading.Thread | None = None
        self._timers: list[threading.Timer] = []

    def next(self) -> None:
        """Do one fault; of what is not there now, nothing is done, and it does not count."""
        kind = self._dice.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "drafts are scaled":
            done = self._scale()
        else:
            done = self._harm("draft-" if "draft" in kind else "target", killed="killed" in kind)
        self.counts[kind] += done

    def end(self) -> None:
        """Wait for what is under way."""
        for each in filter(None, [self._scaling, *self._timers]):
            each.join()

    def left(self, seconds: float) -> int:
        """How many of the processes are still there after so many seconds at most."""
        _, alive = wait_procs(list(self._processes.values()), timeout=seconds)
        return len(alive)

    def _scale(self) -> bool:
        if self._scaling is not None and self._scaling.is_alive():
            return False
        count = self._dice.randint(0, self._most)
        self._scaling = threading.Thread(target=self._scale_to, args=[count])
        self._scaling.start()
        return True

    def _scale_to(self, count: int) -> None:
        try:
            self._llm.scale_drafts(count)
        except SsdRayError as error:
            self.refused[str(error)] += 1

    def _harm(self, name: str, *, killed: bool) -> bool:
        actors = [handle for each, handle in self._llm._engine.driver.actors.items() if each.startswith(name)]
        if not actors or (process := self._process(self._dice.choice(actors))) is None:
            return False
        try:
            process.kill() if killed else process.suspend()
        except NoSuchProcess:
            return False
        if not killed:
            low, high = STILL_SECONDS
            self._later(low * (high / low) ** self._dice.random(), process)
        return True

    def _later(self, seconds: float, process: Process) -> None:
        def go_on() -> None:
            with suppress(NoSuchProcess):
                process.resume()

        self._timers = [timer for timer in self._timers if timer.is_alive()]
        self._timers.append(threading.Timer(seconds, go_on))
        self._timers[-1].start()

    def _process(self, actor: Any) -> Process | None:
        """The process of an actor; None if it does not say so."""
        import ray
        from ray.exceptions import RayError

        if actor not in self._processes:
            with suppress(RayError, NoSuchProcess):
                info = ray.get(actor.info.remote(), timeout=ANSWER_SECONDS)
                self._processes[actor] = Process(info["pid"])
        return self._processes.get(actor)


def chaos(
    config: EngineConfig,
    texts: Sequence[Sequence[int]],
    faults: int,
    *,
    every_s: float = 0.5,
    most_drafts: int = 2,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> Report:
    """Disturb an engine so many times, or until a request is lost, while it serves ``max_num_seqs`` clients.

    Args:
        config: the engine; its method is ``ssd``, and all that dies is replaced, however often.
        texts: token ids of which prompts are parts.
        faults: how many.
        every_s: seconds between two faults, on average.
        most_drafts: drafts that there may be, beside one another.
        seed: of everything that is chosen here; what comes of it hangs on the machine's timing, too.

    Raises:
        EngineError: the engine has failed for good.
    """
    # Imported late: the command line is to be quick without Ray.
    from ssd_ray.llm import LLM

    dice = Random(seed)
    progress("starting")
    with LLM(**asdict(replace(config, max_restarts=max(faults, config.max_restarts)))) as llm:
        progress("writing the texts undisturbed")
        cases = _cases(llm, texts, dice)
        clients, trouble = _Clients(llm, cases, config.max_num_seqs, seed), _Faults(llm, most_drafts, dice)
        start = perf_counter()
        try:
            while (done := sum(trouble.counts.values())) < faults and not clients.lost:
                progress(f"{done} of {faults} faults, {clients.texts} texts, {clients.changed} changed")
                sleep(dice.expovariate(1.0 / every_s))
                trouble.next()
        finally:
            trouble.end()
            clients.end()
        seconds, stats = perf_counter() - start, llm.stats()
    return Report(
        dict(trouble.counts),
        seconds,
        clients.texts,
        clients.changed,
        dict(clients.lost),
        dict(trouble.refused),
        _spread(clients.still),
        stats.draft_restarts,
        stats.target_restarts,
        trouble.left(LEAVE_SECONDS),
    )


def _cases(llm: LLM, texts: Sequence[Sequence[int]], dice: Random) -> list[_Case]:
    """Two requests for each client, and what comes of them undisturbed."""
    asked = [(any_prompt(texts, dice), any_params(dice, TOKENS)) for _ in range(2 * llm.config.max_num_seqs)]
    outputs = llm.generate(*zip(*asked, strict=True), progress=False)
    return [_Case(*each, output.token_ids) for each, output in zip(asked, outputs, strict=True)]


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, the 99th percentile and the largest."""
    if not values:
        return 0.0, 0.0, 0.0
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], ordered[-1]
