"""The draft's side of one sequence, as a state machine without I/O and without tensors.

The session says what to run next (:meth:`DraftSession.next_step`), takes the ranked tokens that the model gave after
each item and returns the nodes to push (:meth:`DraftSession.complete`). It always has a next-best thing to do: a tree
is of use at every moment and spare time widens it. The value of an item is the number of accepted tokens that running
it is expected to add: the chance that its outcome happens and that its token is accepted then.

What it knows lies in rooms of its own: the committed tokens (past.py), the slots of the tree's nodes (window.py), the
guesses of a round (guesses.py), what could be run of their branches (frontier.py), what that is worth (worth.py), and
how nodes are made and pushed (growth.py).

KV: committed tokens have slot = position. Tree nodes sit in a window of scratch slots beyond them; when an outcome
commits a node, its KV is moved to its position and never computed again. The window moves on before the trunk gets
there. What another draft drafted, and what was committed without this draft, is run like any other item, all of it in
one forward.

A draft that reads the target's hidden states runs a token from those of the token before it, or, ahead of the target,
from states of its own. The latter is a makeshift: what an outcome commits is run again, and so is the trunk of the new
round, now that the states of all tokens before it are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from ssd_ray.config import MAX_LOOKAHEAD, SamplingParams
from ssd_ray.saguaro.fanout import FanOutPolicy
from ssd_ray.speculation.advice import TextAdvice
from ssd_ray.speculation.frontier import Frontier
from ssd_ray.speculation.growth import Growth
from ssd_ray.speculation.guesses import Allowance, Guesses
from ssd_ray.speculation.nodes import NOTHING, DraftNode, Edge, Item, Moves, Ranking
from ssd_ray.speculation.past import Past
from ssd_ray.speculation.tree import TokenTree
from ssd_ray.speculation.window import Window
from ssd_ray.speculation.worth import Worth
from ssd_ray.wire import Begin, Nodes, Open, Outcome


class DraftSession:
    """One sequence on one draft.

    Attributes:
        past: its committed tokens.
        c: Saguaro's C that the target plans with.

    Args:
        opened: the sequence as the target told it.
        policy: which outcomes to prepare for; it learns from the outcomes.
        filled: committed tokens whose KV is in place already.
        lookahead: tokens that a speculation has at most.
        branching: open guesses. Without it only the chain after the bonus token is drafted, as plain speculative
            decoding does.
        budget: guesses of a round, over all drafts.
        strict: open no more than these; else the budget becomes what there usually is time for.
        text_lookup: heed what followed the same tokens earlier in the text.
        reads: committed tokens are run only behind those whose hidden states :meth:`Past.read` was told of.
    """

    def __init__(
        self,
        opened: Open,
        policy: FanOutPolicy,
        *,
        filled: int = 0,
        lookahead: int = MAX_LOOKAHEAD,
        branching: bool = True,
        budget: int = 16,
        strict: bool = False,
        text_lookup: bool = True,
        reads: bool = False,
    ) -> None:
        self.sequence = opened.sequence
        self.past = Past(opened.tokens, filled, reads=reads)
        self._policy = policy
        self._lookahead = lookahead
        self._branching = branching
        self._allowance = Allowance(budget, strict=strict)
        self._advice = TextAdvice(heeds=text_lookup)
        self._worth = Worth(policy, lookahead)
        self._tree: TokenTree[DraftNode] = TokenTree(DraftNode, opened.tokens[-1])
        self._growth = Growth(self._tree, policy, self._advice, lookahead)
        self._start(opened)

    def _start(self, opened: Open) -> None:
        self.params: SamplingParams = opened.params
        self.round = opened.round
        self.c = opened.c
        self._wanted = 0  # length of the speculation that the target waits for
        self._after_hit = True
        self._worth.ask(0.0, 0.0)
        self._window = Window(self.past.position)
        self._advice.begin(self.past.tokens)
        self._follow(opened)

    @property
    def slots(self) -> int:
        """Slots that the sequence needs: its window lies behind all others."""
        return self._window.end

    @property
    def worth(self) -> float:
        """Tokens that the last step may add, expected."""
        return self._worth.of_step

    # Events. None may come between next_step and complete.

    def reopen(self, opened: Open) -> None:
        """Start again from what the target says; the KV of the common beginning stays."""
        self.past.restart(opened.tokens)
        self._tree.restart(opened.tokens[-1])
        self._start(opened)

    def expects(self, outcome: Outcome) -> bool:
        """Whether this outcome is the one that comes next, and possible."""
        return (
            outcome.round == self.round
            and outcome.accepted < len(self._tree.trunk)
            and outcome.position == self.past.position + outcome.accepted + 1
        )

    def advance(self, outcome: Outcome) -> Moves:
        """Take the outcome of the running round, which :meth:`expects` approved of; returns the KV to move first."""
        committed = self._tree.trunk[: outcome.accepted + 1]
        moves = self.past.commit(committed, outcome.bonus_token)
        self._learn(outcome, committed, self.past.tokens[-len(committed) :])
        self._tree.advance(outcome.accepted, outcome.bonus_token)
        self._window.move_on(self.past.position)
        self._worth.ask(outcome.price, outcome.floor)
        self.round += 1
        self.c = outcome.c
        self._wanted = outcome.wanted
        self._after_hit = outcome.hit
        self._follow(outcome, again=self.past.reads)
        return moves

    def _learn(self, outcome: Outcome, committed: Sequence[DraftNode], followed: Sequence[int]) -> None:
        """Learn from an outcome, in which each committed node was followed by one of these tokens."""
        self._allowance.saw(self._guesses.opened)
        self._guesses.learn(outcome.accepted, outcome.bonus_token)
        for node, token in zip(committed, followed, strict=True):
            self._advice.judge(node.ranking, token)
        self._advice.extend(followed)
        self._worth.saw(outcome.hit)

    def begin(self, message: Begin) -> None:
        """Take what the target verifies after all, once it has waited for more of a branch."""
        if message.round == self.round:
            self._wanted = 0
            self._follow(message)

    def _follow(self, message: Open | Outcome | Begin, *, again: bool = False) -> None:
        """Take what is being verified and this draft's share of the guesses, and order the work anew.

        ``again``: the trunk was run without the states before it, so all of it is run once more.
        """
        self._growth.follow(message.speculation, self.past.tokens)
        trunk = self._tree.trunk
        if again:
            for node in trunk:
                node.ranking = NOTHING
        self._window.sweep(self._tree.root)
        self._guesses = Guesses(self._policy, trunk, self._after_hit, self._allowance, message.share, message.shares)
        self._frontier = Frontier(self._guesses, self._growth, self._worth, branching=self._branching)
        self._frontier.widen()

    # Work

    @property
    def _waited_for(self) -> bool:
        return len(self._tree.trunk) - 1 < self._wanted

    @property
    def urgent(self) -> bool:
        """Whether the target waits for tokens that are still to be made."""
        return self._waited_for and (
            not all(node.ran for node in self._tree.trunk) or self._growth.chain_end(self._wanted) is not None
        )

    def next_step(
        self, width: int, step_ms: Callable[[int], float] = lambda tokens: 1.0, rate: float = 0.0
    ) -> list[Item]:
        """What to run next in one forward: what is missing of the trunk, and up to ``width`` nodes of branches, as many
        as are worth what a step of so many tokens takes from the steps after it, ``rate`` by the millisecond, and from
        the target.

        While the target waits, nothing but the chain that it waits for: a narrow step is a quick one. Empty when the
        tree is complete, or what is left of it not worth its price. Otherwise :meth:`complete` must follow.
        """
        if self._worth.price == inf and not self._waited_for:
            return []
        items = [*self.past.catch_up(), *self._missing_trunk()]
        if self._waited_for and (awaited := items or self._chain()):
            return awaited
        branches = self._branches(width)
        values = [self._worth.of(node) for _, node in branches]
        kept = self._worth.weigh(values, len(items), step_ms, rate)
        for stem, node in branches[kept or 0 :]:
            self._window.clear(node)
            self._frontier.put_back(stem, node)
        if kept is None:
            self._take_back(items)
            return []
        return [*items, *(Item.of(node, self.past.position) for _, node in branches[:kept])]

    def _missing_trunk(self) -> list[Item]:
        trunk = self._tree.trunk
        stems = [DraftNode(-1), *trunk]  # the root has no stem: an empty path
        return [self._item(stem, node) for stem, node in zip(stems, trunk, strict=False) if not node.ran]

    def _chain(self) -> list[Item]:
        """The next token of the chain that the target waits for; nothing once it is long enough."""
        end = self._growth.chain_end(self._wanted)
        return [] if end is None else [self._item(*end)]

    def _item(self, stem: DraftNode, node: DraftNode) -> Item:
        self._window.place(stem, node)
        return Item.of(node, self.past.position)

    def _branches(self, width: int) -> list[Edge]:
        """The best to run of the branches, up to ``width``."""
        branches: list[Edge] = []
        while len(branches) < width and self._window.roomy and (edge := self._frontier.pop()) is not None:
            self._window.place(*edge)  # at once: it may be on the frontier twice
            branches.append(edge)
        return branches

    def _take_back(self, items: Sequence[Item]) -> None:
        """Leave what is missing of the past and of the trunk for another step."""
        nodes = [item.node for item in items if item.node is not None]
        self.past.fall_back(len(items) - len(nodes))
        for node in reversed(nodes):
            self._window.clear(node)

    def complete(
        self,
        items: Sequence[Item],
        rankings: Sequence[Ranking],
        *,
        step_ms: float = 0.0,
        sequences: int = 1,
        step_tokens: int = 0,
    ) -> Nodes | None:
        """Take what the model says after each item; returns what to push, if anything.

        ``step_ms`` is what this draft's last step took, how many ``sequences`` shared it and how many tokens it ran.
        """
        for item, ranking in zip(items, rankings, strict=True):
            if item.node is not None:
                item.node.ranking = self._advice.heeded(ranking, item.node.tail)
        self._frontier.widen()
        for item in items:
            if item.node is not None and item.node.depth > 0:
                self._frontier.extend(item.node)
        return self._growth.push(self.sequence, self.round, step_ms, sequences, step_tokens)

    # What the model is asked with

    def paths(self, items: Sequence[Item]) -> list[list[int]]:
        """The tokens between the committed ones and what follows each item, which is the last of them."""
        token_at = {node.slot: node.token for node in self._tree.root.subtree()}
        return [[token_at[slot] for slot in item.path[1:]] for item in items]  # the root is committed

    def fan_out(self, items: Sequence[Item]) -> list[int]:
        """Guesses that are planned for the position after each item, should it be in the trunk of a round."""
        planned = self._guesses.plan(self._lookahead)
        return [planned[min(_trunk_depth(item), self._lookahead)] for item in items]


def _trunk_depth(item: Item) -> int:
    """Where in the trunk an item's token would be verified: a guess is the next bonus token, which has depth 0."""
    return 0 if item.node is None else max(0, item.node.depth - 1)
