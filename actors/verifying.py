"""The loop of the target: requests in, one batched verification after the other, tokens out.

A round is: fix the speculations, one forward, choose, commit, tell the drafts, tell the driver, wait where that pays.
Nothing in it asks anybody anything: speculations are looked up in the target's own memory. What is done for a row is
done alone: should it raise, that row ends with the error, and the others do not notice.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import reduce
from itertools import islice
from math import inf
from threading import RLock
from time import perf_counter
from typing import Any, Literal

import torch

from ssd_ray.actors.batch import Batch, Request, Row
from ssd_ray.actors.isolation import Isolation, told
from ssd_ray.config import MAX_LOOKAHEAD, Backup, Sampler, SamplingParams
from ssd_ray.errors import ProtocolError
from ssd_ray.models.contract import ModelRunner
from ssd_ray.saguaro.backup import Pace
from ssd_ray.saguaro.factors import FACTORS
from ssd_ray.saguaro.ngram import NgramIndex
from ssd_ray.saguaro.planner import Planner, plan_without_draft
from ssd_ray.sampling.logprobs import logprobs
from ssd_ray.sampling.rejection import Proposal, weigh
from ssd_ray.sampling.verifier import verifier
from ssd_ray.sampling.verify import Outcome as Decision
from ssd_ray.speculation.target import FinishReason, TargetSession
from ssd_ray.stats import EngineStats, add
from ssd_ray.text import Detokenizer
from ssd_ray.transport.channel import Channel
from ssd_ray.wire import (
    Begin,
    Close,
    Declined,
    Goodbye,
    Hello,
    Lost,
    Message,
    Nodes,
    Open,
    Outcome,
    Output,
    RequestStats,
    TokenLogprobs,
    decode,
    encode,
)

logger = logging.getLogger(__name__)

SHAPE = MAX_LOOKAHEAD + 1
"""Tokens of every decoding forward, whatever the method: one shape, one rounding, one text also in bfloat16."""

IDLE_SECONDS = 1.0
"""How long a loop without work waits for a message. Whatever else may give it work wakes it."""

MOST_OUTPUTS = 64
"""Messages of tokens in one frame."""

DRIVER = "driver"
"""The driver's name on the channel."""


