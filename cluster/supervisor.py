"""The actors of one engine: launched, watched and stopped.

The ref of an actor's long ``run()`` call is its death sentinel: Ray resolves it within milliseconds when the process
dies. A dead draft is taken out of the pool, and the engine goes on without it; a dead target is the engine's end.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from time import monotonic, sleep
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ssd_ray.cluster.placement import Place, Placer, Role
from ssd_ray.cluster.preflight import Fingerprints
from ssd_ray.cluster.processes import DraftProcess, TargetProcess
from ssd_ray.cluster.refs import CONCURRENCY_GROUPS
from ssd_ray.config import EngineConfig
from ssd_ray.errors import EngineError, ResourceError, SsdRayError

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0
"""How long an actor may take to leave by itself."""


CONNECT_SECONDS = 5.0
"""How long to wait for the first message of a draft that is ready; only a warning follows."""


@dataclass(slots=True, eq=False)
class Member:
    """One actor of an engine."""

    name: str
    handle: Any
    place: Place
    sentinel: Any = None  # ObjectRef of run()
    leaving: bool = False  # its end is expected


@dataclass(frozen=True, slots=True)
class _Ended:
    member: Member
    error: BaseException | None


class Supervisor:
    """Keeps the target and the pool of drafts.

    Args:
        config: what the actors load.
        fingerprints: of the models that they may load.
        session: the engine's number on the wire.
        placer: where they may run.
        on_failure: told why, from another thread, when the target dies.
    """

    def __init__(
        self,
        config: EngineConfig,
        fingerprints: Fingerprints,
        session: int,
        placer: Placer,
        on_failure: Callable[[EngineError], None],
    ) -> None:
        self._config = config
        self._fingerprints = fingerprints
        self._session = session
        self._placer = placer
        self._on_failure = on_failure
        self._target: Member | None = None
        self._address: Any = None
        self._drafts: list[Member] = []
        self._launched = 0
        self._scaling = threading.Lock()  # one change of the pool at a time
        self._changing = threading.Lock()  # guards _drafts
        self._events: SimpleQueue[_Ended | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="ssd-ray-supervisor", daemon=True)
        self._thread.start()

    @property
    def drafts(self) -> tuple[str, ...]:
        """Names of the drafts in the pool."""
        with self._changing:
            return tuple(member.name for member in self._drafts)

    @property
    def members(self) -> dict[str, Any]:
        """Actor handles by name, the target's included."""
        with self._changing:
            drafts = list(self._drafts)
        return {member.name: member.handle for member in [*([self._target] if self._target else []), *drafts]}

    def start(self, drafts: int) -> tuple[Any, Any]:
        """Launch the target and the first drafts; return the target's handle and the address of its channel.

        Raises:
            SsdRayError: what went wrong, in the actor's own words. :meth:`close` stops what has been started.
        """
        with self._scaling:
            self._target = self._launch("target", "target", TargetProcess)
            # Their processes start, and import what they need, while the target loads.
            pending = self._launch_drafts(drafts)
            try:
                self._start_target(self._target)
                self._join(pending)
            except BaseException:
                self._stop(pending)
                raise
            return self._target.handle, self._address

    def scale_drafts(self, count: int) -> None:
        """Launch or stop drafts until there are ``count``, the youngest first; return when new ones are ready.

        Raises:
            SsdRayError: a new draft did not start; none of the new ones joins the pool then.
        """
        with self._scaling:
            missing = count - len(self.drafts)
            if missing < 0:
                self._stop(self._drafts[count:])
            elif missing > 0:
                added = self._launch_drafts(missing)
                try:
                    self._join(added)
                except BaseException:
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
        with self._scaling:
            if ray.is_initialized():  # else they have ended with it
                self._stop(self._drafts)
                self._stop([self._target] if self._target else [])
            self._target = None
        self._events.put(None)
        if threading.current_thread() is not self._thread:  # a forgotten engine is closed by whichever thread notices
            self._thread.join()

    def _launch(self, name: str, role: Role, kind: type) -> Member:
        """Make the actor's process; nothing is loaded yet."""
        place = self._placer.place(role)
        actor = ray.remote(concurrency_groups=CONCURRENCY_GROUPS, max_restarts=0)(_deferred(kind))
        return Member(name, actor.options(**place.options()).remote(), place)

    def _launch_drafts(self, count: int) -> list[Member]:
        launched: list[Member] = []
        try:
            for _ in range(count):
                launched.append(self._launch(f"draft-{self._launched}", "draft", DraftProcess))
                self._launched += 1
        except BaseException:
            self._stop(launched)
            raise
        return launched

    def _start_target(self, target: Member) -> None:
        logger.info("loading the target")
        one_node = sum(node["Alive"] for node in ray.nodes()) == 1
        _pass_on(_get(self._load(target, one_node=one_node), "target"))
        self._address = _get(target.handle.address.remote(), "target")
        self._run(target)

    def _join(self, drafts: Sequence[Member]) -> None:
        """Load drafts, all at once, and let them take part."""
        target = self._target
        if target is None:
            raise EngineError("the engine has no target")
        if drafts:
            logger.info("loading %s", "the draft" if len(drafts) == 1 else f"{len(drafts)} drafts")
        loads = {
            self._load(draft, name=draft.name, address=self._address, target=target.handle): draft.name
            for draft in drafts
        }
        while loads:  # the first that fails is told at once, while others load
            (load, *_), _ = ray.wait(list(loads))
            _pass_on(_get(load, loads.pop(load)))
        for draft in drafts:
            _get(target.handle.attach.remote(draft.name, draft.handle), "target")
            with self._changing:
                self._drafts.append(draft)
            self._run(draft)
        self._wait_until_known({draft.name for draft in drafts})

    def _wait_until_known(self, drafts: set[str]) -> None:
        """Wait for the drafts' first messages, so that the next request finds them at work."""
        deadline = monotonic() + CONNECT_SECONDS
        while not drafts <= set(_get(self._stats(), "target").drafts):
            if monotonic() > deadline:
                logger.warning("not all of %s have reached the target yet", ", ".join(sorted(drafts)))
                return
            sleep(0.01)

    def _stats(self) -> Any:
        if self._target is None:
            raise EngineError("the engine has no target")
        return self._target.handle.stats.remote()

    def _load(self, member: Member, **arguments: Any) -> Any:
        """Let an actor load its model; the ref of what it warns of."""
        return member.handle.start.remote(
            self._config,
            fingerprints=self._fingerprints,
            session=self._session,
            cores=member.place.cores,
            **arguments,
        )

    def _run(self, member: Member) -> None:
        member.sentinel = member.handle.run.remote()
        member.sentinel.future().add_done_callback(partial(self._note_end, member))

    def _stop(self, members: Sequence[Member]) -> None:
        """Let actors leave; end those that do not."""
        with self._changing:
            members = list(members)
            self._drafts = [draft for draft in self._drafts if draft not in members]
        for member in members:
            member.leaving = True
        running = [member for member in members if member.sentinel is not None]
        for member in running:
            member.handle.stop.remote()
        if running:
            sentinels = [member.sentinel for member in running]
            ray.wait(sentinels, num_returns=len(sentinels), timeout=STOP_SECONDS)
        for member in members:
            self._remove(member)

    def _remove(self, member: Member) -> None:
        """End an actor for good, if it has not, and take back its place."""
        ray.kill(member.handle)
        if member is not self._target and self._target is not None:
            self._target.handle.detach.remote(member.name)
        self._placer.release(member.place)

    def _note_end(self, member: Member, run: Any) -> None:
        self._events.put(_Ended(member, run.exception()))

    def _watch(self) -> None:
        """Handle the ends of actors, one after the other, until close()."""
        while (event := self._events.get()) is not None:
            if not event.member.leaving:
                self._handle_end(event)

    def _handle_end(self, event: _Ended) -> None:
        member = event.member
        error = own_error(event.error, member.name) if event.error else EngineError(f"{member.name} stopped by itself")
        if member is self._target:
            logger.error("%s", error)
            self._on_failure(error if isinstance(error, EngineError) else EngineError(str(error)))
            return
        with self._changing:
            if member not in self._drafts:
                return
            self._drafts.remove(member)
            left = len(self._drafts)
        logger.warning("%s; %d drafts are left: texts stay the same, speed does not", error, left)
        self._remove(member)


