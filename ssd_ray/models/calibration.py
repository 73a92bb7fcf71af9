"""What a model's verifications cost on this machine, and which numbers of tokens leave a token's bits alone.

Both are found by running it, once: the result is kept in the user's cache folder under a name that tells model, machine
and libraries apart, and read by later starts. ``SSD_RAY_CACHE`` names another folder; empty, nothing is kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import transformers
from torch import Tensor

from ssd_ray.config import MAX_LOOKAHEAD
from ssd_ray.models.clock import forward_clock
from ssd_ray.models.contract import UNBOUND, ModelRunner
from ssd_ray.models.processor import processor
from ssd_ray.saguaro.costs import Measured

logger = logging.getLogger(__name__)

GRID = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512)
"""Numbers of tokens, over all rows, that are tried."""

COARSE, SLOW_SECONDS = (1, 2, 4, 8, 16, 32, 64), 0.1
"""The same, run once each, where a token takes so long that noise matters less than a user's patience."""

PER_ROW = MAX_LOOKAHEAD + 1
"""Tokens of each row but the last."""

SECONDS = 6.0
"""Time after which no larger number of tokens is tried: what lies beyond goes on as a straight line."""

WARM_UP, REPEATS = 3, 3
"""Forwards of each size before they are timed, the first of which may prepare something, and timed ones."""

WORTH = 0.9
"""In float32, where other last bits change a text once in a million tokens, numbers of tokens that give other bits are
run all the same if they take no more than this part of the time."""


FORMAT = 3
"""Of what is kept, and of what it tells: other ones are not read."""

T = TypeVar("T")


class Calibration(msgspec.Struct, frozen=True):
    """What is kept.

    Attributes:
        measured: costs.
        steady: the numbers of tokens to run: fewer are padded to the next one.
        unsteady: those among them whose bits differ from the others'.
    """

    measured: Measured
    steady: tuple[int, ...]
    unsteady: tuple[int, ...] = ()

    def __str__(self) -> str:
        costs = zip(self.measured.sizes, self.measured.ms, strict=True)
        curve = ", ".join(f"{size}: {ms:.2f}" for size, ms in costs)
        own = f"; {', '.join(map(str, self.unsteady))} tokens give bits of their own" if self.unsteady else ""
        text = f"milliseconds by tokens {curve}; {self.measured.row_ms:.2f} for each further row and "
        return f"{text}{1e3 * self.measured.slot_ms:.1f} for each 1,000 slots read{own}"


@torch.inference_mode()
def calibrate(
    runner: ModelRunner, *, bound: bool = True, rows: int | None = None, clock: Callable[[], float] | None = None
) -> Calibration:
    """Run a model's verifications at all sizes. Its KV is written over. If its rows are not ``bound`` to pages, they
    are for the while."""
    trial = _Trial(runner, rows or runner.rows, bound, clock or forward_clock(runner.device))
    try:
        return trial.run()
    finally:
        trial.end()


LONG_ROWS, LONG_SLOTS = 4, 512
"""Rows that are run far from their beginnings, and slots that they read then, at most."""