class Target:
    """A target without its process: everything but where it runs.

    Args:
        runner: the model.
        channel: the hub of the drafts and the driver.
        session: the engine's number on the wire.
        lookahead: tokens in one speculation at most.
        exact_lookahead: with ``patient``, wait for ``lookahead`` tokens rather than for the best number of them.
        sampler: how speculations are verified.
        saguaro_c: in rejection mode, Saguaro's C, or "auto".
        backup: what a row does on a miss.
        patient: wait for drafts however long they take: the draft is in this process and never late.
        end_tokens: tokens that end a text.
        tokenizer: needed for stop strings alone.
        concurrency: requests that run at the same time.
        prefill_chunk: tokens of prompts that are prefilled between two rounds.
        prefix_cache: keep the KV of what has ended for prompts that begin alike.
        clock: seconds; another one lets time be simulated.
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
        end_tokens: Collection[int] = (),
        tokenizer: Any = None,
        concurrency: int = 1,
        prefill_chunk: int = 256,
        prefix_cache: bool = True,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._clock = clock
        self._runner = runner
        self._channel = channel
        self._session = session
        self._lookahead = lookahead
        self._exact_lookahead = exact_lookahead
        self._sampler: Sampler = sampler
        self._backup = backup
        self._patient = patient
        self._end_tokens = end_tokens
        self._tokenizer = tokenizer
        self._prefill_chunk = prefill_chunk
        self._looks_up = backup in ("ngram", "auto")
        self.batch = Batch(runner, concurrency, SHAPE, caching=prefix_cache)
        self._isolation = Isolation(self._fail)
        self._commands: deque[Request | int | str] = deque()  # requests, numbers to cancel, names to detach
        self._drafts: list[str] = []
        self._outbox: deque[Output] = deque()
        self._done = RequestStats()
        self._requests = 0
        self._moving = RLock()  # figures are asked for meanwhile, and tell of every request once
        self._pace = Pace()
        self._planner = Planner(self._pace, lookahead, saguaro_c if sampler == "rejection" else None)
        self.malformed = 0

    # Called from any thread

    def submit(
        self,
        number: int,
        tokens: Sequence[int],
        params: SamplingParams,
        timeout: float | None = None,
        holders: Sequence[str] = (),
    ) -> None:
        """Queue a request. Its tokens come as :class:`~ssd_ray.wire.Output` messages under this number.

        After ``timeout`` seconds, waiting included, it ends with the reason "timeout" and what has come so far.
        ``holders`` are the drafts that are given the prompt by somebody else: this target need not send it to them.
        """
        deadline = inf if timeout is None else self._clock() + timeout
        self._command(Request(number, tokens, params, deadline, holders))

    def cancel(self, number: int) -> None:
        """End a request early, with the reason "cancelled"."""
        self._command(number)

    def detach(self, draft: str) -> None:
        """Forget a draft."""
        self._command(draft)

    def _command(self, command: Request | int | str) -> None:
        self._commands.append(command)
        self._channel.wake()

    def stats(self) -> EngineStats:
        """Figures of all requests so far, the running ones included."""
        with self._moving:
            return EngineStats(
                sums=reduce(add, (row.session.stats() for row in self.batch.all), self._done),
                requests=self._requests,
                running=len(self.batch.rows),
                waiting=len(self.batch.waiting) + sum(isinstance(each, Request) for each in tuple(self._commands)),
                drafts=tuple(self._drafts),
                kv_pages=self.batch.pool.size,
                kv_pages_free=self.batch.pool.available,
                plan=self._plan(),
            )

    def _plan(self) -> str:
        if self._drafts:
            return str(self._planner.plan)
        return plan_without_draft(self._lookahead, self._pace, looks_up=self._looks_up)

    # The loop

    def turn(self, idle_seconds: float = IDLE_SECONDS) -> bool:
        """Run one round of what is there; without requests wait for a message. Returns whether there was work."""
        with self._moving:
            self._take_commands()
            self._end_late()
        self._receive(0.0)
        self._flush()
        with self._moving:
            admitted = self.batch.admit()
        for row in admitted:
            row.unaware = self._drafters(row)
        self._each(admitted, self._introduce)
        if not self.batch.rows:
            self._receive(idle_seconds)
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
            left -= sum(cost for _, cost in self._isolation.each([row], self._prefill_chunk_of))

    def _prefill_chunk_of(self, row: Row) -> int:
        start = self._clock()
        cost = self.batch.prefill(row, self._prefill_chunk)
        row.session.tally.prefill_ms += 1e3 * (self._clock() - start)
        return cost

    def _round(self, rows: Sequence[Row]) -> None:
        with self._moving:
            gone = self.batch.make_room(rows)
        for row in gone:
            self._tell(Close(row.session.sequence))
        rows = [row for row in rows if row.lease is not None]
        if rows:
            self._run_round(rows)

    def _run_round(self, rows: Sequence[Row]) -> None:
        start = self._clock()
        wait_ms = self._wait(rows)
        rows = self._begin(rows)
        verify_start = self._clock()
        logits = dict(self._isolation.together(rows, self._verify))
        verify_ms = 1e3 * (self._clock() - verify_start)
        rows = self._each(rows, lambda row: self._commit(row, self._decide(row, logits[row]), verify_ms))
        self._receive(0.0)  # after the outcomes are known: most of a tree is done with then
        self._announce(rows)
        rows = self._each(rows, lambda row: self._report(row, logits[row]))
        self._flush()
        host_ms = 1e3 * (self._clock() - start) - verify_ms - wait_ms
        for row in rows:
            row.session.tally.spent(verify_ms / len(rows), wait_ms / len(rows), host_ms / len(rows))
            if row.session.finish_reason is not None:
                self._end(row)
        if (plan := self._planner.update()) is not None:
            logger.info("plan: %s", plan)

    def _each(self, rows: Iterable[Row], step: Callable[[Row], None]) -> list[Row]:
        """Do something for each row that still runs; returns those that are left."""
        done = self._isolation.each([row for row in rows if row.lease is not None], step)
        return [row for row, _ in done]

    def _begin(self, rows: Sequence[Row]) -> list[Row]:
        rows = self._each(rows, self._fix_speculation)
        changed = [row for row in rows if row.session.cache.speculation != row.announced]
        for share, draft in enumerate(self._drafts):
            self._send(draft, *(self._begun(row.session, share) for row in changed))
        return self._each(rows, self._introduce)

    def _fix_speculation(self, row: Row) -> None:
        row.session.begin(self._lookahead)

    def _introduce(self, row: Row) -> None:
        """Open the sequence to drafts that do not know of it."""
        for draft in row.unaware:
            self._open(draft, row)
        row.unaware.clear()

    def _begun(self, session: TargetSession, share: int) -> Begin:
        return Begin(session.sequence, session.round, session.cache.speculation, share, len(self._drafts))

    @torch.inference_mode()
    def _verify(self, rows: Sequence[Row]) -> torch.Tensor:
        """One forward over the rows; logits, float32 [rows, SHAPE, V]."""
        tokens = torch.zeros(len(rows), SHAPE, dtype=torch.int64)
        for index, row in enumerate(rows):
            inputs = row.session.inputs
            tokens[index, : len(inputs)] = torch.tensor(inputs)
        return self._runner.append([row.number for row in rows], tokens, [row.session.position for row in rows])

    @torch.inference_mode()
    def _decide(self, row: Row, logits: torch.Tensor) -> Decision:
        session = row.session
        speculation = session.cache.speculation
        return row.verifier.decide(logits[: len(speculation) + 1], session.tokens, speculation, session.proposals)

    def _study(self, p: torch.Tensor, proposal: Proposal) -> None:
        """Learn what other C's would have done at a position."""
        if self._planner.factors is not None and proposal.plain is not None:
            self._planner.factors.saw_position(weigh(p, proposal, FACTORS))

    def _commit(self, row: Row, decision: Decision, verify_ms: float) -> None:
        session = row.session
        n = len(session.cache.speculation)
        self._pace.saw_verification(verify_ms, n, decision.accepted, looked_up=row.looked_up, whole=row.whole)
        self._pace.saw_outcomes(session.cache.outcomes)
        row.accepted = decision.accepted
        row.added = session.commit(decision)
        row.filled = session.position
        if self._looks_up:
            row.ngrams.extend(row.added)
        self._look_for_stop(row, row.added)

    @torch.inference_mode()
    def _report(self, row: Row, logits: torch.Tensor) -> None:
        """Tell the driver the new tokens, which the first rows of the logits decided."""
        most, wanted = row.session.params.logprobs, []
        if most is not None:
            wanted = [TokenLogprobs(*entry) for entry in logprobs(logits, row.added, most)]
        self._outbox.append(Output(row.session.sequence, row.added, logprobs=wanted))

    def _look_for_stop(self, row: Row, added: list[int]) -> None:
        """End the request behind the token that completes a stop string."""
        if row.text is None:
            return
        row.text.push(added)
        if row.text.stopped:
            surplus = len(row.session.generated) - row.text.count
            del added[len(added) - surplus :]
            row.session.finish("stop", row.text.count)

    def _announce(self, rows: Sequence[Row]) -> None:
        """Tell the drafts the outcomes and what is verified next."""
        going = self._each((row for row in rows if row.session.finish_reason is None), self._look_up)
        self._plan_wait(going)
        going = self._each(going, self._speculate)
        for share, draft in enumerate(self._drafts):
            self._send(draft, *(self._outcome(row, share) for row in going if self._follows(draft, row)))

    def _speculate(self, row: Row) -> None:
        row.announced = row.session.cache.speculate(row.session.most(self._lookahead))

    def _look_up(self, row: Row) -> None:
        """Find what is prepared for the outcome."""
        session = row.session
        hit = session.look_up(self._drafters(row))
        if self._planner.factors is not None and row.accepted == self._lookahead:
            self._planner.factors.saw_whole(hit)
        most = session.most(self._lookahead)
        row.looked_up = False
        row.whole = session.cache.available(most) == most
        if not hit:
            self._back_up(row, most)

    def _back_up(self, row: Row, most: int) -> None:
        """After a miss speculate what the text itself suggests, if the configuration, or the odds, say so."""
        session = row.session
        waits = self._worth_waiting(row)
        proposal = row.ngrams.propose(most) if self._looks_up else []
        if proposal and (self._backup == "ngram" or self._pace.prefers_lookup(len(proposal), most, waits=waits)):
            session.cache.plant(proposal)
            row.looked_up = True
        session.back_up("ngram" if row.looked_up else "draft" if waits else "none")

    def _plan_wait(self, rows: Sequence[Row]) -> None:
        """Set how many tokens each row is to have: more than there are only if that pays for the rows together."""
        lengths = [self._lengths(row) for row in rows]
        steps = self._steps(lengths)
        for row, (available, most) in zip(rows, lengths, strict=True):
            row.wanted = min(available + steps, most)

    def _lengths(self, row: Row) -> tuple[int, int]:
        """How many tokens a row has, and how many it could have."""
        most = row.session.most(self._lookahead)
        available = row.session.cache.available(most)
        return available, most if self._worth_waiting(row) and not row.looked_up else available

    def _steps(self, lengths: Sequence[tuple[int, int]]) -> int:
        """Draft steps to wait for."""
        missing = max((most - available for available, most in lengths), default=0)
        if self._exact_lookahead or not missing:
            return missing
        alone = lengths == [(0, missing)]
        steps = min(missing, self._planner.plan.wait) if alone else self._pace.best_steps(lengths)
        empty = self._patient and not all(available for available, most in lengths if most)
        return max(steps, 1 if empty else 0)  # what is never tried is never known

    def _wait(self, rows: Sequence[Row]) -> float:
        """Wait for drafts where longer speculations are worth it; returns milliseconds."""
        self._plan_wait(rows)
        start = self._clock()
        steps = max(self._missing(row) for row in rows)
        if steps <= 0:
            return 0.0
        deadline = start + (inf if self._patient else 1e-3 * self._pace.patience_ms(steps))
        while (short := any(self._missing(row) > 0 for row in rows)) and (left := deadline - self._clock()) > 0:
            if not self._receive(left) and self._patient:
                break
        waited_ms = 1e3 * (self._clock() - start)
        # The draft in this process is never late: what does not come is not to be had, and nothing was lost by asking.
        self._pace.saw_wait(waited_ms, steps, came=self._patient or not short)
        return waited_ms

    @staticmethod
    def _missing(row: Row) -> int:
        """Tokens that the row is to have and has not."""
        return row.wanted - row.session.cache.available(row.wanted)

    def _drafters(self, row: Row) -> list[str]:
        """The drafts that take part in a row."""
        return [draft for draft in self._drafts if draft not in row.declined]

    def _follows(self, draft: str, row: Row) -> bool:
        """Whether a draft knows of a row and takes part in it."""
        return draft not in row.unaware and draft not in row.declined

    def _worth_waiting(self, row: Row) -> bool:
        """Whether some draft is at work on this row: it has said something about the round before this one."""
        if not self._drafters(row):
            return False
        session = row.session
        at_work = max(session.cache.latest.values(), default=-1) >= max(0, session.round - 1)
        return self._patient or (self._backup in ("draft", "auto") and at_work)

    # Requests

    def _take_commands(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, Request):
                for _, row in self._isolation.each([command], self._row):
                    self.batch.add(row)
            elif isinstance(command, int):
                self._end_early({command}, "cancelled")
            else:
                self._remove_draft(command)

    def _end_late(self) -> None:
        now = self._clock()
        late = {row.session.sequence for row in self.batch.all if row.deadline <= now}
        if late:
            self._end_early(late, "timeout")

    def _end_early(self, numbers: Collection[int], reason: FinishReason) -> None:
        """End requests that run or wait, for a reason from outside."""
        for row in self.batch.all:
            if row.session.sequence in numbers:
                row.session.finish(reason)
                self._end(row)

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
        verify = verifier(self._sampler, params, session.prompt_tokens, self._runner.vocab_size, study)
        text = Detokenizer(self._tokenizer, params, tokens) if params.stop else None
        ngrams = NgramIndex(tokens if self._looks_up else ())
        return Row(session, verify, text, ngrams, deadline=request.deadline, holders=set(request.holders))

    def _fail(self, failed: Row | Request, error: Exception) -> None:
        """End a request because of an error of its own."""
        message = f"the target could not go on with it: {told(error)}"
        if isinstance(failed, Request):
            self._requests += 1
            self._outbox.append(Output(failed.number, [], "error", error=message))
            return
        failed.error = message
        failed.session.finish("error")
        self._end(failed)

    def _end(self, row: Row) -> None:
        """Say goodbye to a row that has a finish reason."""
        session = row.session
        if row.lease is not None or row.holders:
            self._tell(Close(session.sequence))
        stats = session.stats()
        with self._moving:
            self.batch.remove(row)
            self._done = add(self._done, stats)
            self._requests += 1
        self._outbox.append(Output(session.sequence, [], session.finish_reason, stats, row.error))

    # Messages

    def _receive(self, timeout: float) -> bool:
        """Take what has arrived, waiting for the first frame; returns whether anything came."""
        received = self._channel.receive(timeout)
        came = received is not None
        while received is not None:
            peer, frame = received
            try:
                for message in decode(self._session, frame):
                    self._handle(peer, message)
            except ProtocolError as error:
                self.malformed += 1
                logger.debug("dropped a frame of %s: %s", peer, error)
            received = self._channel.receive(0.0)
        return came

    def _handle(self, peer: str, message: Message) -> None:
        match message:
            case Nodes() if peer in self._drafts:
                self._pace.saw_step(message.step_ms)
                row = self._running(message.sequence)
                if row is not None:
                    self._isolation.each([row], lambda row: row.session.add(peer, message))
                else:  # it may have missed the end, and would keep a row and memory for ever
                    self._send(peer, Close(message.sequence))
            case Hello() if message.name == peer and peer not in self._drafts:
                self._drafts.append(peer)
                for row in self.batch.rows:
                    row.unaware.append(peer)
            case Lost() if peer in self._drafts:
                row = self._running(message.sequence)
                if row is not None and peer not in row.unaware:
                    row.unaware.append(peer)
            case Declined() if peer in self._drafts:
                row = self._running(message.sequence)
                if row is not None:
                    row.declined.add(peer)
                    row.session.cache.forget(peer)
            case Goodbye():
                self._remove_draft(peer)
            case _:
                pass

    def _remove_draft(self, draft: str) -> None:
        """The guesses are dealt anew with the next outcome."""
        if draft in self._drafts:
            self._drafts.remove(draft)
            for row in self.batch.rows:
                row.session.cache.forget(draft)
                row.unaware = [name for name in row.unaware if name != draft]
                row.declined.discard(draft)

    def _running(self, sequence: int) -> Row | None:
        return next((row for row in self.batch.rows if row.session.sequence == sequence), None)

    def _outcome(self, row: Row, share: int) -> Outcome:
        session = row.session
        return Outcome(
            session.sequence,
            session.round - 1,
            session.position,
            row.accepted,
            session.tokens[-1],
            row.announced,
            session.hit,
            row.wanted,
            self._planner.c or 0.0,
            share,
            len(self._drafts),
        )

    def _open(self, draft: str, row: Row) -> None:
        session = row.session
        share, shares = self._drafts.index(draft), len(self._drafts)
        speculation = session.cache.speculation
        omitted = session.prompt_tokens if draft in row.holders else 0
        row.holders.discard(draft)  # should it not have the prompt after all, it asks, and is sent everything
        self._send(
            draft,
            Open(
                session.sequence,
                session.round,
                session.tokens[omitted:],
                speculation,
                session.params,
                self._planner.c or 0.0,
                share,
                shares,
                session.prompt_tokens,
                omitted,
            ),
        )

    def _tell(self, message: Message) -> None:
        """Say something to all drafts."""
        for draft in self._drafts:
            self._send(draft, message)

    def _send(self, draft: str, *messages: Message) -> None:
        if messages:
            self._channel.send(draft, encode(self._session, *messages))

    def _flush(self) -> None:
        """Tokens must not get lost: what the channel does not take now is sent later, in order."""
        while outputs := list(islice(self._outbox, MOST_OUTPUTS)):
            if not self._channel.send(DRIVER, encode(self._session, *outputs)):
                return
            for _ in outputs:
                self._outbox.popleft()
