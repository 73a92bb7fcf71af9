"""The driver's half of an engine: actors started and stopped, requests out, tokens in."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from ssd_ray.actors.links import DRIVER
from ssd_ray.cluster.calls import call, own_error
from ssd_ray.cluster.placement import Placer
from ssd_ray.cluster.preflight import Fingerprints
from ssd_ray.cluster.refs import DrainChannel
from ssd_ray.cluster.runtime import RayRuntime
from ssd_ray.cluster.supervisor import Supervisor
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError, EngineClosedError, EngineError, ProtocolError, QueueFullError, SsdRayError
from ssd_ray.stats import EngineStats
from ssd_ray.transport.channel import Channel, Frame
from ssd_ray.transport.zmq import ZmqSpoke
from ssd_ray.wire import Output, decode

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
"""How long the pump waits for a frame before it looks whether it shall end."""


Deliver = Callable[[Output | SsdRayError], None]
"""Takes what comes of a request: its messages, the last one included, or the error that ends it. It is called from
another thread, and returns at once."""


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
        self._numbers = count()
        self._requests: dict[int, Deliver] = {}
        self._hopeful: list[Callable[[], None]] = []  # told when there is room
        # Guards these and _failure. Garbage collection may cancel a forgotten request wherever its thread is: hence R.
        self._lock = threading.RLock()
        self._failure: EngineError | None = None
        self._closing = threading.Event()
        with ExitStack() as undo:
            self._start(undo)
            self._undo = undo.pop_all()

    def _start(self, undo: ExitStack) -> None:
        config = self._config
        drafts = config.draft_actors
        runtime = RayRuntime()
        undo.callback(runtime.close)
        placer = Placer(config.device, drafts)
        self._supervisor = Supervisor(config, self._fingerprints, placer, self._fail)
        undo.callback(self._supervisor.close)
        self._contact = self._supervisor.start(drafts)
        self._target = self._contact.handle
        self._pump = threading.Thread(target=self._pump_frames, name="ssd-ray-pump", daemon=True)
        self._pump.start()
        undo.callback(self._stop_pump)

    def submit(
        self, tokens: Sequence[int], params: SamplingParams, deliver: Deliver, *, timeout: float | None = None
    ) -> int:
        """Hand a request to the target, without waiting for anything; its number.

        Raises:
            QueueFullError: as many requests as the configuration allows are under way.
            EngineError: the engine has failed or is closed.
        """
        payload = self._payload(tokens)
        with self._lock:
            self._check()
            if len(self._requests) >= self._config.max_queue:
                raise QueueFullError(f"{self._config.max_queue} requests are under way, as many as max_queue allows")
            number = next(self._numbers)
            self._requests[number] = deliver
        holders = self._supervisor.hand_out(number, payload) if isinstance(payload, ray.ObjectRef) else []
        call(self._target.submit, number, payload, params, timeout, holders)  # if it is lost, the target has died
        return number

    def cancel(self, number: int) -> None:
        """End a request early, unless it has ended: its last message comes soon, with the reason "cancelled"."""
        with self._lock:
            under_way = number in self._requests
        if under_way:
            call(self._target.cancel, number)

    def when_room(self, notify: Callable[[], None]) -> None:
        """Call ``notify`` once, from any thread, when :meth:`submit` is worth another try."""
        with self._lock:
            if self._failure is None and len(self._requests) >= self._config.max_queue:
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
        self._supervisor.scale_drafts(replace(self._config, num_drafts=count).num_drafts)

    def stats(self) -> EngineStats:
        """Figures of all requests so far."""
        self._check()
        stats: EngineStats = self._call("stats")
        return replace(stats, draft_restarts=self._supervisor.draft_restarts)

    @property
    def actors(self) -> dict[str, Any]:
        """Ray handles by name: "target", "draft-0" and so on."""
        return self._supervisor.members

    def processor_seconds(self) -> float:
        """What the processes of target and drafts have used so far."""
        infos = ray.get([handle.info.remote() for handle in self.actors.values()])
        return float(sum(info["processor_seconds"] for info in infos))

    def close(self) -> None:
        """Stop everything that was started; requests under way end with EngineClosedError. Idempotent."""
        self._fail(EngineClosedError("the engine is closed"))
        self._undo.close()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _call(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(call(getattr(self._target, method), *args))
        except RayError as error:
            raise self._failure or own_error(error, "target") from error

    def _payload(self, tokens: Sequence[int]) -> Any:
        """Tokens as an argument: a long prompt goes into the object store, once for the target and all drafts."""
        array = np.asarray(tokens, np.int32)
        return ray.put(array) if array.nbytes > self._config.inline_max_bytes else array.tolist()

    # The pump: the one thread that uses the channel

    def _pump_frames(self) -> None:
        address = self._contact.address
        channel: Channel = DrainChannel(DRIVER, self._target) if address is None else ZmqSpoke(address, DRIVER)
        try:
            with channel:
                while not self._closing.is_set():
                    received = channel.receive(_POLL_SECONDS)
                    if received is not None:
                        self._dispatch(received[1])
        except Exception as error:
            logger.exception("the driver's channel failed")
            self._fail(EngineError(f"the driver's channel failed: {error}"))

    def _dispatch(self, frame: Frame) -> None:
        try:
            messages = decode(self._contact.session, frame)
        except ProtocolError as error:
            logger.debug("dropped a frame: %s", error)
            return
        for message in messages:
            if isinstance(message, Output):
                self._deliver(message)

    def _deliver(self, message: Output) -> None:
        with self._lock:
            deliver = self._requests.get(message.request)
            if message.finish_reason is not None:
                self._requests.pop(message.request, None)
            hopeful = self._take_hopeful() if message.finish_reason is not None else []
        if deliver is not None:
            deliver(message)
        for notify in hopeful:
            notify()

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
            requests, self._requests = list(self._requests.values()), {}
            hopeful = self._take_hopeful()
        for deliver in requests:
            deliver(self._failure)
        for notify in hopeful:
            notify()
