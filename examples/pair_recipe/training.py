"""Stage 3, training: phases that grow the model, Muon and AdamW, steps that are seeded and can be resumed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F

from pair_recipe.models import Shape, grow, new_model

LossOf = Callable[[Any, torch.Tensor], torch.Tensor]  # (model, ids of shape (rows, length)) -> scalar


@dataclass(frozen=True)
class Phase:
    """Train at a depth until a global step. Growing from shallow to deep buys most of the tokens at a low price."""

    layers: int
    until: int
    length: int


@dataclass(frozen=True)
class Schedule:
    """Warm-up, stable, linear decay to zero, in steps."""

    phases: tuple[Phase, ...]
    decay_from: int
    tokens_per_step: int = 4096
    long_every: int = 8  # every so many steps are taken at the full context length
    long_length: int = 2048
    warmup: int = 40
    matrix_lr: float = 0.02
    vector_lr: float = 4e-3

    @property
    def steps(self) -> int:
        return self.phases[-1].until

    def phase(self, step: int) -> Phase:
        return next(p for p in self.phases if step < p.until)

    def length(self, step: int) -> int:
        return self.long_length if step % self.long_every == self.long_every - 1 else self.phase(step).length

    def factor(self, step: int, since_growth: int) -> float:
        """Multiplier of the learning rates: re-warmed for a moment after every growth."""
        decay = min(1.0, (self.steps - step) / max(1, self.steps - self.decay_from))
        return min(1.0, (since_growth + 1) / self.warmup) * decay


def matrices(model: Any) -> list[torch.Tensor]:
    """What Muon trains: the matrices inside the layers. AdamW takes the embeddings and the norms."""
    return [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]


def optimizers(model: Any, schedule: Schedule) -> list[torch.optim.Optimizer]:
    inner = matrices(model)
    others = [p for p in model.parameters() if all(p is not q for q in inner)]
    return [
        SharedMuon(inner, lr=schedule.matrix_lr, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=schedule.vector_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class SharedMuon(torch.optim.Muon):
    """Muon, but whoever steps it may hand the costly part, the orthogonalisation, to worker processes."""

    orthogonalise: Callable[[list[torch.Tensor]], list[torch.Tensor]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        updates = []
        for p in group["params"]:
            average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            average.lerp_(p.grad, 1 - group["momentum"])
            updates.append(p.grad.lerp(average, group["momentum"]))
        for p, update in zip(group["params"], self.orthogonalise(updates), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(update: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, about: five Newton-Schulz steps (Jordan et al., 2024)."""
    x = update.bfloat16() if update.shape[0] <= update.shape[1] else update.bfloat16().T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x if update.shape[0] <= update.shape[1] else x.T).to(update.dtype)


def windows(corpus: np.ndarray, counter: int, rows: int, length: int) -> torch.Tensor:
    """Rows number counter, counter + 1, ... of the corpus: golden-ratio offsets cover it evenly without a shuffle."""
    offsets = [int((counter + r) * 0.6180339887498949 % 1.0 * (len(corpus) - length)) for r in range(rows)]
    return torch.from_numpy(np.stack([corpus[o : o + length] for o in offsets]).astype(np.int64))


def next_token_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats a token."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@dataclass
class Run:
    """A training run: everything that a checkpoint holds."""

    model: Any
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    counter: int = 0
    grown_at: int = 0
    tokens: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        state = {
            "layers": len(self.model.model.layers), "model": self.model.state_dict(), "step": self.step,
            "optimizers": [o.state_dict() for o in self.optimizers], "counter": self.counter,
            "grown_at": self.grown_at, "tokens": self.tokens, "history": self.history,
        }  # fmt: skip
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)


def load_run(path: Path, shape: Shape, schedule: Schedule, vocab_size: int, device: torch.device) -> Run:
    """The run that the checkpoint at `path` holds, or a new one."""
    state = torch.load(path, weights_only=True) if path.exists() else None
    layers = state["layers"] if state else schedule.phases[0].layers
    model = new_model(shape, layers, vocab_size, schedule.long_length)
    if state:
        model.load_state_dict(state["model"])
    model.to(device)
    run = Run(model, optimizers(model, schedule))
    if state:
        for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        run.step, run.counter, run.grown_at = state["step"], state["counter"], state["grown_at"]
        run.tokens, run.history = state["tokens"], state["history"]
    return run


