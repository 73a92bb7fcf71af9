"""What a draft does with the price of its work, with the floor below which nothing is verified, and what it says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_ray.config import SamplingParams
from ssd_ray.saguaro.calibration import UNSAID
from ssd_ray.saguaro.fanout import POLICIES, Confidence
from ssd_ray.saguaro.width import best_width
from ssd_ray.sampling.laws import Law
from ssd_ray.speculation.draft import DraftSession
from ssd_ray.speculation.nodes import DraftNode, Item, Ranking
from ssd_ray.speculation.window import WINDOW
from ssd_ray.wire import Begin, Nodes, Open, Outcome

GREEDY = SamplingParams(temperature=0.0)
LOOKAHEAD = 7


def session(tokens: Sequence[int] = (1, 2), policy: str = "histogram", **options: bool) -> DraftSession:
    opened = Open(1, 0, list(tokens), [], GREEDY)
    return DraftSession(opened, POLICIES[policy](), lookahead=LOOKAHEAD, **options)  # type: ignore[arg-type]


def run(draft: DraftSession, width: int = 4, *, step_ms: float = 1.0) -> tuple[list[Item], Nodes | None]:
    """One step with a model that ranks the same tokens everywhere."""
    items = draft.next_step(width, lambda tokens: step_ms)
    ranking = Ranking(list(range(50, 80)), [-0.5 * rank for rank in range(30)], 50)
    return items, draft.complete(items, [ranking] * len(items)) if items else None


def goes_on(draft: DraftSession, *, price: float = 0.0, floor: float = 0.0, wanted: int = 0) -> None:
    """A round in which nothing was verified and the bonus token was one that nobody had guessed."""
    outcome = Outcome(1, draft.round, draft.past.position + 1, 0, 90, [], True, wanted=wanted, price=price, floor=floor)
    assert draft.expects(outcome)
    draft.advance(outcome)


def ran(draft: DraftSession) -> list[DraftNode]:
    """Nodes beyond the trunk that ran."""
    return [node for node in draft._tree.root.subtree() if node.slot >= 0 and node.depth > 0]


class TestThePrice:
    def test_where_no_drafting_is_worth_it_a_draft_rests(self) -> None:
        draft = session()
        assert run(draft)[0]
        goes_on(draft, price=inf)
        assert run(draft)[0] == []
        goes_on(draft, price=0.0)
        assert run(draft)[0]

    def test_it_works_all_the_same_when_it_is_waited_for_and_no_longer(self) -> None:
        draft = session()
        goes_on(draft, price=inf, wanted=3)
        steps = [items for items, _ in iter(lambda: run(draft), ([], None))]
        assert [len(items) for items in steps[1:]] == [1, 1]  # after the trunk the chain, one after the other
        assert [item.token for items in steps[1:] for item in items] == [50, 50]
        assert not draft.urgent

    def test_once_the_target_waits_no_longer_it_rests(self) -> None:
        draft = session()
        goes_on(draft, price=inf, wanted=3)
        run(draft)
        draft.begin(Begin(1, draft.round, [50]))
        assert run(draft)[0] == []

    def test_it_rests_once_the_best_that_is_left_is_worth_less(self) -> None:
        """The dearer the work, the less of it is done; what is worth most is done first."""
        steps = []
        for price in (0.0, 0.02, 0.1, 0.3, 10.0):
            draft = session()
            goes_on(draft, price=price)
            steps.append(sum(1 for _ in range(100) if run(draft)[0]))
        assert steps == sorted(steps, reverse=True)
        assert steps[0] > steps[2] > steps[-1] == 0

    def test_a_slower_step_costs_more(self) -> None:
        draft = session()
        goes_on(draft, price=0.1)
        assert run(draft, step_ms=100.0)[0] == []
        assert run(draft, step_ms=1.0)[0]

    def test_who_rested_goes_on_as_if_nobody_had_asked(self) -> None:
        asked, spared = session(range(1, 8)), session(range(1, 8))
        for _ in range(5):
            assert asked.next_step(4, lambda tokens: inf, rate=1.0) == []
        for draft in (asked, spared):
            goes_on(draft)
        for _ in range(6):
            one, other = run(asked), run(spared)
            assert [(item.token, item.position) for item in one[0]] == [
                (item.token, item.position) for item in other[0]
            ]
            assert (one[1] is None) == (other[1] is None)


class TestTheFloor:
    @pytest.mark.parametrize("floor", [0.2, 0.4, 0.6])
    def test_no_branch_is_deepened_below_it(self, floor: float) -> None:
        """What would follow would not be verified."""
        deep, shallow = session(), session()
        for draft, each in ((deep, 0.0), (shallow, floor)):
            goes_on(draft, floor=each)
            for _ in range(60):
                run(draft)
        assert all(node.reach * shallow._policy.typical >= floor for node in ran(shallow))
        assert max(node.depth for node in ran(shallow)) < max(node.depth for node in ran(deep))
        assert len(ran(shallow)) > 0

    def test_above_every_estimate_nothing_is_drafted_but_the_trunk(self) -> None:
        draft = session()
        goes_on(draft, floor=1.0)
        for _ in range(20):
            run(draft)
        assert ran(draft) == []

    def test_what_is_waited_for_is_drafted_below_it(self) -> None:
        draft = session()
        goes_on(draft, floor=1.0, wanted=4)
        assert sum(len(items) for items, _ in iter(lambda: run(draft), ([], None))) >= 4


class TestWhatItSays:
    @pytest.mark.parametrize("policy", sorted(POLICIES))
    @pytest.mark.parametrize("text", [False, True])
    def test_every_node_has_a_byte_and_guesses_say_nothing(self, policy: str, text: bool) -> None:
        draft = session([50, 50, 51, 50, 52, 50, 51], policy, text_lookup=text)
        said = 0
        for number in range(40):
            if number % 8 == 7:
                goes_on(draft)
            _, nodes = run(draft)
            if nodes is None:
                continue
            assert isinstance(nodes.chances, bytes)
            assert len(nodes.chances) == len(nodes.tokens) == len(nodes.parents)
            for parent, token, chance in zip(nodes.parents, nodes.tokens, nodes.chances, strict=True):
                if parent < 0 and token != 50 and not text:
                    assert chance == UNSAID
                said += chance != UNSAID
        assert said > 10

    def test_the_surer_the_higher(self) -> None:
        """Once it has seen that it is right where it is sure."""
        policy, bytes_ = Confidence(), []
        for gap in (0.01, 1.0, 8.0):
            draft = DraftSession(Open(1, 0, [1, 2], [], GREEDY), policy, lookahead=LOOKAHEAD)
            items = draft.next_step(4)
            nodes = draft.complete(items, [Ranking([50, 51, 52], [0.0, -gap, -gap - 1.0], 50)] * len(items))
            assert nodes is not None
            bytes_.append(nodes.chances[0])
        assert bytes_ == sorted(set(bytes_))


TOKENS = st.integers(0, 5)


@given(
    st.lists(TOKENS, min_size=2, max_size=4).map(lambda some: 3 * some),  # the text says how it goes on
    st.permutations(range(6)),
    st.lists(st.floats(0.01, 3.0), min_size=6, max_size=6),
    st.lists(TOKENS, min_size=6, max_size=6),
    TOKENS,
)
def test_what_it_says_does_not_depend_on_what_was_drawn(
    text: list[int], ranked: list[int], gaps: list[float], some: list[int], other: int
) -> None:
    """In rejection mode, whether a token is verified may depend on the law that it was drawn from and on nothing else:
    neither on which it is, nor on whether the text says so, too."""
    scores = (-np.cumsum(gaps)).tolist()
    weights = np.exp(scores, dtype=np.float32)
    law = Law(np.array(ranked, np.int32), weights / weights.sum())

    def say(drawn: int) -> int:
        draft = DraftSession(Open(1, 0, text, [], SamplingParams()), Confidence(), lookahead=LOOKAHEAD)
        items = draft.next_step(1)
        nodes = draft.complete(items, [Ranking(ranked, scores, drawn, law)] * len(items))
        assert nodes is not None
        (place,) = nodes.sampled
        assert nodes.tokens[place] == drawn
        return nodes.chances[place]

    assert {say(drawn) for drawn in (*some, other)} == {say(ranked[0])}


@given(
    st.lists(st.floats(0.0, 2.0), max_size=12),
    st.integers(0, 3),
    st.lists(st.floats(0.0, 3.0), min_size=16, max_size=16),
)
def test_a_step_is_as_wide_as_leaves_most(values: list[float], others: int, increments: list[float]) -> None:
    values.sort(reverse=True)
    prices = [0.0, *np.cumsum(increments)]  # of a step of so many tokens

    def left(width: int) -> float:
        return sum(values[:width]) - (prices[others + width] if others + width else 0.0)

    width = best_width(values, others, prices.__getitem__)
    assert left(width) == pytest.approx(max(map(left, range(len(values) + 1))))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.05, 0.3, inf]), st.floats(0.0, 1.0), st.integers(0, LOOKAHEAD), st.integers(0, 4)
        ),
        max_size=12,
    ),
    st.integers(0, 2**32),
)
def test_no_slot_is_lost_or_taken_twice_whatever_the_prices(
    rounds: list[tuple[float, float, int, int]], seed: int
) -> None:
    dice = random.Random(seed)
    draft = session(policy="auto")
    for price, floor, wanted, steps in rounds:
        goes_on(draft, price=price, floor=floor, wanted=wanted)
        for _ in range(steps):
            run(draft, dice.randrange(1, 6), step_ms=dice.choice([0.1, 1.0, 10.0]))
            used = [node.slot for node in draft._tree.root.subtree() if node.slot >= 0]
            window, free = draft._window, draft._window._free
            inside = [slot for slot in used if window.base <= slot < window.end]
            assert len(set(used)) == len(used)
            assert not set(inside) & set(free)
            assert len(inside) + len(free) == WINDOW
            assert len(set(free)) == len(free)
            assert 0 <= draft.past.filled <= draft.past.position
