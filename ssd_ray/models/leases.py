"""Who has which pages of the KV memory: leases of running sequences, and a prefix cache of what they gave back.

Pages that follow one another are read as they lie, others are copied first. So a sequence begins where there is room
for what it may come to: among free pages, or in place of cached ones, those that are unused longest.

The cache is a tree of full pages: a page is found by the tokens in it below the page of the tokens before it. Tokens
are compared, not hashes, so what is found is what was meant. A page in the tree is never written again; any number of
leases may share it. Pages that nobody uses stay until their room is wanted, the longest unused first.

Layers with a window see only the last pages of a sequence, so a lease of theirs gives back those before, and a
beginning is found wherever the pages are there that what follows it sees: those before may be gone, and leave a hole
in the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ssd_ray.models.contract import UNBOUND, ModelRunner
from ssd_ray.models.reach import EVERYTHING, Reach

BEFORE = -2
"""In place of the last page of a sequence that has none."""

GONE = UNBOUND
"""In place of a page whose room was wanted, or that a lease gave back."""


FORESEEN = 512
"""Slots beyond those that a sequence begins with for which room is looked for: many end before they have all the tokens
that were asked for, and room is made by forgetting what others may come back to."""


class CachedPage:
    """A page of the prefix cache.

    Attributes:
        number: which page of the runner; :data:`GONE` if only pages behind it are left.
        users: leases that hold it.
    """

    __slots__ = ("children", "key", "number", "parent", "users")

    def __init__(self, number: int, parent: CachedPage | None, key: tuple[int, ...]) -> None:
        self.number = number
        self.parent = parent
        self.key = key
        self.users = 0
        self.children: dict[tuple[int, ...], CachedPage] = {}


class PagePool:
    """The pages of one pool of a runner.

    Args:
        pages: their numbers, one after the other.
        slots: slots of a page.
        rows: leases that run at the same time, mostly. So many lanes divide the pool, and where there is room each
            begins a lane: rows that lie at equal distances are read as one.
        reach: how far back tokens see.
        ahead: slots beyond the first one whose token is still to be run that a lease needs at most; it takes no pages
            for more where there is a window.
    """

    def __init__(self, pages: range, slots: int, rows: int = 1, *, reach: Reach = EVERYTHING, ahead: int = 0) -> None:
        self.slots = slots
        self.size = len(pages)
        self.reach, self._ahead = reach, ahead
        self._lane = max(1, self.size // rows)
        self._lanes = pages[: rows * self._lane : self._lane]
        self._free, self._start = set(pages), pages.start
        self._root = CachedPage(-1, None, ())
        self._idle: dict[CachedPage, None] = {}  # nobody's, the longest unused first
        self._leases: set[Lease] = set()
        self._owners: dict[int, CachedPage] = {}  # of the pages in the cache
        self._promised: dict[Lease, range] = {}  # where each that runs may come to

    @property
    def available(self) -> int:
        """Pages that can be had: free ones, and cached ones that nobody uses."""
        return len(self._free) + len(self._idle)

    def pages_for(self, slots: int) -> int:
        """How many pages so many slots are."""
        return -(-slots // self.slots)

    def most(self, slots: int) -> int:
        """How many pages a lease of so many slots has at once at most."""
        return self.reach.pages(slots, self._ahead, self.slots)

    def first_seen(self, position: int) -> int:
        """The place of the first page that is needed once all before a position is written: also to begin again from
        the page that the position is in, as somebody else may."""
        return self.reach.start(position - position % self.slots) // self.slots

    def lease(self, tokens: Sequence[int] = (), longest: int = 0) -> Lease:
        """Begin a lease with the cached pages of the longest beginning of these tokens, of a sequence that may come to
        so many slots."""
        found = self.find(tokens)
        return self.begin(found[: max(self.usable(found), default=0)], longest)

    def begin(self, pages: Sequence[CachedPage], longest: int = 0) -> Lease:
        """Begin a lease with pages that were found, of a sequence that may come to so many slots."""
        lease = Lease(self, pages, longest)
        self._leases.add(lease)
        return lease

    def cached(self, tokens: Sequence[int]) -> int:
        """How many pages :meth:`lease` would begin with."""
        return max(self.usable(self.find(tokens)), default=0)

    def find(self, tokens: Sequence[int]) -> list[CachedPage]:
        """The pages of the beginning of these tokens that were cached once, some of which may be gone."""
        found: list[CachedPage] = []
        node = self._root
        for start in range(0, len(tokens) - self.slots + 1, self.slots):
            child = node.children.get(tuple(tokens[start : start + self.slots]))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def usable(self, found: Sequence[CachedPage]) -> set[int]:
        """After how many of these pages all are there that what follows sees."""
        usable, there = set(), 0  # pages in a row
        for place, page in enumerate(found, 1):
            there = there + 1 if page.number != GONE else 0
            if there and place - there <= self.first_seen(place * self.slots):
                usable.add(place)
        return usable

    def _take(self, count: int, lease: Lease, foreseen: int) -> list[int] | None:
        """Take pages out of the pool for a lease, those that follow its last one if they are free; None if they are not
        so many. ``foreseen``, at least as many, may be taken in the end."""
        if count > self.available:
            return None
        taken: list[int] = []
        after = lease.pages[-1] if lease.pages else BEFORE
        for left in range(count, 0, -1):
            number = after + 1
            if number not in self._free:
                first = after == BEFORE
                number = self._begin(first, left, foreseen if first else left)
                if first:
                    self._promised[lease] = range(number, number + foreseen)
            self._free.remove(number)
            taken.append(number)
            after = number
        return taken

    def _begin(self, first: bool, count: int, foreseen: int) -> int:
        """A free page to go on from: for the first one of a sequence the first lane's that is free as a whole."""
        for start in self._lanes if first else ():
            if self._free.issuperset(range(start, start + max(count, self._lane))):
                return start
        for wanted in dict.fromkeys((foreseen, count)):
            start, size = _longest_run(self._free.difference(*self._promised.values()))
            if size >= wanted:  # its middle, so that whoever comes before can go on, too, if there is room for both
                return start + min(size // 2, size - wanted)
            if (place := self._longest_unused(wanted)) is not None:
                return place
        if not self._free:
            self._evict(next(iter(self._idle)))
        return _longest_run(self._free)[0]

    def _longest_unused(self, count: int) -> int | None:
        """Free so many pages in a row, of which the cache has some: those that are unused longest. The first of them;
        None if of any so many one is somebody's, or is to be."""
        if count > self.size:
            return None
        ages = np.full(self.size, np.inf)
        ages[[number - self._start for number in self._free.difference(*self._promised.values())]] = -1.0
        ages[[page.number - self._start for page in self._idle]] = np.arange(len(self._idle))
        newest = np.lib.stride_tricks.sliding_window_view(ages, count).max(1)
        place = int(newest.argmin())
        if newest[place] == np.inf:
            return None
        place += self._start
        for number in range(place, place + count):
            if number not in self._free:
                self._forget(self._owners[number])
        return place

    def _forget(self, page: CachedPage) -> None:
        """Evict a page and, where there is no window, those behind it, which nobody finds without it."""
        pages = [page]
        for each in pages if not self.reach.size else ():
            pages.extend(each.children.values())
        for each in reversed(pages):
            self._evict(each)

    def _evict(self, page: CachedPage) -> None:
        del self._idle[page]
        del self._owners[page.number]
        self._free.add(page.number)
        page.number = GONE
        while page.parent is not None and page.number == GONE and not page.children and not page.users:
            del page.parent.children[page.key]
            page = page.parent

    def validate(self) -> None:
        """Check all invariants.

        Raises:
            AssertionError: one does not hold.
        """
        nodes = self._tree()
        cached = [page for page in nodes if page.number != GONE]
        held = [page for lease in self._leases for page in lease.held]
        own = [number for lease in self._leases for number in lease.own]
        numbers = [*self._free, *own, *(page.number for page in cached)]
        if len(numbers) != self.size or len(set(numbers)) != self.size:
            raise AssertionError("a page is lost, or has two owners")
        if any(page.users != held.count(page) for page in nodes):
            raise AssertionError("a cached page miscounts its users")
        if self._owners != {page.number: page for page in cached}:
            raise AssertionError("a cached page is not known by its number")
        if set(self._idle) != {page for page in cached if not page.users}:
            raise AssertionError("the idle pages are not those that nobody uses")
        if any(page.number == GONE and not page.children and not page.users for page in nodes):
            raise AssertionError("a hole has nothing behind it")
        if not self.reach.size and (len(cached) < len(nodes) or any(page.children for page in list(self._idle)[:1])):
            raise AssertionError("a page would be evicted before those behind it")

    def _tree(self) -> list[CachedPage]:
        pages, stack = [], list(self._root.children.values())
        while stack:
            page = stack.pop()
            pages.append(page)
            stack.extend(page.children.values())
        return pages


def _longest_run(numbers: Iterable[int]) -> tuple[int, int]:
    """Where the longest run of numbers begins, and its length."""
    longest, size, start, before = -1, 0, -1, -2
    for number in sorted(numbers):
        start = number if number - 1 != before else start
        before = number
        if number - start + 1 > size:
            longest, size = start, number - start + 1
    return longest, size


class Lease:
    """The pages of one sequence in one pool; made by :meth:`PagePool.lease`.

    Attributes:
        pages: numbers of the pages that hold slots 0, 1, .. of the sequence; :data:`GONE` for those before ``first``.
        first: how many of the first ones it gave back, or never had.
        shared: how many of the first ones came from the cache, filled.
        cached: pages of the cache of places 0, 1, ..: it reads them, or has a copy. It holds those from ``first`` on.
    """

    def __init__(self, pool: PagePool, shared: Sequence[CachedPage], longest: int = 0) -> None:
        self._pool, self._longest = pool, longest
        self.first = pool.first_seen(len(shared) * pool.slots) if shared else 0
        self.first = min(self.first, max(0, len(shared) - 1))
        self.pages = [GONE] * self.first + [page.number for page in shared[self.first :]]
        self.shared = len(shared)
        self.cached = list(shared)
        for page in self.held:
            self._hold(page)

    @property
    def held(self) -> list[CachedPage]:
        """Pages of the cache that are kept for it."""
        return self.cached[self.first :]

    @property
    def own(self) -> list[int]:
        """Its pages that are nobody else's."""
        return self._own(range(self.first, len(self.pages)))

    def _own(self, places: range) -> list[int]:
        read = {page.number for page in self.cached[places.start : places.stop]}
        return [number for number in self.pages[places.start : places.stop] if number not in read]

    @property
    def slots(self) -> int:
        """Slots of the sequence up to the end of its pages."""
        return len(self.pages) * self._pool.slots

    def lacks(self, slots: int) -> int:
        """How many pages :meth:`grow` would take."""
        most = self.first + self._pool.most(slots)
        return max(0, min(self._pool.pages_for(slots), most) - len(self.pages))

    def grow(self, slots: int) -> bool:
        """Have room for so many slots, or, where there is a window, for as many as are needed now; False, and nothing
        has changed, if there are no pages for it."""
        missing = self.lacks(slots)
        if missing > 0:
            foreseen = max(missing, self.lacks(min(self._longest, slots + FORESEEN)))
            taken = self._pool._take(missing, self, foreseen)
            if taken is None:
                return False
            self.pages += taken
        return True

    def give_back(self, position: int, known: Callable[[], Sequence[int]] = tuple) -> None:
        """Give back the pages that no token from a position on sees, the full ones of known tokens, whose KV is in
        slots 0, 1, .., to the cache."""
        if self._pool.first_seen(position) <= self.first:
            return
        self.publish(known())
        # The last page that is in the cache stays: those that follow go there behind it.
        first = min(self._pool.first_seen(position), len(self.cached) - 1 if self.cached else len(self.pages))
        if first > self.first:
            self._let_go(range(self.first, first))

    def publish(self, tokens: Sequence[int]) -> None:
        """Let others find the full pages of these tokens, whose KV is in slots 0, 1, ..

        What is cached already stays as it is, and this lease keeps its own copy. What follows a page that it gave back
        without letting others find it cannot be found either.
        """
        size = self._pool.slots
        if self.first > len(self.cached):
            return
        for place in range(len(self.cached), min(len(tokens) // size, len(self.pages))):
            key = tuple(tokens[place * size : (place + 1) * size])
            end = self.cached[-1] if self.cached else self._pool._root
            page = end.children.get(key)
            if page is None:
                page = end.children[key] = CachedPage(GONE, end, key)
            if page.number == GONE:
                page.number = self.pages[place]
                self._pool._owners[page.number] = page
            self.cached.append(page)
            self._hold(page)

    def release(self, tokens: Sequence[int] = ()) -> None:
        """Give all pages back, those of these tokens to the cache. The lease ends."""
        self.publish(tokens)
        self._let_go(range(self.first, len(self.pages)))
        self._pool._leases.discard(self)
        self._pool._promised.pop(self, None)
        self.pages, self.cached, self.first = [], [], 0

    def _let_go(self, places: range) -> None:
        """Give pages of these places back, the first that it has."""
        pool = self._pool
        pool._free.update(self._own(places))
        for page in reversed(self.cached[places.start : places.stop]):  # the deepest are evicted first
            page.users -= 1
            if not page.users:
                pool._idle[page] = None
        self.pages[places.start : places.stop] = [GONE] * len(places)
        self.first = places.stop

    def _hold(self, page: CachedPage) -> None:
        page.users += 1
        self._pool._idle.pop(page, None)


class KVMemory:
    """All pools of a runner.

    Args:
        runner: whose pages are dealt out.
        rows: see :class:`PagePool`.
        ahead: there, too.
    """

    def __init__(self, runner: ModelRunner, rows: int, ahead: int) -> None:
        self._runner = runner
        self.slots = runner.page_slots
        self.pools = [
            PagePool(range(pool.pages), runner.page_slots, rows, reach=pool.reach, ahead=ahead) for pool in runner.pools
        ]

    @property
    def size(self) -> int:
        """Pages of all pools."""
        return sum(pool.size for pool in self.pools)

    @property
    def available(self) -> int:
        """Pages that can be had."""
        return sum(pool.available for pool in self.pools)

    def lease(self, row: int, tokens: Sequence[int] = (), longest: int = 0) -> RowLease:
        """Begin a lease for a row with what is cached, in each pool, of the longest beginning of these tokens; of a
        sequence that may come to so many slots."""
        found = self._find(tokens)
        pages = self._usable(found)
        leases = [pool.begin(each[:pages], longest) for pool, each in zip(self.pools, found, strict=True)]
        return RowLease(self._runner, row, self.pools, leases)

    def cached(self, tokens: Sequence[int]) -> int:
        """How many pages of its sequence :meth:`lease` would begin with."""
        return self._usable(self._find(tokens))

    def _find(self, tokens: Sequence[int]) -> list[list[CachedPage]]:
        return [pool.find(tokens) for pool in self.pools]

    def _usable(self, found: Sequence[Sequence[CachedPage]]) -> int:
        """How many of the pages that each pool has found all of them can begin with."""
        usable = [pool.usable(each) for pool, each in zip(self.pools, found, strict=True)]
        return max(set[int].intersection(*usable), default=0)

    def validate(self) -> None:
        """See :meth:`PagePool.validate`."""
        for pool in self.pools:
            pool.validate()


class RowLease:
    """The pages of one sequence in all pools, which a row of the runner stands on; made by :meth:`KVMemory.lease`.

    Attributes:
        leases: one for each pool.
        shared: how many of the sequence's first pages came from the cache, filled.
    """

    def __init__(self, runner: ModelRunner, row: int, pools: Sequence[PagePool], leases: Sequence[Lease]) -> None:
        self._runner, self._row, self._pools = runner, row, pools
        self.leases = leases
        self.shared = leases[0].shared
        for pool, lease in enumerate(leases):
            runner.bind(row, 0, lease.pages, pool)

    @property
    def published(self) -> int:
        """How many of the sequence's first pages others may read."""
        return max(len(lease.cached) for lease in self.leases)

    def fits(self, slots: int, spare: int) -> bool:
        """Whether each pool has the pages for so many slots, and some to spare."""
        pairs = zip(self._pools, self.leases, strict=True)
        return all(lease.lacks(slots) + spare <= pool.available for pool, lease in pairs)

    def reaches(self, position: int) -> bool:
        """Whether all pages are there that tokens from a position on see."""
        pairs = zip(self._pools, self.leases, strict=True)
        return all(lease.first <= pool.first_seen(position) for pool, lease in pairs)

    def cover(self, position: int, slots: int, known: Callable[[], Sequence[int]] = tuple) -> bool:
        """Give back what no token from a position on sees, see :meth:`Lease.give_back`, and have room for so many
        slots, or as many as are needed now; False if there are no pages for it."""
        for pool, lease in enumerate(self.leases):
            before = lease.first
            lease.give_back(position, known)
            if lease.first > before:
                self._runner.bind(self._row, before, [UNBOUND] * (lease.first - before), pool)
        return all(self._grow(pool, lease, slots) for pool, lease in enumerate(self.leases))

    def _grow(self, pool: int, lease: Lease, slots: int) -> bool:
        before = len(lease.pages)
        if not lease.grow(slots):
            return False
        if len(lease.pages) > before:
            self._runner.bind(self._row, before, lease.pages[before:], pool)
        return True

    def publish(self, tokens: Sequence[int]) -> None:
        """See :meth:`Lease.publish`."""
        for lease in self.leases:
            lease.publish(tokens)

    def release(self, tokens: Sequence[int] = ()) -> None:
        """See :meth:`Lease.release`. Nothing is bound to the row any more: behind the pages of its next one, where more
        is read, others would lie that do not follow them."""
        for pool, lease in enumerate(self.leases):
            self._runner.bind(self._row, 0, [UNBOUND] * len(lease.pages), pool)
            lease.release(tokens)
