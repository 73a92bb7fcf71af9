"""How fast a model learns at which step, and what moves its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssd_ray.models.dtypes import has_instructions


@dataclass(frozen=True, slots=True)
class Schedule:
    """Warm-up, stable, linear decay to zero, in steps.

    Attributes:
        lengths: tokens of a row, until which step: ((length, until), ..); the last ``until`` is the number of steps.
        decay_from: step at which the rates begin to fall.
        tokens_per_step: tokens of a batch.
        long_every, long_length: every so many steps a row has this length.
        warmup: steps in which the rates rise.
        matrix_lr: Muon's rate for the matrices inside the layers; None trains them as all the others.
        vector_lr: AdamW's rate.
    """

    lengths: tuple[tuple[int, int], ...]
    decay_from: int
    tokens_per_step: int = 4096
    long_every: int = 8
    long_length: int = 2048
    warmup: int = 40
    matrix_lr: float | None = 0.02
    vector_lr: float = 4e-3

    @property
    def steps(self) -> int:
        """All of them."""
        return self.lengths[-1][1]

    def length(self, step: int) -> int:
        """Tokens of a row."""
        if step % self.long_every == self.long_every - 1:
            return self.long_length
        return next(length for length, until in self.lengths if step < until)

    def factor(self, step: int, since_change: int) -> float:
        """Multiplier of the rates: warmed again for a moment after every change of the model."""
        decay = min(1.0, (self.steps - step) / max(1, self.steps - self.decay_from))
        return min(1.0, (since_change + 1) / self.warmup) * decay


def trained(model: Any) -> dict[str, Tensor]:
    """The weights that learn, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def matrices(model: Any) -> list[Tensor]:
    """What Muon trains: the matrices inside the layers. AdamW takes the embeddings and the norms."""
    outside = ("embed", "lm_head")
    return [p for name, p in trained(model).items() if p.ndim == 2 and not any(word in name for word in outside)]


def optimizers(model: Any, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon, if the schedule has a rate for it, and AdamW."""
    rate = schedule.matrix_lr or 0.0
    inner = matrices(model) if rate else []
    others = [p for p in trained(model).values() if all(p is not q for q in inner)]
    adam = torch.optim.AdamW(others, lr=schedule.vector_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [*([SharedMuon(inner, lr=rate, weight_decay=0.05, momentum=0.95)] if inner else []), adam]


class SharedMuon(torch.optim.Muon):
    """Muon, but whoever steps it may hand the costly part, the orthogonalisation, to worker processes."""

    orthogonalise: Callable[[list[Tensor]], list[Tensor]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every matrix by its orthogonal update."""
        group = self.param_groups[0]
        updates = []
        for p in group["params"]:
            average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            average.lerp_(p.grad, 1 - group["momentum"])
            updates.append(p.grad.lerp(average, group["momentum"]))
        for p, update in zip(group["params"], self.orthogonalise(updates), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, about: five Newton-Schulz steps (Jordan et al., 2024)."""
    x = update.bfloat16() if update.shape[0] <= update.shape[1] else update.bfloat16().T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x if update.shape[0] <= update.shape[1] else x.T
    return result.to(update.dtype)


def precision(device: torch.device) -> torch.dtype:
    """In what products are computed: half precision where the device has instructions for it."""
    return torch.bfloat16 if device.type != "cpu" or has_instructions(torch.bfloat16) else torch.float32
