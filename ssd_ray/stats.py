"""Figures of requests, and their sums over an engine's life."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any

import msgspec

from ssd_ray.wire import RequestStats


def add(a: RequestStats, b: RequestStats) -> RequestStats:
    """Sum two figures; histograms add entry by entry."""
    total: RequestStats = _add(a, b)
    return total


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, tuple):
        return tuple(left + right for left, right in zip_longest(a, b, fillvalue=0))
    if isinstance(a, msgspec.Struct):
        return type(a)(*(_add(getattr(a, name), getattr(b, name)) for name in a.__struct_fields__))
    return a + b


_RATIOS = (
    "tokens_per_round",
    "verified_per_token",
    "hit_rate",
    "duty_cycle",
    "partial_rate",
    "tree_use",
    "draft_waste",
)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """What one request did, or several together. Ratios over nothing are 0.

    Attributes:
        sums: the counts behind the properties; :class:`~ssd_ray.wire.RequestStats` explains each.
    """

    sums: RequestStats = field(default_factory=RequestStats)

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        return self.sums.tokens

    @property
    def _counted(self) -> int:
        """Tokens whose rounds are known."""
        return self.sums.tokens - self.sums.resumed_tokens

    @property
    def rounds(self) -> int:
        """Verifications."""
        return self.sums.rounds

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a verification yields, from 1 to lookahead + 1."""
        return _ratio(self._counted, self.sums.rounds)

    @property
    def hit_rate(self) -> float:
        """Share of rounds whose speculation was there when they began; a request's first round does not count."""
        return _ratio(self.sums.hits, self.sums.hits + sum(self.misses.values()))

    @property
    def misses(self) -> dict[str, int]:
        """Rounds that began without a prepared speculation, by cause; :class:`~ssd_ray.wire.Misses` explains each."""
        return msgspec.structs.asdict(self.sums.misses)

    @property
    def backups(self) -> dict[str, int]:
        """What was done about them; :class:`~ssd_ray.wire.Backups` explains each."""
        return msgspec.structs.asdict(self.sums.backups)

    @property
    def cached_tokens(self) -> int:
        """Tokens that were not prefilled, because their KV was there."""
        return self.sums.cached_tokens

    @property
    def preemptions(self) -> int:
        """Times that a request gave its memory back to others and waited again."""
        return self.sums.preemptions

    @property
    def accepted(self) -> tuple[int, ...]:
        """Histogram: entry k counts the rounds that accepted exactly k tokens."""
        return self.sums.accepted

    @property
    def verify_ms(self) -> float:
        """Milliseconds inside verification forwards."""
        return self.sums.verify_ms

    @property
    def wait_ms(self) -> float:
        """Milliseconds of waiting for drafts."""
        return self.sums.wait_ms

    @property
    def host_ms(self) -> float:
        """Milliseconds of the rounds that were neither verification nor waiting."""
        return self.sums.host_ms

    @property
    def duty_cycle(self) -> float:
        """Share of the rounds' time inside verification forwards. 1 is the limit of speculative decoding."""
        return _ratio(self.verify_ms, self.verify_ms + self.wait_ms + self.host_ms)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the rounds, prefill apart."""
        return 1e3 * _ratio(self._counted, self.verify_ms + self.wait_ms + self.host_ms)

    @property
    def verified_per_token(self) -> float:
        """Tokens that verifications ran for each token of the texts. 1 is plain decoding; speculation needs more."""
        return _ratio(self.sums.verified, self._counted)

    @property
    def partial_rate(self) -> float:
        """Share of rounds that began with a speculation, but a shorter one than could be of use."""
        return _ratio(self.sums.partial, self.sums.rounds)

    @property
    def tree_use(self) -> float:
        """Share of the tokens drafts sent that were verified, or guessed right."""
        return _ratio(self.sums.tree_used, self.sums.tree_tokens)

    @property
    def draft_waste(self) -> float:
        """Share of the drafts' step time that went into steps of which nothing was used."""
        return _ratio(self.sums.draft_ms - self.sums.draft_used_ms, self.sums.draft_ms)

    def as_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts, ready for JSON."""
        ratios = {name: getattr(self, name) for name in _RATIOS}
        counts = {"misses": self.misses, "backups": self.backups}
        return msgspec.structs.asdict(self.sums) | counts | ratios


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats(Stats):
    """What an engine has done so far.

    Attributes:
        requests: requests that have ended.
        running, waiting: requests that decode now, and that wait for their turn.
        drafts: names of the drafts that are connected now.
        draft_restarts, target_restarts: drafts and targets that died and were replaced.
        spare_targets: targets that are loaded and wait for the end of the present one.
        kv_pages: pages of the target's KV memory, and ``kv_pages_free`` those that no running request holds; some of
            them keep what has ended for prompts that begin alike.
        plan: what a round is planned to be like now, and why.
        dropped_frames: frames that did nothing, by cause: "malformed" (no messages of the protocol, or too long), of
            another "version" or "session", "unexpected" (of a peer that is no draft, or nothing that a draft says),
            "stale" (late or said before; some of these are usual), and "by_drafts", those that connected drafts have
            dropped by their own word. Since the present target began.
        shared_vocabulary: part of the target's tokens that the draft has, too; others are never proposed.
    """

    requests: int = 0
    running: int = 0
    waiting: int = 0
    drafts: tuple[str, ...] = ()
    draft_restarts: int = 0
    target_restarts: int = 0
    spare_targets: int = 0
    kv_pages: int = 0
    kv_pages_free: int = 0
    plan: str = ""
    dropped_frames: dict[str, int] = field(default_factory=dict)
    shared_vocabulary: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts, ready for JSON."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "sums"}
        return Stats.as_dict(self) | own
