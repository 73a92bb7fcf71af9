"""The draft's side of one sequence, as a state machine without I/O and without tensors.

The session says what to run next (:meth:`DraftSession.next_step`), takes the ranked tokens that the model gave after
each item and returns the nodes to push (:meth:`DraftSession.complete`). It always has a next-best thing to do: a tree
is of use at every moment and spare time widens it. The value of an item is the number of accepted tokens that running
it is expected to add: the chance that its outcome happens and that its token is accepted then.

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
from heapq import heappop, heappush
from itertools import count
from math import inf

from ssd_ray.config import MAX_LOOKAHEAD, SamplingParams
from ssd_ray.saguaro.calibration import UNSAID, to_byte
from ssd_ray.saguaro.fanout import FanOutPolicy, Situation, Source, shape
from ssd_ray.saguaro.ngram import LONGEST
from ssd_ray.saguaro.width import best_width
from ssd_ray.sampling.laws import pack_laws
from ssd_ray.speculation.advice import TextAdvice
from ssd_ray.speculation.nodes import NOTHING, Candidate, DraftNode, Item, Moves, Prefill, Ranking
from ssd_ray.speculation.tree import TokenTree
from ssd_ray.wire import Begin, Nodes, Open, Outcome

WINDOW = 192
"""Tree nodes with KV that one sequence may hold."""

WINDOW_STEP = 64

LIFETIME = 3 * (MAX_LOOKAHEAD + 1)
"""Tokens after which a node is committed or gone: its position is at most a trunk and a branch ahead."""

SCRATCH = WINDOW + 2 * WINDOW_STEP
"""Slots beyond the longest sequence that a row of a draft needs."""

RESERVE = 2 * (MAX_LOOKAHEAD + 1)
"""Slots of the window that branches leave to the trunk."""

CATCH_UP = 16
"""More committed tokens than this without KV are prefilled, not run in a step."""

_BEYOND = 0.25
"""How much a token beyond the lookahead is worth: it orders the work, no more."""


class DraftSession:
    """One sequence on one draft.

    Attributes:
        c: Saguaro's C that the target plans with.
        filled: committed tokens whose KV is in place.
        read_tokens: committed tokens, from the first on, whose hidden states on the target are known.

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
        reads: committed tokens are run only behind those whose hidden states :meth:`read` was told of.
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
        self._reads = reads
        self.read_tokens = max(0, filled - 1)  # what is filled was run behind these
        self._policy = policy
        self._lookahead = lookahead
        self._branching = branching
        self._budget = float(budget)
        self._strict = strict
        self._advice = TextAdvice(heeds=text_lookup)
        self._next_id = 0
        self.filled = filled
        self._tie = count()
        self._unpushed: list[tuple[DraftNode, int]] = []  # (node, its parent on the wire)
        self._weights: Sequence[float] = ()
        self._planned: Sequence[int] = ()  # guesses by depth, as fan_out has it
        self.worth = 0.0  # of the last step
        self._last_width = 8  # branches in the last step that ran nothing else
        self._hits = 0.8  # how often outcomes were prepared for lately
        self._start(opened)

    def _start(self, opened: Open) -> None:
        self.params: SamplingParams = opened.params
        self.tokens = list(opened.tokens)
        self.round = opened.round
        self.c = opened.c
        self._price, self._floor = 0.0, 0.0
        self._wanted = 0
        self._doubts = False  # whether the trunk that comes was run without the states before it
        self._after_hit = True
        self._base = window_base(self.position)
        self._advice.begin(self.tokens)
        self._tree: TokenTree[DraftNode] = TokenTree(DraftNode, self.tokens[-1])
        self._follow(opened)

    @property
    def position(self) -> int:
        """Position of the bonus token."""
        return len(self.tokens) - 1

    @property
    def budget(self) -> int:
        """Guesses of a round, over all drafts."""
        return max(1, round(self._budget))

    @property
    def nodes(self) -> int:
        """Nodes of the tree."""
        return sum(1 for _ in self._tree.root.subtree())

    # Events. None may come between next_step and complete.

    def reopen(self, opened: Open) -> None:
        """Start again from what the target says; the KV of the common beginning stays."""
        self.filled = self.common(opened.tokens)
        if (alike := _alike(self.tokens, opened.tokens)) < len(self.tokens):
            self.read_tokens = min(self.read_tokens, alike)
        self._start(opened)

    def common(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, the last one aside, are there with their KV."""
        return min(self.filled, _alike(self.tokens, tokens))

    def expects(self, outcome: Outcome) -> bool:
        """Whether this outcome is the one that comes next, and possible."""
        return (
            outcome.round == self.round
            and outcome.accepted < len(self._tree.trunk)
            and outcome.position == self.position + outcome.accepted + 1
        )

    def advance(self, outcome: Outcome) -> Moves:
        """Take the outcome of the running round, which :meth:`expects` approved of; returns the KV to move first."""
        self._learn(outcome)
        committed = self._tree.trunk[: outcome.accepted + 1]
        start = self.position
        added = [*(node.token for node in committed[1:]), outcome.bonus_token]
        self.tokens += added
        self._advice.extend(added)
        self._tree.advance(outcome.accepted, outcome.bonus_token)
        self.round += 1
        moves = self._move_kv(committed, start)
        self._doubts = self._reads
        self.c = outcome.c
        self._price, self._floor = outcome.price, outcome.floor
        self._wanted = outcome.wanted
        self._after_hit = outcome.hit
        self._hits += 0.05 * (outcome.hit - self._hits)
        self._follow(outcome)
        return moves

    def begin(self, message: Begin) -> None:
        """Take what the target verifies after all, once it has waited for more of a branch."""
        if message.round == self.round:
            self._wanted = 0
            self._follow(message)

    @property
    def known(self) -> Sequence[int]:
        """The committed tokens whose KV is in place."""
        return self.tokens[: self.filled]

    @property
    def slots(self) -> int:
        """Slots that the sequence needs: its window lies behind all others."""
        return self._base + WINDOW

    @property
    def complete_past(self) -> bool:
        """Whether so few committed tokens lack their KV that a step can run them, with all that they go on from."""
        return self.position - self.filled <= CATCH_UP and not (self._reads and self.read_tokens < self.position)

    def read(self, start: int, count: int) -> int:
        """Take note that the target's hidden states of so many committed tokens are there, from at most
        :attr:`read_tokens` on; returns how many of them were there before."""
        known = min(self.read_tokens - start, count)
        self.read_tokens = max(self.read_tokens, start + count)
        return known

    @property
    def urgent(self) -> bool:
        """Whether the target waits for tokens that are still to be made."""
        missing = len(self._tree.trunk) - 1 < self._wanted
        return missing and (not all(map(_ran, self._tree.trunk)) or self._chain_end() is not None)

    def prefill(self, most: int) -> Prefill | None:
        """Up to ``most`` committed tokens to prefill before the next step, if many lack their KV."""
        if self.complete_past:
            return None
        start, end = self.filled, self.position
        if self._reads:
            end = min(end, self.read_tokens + 1)
        if end <= start:
            return None
        self.filled = min(end, start + most - start % most)  # chunks end at multiples of their size
        return Prefill(start, self.tokens[start : self.filled])

    def next_step(
        self, width: int, step_ms: Callable[[int], float] = lambda tokens: 1.0, rate: float = 0.0
    ) -> list[Item]:
        """What to run next in one forward: what is missing of the trunk, and up to ``width`` nodes of branches, as many
        as are worth what a step of so many tokens takes from the steps after it, ``rate`` by the millisecond, and from
        the target.

        While the target waits, nothing but the chain that it waits for: a narrow step is a quick one. Empty when the
        tree is complete, or what is left of it not worth its price. Otherwise :meth:`complete` must follow.
        """
        waited_for = len(self._tree.trunk) - 1 < self._wanted
        if self._price == inf and not waited_for:
            return []
        items = [*self._missing_tokens(), *self._missing_trunk()]
        if waited_for:
            end = None if items else self._chain_end()
            if items or end is not None:
                return items if end is None else [self._item(*end)]
        branches = self._branches(width)
        values = [self._worth(item.node) if item.node else 0.0 for _, item in branches]
        kept = best_width(values, len(items), lambda tokens: (rate + self._price) * step_ms(tokens))
        self.worth = sum(values[:kept])
        if items:
            self.worth += self._tree_worth(self._price * step_ms(self._last_width))
        elif kept:
            self._last_width = kept
        running = kept + len(items)
        worth_it = running > 0 and self.worth >= self._price * step_ms(running)
        self._put_back(branches[kept if worth_it else 0 :])
        if not worth_it:
            self._take_back(items)
            return []
        return [*items, *(item for _, item in branches[:kept])]

    def _branches(self, width: int) -> list[tuple[DraftNode, Item]]:
        """The best to run of the branches, up to ``width``, each with its stem."""
        branches: list[tuple[DraftNode, Item]] = []
        while len(branches) < width and len(self._free) > RESERVE and (candidate := self._pop()) is not None:
            branches.append((candidate[0], self._item(*candidate)))
        return branches

    def _put_back(self, branches: Sequence[tuple[DraftNode, Item]]) -> None:
        for stem, item in branches:
            if item.node is not None:
                self._clear(item)
                heappush(self._frontier, (-self._worth(item.node), next(self._tie), Candidate(stem, item.node)))

    def _take_back(self, items: Sequence[Item]) -> None:
        """Leave what is missing of the trunk for another step."""
        self.filled -= sum(item.node is None for item in items)
        for item in reversed(items):
            self._clear(item)

    def _clear(self, item: Item) -> None:
        # What others were run behind keeps its place: it is here to be run again.
        if item.node is not None and not any(map(_has_place, item.node.children.values())):
            self._free.append(item.slot)
            item.node.slot, item.node.path = -1, ()

    def _tree_worth(self, price: float) -> float:
        """Tokens that all of a tree may add, expected, less what they cost the verification and, at this price for each
        further step, which makes a token of every branch, the target."""
        worth, reach = 0.0, self._policy.typical
        for _ in range(self._lookahead):
            net = self._hits * (reach - self._floor) - price
            if net <= 0.0:
                break
            worth, reach = worth + net, reach * self._policy.typical
        return worth

    def _worth(self, node: DraftNode) -> float:
        """Tokens that running a node adds, expected, by the one that follows it, less what that one costs the
        verification; beyond the lookahead less."""
        worth = node.chance * (self._policy.typical - self._floor / node.reach)
        return worth if node.depth <= self._lookahead else worth * _BEYOND

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
        self._open_guesses()
        for item in items:
            if item.node is not None and item.node.depth > 0:
                self._extend(item.node)
        return self._push(step_ms, sequences, step_tokens)

    def paths(self, items: Sequence[Item]) -> list[list[int]]:
        """The tokens between the committed ones and what follows each item, which is the last of them."""
        token_at = {node.slot: node.token for node in self._tree.root.subtree()}
        return [[token_at[slot] for slot in item.path[1:]] for item in items]  # the root is committed

    def fan_out(self, items: Sequence[Item]) -> list[int]:
        """Guesses that are planned for the position after each item, should it be in the trunk of a round."""
        if not self._planned:
            depths = Situation([()] * (self._lookahead + 1))
            self._planned = shape(self._policy.depths(depths), self._policy.exponent, self.budget)
        return [self._planned[min(_trunk_depth(item), self._lookahead)] for item in items]

    # What the text says

    def _tail(self) -> tuple[int, ...]:
        return tuple(self.tokens[-LONGEST:])

    def _unroll(self, node: DraftNode) -> None:
        """Continue a guess by what the text says, without running anything, once the text is worth it."""
        right = self._advice.right
        while self._advice.trusted and node.depth <= self._lookahead:
            said = self._advice.follows(node.tail)
            if said is None:
                return
            child = self._make(node, said, node.id)
            child.sure, child.depth = right, node.depth + 1
            child.chance, child.reach = node.chance * right, node.reach * right
            node = child

    # The tree

    def _follow(self, message: Open | Outcome | Begin) -> None:
        """Take what is being verified and this draft's share of the guesses, and order the work anew."""
        self._tree.follow(message.speculation)
        if self._doubts:
            for node in self._tree.trunk:
                node.ranking = NOTHING
            self._doubts = False
        self._share, self._shares = message.share, message.shares
        self._opened, self._allowed = 0, len(range(self._share, self.budget, self._shares)) if self._strict else -1
        self._frontier: list[tuple[float, int, Candidate]] = []
        self._planned = ()
        self._guesses: dict[int, list[int]] = {}  # by depth of the trunk
        self._ranks: dict[int, Sequence[float]] = {}  # probabilities of these guesses, given the depth
        for node, _ in self._unpushed:
            node.id = -1
        self._unpushed.clear()
        self._situation = Situation(
            [()] * len(self._tree.trunk), self._after_hit, [Source.MODEL] * len(self._tree.trunk), self.budget
        )
        self._set_paths()
        self._open_guesses()

    def _set_paths(self) -> None:
        used = set()
        for depth, node in enumerate(self._tree.trunk):
            node.tail = (*self._tree.trunk[depth - 1].tail, node.token)[-LONGEST:] if depth else self._tail()
        stack: list[tuple[DraftNode, tuple[int, ...]]] = [(self._tree.root, ())]
        while stack:
            node, path = stack.pop()
            if node.slot >= 0:
                used.add(node.slot)
                node.path = (*path, node.slot)
                stack.extend((child, node.path) for child in node.children.values())
        self._free = [slot for slot in range(self._base + WINDOW - 1, self._base - 1, -1) if slot not in used]
        for node in self._tree.trunk:
            node.depth = 0

    def _open_guesses(self) -> None:
        """Rank the outcomes at every depth of the trunk whose logits are there and were not ranked yet."""
        trunk = self._tree.trunk
        new = [depth for depth, node in enumerate(trunk) if node.ranking.tokens and depth not in self._guesses]
        for depth in new:
            self._rank_guesses(depth)
        self._weights = self._policy.depths(self._situation) if new else self._weights
        self._ranks |= {depth: self._policy.ranks(self._situation, depth) for depth in new}
        for depth in new:
            node, last = trunk[depth], depth == len(trunk) - 1
            if last:
                self._start_branch(self._draft(node, -1 - depth), depth, 0)
            if last or self._branching:
                self._offer_guess(depth, (self._share - depth) % self._shares)

    def _rank_guesses(self, depth: int) -> None:
        """Guess every ranked token but the drafted one, and note how far behind the best each is."""
        trunk = self._tree.trunk
        ranking, drafted = trunk[depth].ranking, -1 if depth == len(trunk) - 1 else trunk[depth + 1].token
        scored = list(zip(ranking.tokens, ranking.scores, strict=True))
        guesses = [(token, score) for token, score in scored if token != drafted]
        best = next((score for token, score in scored if token == drafted), guesses[0][1])
        self._guesses[depth] = [token for token, _ in guesses]
        self._situation.gaps[depth] = [best - score for _, score in guesses]
        self._situation.sources[depth] = ranking.source

    def _offer_guess(self, depth: int, rank: int) -> None:
        """Put a guess on the frontier. Guesses are dealt out over the drafts by rank, starting elsewhere each depth."""
        if rank < len(self._guesses[depth]):
            value = self._chance(depth, rank) * (self._policy.typical - self._floor)
            candidate = Candidate(self._tree.trunk[depth], None, depth, rank)
            heappush(self._frontier, (-value, next(self._tie), candidate))

    def _chance(self, depth: int, rank: int) -> float:
        ranks = self._ranks[depth]
        return self._weights[depth] * (ranks[rank] if rank < len(ranks) else 0.0)

    def _pop(self) -> tuple[DraftNode, DraftNode] | None:
        """Take the best (stem, node) that has not run."""
        while self._frontier:
            _, _, candidate = heappop(self._frontier)
            if candidate.node is None and self._opened == self._allowed:
                continue
            node = candidate.node or self._open(candidate)
            if node.slot < 0:
                return candidate.stem, node
            if node.ranking.tokens:  # it has run out of turn; one that is in this very step is extended when it has
                self._extend(node)
        return None

    def _chain_end(self) -> tuple[DraftNode, DraftNode] | None:
        """The first (stem, node) of the chain below the trunk that has not run; None once the chain is long enough."""
        trunk = self._tree.trunk
        stem, length = trunk[-1], len(trunk)
        node = self._draft(stem, -length)
        while node.slot >= 0 and (following := node.continuation()) is not None:
            stem, node, length = node, following, length + 1
        return (stem, node) if node.slot < 0 and length < self._wanted else None

    def _open(self, guess: Candidate) -> DraftNode:
        """Make the node of a guess, and offer the next one at its depth."""
        node = self._make(guess.stem, self._guesses[guess.depth][guess.rank], -1 - guess.depth)
        self._opened += 1
        self._start_branch(node, guess.depth, guess.rank)
        if self._branching:
            self._offer_guess(guess.depth, guess.rank + self._shares)
        return node

    def _start_branch(self, node: DraftNode, depth: int, rank: int) -> None:
        node.depth, node.chance, node.reach = 1, self._chance(depth, rank), 1.0
        self._unroll(node)

    def _extend(self, node: DraftNode) -> None:
        """Continue the branch of a node that ran by the token that is drafted after it."""
        if node.depth > self._lookahead:
            return
        child = self._draft(node, node.id)
        child.depth = node.depth + 1
        child.chance, child.reach = node.chance * child.sure, node.reach * child.sure
        self._policy.saw_estimate(child.sure)
        if self._worth(child) > 0.0:  # else what follows would not be verified
            heappush(self._frontier, (-self._worth(child), next(self._tie), Candidate(node, child)))

    def _make(self, stem: DraftNode, token: int, parent: int) -> DraftNode:
        """The child of ``stem`` with this token; a new one gets its number and will be pushed."""
        node = self._tree.grow(stem, token)
        if node.id < 0:
            node.id = self._next_id
            node.tail = (*stem.tail, token)[-LONGEST:]
            self._next_id += 1
            self._unpushed.append((node, parent))
        return node

    def _draft(self, stem: DraftNode, parent: int) -> DraftNode:
        """The child with the token that is drafted after ``stem``. With a law it is pushed even if it is known."""
        drafted, law = stem.ranking.drafted, stem.ranking.law
        if law is not None and stem.sampled is None:
            node = stem.sampled = self._tree.grow(stem, drafted)
            node.id, node.law = -1, law
        node = self._make(stem, drafted, parent)
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

    def _push(self, step_ms: float, sequences: int, step_tokens: int) -> Nodes | None:
        if not self._unpushed:
            return None
        nodes, self._unpushed = self._unpushed, []
        return Nodes(
            self.sequence,
            self.round,
            nodes[0][0].id,
            [parent for _, parent in nodes],
            [node.token for node, _ in nodes],
            step_ms,
            sequences,
            step_tokens,
            bytes(to_byte(node.sure) if node.sure else UNSAID for node, _ in nodes),
            *pack_laws([node.law for node, _ in nodes]),
        )

    # The KV

    def _item(self, stem: DraftNode, node: DraftNode) -> Item:
        if not _has_place(node):
            node.slot = self._free.pop()
            node.path = (*stem.path, node.slot)
        return Item(node.token, self.position + len(node.path) - 1, node.slot, self.position, node.path, node)

    def _missing_tokens(self) -> list[Item]:
        start, self.filled = self.filled, self.position
        return [
            Item(self.tokens[position], position, position, position + 1, (), None)
            for position in range(start, self.position)
        ]

    def _missing_trunk(self) -> list[Item]:
        trunk = self._tree.trunk
        stems = [DraftNode(-1), *trunk]  # the root has no stem: an empty path
        return [self._item(stem, node) for stem, node in zip(stems, trunk, strict=False) if not _ran(node)]

    def _move_kv(self, committed: Sequence[DraftNode], start: int) -> Moves:
        """Bring the KV of committed nodes to their positions.

        Nodes run after their ancestors, so those of the trunk that ran are its beginning. Where the target is read they
        are run again.
        """
        source = [] if self._reads else [node.slot for node in committed if _has_place(node)]
        self.filled += len(source)
        if self.position + LIFETIME > self._base:
            self._base = window_base(self.position)  # nodes that live stay where they are
        return Moves(source, range(start, start + len(source)))

    def _learn(self, outcome: Outcome) -> None:
        if not self._strict and self._opened:
            self._budget += 0.1 * (self._opened * self._shares - self._budget)
        guesses = self._guesses.get(outcome.accepted)
        if guesses is not None:
            rank = guesses.index(outcome.bonus_token) if outcome.bonus_token in guesses else None
            self._policy.observe(self._situation, outcome.accepted, rank)
        for depth, node in enumerate(self._tree.trunk[: outcome.accepted + 1]):
            token = self._tree.trunk[depth + 1].token if depth < outcome.accepted else outcome.bonus_token
            self._advice.judge(node.ranking, token)


def _alike(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts have in common from the first on, but the last one of the second."""
    limit = min(len(tokens), len(others) - 1)
    return next((i for i in range(limit) if tokens[i] != others[i]), limit)


def _has_place(node: DraftNode) -> bool:
    """Whether there is KV of a node."""
    return node.slot >= 0


def _ran(node: DraftNode) -> bool:
    """Whether it is known what follows a node."""
    return _has_place(node) and bool(node.ranking.tokens)


def _trunk_depth(item: Item) -> int:
    """Where in the trunk an item's token would be verified: a guess is the next bonus token, which has depth 0."""
    return 0 if item.node is None else max(0, item.node.depth - 1)


def window_base(position: int) -> int:
    """First scratch slot for a bonus token at this position: many rounds beyond, so that the window rarely moves."""
    return (position // WINDOW_STEP + 2) * WINDOW_STEP
