"""Log-probabilities of tokens under the target's own distribution: before penalties, temperature and filters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def logprobs(logits: Tensor, tokens: Sequence[int], most: int) -> list[tuple[int, float, int, dict[int, float]]]:
    """Look up tokens and the likeliest ones at their positions.

    Args:
        logits: float32 [R, V], the n tokens' own in the first rows.
        tokens: n token ids.
        most: how many of the likeliest tokens are named.

    Returns:
        For each token its id, log-probability in nats, rank (1: no token is likelier), and the likeliest tokens with
        their log-probabilities, best first.
    """
    values = logits[: len(tokens)].log_softmax(-1)  # [n, V]
    own = values.gather(-1, torch.tensor(tokens, dtype=torch.int64, device=values.device)[:, None])  # [n, 1]
    ranks = 1 + (values > own).sum(-1)  # [n]
    top = values.topk(min(most, values.shape[-1]))  # [n, most]
    likeliest = [dict(zip(*row, strict=True)) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    return list(zip(tokens, own[:, 0].tolist(), ranks.tolist(), likeliest, strict=True))