class _Trial:
    """The forwards of one calibration, over rows that begin at slot 0."""

    def __init__(self, runner: ModelRunner, rows: int, bound: bool, clock: Callable[[], float]) -> None:
        self._runner, self._bound, self._clock = runner, bound, clock
        self._pages_each = -(-PER_ROW // runner.page_slots)
        self._rows = max(1, min(rows, runner.rows, runner.num_pages // self._pages_each))
        self._bind(self._rows, self._pages_each)
        self._grid: Sequence[int] = GRID
        self._warm_up, self._repeats = WARM_UP, REPEATS
        random = torch.Generator().manual_seed(0)
        drawn = torch.randint(0, runner.vocab_size, (self._rows, PER_ROW), generator=random)
        self._tokens: list[list[int]] = drawn.tolist()

    def _bind(self, rows: int, pages: int) -> None:
        """Give rows so many pages each, all others' being theirs no more, if rows have none of their own."""
        if self._bound:
            return
        for row in range(self._rows):
            self._runner.bind(row, 0, [UNBOUND] * (self._runner.slots // self._runner.page_slots))
        for row in range(rows):
            self._runner.bind(row, 0, range(row * pages, (row + 1) * pages))

    def end(self) -> None:
        """Leave the rows as they were."""
        self._bind(0, 0)

    def run(self) -> Calibration:
        sizes, logits = self._first_pass()
        ms = self._fastest([self._dealt(size) for size in sizes])
        row_ms = self._row_ms(sizes, ms)
        bare = [took - row_ms * (len(self._dealt(size)) - 1) for size, took in zip(sizes, ms, strict=True)]
        alike = _alike(logits, [self._runner.bits(self._dealt(size)) for size in sizes])
        steady, unsteady = choose_sizes(sizes, ms, alike, exact=self._runner.dtype != torch.float32)
        costs = dict(zip(sizes, bare, strict=True))
        measured = Measured(steady, tuple(costs[size] for size in steady), row_ms, self._slot_ms())
        return Calibration(measured, steady, unsteady)

    def _first_pass(self) -> tuple[list[int], list[Tensor]]:
        """The sizes that there is time for, and the first row's logits of each."""
        sizes, logits = [], []
        started = self._clock()
        self._forward([1])
        if self._clock() - started > SLOW_SECONDS:
            self._grid, self._warm_up, self._repeats = COARSE, 1, 1
        for size in (each for each in self._grid if each <= self._rows * PER_ROW):
            sizes.append(size)
            for _ in range(self._warm_up):
                last = self._forward(self._dealt(size))
            logits.append(last.clone())
            if self._clock() - started > SECONDS / 2 and size >= PER_ROW:
                break
        return sizes, logits

    def _fastest(self, shapes: Sequence[Sequence[int]], starts: Sequence[int] | None = None) -> list[float]:
        """Milliseconds of forwards of so many tokens for each row, from these slots on, the quickest of several each,
        which take turns."""
        best = [inf] * len(shapes)
        for _ in range(self._repeats):
            for index, (counts, slot) in enumerate(zip(shapes, starts or [0] * len(shapes), strict=True)):
                start = self._clock()
                self._forward(counts, slot)
                best[index] = min(best[index], 1e3 * (self._clock() - start))
        return best

    def _dealt(self, size: int) -> list[int]:
        """How many tokens of each row make up so many: as few rows as possible."""
        return [PER_ROW] * (size // PER_ROW) + ([size % PER_ROW] if size % PER_ROW else [])

    def _row_ms(self, sizes: Sequence[int], ms: Sequence[float]) -> float:
        """What a row adds: one token each of many rows, against as many of few; not so much that many tokens of many
        rows would be cheaper than one, should the first have been disturbed."""
        size = max((size for size in sizes if size <= self._rows), default=1)
        if size < 2:
            return 0.0
        (apart,) = self._fastest([[1] * size])
        row_ms = (apart - ms[sizes.index(size)]) / (size - len(self._dealt(size)))
        rows = [len(self._dealt(size)) for size in sizes]
        most = [(took - ms[0]) / (many - 1) for many, took in zip(rows, ms, strict=True) if many > 1]
        return max(0.0, min([row_ms, *most]))

    def _slot_ms(self) -> float:
        """What a slot adds that is read: tokens of some rows far from their beginnings, against as many there."""
        rows, runner = min(LONG_ROWS, self._rows), self._runner
        pages = min(LONG_SLOTS // runner.page_slots, runner.num_pages // rows, runner.max_length // runner.page_slots)
        start = pages * runner.page_slots - 1
        if start <= runner.page_slots:
            return 0.0
        self._bind(rows, pages)
        near, far = self._fastest([[1] * rows] * 2, starts=[0, start])
        return max(0.0, far - near) / (rows * start)

    def _forward(self, counts: Sequence[int], start: int = 0) -> Tensor:
        """Run so many tokens of each row from a slot on; the logits of the first row, [tokens, V]."""
        tokens = [self._tokens[row][:count] for row, count in enumerate(counts)]
        return self._runner.append(range(len(tokens)), tokens, [start] * len(tokens))[0]


WIDTHS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens of a draft's step that are tried."""


@torch.inference_mode()
def calibrate_steps(
    runner: ModelRunner, *, bound: bool = True, clock: Callable[[], float] | None = None
) -> Calibration:
    """Run a draft's steps at some widths, over one row. Otherwise as :func:`calibrate`."""
    clock = clock or forward_clock(runner.device)
    pages = max(1, -(-max(WIDTHS) // runner.page_slots))
    if not bound:
        runner.bind(0, 0, range(pages))
    if runner.reads:  # as of the tokens of a text, after which none waits for another
        runner.read(0, 0, torch.zeros(max(WIDTHS), runner.reads))
    best = dict.fromkeys(map(runner.padded, WIDTHS), inf)
    for _ in range(WARM_UP + REPEATS):
        for width in best:
            slots = torch.arange(width)[None]
            visible = torch.ones(1, width, runner.extent(width), dtype=torch.bool).tril()
            start = clock()
            runner.extend([0], torch.zeros_like(slots), slots, slots, visible)
            best[width] = min(best[width], 1e3 * (clock() - start))
    if not bound:
        runner.bind(0, 0, [UNBOUND] * pages)
    return Calibration(Measured(tuple(best), tuple(best.values())), ())


def _alike(logits: Sequence[Tensor], bits: Sequence[object]) -> list[bool]:
    """Which of some forwards round as most of them do: they give the same logits to the tokens that they have in
    common, and what else tells of their rounding is equal."""
    kinds: list[list[int]] = []
    for index in reversed(range(len(logits))):
        for members in kinds:
            if bits[index] == bits[members[0]] and _equal(logits[index], logits[members[0]]):
                members.append(index)
                break
        else:
            kinds.append([index])
    most = max(kinds, key=len, default=[])
    return [index in most for index in range(len(logits))]


def _equal(some: Tensor, others: Tensor) -> bool:
    common = min(len(some), len(others))
    return torch.equal(some[:common], others[:common])


def choose_sizes(
    sizes: Sequence[int], ms: Sequence[float], alike: Sequence[bool], *, exact: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which numbers of tokens to run, and which of them give bits of their own.

    Those that are alike, without those that cost no less than a larger one. If not ``exact``, others that are clearly
    cheaper than the next one, too, and the largest, whatever its bits: more tokens are run as more of them.

    Args:
        sizes: rising; ``ms`` what each takes, ``alike`` whether it gives the bits that most give, as some do.
        exact: all texts in half precision hang on the bits.
    """
    chosen: list[int] = []
    cheapest = inf
    for index in reversed(range(len(sizes))):
        part = 1.0 if alike[index] else 0.0 if exact or not chosen else WORTH
        if ms[index] < part * cheapest or (not chosen and (alike[index] or not exact)):
            chosen.insert(0, index)
            cheapest = ms[index]
    unsteady = tuple(sizes[index] for index in chosen if not alike[index])
    return tuple(sizes[index] for index in chosen), unsteady


def kept_or_made(name: str, make: Callable[[], Calibration]) -> Calibration:
    """A calibration from an earlier start, or one that is made and kept now."""
    path = cache_path(name)
    found = read(path, Calibration)
    if found is not None:
        return found
    made = make()
    keep(path, made)
    return made


def machine_name(*parts: Any) -> str:
    """Names what a measurement depends on: the machine, the libraries, and the parts that the caller adds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", ""), torch.backends.cpu.get_cpu_capability()
    versions = FORMAT, torch.__version__, transformers.__version__
    whole = repr((processor(), cores, torch.get_num_threads(), isa, versions, *parts))
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def cache_path(name: str) -> Path | None:
    """Where something is kept; None if nothing is."""
    folder = os.environ.get("SSD_RAY_CACHE")
    if folder == "":
        return None
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssd-ray"
    return (Path(folder) if folder else default) / f"{name}.json"


def read(path: Path | None, kind: type[T]) -> T | None:
    """What was kept there; None if there is nothing of this kind."""
    if path is None:
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def keep(path: Path | None, value: object) -> None:
    """Keep something for later starts. It is written to another file first: two engines may start at once."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(msgspec.json.encode(value))
        part.replace(path)
    except OSError as error:
        logger.info("what was measured is not kept: %s", error)
