"""The actors of one engine: launched, watched, replaced and stopped.

The ref of an actor's long ``run()`` call is its death sentinel: Ray resolves it within milliseconds when the process
dies. One that gets nothing done is as good as dead, and is ended: actors say what their loops have done, and are asked
every second. A dead draft is taken out of the pool, the engine goes on without it, and another one takes its place.
Where a target dies requests wait for the next one, which all drafts follow; if there can be none, that is the engine's
end. A spare target is loaded, and rests until it takes over.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any

import ray
from ray.exceptions import RayError

from ssd_ray.actors.pulse import Pulse
from ssd_ray.cluster.calls import call, deferred, get, own_error, pass_on
from ssd_ray.cluster.placement import Place, Placer, Role
from ssd_ray.cluster.preflight import Fingerprints
from ssd_ray.cluster.processes import Contact, DraftProcess, TargetProcess
from ssd_ray.cluster.refs import CONCURRENCY_GROUPS
from ssd_ray.cluster.tries import Tries
from ssd_ray.cluster.watch import LOOK_SECONDS, Watch
from ssd_ray.config import EngineConfig
from ssd_ray.errors import EngineClosedError, EngineError, SsdRayError
from ssd_ray.tracing import Lane

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0
"""How long an actor may take to leave by itself."""


TRACE_SECONDS = 10.0
"""How long actors that have left may take to hand over what they did; a trace goes on without it."""


CONNECT_SECONDS = 5.0
"""How long to wait for the first message of a draft that is ready; only a warning follows."""


COMPILING = 10.0
"""How many times more patience loops are owed that may have to compile a shape in the middle of their work."""


FAILURES = (SsdRayError, RayError)
"""What may keep an actor from starting."""


@dataclass(slots=True, eq=False)
class Member:
    """One actor of an engine."""

    name: str
    handle: Any
    place: Place
    tries: Tries
    watch: Watch
    asked: Any = None  # ObjectRef of what it says of itself
    sentinel: Any = None  # ObjectRef of run()
    running_since: float = 0.0
    leaving: bool = False  # its end is expected
    gone: bool = False  # its place has been taken back
    contact: Contact | None = None  # of a target
    lanes: Sequence[Lane] | None = None  # what it did, for a trace, once it has left in order

    @property
    def ran(self) -> float:
        """Seconds for which it has run."""
        return monotonic() - self.running_since if self.sentinel is not None else 0.0


@dataclass(frozen=True, slots=True)
class _Ended:
    member: Member
    error: SsdRayError


class Supervisor:
    """Keeps the target, its spares and the pool of drafts.

    Args:
        config: what the actors load.
        fingerprints: of the models that they may load.
        placer: where they may run.
        on_target: told, from any thread, how the target is reached, and, when it has died, that there is none now.
        on_failure: told why, from another thread, when a target has died and there will be no other.

    Attributes:
        draft_restarts, target_restarts: drafts and targets that have died and were replaced.
    """

    def __init__(
        self,
        config: EngineConfig,
        fingerprints: Fingerprints,
        placer: Placer,
        on_target: Callable[[Contact | None], None],
        on_failure: Callable[[EngineError], None],
    ) -> None:
        self._config = config
        self._fingerprints = fingerprints
        self._placer = placer
        self._on_target = on_target
        self._on_failure = on_failure
        self._target: Member | None = None
        self._drafts: list[Member] = []
        self._spares: list[Member] = []
        self._loading: list[Member] = []
        self._traced: list[Member] = []  # that have run, if a trace is wanted
        self._wanted = 0  # drafts, those that are replaced now included
        self._launched = self._launched_spares = 0
        self.draft_restarts = self.target_restarts = 0
        self._scaling = threading.Lock()  # one change of the pool at a time
        self._changing = threading.Lock()  # guards who is there
        self._closing = threading.Event()
        self._events: SimpleQueue[_Ended | None] = SimpleQueue()
        self._background: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._watch, name="ssd-ray-supervisor", daemon=True)
        self._thread.start()

    @property
    def drafts(self) -> tuple[str, ...]:
        """Names of the drafts in the pool."""
        with self._changing:
            return tuple(member.name for member in self._drafts)

    @property
    def spares(self) -> int:
        """Targets that are loaded and wait."""
        return len(self._spares)

    @property
    def members(self) -> dict[str, Any]:
        """Actor handles by name: "target", "draft-0", "spare-0" and so on."""
        with self._changing:
            return {member.name: member.handle for member in self._running}

    @property
    def traces(self) -> list[tuple[str, Sequence[Lane] | None]]:
        """Of each actor that has run its name and what it did; None if it has not left in order. For a trace."""
        return [(member.name, member.lanes) for member in self._traced]

    @property
    def _running(self) -> list[Member]:
        return [*self._targets, *self._drafts, *self._spares]

    @property
    def _targets(self) -> list[Member]:
        return [] if self._target is None else [self._target]

    def start(self, drafts: int) -> None:
        """Launch the target and the first drafts; spares load later, while requests run.

        Raises:
            SsdRayError: what went wrong, in the actor's own words. :meth:`close` stops what has been started.
        """
        with self._scaling:
            self._wanted = drafts
            target = self._launch("target", "target", TargetProcess)
            pending: list[Member] = []
            try:
                # Their processes start, and import what they need, while the target loads.
                pending = self._launch_drafts(drafts)
                self._load_target(target)
                self._install(target)
                self._join(pending)
            except BaseException:
                self._stop([target, *pending])
                raise
        for _ in range(self._config.spare_targets):
            self._later(0.0, self._start_spare, Tries(self._config.max_restarts))

    def scale_drafts(self, count: int) -> None:
        """Launch or stop drafts until there are ``count``, the youngest first; return when new ones are ready.

        Drafts that die later are replaced, so that there are as many again.

        Raises:
            SsdRayError: a new draft did not start; none of the new ones joins the pool then.
        """
        with self._scaling:
            before, self._wanted = self._wanted, count
            missing = count - len(self.drafts)
            if missing < 0:
                self._stop(self._drafts[count:])
            elif missing > 0:
                added = self._launch_drafts(missing)
                try:
                    self._join(added)
                except BaseException:
                    self._wanted = before
                    self._stop(added)
                    raise

    def hand_out(self, sequence: int, prompt: Any) -> list[str]:
        """Give every draft a prompt that is in the object store, without waiting for anything; their names."""
        with self._changing:
            drafts = list(self._drafts)
        for draft in drafts:
            call(draft.handle.give, sequence, prompt)
        return [draft.name for draft in drafts]

    def close(self) -> None:
        """Stop all actors; idempotent."""
        self._closing.set()
        here = ray.is_initialized()  # else they have ended with it
        with self._changing:
            loading = list(self._loading)
        for member in loading if here else ():  # who waits for it goes on
            ray.kill(member.handle)
        self._events.put(None)
        for thread in [self._thread, *self._background]:
            if threading.current_thread() is not thread:  # a forgotten engine is closed by whichever thread notices
                thread.join()
        with self._scaling:
            if here:
                self._stop(self._drafts)
                self._stop([*self._targets, *self._spares])
            self._target = None

    # Actors that start

    def _launch(self, name: str, role: Role, kind: type, tries: Tries | None = None) -> Member:
        """Make the actor's process; nothing is loaded yet."""
        place = self._placer.place(role)
        actor = ray.remote(concurrency_groups=CONCURRENCY_GROUPS, max_restarts=0)(deferred(kind))
        handle = actor.options(**place.options()).remote()
        patience = self._config.stall_timeout * (COMPILING if self._config.compile else 1.0)
        member = Member(name, handle, place, tries or Tries(self._config.max_restarts), Watch(patience))
        with self._changing:
            self._loading.append(member)
        if self._closing.is_set():  # close() may have looked before
            self._remove(member)
            raise EngineClosedError("the engine is closed")
        return member

    def _launch_drafts(self, count: int, tries: Tries | None = None) -> list[Member]:
        launched: list[Member] = []
        try:
            for _ in range(count):
                launched.append(self._launch(f"draft-{self._launched}", "draft", DraftProcess, tries))
                self._launched += 1
        except BaseException:
            self._stop(launched)
            raise
        return launched

    def _load_target(self, target: Member) -> None:
        """Load a target, which can be reached then."""
        logger.info("loading the target")
        one_node = sum(node["Alive"] for node in ray.nodes()) == 1
        session = secrets.randbits(53)
        users = [os.getuid()]  # the driver's, should the actors' be another
        pass_on(get(self._load(target, session=session, one_node=one_node, users=users), target.name))
        target.contact = Contact(target.handle, get(target.handle.address.remote(), target.name), session)

    def _install(self, target: Member) -> None:
        """Let a target that is loaded be the engine's."""
        with self._changing:
            self._target = target
            for draft in self._drafts:
                self._introduce(draft, target)
        self._run(target)
        self._on_target(target.contact)

    def _join(self, drafts: Sequence[Member]) -> None:
        """Load drafts, all at once, and let them take part."""
        if drafts:
            logger.info("loading %s", "the draft" if len(drafts) == 1 else f"{len(drafts)} drafts")
        loads = {self._load(draft, name=draft.name): draft.name for draft in drafts}
        while loads:  # the first that fails is told at once, while others load
            (load, *_), _ = ray.wait(list(loads))
            pass_on(get(load, loads.pop(load)))
        for draft in drafts:
            with self._changing:
                self._drafts.append(draft)
                followed = [self._introduce(draft, target) for target in self._targets]
            self._run(draft)
            for ref in followed:
                get(ref, draft.name)
        self._wait_until_known({draft.name for draft in drafts})

    @staticmethod
    def _introduce(draft: Member, target: Member) -> Any:
        """Let a draft follow a target; the ref of its consent."""
        target.handle.attach.remote(draft.name, draft.handle)
        return draft.handle.follow.remote(target.contact)

    def _wait_until_known(self, drafts: set[str]) -> None:
        """Wait for the drafts' first messages, so that the next request finds them at work."""
        deadline = monotonic() + CONNECT_SECONDS
        while self._targets and not drafts <= self._known():
            if monotonic() > deadline:
                logger.warning("not all of %s have reached the target yet", ", ".join(sorted(drafts)))
                return
            sleep(0.01)

    def _known(self) -> set[str]:
        """The drafts that the target has heard of: none if there is no target now."""
        known: set[str] = set()
        with suppress(RayError):
            for target in self._targets:
                known.update(ray.get(target.handle.stats.remote(), timeout=CONNECT_SECONDS).drafts)
        return known

    def _load(self, member: Member, **arguments: Any) -> Any:
        """Let an actor load its model; the ref of what it warns of."""
        return member.handle.start.remote(
            self._config, fingerprints=self._fingerprints, cores=member.place.cores, **arguments
        )

    def _run(self, member: Member) -> None:
        """Let an actor's loop begin, unless it runs already, as that of a spare does."""
        if member.sentinel is not None:
            return
        with self._changing:
            self._loading.remove(member)
        member.running_since = monotonic()
        if self._config.trace is not None:
            self._traced.append(member)
        member.sentinel = member.handle.run.remote()
        member.sentinel.future().add_done_callback(partial(self._note_end, member))

    # Actors that end

    def _stop(self, members: Sequence[Member]) -> None:
        """Let actors leave; end those that do not."""
        with self._changing:
            members = list(members)
            self._drafts = [draft for draft in self._drafts if draft not in members]
            self._spares = [spare for spare in self._spares if spare not in members]
        for member in members:
            member.leaving = True
        running = [member for member in members if member.sentinel is not None]
        for member in running:
            member.handle.stop.remote()
        if running:
            sentinels = [member.sentinel for member in running]
            left, _ = ray.wait(sentinels, num_returns=len(sentinels), timeout=STOP_SECONDS)
            self._collect([member for member in running if member.sentinel in left])
        for member in members:
            self._remove(member)

    def _collect(self, members: Sequence[Member]) -> None:
        """Take what actors that have left have noted for a trace, while their processes are still there."""
        if self._config.trace is None or not members:
            return
        asked = {call(member.handle.lanes): member for member in members}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=TRACE_SECONDS)
        for ref in answered:
            with suppress(RayError):  # it has died meanwhile
                asked[ref].lanes = ray.get(ref)

    def _remove(self, member: Member) -> None:
        """End an actor for good, if it has not, and take back its place."""
        with self._changing:
            if member.gone:
                return
            member.gone = True
            self._loading = [other for other in self._loading if other is not member]
            others = [target for target in self._targets if target is not member]
        ray.kill(member.handle)
        for target in others:
            target.handle.detach.remote(member.name)
        self._placer.release(member.place)

    def _note_end(self, member: Member, run: Any) -> None:
        error = run.exception()
        words = own_error(error, member.name) if error else EngineError(f"{member.name} stopped by itself")
        self._events.put(_Ended(member, words))

    def _watch(self) -> None:
        """Handle the ends of actors, one after the other, until close(); meanwhile look whether the others get on."""
        while True:
            try:
                event = self._events.get(timeout=LOOK_SECONDS)
            except Empty:
                with suppress(RayError):  # Ray may end at any time, and the engine with it
                    self._look()
                continue
            if event is None:
                return
            if not event.member.leaving:
                self._handle_end(event.member, event.error)

    def _look(self) -> None:
        """End actors that make no progress."""
        with self._changing:
            members = self._running
        if not members or not ray.is_initialized():
            return
        for member in members:
            member.asked = member.asked or call(member.handle.pulse)
        answered, _ = ray.wait([member.asked for member in members], num_returns=len(members), timeout=0)
        for member in members:
            silent_s = member.watch.look(self._pulse(member) if member.asked in answered else None)
            if silent_s is not None:
                member.leaving = True  # the end that comes of this needs no other words
                self._handle_end(member, EngineError(f"{member.name} has made no progress for {silent_s:.0f} seconds"))

    @staticmethod
    def _pulse(member: Member) -> Pulse | None:
        answer, member.asked = member.asked, None
        with suppress(RayError):  # it has died, and the news of it are on their way
            return ray.get(answer)  # type: ignore[no-any-return]
        return None

    def _handle_end(self, member: Member, error: SsdRayError) -> None:
        if member is self._target:
            self._replace_target(member, error)
            return
        with self._changing:
            pool = next((pool for pool in (self._drafts, self._spares) if member in pool), None)
            if pool is None:
                return
            pool.remove(member)
        self._remove(member)
        replace = self._replace_draft if pool is self._drafts else self._replace_spare
        replace(error, member.tries, member.ran)

    # Those that take the places of others

    def _replace_target(self, dead: Member, error: SsdRayError) -> None:
        """Start a target in place of one that has died, as long as there are tries."""
        first, ran = error, dead.ran
        self._on_target(None)
        with self._changing:
            self._target = None
        self._remove(dead)
        while (delay := dead.tries.next(ran)) is not None:
            logger.warning("%s; requests wait for another target", error)
            self._closing.wait(delay)
            target = self._take_spare(dead.tries)
            try:
                if target is None:
                    target = self._launch("target", "target", TargetProcess, dead.tries)
                    self._load_target(target)
                self._install(target)
            except FAILURES as again:
                self._stop([target] if target else [])
                error, ran = own_error(again, "target"), 0.0
                if not self._closing.is_set():
                    continue
            else:
                self.target_restarts += 1
                logger.info("another target goes on with what was under way")
            return
        failure = in_vain(first, error, dead.tries)
        logger.error("%s", failure)
        self._on_failure(failure)

    def _take_spare(self, tries: Tries) -> Member | None:
        """A target that is loaded, if there is one; another spare is started in its place."""
        with self._changing:
            target = self._spares.pop(0) if self._spares and not self._closing.is_set() else None
        if target is not None:
            self._later(0.0, self._start_spare, target.tries)
            target.name, target.tries, target.running_since = "target", tries, monotonic()
        return target

    def _replace_spare(self, error: SsdRayError, tries: Tries, ran: float) -> None:
        """Start a spare target in place of one that has died, or did not start, as long as there are tries."""
        delay = tries.next(ran)
        if delay is None:
            logger.warning("%s; it is not started again, as max_restarts=%d has it", error, tries.most)
            return
        logger.warning("%s; it is replaced", error)
        self._later(delay, self._start_spare, tries)

    def _start_spare(self, tries: Tries) -> None:
        spare = None
        try:
            spare = self._launch(f"spare-{self._launched_spares}", "target", TargetProcess, tries)
            self._launched_spares += 1
            self._load_target(spare)
        except FAILURES as error:
            self._stop([spare] if spare else [])
            if not self._closing.is_set():
                self._replace_spare(own_error(error, "a spare target"), tries, 0.0)
            return
        with self._changing:
            self._spares.append(spare)
        self._run(spare)
        logger.info("%s is loaded", spare.name)

    def _replace_draft(self, error: SsdRayError, tries: Tries, ran: float) -> None:
        """Start a draft in place of one that has died, or did not start, as long as there are tries."""
        delay = tries.next(ran)
        left = len(self.drafts)
        if delay is None:
            self._wanted = max(left, self._wanted - 1)
            logger.warning(
                "%s; it is not started again, as max_restarts=%d has it, and %d drafts are left: texts stay the same, "
                "speed does not",
                error,
                tries.most,
                left,
            )
            return
        logger.warning("%s; %d drafts are left until it is replaced: texts stay the same", error, left)
        self._later(delay, self._start_draft, tries)

    def _start_draft(self, tries: Tries) -> None:
        with self._scaling:
            if self._closing.is_set() or len(self.drafts) >= self._wanted:
                return
            launched: list[Member] = []
            try:
                launched = self._launch_drafts(1, tries)
                self._join(launched)
            except FAILURES as error:
                self._stop(launched)
                if not self._closing.is_set():
                    self._replace_draft(own_error(error, "a draft"), tries, 0.0)
                return
        self.draft_restarts += 1
        logger.info("%s is there in place of one that died", launched[0].name)

    def _later(self, delay: float, start: Callable[[Tries], None], tries: Tries) -> None:
        """Start something after a while, in a thread of its own."""

        def wait_and_start() -> None:
            self._closing.wait(delay)
            start(tries)

        thread = threading.Thread(target=wait_and_start, name="ssd-ray-starting", daemon=True)
        thread.start()
        with self._changing:
            self._background = [*filter(threading.Thread.is_alive, self._background), thread]


def in_vain(first: SsdRayError, last: SsdRayError, tries: Tries) -> EngineError:
    """Why there is no target any more: what befell the one before, and why no other could take its place."""
    if first is not last:
        return EngineError(f"{first}; no other could take its place: {last}")
    return EngineError(f"{first}; it is not started again, as max_restarts={tries.most} has it")
