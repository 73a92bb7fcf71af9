"""What an engine tells Ray's metrics agents, and so Prometheus: counters and histograms, once a request, not by token.

A metric that means what one of vLLM's means has its name, as vLLM spells it on Ray, which takes no colons; the others
begin with ``ssd_ray_``. Ray exports all of them with ``ray_`` before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from ray.util import metrics

from ssd_ray.wire import RequestStats

MODEL = "model_name"

Figures = Callable[[RequestStats], float]
Parts = Callable[[RequestStats], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended.

    Attributes:
        reason: its finish reason.
        stats: its figures.
        seconds: from its submission to its end; ``first_seconds`` to its first token, None if it has none.
    """

    reason: str
    stats: RequestStats
    seconds: float
    first_seconds: float | None


def _tokens(histogram: Iterable[int]) -> int:
    """Tokens in rounds, of which entry k counts those with k."""
    return sum(tokens * rounds for tokens, rounds in enumerate(histogram))


def accepted_by_position(accepted: tuple[int, ...]) -> dict[str, float]:
    """Rounds that accepted the token at each position of a speculation, the first being 0."""
    return {str(position): sum(accepted[position + 1 :]) for position in range(len(accepted) - 1)}


_COUNTERS: Mapping[str, tuple[str, Figures]] = {
    "vllm_prompt_tokens": ("Tokens of prompts.", lambda stats: stats.prompt_tokens),
    "vllm_generation_tokens": ("Tokens generated.", lambda stats: stats.tokens),
    "vllm_prefix_cache_queries": ("Tokens looked for in the prefix cache.", lambda stats: stats.prompt_tokens),
    "vllm_prefix_cache_hits": ("Tokens found there.", lambda stats: stats.cached_tokens),
    "vllm_num_preemptions": ("Times that a request gave its memory back.", lambda stats: stats.preemptions),
    "vllm_spec_decode_num_drafts": ("Speculations verified.", lambda stats: sum(stats.speculated[1:])),
    "vllm_spec_decode_num_draft_tokens": ("Tokens in them.", lambda stats: _tokens(stats.speculated)),
    "vllm_spec_decode_num_accepted_tokens": ("Tokens accepted.", lambda stats: _tokens(stats.accepted)),
    "ssd_ray_rounds": ("Verifications.", lambda stats: stats.rounds),
    "ssd_ray_hits": ("Rounds that began with a prepared speculation.", lambda stats: stats.hits),
    "ssd_ray_verified_tokens": ("Tokens run by verifications.", lambda stats: stats.verified),
    "ssd_ray_resumed_tokens": ("Tokens that came from a target which then died.", lambda stats: stats.resumed_tokens),
    "ssd_ray_tree_tokens": ("Tokens that drafts sent.", lambda stats: stats.tree_tokens),
    "ssd_ray_tree_tokens_used": ("Those verified, or guessed right.", lambda stats: stats.tree_used),
    "ssd_ray_verify_seconds": ("Seconds inside verifications.", lambda stats: stats.verify_ms / 1e3),
    "ssd_ray_wait_seconds": ("Seconds of waiting for drafts.", lambda stats: stats.wait_ms / 1e3),
    "ssd_ray_host_seconds": ("Seconds of rounds that were neither.", lambda stats: stats.host_ms / 1e3),
    "ssd_ray_prefill_seconds": ("Seconds of prefill.", lambda stats: stats.prefill_ms / 1e3),
    "ssd_ray_draft_seconds": ("Seconds of draft steps.", lambda stats: stats.draft_ms / 1e3),
    "ssd_ray_draft_seconds_used": ("Those that were of use.", lambda stats: stats.draft_used_ms / 1e3),
}

_COUNTERS_BY: Mapping[str, tuple[str, str, Parts]] = {
    "vllm_spec_decode_num_accepted_tokens_per_pos": (
        "Tokens accepted by their position in a speculation.",
        "position",
        lambda stats: accepted_by_position(stats.accepted),
    ),
    "ssd_ray_misses": (
        "Rounds that began without a prepared speculation.",
        "cause",
        lambda stats: msgspec.structs.asdict(stats.misses),
    ),
    "ssd_ray_backups": ("What was done about misses.", "kind", lambda stats: msgspec.structs.asdict(stats.backups)),
}

_TOKEN_BOUNDS = [float(2**power) for power in range(18)]
_SECOND_BOUNDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0]

_HISTOGRAMS: Mapping[str, tuple[str, list[float], Callable[[Ended], float | None]]] = {
    "vllm_request_prompt_tokens": ("Tokens of a prompt.", _TOKEN_BOUNDS, lambda ended: ended.stats.prompt_tokens),
    "vllm_request_generation_tokens": ("Tokens of a text.", _TOKEN_BOUNDS, lambda ended: ended.stats.tokens),
    "vllm_time_to_first_token_seconds": ("To the first token.", _SECOND_BOUNDS, lambda ended: ended.first_seconds),
    "vllm_e2e_request_latency_seconds": ("To the end of a request.", _SECOND_BOUNDS, lambda ended: ended.seconds),
}


class Metrics:
    """The metrics of an engine.

    Args:
        model: tells engines apart, as the tag "model_name".
    """

    def __init__(self, model: str) -> None:
        self._tags = {MODEL: model}
        made = self._made
        self._counters = [(made(metrics.Counter, name, text), figure) for name, (text, figure) in _COUNTERS.items()]
        self._by = [
            (made(metrics.Counter, name, text, by), by, parts) for name, (text, by, parts) in _COUNTERS_BY.items()
        ]
        self._ends = made(metrics.Counter, "vllm_request_success", "Requests that have ended.", "finished_reason")
        self._histograms = [
            (made(metrics.Histogram, name, text, boundaries=bounds), value)
            for name, (text, bounds, value) in _HISTOGRAMS.items()
        ]

    def _made(self, kind: Any, name: str, text: str, *by: str, **options: Any) -> Any:
        made = kind(name, description=text, tag_keys=(MODEL, *by), **options)
        made.set_default_tags(self._tags)
        return made

    def ended(self, ended: Ended) -> None:
        """Count a request that has ended."""
        for counter, figure in self._counters:
            _add(counter, figure(ended.stats), {})
        for counter, by, parts in self._by:
            for part, number in parts(ended.stats).items():
                _add(counter, number, {by: part})
        _add(self._ends, 1, {"finished_reason": ended.reason})
        for histogram, value in self._histograms:
            if (observed := value(ended)) is not None:
                histogram.observe(observed)


def _add(counter: Any, number: float, tags: dict[str, str]) -> None:
    if number > 0:  # nothing is no increment
        counter.inc(number, tags=tags)
