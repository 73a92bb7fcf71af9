"""The token tree that both sides of the protocol keep of one sequence.

Its root is the bonus token of the running round. The *trunk* is the root and the tokens that the target verifies now;
every other node continues a guess. An outcome (k, t*) moves the root to the child t* of the trunk token at depth k:
what hangs below it lives on, everything else is gone. So one structure serves as speculation tree, as speculation cache
and, on the draft, as the map of its KV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Self, TypeVar


class Node:
    """A token after its parent's. ``children`` keeps the order of arrival: the first child continues the chain."""

    __slots__ = ("children", "token")

    def __init__(self, token: int) -> None:
        self.token = token
        self.children: dict[int, Self] = {}

    def chain(self, limit: int) -> list[Self]:
        """The nodes below this one along continuations, at most ``limit``."""
        nodes: list[Self] = []
        node = self.continuation()
        while node is not None and len(nodes) < limit:
            nodes.append(node)
            node = node.continuation()
        return nodes

    def continuation(self) -> Self | None:
        """The child that continues the chain."""
        return next(iter(self.children.values()), None)

    def subtree(self) -> Iterator[Self]:
        """This node and all below it, parents first."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


N = TypeVar("N", bound=Node)


class TokenTree(Generic[N]):
    """A tree of nodes that ``make(token)`` makes, with its trunk. No node knows its parent: no reference cycles."""

    def __init__(self, make: Callable[[int], N], bonus_token: int) -> None:
        self._make = make
        self.root: N = make(bonus_token)
        self.trunk: list[N] = [self.root]

    @property
    def speculation(self) -> list[int]:
        """The tokens of the trunk after the bonus token."""
        return [node.token for node in self.trunk[1:]]

    def restart(self, bonus_token: int) -> None:
        """Forget everything; this token becomes the root."""
        self.root = self._make(bonus_token)
        self.trunk = [self.root]

    def grow(self, parent: N, token: int) -> N:
        """The child of ``parent`` with this token, made if it is not there."""
        node = parent.children.get(token)
        if node is None:
            node = parent.children[token] = self._make(token)
        return node

    def follow(self, speculation: Sequence[int]) -> None:
        """Make the trunk the root and these tokens."""
        self.trunk = [self.root]
        for token in speculation:
            self.trunk.append(self.grow(self.trunk[-1], token))

    def advance(self, accepted: int, bonus_token: int) -> bool:
        """Take an outcome: the bonus token becomes the root. Returns whether it was in the tree."""
        guess = self.trunk[accepted].children.get(bonus_token)
        self.root = self._make(bonus_token) if guess is None else guess
        self.trunk = [self.root]
        return guess is not None
