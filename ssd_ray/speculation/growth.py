"""How a draft's tree grows: nodes are made, numbered, told how likely they are, and pushed once."""

from __future__ import annotations

from collections.abc import Sequence

from ssd_ray.saguaro.calibration import UNSAID, to_byte
from ssd_ray.saguaro.fanout import FanOutPolicy, Source
from ssd_ray.saguaro.ngram import LONGEST
from ssd_ray.sampling.laws import pack_laws
from ssd_ray.speculation.advice import TextAdvice
from ssd_ray.speculation.nodes import DraftNode, Edge, Ranking
from ssd_ray.speculation.tree import TokenTree
from ssd_ray.wire import Nodes


class Growth:
    """The growth of one sequence's tree.

    Args:
        tree: what grows.
        policy: knows how likely a drafted token is to be accepted.
        advice: what the text says.
        lookahead: tokens that a speculation has at most, and so has a branch after its guess.
    """

    def __init__(self, tree: TokenTree[DraftNode], policy: FanOutPolicy, advice: TextAdvice, lookahead: int) -> None:
        self._tree = tree
        self._policy = policy
        self._advice = advice
        self._lookahead = lookahead
        self._next_id = 0
        self._unpushed: list[tuple[DraftNode, int]] = []  # (node, its parent on the wire)

    def follow(self, speculation: Sequence[int], text: Sequence[int]) -> None:
        """Make these tokens the trunk behind the text, whose last token is the root. What was not pushed yet is not to
        be any more: its parent may go by another number now."""
        self._tree.follow(speculation)
        tail = tuple(text[-LONGEST - 1 : -1])
        for node in self._tree.trunk:
            tail = (*tail, node.token)[-LONGEST:]
            node.depth, node.tail = 0, tail
        for node, _ in self._unpushed:
            node.id = -1
        self._unpushed.clear()

    def make(self, stem: DraftNode, token: int, parent: int) -> DraftNode:
        """The child of ``stem`` with this token; a new one gets its number and will be pushed."""
        node = self._tree.grow(stem, token)
        if node.id < 0:
            node.id = self._next_id
            node.tail = (*stem.tail, token)[-LONGEST:]
            self._next_id += 1
            self._unpushed.append((node, parent))
        return node

    def draft(self, stem: DraftNode, parent: int) -> DraftNode:
        """The child with the token that is drafted after ``stem``. With a law it is pushed even if it is known."""
        drafted, law = stem.ranking.drafted, stem.ranking.law
        if law is not None and stem.sampled is None:
            node = stem.sampled = self._tree.grow(stem, drafted)
            node.id, node.law = -1, law
        node = self.make(stem, drafted, parent)
        node.sure = self._sure(stem.ranking)
        return node

    def _sure(self, ranking: Ranking) -> float:
        """Probability that the token that is drafted after another one is accepted. Whether a token that was drawn from
        a law is verified must not depend on the draw; so neither may this: only the law is looked at, in which the text
        has no part."""
        if ranking.law is None:
            return self._policy.acceptance(ranking.lead, ranking.source)
        lead = ranking.lead if ranking.model_lead is None else ranking.model_lead
        return self._policy.acceptance(lead, Source.MODEL)

    def branch(self, guess: DraftNode, chance: float) -> None:
        """Begin a branch with a guess whose outcome has this chance."""
        guess.depth, guess.chance, guess.reach = 1, chance, 1.0
        self._unroll(guess)

    def _unroll(self, node: DraftNode) -> None:
        """Continue a guess by what the text says, without running anything, once the text is worth it."""
        right = self._advice.right
        while self._advice.trusted and node.depth <= self._lookahead:
            said = self._advice.follows(node.tail)
            if said is None:
                return
            child = self.make(node, said, node.id)
            child.sure = right
            _reach(child, node)
            node = child

    def extend(self, node: DraftNode) -> DraftNode | None:
        """Continue the branch of a node that ran by the token that is drafted after it; None if it is long enough."""
        if node.depth > self._lookahead:
            return None
        child = self.draft(node, node.id)
        _reach(child, node)
        self._policy.saw_estimate(child.sure)
        return child

    def chain_end(self, wanted: int) -> Edge | None:
        """The first node of the chain below the trunk that has not run; None once the chain has ``wanted`` tokens."""
        trunk = self._tree.trunk
        stem, length = trunk[-1], len(trunk)
        node = self.draft(stem, -length)
        while node.placed and (following := node.continuation()) is not None:
            stem, node, length = node, following, length + 1
        return (stem, node) if not node.placed and length < wanted else None

    def push(self, sequence: int, round: int, step_ms: float, sequences: int, step_tokens: int) -> Nodes | None:
        """What is to be pushed, if anything; see :class:`~ssd_ray.wire.Nodes`."""
        if not self._unpushed:
            return None
        nodes, self._unpushed = self._unpushed, []
        return Nodes(
            sequence,
            round,
            nodes[0][0].id,
            [parent for _, parent in nodes],
            [node.token for node, _ in nodes],
            step_ms,
            sequences,
            step_tokens,
            bytes(to_byte(node.sure) if node.sure else UNSAID for node, _ in nodes),
            *pack_laws([node.law for node, _ in nodes]),
        )


def _reach(child: DraftNode, node: DraftNode) -> None:
    """Say how likely the next node of a branch is to be reached and accepted."""
    child.depth = node.depth + 1
    child.chance, child.reach = node.chance * child.sure, node.reach * child.sure
