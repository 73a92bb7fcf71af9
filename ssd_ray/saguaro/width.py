"""How wide a draft's step is to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def best_width(values: Sequence[float], others: int, step_price: Callable[[int], float]) -> int:
    """How many branches to run beside ``others`` of the trunk: those that leave most value beyond the step's price.
    ``values`` fall."""
    best, width, total = -step_price(others) if others else 0.0, 0, 0.0
    for some, value in enumerate(values, 1):
        total += value
        left = total - step_price(others + some)
        if left > best:
            best, width = left, some
    return width
