"""The target's side of one sequence, as a state machine without I/O.

A round: :meth:`TargetSession.begin` fixes the speculation, the caller runs one forward over :attr:`inputs` and verifies
it, :meth:`TargetSession.commit` takes what was decided and advances the speculation cache; once what drafts have sent
is in :meth:`TargetSession.add`, :meth:`TargetSession.look_up` says whether the outcome is a hit. Messages of drafts may
be added at any time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from ssd_ray.config import MAX_LOOKAHEAD, SamplingParams
from ssd_ray.sampling.rejection import Proposal, proposal_of
from ssd_ray.sampling.verify import Outcome
from ssd_ray.speculation.cache import CachedNode, SampledNode, SpeculationCache
from ssd_ray.wire import Backups, Misses, Nodes, RequestStats

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
BackupKind = Literal["draft", "ngram", "none"]
MissCause = Literal["fan_out", "late", "stale", "cold", "no_draft"]


@dataclass(slots=True)
class Tally:
    """Figures of one request while it runs; :class:`~ssd_ray.wire.RequestStats` says what they mean."""

    rounds: int = 0
    hits: int = 0
    misses: dict[MissCause, int] = field(default_factory=dict)
    accepted: list[int] = field(default_factory=lambda: [0] * (MAX_LOOKAHEAD + 1))
    speculated: list[int] = field(default_factory=lambda: [0] * (MAX_LOOKAHEAD + 1))
    verify_ms: float = 0.0
    wait_ms: float = 0.0
    host_ms: float = 0.0
    prefill_ms: float = 0.0
    waits: int = 0
    backups: dict[BackupKind, int] = field(default_factory=dict)
    verified: int = 0
    partial: int = 0
    tree_tokens: int = 0
    tree_used: int = 0
    draft_ms: float = 0.0
    draft_used_ms: float = 0.0
    cached_tokens: int = 0
    preemptions: int = 0
    resumed_tokens: int = 0

    def spent(self, verify_ms: float, wait_ms: float, host_ms: float) -> None:
        """Count the time of a round."""
        self.verify_ms += verify_ms
        self.wait_ms += wait_ms
        self.host_ms += host_ms
        self.waits += wait_ms > 0.0


_SUMMED = [each.name for each in fields(Tally) if each.type in ("int", "float")]
"""Figures that go out as they are."""


class TargetSession:
    """One sequence. Slot = position; the bonus token at :attr:`position` is not in the KV cache yet.

    Args:
        sequence: its number, under which drafts know it.
        prompt: at least one token. The last one is the first round's bonus token.
        params: stop conditions are looked at here, except stop strings, which need text. Its ``stop_token_ids`` are
            all tokens that end the text.
        max_length: positions that the sequence can take; it ends there with "length".
        vocab_size: tokens that drafts may name.
        sampled: rejection mode: only tokens that come with the law that they were drawn from are speculated.
    """

    def __init__(
        self,
        sequence: int,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        max_length: int,
        vocab_size: int,
        sampled: bool = False,
    ) -> None:
        self.sequence = sequence
        self.params = params
        self.tokens = list(prompt)
        self.finish_reason: FinishReason | None = None
        self.tally = Tally()
        self.hit = False
        self.miss: MissCause | None = None
        self._vocab_size = vocab_size
        self._node = SampledNode if sampled else CachedNode
        self.cache = SpeculationCache(self.tokens[-1], vocab_size, node=self._node)
        self.prompt_tokens = len(self.tokens)
        room = max_length - self.prompt_tokens
        self._room = room if params.max_tokens is None else min(params.max_tokens, room)
        self._end_tokens = frozenset(params.stop_token_ids)

    @property
    def round(self) -> int:
        """Number of the running round."""
        return self.cache.round

    @property
    def longest(self) -> int:
        """Tokens that there can be, those of the prompt included."""
        return self.prompt_tokens + self._room

    @property
    def position(self) -> int:
        """Position of the bonus token."""
        return len(self.tokens) - 1

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_tokens :]

    @property
    def remaining(self) -> int:
        """How many tokens may still be generated."""
        return self._room - (len(self.tokens) - self.prompt_tokens)

    def most(self, lookahead: int) -> int:
        """How long a speculation can be of use: a round yields one token more than it accepts."""
        return max(0, min(lookahead, self.remaining - 1))

    def begin(self, length: int, lookahead: int = MAX_LOOKAHEAD) -> list[int]:
        """Fix the speculation of the round that starts now: at most ``length`` tokens of what has arrived. As many as
        ``lookahead`` could be of use."""
        speculation = self.cache.speculate(min(length, self.most(lookahead)))
        self.tally.speculated[len(speculation)] += 1
        self.tally.verified += 1 + len(speculation)
        self.tally.partial += 0 < len(speculation) < self.most(lookahead)
        self._count_used()
        return speculation

    def _count_used(self) -> None:
        for step in self.cache.use():
            self.tally.tree_used += 1
            self.tally.draft_used_ms += 0.0 if step.used else step.ms
            step.used = True

    @property
    def inputs(self) -> list[int]:
        """Tokens of the verification forward: the bonus token and the speculation."""
        return [self.tokens[-1], *self.cache.speculation]

    @property
    def proposals(self) -> list[Proposal | None]:
        """What each speculated token was drawn from; None if that is not known or no law."""
        return [proposal_of(node.law, self._vocab_size) for node in self.cache.tree.trunk[1:]]

    def add(self, draft: str, message: Nodes) -> int:
        """Take nodes of a draft; returns how many are of use and were not said before."""
        self.tally.tree_tokens += len(message.tokens)
        self.tally.draft_ms += message.step_ms / message.sequences
        return self.cache.add(draft, message)

    def commit(self, outcome: Outcome) -> list[int]:
        """Take what the verification decided, and go on to the next round.

        Returns:
            The tokens that the outcome adds to the text. They are fewer than it has when one of them ends the sequence;
            ``finish_reason`` is set then.
        """
        added = self._until_end([*self.cache.speculation[: outcome.accepted], outcome.bonus_token])
        self.tokens += added
        self.cache.advance(outcome.accepted, outcome.bonus_token)
        self.tally.rounds += 1
        self.tally.accepted[outcome.accepted] += 1
        return added

    def look_up(self, drafts: Collection[str]) -> bool:
        """Count the last outcome as a hit or a miss, and say which: whether a speculation for it is there.

        ``drafts`` are those that take part, for the cause of a miss.
        """
        self.hit = self.cache.available(1) > 0
        self.miss = None if self.hit else self._miss_cause(drafts)
        if self.miss is None:
            self.tally.hits += 1
        else:
            self.tally.misses[self.miss] = self.tally.misses.get(self.miss, 0) + 1
        return self.hit

    def back_up(self, kind: BackupKind) -> None:
        """Count what is done about a miss."""
        self.tally.backups[kind] = self.tally.backups.get(kind, 0) + 1

    def resume(self, text: Sequence[int]) -> list[int]:
        """Begin behind tokens that another target has generated, before the first round. They may have ended the
        sequence: ``finish_reason`` is set then. Returns those that belong to it."""
        added = self._until_end(text)
        self.tokens += added
        self.cache = SpeculationCache(self.tokens[-1], self._vocab_size, node=self._node)
        self.tally.resumed_tokens = len(added)
        return added

    def restart(self) -> None:
        """Forget what was drafted, as the sequence leaves its row; it may go on later. What drafts still say about its
        round comes too late."""
        self.cache = SpeculationCache(self.tokens[-1], self._vocab_size, self.round + 1, node=self._node)
        self.tally.preemptions += 1

    def finish(self, reason: FinishReason, generated: int | None = None) -> None:
        """End the sequence for a reason from outside: a stop string, a cancellation, a deadline, an error.

        ``generated`` tokens after the prompt are kept, all if None.
        """
        self.finish_reason = reason
        if generated is not None:
            del self.tokens[self.prompt_tokens + generated :]

    def stats(self) -> RequestStats:
        """The figures so far."""
        tally = self.tally
        sums = {name: getattr(tally, name) for name in _SUMMED}
        return RequestStats(
            tokens=len(self.tokens) - self.prompt_tokens,
            prompt_tokens=self.prompt_tokens,
            misses=Misses(**tally.misses),
            accepted=tuple(tally.accepted),
            speculated=tuple(tally.speculated),
            backups=Backups(**tally.backups),
            **sums,
        )

    def _until_end(self, tokens: Sequence[int]) -> list[int]:
        """The tokens up to the one that ends the sequence, that one included."""
        added = list(tokens[: self.remaining])
        for count, token in enumerate(added, 1):
            if token in self._end_tokens:
                self.finish_reason = "stop"
                return added[:count]
        if len(added) == self.remaining:
            self.finish_reason = "length"
        return added

    def _miss_cause(self, drafts: Collection[str]) -> MissCause:
        """Why nothing follows the last outcome in the cache."""
        latest = [self.cache.latest[draft] for draft in drafts if draft in self.cache.latest]
        if not drafts:
            return "no_draft"
        if not latest:
            return "cold"
        if max(latest) < self.round - 1:
            return "stale"
        return "late" if self.cache.guessed or not self.cache.prepared else "fan_out"
