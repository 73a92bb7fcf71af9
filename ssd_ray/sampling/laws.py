"""The laws that drafted tokens come from in rejection mode, and how they travel with the nodes of a message.

See :class:`~ssd_ray.wire.Nodes` for the form on the wire. Nothing is copied on arrival: laws are views of the frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Law:
    """What a token was drawn from: q' of :func:`~ssd_ray.sampling.rejection.saguaro`, by what it is made of.

    Attributes:
        tokens: ids, int32 [M]; empty: the whole vocabulary, in order.
        weights: their probabilities q, float32 [M], before any mass was lowered.
        guesses: F.
        c: Saguaro's C.
    """

    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    guesses: int = 0
    c: float = 1.0


Packed = tuple[list[int], memoryview, memoryview, list[int], list[float]]
"""Which entries have a law, and the laws one after the other: tokens, weights, F, C."""


def pack_laws(laws: Sequence[Law | None]) -> Packed:
    """Bring laws of equal length into the form of the wire."""
    known = {index: law for index, law in enumerate(laws) if law is not None}
    if not known:
        return [], memoryview(b""), memoryview(b""), [], []
    tokens = np.stack([law.tokens for law in known.values()])
    weights = np.stack([law.weights for law in known.values()])
    guesses, factors = [law.guesses for law in known.values()], [law.c for law in known.values()]
    return list(known), memoryview(tokens.tobytes()), memoryview(weights.tobytes()), guesses, factors


def unpack_laws(packed: Packed) -> dict[int, Law]:
    """The laws by entry; none if the parts are not equal."""
    sampled, tokens, weights, guesses, factors = packed
    count = len(sampled)
    if not count or len(weights) % (4 * count) or len(tokens) not in (0, len(weights)):
        return {}
    if not len(guesses) == len(factors) == count:
        return {}
    ids = np.frombuffer(tokens, np.int32).reshape(count, -1)
    chances = np.frombuffer(weights, np.float32).reshape(count, -1)
    laws = [Law(*parts) for parts in zip(ids, chances, guesses, factors, strict=True)]
    return dict(zip(sampled, laws, strict=True))
