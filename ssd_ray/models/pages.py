"""Which page of the pool stands behind which part of a row."""

from __future__ import annotations

from collections.abc import Sequence

from ssd_ray.models.contract import UNBOUND


class PageTable:
    """The pages of ``rows`` rows of ``slots`` slots, a whole number of pages.

    Behind everything that is unbound stands one page beyond the pool's, ``spare``: it is read, under masks, and never
    written. An address is a slot's place in the pool, spare page included.

    Args:
        num_pages: pages of the pool; None is enough for all rows, and binds them one after the other.
    """

    def __init__(self, rows: int, slots: int, page_slots: int, num_pages: int | None = None) -> None:
        self.slots, self.page_slots = slots, page_slots
        per_row = slots // page_slots
        self.num_pages = self.spare = rows * per_row if num_pages is None else num_pages
        self._pages = [[self.spare] * per_row for _ in range(rows)]
        if num_pages is None:
            self._pages = [list(range(row * per_row, (row + 1) * per_row)) for row in range(rows)]

    @property
    def size(self) -> int:
        """Slots of the pool, those of the spare page included."""
        return (self.num_pages + 1) * self.page_slots

    def bind(self, row: int, first: int, pages: Sequence[int]) -> None:
        """See :meth:`~ssd_ray.models.contract.ModelRunner.bind`."""
        of_row, end = self._pages[row], first + len(pages)
        if not 0 <= first <= end <= len(of_row):
            raise ValueError(f"virtual pages {first} to {end - 1} of a row that has {len(of_row)}")
        if not all(UNBOUND <= page < self.num_pages for page in pages):
            raise ValueError(f"pages {list(pages)} of a pool that has {self.num_pages}")
        of_row[first:end] = [self.spare if page == UNBOUND else page for page in pages]

    def of(self, row: int, slots: int, begin: int = 0) -> list[int]:
        """The pages behind the first slots of a row from ``begin`` on, where a page begins, and of what is read beyond
        its end."""
        first, end = begin // self.page_slots, -(-slots // self.page_slots)
        pages = self._pages[row][first:end]
        return pages + [self.spare] * (end - first - len(pages))

    def run(self, row: int, slots: int, begin: int = 0) -> int | None:
        """The address of a row's slot ``begin``, if those from there to its first ``slots`` follow one another. Before
        the first bound page and behind the last one may be anybody's, since they are read under masks."""
        pages = self.of(row, slots, begin)
        bound = [place for place, page in enumerate(pages) if page != self.spare] or [0]
        first, (start, end) = pages[bound[0]] - bound[0], (bound[0], bound[-1] + 1)
        in_line = pages[start:end] == list(range(first + start, first + end))
        return first * self.page_slots if in_line and 0 <= first <= self.num_pages + 1 - len(pages) else None

    def locate(self, row: int, slots: Sequence[int]) -> list[int]:
        """Addresses of slots of a row that are to be written.

        Raises:
            ValueError: the row does not have a slot, or it lies on a page that is not bound.
        """
        if max(slots, default=0) >= self.slots:
            raise ValueError(f"slot {max(slots)}, but a row has {self.slots} slots")
        pages, size = self._pages[row], self.page_slots
        addresses = [pages[slot // size] * size + slot % size for slot in slots]
        if max(addresses, default=0) >= self.num_pages * size:
            raise ValueError(f"slots {list(slots)} of row {row} lie on a page that is not bound")
        return addresses

    def locate_trunk(self, row: int, start: int, end: int, seen: int = 0) -> list[int]:
        """Addresses of slots ``start .. end-1`` of a row, whose tokens see all slots before them, from ``seen`` on.

        Raises:
            ValueError: as :meth:`locate`, and if a page of those is not bound.
        """
        addresses = self.locate(row, range(start, end))
        if self.spare in (pages := self.of(row, end, seen)):
            place = seen // self.page_slots + pages.index(self.spare)
            raise ValueError(f"virtual page {place} of row {row} is not bound")
        return addresses
