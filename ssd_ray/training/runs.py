"""A training run: steps that are seeded, counted and can be resumed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssd_ray.errors import StoppedError
from ssd_ray.training.schedules import Schedule, optimizers, trained
from ssd_ray.training.workers import Batches, Inline, Workers, employ

SAVE_EVERY = 60.0
"""Seconds between two checkpoints."""


@dataclass
class Run:
    """A training run: everything that a checkpoint holds.

    Attributes:
        model: what is trained, where its weights ask for gradients.
        optimizers: what moves them.
        step, row: steps taken, and rows used up.
        changed_at: step at which the model was last changed otherwise.
        tokens: that were seen.
        history: (step, loss) now and then.
    """

    model: Any
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    row: int = 0
    changed_at: int = 0
    tokens: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)

    @property
    def layers(self) -> int:
        """How deep the model is."""
        return len(self.model.model.layers)

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "layers": self.layers, "weights": trained(self.model), "step": self.step, "row": self.row,
            "optimizers": [o.state_dict() for o in self.optimizers], "changed_at": self.changed_at,
            "tokens": self.tokens, "history": self.history,
        }  # fmt: skip
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)


def load_run(path: Path, make: Callable[[int], Any], layers: int, schedule: Schedule) -> Run:
    """The run that the checkpoint at ``path`` holds, or a new one.

    Args:
        make: makes the model of a depth, as it is before it is trained, the same each time.
        layers: the depth of a new one.
    """
    state = torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None
    model = make(state["layers"] if state else layers)
    if state:
        with torch.no_grad():
            for name, weight in trained(model).items():
                weight.copy_(state["weights"][name])
    run = Run(model, optimizers(model, schedule))
    if state:
        for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        run.step, run.row, run.changed_at = state["step"], state["row"], state["changed_at"]
        run.tokens, run.history = state["tokens"], state["history"]
    return run


def train(
    run: Run,
    schedule: Schedule,
    batches: Batches,
    checkpoint: Path | None = None,
    processes: int = 1,
    *,
    name: str = "training",
    until: int | None = None,
) -> Run:
    """Run the rest of the schedule. A checkpoint is written every minute, on SIGTERM and Ctrl-C, and at the end.

    Args:
        checkpoint: its file; None keeps nothing.
        processes: that compute gradients; one is this.
        name: what the progress bar says.
        until: a step to stop at; None is the last.

    Raises:
        StoppedError: a signal came.
    """
    last = schedule.steps if until is None else until
    saved = time.monotonic()
    recent: list[float] = []
    run.model.train()
    with stop_asked() as stop, progress_bar() as progress, closing(employ(run.model, batches, processes)) as workers:
        task = progress.add_task(name, total=schedule.steps, completed=run.step, figures="")
        while run.step < last and not stop():
            recent = [*recent[-49:], train_step(run, schedule, workers)]
            mean = sum(recent) / len(recent)
            progress.update(task, completed=run.step, figures=f"loss {mean:.3f}")
            if run.step % 50 == 0:
                run.history.append((run.step, mean))
            if checkpoint and time.monotonic() - saved > SAVE_EVERY:
                run.save(checkpoint)
                saved = time.monotonic()
    run.model.eval()
    if checkpoint:
        run.save(checkpoint)
    if stop():  # also behind the last step: who asked for an end is not heard by what follows
        raise StoppedError(f"{name}: stopped at step {run.step} of {schedule.steps}; the same command goes on")
    return run


def train_step(run: Run, schedule: Schedule, workers: Workers | Inline) -> float:
    """One optimizer step; returns the loss."""
    length = schedule.length(run.step)
    rows = max(1, schedule.tokens_per_step // length)
    loss = workers.gradients(run.model, run.row, rows, length)
    torch.nn.utils.clip_grad_norm_(trained(run.model).values(), 1.0)
    factor = schedule.factor(run.step, run.step - run.changed_at)
    run.optimizers[0].orthogonalise = workers.orthogonalise  # type: ignore[attr-defined]
    rates = (*([schedule.matrix_lr] if len(run.optimizers) > 1 else []), schedule.vector_lr)
    for optimizer, rate in zip(run.optimizers, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = (rate or 0.0) * factor
        optimizer.step()
        optimizer.zero_grad()
    run.step, run.row, run.tokens = run.step + 1, run.row + rows, run.tokens + rows * length
    return loss


def progress_bar() -> Progress:
    """Steps, a figure and the time that is left, on standard error if that is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and Ctrl-C into a question that a loop asks between two steps."""
    asked: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, lambda number, _frame: asked.append(number)) for kind in kinds]
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
