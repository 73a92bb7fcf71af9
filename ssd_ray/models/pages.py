"""Which page of the pool stands behind which part of a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ssd_ray.models.contract import UNBOUND


class PageTable:
    """The pages of ``rows`` rows of ``slots`` slots, a whole number of pages.

    Behind everything that is unbound stands one page beyond the pool's, ``spare``: it is read, under masks, and never
    written.

    Args:
        num_pages: pages of the pool; None is enough for all rows, and binds them one after the other.
        device: where addresses are computed.

    Attributes:
        tensor: int64 [rows, pages of a row].
    """

    def __init__(
        self, rows: int, slots: int, page_slots: int, num_pages: int | None = None, *, device: torch.device
    ) -> None:
        self.slots, self.page_slots = slots, page_slots
        per_row = slots // page_slots
        self.num_pages = self.spare = rows * per_row if num_pages is None else num_pages
        self._pages = [[self.spare] * per_row for _ in range(rows)]
        self.tensor = torch.full((rows, per_row), self.spare, dtype=torch.int64, device=device)
        if num_pages is None:
            for row in range(rows):
                self.bind(row, 0, range(row * per_row, (row + 1) * per_row))

    def bind(self, row: int, first: int, pages: Sequence[int]) -> None:
        """See :meth:`~ssd_ray.models.contract.ModelRunner.bind`."""
        of_row, end = self._pages[row], first + len(pages)
        if not 0 <= first <= end <= len(of_row):
            raise ValueError(f"virtual pages {first} to {end - 1} of a row that has {len(of_row)}")
        if not all(UNBOUND <= page < self.num_pages for page in pages):
            raise ValueError(f"pages {list(pages)} of a pool that has {self.num_pages}")
        of_row[first:end] = [self.spare if page == UNBOUND else page for page in pages]
        self.tensor[row, first:end] = torch.tensor(of_row[first:end], dtype=torch.int64)

    def of(self, row: int, slots: int) -> list[int]:
        """The pages behind the first slots of a row."""
        return self._pages[row][: -(-slots // self.page_slots)]

    def run(self, row: int, slots: int) -> int | None:
        """Where in the pool the first slots of a row begin, if they follow one another there."""
        pages = self.of(row, slots)
        return pages[0] * self.page_slots if pages == list(range(pages[0], pages[0] + len(pages))) else None

    def indices(self, rows: Sequence[int], slots: int) -> Tensor:
        """The pages behind the first slots of rows, int64 [R, P]."""
        return self.tensor[list(rows), : -(-slots // self.page_slots)]

    def addresses(self, rows: Sequence[int], slots: Tensor) -> Tensor:
        """Where slots, int64 [1 or R, T], of rows lie in the pool: int64 [R, T]."""
        if len(rows) == 1:
            pages = self.tensor[rows[0]][slots // self.page_slots]
        else:
            pages = self.tensor[list(rows)].gather(1, (slots // self.page_slots).expand(len(rows), -1))
        return pages * self.page_slots + slots % self.page_slots

    def require_trunk(self, row: int, end: int) -> None:
        """Raise ValueError unless slots 0 .. end-1 of a row are there and bound."""
        if end > self.slots:
            raise ValueError(f"tokens up to slot {end - 1}, but a row has {self.slots} slots")
        if self.spare in (pages := self.of(row, end)):
            raise ValueError(f"slot {end - 1} of row {row}, whose virtual page {pages.index(self.spare)} is not bound")

    def require(self, row: int, slots: Iterable[int]) -> None:
        """Raise ValueError unless these slots of a row are bound."""
        pages = self._pages[row]
        for slot in slots:
            if pages[slot // self.page_slots] == self.spare:
                raise ValueError(f"slot {slot} of row {row}, whose virtual page is not bound")
