"""The driver's half of an engine: actors started and stopped, requests out, tokens in."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError

from ssd_ray.actors.links import DRIVER
from ssd_ray.cluster.calls import call, own_error
from ssd_ray.cluster.metrics import Metrics
from ssd_ray.cluster.placement import Placer
from ssd_ray.cluster.preflight import Fingerprints
from ssd_ray.cluster.processes import Contact
from ssd_ray.cluster.refs import DrainChannel
from ssd_ray.cluster.requests import Deliver, Request, Requests
from ssd_ray.cluster.runtime import RayRuntime
from ssd_ray.cluster.supervisor import Supervisor
from ssd_ray.cluster.trace_file import write_trace
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError, EngineClosedError, EngineError, ProtocolError, SsdRayError
from ssd_ray.stats import EngineStats
from ssd_ray.transport.channel import Channel, Frame
from ssd_ray.transport.zmq import ZmqSpoke
from ssd_ray.wire import Output, decode

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
"""How long the pump waits for a frame before it looks whether it shall end."""


class Driver:
    """Starts an engine and talks to it. All methods may be called from any thread.

    Args:
        config: of the engine, as :func:`~ssd_ray.cluster.preflight.check` completed it.
        fingerprints: of the models that were looked at; actors refuse to load others.

    Raises:
        SsdRayError: the engine cannot be started; whatever was started is stopped again.
    """

    def __init__(self, config: EngineConfig, fingerprints: Fingerprints) -> None:
        self._config = config
        self._fingerprints = fingerprints
        self._requests = Requests(config.max_queue)
        self._hopeful: list[Callable[[], None]] = []  # told when there is room
        # Guards these and the next ones. Garbage collection may cancel a forgotten request in any thread: hence R.
        self._lock = threading.RLock()
        self._dropped: Counter[str] = Counter()  # frames, by what was wrong with them
        self._failure: EngineError | None = None
        self._offered: Contact | None = None  # the target that there is now
        self._contact: Contact | None = None  # the one that has all requests under way
        self._begun, self._closing = threading.Event(), threading.Event()
        with ExitStack() as undo:
            self._start(undo)
            self._undo = undo.pop_all()

    def _start(self, undo: ExitStack) -> None:
        config = self._config
        drafts = config.draft_actors
        runtime = RayRuntime()
        undo.callback(runtime.close)
        self._metrics = Metrics(Path(config.target).name if config.target else "bundled")
        placer = Placer(config.device, drafts)
        self._supervisor = Supervisor(config, self._fingerprints, placer, self._turn_to, self._fail)
        undo.callback(self._write_trace)
        undo.callback(self._supervisor.close)
        self._supervisor.start(drafts)
        self._pump = threading.Thread(target=self._pump_frames, name="ssd-ray-pump", daemon=True)
        self._pump.start()
        self._begun.wait()
        undo.callback(self._stop_pump)

    def _write_trace(self) -> None:
        if self._config.trace is not None:
            write_trace(self._config.trace, self._supervisor.traces)

    def number(self) -> int:
        """A number for a request that is to come. Who has it may cancel the request, however far its submission is."""
        return self._requests.number()

    def submit(
        self,
        number: int,
        tokens: Sequence[int],
        params: SamplingParams,
        deliver: Deliver,
        *,
        timeout: float | None = None,
    ) -> None:
        """Hand a request to the target, without waiting for anything.

        Raises:
            QueueFullError: as many requests as the configuration allows are under way.
            EngineError: the engine has failed or is closed.
        """
        prompt = self._payload(tokens)
        with self._lock:
            self._check()
            request = self._requests.add(number, prompt, len(tokens), params, deliver, timeout)
            contact = self._contact
        if contact is not None:  # else it waits for the next one
            self._hand_over(request, contact)

    def _hand_over(self, request: Request, contact: Contact) -> None:
        """Give a request to a target. If that is lost, the target has died, and the next one is given it."""
        number, prompt = request.number, request.prompt
        holders = self._supervisor.hand_out(number, prompt) if isinstance(prompt, ray.ObjectRef) else []
        text = list(request.text)
        call(contact.handle.submit, number, prompt, request.params, request.timeout, holders, text)
        if request.cancelled:  # while no target, or another one, had it
            call(contact.handle.cancel, number)

    def cancel(self, number: int) -> None:
        """End a request early, unless it has ended: its last message comes soon, with the reason "cancelled"."""
        with self._lock:
            under_way, contact = self._requests.cancel(number), self._contact
        if under_way and contact is not None:
            call(contact.handle.cancel, number)

    def when_room(self, notify: Callable[[], None]) -> None:
        """Call ``notify`` once, from any thread, when :meth:`submit` is worth another try."""
        with self._lock:
            if self._failure is None and self._requests.full:
                self._hopeful.append(notify)
                return
        notify()

    def scale_drafts(self, count: int) -> None:
        """Change the number of drafts; returns when the new ones are ready.

        Raises:
            ConfigError: ``count`` is no such number, or the method has no draft actors.
            SsdRayError: a draft does not start.
        """
        if self._config.method != "ssd":
            raise ConfigError("method", "'ssd', the method that has draft actors", self._config.method)
        if self._config.drafts_from_text:
            raise ConfigError("draft", "a model, of which there can be several", self._config.draft)
        self._check()
        try:
            self._supervisor.scale_drafts(replace(self._config, num_drafts=count).num_drafts)
        except SsdRayError:
            self._check()  # for the reason of it
            raise

    def stats(self) -> EngineStats:
        """Figures of all requests so far."""
        self._check()
        target = self._targets_stats()
        self._check()
        with self._lock:
            stats = self._requests.figures(target)
        keeper = self._supervisor
        return replace(
            stats,
            draft_restarts=keeper.draft_restarts,
            target_restarts=keeper.target_restarts,
            spare_targets=keeper.spares,
            dropped_frames=self._all_dropped(stats),
        )

    def _all_dropped(self, stats: EngineStats) -> dict[str, int]:
        counts = Counter(stats.dropped_frames)
        counts.update(self._dropped)
        return dict(counts)

    def _targets_stats(self) -> EngineStats | None:
        """What the present target says; None if there is none."""
        contact = self._contact
        if contact is None:
            return None
        try:
            stats: EngineStats = ray.get(call(contact.handle.stats))
        except RayActorError:  # the news of it are on their way
            return None
        except RayError as error:
            raise own_error(error, "target") from error
        return stats

    @property
    def actors(self) -> dict[str, Any]:
        """Ray handles by name: "target", "draft-0" and so on."""
        return self._supervisor.members

    def processor_seconds(self) -> float:
        """What the processes of target and drafts have used so far; those that have died are not counted."""
        total = 0.0
        for info in [handle.info.remote() for handle in self.actors.values()]:
            with suppress(RayActorError):
                total += ray.get(info)["processor_seconds"]
        return total

    def close(self) -> None:
        """Stop everything that was started; requests under way end with EngineClosedError. Idempotent."""
        self._fail(EngineClosedError("the engine is closed"))
        self._undo.close()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _payload(self, tokens: Sequence[int]) -> Any:
        """Tokens as an argument: a long prompt goes into the object store, once for the target and all drafts."""
        array = np.asarray(tokens, np.int32)
        return ray.put(array) if array.nbytes > self._config.inline_max_bytes else array.tolist()

    # The pump: the one thread that uses the channel

    def _turn_to(self, contact: Contact | None) -> None:
        """Go on with this target, or, while there is none, keep what comes for the next one."""
        with self._lock:
            self._offered = contact
            if contact is None:
                self._contact = None

    def _pump_frames(self) -> None:
        try:
            while not self._closing.is_set():
                contact = self._offered
                if contact is None:
                    self._end_overdue()
                    self._closing.wait(_POLL_SECONDS)
                else:
                    self._follow(contact)
        except Exception as error:
            logger.exception("the driver's channel failed")
            self._fail(EngineError(f"the driver's channel failed: {error}"))
        finally:
            self._begun.set()

    def _follow(self, contact: Contact) -> None:
        """Give a target all that is under way, and deliver what it says, until there is another one."""
        zmq = contact.address
        channel: Channel = DrainChannel(DRIVER, contact.handle) if zmq is None else ZmqSpoke(zmq, DRIVER)
        with channel:
            with self._lock:
                self._contact = contact if contact is self._offered else None
                requests = self._requests.hand_over()
            self._begun.set()
            for request in requests:
                self._hand_over(request, contact)
            while contact is self._offered and not self._closing.is_set():
                self._receive(channel, contact, _POLL_SECONDS)
            while not self._closing.is_set() and self._receive(channel, contact, 0.0):
                pass  # what it has said before its end

    def _receive(self, channel: Channel, contact: Contact, timeout: float) -> bool:
        """Deliver what a frame says; False if none has come."""
        received = channel.receive(timeout)
        if received is not None:
            self._dispatch(contact, received[1])
        return received is not None

    def _dispatch(self, contact: Contact, frame: Frame) -> None:
        try:
            messages = decode(contact.session, frame)
        except ProtocolError as error:
            self._dropped[error.fault] += 1
            logger.debug("dropped a frame: %s", error)
            return
        for message in messages:
            if isinstance(message, Output):
                self._deliver(message)

    def _end_overdue(self) -> None:
        """End requests that are late or cancelled while no target is there to do so."""
        with self._lock:
            ends = self._requests.overdue()
        for message in ends:
            self._deliver(message)

    def _deliver(self, message: Output) -> None:
        with self._lock:
            request = self._requests.take(message)
            hopeful = self._take_hopeful() if message.finish_reason is not None else []
        if request is not None:
            request.deliver(message)
        for notify in hopeful:
            notify()
        if request is not None and (ended := request.ended(message)) is not None:
            self._metrics.ended(ended)  # at last: nobody waits for it

    def _take_hopeful(self) -> list[Callable[[], None]]:
        hopeful, self._hopeful = self._hopeful, []
        return hopeful

    def _stop_pump(self) -> None:
        self._closing.set()
        if threading.current_thread() is not self._pump:  # a forgotten engine is closed by whichever thread notices
            self._pump.join()

    def _fail(self, error: EngineError) -> None:
        """Refuse further requests and end those under way; the first reason stands, closing aside."""
        with self._lock:
            if self._failure is None or isinstance(error, EngineClosedError):
                self._failure = error
            requests, hopeful = self._requests.give_up(), self._take_hopeful()
        for request in requests:
            request.deliver(self._failure)
        for notify in hopeful:
            notify()
