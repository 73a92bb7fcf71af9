"""From a model's logits to the scores whose argmax is the sampled token; the same code for target and draft.

Order: penalties (a module of their own), temperature, top-k, top-p, min-p, then the noise. Each filter sees the
distribution that the ones before it left, as in transformers. Every step treats rows alike and separately, so scores do
not depend on what shares a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np
import torch
from torch import Tensor

from ssd_ray.config import SamplingParams

# 1 / temperature must stay finite in float32. The law is that of greedy decoding long before.
_COLDEST = 1e-20
# The largest logits, which top-p looks at before it sorts a whole vocabulary.
_HEAD = 256
# Tokens of which one maximum is taken, and scores from which on that pays, when the best are looked for.
_STRIPE, _MANY = 16, 1 << 14


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
    if 0 < params.top_k < logits.shape[-1]:
        _keep_top_k(scaled, params.top_k)
    if params.top_p < 1.0:
        _keep_top_p(scaled, params.top_p)
    if params.min_p > 0.0:
        _keep_min_p(scaled, params.min_p)
    return scaled if noise is None else scaled.add_(noise)


def scores_by_row(logits: Tensor, params: Sequence[SamplingParams], noise: Tensor | None = None) -> Tensor:
    """Do the same for R rows with one SamplingParams each and noise [R, V]: rows that agree are scored together.

    Penalties, which depend on a sequence's tokens, have been applied to the logits before.
    """
    groups: dict[tuple[float, ...], list[int]] = {}
    for row, each in enumerate(params):
        groups.setdefault((each.temperature, each.top_k, each.top_p, each.min_p), []).append(row)
    if len(groups) == 1:
        return scores(logits, params[0], noise)
    result = torch.empty_like(logits)
    for rows in groups.values():
        index = torch.tensor(rows, device=logits.device)
        result[index] = scores(logits[index], params[rows[0]], None if noise is None else noise[index])
    return result


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest scores of each row, float32 [R, count], best first, and their tokens, int64 [R, count]."""
    rows, vocab_size = scores.shape
    stride = vocab_size // _STRIPE
    if scores.is_cuda or scores.numel() < _MANY or count > stride:
        best = scores.topk(count)
        return best.values, best.indices
    # Stripes of tokens t, t + stride, ..: whichever are among the best lie in the stripes with the largest maxima, and
    # maxima are found many times faster than an order.
    whole = stride * _STRIPE
    maxima = scores[:, :whole].view(rows, _STRIPE, stride).amax(1)
    first = maxima.topk(count, sorted=False).indices  # [R, count]
    tokens = (first[:, None] + torch.arange(0, whole, stride)[:, None]).flatten(1)  # [R, _STRIPE * count]
    if whole < vocab_size:
        tokens = torch.cat([tokens, torch.arange(whole, vocab_size).expand(rows, -1)], -1)
    values, places = scores.gather(-1, tokens).topk(count)
    return values, tokens.gather(-1, places)


def _keep_top_k(logits: Tensor, top_k: int) -> None:
    smallest = logits.topk(top_k).values[:, -1:]
    _bar_below(logits, smallest, torch.full_like(smallest, top_k, dtype=torch.int64))


def _keep_top_p(logits: Tensor, top_p: float) -> None:
    peak = logits.amax(-1, keepdim=True)
    # Masses are added in float64, so that the order of additions, which differs between shapes, has no say.
    needed = top_p * (logits - peak).exp_().sum(-1, keepdim=True, dtype=torch.float64)  # [R, 1]
    # A GPU sorts everything at once: it is fast at that, and asking it whether a head suffices would stall it.
    if logits.is_cuda or logits.shape[-1] <= _HEAD:
        smallest, kept = _nucleus(_sorted(logits), peak, needed)
    else:
        smallest, kept = _nucleus(logits.topk(_HEAD).values, peak, needed)
        short = (kept == _HEAD).squeeze(-1)  # [R]
        if bool(short.any()):
            smallest[short], kept[short] = _nucleus(_sorted(logits[short]), peak[short], needed[short])
    _bar_below(logits, smallest, kept)


def _sorted(logits: Tensor) -> Tensor:
    """Sort rows, falling. On a CPU torch sorts indices along and takes five times as long as NumPy."""
    if logits.is_cuda:
        return logits.sort(descending=True).values
    return torch.from_numpy(np.sort(logits.detach().numpy(), axis=-1)).flip(-1)


def _nucleus(ordered: Tensor, peak: Tensor, needed: Tensor) -> tuple[Tensor, Tensor]:
    """Find the smallest set of logits with the needed mass, or all of ``ordered`` [R, H] if that has less.

    Returns the smallest logit of the set, [R, 1], and its size, int64 [R, 1].
    """
    mass = (ordered[:, :-1] - peak).exp_().cumsum(-1, dtype=torch.float64)
    # A token belongs to the set if those before it fall short.
    kept = (mass < needed).sum(-1, keepdim=True) + 1
    return ordered.gather(-1, kept - 1), kept


def _keep_min_p(logits: Tensor, min_p: float) -> None:
    floor = logits.amax(-1, keepdim=True) + log(min_p)
    logits.masked_fill_(logits < floor, -torch.inf)


def _bar_below(logits: Tensor, smallest: Tensor, kept: Tensor) -> None:
    """Keep the ``kept`` [R, 1] largest logits of each row, the last of which equals ``smallest`` [R, 1]."""
    barred = logits < smallest
    if logits.is_cuda or int(barred.sum()) + int(kept.sum()) < logits.numel():
        # Some of those that equal the smallest are too many: the higher ids go.
        ties = logits == smallest
        allowed = kept - (logits > smallest).sum(-1, keepdim=True)
        barred |= ties & (ties.cumsum(-1) > allowed)
    logits.masked_fill_(barred, -torch.inf)
