"""The token tree, the speculation cache, the two sessions."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.config import SamplingParams
from ssd_ray.saguaro.fanout import Histogram, Uniform
from ssd_ray.saguaro.width import best_width
from ssd_ray.sampling.verify import Outcome as Decision
from ssd_ray.speculation import cache as cache_module
from ssd_ray.speculation.cache import SampledNode, SpeculationCache
from ssd_ray.speculation.draft import DraftSession
from ssd_ray.speculation.nodes import Item, Ranking
from ssd_ray.speculation.past import CATCH_UP
from ssd_ray.speculation.target import TargetSession
from ssd_ray.speculation.tree import Node, TokenTree
from ssd_ray.speculation.window import RESERVE, WINDOW
from ssd_ray.wire import Begin, Nodes, Open, Outcome

GREEDY = SamplingParams(temperature=0.0)


def test_advance_keeps_what_hangs_below_the_outcome() -> None:
    tree = TokenTree(Node, 1)
    tree.follow([2, 3])
    guess = tree.grow(tree.trunk[1], 9)
    tree.grow(guess, 10)
    assert tree.speculation == [2, 3]
    assert tree.advance(1, 9)
    assert tree.root is guess
    assert [node.token for node in tree.root.chain(5)] == [10]
    assert not tree.advance(0, 77)
    assert [node.token for node in tree.root.subtree()] == [77]


def push(round: int, first: int, *nodes: tuple[int, int]) -> Nodes:
    return Nodes(1, round, first, [parent for parent, _ in nodes], [token for _, token in nodes])


class TestSpeculationCache:
    def test_a_prepared_outcome_is_a_hit(self) -> None:
        cache = SpeculationCache(5, vocab_size=100)
        cache.add("a", push(0, 0, (-1, 6), (0, 7), (1, 8)))
        assert cache.speculate(7) == [6, 7, 8]
        cache.add("a", push(0, 3, (-3, 20), (3, 21), (4, 22)))
        assert cache.guesses(2) == 1
        assert cache.advance(2, 20)
        assert cache.speculate(7) == [21, 22]
        assert len(cache) == 3

    def test_lookahead_bounds_a_speculation(self) -> None:
        cache = SpeculationCache(5, vocab_size=100)
        cache.add("a", push(0, 0, (-1, 6), (0, 7), (1, 8)))
        assert cache.speculate(2) == [6, 7]
        assert cache.advance(2, 8)

    def test_ids_of_two_drafts_do_not_meet(self) -> None:
        cache = SpeculationCache(5, vocab_size=100)
        cache.add("a", push(0, 0, (-1, 6)))
        cache.add("b", push(0, 0, (-1, 7), (0, 8)))
        assert cache.advance(0, 7)
        assert cache.speculate(7) == [8]

    def test_a_late_branch_of_the_winning_outcome_is_taken(self) -> None:
        cache = SpeculationCache(5, vocab_size=100)
        cache.advance(0, 6)
        assert cache.add("a", push(0, 0, (-1, 6), (0, 7), (-1, 9), (2, 10))) == 2
        assert cache.speculate(7) == [7]
        assert (cache.prepared, cache.guessed) == (2, True)

    def test_a_late_branch_below_a_known_trunk_is_taken(self) -> None:
        cache = SpeculationCache(5, vocab_size=100)
        cache.add("a", push(0, 0, (-1, 6), (0, 7)))
        assert cache.speculate(1) == [6]
        cache.advance(1, 8)
        assert cache.add("a", push(0, 2, (0, 9), (0, 8), (3, 10))) == 2
        assert cache.speculate(7) == [10]

    @pytest.mark.parametrize(
        "message",
        [
            push(1, 0, (-1, 6)),
            push(0, 0, (5, 6)),
            push(0, 0, (-2, 6)),
            push(0, 0, (-1, 100)),
            Nodes(1, 0, 0, [-1, -1], [6]),
        ],
        ids=["future", "unknown parent", "beyond the trunk", "no such token", "uneven"],
    )
    def test_nonsense_is_dropped(self, message: Nodes) -> None:
        cache = SpeculationCache(5, vocab_size=100)
        assert cache.add("a", message) == 0
        assert len(cache) == 1

    def test_it_stays_small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache_module, "MAX_NODES", 10)
        cache = SpeculationCache(5, vocab_size=1000)
        for first in range(100):
            cache.add("a", push(0, first, (-1, first)))
        assert len(cache) == 10

    def test_a_draft_that_is_forgotten_leaves_its_tokens(self) -> None:
        cache = SpeculationCache(5, vocab_size=100)
        cache.add("a", push(0, 0, (-1, 6)))
        cache.forget("a")
        assert cache.add("a", push(0, 9, (0, 7))) == 0
        assert cache.speculate(7) == [6]


def laws(*weights: list[float], tokens: list[list[int]] | None = None) -> dict[str, object]:
    """Fields of a message whose nodes 0, 1, .. were drawn from these laws."""
    return {
        "sampled": list(range(len(weights))),
        "law_weights": memoryview(np.array(weights, np.float32).tobytes()),
        "law_tokens": memoryview(np.array(tokens or [], np.int32).tobytes()),
        "law_guesses": [0] * len(weights),
        "law_factors": [1.0] * len(weights),
    }


class TestRejectionMode:
    """Chains follow what was drawn, and nothing else."""

    def test_guesses_do_not_continue_a_chain(self) -> None:
        cache = SpeculationCache(5, vocab_size=100, node=SampledNode)
        cache.add("a", push(0, 0, (-1, 6), (0, 7)))
        assert cache.speculate(7) == []
        cache.add("a", Nodes(1, 0, 2, [-1, 2], [8, 9], **laws([1.0], [1.0], tokens=[[8], [9]])))  # type: ignore[arg-type]
        assert cache.speculate(7) == [8, 9]

    def test_a_guess_that_is_drawn_later_gets_its_law(self) -> None:
        cache = SpeculationCache(5, vocab_size=100, node=SampledNode)
        cache.add("a", push(0, 0, (-1, 6)))
        cache.add("a", Nodes(1, 0, 1, [-1], [6], **laws([0.5, 0.5], tokens=[[6, 7]])))  # type: ignore[arg-type]
        assert cache.speculate(7) == [6]

    def test_the_first_draw_stands(self) -> None:
        cache = SpeculationCache(5, vocab_size=100, node=SampledNode)
        for token in (6, 7):
            cache.add("a", Nodes(1, 0, token, [-1], [token], **laws([1.0], tokens=[[token]])))  # type: ignore[arg-type]
        assert cache.speculate(7) == [6]

    def test_uneven_laws_are_no_laws(self) -> None:
        cache = SpeculationCache(5, vocab_size=100, node=SampledNode)
        fields = laws([0.5, 0.5], tokens=[[6]])
        assert cache.add("a", Nodes(1, 0, 0, [-1], [6], **fields)) == 1  # type: ignore[arg-type]
        assert cache.speculate(7) == []

    def test_proposals_are_laws_or_nothing(self) -> None:
        session = TargetSession(1, [5], SamplingParams(), max_length=64, vocab_size=4, sampled=True)
        session.add("a", Nodes(1, 0, 0, [-1, 0], [2, 3], **laws([0.25] * 4, [0.9] * 4)))  # type: ignore[arg-type]
        assert session.begin(7) == [2, 3]
        sound, broken = session.proposals
        assert sound is not None
        assert sound.tokens.tolist() == [0, 1, 2, 3]
        assert broken is None

    def test_what_is_found_in_the_text_is_speculated_without_a_law(self) -> None:
        cache = SpeculationCache(5, vocab_size=100, node=SampledNode)
        cache.plant([6, 7])
        assert cache.speculate(7) == [6, 7]
        assert [node.law for node in cache.tree.trunk] == [None] * 3


def target(**params: object) -> TargetSession:
    values = SamplingParams(temperature=0.0, **params)  # type: ignore[arg-type]
    return TargetSession(1, [1, 2, 3], values.ending_with([0]), max_length=64, vocab_size=100)


class TestTargetSession:
    def test_a_round(self) -> None:
        session = target()
        session.add("a", push(0, 0, (-1, 4), (0, 5), (1, 6)))
        session.begin(7)
        assert session.inputs == [3, 4, 5, 6]
        assert session.commit(Decision(2, 9)) == [4, 5, 9]
        assert (session.position, session.round, session.generated) == (5, 1, [4, 5, 9])

    def test_what_came_of_the_drafts_work_is_counted(self) -> None:
        session = target()
        steps = [((-1, 4), (-1, 20)), ((0, 5),), ((1, 21),)]  # the chain 4 5 and guesses 20 and 21
        first = 0
        for ms, nodes in enumerate(steps, 1):
            message = push(0, first, *nodes)
            session.add("a", Nodes(1, 0, first, message.parents, message.tokens, step_ms=float(ms)))
            first += len(nodes)
        session.begin(7)
        stats = session.stats()
        assert (stats.tree_tokens, stats.tree_used, stats.partial) == (4, 2, 1)
        assert (stats.draft_ms, stats.draft_used_ms) == (6.0, 3.0)
        session.commit(Decision(0, 20))  # the other token of the first step, which has been counted
        assert session.begin(7) == [21]
        stats = session.stats()
        assert (stats.tree_used, stats.partial, stats.draft_used_ms) == (4, 2, 6.0)

    def test_it_never_yields_more_than_asked_for(self) -> None:
        session = target(max_tokens=2)
        session.add("a", push(0, 0, (-1, 4), (0, 5), (1, 6)))
        assert session.begin(7) == [4]
        assert session.commit(Decision(1, 5)) == [4, 5]
        assert session.finish_reason == "length"

    def test_an_end_token_cuts_what_follows_it(self) -> None:
        for params, kept, reason in [({}, [4, 0], "stop"), ({"ignore_eos": True}, [4, 0, 6, 7], None)]:
            session = target(**params)
            session.add("a", push(0, 0, (-1, 4), (0, 0), (1, 6)))
            session.begin(7)
            added = session.commit(Decision(3, 7))
            assert (added, session.finish_reason) == (kept, reason)

    @pytest.mark.parametrize(
        ("messages", "drafts", "cause"),
        [
            ([], [], "no_draft"),
            ([], ["a"], "cold"),
            ([push(1, 5, (-1, 8), (5, 9))], ["a"], "fan_out"),
            ([push(1, 5, (-1, 50))], ["a"], "late"),
            ([push(1, 5, (-2, 8))], ["a"], "late"),
        ],
    )
    @pytest.mark.parametrize("late", [False, True], ids=["before the outcome", "after the outcome"])
    def test_a_miss_has_a_cause(self, messages: list[Nodes], drafts: list[str], cause: str, late: bool) -> None:
        session = target()
        session.begin(7)
        session.commit(Decision(0, 40))
        session.look_up([])
        session.begin(7)
        if not late:
            for message in messages:
                session.add("a", message)
        session.commit(Decision(0, 50))
        if late:
            for message in messages:
                session.add("a", message)
        session.look_up(drafts)
        assert session.tally.misses[cause] >= 1  # type: ignore[index]

    def test_a_draft_at_work_on_an_earlier_round_is_stale(self) -> None:
        session = target()
        session.add("a", push(0, 0, (-1, 4)))
        for choice in (40, 41):
            session.begin(0)
            session.commit(Decision(0, choice))
            session.look_up(["a"])
        assert session.tally.misses == {"late": 1, "stale": 1} or session.tally.misses == {"fan_out": 1, "stale": 1}


def opened(tokens: list[int], speculation: list[int] | None = None, **values: int) -> Open:
    return Open(1, 0, tokens, speculation or [], GREEDY, **values)


def run(session: DraftSession, width: int = 4, ranked: list[int] | None = None) -> tuple[list[Item], Nodes | None]:
    """One step with a model that ranks the same tokens everywhere."""
    items, ranked = session.next_step(width), ranked or list(range(50, 80))
    ranking = Ranking(ranked, [-float(rank) for rank in range(len(ranked))], ranked[0])
    return items, session.complete(items, [ranking] * len(items)) if items else None


class TestDraftSession:
    def test_the_first_step_runs_what_is_missing_in_one_forward(self) -> None:
        session = DraftSession(opened([1, 2, 3], [4, 5]), Uniform())
        items, nodes = run(session)
        assert [(item.token, item.position) for item in items] == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]
        assert [item.slot for item in items[:2]] == [0, 1]
        assert [item.trunk for item in items] == [1, 2, 2, 2, 2]
        assert items[4].path == (items[2].slot, items[3].slot, items[4].slot)
        assert nodes is not None
        assert nodes == Nodes(1, 0, 0, [-3], [50], chances=nodes.chances)
        assert len(nodes.chances) == 1

    def test_guesses_leave_out_the_drafted_token(self) -> None:
        session = DraftSession(opened([1, 2], [50]), Uniform())
        run(session)
        items, nodes = run(session, width=6)
        guesses = {(item.position, item.token) for item in items}
        assert (2, 50) not in guesses
        assert {(2, 51), (3, 50)} <= guesses
        assert nodes is not None
        assert len(nodes.parents) == len(set(zip(nodes.parents, nodes.tokens, strict=True)))
        said = dict(zip(zip(nodes.parents, nodes.tokens, strict=True), nodes.chances, strict=True))
        drafted = {edge for edge in said if edge[0] >= 0 and edge[1] == 50}
        assert {edge for edge, chance in said.items() if chance} == drafted  # of a guess that is not known

    def test_a_long_prompt_is_prefilled(self) -> None:
        session = DraftSession(opened(list(range(CATCH_UP + 10))), Uniform())
        prefill = session.past.prefill(1000)
        assert prefill is not None
        assert (prefill.start, len(prefill.tokens)) == (0, CATCH_UP + 9)
        assert session.past.prefill(1000) is None
        items, _ = run(session)
        assert [item.position for item in items] == [CATCH_UP + 9]

    def test_kv_of_the_winning_branch_is_moved_not_recomputed(self) -> None:
        session = DraftSession(opened([1, 2]), Uniform())
        ran = [item for _ in range(4) for item in run(session)[0]]
        winner = next(item for item in ran if item.token == 52)
        followed = next(item for item in ran if item.path[:-1] == winner.path)
        moves = session.advance(Outcome(1, 0, 2, 0, 52, [followed.token], True))
        root = next(item for item in ran if item.token == 2)
        assert (moves.source, moves.destination) == ([root.slot], range(1, 2))
        items, _ = run(session)
        known = {(2, 52), (followed.position, followed.token)}
        assert known.isdisjoint((item.position, item.token) for item in items)
        moves = session.advance(Outcome(1, 1, 4, 1, 99, [], False))
        assert (moves.source, moves.destination) == ([winner.slot, followed.slot], range(2, 4))
        items, _ = run(session)
        assert [(item.token, item.position) for item in items] == [(99, 4)]

    def test_while_the_target_waits_only_its_chain_is_run(self) -> None:
        session = DraftSession(opened([1, 2]), Uniform())
        run(session)
        session.advance(Outcome(1, 0, 2, 0, 9, [], False, wanted=3))
        tokens = [[item.token for item in run(session, width=4)[0]] for _ in range(4)]
        assert tokens[:3] == [[9], [50], [50]]
        assert len(tokens[3]) == 4
        session.begin(Begin(1, 1, [50, 50, 50]))
        assert len(session.next_step(4)) > 1

    def test_a_chain_that_cannot_grow_is_not_run_for_ever(self) -> None:
        """The target waits for more than a branch of this draft may have: the draft goes on with its tree."""
        session = DraftSession(opened([1, 2]), Uniform(), lookahead=2)
        run(session)
        session.advance(Outcome(1, 0, 2, 0, 9, [], False, wanted=7))
        widths = [len(run(session, width=4)[0]) for _ in range(8)]
        assert max(widths) == 4

    def test_what_is_not_worth_its_price_is_not_run_unless_the_target_waits(self) -> None:
        session = DraftSession(opened([1, 2]), Uniform())
        run(session)
        session.advance(Outcome(1, 0, 2, 0, 9, [], False, price=inf))
        assert session.next_step(4) == []
        session.advance(Outcome(1, 1, 3, 0, 8, [], False, wanted=1, price=inf))
        assert [item.token for item in run(session)[0]] == [9, 8]  # its past, and what it goes on from
        session.advance(Outcome(1, 2, 4, 0, 7, [], False, price=1e-6))
        assert len(run(session)[0]) == 1
        assert len(run(session)[0]) == 4

    def test_what_was_not_run_is_run_when_it_is_worth_it(self) -> None:
        dear, cheap = (DraftSession(opened([1, 2], [3]), Uniform()) for _ in range(2))
        for session in (dear, cheap):
            run(session)
        assert dear.next_step(4, lambda tokens: 1e3 * tokens, 1.0) == []
        wanted = [(item.token, item.position) for item in run(cheap)[0]]
        assert [(item.token, item.position) for item in run(dear)[0]] == wanted

    def test_a_step_is_as_wide_as_its_tokens_pay(self) -> None:
        widths = []
        for per_token in (0.0, 0.02, 0.2):
            session = DraftSession(opened([1, 2], [3]), Histogram())
            run(session)
            items = session.next_step(8, lambda tokens, each=per_token: 0.01 + each * tokens, 1.0)  # type: ignore[misc]
            widths.append(len(items))
        assert widths[0] == 8
        assert widths == sorted(widths, reverse=True)
        assert widths[-1] < 8

    def test_tokens_that_the_target_would_not_verify_are_not_run(self) -> None:
        session = DraftSession(opened([1, 2]), Uniform())
        run(session)
        session.advance(Outcome(1, 0, 2, 0, 9, [], False, floor=1.0))
        run(session)
        assert session.next_step(4) == []

    def test_only_the_next_possible_outcome_is_expected(self) -> None:
        session = DraftSession(opened([1, 2], [3]), Uniform())
        assert session.expects(Outcome(1, 0, 3, 1, 9, [], False))
        for wrong in [
            Outcome(1, 1, 3, 1, 9, [], False),
            Outcome(1, 0, 4, 1, 9, [], False),
            Outcome(1, 0, 4, 2, 9, [], False),
        ]:
            assert not session.expects(wrong)

    def test_a_longer_speculation_becomes_the_trunk(self) -> None:
        session = DraftSession(opened([1, 2]), Uniform())
        run(session)
        session.begin(Begin(1, 5, [9]))
        session.begin(Begin(1, 0, [50, 51]))
        assert session.expects(Outcome(1, 0, 4, 2, 9, [], False))

    def test_shares_deal_out_every_guess_once(self) -> None:
        dealt: list[set[tuple[int, int]]] = []
        for share in range(3):
            session = DraftSession(opened([1, 2], [3], share=share, shares=3), Uniform())
            run(session)
            items, _ = run(session, width=8)
            dealt.append({(item.position, item.token) for item in items})
        union = set.union(*dealt)
        assert len(union) == sum(map(len, dealt)) == 24

    def test_the_tree_fills_its_window_and_then_rests(self) -> None:
        session = DraftSession(opened([1, 2]), Uniform())
        slots = []
        for _ in range(100):
            items, _ = run(session, width=16)
            slots += [item.slot for item in items if item.node]
        assert len(slots) == len(set(slots)) <= WINDOW - RESERVE
        assert session.next_step(16) == []

    def test_the_window_moves_out_of_the_trunks_way(self) -> None:
        session = DraftSession(opened([1]), Histogram())
        for round in range(200):
            run(session, width=4)
            items, _ = run(session, width=4)
            token = items[0].token
            moves = session.advance(Outcome(1, round, session.past.position + 1, 0, token, [], True))
            assert list(moves.destination) == [session.past.position - 1]
            items, _ = run(session, width=4)
            assert all(slot >= session.past.position for item in items for slot in item.path)

    def test_plain_speculative_decoding_drafts_one_chain(self) -> None:
        session = DraftSession(opened([1, 2]), Uniform(), lookahead=3, branching=False)
        tokens = [[item.token for item in run(session, width=1)[0]] for _ in range(6)]
        assert tokens == [[1, 2], [50], [50], [50], [50], []]

    @pytest.mark.parametrize("shares", [1, 3])
    def test_a_strict_budget_is_kept_over_all_drafts(self, shares: int) -> None:
        guesses = 0
        for share in range(shares):
            message = opened([1, 2], [3, 4], share=share, shares=shares)
            session = DraftSession(message, Uniform(), budget=10, strict=True)
            nodes = [run(session, width=16)[1] for _ in range(8)]
            guesses += sum(parent < 0 for each in nodes if each for parent in each.parents)
        extra = shares - 1  # each draft continues the trunk, whoever has that guess
        assert 10 <= guesses <= 10 + extra

    def test_what_the_text_says_is_the_first_guess(self) -> None:
        session = DraftSession(opened([7, 8, 9, 7, 8]), Uniform(), branching=False)
        _, nodes = run(session, ranked=[50, 51, 52])
        assert nodes is not None
        assert nodes.tokens[0] == 50
        session = DraftSession(opened([7, 8, 9, 7, 8], [50]), Uniform())
        run(session, ranked=[50, 51, 52])
        items, _ = run(session, width=2, ranked=[50, 51, 52])
        assert 9 in {item.token for item in items}

    def test_a_text_that_is_right_is_followed_without_running_it(self) -> None:
        loop = [7, 8, 9]
        session = DraftSession(opened(loop * 4 + [7, 8]), Uniform(), lookahead=4)
        for round in range(40):  # the model says 50, the text goes on in its loop
            run(session, ranked=[50, 51, 52])
            position = session.past.position
            session.advance(Outcome(1, round, position + 1, 0, loop[(position + 1) % 3], [], False))
        run(session, width=1, ranked=[50, 51, 52])  # the bonus token alone
        chain = session._tree.root.chain(5)
        start = (session.past.position + 1) % 3
        assert [node.token for node in chain] == [loop[(start + step) % 3] for step in range(5)]
        assert all(node.id >= 0 > node.slot for node in chain[1:])  # pushed, and not run

    def test_without_lookup_the_text_has_no_say(self) -> None:
        session = DraftSession(opened([7, 8, 9, 7, 8], [50]), Uniform(), text_lookup=False)
        run(session, ranked=[50, 51, 52])
        items, _ = run(session, width=3, ranked=[50, 51, 52])
        assert 9 not in {item.token for item in items}

    def test_reopening_keeps_the_kv_of_the_common_beginning(self) -> None:
        session = DraftSession(opened([1, 2, 3, 4]), Uniform())
        run(session)
        session.reopen(opened([1, 2, 9, 4, 5]))
        items, _ = run(session)
        assert [item.position for item in items] == [2, 3, 4]


@given(
    values=st.lists(st.floats(0.0, 1.0), max_size=12).map(lambda some: sorted(some, reverse=True)),
    others=st.integers(0, 3),
    fixed=st.floats(0.0, 1.0),
    each=st.floats(0.0, 0.5),
)
def test_a_step_has_the_best_width_of_all(values: list[float], others: int, fixed: float, each: float) -> None:
    def price(tokens: int) -> float:
        return fixed + each * tokens

    def left(width: int) -> float:
        return sum(values[:width]) - (price(others + width) if others + width else 0.0)

    assert left(best_width(values, others, price)) == pytest.approx(max(map(left, range(len(values) + 1))))
