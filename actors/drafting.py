"""The loop of a draft: messages in, one batched forward at a time, nodes out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from ssd_ray.config import MAX_LOOKAHEAD
from ssd_ray.errors import ProtocolError
from ssd_ray.models.contract import ModelRunner
from ssd_ray.saguaro.fanout import MAX_RANK, FanOutPolicy
from ssd_ray.sampling.logits import scores
from ssd_ray.sampling.noise import NoiseRows
from ssd_ray.sampling.penalties import Penalties, penalties
from ssd_ray.sampling.rejection import Proposing, stream_seed
from ssd_ray.speculation.draft import DraftSession, Item, Ranking
from ssd_ray.transport.channel import HUB, Channel
from ssd_ray.wire import Begin, Close, Goodbye, Hello, Lost, Message, Open, Outcome, decode, encode

logger = logging.getLogger(__name__)

RANKED = 32
"""Tokens that are kept of each distribution, best first."""

HELLO_SECONDS = 1.0
KNOCK_SECONDS = 0.02
"""How soon a greeting is said again: one that was sent, and one for which no connection was there yet."""

LOST_ROUNDS = 8
"""Rounds after which a sequence that is unknown is asked for again."""


class Draft:
    """A draft without its process: everything but where it runs.

    Args:
        runner: the model; each sequence takes one of its rows, further sequences are left alone.
        channel: to the target.
        session: the engine's number on the wire.
        policy: makes the fan-out policy, which learns from all sequences together.
        width: branches in one forward.
        lookahead: tokens in one speculation at most.
        branching: False drafts the one chain of plain speculative decoding.
        proposing: how tokens are drawn in rejection mode; None is coupled mode.
        budget, strict, text_lookup: see :class:`~ssd_ray.speculation.draft.DraftSession`.
        clock: seconds; another one lets time be simulated.
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
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._clock = clock
        self._budget, self._strict, self._text_lookup = budget, strict, text_lookup
        self._proposing = proposing
        self._runner = runner
        self._channel = channel
        self._session = session
        self._policy = policy()
        self._width = width if branching else 1
        self._lookahead = lookahead
        self._branching = branching
        self._sequences: dict[int, DraftSession] = {}
        self._noise: dict[int, NoiseRows] = {}
        self._penalties: dict[int, Penalties | None] = {}
        self._rows: dict[int, int] = {}
        self._asked: dict[int, int] = {}
        self._hello_due = 0.0
        self._step_ms = 0.0
        self.malformed = 0

    @property
    def name(self) -> str:
        """The draft's name on the channel."""
        return self._channel.name

    @property
    def sequences(self) -> dict[int, DraftSession]:
        """The open sequences by number."""
        return self._sequences

    def turn(self, idle_seconds: float = HELLO_SECONDS) -> bool:
        """Take what has arrived and run one step; without work wait for a message. Returns whether a step ran."""
        self._say_hello()
        self._receive(0.0)
        if self._step():
            return True
        self._receive(min(idle_seconds, max(0.0, self._hello_due - self._clock())))
        return False

    def leave(self) -> None:
        """Tell the target that this draft goes."""
        self._send(Goodbye(self._channel.name))

    # Messages

    def _say_hello(self) -> None:
        # Again and again: the target may not be there yet, or may have given this draft up while it was stopped.
        now = self._clock()
        if now >= self._hello_due:
            sent = self._send(Hello(self._channel.name))
            self._hello_due = now + (HELLO_SECONDS if sent else KNOCK_SECONDS)

    def _send(self, message: Message) -> bool:
        return self._channel.send(HUB, encode(self._session, message))

    def _receive(self, timeout: float) -> None:
        received = self._channel.receive(timeout)
        while received is not None:
            try:
                self._handle(decode(self._session, received[1]))
            except ProtocolError as error:
                self.malformed += 1
                logger.debug("dropped a frame: %s", error)
            received = self._channel.receive(0.0)

    def _handle(self, message: Message) -> None:
        match message:
            case Open():
                self._open(message)
            case Outcome():
                self._advance(message)
            case Begin() if message.sequence in self._sequences:
                self._sequences[message.sequence].begin(message)
            case Close():
                self._close(message.sequence)
            case _:
                pass

    def _open(self, message: Open) -> None:
        self._asked.pop(message.sequence, None)
        known = self._sequences.get(message.sequence)
        if not message.tokens or len(message.tokens) > self._runner.max_length:
            return
        free = set(range(self._runner.rows)) - set(self._rows.values())
        if known is None and not free:
            return
        self._penalties[message.sequence] = penalties(message.params, message.prompt_tokens, self._runner.vocab_size)
        if known is not None:
            known.reopen(message)
        else:
            self._rows[message.sequence] = min(free)
            seed = message.params.seed if self._proposing is None else stream_seed(message.params.seed, "draft")
            self._noise[message.sequence] = NoiseRows(seed, self._runner.vocab_size)
            self._sequences[message.sequence] = DraftSession(
                message,
                self._policy,
                lookahead=self._lookahead,
                branching=self._branching,
                budget=self._budget,
                strict=self._strict,
                text_lookup=self._text_lookup,
            )

    def _advance(self, message: Outcome) -> None:
        sequence = self._sequences.get(message.sequence)
        if sequence is not None and message.round < sequence.round:
            return  # said before
        if sequence is None or not sequence.expects(message):
            self._ask(message)
            return
        moves = sequence.advance(message)
        self._runner.move(self._rows[message.sequence], moves.source, moves.destination)

    def _ask(self, message: Outcome) -> None:
        if message.round >= self._asked.get(message.sequence, -LOST_ROUNDS) + LOST_ROUNDS:
            self._asked[message.sequence] = message.round
            self._send(Lost(message.sequence))

    def _close(self, sequence: int) -> None:
        self._asked.pop(sequence, None)
        if self._sequences.pop(sequence, None) is not None:
            del self._rows[sequence], self._noise[sequence], self._penalties[sequence]

    # Work

    def _step(self) -> bool:
        """Run one step of the first sequence that has work, and put that sequence last."""
        for number, sequence in list(self._sequences.items()):
            start = self._clock()
            row = self._rows[number]
            prefill = sequence.prefill()
            if prefill is not None:
                self._runner.prefill(row, prefill.tokens, prefill.start)
                return True
            items = sequence.next_step(self._width)
            if items:
                self._finish(sequence, items, start)
                self._sequences[number] = self._sequences.pop(number)
                return True
        return False

    def _finish(self, sequence: DraftSession, items: Sequence[Item], start: float) -> None:
        nodes = sequence.complete(items, self._rankings(sequence, items), step_ms=self._step_ms)
        if nodes is not None:
            self._send(nodes)
        self._step_ms = 1e3 * (self._clock() - start)

    @torch.inference_mode()
    def _rankings(self, sequence: DraftSession, items: Sequence[Item]) -> list[Ranking]:
        """Run the items in one forward; what the draft says after each."""
        logits = self._forward(self._rows[sequence.sequence], items)[: len(items)]  # [items, V]
        if (penalised := self._penalties[sequence.sequence]) is not None:
            logits = penalised.apply(logits, sequence.tokens, sequence.paths(items))
        noise = None
        if not sequence.params.greedy:
            noise = self._noise[sequence.sequence].rows([item.position + 1 for item in items])
        if noise is None or self._proposing is None:
            tokens, values = _best(scores(logits, sequence.params, noise))
            return [Ranking(row, row_values, row[0]) for row, row_values in zip(tokens, values, strict=True)]
        logits = scores(logits, sequence.params)
        drawn = self._proposing.draw(logits.softmax(-1), sequence.fan_out(items), noise)
        return [Ranking(*row) for row in zip(*_best(logits), *drawn, strict=True)]

    def _forward(self, row: int, items: Sequence[Item]) -> Tensor:
        """Logits, float32 [padded items, V]. Shapes come in few sizes; padding repeats the last item."""
        padded = [*items, *[items[-1]] * (padded_size(len(items)) - len(items))]
        extent = self._runner.extent(1 + max(max(item.path, default=item.slot) for item in items))
        visible = np.arange(extent) < np.array([[item.trunk] for item in padded])  # [padded, extent]
        indices = [index for index, item in enumerate(padded) for _ in item.path]
        visible[indices, [slot for item in padded for slot in item.path]] = True
        # The target's vocabulary may have more padding than the draft's.
        tokens = torch.tensor([[item.token for item in padded]]).clamp(max=self._runner.vocab_size - 1)
        positions = torch.tensor([[item.position for item in padded]])
        slots = torch.tensor([[item.slot for item in padded]])
        return self._runner.extend([row], tokens, positions, slots, torch.from_numpy(visible)[None])[0]


def _best(scores: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """The best tokens of each row and their scores."""
    best = scores.topk(min(RANKED, MAX_RANK, scores.shape[-1]))
    return best.indices.tolist(), best.values.tolist()


def padded_size(count: int) -> int:
    """The next power of two: few shapes for many counts."""
    return 1 << (count - 1).bit_length()
