"""A draft's process."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ssd_ray.actors.process import load_draft, pin, recorder
from ssd_ray.actors.pulse import Heart, Pulse
from ssd_ray.config import EngineConfig
from ssd_ray.tracing import Lane
from ssd_ray.transport.channel import Channel


class DraftActor:
    """Drafts.

    Args:
        config: what to load.
        channel: a spoke whose name is the draft's; closed when :meth:`run` returns.
        session: the number on the wire of the target's frames.
        cores: where to run; None leaves that to the system.
    """

    def __init__(self, config: EngineConfig, channel: Channel, *, session: int, cores: Sequence[int] | None) -> None:
        pin(cores)
        self._cores = cores
        self._stopping = False
        self._trace = recorder(config, channel.name)
        self._draft = load_draft(config, channel, session, self._trace)
        self._heart = Heart(1e-3 * self._draft.costs.alone_ms(config.prefill_chunk))
        self._targets: deque[tuple[Channel, int]] = deque()  # that are to be followed

    def run(self) -> None:
        """Draft until :meth:`stop`, from one thread."""
        pin(self._cores)
        self._heart.begin()
        try:
            while not self._stopping:
                while self._targets:
                    self._draft.follow(*self._targets.popleft())
                self._heart.beat(worked=self._draft.turn())
            self._draft.leave()
        finally:
            self._draft.close()

    # From any thread

    @property
    def pulse(self) -> Pulse:
        """What the loop has done."""
        return self._heart.pulse

    @property
    def lanes(self) -> list[Lane]:
        """What the loop has noted for a trace."""
        return [] if self._trace is None else [self._trace.lane]

    def follow(self, channel: Channel, session: int) -> None:
        """Work for another target; see :meth:`Draft.follow`."""
        self._targets.append((channel, session))
        self._draft.wake()

    def give(self, sequence: int, prompt: Sequence[int]) -> None:
        """Have the prompt of a sequence; see :meth:`Draft.give`."""
        self._draft.give(sequence, prompt)

    def stop(self) -> None:
        """Let :meth:`run` return."""
        self._stopping = True
        self._draft.wake()
