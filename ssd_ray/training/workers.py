"""Who computes the gradients of a batch: processes of one thread each on a CPU, this process otherwise."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing import parent_process
from threading import Thread
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
    taken: Any  # the next piece that nobody has taken

    def pieces(self, total: int, size: int) -> Iterator[int]:
        """First items of the pieces that this worker gets."""
        while True:
            with self.taken.get_lock():
                first, self.taken.value = self.taken.value, self.taken.value + size
            if first >= total:
                return
            yield first


class Job(IntEnum):
    """What workers do."""

    GRADIENTS = 0
    ORTHOGONALISE = 1


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
            taken=context.Value("q", 0),
        )
        pipes = [context.Pipe() for _ in range(count)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=work, args=(index, self.desk, theirs), daemon=True)
            for index, (_, theirs) in enumerate(pipes)
        ]
        start_deaf(self.processes)
        for _, theirs in pipes:
            theirs.close()  # so that a worker's death is an end of file

    def do(self, *job: int) -> None:
        """Have a job done by all.

        Raises:
            EngineError: one of them is gone.
        """
        self.desk.taken.value = 0
        try:
            for pipe in self.pipes:
                pipe.send(job)
            for pipe in self.pipes:
                pipe.recv()
        except (EOFError, OSError):
            raise EngineError("a process that trains ended early; it may have run out of memory") from None

    def gradients(self, model: Any, first: int, rows: int, length: int) -> float:
        """Fill the gradients of ``model`` from a batch; returns the mean loss."""
        self.do(Job.GRADIENTS, first, rows, length)
        for parameter, *grads in zip(trained(model).values(), *self.desk.grads, strict=True):
            parameter.grad = torch.stack(grads).sum(0)
        return self.desk.losses.sum().item()

    def orthogonalise(self, updates: list[Tensor]) -> list[Tensor]:
        """Muon's costly part."""
        for shared, update in zip(self.desk.updates, updates, strict=True):
            shared.copy_(update)
        self.do(Job.ORTHOGONALISE)
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


def work(index: int, desk: Desk, jobs: Any) -> None:
    """A worker's life: jobs come through a pipe, and each is answered when it is done."""
    begin_work()
    for parameter, grad in zip(trained(desk.model).values(), desk.grads[index], strict=True):
        parameter.grad = grad
    while True:
        match jobs.recv():
            case [Job.GRADIENTS, first, rows, length]:
                accumulate(index, desk, first, rows, length)
            case [Job.ORTHOGONALISE]:
                for i in desk.pieces(len(desk.updates), 1):
                    desk.updates[i].copy_(orthogonal(desk.updates[i]))
        jobs.send(None)


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
