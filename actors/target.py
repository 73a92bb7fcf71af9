"""The target's process."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ssd_ray.actors.inline import INLINE, InlineChannel
from ssd_ray.actors.process import backup, load_draft, load_model, lookahead, pin, recorder
from ssd_ray.actors.pulse import Heart, Pulse
from ssd_ray.actors.verifying import MOST_TOKENS, Target
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.models.calibration import cache_path, keep, machine_name, read
from ssd_ray.models.info import end_tokens, load_tokenizer, model_info
from ssd_ray.saguaro.costs import Learned
from ssd_ray.stats import EngineStats
from ssd_ray.tracing import Lane
from ssd_ray.transport.channel import Channel
from ssd_ray.transport.memory import MemorySpoke

logger = logging.getLogger(__name__)


class TargetActor:
    """Verifies. With method "sd" its draft lives in the same process, if it is a model.

    Args:
        config: what to load.
        channel: the hub of the drafts and of the driver; closed when :meth:`run` returns.
        session: the engine's number on the wire.
        cores: where to run; None leaves that to the system.
    """

    def __init__(self, config: EngineConfig, channel: Channel, *, session: int, cores: Sequence[int] | None) -> None:
        pin(cores)
        self._cores = cores
        self._stopping = False
        inline = config.method == "sd" and config.runs_draft
        self._channel = InlineChannel(channel) if inline else channel
        self._trace, self._inline_trace = recorder(config, channel.name), recorder(config, INLINE) if inline else None
        trust = config.trust_remote_code
        tokenizer = load_tokenizer(config.target, trust_remote_code=trust)
        runner = load_model(config, "target", MOST_TOKENS)
        drafts = config.method, config.draft, config.num_drafts, config.max_num_seqs
        how = config.dtype, config.quantize, config.device
        self._experience = cache_path(machine_name("learned", config.target, config.adapter, *how, *drafts))
        self._target = Target(
            runner,
            self._channel,
            session,
            lookahead=lookahead(config) if config.method != "ar" else 0,
            exact_lookahead=inline and config.lookahead != "auto",
            sampler=config.sampler,
            saguaro_c=config.saguaro_c,
            backup=backup(config),
            patient=inline,
            measured=runner.measured,
            learned=read(self._experience, Learned),
            concurrency=config.max_num_seqs,
            prefill_chunk=config.prefill_chunk,
            prefix_cache=config.prefix_cache,
            end_tokens=end_tokens(model_info(config.target, trust_remote_code=trust), tokenizer),
            tokenizer=tokenizer,
            trace=self._trace,
        )
        self._heart = Heart(1e-3 * self._target.costs.alone_ms(config.prefill_chunk))
        if isinstance(self._channel, InlineChannel):
            spoke = MemorySpoke(self._channel.address, INLINE)
            self._channel.host(load_draft(config, spoke, session, self._inline_trace))

    def run(self) -> None:
        """Decode until :meth:`stop`, from one thread."""
        pin(self._cores)
        self._heart.begin()
        try:
            while not self._stopping:
                self._heart.beat(worked=self._target.turn())
        finally:
            if (learned := self._target.costs.learned) is not None:
                keep(self._experience, learned)
            self._channel.close()

    # From any thread

    @property
    def pulse(self) -> Pulse:
        """What the loop has done."""
        return self._heart.pulse

    @property
    def lanes(self) -> list[Lane]:
        """What the loops of this process have noted for a trace."""
        return [trace.lane for trace in (self._trace, self._inline_trace) if trace is not None]

    def submit(
        self,
        number: int,
        tokens: Sequence[int],
        params: SamplingParams,
        timeout: float | None = None,
        holders: Sequence[str] = (),
        text: Sequence[int] = (),
    ) -> None:
        """Queue a request; see :meth:`Target.submit`."""
        self._target.submit(number, tokens, params, timeout, holders, text)

    def cancel(self, number: int) -> None:
        """End a request early."""
        self._target.cancel(number)

    def detach(self, name: str) -> None:
        """Forget a draft that is gone or will be."""
        self._target.detach(name)

    def stats(self) -> EngineStats:
        """Figures of all requests so far."""
        return self._target.stats()

    def stop(self) -> None:
        """Let :meth:`run` return."""
        self._stopping = True
        self._channel.wake()