def _deferred(kind: type) -> type:
    """Move the work of a class's constructor into ``start``.

    Ray reports an error in an actor's constructor as a death, in words alone. That of a method arrives as itself, and
    so do the warnings, which ``start`` returns.
    """

    class Deferred(kind):
        def __init__(self) -> None:
            pass

        def start(self, *args: Any, **kwargs: Any) -> list[str]:
            with _warnings() as warnings:
                super().__init__(*args, **kwargs)
            return warnings

    Deferred.__name__ = Deferred.__qualname__ = kind.__name__
    return Deferred


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Keep what the library warns of."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    library = logging.getLogger("ssd_ray")
    library.addHandler(handler)
    try:
        yield warnings
    finally:
        library.removeHandler(handler)


def _pass_on(warnings: Sequence[str]) -> None:
    for warning in warnings:
        logger.warning("%s", warning)


def call(method: Any, *args: Any) -> Any:
    """Call an actor's method, apart from the task that this may be; the ref of what it returns.

    Where a client leaves, Serve cancels the task of its request and, recursively, the calls that the task has made. The
    actor would wait for a call that never comes, and after half a minute drop all others.
    """
    return Context().run(method.remote, *args)


def _get(ref: Any, name: str) -> Any:
    try:
        return ray.get(ref)
    except RayError as error:
        raise own_error(error, name) from error


def own_error(error: BaseException, name: str) -> SsdRayError:
    """Say in an error of ours what befell the actor ``name``: the very error that it raised if that is one of ours."""
    if isinstance(error, SsdRayError) and not isinstance(error, RayError):
        return error
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, SsdRayError):
            return cause
        if isinstance(cause, MemoryError):
            return ResourceError(f"{name}: out of memory: {cause}")
        return EngineError(f"{name} failed: {type(cause).__name__}: {cause}")
    lines = [line for line in str(error).splitlines() if not line.startswith("\t")]  # the others are Ray's ids
    return EngineError(f"{name} died: {' '.join(lines[1:] or lines)}")
