"""The page pool under any sequence of leases: no page has two owners, and what is found is what was meant."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ssd_ray.models.leases import GONE, KVMemory, Lease, PagePool
from ssd_ray.models.reach import EVERYTHING, Reach
from ssd_ray.models.runner import HFRunner
from ssd_ray.models.table import TableModel
from tests.support.tiny import tiny_model

SLOTS, PAGES = 2, 8
TOKENS = st.lists(st.integers(0, 1), max_size=11)


class Leases(RuleBasedStateMachine):
    """Leases that come, grow, publish, give back what lies behind a window, and go; beside them what is written on each
    page, in plain lists."""

    reach = EVERYTHING

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(range(PAGES), SLOTS, rows=3, reach=self.reach, ahead=22)
        self.running: list[tuple[Lease, list[int]]] = []
        self.written: dict[int, tuple[int, ...]] = {}  # page -> all tokens up to its end, as its KV depends on them

    @rule(tokens=TOKENS, longest=st.integers(0, 20))
    def begin(self, tokens: list[int], longest: int) -> None:
        lease = self.pool.lease(tokens[:-1], longest)
        assert lease.first <= self.reach.start(lease.shared * SLOTS) // SLOTS
        for place in range(lease.first, lease.shared):
            assert self.written[lease.pages[place]] == tuple(tokens[: (place + 1) * SLOTS])
        if not lease.grow(len(tokens)):
            lease.release()
            return
        self.running.append((lease, tokens))
        self.write(lease, tokens, lease.shared)

    @rule(which=st.integers(0, 9), more=TOKENS, publish=st.booleans())
    def go_on(self, which: int, more: list[int], publish: bool) -> None:
        if not self.running:
            return
        lease, tokens = self.running[which % len(self.running)]
        before, pages = len(tokens) // SLOTS, list(lease.pages)
        if lease.grow(len(tokens) + len(more)):
            tokens += more
            self.write(lease, tokens, before)
        else:
            assert lease.pages == pages
        if publish:
            lease.publish(tokens)

    @rule(which=st.integers(0, 9), keep=st.booleans())
    def give_back(self, which: int, keep: bool) -> None:
        if self.running:
            lease, tokens = self.running[which % len(self.running)]
            lease.give_back(len(tokens), lambda: tokens if keep else ())
            assert lease.first <= self.reach.start(len(tokens)) // SLOTS
            assert keep or lease.cached or lease.first >= self.reach.start(len(tokens)) // SLOTS - 1

    @rule(which=st.integers(0, 9), keep=st.booleans())
    def end(self, which: int, keep: bool) -> None:
        if self.running:
            lease, tokens = self.running.pop(which % len(self.running))
            lease.release(tokens if keep else ())

    def write(self, lease: Lease, tokens: list[int], first: int) -> None:
        """Write the full pages from place ``first`` on: nobody else may read them."""
        for place in range(max(first, lease.first), len(tokens) // SLOTS):
            readers = [other for other, _ in self.running if lease.pages[place] in other.pages]
            assert readers == [lease]
            self.written[lease.pages[place]] = tuple(tokens[: (place + 1) * SLOTS])

    @invariant()
    def holds(self) -> None:
        self.pool.validate()
        for lease, tokens in self.running:
            assert lease.slots >= len(tokens)
            assert lease.pages[: lease.first] == [GONE] * lease.first
            assert len(set(lease.pages[lease.first :])) == len(lease.pages) - lease.first


class WindowedLeases(Leases):
    reach = Reach(3)


class ChunkedLeases(Leases):
    reach = Reach(4, chunked=True)


for machine, examples in ((Leases, 40), (WindowedLeases, 30), (ChunkedLeases, 20)):
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=40, deadline=None)
TestLeases, TestWindowedLeases, TestChunkedLeases = (each.TestCase for each in (Leases, WindowedLeases, ChunkedLeases))


def test_behind_a_window_a_lease_holds_what_it_needs_and_no_more() -> None:
    pool = PagePool(range(40), SLOTS, reach=Reach(6), ahead=4)
    lease, tokens = pool.lease(), [*range(60)]
    for position in range(60):
        lease.give_back(position, lambda: tokens[:position])  # noqa: B023
        assert lease.grow(position + 4)
        assert len(lease.pages) - lease.first <= pool.most(60) == 7
    lease.release(tokens)
    pool.validate()
    assert pool.usable(pool.find(tokens)) == set(range(1, 31))  # all that was given back is there


def test_a_beginning_is_found_where_all_is_there_that_what_follows_sees() -> None:
    """Of a text whose first pages are gone as well as of a short one."""
    pool = PagePool(range(8), SLOTS, reach=Reach(4), ahead=4)
    lease, tokens = pool.lease(), [*range(20)]
    for position in range(0, 20, 2):
        lease.give_back(position, lambda: tokens[:position])  # noqa: B023
        assert lease.grow(position + 2)
    lease.release(tokens)
    assert pool.usable(pool.find(tokens)) == {4, 5, 6, 7, 8, 9, 10}  # two pages of ten are gone
    again = pool.lease(tokens)
    assert (again.shared, again.first) == (10, 8)
    other = pool.lease([*tokens[:14], 99, 99])
    assert (other.shared, other.first) == (7, 5)
    assert other.pages[:5] == [GONE] * 5
    pool.validate()


def test_a_row_begins_with_what_all_pools_have() -> None:
    runner = TableModel(rows=2, max_length=64, scratch=0, page_slots=SLOTS, pages=40, reaches=[Reach(4), EVERYTHING])
    memory, tokens = KVMemory(runner, 2, ahead=6), [*range(20)]
    lease = memory.lease(0, tokens)
    for position in range(0, 20, 2):
        assert lease.cover(position, position + 2, lambda: tokens[:position])  # noqa: B023
    assert [len(each.pages) - each.first for each in lease.leases] == [3, 10]
    lease.release(tokens)
    windowed, _ = memory.pools
    taken = windowed.lease()
    assert taken.grow(2 * 6)  # as much as a windowed lease may have
    assert memory.cached(tokens) == 10
    assert memory.cached(tokens[:11]) == 5
    taken.release()
    memory.validate()


def test_pages_follow_one_another_where_they_can() -> None:
    """What is read as one piece need not be gathered."""
    pool = PagePool(range(32), SLOTS)
    leases = [pool.lease() for _ in range(4)]
    for slots in range(1, 4 * SLOTS):
        for lease in leases:
            assert lease.grow(slots)
    for lease in leases:
        assert lease.pages == list(range(lease.pages[0], lease.pages[0] + 4))


def test_the_longest_unused_goes_first() -> None:
    pool = PagePool(range(4), SLOTS)
    for tokens in ([1, 1, 1, 1], [2, 2]):
        lease = pool.lease(tokens)
        lease.grow(len(tokens))
        lease.release(tokens)
    pool.lease([1, 1, 1, 1]).release()  # used again
    assert pool.available == 4
    lease = pool.lease()
    assert lease.grow(4)
    assert [pool.cached(tokens) for tokens in ([1, 1, 1, 1], [2, 2])] == [2, 0]
    assert lease.grow(8)
    assert pool.cached([1, 1]) == 0
    assert not pool.lease().grow(1)


def test_equal_beginnings_share_while_both_run() -> None:
    pool = PagePool(range(6), SLOTS)
    first = pool.lease([7, 7, 7, 7])
    first.grow(5)
    first.publish([7, 7, 7, 7])
    second = pool.lease([7, 7, 7, 7, 8])
    assert second.shared == 2
    assert second.pages == first.pages[:2]
    first.release()
    assert pool.available == 4
    pool.validate()


def test_leases_that_begin_together_lie_at_equal_distances() -> None:
    pool = PagePool(range(33), SLOTS, rows=4)
    leases = [pool.lease() for _ in range(5)]
    for lease in leases:
        assert lease.grow(3 * SLOTS)
    assert [lease.pages[0] for lease in leases[:4]] == [0, 8, 16, 24]  # and the fifth what follows one of them
    leases[1].release()
    again = pool.lease()
    assert again.grow(8 * SLOTS)
    assert again.pages == list(range(8, 16))
    pool.validate()


def full(sequences: int) -> PagePool:
    """A pool full of cached sequences of four pages each, the first one's unused longest."""
    pool = PagePool(range(4 * sequences), SLOTS)
    for number in range(sequences):
        lease = pool.lease()
        assert lease.grow(8)
        lease.release([number] * 8)
    return pool


