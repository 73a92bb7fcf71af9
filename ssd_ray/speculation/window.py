"""The window of scratch slots that a draft's tree has its KV in, beyond all committed tokens of the sequence.

A node that runs is given a slot and keeps it until it is committed or gone. The window moves on before the trunk gets
there; nodes that live stay where they are.
"""

from __future__ import annotations

from ssd_ray.config import MAX_LOOKAHEAD
from ssd_ray.speculation.nodes import DraftNode

WINDOW = 192
"""Tree nodes with KV that one sequence may hold."""

WINDOW_STEP = 64

LIFETIME = 3 * (MAX_LOOKAHEAD + 1)
"""Tokens after which a node is committed or gone: its position is at most a trunk and a branch ahead."""

SCRATCH = WINDOW + 2 * WINDOW_STEP
"""Slots beyond the longest sequence that a row of a draft needs."""

RESERVE = 2 * (MAX_LOOKAHEAD + 1)
"""Slots of the window that branches leave to the trunk."""


class Window:
    """The scratch slots of one sequence.

    Attributes:
        base: the first one.

    Args:
        position: that of the bonus token.
    """

    def __init__(self, position: int) -> None:
        self.base = window_base(position)
        self._free: list[int] = []  # the next one to be taken last; none before the first :meth:`sweep`

    @property
    def end(self) -> int:
        """The slot behind the last one."""
        return self.base + WINDOW

    @property
    def roomy(self) -> bool:
        """Whether there is a slot for one more node of a branch."""
        return len(self._free) > RESERVE

    def move_on(self, position: int) -> None:
        """Leave the place to the trunk, should it come near, now that the bonus token is at this position."""
        if position + LIFETIME > self.base:
            self.base = window_base(position)

    def sweep(self, root: DraftNode) -> None:
        """Free the slots of nodes that are not in the tree any more, and set the paths of those that are."""
        used = set()
        stack: list[tuple[DraftNode, tuple[int, ...]]] = [(root, ())]
        while stack:
            node, path = stack.pop()
            if node.slot >= 0:
                used.add(node.slot)
                node.path = (*path, node.slot)
                stack.extend((child, node.path) for child in node.children.values())
        self._free = [slot for slot in range(self.end - 1, self.base - 1, -1) if slot not in used]

    def place(self, stem: DraftNode, node: DraftNode) -> None:
        """Give a node behind ``stem`` a slot, if it has none."""
        if not node.placed:
            node.slot = self._free.pop()
            node.path = (*stem.path, node.slot)

    def clear(self, node: DraftNode) -> None:
        """Take a node's slot back. What others were run behind keeps its place: it is here to be run again."""
        if not any(child.placed for child in node.children.values()):
            self._free.append(node.slot)
            node.slot, node.path = -1, ()


def window_base(position: int) -> int:
    """First scratch slot for a bonus token at this position: many rounds beyond, so that the window rarely moves."""
    return (position // WINDOW_STEP + 2) * WINDOW_STEP
