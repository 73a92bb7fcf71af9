"""The actor classes as Ray runs them: an actor of :mod:`ssd_ray.actors` with the channel that the configuration names.

Apply ``ray.remote(concurrency_groups=CONCURRENCY_GROUPS)`` where they are launched. ``run()`` holds the actor's main
thread from start to stop, and its ref is the sentinel of the process; every other method has its own group of threads.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ssd_ray.heap import collector_rests

with collector_rests():
    from ssd_ray.actors.draft import DraftActor
    from ssd_ray.actors.pulse import Pulse
    from ssd_ray.actors.target import TargetActor
    from ssd_ray.cluster.placement import Role
    from ssd_ray.cluster.preflight import Fingerprints
    from ssd_ray.cluster.refs import RefChannel, RefEndpoint
    from ssd_ray.config import EngineConfig, SamplingParams
    from ssd_ray.errors import ModelError
    from ssd_ray.models.checkpoint import same_model
    from ssd_ray.models.info import model_fingerprint
    from ssd_ray.stats import EngineStats
    from ssd_ray.tracing import Lane
    from ssd_ray.transport.channel import HUB, Channel
    from ssd_ray.transport.hybrid import HybridChannel
    from ssd_ray.transport.inbox import Inbox
    from ssd_ray.transport.zmq import ZmqAddress, ZmqHub, ZmqSpoke

Cores = Sequence[int] | None

NOBODY = 0
"""The session of a draft that follows no target yet."""


@dataclass(frozen=True, slots=True)
class Contact:
    """How a target is reached.

    Attributes:
        handle: its actor.
        address: where spokes connect; None if frames travel in actor calls.
        session: the number of its frames on the wire, which no other target has.
    """

    handle: Any
    address: ZmqAddress | None
    session: int


class _Process(RefEndpoint):
    _actor: TargetActor | DraftActor

    @ray.method(concurrency_group="inbox")
    def pulse(self) -> Pulse:
        """What the actor's loop has done."""
        return self._actor.pulse

    @ray.method(concurrency_group="inbox")
    def lanes(self) -> list[Lane]:
        """What the actor's loops have noted for a trace."""
        return self._actor.lanes

    @ray.method(concurrency_group="inbox")
    def info(self) -> dict[str, Any]:
        """Where the process runs: pid, node, cores and GPUs that it may use; the processor seconds that it has used."""
        return {
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "cores": sorted(os.sched_getaffinity(0)),
            "processor_seconds": time.process_time(),
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        }


class TargetProcess(_Process):
    """A :class:`~ssd_ray.actors.target.TargetActor` in a Ray actor."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        fingerprints: Fingerprints,
        session: int,
        cores: Cores = None,
        one_node: bool = True,
        users: Sequence[int] = (),
    ) -> None:
        require_same(config, fingerprints, ("target",) if config.method == "ssd" else ("target", "draft"))
        super().__init__(HUB, config.inline_max_bytes)
        self._address: ZmqAddress | None = None
        channel: Channel = self.refs
        if config.transport != "ray":
            hub = ZmqHub(users=users) if one_node else ZmqHub("tcp", ray.util.get_node_ip_address())
            channel, self._address = HybridChannel(hub, self.refs, config.inline_max_bytes), hub.address
        self._actor: TargetActor = TargetActor(config, channel, session=session, cores=cores)

    @ray.method(concurrency_group="inbox")
    def address(self) -> ZmqAddress | None:
        """Where spokes connect; None if frames travel in actor calls."""
        return self._address

    def run(self) -> None:
        """Decode until :meth:`stop`."""
        self._actor.run()

    @ray.method(concurrency_group="inbox")
    def submit(
        self,
        number: int,
        tokens: Sequence[int],
        params: SamplingParams,
        timeout: float | None,
        holders: Sequence[str],
        text: Sequence[int],
    ) -> None:
        """Queue a request."""
        self._actor.submit(number, tokens, params, timeout, holders, text)

    @ray.method(concurrency_group="inbox")
    def cancel(self, number: int) -> None:
        """End a request early."""
        self._actor.cancel(number)

    @ray.method(concurrency_group="inbox")
    def attach(self, name: str, handle: Any) -> None:
        """Connect a draft's process."""
        self.refs.add_peer(name, handle)

    @ray.method(concurrency_group="inbox")
    def detach(self, name: str) -> None:
        """Forget a draft."""
        self._actor.detach(name)
        self.refs.remove_peer(name)

    @ray.method(concurrency_group="inbox")
    def stats(self) -> EngineStats:
        """Figures of all requests so far."""
        return self._actor.stats()

    @ray.method(concurrency_group="inbox")
    def stop(self) -> None:
        """Let :meth:`run` return."""
        self._actor.stop()


class DraftProcess(_Process):
    """A :class:`~ssd_ray.actors.draft.DraftActor` in a Ray actor. It follows no target until :meth:`follow`."""

    def __init__(self, config: EngineConfig, *, fingerprints: Fingerprints, name: str, cores: Cores = None) -> None:
        require_same(config, fingerprints, ("draft",))
        super().__init__(name, config.inline_max_bytes)
        self._inline_max_bytes = config.inline_max_bytes
        self._actor: DraftActor = DraftActor(config, self.refs, session=NOBODY, cores=cores)

    @ray.method(concurrency_group="inbox")
    def follow(self, target: Contact) -> None:
        """Work for this target from now on, and for no other."""
        # A channel of its own: what the one before has sent, and may still send, goes with its channel.
        self.refs = RefChannel(self.refs.name, Inbox(), inline_max_bytes=self._inline_max_bytes)
        self.refs.add_peer(HUB, target.handle)
        channel: Channel = self.refs
        if target.address is not None:
            channel = HybridChannel(ZmqSpoke(target.address, self.refs.name), self.refs, self._inline_max_bytes)
        self._actor.follow(channel, target.session)

    def run(self) -> None:
        """Draft until :meth:`stop`."""
        self._actor.run()

    @ray.method(concurrency_group="inbox")
    def give(self, sequence: int, prompt: Sequence[int]) -> None:
        """Have the prompt of a sequence, which the target opens without it."""
        self._actor.give(sequence, prompt)

    @ray.method(concurrency_group="inbox")
    def stop(self) -> None:
        """Let :meth:`run` return."""
        self._actor.stop()


def require_same(config: EngineConfig, fingerprints: Fingerprints, roles: Sequence[Role]) -> None:
    """Refuse a model that has the place of one that was looked at, on another machine, and is not the same.

    Raises:
        ModelError: it differs, or is not there.
    """
    for role in set(roles) & set(fingerprints):
        path = getattr(config, role)
        try:
            found = model_fingerprint(path, role=role, adapter=config.adapter_of(role))
        except ModelError as error:
            raise ModelError(f"{error}, on {socket.gethostname()}, where the {role} is to run") from None
        if not same_model(fingerprints[role], found):
            raise ModelError(
                f"{role}: {path or 'the bundled model'} on {socket.gethostname()}, where it is to run, is not the one "
                "that was looked at where the engine was started: config or weights differ"
            )
