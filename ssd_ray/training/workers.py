"""Who computes the gradients of a batch: processes of one thread each on a CPU, this process otherwise."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from threading import BrokenBarrierError, Thread
from typing import Any, Protocol

import torch
from torch import Tensor

from ssd_ray.errors import EngineError
from ssd_ray.training.schedules import matrices, orthogonal, precision, trained

PIECE = 1024
"""Tokens of which a worker computes the gradients at once."""


class Batches(Protocol):
    """What is learned, in numbered rows. It is handed to processes: files are opened where they are read."""

    def loss(self, model: Any, first: int, rows: int, length: int) -> Tensor:
        """Mean loss in nats a token, a scalar, of rows ``first``, ``first + 1``, .. of at most ``length`` tokens."""


@dataclass
class Desk:
    """The memory that a training process and its workers share."""

    model: Any
    batches: Batches
    grads: list[list[Tensor]]  # one list a worker
    updates: list[Tensor]  # one for each of Muon's matrices
    losses: Tensor
    job: Tensor  # kind, first, rows, length
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


GRADIENTS, ORTHOGONALISE = range(2)


class Workers:
    """Single-threaded processes that share the model and deal themselves the pieces of a batch.

    Two threads inside one process meet at a barrier in every operator, so one busy core slows the whole step down many
    times. Processes that take the next piece when they are free meet twice a step and lose only the core that is gone.
    """

    def __init__(self, count: int, model: Any, batches: Batches) -> None:
        context = torch.multiprocessing.get_context("spawn")
        model.share_memory()
        self.desk = Desk(
            model=model,
            batches=batches,
            grads=[[_shared(torch.zeros_like(p)) for p in trained(model).values()] for _ in range(count)],
            updates=[_shared(torch.zeros_like(p)) for p in matrices(model)],
            losses=_shared(torch.zeros(count, dtype=torch.float64)),
            job=_shared(torch.zeros(4, dtype=torch.int64)),
            begin=context.Barrier(count + 1),
            end=context.Barrier(count + 1),
            taken=context.Value("q", 0),
        )
        self.processes = [context.Process(target=work, args=(i, self.desk), daemon=True) for i in range(count)]
        start_deaf(self.processes)
        Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Wait for the first that ends, and let nobody wait for it."""
        connection.wait([process.sentinel for process in self.processes])
        self.desk.begin.abort()
        self.desk.end.abort()

    def do(self, *job: int) -> None:
        """Have a job done by all."""
        self.desk.job[: len(job)] = torch.tensor(job)
        self.desk.taken.value = 0
        try:
            self.desk.begin.wait()
            self.desk.end.wait()
        except BrokenBarrierError:
            raise EngineError("a process that trains ended early; it may have run out of memory") from None

    def gradients(self, model: Any, first: int, rows: int, length: int) -> float:
        """Fill the gradients of ``model`` from a batch; returns the mean loss."""
        self.do(GRADIENTS, first, rows, length)
        for parameter, *grads in zip(trained(model).values(), *self.desk.grads, strict=True):
            parameter.grad = torch.stack(grads).sum(0)
        return self.desk.losses.sum().item()

    def orthogonalise(self, updates: list[Tensor]) -> list[Tensor]:
        """Muon's costly part."""
        for shared, update in zip(self.desk.updates, updates, strict=True):
            shared.copy_(update)
        self.do(ORTHOGONALISE)
        return self.desk.updates

    def close(self) -> None:
        """Let them go."""
        for process in self.processes:
            process.kill()
            process.join()


def _shared(tensor: Tensor) -> Tensor:
    shared: Tensor = tensor.share_memory_()  # type: ignore[no-untyped-call]
    return shared


def start_deaf(processes: Iterable[Any]) -> None:
    """Start processes that do not hear Ctrl-C and SIGTERM, which a terminal and others send to them, too: these are for
    their parent, from the first moment on."""
    kinds = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, kinds)  # which they inherit
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_work() -> None:
    """Make this process a worker: one thread, and no life without its parent."""
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
    os._exit(1)


def work(index: int, desk: Desk) -> None:
    """A worker's life."""
    begin_work()
    for parameter, grad in zip(trained(desk.model).values(), desk.grads[index], strict=True):
        parameter.grad = grad
    while True:
        desk.begin.wait()
        kind, first, rows, length = desk.job.tolist()
        if kind == GRADIENTS:
            accumulate(index, desk, first, rows, length)
        else:
            for i in desk.pieces(len(desk.updates), 1):
                desk.updates[i].copy_(orthogonal(desk.updates[i]))
        desk.end.wait()


def accumulate(index: int, desk: Desk, first: int, rows: int, length: int) -> None:
    """Add the gradients of the pieces of a batch that this worker gets."""
    for grad in desk.grads[index]:
        grad.zero_()
    desk.losses[index] = 0.0
    size = max(1, PIECE // length)
    for start in desk.pieces(rows, size):
        count = min(size, rows - start)
        desk.losses[index] += _backward(desk.batches, desk.model, first + start, count, length, count / rows)


def _backward(batches: Batches, model: Any, first: int, rows: int, length: int, share: float) -> float:
    device = next(model.parameters()).device
    kind = precision(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=kind != torch.float32):
        loss = batches.loss(model, first, rows, length) * share
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


class Inline:
    """The same contract in this process: for a GPU, or for one core."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def gradients(self, model: Any, first: int, rows: int, length: int) -> float:
        """Fill the gradients of ``model`` from a batch; returns the mean loss."""
        size = max(1, PIECE // length) if next(model.parameters()).device.type == "cpu" else rows
        counts = [(start, min(size, rows - start)) for start in range(0, rows, size)]
        return sum(_backward(self.batches, model, first + at, count, length, count / rows) for at, count in counts)

    def orthogonalise(self, updates: list[Tensor]) -> list[Tensor]:
        """Muon's costly part."""
        return [orthogonal(update) for update in updates]

    def close(self) -> None:
        """Nothing is held."""


def employ(model: Any, batches: Batches, processes: int) -> Workers | Inline:
    """Worker processes on a CPU that has more than one core to give; this process otherwise."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return Workers(processes, model, batches) if processes > 1 and on_cpu else Inline(batches)
