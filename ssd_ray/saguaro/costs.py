"""What a verification costs: milliseconds by the tokens that it runs, the rows that they belong to and the slots read.

The shape of the curve is measured once (:mod:`~ssd_ray.models.calibration`) and follows the rounds as they run; so does
what drafting beside a verification costs it. Nothing is taken for granted about a processor: one where eight tokens
cost what one does, and one where each costs as much as the first, differ in numbers alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from statistics import median

import numpy as np
from msgspec import Struct

from ssd_ray.saguaro.budget import Floats, Integers

_SMOOTHING = 0.1
_SHAPE_SMOOTHING = 0.03
"""How fast the curve's shape follows, which noise must not bend."""

TRIALS, DOUBT = 12, 0.5
"""Trials whose median says what drafts cost, and how many that said "nothing" are taken to have been before them."""

TELLING = 6
"""Trials after which it is worth telling a later start."""

REMEMBERED = 4
"""Trials that what an earlier start has learned counts for."""

OUTLIER = 3.0
"""A round that took more than this many times what was expected says nothing about costs: somebody else had the
processor."""


MOST_TOLL = 0.75
"""Milliseconds that one of drafting may cost at most: drafts that stop a target are no drafts."""

LEAST_PART = 0.25
"""Drafts that work for a smaller part of a verification are taken to have worked for this."""


class Measured(Struct, frozen=True):
    """What verifications took on an idle machine.

    Attributes:
        sizes: numbers of tokens, rising; ``ms`` what a verification of one row and few slots takes with each.
        row_ms: what every further row adds, its tokens apart.
        slot_ms: what every slot that is read adds.
    """

    sizes: tuple[int, ...] = (1,)
    ms: tuple[float, ...] = (0.0,)
    row_ms: float = 0.0
    slot_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.ms):
            raise ValueError(f"{len(self.ms)} times of {len(self.sizes)} sizes")


class Learned(Struct, frozen=True):
    """What rounds have taught of what no measurement at load can tell.

    Attributes:
        toll: milliseconds that a verification loses for each one of drafting beside it.
    """

    toll: float


@dataclass(frozen=True, slots=True)
class Load:
    """What a verification reads beside its tokens: ``rows``, and ``slots`` over all of them."""

    rows: int = 1
    slots: int = 0


