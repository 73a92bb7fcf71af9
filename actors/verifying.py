"""The loop of the target: requests in, one batched verification after the other, tokens out.

What is done for a row is done alone: should it raise, that row ends with the error, and the others do not notice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import reduce
from math import inf
from threading import RLock
from time import perf_counter
from typing import Any, Literal

import torch

from ssd_ray.actors.batch import Batch, Request, Row
from ssd_ray.actors.isolation import Isolation, told
from ssd_ray.actors.links import Links
from ssd_ray.actors.rounds import Rounds, Rules
from ssd_ray.config import MAX_LOOKAHEAD, Backup, Sampler, SamplingParams
from ssd_ray.models.contract import ModelRunner
from ssd_ray.saguaro.backup import Pace
from ssd_ray.saguaro.costs import Costs, Learned, Measured
from ssd_ray.saguaro.factors import FACTORS
from ssd_ray.saguaro.ngram import NgramIndex
from ssd_ray.saguaro.planner import Planner, plan_without_draft
from ssd_ray.sampling.rejection import Proposal, weigh
from ssd_ray.sampling.verifier import verifier
from ssd_ray.speculation.target import FinishReason, TargetSession
from ssd_ray.stats import EngineStats, add
from ssd_ray.text import Detokenizer
from ssd_ray.tracing import Recorder
from ssd_ray.transport.channel import Channel
from ssd_ray.transport.traced import traced
from ssd_ray.wire import Close, Output, RequestStats

MOST_TOKENS = MAX_LOOKAHEAD + 1
"""Tokens of one row in a verification at most."""

IDLE_SECONDS = 1.0
"""How long a loop without work waits for a message. Whatever else may give it work wakes it."""


class Target:
    """A target without its process: everything but where it runs.

    Args:
        runner: the model.
        channel: the hub of the drafts and the driver.
        session: the engine's number on the wire.
        lookahead, exact_lookahead, backup, patient: see :class:`~ssd_ray.actors.rounds.Rules`.
        sampler: how speculations are verified.
        saguaro_c: in rejection mode, Saguaro's C, or "auto".
        measured: what verifications cost; None: nothing is known yet.
        end_tokens: tokens that end a text.
        tokenizer: needed for stop strings alone.
        concurrency: requests that run at the same time.
        prefill_chunk: tokens of prompts that are prefilled between two rounds.
        prefix_cache: keep the KV of what has ended for prompts that begin alike.
        clock: seconds; another one lets time be simulated.
        trace: notes what is done; None: nobody does.
    """

    def __init__(
        self,
        runner: ModelRunner,
        channel: Channel,
        session: int,
        *,
        lookahead: int = MAX_LOOKAHEAD,
        exact_lookahead: bool = False,
        sampler: Sampler = "coupled",
        saguaro_c: float | Literal["auto"] = "auto",
        backup: Backup = "draft",
        patient: bool = False,
        measured: Measured | None = None,
        learned: Learned | None = None,
        end_tokens: Collection[int] = (),
        tokenizer: Any = None,
        concurrency: int = 1,
        prefill_chunk: int = 256,
        prefix_cache: bool = True,
        clock: Callable[[], float] = perf_counter,
        trace: Recorder | None = None,
    ) -> None:
        self._clock = clock
        self._trace = trace
        self._runner = runner
        self._sampler: Sampler = sampler
        self._rules = Rules(
            lookahead=lookahead,
            exact_lookahead=exact_lookahead,
            coupled=sampler == "coupled",
            backup=backup,
            patient=patient,
        )
        self._end_tokens = end_tokens
        self._tokenizer = tokenizer
        self._prefill_chunk = prefill_chunk
        self.batch = Batch(runner, concurrency, MOST_TOKENS, chunk=prefill_chunk, caching=prefix_cache)
        self._commands: deque[Request | int | str] = deque()  # requests, numbers to cancel, names to detach
        self._done = RequestStats()
        self._requests = 0
        self._moving = RLock()  # figures are asked for meanwhile, and tell of every request once
        self._isolation = Isolation(self._fail)
        self._pace, self.costs = Pace(), Costs(measured, learned)
        self._planner = Planner(self._pace, self.costs, lookahead, saguaro_c if sampler == "rejection" else None)
        show = runner.show if runner.shows else None
        self._links = Links(traced(channel, trace), session, self.batch, self._pace, self._isolation, show)
        estimates = self._planner, self._pace, self.costs
        self._rounds = Rounds(runner, self._links, self._rules, *estimates, self._isolation, clock, trace)

    # Called from any thread

    def submit(
        self,
        number: int,
        tokens: Sequence[int],
        params: SamplingParams,
        timeout: float | None = None,
        holders: Sequence[str] = (),
        text: Sequence[int] = (),
    ) -> None:
        """Queue a request. Its tokens come as :class:`~ssd_ray.wire.Output` messages under this number.

        After ``timeout`` seconds, waiting included, it ends with the reason "timeout" and what has come so far.
        ``holders`` are the drafts that are given the prompt by somebody else: this target need not send it to them.
        ``text`` has the tokens that another target has written of it, and handed out, before it died: the request goes
        on behind them, as it would have there.
        """
        deadline = inf if timeout is None else self._clock() + timeout
        self._command(Request(number, tokens, params, deadline, holders, text))

    def cancel(self, number: int) -> None:
        """End a request early, with the reason "cancelled"."""
        self._command(number)

    def detach(self, draft: str) -> None:
        """Forget a draft."""
        self._command(draft)

    def _command(self, command: Request | int | str) -> None:
        self._commands.append(command)
        self._links.channel.wake()

    def stats(self) -> EngineStats:
        """Figures of all requests so far, the running ones included."""
        with self._moving:
            return EngineStats(
                sums=reduce(add, (row.session.stats() for row in self.batch.all), self._done),
                requests=self._requests,
                running=len(self.batch.rows),
                waiting=len(self.batch.waiting) + sum(isinstance(each, Request) for each in tuple(self._commands)),
                drafts=tuple(self._links.drafts),
                kv_pages=self.batch.pool.size,
                kv_pages_free=self.batch.pool.available,
                plan=self._plan(),
                dropped_frames=self._links.dropped,
            )

    def _plan(self) -> str:
        if self._links.drafts:
            return str(self._planner.plan)
        return plan_without_draft(self._rules.lookahead, self._pace, looks_up=self._rules.looks_up)

    # The loop

    def turn(self, idle_seconds: float = IDLE_SECONDS) -> bool:
        """Run one round of what is there; without requests wait for a message. Returns whether there was work."""
        with self._moving:
            self._take_commands()
            self._end_late()
        self._links.receive(0.0)
        self._links.flush()
        with self._moving:
            admitted = self.batch.admit()
        for row in admitted:
            row.unaware, row.shown = self._links.drafters(row), {}
        self._rounds.each(admitted, self._rounds.introduce)
        if not self.batch.rows:
            self._links.receive(idle_seconds)
            return False
        self._prefill()
        self._round(self.batch.ready)
        return True

    def _prefill(self) -> None:
        """Prefill a chunk of one prompt, or several that are no more than that together."""
        left = self._prefill_chunk
        for row in self.batch.unready:
            missing = row.session.position - row.filled
            if left < self._prefill_chunk and missing > left:
                return
            if not self._with_room([row]):
                continue
            left -= sum(cost for _, cost in self._isolation.each([row], self._prefill_chunk_of))

    def _prefill_chunk_of(self, row: Row) -> int:
        start, filled = self._clock(), row.filled
        cost = self.batch.prefill(row)
        self._links.show(row)
        end = self._clock()
        row.session.tally.prefill_ms += 1e3 * (end - start)
        if self._trace is not None:
            self._trace.span("prefill", start, end, row.session.sequence, row.filled - filled)
        return cost

    def _round(self, rows: Sequence[Row]) -> None:
        rows = self._with_room(rows)
        if rows:
            self._rounds.run(rows)
        for row in rows:
            if row.lease is not None and row.session.finish_reason is not None:
                self._end(row)

    def _with_room(self, rows: Sequence[Row]) -> list[Row]:
        """Those of some rows that have pages for what they run next; for whoever had to go drafts are told."""
        with self._moving:
            gone = self.batch.make_room([row for row in rows if row.lease is not None])
        for row in gone:
            self._links.tell(Close(row.session.sequence))
        return [row for row in rows if row.lease is not None]

    # Requests

    def _take_commands(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, Request):
                for _, row in self._isolation.each([command], self._row):
                    self.batch.add(row)
                    if row.session.finish_reason is not None:  # the word of its end got lost
                        self._end(row)
            elif isinstance(command, int):
                self._cancel(command)
            else:
                self._links.remove(command)

    def _cancel(self, number: int) -> None:
        if not self._end_early({number}, "cancelled"):  # its submission was interrupted, and never came
            self._links.put(Output(number, [], "cancelled"))

    def _end_late(self) -> None:
        now = self._clock()
        late = {row.session.sequence for row in self.batch.all if row.deadline <= now}
        if late:
            self._end_early(late, "timeout")

    def _end_early(self, numbers: Collection[int], reason: FinishReason) -> int:
        """End requests that run or wait, for a reason from outside; returns how many there were."""
        rows = [row for row in self.batch.all if row.session.sequence in numbers]
        for row in rows:
            row.session.finish(reason)
            self._end(row)
        return len(rows)

    def _row(self, request: Request) -> Row:
        tokens = [int(token) for token in request.tokens]
        params = request.params.ending_with(self._end_tokens)
        session = TargetSession(
            request.number,
            tokens,
            params,
            max_length=self._runner.max_length,
            vocab_size=self._runner.vocab_size,
            sampled=self._sampler == "rejection" and not params.greedy,
        )
        study = self._study if self._planner.factors is not None else None
        sizes = session.prompt_tokens, self._runner.vocab_size
        verify = verifier(self._sampler, params, *sizes, device=self._runner.device, study=study)
        text = Detokenizer(self._tokenizer, params, tokens) if params.stop else None
        ngrams = NgramIndex([*tokens, *request.text] if self._rules.looks_up else ())
        row = Row(session, verify, text, ngrams, deadline=request.deadline, holders=set(request.holders))
        if request.text:
            row.resume([int(token) for token in request.text])
        return row

    def _study(self, p: torch.Tensor, proposal: Proposal) -> None:
        """Learn what other C's would have done at a position."""
        if self._planner.factors is not None and proposal.plain is not None:
            self._planner.factors.saw_position(weigh(p, proposal, FACTORS))

    def _fail(self, failed: Row | Request, error: Exception) -> None:
        """End a request because of an error of its own."""
        message = f"the target could not go on with it: {told(error)}"
        if isinstance(failed, Request):
            self._requests += 1
            self._links.put(Output(failed.number, [], "error", RequestStats(), message))
            return
        failed.error = message
        failed.session.finish("error")
        self._end(failed)

    def _end(self, row: Row) -> None:
        """Say goodbye to a row that has a finish reason."""
        session = row.session
        if row.lease is not None or row.holders:
            self._links.tell(Close(session.sequence))
        stats = session.stats()
        with self._moving:
            self.batch.remove(row)
            self._done = add(self._done, stats)
            self._requests += 1
        self._links.put(Output(session.sequence, [], session.finish_reason, stats, row.error))
