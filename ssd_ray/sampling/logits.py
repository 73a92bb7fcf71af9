"""From a model's logits to the scores whose argmax is the sampled token; the same code for target and draft.

Order: temperature, top-k, top-p, min-p, then the noise. Each filter sees the distribution that the ones before it left,
as in transformers. Every step treats rows alike and separately, so scores do not depend on what shares a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

from ssd_ray.config import SamplingParams

# 1 / temperature must stay finite in float32. The law is that of greedy decoding long before.
_COLDEST = 1e-20
# Tokens looked at before the whole vocabulary is sorted.
_HEAD = 256


def scores(logits: Tensor, params: SamplingParams, noise: Tensor | None = None) -> Tensor:
    """Score tokens so that ``scores(...).argmax(-1)`` samples from the filtered softmax of the logits.

    Args:
        logits: float32 [R, V], below 1e18; -inf bars a token. Not changed.
        params: temperature, top_k, top_p and min_p of all rows.
        noise: Gumbel noise, float32 [R, V] or [1, V]; None gives the filtered logits, divided by the temperature.

    Returns:
        float32 [R, V], -inf where a filter removed the token; of equal logits filters keep the lower ids. At
        temperature 0 this is ``logits`` itself, whatever the noise.
    """
    if params.greedy:
        return logits
    # Multiplied, not divided: CPU and CUDA then round alike.
    scaled = logits * (1.0 / max(params.temperature, _COLDEST))
    top_k = params.top_k if 0 < params.top_k < logits.shape[-1] else 0
    if top_k or params.top_p < 1.0:
        scaled = _keep_head(scaled, top_k, params.top_p)
    if params.min_p > 0.0:
        floor = scaled.amax(-1, keepdim=True) + log(params.min_p)
        scaled = scaled.masked_fill_(scaled < floor, -torch.inf)
    return scaled if noise is None else scaled.add_(noise)


def scores_by_row(logits: Tensor, params: Sequence[SamplingParams], noise: Tensor | None = None) -> Tensor:
    """Like :func:`scores` for R rows with one SamplingParams each: rows that agree are scored together."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for row, each in enumerate(params):
        key = (0.0,) if each.greedy else (each.temperature, each.top_k, each.top_p, each.min_p)
        groups.setdefault(key, []).append(row)
    if len(groups) == 1:
        return scores(logits, params[0], noise)
    result = torch.empty_like(logits)
    for rows in groups.values():
        index = torch.tensor(rows, device=logits.device)
        result[index] = scores(logits[index], params[rows[0]], None if noise is None else noise[index])
    return result


def _keep_head(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Bar all but the top k (0: all) and of those all but the smallest set that has mass ``top_p``; reuses logits."""
    if not logits.is_cuda and top_k < _HEAD < logits.shape[-1]:
        head = logits.topk(_HEAD).values
        keep = _head_size(head, logits, top_k, top_p)
        last = head.gather(-1, keep - 1)
        # The head suffices if what comes after the last token kept is seen, and differs from it.
        after = head.gather(-1, keep.clamp(max=_HEAD - 1))
        if bool(((after < last) | (last == -torch.inf)).all()):
            return logits.masked_fill_(logits < last, -torch.inf)
    return _keep_sorted(logits, top_k, top_p)


def _keep_sorted(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Do the same by sorting; the only way that breaks ties, and on a GPU the one that needs no answer from it."""
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    keep = _head_size(ordered, logits, top_k, top_p)
    barred = torch.arange(logits.shape[-1], device=logits.device) >= keep  # [R, V], by rank
    return logits.masked_fill_(torch.empty_like(barred).scatter_(-1, ids, barred), -torch.inf)


def _head_size(ordered: Tensor, logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Count the tokens to keep, int64 [R, 1], given the largest logits in falling order, [R, H]."""
    if top_k:
        ordered = ordered[:, :top_k]
    if top_p >= 1.0:
        return torch.full_like(ordered[:, :1], ordered.shape[-1], dtype=torch.int64)
    peak = ordered[:, :1]
    mass = (ordered - peak).exp_()
    total = (mass if top_k else (logits - peak).exp_()).sum(-1, keepdim=True, dtype=torch.float64)
    # A token belongs to the smallest set if those before it have not reached top_p. In float64, so that the order of
    # additions, which differs between devices and shapes, has no say.
    before = mass[:, :-1].cumsum(-1, dtype=torch.float64)
    return (before < top_p * total).sum(-1, keepdim=True) + 1