class Costs:
    """The estimates of one target. Until something was measured or seen, all verifications cost the same.

    Args:
        measured: where the curve begins; None: nothing is known.
        learned: what an earlier start found out; None: nothing.

    Attributes:
        drag: by which part verifications take longer while drafts work beside them all the time.
        remembers: whether it was known from an earlier start.
    """

    def __init__(self, measured: Measured | None = None, learned: Learned | None = None) -> None:
        self.measured = measured or Measured()
        self.known = measured is not None
        self.drag = 0.0
        self._sizes = list(self.measured.sizes)
        self._ms = list(self.measured.ms)
        self._speed = 1.0
        self._beside = 1.0  # what rounds took lately with drafts at work, against the curve
        self._part = 1.0  # for which part of them drafts worked
        self._tolls: deque[float] = deque(maxlen=TRIALS)
        if learned is not None:
            self._tolls.extend([min(learned.toll, MOST_TOLL)] * REMEMBERED)
        self._trials = 0
        self.remembers = learned is not None
        self._set_toll()

    def alone_ms(self, tokens: int, load: Load = Load()) -> float:
        """Milliseconds of a verification with nobody at work beside it."""
        return self._speed * (self._at(tokens) + self._reading_ms(load))

    def verify_ms(self, tokens: int, load: Load = Load(), *, beside: float = 1.0) -> float:
        """Milliseconds of a verification with drafts at work ``beside`` it for that part of the time."""
        return self._slowdown(beside) * self.alone_ms(tokens, load)

    def each_verify_ms(self, tokens: Integers, load: Load = Load(), *, beside: float = 1.0) -> Floats:
        """The same of many numbers of tokens at once."""
        return self._slowdown(beside) * self._speed * (self._curve(tokens) + self._reading_ms(load))

    def _reading_ms(self, load: Load) -> float:
        """What is read beside the tokens of one row, at the speed of the calibration."""
        return (load.rows - 1) * self.measured.row_ms + load.slots * self.measured.slot_ms

    @property
    def toll(self) -> float:
        """Milliseconds that a verification loses for each one of drafting beside it."""
        return self.drag / (1.0 + self.drag)

    def _slowdown(self, beside: float) -> float:
        """How many times as long a verification takes with drafts at work for this part of it."""
        return 1.0 / (1.0 - self.toll * beside)

    def per_token_ms(self, tokens: int, load: Load = Load(), *, over: int = 8) -> float:
        """Milliseconds that each of the next tokens adds."""
        return (self.verify_ms(tokens + over, load) - self.verify_ms(tokens, load)) / over

    def saw(self, tokens: int, load: Load, milliseconds: float, *, beside: float) -> None:
        """Learn from a verification; for the part ``beside`` of it drafts were at work."""
        if not self.known:
            self._begin(tokens, milliseconds)
        expected = self.verify_ms(tokens, load, beside=beside)
        ratio = milliseconds / max(expected, 1e-9)
        if 1.0 / OUTLIER < ratio < OUTLIER:
            self._bend(tokens, ratio)
            self._speed *= 1.0 + _SMOOTHING * (ratio - 1.0)
        elif ratio > 0.0:
            self._speed *= 1.0 + 0.01 * (min(ratio, OUTLIER) - 1.0)  # should it always be so, it is believed
        if beside > 0.0:
            self._beside += _SMOOTHING * (milliseconds / max(self.alone_ms(tokens, load), 1e-9) - self._beside)
            self._part += _SMOOTHING * (beside - self._part)

    def saw_trial(self, tokens: int, load: Load, milliseconds: float, *, beside: float, rests: bool) -> None:
        """Learn what drafts cost from a verification during which they rested, all but for the part ``beside``, after
        others when they did not; or the other way round."""
        ratio = milliseconds / max(self.alone_ms(tokens, load), 1e-9)
        if not 1.0 / OUTLIER < ratio < OUTLIER:
            return
        slower = self._beside / ratio if rests else ratio
        part = self._part - beside / slower if rests else beside  # by which drafts worked longer beside the slower ones
        self._tolls.append(min((1.0 - 1.0 / slower) / max(part, LEAST_PART), MOST_TOLL))
        self._trials += 1
        before = self._slowdown(self._part)
        self._set_toll()
        if rests:  # what rounds take with drafts at work is known; it is the rest of it that has changed
            changed = before / self._slowdown(self._part)
            self._speed *= changed
            self._beside /= changed

    def _set_toll(self) -> None:
        count = len(self._tolls)
        toll = max(0.0, median(self._tolls)) * count / (count + DOUBT) if count else 0.0
        self.drag = toll / (1.0 - toll)

    @property
    def learned(self) -> Learned | None:
        """What a later start may begin with; None if there were too few trials to tell."""
        return Learned(max(0.0, median(self._tolls))) if self._trials >= TELLING else None

    def _begin(self, tokens: int, milliseconds: float) -> None:
        self._sizes, self._ms, self.known = [tokens], [milliseconds], True

    def _curve(self, tokens: Integers) -> Floats:
        """The curve at numbers of tokens: fewer that are run as more cost as much, beyond the last in proportion."""
        beyond = np.maximum(0, tokens - self._sizes[-1])
        return np.interp(tokens, self._sizes, self._ms) + self._last_slope() * beyond

    def _at(self, tokens: int) -> float:
        """The same at one number, for which numpy takes ten times as long."""
        sizes, ms = self._sizes, self._ms
        index = bisect_left(sizes, tokens)
        if index == 0:
            return ms[0]
        if index == len(sizes):
            return ms[-1] + self._last_slope() * (tokens - sizes[-1])
        slope = (ms[index] - ms[index - 1]) / (sizes[index] - sizes[index - 1])
        return ms[index - 1] + slope * (tokens - sizes[index - 1])

    def _last_slope(self) -> float:
        sizes, ms = self._sizes, self._ms
        return max(0.0, (ms[-1] - ms[-2]) / (sizes[-1] - sizes[-2])) if len(sizes) > 1 else 0.0

    def _bend(self, tokens: int, ratio: float) -> None:
        """Let the curve follow at the sizes next to a number of tokens."""
        index = min(bisect_left(self._sizes, tokens), len(self._sizes) - 1)
        for near in {index, max(0, index - 1)} if self._sizes[index] > tokens else {index}:
            self._ms[near] *= 1.0 + _SHAPE_SMOOTHING * (ratio - 1.0)
