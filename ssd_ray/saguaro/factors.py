"""Which C to draw with in rejection mode: how much acceptance to give up for how many hits (paper, section 4.2).

Target's law and draft's law are both known where a proposal is verified, so what every other C would have done there
can be computed, without trying it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

FACTORS = (1.0, 0.7, 0.5, 0.3, 0.0)
"""Values of C to choose from."""

FIRST = 0.7
"""The one to begin with."""

_SMOOTHING = 0.01


@dataclass(slots=True)
class Factors:
    """Online estimates, exponentially weighted, for each of :data:`FACTORS`.

    Attributes:
        acceptance: probability that a drafted token is accepted.
        hits: probability that the bonus token was prepared for after a rejection.
        whole_hits: the same after full acceptance, where C plays no part.
        positions: positions that were looked at.
    """

    acceptance: list[float] = field(default_factory=lambda: [0.6] * len(FACTORS))
    hits: list[float] = field(default_factory=lambda: [0.6] * len(FACTORS))
    whole_hits: float = 0.7
    positions: int = 0

    def saw_position(self, weighed: Sequence[tuple[float, float]]) -> None:
        """Learn from a position: (acceptance, hits after a rejection) for each C."""
        self.positions += 1
        part = max(_SMOOTHING, 1.0 / (1 + self.positions))
        for index, (accepted, hit) in enumerate(weighed):
            # A rejection where it is rare says little about hits.
            rejected = (1.0 - accepted) / max(1e-6, 1.0 - self.acceptance[index])
            self.hits[index] += min(1.0, part * rejected) * (hit - self.hits[index])
            self.acceptance[index] += part * (accepted - self.acceptance[index])

    def saw_whole(self, hit: bool) -> None:
        """Learn from a speculation that was accepted whole."""
        self.whole_hits += _SMOOTHING * (hit - self.whole_hits)

    def rate(self, c: float, most: int, wait: int, verify_ms: float, wait_ms: float) -> float:
        """Tokens per millisecond with this C: ``most`` tokens verified after a hit, ``wait`` of them after a miss, for
        which a round waits ``wait_ms``."""
        index = FACTORS.index(c)
        accepted = self.acceptance[index]
        whole = accepted**most
        misses = 1.0 - whole * self.whole_hits - (1.0 - whole) * self.hits[index]
        tokens = (1.0 - misses) * expected_tokens(accepted, most) + misses * expected_tokens(accepted, wait)
        return tokens / (verify_ms + misses * wait_ms)


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens of a round that verifies ``length`` drafted ones, each accepted with one probability (Leviathan et al.,
    2023)."""
    return sum(acceptance**count for count in range(length + 1))
