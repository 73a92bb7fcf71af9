"""The loop of the target: requests in, one batched verification after the other, tokens out.

A round is: fix the speculations, one forward, choose, commit, tell the drafts, tell the driver, wait where that pays.
Nothing in it asks anybody anything: speculations are looked up in the target's own memory.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from math import inf
from time import perf_counter
from typing import Any

import torch

from ssd_ray.config import MAX_LOOKAHEAD, Backup, Sampler, SamplingParams
from ssd_ray.errors import ProtocolError
from ssd_ray.models.contract import ModelRunner
from ssd_ray.saguaro.backup import Pace
from ssd_ray.saguaro.ngram import NgramIndex
from ssd_ray.saguaro.planner import Planner
from ssd_ray.sampling.logprobs import logprobs
from ssd_ray.sampling.verifier import Verifier, verifier
from ssd_ray.sampling.verify import Outcome as Decision
from ssd_ray.speculation.target import FinishReason, TargetSession
from ssd_ray.stats import EngineStats, add
from ssd_ray.text import Detokenizer
from ssd_ray.transport.channel import Channel
from ssd_ray.wire import (
    Begin,
    Close,
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

DRIVER = "driver"
"""The driver's name on the channel."""


@dataclass(slots=True)
class Row:
    """One running request: its session, its KV row, its verifier, and who has been told what."""

    session: TargetSession
    number: int
    verifier: Verifier
    text: Detokenizer | None
    unaware: list[str] = field(default_factory=list)  # drafts to which the sequence is opened with the next round
    accepted: int = 0  # tokens of the last speculation
    added: list[int] = field(default_factory=list)  # tokens of the last round
    announced: list[int] = field(default_factory=list)  # the speculation that drafts were told
    wanted: int = 0  # tokens to wait for
    ngrams: NgramIndex = field(default_factory=NgramIndex)
    looked_up: bool = False  # the next speculation was found in the text
    whole: bool = False  # the next speculation was as long as can be when it was looked up
    deadline: float = inf  # when the request ends, however far it has come


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it waits for its turn."""

    number: int
    tokens: Sequence[int]
    params: SamplingParams
    deadline: float = inf


class Target:
    """A target without its process: everything but where it runs.

    Args:
        runner: the model.
        channel: the hub of the drafts and the driver.
        session: the engine's number on the wire.
        lookahead: tokens in one speculation at most.
        exact_lookahead: with ``patient``, wait for ``lookahead`` tokens rather than for the best number of them.
        sampler: how speculations are verified.
        backup: what a row does on a miss.
        patient: wait for drafts however long they take: the draft is in this process and never late.
        end_tokens: tokens that end a text.
        tokenizer: needed for stop strings alone.
        concurrency: requests that run at the same time.
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
        backup: Backup = "draft",
        patient: bool = False,
        end_tokens: Collection[int] = (),
        tokenizer: Any = None,
        concurrency: int = 1,
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
        self._concurrency = min(concurrency, runner.rows)
        self._commands: deque[Request | int | str] = deque()  # requests, numbers to cancel, names to detach
        self._waiting: deque[Request] = deque()
        self._rows: list[Row] = []
        self._drafts: list[str] = []
        self._outbox: deque[Output] = deque()
        self._done = RequestStats()
        self._requests = 0
        self._pace = Pace()
        self._planner = Planner(self._pace, lookahead)
        self.malformed = 0

    # Called from any thread

    def submit(self, number: int, tokens: Sequence[int], params: SamplingParams, timeout: float | None = None) -> None:
        """Queue a request. Its tokens come as :class:`~ssd_ray.wire.Output` messages under this number.

        After ``timeout`` seconds, waiting included, it ends with the reason "timeout" and what has come so far.
        """
        self._command(Request(number, tokens, params, inf if timeout is None else self._clock() + timeout))

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
        total = self._done
        for row in list(self._rows):
            total = add(total, row.session.stats())
        plan = str(self._planner.plan)
        return EngineStats(
            sums=total,
            requests=self._requests,
            running=len(self._rows),
            waiting=len(self._waiting) + sum(isinstance(command, Request) for command in tuple(self._commands)),
            drafts=tuple(self._drafts),
            plan=plan,
        )

    # The loop

    def turn(self, idle_seconds: float = IDLE_SECONDS) -> bool:
        """Run one round of what is there; without requests wait for a message. Returns whether a round ran."""
        self._take_commands()
        self._end_late()
        self._receive(0.0)
        self._flush()
        self._admit()
        if not self._rows:
            self._receive(idle_seconds)
            return False
        self._round()
        return True

    def _round(self) -> None:
        start = self._clock()
        rows = self._rows
        for row in rows:
            self._begin(row)
        verify_start = self._clock()
        logits = self._verify(rows)
        verify_ms = 1e3 * (self._clock() - verify_start)
        for row, decision in zip(rows, self._decide(rows, logits), strict=True):
            self._commit(row, decision, verify_ms)
        self._receive(0.0)  # after the outcomes are known: most of a tree is done with then
        for row, row_logits in zip(rows, logits, strict=True):
            self._announce(row)
            self._report(row, row_logits)
        wait_ms = self._wait([row for row in rows if row.session.finish_reason is None])
        host_ms = 1e3 * (self._clock() - start) - verify_ms - wait_ms
        for row in rows:
            tally = row.session.tally
            tally.verify_ms += verify_ms / len(rows)
            tally.wait_ms += wait_ms / len(rows)
            tally.host_ms += host_ms / len(rows)
            tally.waits += wait_ms > 0.0
        self._rows = [row for row in rows if not self._ended(row)]
        if (plan := self._planner.update()) is not None:
            logger.info("plan: %s", plan)

    def _begin(self, row: Row) -> None:
        speculation = row.session.begin(self._lookahead)
        session = row.session
        if speculation != row.announced:
            for share, draft in enumerate(self._drafts):
                self._send(draft, Begin(session.sequence, session.round, speculation, share, len(self._drafts)))
        for draft in row.unaware:
            self._open(draft, row)
        row.unaware.clear()

    @torch.inference_mode()
    def _verify(self, rows: Sequence[Row]) -> torch.Tensor:
        """One forward over all rows; logits, float32 [rows, SHAPE, V]."""
        tokens = torch.zeros(len(rows), SHAPE, dtype=torch.int64)
        for index, row in enumerate(rows):
            inputs = row.session.inputs
            tokens[index, : len(inputs)] = torch.tensor(inputs)
        return self._runner.append([row.number for row in rows], tokens, [row.session.position for row in rows])

    @torch.inference_mode()
    def _decide(self, rows: Sequence[Row], logits: torch.Tensor) -> list[Decision]:
        decisions = []
        for row, row_logits in zip(rows, logits, strict=True):
            session = row.session
            speculation = session.cache.speculation
            proposals = session.proposals
            decisions.append(
                row.verifier.decide(row_logits[: len(speculation) + 1], session.tokens, speculation, proposals)
            )
        return decisions

    def _commit(self, row: Row, decision: Decision, verify_ms: float) -> None:
        session = row.session
        n = len(session.cache.speculation)
        self._pace.saw_verification(verify_ms, n, decision.accepted, looked_up=row.looked_up, whole=row.whole)
        row.accepted = decision.accepted
        row.added = session.commit(decision)
        self._look_for_stop(row, row.added)

    def _announce(self, row: Row) -> None:
        """Tell the drafts the outcome and what is verified next."""
        session = row.session
        if session.finish_reason is None:
            hit = session.look_up(self._drafts)
            self._look_up_text(row)
            most = session.most(self._lookahead)
            row.announced = session.cache.speculate(most)
            row.whole = len(row.announced) == most and not row.looked_up
            row.wanted = len(row.announced) if row.looked_up else self._wanted(session)
            if not hit:
                session.back_up("ngram" if row.looked_up else "draft" if row.wanted else "none")
            for share, draft in enumerate(self._drafts):
                message = Outcome(
                    session.sequence,
                    session.round - 1,
                    session.position,
                    row.accepted,
                    session.tokens[-1],
                    row.announced,
                    session.hit,
                    row.wanted,
                    share,
                    len(self._drafts),
                )
                if draft not in row.unaware:
                    self._send(draft, message)

    @torch.inference_mode()
    def _report(self, row: Row, logits: torch.Tensor) -> None:
        """Tell the driver the new tokens, which the first rows of the logits decided."""
        most, wanted = row.session.params.logprobs, []
        if most is not None:
            wanted = [TokenLogprobs(*entry) for entry in logprobs(logits, row.added, most)]
        self._emit(Output(row.session.sequence, row.added, logprobs=wanted))

    def _look_up_text(self, row: Row) -> None:
        """On a miss speculate what the text itself suggests, if the configuration, or the odds, say so."""
        session, row.looked_up = row.session, False
        if self._backup not in ("ngram", "auto"):
            return
        row.ngrams.extend(row.added)
        most = session.most(self._lookahead)
        proposal = [] if session.hit else row.ngrams.propose(most)
        waits = self._worth_waiting(session)
        if proposal and (self._backup == "ngram" or self._pace.prefers_lookup(len(proposal), most, waits=waits)):
            session.cache.plant(proposal)
            row.looked_up = True

    def _look_for_stop(self, row: Row, added: list[int]) -> None:
        """End the request behind the token that completes a stop string."""
        if row.text is None:
            return
        row.text.push(added)
        if row.text.stopped:
            surplus = len(row.session.generated) - row.text.count
            del added[len(added) - surplus :]
            row.session.finish("stop", row.text.count)

    def _wanted(self, session: TargetSession) -> int:
        """How many tokens the next speculation should have: more than there are only if waiting pays."""
        most = session.most(self._lookahead)
        available = session.cache.available(most)
        if not self._worth_waiting(session):
            return available
        if self._exact_lookahead:
            return most
        wanted = self._pace.best_length(available, most) if available else min(most, self._planner.plan.wait)
        return max(wanted, min(1, most)) if self._patient else wanted  # what is never tried is never known

    def _wait(self, rows: Sequence[Row]) -> float:
        """Wait for drafts where a longer speculation is worth it; returns milliseconds."""
        start = self._clock()
        waited = False
        for row in rows:
            waited |= self._wait_for(row, start)
        return 1e3 * (self._clock() - start) if waited else 0.0

    def _wait_for(self, row: Row, start: float) -> bool:
        cache, wanted = row.session.cache, row.wanted
        steps = wanted - cache.available(wanted)
        if steps <= 0:
            return False
        deadline = start + (3600.0 if self._patient else 1e-3 * self._pace.patience_ms(steps))
        while cache.available(wanted) < wanted and (left := deadline - self._clock()) > 0:
            if not self._receive(left) and self._patient:
                break
        came = cache.available(wanted) >= wanted
        self._pace.saw_wait(1e3 * (self._clock() - start), steps, came=came)
        return True

    def _worth_waiting(self, session: TargetSession) -> bool:
        """Whether some draft is at work on this sequence: it has said something about the round before this one."""
        at_work = max(session.cache.latest.values(), default=-1) >= max(0, session.round - 1)
        return self._patient or (self._backup in ("draft", "auto") and at_work)

    # Requests

    def _take_commands(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, Request):
                self._waiting.append(command)
            elif isinstance(command, int):
                self._end_early({command}, "cancelled")
            else:
                self._remove_draft(command)

    def _end_late(self) -> None:
        now = self._clock()
        late = {row.session.sequence for row in self._rows if row.deadline <= now}
        late |= {request.number for request in self._waiting if request.deadline <= now}
        if late:
            self._end_early(late, "timeout")

    def _end_early(self, numbers: Collection[int], reason: FinishReason) -> None:
        """End requests that run or wait, for a reason from outside."""
        for row in self._rows:
            if row.session.sequence in numbers:
                row.session.finish(reason)
        self._rows = [row for row in self._rows if not self._ended(row)]
        for request in [request for request in self._waiting if request.number in numbers]:
            self._waiting.remove(request)
            self._requests += 1
            self._emit(Output(request.number, [], reason, RequestStats(prompt_tokens=len(request.tokens))))

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < self._concurrency:
            self._start(self._waiting.popleft())

    def _start(self, request: Request) -> None:
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
        number = min(set(range(self._runner.rows)) - {row.number for row in self._rows})
        verify = verifier(self._sampler, params, session.prompt_tokens, self._runner.vocab_size)
        text = Detokenizer(self._tokenizer, params.stop, tokens, params.min_tokens) if params.stop else None
        row = Row(session, number, verify, text, ngrams=NgramIndex(tokens if self._backup in ("ngram", "auto") else ()))
        row.deadline = request.deadline
        for draft in self._drafts:
            self._open(draft, row)
        start = self._clock()
        self._runner.prefill(number, tokens[:-1])
        session.tally.prefill_ms = 1e3 * (self._clock() - start)
        self._rows.append(row)

    def _ended(self, row: Row) -> bool:
        """Say goodbye to a row that has a finish reason."""
        session = row.session
        if session.finish_reason is None:
            return False
        for draft in self._drafts:
            self._send(draft, Close(session.sequence))
        stats = session.stats()
        self._done = add(self._done, stats)
        self._requests += 1
        self._emit(Output(session.sequence, [], session.finish_reason, stats))
        return True

    # Messages

    def _receive(self, timeout: float) -> bool:
        """Take what has arrived, waiting for the first frame; returns whether anything came."""
        received = self._channel.receive(timeout)
        came = received is not None
        while received is not None:
            peer, frame = received
            try:
                self._handle(peer, decode(self._session, frame))
            except ProtocolError as error:
                self.malformed += 1
                logger.debug("dropped a frame of %s: %s", peer, error)
            received = self._channel.receive(0.0)
        return came

    def _handle(self, peer: str, message: Message) -> None:
        match message:
            case Nodes() if peer in self._drafts:
                self._pace.saw_step(message.step_ms)
                for row in self._rows:
                    if row.session.sequence == message.sequence:
                        row.session.add(peer, message)
            case Hello() if message.name == peer and peer not in self._drafts:
                self._drafts.append(peer)
                for row in self._rows:
                    row.unaware.append(peer)
            case Lost() if peer in self._drafts:
                for row in self._rows:
                    if row.session.sequence == message.sequence and peer not in row.unaware:
                        row.unaware.append(peer)
            case Goodbye():
                self._remove_draft(peer)
            case _:
                pass

    def _remove_draft(self, draft: str) -> None:
        """The guesses are dealt anew with the next outcome."""
        if draft in self._drafts:
            self._drafts.remove(draft)
            for row in self._rows:
                row.session.cache.forget(draft)
                row.unaware = [name for name in row.unaware if name != draft]

    def _open(self, draft: str, row: Row) -> None:
        session = row.session
        share, shares = self._drafts.index(draft), len(self._drafts)
        speculation = session.cache.speculation
        self._send(
            draft,
            Open(
                session.sequence,
                session.round,
                session.tokens,
                speculation,
                session.params,
                share,
                shares,
                session.prompt_tokens,
            ),
        )

    def _send(self, draft: str, message: Message) -> None:
        self._channel.send(draft, encode(self._session, message))

    def _emit(self, output: Output) -> None:
        """Tokens must not get lost: what the channel does not take now is sent later, in order."""
        self._outbox.append(output)
        self._flush()

    def _flush(self) -> None:
        while self._outbox and self._channel.send(DRIVER, encode(self._session, self._outbox[0])):
            self._outbox.popleft()
