"""What a draft's tree and its steps are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssd_ray.saguaro.fanout import Source
from ssd_ray.sampling.laws import Law
from ssd_ray.speculation.tree import Node


@dataclass(frozen=True, slots=True)
class Ranking:
    """What the draft says about the token after another one.

    Attributes:
        tokens: the likeliest, best first.
        scores: theirs, in nats up to a constant, noise included.
        drafted: the token that it drafts.
        law: in rejection mode what that one was drawn from.
        source: where the drafted token comes from.
        model_lead: how far ahead of the next one the model's likeliest token is, in nats, where the text has changed
            the order.
    """

    tokens: Sequence[int]
    scores: Sequence[float]
    drafted: int
    law: Law | None = None
    source: Source = Source.MODEL
    model_lead: float | None = None

    @property
    def lead(self) -> float:
        """How far ahead of the next one the likeliest token is, in nats."""
        return self.scores[0] - self.scores[1]


NOTHING = Ranking((), (), -1)


class DraftNode(Node):
    """A node with what the draft knows of it.

    Attributes:
        id: its number on the wire; -1 before it was pushed.
        slot: where its KV is; -1 before it ran.
        path: slots of its ancestors in the tree and its own.
        ranking: what the draft said after it; nothing before it ran.
        depth: tokens of its branch up to it, the guess being 1.
        chance: probability that its outcome happens and that it is accepted then.
        reach: the latter alone: that it is reached and accepted, given its outcome; 1 of a guess.
        sure: probability that it is accepted once it is reached; 0 for a guess, of which that is not known.
        law: in rejection mode what it was drawn from.
        sampled: in rejection mode the child that was drawn.
        tail: the last tokens of the text up to it.
    """

    __slots__ = ("chance", "depth", "id", "law", "path", "ranking", "reach", "sampled", "slot", "sure", "tail")

    def __init__(self, token: int) -> None:
        super().__init__(token)
        self.id = -1
        self.slot = -1
        self.path: tuple[int, ...] = ()
        self.ranking = NOTHING
        self.depth = 0
        self.chance = 0.0
        self.reach = 1.0
        self.sure = 0.0
        self.law: Law | None = None
        self.sampled: DraftNode | None = None
        self.tail: tuple[int, ...] = ()

    @property
    def placed(self) -> bool:
        """Whether its KV is there, or will be after this step."""
        return self.slot >= 0

    @property
    def ran(self) -> bool:
        """Whether it is known what follows it."""
        return self.slot >= 0 and bool(self.ranking.tokens)

    def continuation(self) -> DraftNode | None:
        return self.sampled or super().continuation()


Edge = tuple[DraftNode, DraftNode]
"""A node to run, the second one, and the one that it stands behind."""


@dataclass(frozen=True, slots=True)
class Item:
    """One token to run.

    Attributes:
        token, position, slot: what is run and where its KV goes.
        trunk: slots 0 .. trunk-1 are seen.
        path: the other slots that are seen.
        node: None for a committed token, of which only the KV is wanted.
    """

    token: int
    position: int
    slot: int
    trunk: int
    path: tuple[int, ...]
    node: DraftNode | None

    @classmethod
    def of(cls, node: DraftNode, position: int) -> Item:
        """A node that has its place, where ``position`` is that of the bonus token."""
        return cls(node.token, position + len(node.path) - 1, node.slot, position, node.path, node)

    @property
    def highest(self) -> int:
        """The last slot that is seen."""
        return max(self.path, default=self.slot)


@dataclass(frozen=True, slots=True)
class Prefill:
    """Write the KV of committed tokens from position ``start`` on."""

    start: int
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Moves:
    """Copy KV between slots, all read before any is written."""

    source: Sequence[int]
    destination: Sequence[int]


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something to run: ``node`` below ``stem``, or the guess of this rank at this depth of the trunk, not made yet."""

    stem: DraftNode
    node: DraftNode | None = None
    depth: int = 0
    rank: int = 0
