"""Stage 6, the figures: what the pair knows and how many tokens a round of speculative decoding yields."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache


def gumbel(seed: int, position: int, rows: int, vocab_size: int) -> torch.Tensor:
    """Noise of shape (rows, vocab_size) that depends on (seed, position) alone, so two models can share it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
    uniform = torch.rand(rows, vocab_size, generator=generator).clamp_(1e-20, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))


@torch.inference_mode()
def write(model: Any, prefixes: torch.Tensor, length: int, temperature: torch.Tensor, seed: int) -> torch.Tensor:
    """Continue prefixes (rows, prefix) to (rows, length); temperature (rows, 1), 0 is greedy."""
    cache = DynamicCache(config=model.config)
    ids, step = prefixes, prefixes
    for position in range(prefixes.shape[1], length):
        # The cache by its place: what it is called depends on the version of transformers.
        logits = model(step, None, None, cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        noise = gumbel(seed, position, len(ids), logits.shape[-1]).to(logits.device)
        step = (logits + noise * temperature).argmax(-1, keepdim=True)
        ids = torch.cat([ids, step], dim=1)
    return ids


@torch.inference_mode()
def guesses(model: Any, ids: torch.Tensor, start: int, temperature: float, seed: int) -> torch.Tensor:
    """The tokens that `model` would pick with the shared noise, from position `start` on: (rows, length - start)."""
    logits = model(ids[:, :-1], use_cache=False).logits[:, start - 1 :].float()
    for index in range(logits.shape[1]):
        noise = gumbel(seed, start + index, len(ids), logits.shape[-1]).to(logits.device)
        logits[:, index] += temperature * noise
    return logits.argmax(-1)


def tokens_per_round(agree: torch.Tensor, lookahead: int) -> float:
    """Mean tokens a round, from agree (rows, positions): whether the draft's guess there is the target's token.

    The draft guesses along its own tokens, but a guess counts only while all before it were right, so it counts only
    where the draft's text is the target's. The agreement along the target's text therefore decides every round.
    """
    rounds = tokens = 0
    for row in agree.tolist():
        position = 0
        while position + lookahead < len(row):
            right = next((k for k in range(lookahead) if not row[position + k]), lookahead)
            position += right + 1
            tokens += right + 1
            rounds += 1
    return tokens / max(1, rounds)


@torch.inference_mode()
def held_out_figures(target: Any, draft: Any, texts: list[torch.Tensor]) -> dict[str, float]:
    """Losses in nats a token and top-1 agreement, along the held-out texts."""
    totals = torch.zeros(3, dtype=torch.float64)
    count = 0
    for ids in texts:
        p, q = (m(ids[None, :-1], use_cache=False).logits[0].float() for m in (target, draft))
        totals[0] += F.cross_entropy(p, ids[1:], reduction="sum").item()
        totals[1] += F.cross_entropy(q, ids[1:], reduction="sum").item()
        totals[2] += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += len(ids) - 1
    names = ("target_loss", "draft_loss", "agreement_on_held_out_text")
    return {name: round(value / count, 4) for name, value in zip(names, totals.tolist(), strict=True)}


def measure(target: Any, draft: Any, texts: list[torch.Tensor], prefix: int = 256, length: int = 512) -> dict[str, Any]:
    """All figures of the card. Texts: ids of the held-out prompts; each is continued from its first `prefix` tokens."""
    figures: dict[str, Any] = held_out_figures(target, draft, texts)
    prefixes = torch.stack([ids[:prefix] for ids in texts if len(ids) >= prefix])
    for name, temperature in (("greedy", 0.0), ("coupled_temperature_1", 1.0)):
        heat = torch.full((len(prefixes), 1), temperature, device=prefixes.device)
        ids = write(target, prefixes, length, heat, seed=1)
        agree = guesses(draft, ids, prefix, temperature, seed=1) == ids[:, prefix:]
        figures[name] = {
            "agreement": round(agree.float().mean().item(), 4),
            "tokens_per_round": {k: round(tokens_per_round(agree, k), 3) for k in (3, 5, 7)},
        }
    return figures
