"""A draft's process."""

from __future__ import annotations

from collections.abc import Sequence

from ssd_ray.actors.process import load_draft, pin
from ssd_ray.config import EngineConfig
from ssd_ray.transport.channel import Channel


class DraftActor:
    """Drafts.

    Args:
        config: what to load.
        channel: a spoke whose name is the draft's; closed when :meth:`run` returns.
        session: the engine's number on the wire.
        cores: where to run; None leaves that to the system.
    """

    def __init__(self, config: EngineConfig, channel: Channel, *, session: int, cores: Sequence[int] | None) -> None:
        pin(cores)
        self._cores = cores
        self._channel = channel
        self._stopping = False
        self._draft = load_draft(config, channel, session)

    def run(self) -> None:
        """Draft until :meth:`stop`, from one thread."""
        pin(self._cores)
        try:
            while not self._stopping:
                self._draft.turn()
            self._draft.leave()
        finally:
            self._channel.close()

    def give(self, sequence: int, prompt: Sequence[int]) -> None:
        """Have the prompt of a sequence, from any thread; see :meth:`Draft.give`."""
        self._draft.give(sequence, prompt)

    def stop(self) -> None:
        """Let :meth:`run` return, from any thread."""
        self._stopping = True
        self._channel.wake()
