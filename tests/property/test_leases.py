"""The page pool under any sequence of leases: no page has two owners, and what is found is what was meant."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ssd_ray.models.leases import Lease, PagePool

SLOTS, PAGES = 2, 8
TOKENS = st.lists(st.integers(0, 1), max_size=11)


class Leases(RuleBasedStateMachine):
    """Leases that come, grow, publish and go; beside them what is written on each page, in plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(range(PAGES), SLOTS, rows=3)
        self.running: list[tuple[Lease, list[int]]] = []
        self.written: dict[int, tuple[int, ...]] = {}  # page -> all tokens up to its end, as its KV depends on them

    @rule(tokens=TOKENS)
    def begin(self, tokens: list[int]) -> None:
        lease = self.pool.lease(tokens[:-1])
        for place in range(lease.shared):
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
    def end(self, which: int, keep: bool) -> None:
        if self.running:
            lease, tokens = self.running.pop(which % len(self.running))
            lease.release(tokens if keep else ())

    def write(self, lease: Lease, tokens: list[int], first: int) -> None:
        """Write the full pages from place ``first`` on: nobody else may read them."""
        for place in range(first, len(tokens) // SLOTS):
            readers = [other for other, _ in self.running if lease.pages[place] in other.pages]
            assert readers == [lease]
            self.written[lease.pages[place]] = tuple(tokens[: (place + 1) * SLOTS])

    @invariant()
    def holds(self) -> None:
        self.pool.validate()
        for lease, tokens in self.running:
            assert lease.slots >= len(tokens)
            assert len(set(lease.pages)) == len(lease.pages)


Leases.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLeases = Leases.TestCase


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
