"""Stage 6, the figures: what the pair knows and how many tokens a round of speculative decoding yields."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ssd_ray.training.acceptance import figures
from ssd_ray.training.lessons import HEATS, write


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
    prefixes = torch.stack([ids[:prefix] for ids in texts if len(ids) >= prefix]).repeat_interleave(len(HEATS), dim=0)
    heats = torch.tensor(HEATS).repeat(len(prefixes) // len(HEATS))
    exam = write(target, prefixes, prefix, length, heats, torch.arange(len(prefixes)))
    return held_out_figures(target, draft, texts) | figures(draft, exam, prefix)
