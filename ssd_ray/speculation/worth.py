"""What a draft's work is worth to the target: the accepted tokens that it is expected to add, less what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ssd_ray.saguaro.fanout import FanOutPolicy
from ssd_ray.saguaro.width import best_width
from ssd_ray.speculation.nodes import DraftNode

_BEYOND = 0.25
"""How much a token beyond the lookahead is worth: it orders the work, no more."""


class Worth:
    """The worth of one sequence's work, in tokens.

    Attributes:
        price: what a millisecond of a step that nobody waits for costs the target; infinity: do nothing.
        floor: what a token costs the verification, if its outcome happens.
        of_step: the worth of the last step that was weighed.

    Args:
        policy: knows how often a token is accepted of which nothing is known yet.
        lookahead: tokens that a speculation has at most.
    """

    def __init__(self, policy: FanOutPolicy, lookahead: int) -> None:
        self.price, self.floor = 0.0, 0.0
        self.of_step = 0.0
        self._policy = policy
        self._lookahead = lookahead
        self._hits = 0.8  # how often outcomes were prepared for lately
        self._last_width = 8  # branches in the last step that ran nothing else

    def ask(self, price: float, floor: float) -> None:
        """From now on this is what the target asks for."""
        self.price, self.floor = price, floor

    def saw(self, hit: bool) -> None:
        """Learn whether an outcome was prepared for."""
        self._hits += 0.05 * (hit - self._hits)

    def of_guess(self, chance: float) -> float:
        """Of running a guess whose outcome has this chance."""
        return chance * (self._policy.typical - self.floor)

    def of(self, node: DraftNode) -> float:
        """Of running a node: by the one that follows it, less what that one costs the verification; beyond the
        lookahead less."""
        worth = node.chance * (self._policy.typical - self.floor / node.reach)
        return worth if node.depth <= self._lookahead else worth * _BEYOND

    def weigh(self, values: Sequence[float], others: int, step_ms: Callable[[int], float], rate: float) -> int | None:
        """How many branches, of these falling values, to run beside ``others`` of the trunk, where a step of so many
        tokens takes ``step_ms`` from steps after it that are worth ``rate`` by the millisecond, and from the target.
        None if the whole step is not worth its price."""
        price = self.price
        kept = best_width(values, others, lambda tokens: (rate + price) * step_ms(tokens))
        self.of_step = sum(values[:kept])
        if others:
            self.of_step += self._of_tree(price * step_ms(self._last_width))
        elif kept:
            self._last_width = kept
        tokens = kept + others
        return kept if tokens > 0 and self.of_step >= price * step_ms(tokens) else None

    def _of_tree(self, price: float) -> float:
        """Of all of a tree, less what it costs the verification and, at this price for each further step, which makes a
        token of every branch, the target."""
        worth, reach = 0.0, self._policy.typical
        for _ in range(self._lookahead):
            net = self._hits * (reach - self.floor) - price
            if net <= 0.0:
                break
            worth, reach = worth + net, reach * self._policy.typical
        return worth
