"""The laws that drafted tokens come from in rejection mode, and how they travel with the nodes of a message.

See :class:`~ssd_ray.wire.Nodes` for the form on the wire. Nothing is copied on arrival: laws are views of the frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Law = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Token ids, [M] (empty: all, in order), and their probabilities, [M]."""


def pack_laws(laws: Sequence[Law | None]) -> tuple[list[int], memoryview, memoryview]:
    """Which entries have a law, and the laws' token ids and probabilities one after the other."""
    known = {index: law for index, law in enumerate(laws) if law is not None}
    if not known:
        return [], memoryview(b""), memoryview(b"")
    tokens, weights = (np.stack(parts) for parts in zip(*known.values(), strict=True))
    return list(known), memoryview(tokens.tobytes()), memoryview(weights.tobytes())


def unpack_laws(sampled: Sequence[int], tokens: memoryview, weights: memoryview) -> dict[int, Law]:
    """The laws by entry; none if the parts are not equal."""
    count = len(sampled)
    if not count or len(weights) % (4 * count) or len(tokens) not in (0, len(weights)):
        return {}
    ids = np.frombuffer(tokens, np.int32).reshape(count, -1)
    chances = np.frombuffer(weights, np.float32).reshape(count, -1)
    return {entry: (ids[index], chances[index]) for index, entry in enumerate(sampled)}
