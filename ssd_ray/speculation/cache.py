"""The target's speculation cache: what drafts have prepared for one sequence, found where the verification ends.

Drafts push nodes at any time and the network may lose, repeat, reorder or delay them. Nothing that arrives here can
change the output: a wrong token is rejected by the verification, so the cache only has to stay small and well formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ssd_ray.saguaro.calibration import UNSAID
from ssd_ray.sampling.laws import Law, Packed, unpack_laws
from ssd_ray.speculation.tree import Node, TokenTree
from ssd_ray.wire import Nodes

MAX_NODES = 4096
"""Nodes that one sequence may hold; more are dropped."""


class DraftStep:
    """A draft's step as the target sees it: how long it took, and whether anything of it was of use.

    Attributes:
        ms: milliseconds, as the draft reports them with its next one: off by one step.
        used: some token that it made was verified or guessed right.
    """

    __slots__ = ("ms", "used")

    def __init__(self, ms: float) -> None:
        self.ms = ms
        self.used = False


class CachedNode(Node):
    """A node, the (draft, id) pairs under which drafts know it, what the first of them that says anything says of its
    chance, in rejection mode what it was drawn from, and the step that made it, until it is used."""

    __slots__ = ("known_as", "law", "said", "step")

    def __init__(self, token: int) -> None:
        super().__init__(token)
        self.said = UNSAID
        self.known_as: list[tuple[str, int]] = []
        self.law: Law | None = None
        self.step: DraftStep | None = None


class SampledNode(CachedNode):
    """A node of rejection mode. Only a token that was drawn from a law continues a chain, never a guess: which token is
    verified must not depend on anything but the draw."""

    __slots__ = ("sampled",)

    def __init__(self, token: int) -> None:
        super().__init__(token)
        self.sampled: CachedNode | None = None

    def continuation(self) -> CachedNode | None:  # type: ignore[override]
        return self.sampled


class SpeculationCache:
    """Speculations of one sequence, keyed by outcome.

    What a draft sent about a round is best taken after :meth:`advance`: nodes of outcomes that did not happen have no
    place any more and cost next to nothing.

    Attributes:
        round: the round that is being verified.
        latest: per draft, the newest round about which it sent something.
        prepared: outcomes of the round before that accept as many tokens as it did, and were prepared for.
        guessed: whether its very outcome was among them.
    """

    def __init__(
        self, bonus_token: int, vocab_size: int, round: int = 0, node: Callable[[int], CachedNode] = CachedNode
    ) -> None:
        self.tree: TokenTree[CachedNode] = TokenTree(node, bonus_token)
        self.round = round
        self.latest: dict[str, int] = {}
        self._vocab_size = vocab_size
        self._nodes: dict[tuple[str, int], CachedNode] = {}
        self._count = 1
        self.prepared = 0
        self.guessed = False
        self._accepted = -1  # tokens that the round before accepted
        self._last_trunk: dict[tuple[str, int], int] = {}  # depths of its trunk by the ids of drafts

    def __len__(self) -> int:
        return self._count

    @property
    def speculation(self) -> list[int]:
        """What is being verified now."""
        return self.tree.speculation

    def available(self, limit: int) -> int:
        """How many tokens a speculation after the bonus token could have now."""
        return len(self.tree.root.chain(limit))

    def said(self, limit: int) -> list[int]:
        """What drafts say of each token that a speculation could have now, a byte each."""
        return [node.said for node in self.tree.root.chain(limit)]

    def speculate(self, limit: int) -> list[int]:
        """Fix the speculation of this round: at most ``limit`` tokens of what is there."""
        self.tree.trunk = [self.tree.root, *self.tree.root.chain(limit)]
        return self.tree.speculation

    def use(self) -> list[DraftStep]:
        """Of the trunk's tokens that drafts made and that were not used before, the steps; each token counts once."""
        steps = [node.step for node in self.tree.trunk if node.step is not None]
        for node in self.tree.trunk:
            node.step = None
        return steps

    def plant(self, tokens: Sequence[int]) -> None:
        """Speculate these tokens next, which no draft has made: there is nothing below the bonus token yet."""
        node = self.tree.root
        for token in tokens:
            child = self.tree.grow(node, token)
            if isinstance(node, SampledNode):
                node.sampled = child
            node = child
        self._count += len(tokens)

    def guesses(self, depth: int) -> int:
        """How many outcomes with exactly ``depth`` accepted tokens are prepared for."""
        stem = self.tree.trunk[depth]
        drafted = depth + 1 < len(self.tree.trunk) and self.tree.trunk[depth + 1].token in stem.children
        return len(stem.children) - drafted

    @property
    def outcomes(self) -> int:
        """How many outcomes of the running round are prepared for."""
        return sum(self.guesses(depth) for depth in range(len(self.tree.trunk)))

    def advance(self, accepted: int, bonus_token: int) -> bool:
        """Take the outcome of the round; returns whether the bonus token had been guessed."""
        self.prepared = self.guesses(accepted)
        self._last_trunk = {name: depth for depth, node in enumerate(self.tree.trunk) for name in node.known_as}
        self.guessed = self.tree.advance(accepted, bonus_token)
        self._accepted = accepted
        self.round += 1
        self._nodes = {}
        self._count = 0
        for node in self.tree.root.subtree():
            self._count += 1
            for name in node.known_as:
                self._nodes[name] = node
        return self.guessed

    def forget(self, draft: str) -> None:
        """Forget which node ids a draft used; its tokens stay."""
        self.latest.pop(draft, None)
        self._nodes = {name: node for name, node in self._nodes.items() if name[0] != draft}
        for node in self.tree.root.subtree():
            node.known_as = [name for name in node.known_as if name[0] != draft]

    def add(self, draft: str, message: Nodes) -> int:
        """Take nodes of a draft; returns how many are of use now and were not said before."""
        if message.round > self.round or not _well_formed(message):
            return 0
        self.latest[draft] = max(self.latest.get(draft, 0), message.round)
        laws = unpack_laws(packed_laws(message))
        step = DraftStep(message.step_ms / message.sequences)
        new = 0
        for offset, (parent, token) in enumerate(zip(message.parents, message.tokens, strict=True)):
            node = self._place(draft, message.round, parent, token, laws.get(offset))
            if node is not None:
                node.said = node.said or (message.chances[offset] if message.chances else UNSAID)
                name = (draft, message.first + offset)
                if name not in self._nodes and len(self._nodes) < MAX_NODES:
                    new += 1
                    self._nodes[name] = node
                    node.step = node.step if node.known_as else step
                    node.known_as.append(name)
        return new

    def _place(self, draft: str, round: int, parent: int, token: int, law: Law | None) -> CachedNode | None:
        """Find or make the node of one pushed token; None if it has no place in the tree any more."""
        if parent >= 0:
            stem = self._nodes.get((draft, parent))
            if stem is None:
                return self._late_guess(self._last_trunk.get((draft, parent), -1), token)
        elif round == self.round:
            stem = self.tree.trunk[-1 - parent] if -1 - parent < len(self.tree.trunk) else None
        else:
            return self._late_guess(-1 - parent, token) if round == self.round - 1 else None
        if stem is None or token >= self._vocab_size:
            return None
        known = stem.children.get(token)
        if known is None:
            if self._count >= MAX_NODES:
                return None
            self._count += 1
        node = known or self.tree.grow(stem, token)
        if law is not None and isinstance(stem, SampledNode) and stem.sampled is None:
            stem.sampled, node.law = node, law  # the first draw stands
        return node

    def _late_guess(self, depth: int, token: int) -> CachedNode | None:
        """A guess about the round before, come after its outcome: if it was right, it is the root now."""
        if depth != self._accepted or depth < 0:
            return None
        self.prepared += 1
        if token != self.tree.root.token:
            return None
        self.guessed = True
        return self.tree.root


def _well_formed(message: Nodes) -> bool:
    count = len(message.tokens)
    return len(message.parents) == count and len(message.chances) in (0, count)


def packed_laws(message: Nodes) -> Packed:
    """The laws of a message."""
    return message.sampled, message.law_tokens, message.law_weights, message.law_guesses, message.law_factors
