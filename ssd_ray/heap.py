"""Python's garbage collector, and the objects that are there for good.

Importing torch and transformers makes most of a million objects, none of them garbage. The collector looks through all
of them again and again meanwhile, which takes a fifth of the time of importing, and once more at each full collection
later, while a decoding loop stands still.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_rests() -> Iterator[None]:
    """Import what is large."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def keep_what_is_there() -> None:
    """Let no collection look at what there is now. For processes of our own, once they have imported what they need."""
    gc.freeze()
