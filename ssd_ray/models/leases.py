"""Who has which pages of the KV memory: leases of running sequences, and a prefix cache of what has ended.

The cache is a tree of full pages: a page is found by the tokens in it below the page of the tokens before it. Tokens
are compared, not hashes, so what is found is what was meant. A page in the tree is never written again; any number of
leases may share it. Pages that nobody uses stay until their room is wanted, the longest unused first.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssd_ray.models.contract import ModelRunner

BEFORE = -2
"""In place of the last page of a sequence that has none."""


class CachedPage:
    """A page of the prefix cache.

    Attributes:
        number: which page of the runner.
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
    """The pages of one runner.

    Args:
        pages: their numbers, one after the other.
        slots: slots of a page.
        rows: leases that run at the same time, mostly. So many lanes divide the pool, and where there is room each
            begins a lane: rows that lie at equal distances are read as one.
    """

    def __init__(self, pages: range, slots: int, rows: int = 1) -> None:
        self.slots = slots
        self.size = len(pages)
        self._lane = max(1, self.size // rows)
        self._lanes = pages[: rows * self._lane : self._lane]
        self._free = set(pages)
        self._root = CachedPage(-1, None, ())
        self._idle: dict[CachedPage, None] = {}  # nobody's, the longest unused first
        self._leases: set[Lease] = set()

    @property
    def available(self) -> int:
        """Pages that can be had: free ones, and cached ones that nobody uses."""
        return len(self._free) + len(self._idle)

    def pages_for(self, slots: int) -> int:
        """How many pages so many slots are."""
        return -(-slots // self.slots)

    def lease(self, tokens: Sequence[int] = ()) -> Lease:
        """Begin a lease with the cached pages of the longest beginning of these tokens."""
        lease = Lease(self, self._find(tokens))
        self._leases.add(lease)
        return lease

    def cached(self, tokens: Sequence[int]) -> int:
        """How many pages :meth:`lease` would begin with."""
        return len(self._find(tokens))

    def _find(self, tokens: Sequence[int]) -> list[CachedPage]:
        found: list[CachedPage] = []
        node = self._root
        for start in range(0, len(tokens) - self.slots + 1, self.slots):
            child = node.children.get(tuple(tokens[start : start + self.slots]))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def _take(self, count: int, after: int) -> list[int] | None:
        """Take pages out of the pool, those that follow ``after`` if they are free; None if they are not so many."""
        if count > self.available:
            return None
        while len(self._free) < count:
            # A leaf: whoever holds a page holds those before it, and lets go of the deepest first.
            self._evict(next(iter(self._idle)))
        taken: list[int] = []
        for _ in range(count):
            number = after + 1
            if number not in self._free:
                number = self._begin(count) if after == BEFORE else self._begin_run(count - len(taken))
            self._free.remove(number)
            taken.append(number)
            after = number
        return taken

    def _begin(self, count: int) -> int:
        """A free page for a sequence to begin with: the first lane's that is free as a whole."""
        for start in self._lanes:
            if self._free.issuperset(range(start, start + max(count, self._lane))):
                return start
        return self._begin_run(count)

    def _begin_run(self, count: int) -> int:
        """A free page from which a sequence can go on: the middle of the longest run of free pages, so that whoever
        comes before can go on, too; its beginning if ``count`` pages need that."""
        longest, size, start = -1, 0, -1
        for number in sorted(self._free):
            start = number if number - 1 not in self._free else start
            if number - start + 1 > size:
                longest, size = start, number - start + 1
        return longest + min(size // 2, max(0, size - count))

    def _evict(self, page: CachedPage) -> None:
        del self._idle[page]
        if page.parent is not None:
            del page.parent.children[page.key]
        self._free.add(page.number)

    def validate(self) -> None:
        """Check all invariants.

        Raises:
            AssertionError: one does not hold.
        """
        cached = self._tree()
        held = [page for lease in self._leases for page in lease.cached]
        own = [number for lease in self._leases for number in lease.own]
        numbers = [*self._free, *own, *(page.number for page in cached)]
        if len(numbers) != self.size or len(set(numbers)) != self.size:
            raise AssertionError("a page is lost, or has two owners")
        if any(page.users != held.count(page) for page in cached):
            raise AssertionError("a cached page miscounts its users")
        if set(self._idle) != {page for page in cached if not page.users}:
            raise AssertionError("the idle pages are not those that nobody uses")
        if any(page.children for page in list(self._idle)[:1]):
            raise AssertionError("a page would be evicted before those behind it")

    def _tree(self) -> list[CachedPage]:
        pages, stack = [], list(self._root.children.values())
        while stack:
            page = stack.pop()
            pages.append(page)
            stack.extend(page.children.values())
        return pages


class Lease:
    """The pages of one sequence; made by :meth:`PagePool.lease`.

    Attributes:
        pages: numbers of the pages that hold slots 0, 1, .. of the sequence.
        shared: how many of the first ones came from the cache, filled.
        cached: pages of the cache that it holds, of places 0, 1, ..: it reads them, or has a copy.
    """

    def __init__(self, pool: PagePool, shared: Sequence[CachedPage]) -> None:
        self._pool = pool
        self.pages = [page.number for page in shared]
        self.shared = len(shared)
        self.cached = list(shared)
        for page in shared:
            self._hold(page)

    @property
    def own(self) -> list[int]:
        """Its pages that are nobody else's."""
        read = {page.number for page in self.cached}
        return [number for number in self.pages if number not in read]

    @property
    def slots(self) -> int:
        """Slots that its pages have."""
        return len(self.pages) * self._pool.slots

    def grow(self, slots: int) -> bool:
        """Have room for so many slots; False, and nothing has changed, if there are no pages for it."""
        missing = self._pool.pages_for(slots) - len(self.pages)
        if missing > 0:
            taken = self._pool._take(missing, self.pages[-1] if self.pages else BEFORE)
            if taken is None:
                return False
            self.pages += taken
        return True

    def publish(self, tokens: Sequence[int]) -> None:
        """Let others find the full pages of these tokens, whose KV is in slots 0, 1, ..

        What is cached already stays as it is, and this lease keeps its own copy.
        """
        size = self._pool.slots
        for place in range(len(self.cached), len(tokens) // size):
            key = tuple(tokens[place * size : (place + 1) * size])
            end = self.cached[-1] if self.cached else self._pool._root
            page = end.children.get(key)
            if page is None:
                page = end.children[key] = CachedPage(self.pages[place], end, key)
            self.cached.append(page)
            self._hold(page)

    def release(self, tokens: Sequence[int] = ()) -> None:
        """Give all pages back, those of these tokens to the cache. The lease ends."""
        self.publish(tokens)
        pool = self._pool
        pool._free.update(self.own)
        for page in reversed(self.cached):  # the deepest are evicted first
            page.users -= 1
            if not page.users:
                pool._idle[page] = None
        self.pages, self.cached = [], []
        pool._leases.discard(self)

    def _hold(self, page: CachedPage) -> None:
        page.users += 1
        self._pool._idle.pop(page, None)


def grow_row(runner: ModelRunner, row: int, lease: Lease, slots: int) -> bool:
    """Give a row that stands on a lease room for so many slots; False, and nothing has changed, if there is none."""
    before = len(lease.pages)
    if not lease.grow(slots):
        return False
    if len(lease.pages) > before:
        runner.bind(row, before, lease.pages[before:])
    return True
