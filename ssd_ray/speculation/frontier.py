"""What a draft may run next of the branches of a round, the best first.

A branch is a guess and what is drafted after it. On the frontier are the ends of the branches and, of each depth of the
trunk, the next guess, which is made only when its turn comes.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count

from ssd_ray.speculation.growth import Growth
from ssd_ray.speculation.guesses import Guesses
from ssd_ray.speculation.nodes import Candidate, DraftNode, Edge
from ssd_ray.speculation.worth import Worth


class Frontier:
    """The frontier of one round.

    Args:
        guesses: what may begin a branch.
        growth: makes the nodes.
        worth: by which candidates are ordered.
        branching: guesses other than the chain after the trunk are opened.
    """

    def __init__(self, guesses: Guesses, growth: Growth, worth: Worth, *, branching: bool = True) -> None:
        self._guesses = guesses
        self._growth = growth
        self._worth = worth
        self._branching = branching
        self._heap: list[tuple[float, int, Candidate]] = []
        self._tie = count()

    def widen(self) -> None:
        """Offer the first guesses at every depth of the trunk whose logits have come, and go on after its end."""
        trunk = self._guesses.trunk
        for depth in self._guesses.rank():
            last = depth == len(trunk) - 1
            if last:
                self._growth.branch(self._growth.draft(trunk[depth], -1 - depth), self._guesses.chance(depth, 0))
            if last or self._branching:
                self._offer(trunk[depth], depth, self._guesses.first(depth))

    def _offer(self, stem: DraftNode, depth: int, rank: int | None) -> None:
        """Put a guess on the frontier, if there is one."""
        if rank is not None:
            value = self._worth.of_guess(self._guesses.chance(depth, rank))
            self._push(value, Candidate(stem, None, depth, rank))

    def extend(self, node: DraftNode) -> None:
        """Continue the branch of a node that ran, unless what follows would not be verified."""
        child = self._growth.extend(node)
        if child is not None and (value := self._worth.of(child)) > 0.0:
            self._push(value, Candidate(node, child))

    def put_back(self, stem: DraftNode, node: DraftNode) -> None:
        """Leave what :meth:`pop` gave for another step."""
        self._push(self._worth.of(node), Candidate(stem, node))

    def _push(self, value: float, candidate: Candidate) -> None:
        heappush(self._heap, (-value, next(self._tie), candidate))

    def pop(self) -> Edge | None:
        """Take the best that has not run, if there is any."""
        while self._heap:
            _, _, candidate = heappop(self._heap)
            if candidate.node is None and self._guesses.spent:
                continue
            node = candidate.node or self._open(candidate)
            if not node.placed:
                return candidate.stem, node
            if node.ranking.tokens:  # it has run out of turn; one that is in this very step is extended when it has
                self.extend(node)
        return None

    def _open(self, guess: Candidate) -> DraftNode:
        """Make the node of a guess, and offer the next one at its depth."""
        stem, depth, rank = guess.stem, guess.depth, guess.rank
        node = self._growth.make(stem, self._guesses.open(depth, rank), -1 - depth)
        self._growth.branch(node, self._guesses.chance(depth, rank))
        if self._branching:
            self._offer(stem, depth, self._guesses.following(depth, rank))
        return node
