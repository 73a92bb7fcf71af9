"""Which requests run together: rows that come and go at any round, and the KV pages that they stand on.

A request waits until there is a row and room for its prompt, and is prefilled in chunks between the rounds of the
others. Where memory runs out, the request that came last gives its pages back and waits again, with the tokens that it
has: the one that came first always goes on, so that all of them end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf

from ssd_ray.config import SamplingParams
from ssd_ray.models.contract import ModelRunner
from ssd_ray.models.leases import KVMemory, RowLease
from ssd_ray.saguaro.ngram import NgramIndex
from ssd_ray.sampling.verifier import Verifier
from ssd_ray.speculation.cache import CachedNode
from ssd_ray.speculation.target import TargetSession
from ssd_ray.text import Detokenizer

REWRITING = 8
"""How much longer than prefilling a token it takes to write its KV as in decoding, roughly."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A request as it waits for its turn. ``text`` has the tokens that another target has written of it."""

    number: int
    tokens: Sequence[int]
    params: SamplingParams
    deadline: float = inf
    holders: Sequence[str] = ()
    text: Sequence[int] = ()


@dataclass(slots=True, eq=False)
class Row:
    """One request: its session, its verifier, where its KV is, and who has been told what."""

    session: TargetSession
    verifier: Verifier
    text: Detokenizer | None
    ngrams: NgramIndex
    arrival: int = 0
    deadline: float = inf  # when the request ends, however far it has come
    number: int = -1  # of the KV row, while it runs
    lease: RowLease | None = None
    filled: int = 0  # tokens whose KV is in place; the session knows once it decodes
    holders: set[str] = field(default_factory=set)  # drafts that have the prompt by another way and do not know it yet
    declined: set[str] = field(default_factory=set)  # drafts that it is beyond: it goes on without them
    shown: dict[str, int] = field(default_factory=dict)  # tokens whose hidden states drafts were sent
    unaware: list[str] = field(default_factory=list)  # drafts to which the sequence is opened with the next round
    accepted: int = 0  # tokens of the last speculation
    added: list[int] = field(default_factory=list)  # tokens of the last round
    announced: list[int] = field(default_factory=list)  # the speculation that drafts were told
    wanted: int = 0  # tokens to wait for; 0: for none
    asked: int = 0  # how long a speculation drafts were told to make
    length: int = 0  # tokens to verify beside the bonus token
    expected: float = 1.0  # tokens of the round, by what is said of those that are verified
    foreseen: CachedNode | None = None  # what is drafted behind the tokens that are verified
    said: list[int] = field(default_factory=list)  # what drafts say of the chances of those that are verified
    looked_up: bool = False  # the next speculation was found in the text
    whole: bool = False  # the next speculation was as long as can be when it was looked up
    error: str | None = None  # what ended it

    @property
    def ready(self) -> bool:
        """Whether its whole prompt has KV, the last token aside, with which the first round begins."""
        return self.filled >= self.session.position

    def resume(self, text: Sequence[int]) -> None:
        """Go on behind tokens that another target has written; maybe they are the whole text."""
        self.added = self.session.resume(text)
        self.look_for_stop()

    def look_for_stop(self) -> None:
        """End the request behind the token that completes a stop string."""
        if self.text is None:
            return
        self.text.push(self.added)
        if self.text.stopped:
            surplus = len(self.session.generated) - self.text.count
            del self.added[len(self.added) - surplus :]
            self.session.finish("stop", self.text.count)


