"""The loop of a draft: messages in, one batched forward at a time, nodes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

from ssd_ray.actors.handover import Handover
from ssd_ray.actors.isolation import Isolation
from ssd_ray.actors.seats import Seats
from ssd_ray.actors.stepping import Steps
from ssd_ray.actors.uplink import HELLO_SECONDS, ToDraft, Uplink
from ssd_ray.config import MAX_LOOKAHEAD
from ssd_ray.models.contract import ModelRunner
from ssd_ray.models.leases import KVMemory
from ssd_ray.saguaro.costs import Costs
from ssd_ray.saguaro.fanout import FanOutPolicy
from ssd_ray.sampling.rejection import Proposing
from ssd_ray.speculation.draft import DraftSession
from ssd_ray.speculation.past import CATCH_UP
from ssd_ray.speculation.window import SCRATCH
from ssd_ray.tracing import Recorder
from ssd_ray.transport.channel import Channel
from ssd_ray.wire import Begin, Close, Open, Outcome, States


class Draft:
    """A draft without its process: everything but where it runs.

    Args:
        runner: the model; each sequence takes one of its rows. Sequences for which there is no row or no memory are
            left alone, and so are those that are beyond it: longer than it can take, or with a token that it does not
            know.
        channel: to the target.
        session: the engine's number on the wire.
        policy: makes the fan-out policy, which learns from all sequences together.
        width: tokens of branches in one forward, all sequences together. Each of many sequences gets
            :data:`~ssd_ray.actors.stepping.WIDTH`.
        lookahead: tokens in one speculation at most.
        branching: False drafts the one chain of plain speculative decoding.
        proposing: how tokens are drawn in rejection mode; None is coupled mode.
        prefill_chunk: tokens of prompts that are prefilled between two steps.
        prefix_cache: keep the KV of what has ended for prompts that begin alike.
        budget, strict, text_lookup: see :class:`~ssd_ray.speculation.draft.DraftSession`.
        clock: seconds; another one lets time be simulated.
        trace: notes what is done; None: nobody does.
    """

    def __init__(
        self,
        runner: ModelRunner,
        channel: Channel,
        session: int,
        policy: Callable[[], FanOutPolicy],
        *,
        width: int = 16,
        lookahead: int = MAX_LOOKAHEAD,
        branching: bool = True,
        proposing: Proposing | None = None,
        budget: int = 16,
        strict: bool = False,
        text_lookup: bool = True,
        prefill_chunk: int = 256,
        prefix_cache: bool = True,
        clock: Callable[[], float] = perf_counter,
        trace: Recorder | None = None,
    ) -> None:
        self._runner = runner
        self._uplink = Uplink(channel, session, reads=runner.reads > 0, clock=clock, trace=trace)
        self._handover = Handover()
        self.pool = KVMemory(runner, runner.rows, max(prefill_chunk, CATCH_UP) + SCRATCH)
        self.costs = Costs(runner.measured)
        new_session = partial(
            DraftSession,
            policy=policy(),
            lookahead=lookahead,
            branching=branching,
            budget=budget,
            strict=strict,
            text_lookup=text_lookup,
            reads=runner.reads > 0,
        )
        self._seats = Seats(
            runner,
            self.pool,
            self._uplink,
            self._handover,
            new_session,
            coupled=proposing is None,
            caching=prefix_cache,
        )
        self._isolation = Isolation(self._seats.give_up)
        self._steps = Steps(
            runner,
            self._seats,
            self._uplink,
            self.costs,
            self._isolation,
            proposing=proposing,
            width=width if branching else None,
            chunk=prefill_chunk,
            clock=clock,
            trace=trace,
        )

    @property
    def name(self) -> str:
        """The draft's name on the channel."""
        return self._uplink.channel.name

    @property
    def sequences(self) -> dict[int, DraftSession]:
        """The open sequences by number."""
        return {seat.sequence: seat.session for seat in self._seats.all}

    @property
    def dropped(self) -> int:
        """Frames, and messages in them, that were dropped: malformed, not for this draft, or said before."""
        return self._uplink.dropped

    # The loop

    def turn(self, idle_seconds: float = HELLO_SECONDS) -> bool:
        """Take what has arrived and run one step; without work wait for a message. Returns whether a step ran."""
        self._uplink.greet()
        self._open_whole()  # prompts may have come
        self._receive(0.0)
        if self._work():
            return True
        self._receive(min(idle_seconds, self._uplink.quiet_seconds))
        return False

    def _work(self) -> bool:
        """Prefill a chunk of a sequence that lacks its past, and run a step of the others."""
        prefilled = self._steps.prefill()
        return self._steps.step() or prefilled

    def _receive(self, timeout: float) -> None:
        for messages in self._uplink.receive(timeout):
            self._isolation.each(messages, self._handle)

    def _handle(self, message: ToDraft) -> None:
        match message:
            case Open():
                self._handover.put(message)
                self._open_whole()
            case Outcome():
                self._advance(message)
            case Begin():
                self._seats.begin(message)
            case States() if self._runner.reads:
                self._seats.show(message)
            case Close():
                self._seats.close(message.sequence)
            case _:
                pass

    def _open_whole(self) -> None:
        self._isolation.each(self._handover.take(), self._seats.open)

    def _advance(self, message: Outcome) -> None:
        seat = self._seats.expecting(message)
        if seat is not None:
            self._steps.end_round()
            self._seats.advance(seat, message)

    def follow(self, channel: Channel, session: int) -> None:
        """Work for another target from now on, which is reached by this channel; the one before has gone.

        Its sequences go with it. Their KV is kept for prompts that begin alike: they are most likely to come again.
        """
        self._seats.clear()
        self._uplink.follow(channel, session)

    def leave(self) -> None:
        """Tell the target that this draft goes."""
        self._uplink.leave()

    def close(self) -> None:
        """Give the channel back."""
        self._uplink.channel.close()

    # Called from any thread

    def give(self, sequence: int, prompt: Sequence[int]) -> None:
        """Have the prompt of a sequence that is opened without it, sooner or later."""
        self._handover.give(sequence, prompt)
        self._uplink.channel.wake()

    def wake(self) -> None:
        """End the wait of :meth:`turn`, or of the next one."""
        self._uplink.channel.wake()