def in_line(pages: list[int]) -> bool:
    return pages == list(range(pages[0], pages[0] + len(pages)))


def test_where_the_cache_is_full_a_sequence_takes_the_place_of_what_was_not_used_lately() -> None:
    pool = full(4)
    assert pool.cached([1] * 8) == 4
    pool.lease([1] * 8).release([1] * 8)
    lease = pool.lease((), longest=12)
    for slots in range(1, 13):
        assert lease.grow(slots)
    assert in_line(lease.pages)
    assert pool.cached([1] * 8) == 4
    assert sum(pool.cached([number] * 8) for number in range(4)) >= 8
    pool.validate()


def test_what_one_may_come_to_is_not_where_another_begins() -> None:
    pool = full(4)
    leases = [pool.lease((), longest=8) for _ in range(4)]
    for slots in (2, 4, 6, 8):
        assert all(lease.grow(slots) for lease in leases)
    assert all(in_line(lease.pages) for lease in leases)
    assert not pool.available
    leases[0].release()
    late = pool.lease((), longest=10**6)  # more than there is
    assert late.grow(8)
    assert in_line(late.pages)
    pool.validate()


def test_a_page_that_is_left_is_taken_wherever_it_lies() -> None:
    pool = full(2)
    lease, other = pool.lease((), longest=14), pool.lease((), longest=14)
    assert lease.grow(14)
    assert other.grow(2)
    assert not other.grow(3)
    other.release()
    assert lease.grow(16)
    pool.validate()


def test_behind_a_window_a_page_is_forgotten_alone() -> None:
    pool = PagePool(range(8), SLOTS, reach=Reach(3), ahead=2)
    lease, tokens = pool.lease(), [*range(16)]
    for position in range(0, 16, 2):
        lease.give_back(position, lambda: tokens[:position])  # noqa: B023
        assert lease.grow(position + 2)
    lease.release(tokens)
    assert pool.lease((), longest=6).grow(6)
    pool.validate()
    assert pool.find(tokens)


def test_what_a_rows_last_sequence_had_is_not_read_behind_the_next_one() -> None:
    """More is read than a sequence has, so that its pages would not follow one another."""
    runner = HFRunner(tiny_model("llama"), rows=1, max_length=96, scratch=32, page_slots=16, pages=20)
    memory = KVMemory(runner, 1, ahead=16)
    first = memory.lease(0, (), 96)
    assert first.cover(0, 96)
    first.release([*range(96)])
    second = memory.lease(0, (), 32)
    assert second.cover(0, 32)
    assert runner._kv.table.run(0, 96) is not None
    with pytest.raises(ValueError, match="not bound"):
        runner.append([0], [[1]], [32])
