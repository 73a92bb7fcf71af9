"""What a draft makes of the text: tokens that followed the same ones earlier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ssd_ray.saguaro.fanout import Source
from ssd_ray.saguaro.ngram import NgramIndex
from ssd_ray.speculation.nodes import Ranking

TRUSTED = 0.8
"""How often the text must have been right lately for a branch to follow it blindly."""


class TextAdvice:
    """The text of one sequence, and how far it was right.

    Args:
        heeds: False: it is never asked.

    Attributes:
        right: how often the text has been right lately.
    """

    def __init__(self, *, heeds: bool = True) -> None:
        self._heeds = heeds
        self.right = 0.5
        self._disputes = [1.0, 1.0]  # won by the model and by the text where they differ; recent ones count more
        self._ngrams = NgramIndex()

    def begin(self, tokens: Sequence[int]) -> None:
        """Start with a text."""
        self._ngrams = NgramIndex(tokens if self._heeds else ())

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on."""
        if self._heeds:
            self._ngrams.extend(tokens)

    def follows(self, tail: tuple[int, ...]) -> int | None:
        """The token that followed the last ones of a tail earlier, if any did."""
        return self._ngrams.follows(tail)

    @property
    def trusted(self) -> bool:
        """Whether a branch may follow the text without asking the model."""
        return self._wins and self.right > TRUSTED

    @property
    def _wins(self) -> bool:
        return self._disputes[1] > self._disputes[0]

    def heeded(self, ranking: Ranking, tail: tuple[int, ...]) -> Ranking:
        """Add the token that the text suggests after a tail: drafted if the text has been right more often than the
        model where they differ, else the first guess."""
        said = self.follows(tail)
        if said is None:
            return ranking
        if said == ranking.drafted:
            return replace(ranking, source=Source.BOTH)
        others = [(token, score) for token, score in zip(ranking.tokens, ranking.scores, strict=True) if token != said]
        wins = ranking.law is None and self._wins
        others.insert(0 if wins else 1, (said, others[0][1] if wins else others[min(1, len(others) - 1)][1]))
        tokens, scores = zip(*others, strict=True)
        if wins:
            return Ranking(tokens, scores, said, None, Source.TEXT)
        return Ranking(tokens, scores, ranking.drafted, ranking.law, Source.OVERRULED, ranking.lead)

    def judge(self, ranking: Ranking, token: int) -> None:
        """Learn how often the text is right, and who was where it differed from the model."""
        if ranking.source is not Source.MODEL:
            said = ranking.tokens[1] if ranking.source is Source.OVERRULED else ranking.drafted
            self.right += 0.05 * ((said == token) - self.right)
        if ranking.source >= Source.OVERRULED and token in ranking.tokens[:2]:
            first = token == ranking.tokens[0]
            model = first == (ranking.source is Source.OVERRULED)
            self._disputes = [0.9 * wins + (model == (index == 0)) for index, wins in enumerate(self._disputes)]