@dataclass
class Desk:
    """The memory that a training process and its workers share."""

    model: Any
    corpus: Path
    loss_of: LossOf
    grads: list[list[torch.Tensor]]  # one list a worker
    updates: list[torch.Tensor]  # one for each of Muon's matrices
    losses: torch.Tensor
    job: torch.Tensor  # kind, counter, rows, length
    begin: Any  # barriers
    end: Any
    taken: Any  # the next piece that nobody has taken

    def pieces(self, total: int, size: int) -> Iterator[int]:
        """First items of the pieces that this worker gets."""
        while True:
            with self.taken.get_lock():
                first, self.taken.value = self.taken.value, self.taken.value + size
            if first >= total:
                return
            yield first


GRADIENTS, ORTHOGONALISE, STOP = range(3)


class Workers:
    """Single-threaded processes that share the model and deal themselves the pieces of a batch.

    Two threads inside one process meet at a barrier in every operator, so one busy core slows the whole step down many
    times. Processes that take the next piece when they are free meet twice a step and lose only the core that is gone.
    """

    def __init__(self, count: int, model: Any, loss_of: LossOf, corpus: Path) -> None:
        context = torch.multiprocessing.get_context("spawn")
        model.share_memory()
        self.desk = Desk(
            model=model,
            corpus=corpus,
            loss_of=loss_of,
            grads=[[torch.zeros_like(p).share_memory_() for p in model.parameters()] for _ in range(count)],
            updates=[torch.zeros_like(p).share_memory_() for p in matrices(model)],
            losses=torch.zeros(count, dtype=torch.float64).share_memory_(),
            job=torch.zeros(4, dtype=torch.int64).share_memory_(),
            begin=context.Barrier(count + 1),
            end=context.Barrier(count + 1),
            taken=context.Value("q", 0),
        )
        self.processes = [context.Process(target=work, args=(i, self.desk), daemon=True) for i in range(count)]
        for process in self.processes:
            process.start()

    def do(self, *job: int) -> None:
        self.desk.job[: len(job)] = torch.tensor(job)
        self.desk.taken.value = 0
        self.desk.begin.wait()
        if job[0] != STOP:
            self.desk.end.wait()

    def gradients(self, model: Any, counter: int, rows: int, length: int) -> float:
        """Fill the gradients of `model` from rows of the corpus; returns the mean loss."""
        self.do(GRADIENTS, counter, rows, length)
        for parameter, *grads in zip(model.parameters(), *self.desk.grads, strict=True):
            parameter.grad = torch.stack(grads).sum(0)
        return self.desk.losses.sum().item()

    def orthogonalise(self, updates: list[torch.Tensor]) -> list[torch.Tensor]:
        for shared, update in zip(self.desk.updates, updates, strict=True):
            shared.copy_(update)
        self.do(ORTHOGONALISE)
        return self.desk.updates

    def close(self) -> None:
        self.do(STOP)
        for process in self.processes:
            process.join()


def work(index: int, desk: Desk) -> None:
    """A worker's life."""
    torch.set_num_threads(1)
    corpus = np.load(desk.corpus, mmap_mode="r")
    for parameter, grad in zip(desk.model.parameters(), desk.grads[index], strict=True):
        parameter.grad = grad
    while True:
        desk.begin.wait()
        kind, counter, rows, length = desk.job.tolist()
        if kind == STOP:
            return
        if kind == GRADIENTS:
            accumulate(index, desk, corpus, counter, rows, length)
        else:
            for i in desk.pieces(len(desk.updates), 1):
                desk.updates[i].copy_(orthogonal(desk.updates[i]))
        desk.end.wait()


