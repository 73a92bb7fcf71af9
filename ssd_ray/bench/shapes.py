"""What the fixed shape of the target's forwards costs: 8 tokens every time, against as many as are needed."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import torch

from ssd_ray.models.contract import ModelRunner


def forward_ms(runner: ModelRunner, shapes: tuple[int, ...], *, start: int, repeats: int = 40) -> dict[int, float]:
    """Median milliseconds of a forward over T tokens after ``start`` tokens, for each T, measured in turn."""
    times: dict[int, list[float]] = {tokens: [] for tokens in shapes}
    inputs = {tokens: torch.ones(1, tokens, dtype=torch.int64) for tokens in shapes}
    runner.prefill(0, [1] * start)
    for repeat in range(repeats + 3):
        for tokens in shapes:
            began = perf_counter()
            runner.append([0], inputs[tokens], [start])
            if repeat >= 3:
                times[tokens].append(1e3 * (perf_counter() - began))
    return {tokens: median(values) for tokens, values in times.items()}


def equal_rows(runner: ModelRunner, shapes: tuple[int, ...], *, start: int) -> dict[int, bool]:
    """Whether the first token's logits in a forward over T tokens are bit for bit those in one over the last T."""
    runner.prefill(0, [1] * start)
    logits: dict[int, Any] = {}
    for tokens in shapes:
        inputs = torch.arange(2, 2 + tokens)[None]
        logits[tokens] = runner.append([0], inputs, [start])[0, 0].clone()
    reference = logits[shapes[-1]]
    return {tokens: bool(torch.equal(value, reference)) for tokens, value in logits.items()}
