"""What a draft is worth to its target: how many tokens a round yields, along texts that the target wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd_ray.training.lessons import HEATS, Law

LOOKAHEADS = (3, 5, 7)


@torch.inference_mode()
def accepted(draft: Any, lesson: np.ndarray, first: int, rows_at_once: int = 8) -> np.ndarray:
    """How likely the draft's guess is the target's token, at each position of texts from ``first`` on.

    A greedy guess is right or wrong. At temperature 1, where both add the same noise, the chance that both choose token
    i is 1 / sum_j max(p_j / p_i, q_j / q_i).

    Args:
        lesson: [rows, length] as :func:`~ssd_ray.training.lessons.write` returns it; row r was written at temperature
            ``HEATS[r % len(HEATS)]``.

    Returns:
        float64 [rows, length - first], from 0 to 1; NaN where nothing counts.
    """
    device = next(draft.parameters()).device
    found = np.full((len(lesson), lesson.shape[1] - first), np.nan)
    for start in range(0, len(lesson), rows_at_once):
        part = np.array(lesson[start : start + rows_at_once, first - 1 : -1])
        whole = np.array(lesson[start : start + rows_at_once, :-1])
        whole["counts"][:, : first - 1] = False
        law = Law.of(whole, device)
        chances = _chances(draft, law, _heats(start, part))
        found[start : start + rows_at_once][part["counts"]] = chances.double().cpu().numpy()
    return found


def _heats(start: int, part: np.ndarray) -> Tensor:
    """The temperature of each position that counts."""
    heats = np.array([HEATS[(start + row) % len(HEATS)] for row in range(len(part))])
    return torch.from_numpy(np.broadcast_to(heats[:, None], part.shape)[part["counts"]])


def _chances(draft: Any, law: Law, heats: Tensor) -> Tensor:
    logits = draft.lm_head(law.hidden(draft)).float()
    greedy = (logits.argmax(-1) == law.top[:, 0]).float()
    q = (logits.gather(1, law.top) - logits.logsumexp(-1, keepdim=True)).exp().clamp(min=1e-30)
    p = law.p.clamp(min=1e-30)
    p_all, q_all = (torch.cat([x, (1 - x.sum(-1, keepdim=True)).clamp(min=0)], dim=-1) for x in (p, q))
    ratio = torch.maximum(p_all[:, None] / p[..., None], q_all[:, None] / q[..., None])  # [counted, top, top + 1]
    return torch.where(heats.to(logits.device) > 0, (1 / ratio.sum(-1)).sum(-1).clamp(max=1), greedy)


def tokens_per_round(accepted: np.ndarray, lookahead: int) -> float:
    """Mean tokens of a round.

    The draft guesses along its own tokens, but a guess counts only while all before it were right, so it counts only
    where the draft's text is the target's. The chances along the target's text therefore decide every round. ``begun``
    is the chance that a round begins at a position.

    Args:
        accepted: chances [rows, positions]; a row ends at its first NaN.
    """
    rounds = tokens = 0.0
    for row in accepted:
        length = int(np.argmax(np.isnan(row))) if np.isnan(row).any() else len(row)
        begun = np.zeros(length + lookahead + 1)
        begun[0] = 1.0
        for at in range(max(0, length - lookahead)):
            going = begun[at]
            for k in range(lookahead):
                begun[at + k + 1] += going * (1 - row[at + k])
                going *= row[at + k]
                tokens += going
            begun[at + lookahead + 1] += going
            tokens += begun[at]
            rounds += begun[at]
    return tokens / max(1.0, rounds)


def figures(draft: Any, lesson: np.ndarray, first: int) -> dict[str, dict[str, Any]]:
    """Acceptance and tokens of a round, greedy and at temperature 1; arguments as in :func:`accepted`."""
    chances = accepted(draft, lesson, first)
    rows = {"greedy": chances[0 :: len(HEATS)], "temperature_1": chances[1 :: len(HEATS)]}
    return {
        name: {
            "acceptance": round(float(np.nanmean(each)), 4),
            "tokens_per_round": {str(k): round(tokens_per_round(each, k), 3) for k in LOOKAHEADS},
        }
        for name, each in rows.items()
    }