def accumulate(index: int, desk: Desk, corpus: np.ndarray, counter: int, rows: int, length: int) -> None:
    for grad in desk.grads[index]:
        grad.zero_()
    desk.losses[index] = 0.0
    size = max(1, 1024 // length)
    for first in desk.pieces(rows, size):
        size = min(size, rows - first)
        with torch.autocast("cpu", torch.bfloat16):
            loss = desk.loss_of(desk.model, windows(corpus, counter + first, size, length)) * (size / rows)
        loss.backward()
        desk.losses[index] += loss.item()


class Inline:
    """The same contract in this process: for a GPU, or for one core."""

    def __init__(self, loss_of: LossOf, corpus_path: Path, device: torch.device) -> None:
        self.loss_of, self.corpus, self.device = loss_of, np.load(corpus_path, mmap_mode="r"), device

    def gradients(self, model: Any, counter: int, rows: int, length: int) -> float:
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.loss_of(model, windows(self.corpus, counter, rows, length).to(self.device))
        loss.backward()
        return loss.item()

    def orthogonalise(self, updates: list[torch.Tensor]) -> list[torch.Tensor]:
        return [orthogonal(update) for update in updates]

    def close(self) -> None:
        pass


def train_step(run: Run, schedule: Schedule, workers: Workers | Inline) -> float:
    """One optimizer step; returns the loss."""
    length = schedule.length(run.step)
    rows = schedule.tokens_per_step // length
    loss = workers.gradients(run.model, run.counter, rows, length)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    factor = schedule.factor(run.step, run.step - run.grown_at)
    run.optimizers[0].orthogonalise = workers.orthogonalise
    for optimizer, lr in zip(run.optimizers, (schedule.matrix_lr, schedule.vector_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        optimizer.step()
        optimizer.zero_grad()
    run.step, run.counter, run.tokens = run.step + 1, run.counter + rows, run.tokens + rows * length
    return loss


def grow_if_due(run: Run, shape: Shape, schedule: Schedule, device: torch.device) -> bool:
    layers = schedule.phase(run.step).layers
    if layers == len(run.model.model.layers):
        return False
    run.model = grow(run.model, shape, layers).to(device)
    run.optimizers, run.grown_at = optimizers(run.model, schedule), run.step
    return True


def train(
    run: Run, shape: Shape, schedule: Schedule, loss_of: LossOf, corpus: Path, checkpoint: Path, processes: int
) -> Run:
    """Run the rest of the schedule. A checkpoint is written every 90 seconds, on SIGTERM and at the end."""
    device = next(run.model.parameters()).device
    stop = Stop()
    saved = time.monotonic()
    recent: list[float] = []
    grow_if_due(run, shape, schedule, device)
    workers = employ(run.model, loss_of, corpus, device, processes)
    with progress_bar() as progress:
        task = progress.add_task(checkpoint.stem, total=schedule.steps, completed=run.step, loss=float("nan"))
        while run.step < schedule.steps and not stop.asked:
            if grow_if_due(run, shape, schedule, device):
                workers.close()
                workers = employ(run.model, loss_of, corpus, device, processes)
            recent = [*recent[-49:], train_step(run, schedule, workers)]
            progress.update(task, completed=run.step, loss=sum(recent) / len(recent))
            if run.step % 50 == 0:
                report(run, schedule, sum(recent) / len(recent), progress)
            if time.monotonic() - saved > 90:
                run.save(checkpoint)
                saved = time.monotonic()
    workers.close()
    run.save(checkpoint)
    if stop.asked:
        raise SystemExit(f"stopped at step {run.step}; the same command goes on from there")
    return run


def report(run: Run, schedule: Schedule, loss: float, progress: Progress) -> None:
    """One line in the history and, for those who read a log file, on the console."""
    run.history.append((run.step, loss))
    layers = len(run.model.model.layers)
    progress.console.print(
        f"{time.strftime('%H:%M:%S')} step {run.step}/{schedule.steps}  {layers} layers  loss {loss:.3f}  "
        f"{run.tokens / 1e6:.2f}M tokens",
        highlight=False,
    )


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )


class Stop:
    """Turns SIGTERM into a question that the loop asks between two steps."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, signum: int, frame: Any) -> None:
        self.asked = True


def employ(model: Any, loss_of: LossOf, corpus: Path, device: torch.device, processes: int) -> Workers | Inline:
    """Worker processes on a CPU that has more than one core to give; this process otherwise."""
    return Workers(processes, model, loss_of, corpus) if processes > 1 else Inline(loss_of, corpus, device)