class Batch:
    """The rows of a target.

    Args:
        runner: the model; its pages are dealt out here.
        rows: requests that run at the same time at most.
        shape: tokens of a verification, which are written to slots beyond those of a sequence.
        chunk: tokens of a prompt that are prefilled between two rounds.
        caching: keep the KV of what has ended for what begins alike.
    """

    def __init__(self, runner: ModelRunner, rows: int, shape: int, *, chunk: int, caching: bool = True) -> None:
        self.rows: list[Row] = []
        self.waiting: deque[Row] = deque()
        self._most = min(rows, runner.rows)
        self.pool = KVMemory(runner, self._most, chunk + shape)
        self._runner = runner
        self._shape, self._chunk = shape, chunk
        self._caching = caching
        self._arrivals = count()

    def add(self, row: Row) -> None:
        """Let a new row wait for its turn."""
        row.arrival = next(self._arrivals)
        self.waiting.append(row)

    def admit(self) -> list[Row]:
        """Let those that wait run, in the order of their arrival, as far as there is room; returns them."""
        admitted = []
        while self.waiting and len(self.rows) < self._most and self._place(self.waiting[0]):
            admitted.append(self.waiting.popleft())
        return admitted

    def _place(self, row: Row) -> bool:
        """Give a row its KV row and the pages for its tokens, if they are there."""
        tokens = row.session.tokens
        number = min(set(range(self._runner.rows)) - {other.number for other in self.rows})
        longest = row.session.longest + self._shape
        lease = self.pool.lease(number, tokens[:-1] if self._caching else (), longest)
        slots, filled = len(tokens) + self._shape, lease.shared * self.pool.slots
        # Those who run may soon need a page each. Looked at first, since taking pages would empty the cache.
        if not lease.fits(slots, spare=len(self.rows)) or not lease.cover(filled, slots):
            lease.release()
            return False
        row.number, row.lease, row.filled = number, lease, filled
        row.session.tally.cached_tokens += row.filled
        self.rows.append(row)
        return True

    def prefill(self, row: Row) -> int:
        """Write the KV of a row's next tokens: of its prompt up to the next multiple of a chunk, of its text what takes
        no longer. Returns how many tokens of a prompt would have taken as long."""
        session, start, chunk = row.session, row.filled, self._chunk
        prompt_end = min(session.prompt_tokens - 1, session.position)
        if start < prompt_end:
            row.filled = min(start + chunk - start % chunk, prompt_end)
            self._runner.prefill(row.number, session.tokens[start : row.filled], start)
            cost = row.filled - start
        else:
            row.filled = min(start + max(self._shape, chunk // REWRITING), session.position)
            self._rewrite(row, start)
            cost = REWRITING * (row.filled - start)
        if row.ready:
            self._publish(row)
        return cost

    def _rewrite(self, row: Row, start: int) -> None:
        """Write the KV of a text again as verifications wrote it first: a prefill rounds otherwise."""
        for first in range(start, row.filled, self._shape):
            tokens = row.session.tokens[first : min(first + self._shape, row.filled)]
            self._runner.append([row.number], [tokens], [first])

    def make_room(self, rows: Iterable[Row]) -> list[Row]:
        """See that each row has pages for what it runs next, and none that it does not see any more, at the cost of
        those that came last; returns who had to go, rows of these among them."""
        gone: list[Row] = []
        for row in sorted(rows, key=_arrival):
            while row.lease is not None and not self._grow(row, row.lease):
                gone.append(self._preempt(max(self.rows, key=_arrival)))
        return gone

    def _grow(self, row: Row, lease: RowLease) -> bool:
        first = row.session.position if row.ready else row.filled
        return lease.cover(first, len(row.session.tokens) + self._shape, lambda: self._known(row))

    def _preempt(self, row: Row) -> Row:
        self.remove(row)
        row.session.restart()
        place = sum(other.arrival < row.arrival for other in self.waiting)
        self.waiting.insert(place, row)
        return row

    def remove(self, row: Row) -> None:
        """Take a row out, wherever it is; its pages go to the prefix cache."""
        if row in self.waiting:
            self.waiting.remove(row)
        if row.lease is not None:
            self.rows.remove(row)
            row.lease.release(self._known(row))
            row.lease, row.filled = None, 0

    def running(self, sequence: int) -> Row | None:
        """The row of a sequence, if it runs."""
        return next((row for row in self.rows if row.session.sequence == sequence), None)

    @property
    def all(self) -> list[Row]:
        """The rows that run or wait."""
        return [*self.rows, *self.waiting]

    @property
    def unready(self) -> list[Row]:
        """The rows that lack KV of their prompts, in the order in which they came to run."""
        return [row for row in self.rows if not row.ready]

    @property
    def ready(self) -> list[Row]:
        """The rows that can decode, in the order of their KV rows."""
        return sorted((row for row in self.rows if row.ready), key=lambda row: row.number)

    def _publish(self, row: Row) -> None:
        if row.lease is not None and self._caching:
            row.lease.publish(self._known(row))

    def _known(self, row: Row) -> Sequence[int]:
        """The tokens of a row whose KV is in place, and as it should be."""
        if not self._caching or row.error is not None:
            return ()
        return row.session.tokens[: row.session.position if row.ready else row.filled]


def _arrival(row: Row) -> int:
    return row.arrival
