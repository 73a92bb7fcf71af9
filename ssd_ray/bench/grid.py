"""Is ssd ever slower than what it replaces? A grid of machines and pairs in virtual time, which no noise reaches.

In every cell ssd, left to itself, is compared with the best of autoregressive decoding and of plain speculative
decoding with every fixed lookahead, on the same texts. The loops, the protocol and the sessions are the real ones
(:mod:`~ssd_ray.bench.rehearsal`). The models are tables whose draft is a noisy copy of its target: it is right with the
cell's probability, and surer where it is right, as real drafts are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from statistics import median
from typing import Any, TypeVar

import torch

from ssd_ray.bench.rehearsal import HOST_MS, MESSAGE_MS, Forwards, Play, Rehearsal
from ssd_ray.bench.simulate import Hardware, ideal, plain
from ssd_ray.config import MAX_LOOKAHEAD, SamplingParams
from ssd_ray.models.table import TableModel
from ssd_ray.speculation.window import SCRATCH

VERIFY_MS = 20.0
"""The fixed part of a verification: what one token takes."""

VOCABULARY, CONTEXTS = 64, 4096

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cell:
    """A machine, a pair and a batch.

    Attributes:
        token_cost: what every further token of a forward costs, of target and draft alike, as a fraction of the
            forward's fixed part.
        step: what a draft step takes, as a fraction of a verification of as many tokens.
        drag: by which fraction a verification takes longer while the draft works beside it.
        acceptance: probability that a drafted token is accepted when it is reached.
        rows: sequences of the batch.
    """

    token_cost: float
    step: float
    drag: float
    acceptance: float
    rows: int

    @property
    def hardware(self) -> Hardware:
        """The machine's milliseconds."""
        step_ms = self.step * VERIFY_MS
        return Hardware(
            VERIFY_MS,
            step_ms,
            HOST_MS,
            MESSAGE_MS,
            token_ms=self.token_cost * step_ms,
            verify_token_ms=self.token_cost * VERIFY_MS,
            drag=self.drag,
        )


@dataclass(frozen=True, slots=True)
class Axes:
    """The values that a grid goes through; see :class:`Cell`."""

    token_costs: Sequence[float] = (0.0, 0.03, 0.1, 0.3)
    steps: Sequence[float] = (1 / 3, 1 / 6, 1 / 16)
    drags: Sequence[float] = (0.0, 0.2, 0.6)
    acceptances: Sequence[float] = (0.3, 0.5, 0.7, 0.9)
    rows: Sequence[int] = (1, 4, 16, 64)

    @property
    def cells(self) -> list[Cell]:
        """All combinations."""
        return [
            Cell(token_cost, step, drag, acceptance, rows)
            for rows, acceptance, token_cost, step, drag in product(
                self.rows, self.acceptances, self.token_costs, self.steps, self.drags
            )
        ]


QUICK = Axes(token_costs=(0.0, 0.3), steps=(1 / 3, 1 / 16), drags=(0.0, 0.6), acceptances=(0.3, 0.9), rows=(1,))
"""The corners, for one request."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What a cell came to.

    Attributes:
        cell: which.
        ar, sd, ssd: tokens per virtual second of all rows together; ``sd`` with its best fixed lookahead.
        lookahead: that lookahead.
        plain, ideal: what theory has for the better of ar and sd, and for ssd at its best; see
            :func:`~ssd_ray.bench.simulate.plain` and :func:`~ssd_ray.bench.simulate.ideal`.
        verified: tokens that ssd verified for each one that it kept.
        drafting: share of ssd's time in which its draft ran a step.
    """

    cell: Cell
    ar: float
    sd: float
    lookahead: int
    ssd: float
    plain: float
    ideal: float
    verified: float
    drafting: float

    @property
    def ratio(self) -> float:
        """How many times as fast ssd is as the better of ar and sd."""
        return self.ssd / max(self.ar, self.sd)

    @property
    def ceiling(self) -> float:
        """What theory has for that ratio at best."""
        return self.ideal / self.plain

    def as_dict(self) -> dict[str, Any]:
        """Everything by name, the cell's values included."""
        figures = asdict(self)
        cell: dict[str, Any] = figures.pop("cell")
        return cell | figures | {"ratio": self.ratio, "ceiling": self.ceiling}


@dataclass(frozen=True, slots=True)
class Stint:
    """A part of a run.

    Attributes:
        tokens: tokens that came in it, of all rows together.
        seconds: how long it took, in virtual time.
        forwards: what was run in it.
    """

    tokens: int
    seconds: float
    forwards: Forwards


@dataclass(frozen=True, slots=True)
class Load:
    """How much is decoded: as many tokens as come in so many rounds that verify the longest speculation.

    All methods decode the same texts, and few rounds do where tokens are seldom accepted.

    Attributes:
        rounds: of all rows together, but at least ``least`` of each row.
        least: see there.
        warm_up: rounds of each row before them, which do not count: the estimates settle.
        seed: of models and prompts.
    """

    rounds: int = 400
    least: int = 16
    warm_up: int = 40
    seed: int = 0

    def tokens(self, acceptance: float, rows: int) -> tuple[int, int]:
        """Tokens of a row before those that count, and those."""
        of_a_round = sum(acceptance**accepted for accepted in range(MAX_LOOKAHEAD + 1))
        return round(self.warm_up * of_a_round), round(max(self.least, self.rounds / rows) * of_a_round)


BRIEF = Load(rounds=200)
"""Enough to see where a cell stands, not to a few hundredths."""


def reached(figures: Sequence[Figure], least: float = 1.05) -> float:
    """Of the gain that theory has at best, the part that ssd reaches: the median over cells in which it is at least
    5 %; 1 where there are none."""
    return median([(each.ratio - 1.0) / (each.ceiling - 1.0) for each in figures if each.ceiling >= least] or [1.0])


def survey(cells: Sequence[Cell], load: Load = Load(), processes: int = 1) -> Iterator[Figure]:
    """The figures of cells, as they come and in their order, from several processes side by side."""
    with _side_by_side(processes) as each:
        pairs = sorted({(cell.acceptance, cell.rows) for cell in cells}, key=lambda pair: -pair[1])
        stints = dict(zip(pairs, each(partial(_plain_stints, load=load), pairs), strict=True))
        for cell, stint in zip(cells, each(partial(_ssd_stint, load=load), cells), strict=True):
            yield _figure(cell, stints[cell.acceptance, cell.rows], stint)


def draft_of(target: TableModel, acceptance: float, seed: int) -> TableModel:
    """A noisy copy of the target that has the same likeliest token in this fraction of contexts. The seed is to be
    another one than the target's."""
    low, high = 0.0, 64.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if target.agreement(target.blurred(middle, seed)) > acceptance else (low, middle)
    return target.blurred(high, seed)


@contextmanager
def _side_by_side(processes: int) -> Iterator[Callable[[Callable[[S], T], Iterable[S]], Iterator[T]]]:
    """A ``map``."""
    if processes == 1:
        yield map
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield pool.map


def _figure(cell: Cell, plain_stints: Sequence[Stint], stint: Stint) -> Figure:
    hardware = cell.hardware
    autoregressive, *speculative = [1e3 * each.tokens / each.forwards.one_by_one_ms(hardware) for each in plain_stints]
    best = max(speculative)
    steps_ms = stint.forwards.steps_ms(hardware)
    return Figure(
        cell,
        autoregressive,
        best,
        1 + speculative.index(best),
        stint.tokens / stint.seconds,
        plain(hardware, cell.acceptance, cell.rows).tokens_per_s,
        ideal(hardware, cell.acceptance, cell.rows).tokens_per_s,
        stint.forwards.tokens / stint.tokens,
        1e-3 * steps_ms / stint.seconds,
    )


def _plain_stints(pair: tuple[float, int], load: Load) -> list[Stint]:
    """A stint of each lookahead from 0, which is ar, to the longest.

    One thing after the other is done in them, and what is done does not depend on how long it takes: they are played
    on one machine and priced on all.
    """
    acceptance, rows = pair
    hardware = Cell(0.0, 0.1, 0.0, acceptance, rows).hardware
    exact = [Play("sd", target={"lookahead": most, "exact_lookahead": True}) for most in range(1, MAX_LOOKAHEAD + 1)]
    return [_stint(acceptance, rows, hardware, play, load) for play in (Play("ar"), *exact)]


def _ssd_stint(cell: Cell, load: Load) -> Stint:
    return _stint(cell.acceptance, cell.rows, cell.hardware, Play("ssd"), load)


def _stint(acceptance: float, rows: int, hardware: Hardware, play: Play, load: Load) -> Stint:
    """Decode on all rows, and look at a part in the middle: no row is new then, and none has ended."""
    warm_up, counted = load.tokens(acceptance, rows)
    play = replace(play, text_lookup=False, target=play.target | {"concurrency": rows})
    room = 2 * (warm_up + counted)  # some rows are faster than others
    target, draft = _models(acceptance, rows, room, load.seed)
    rehearsal = Rehearsal(target, [draft], hardware, play)
    params = SamplingParams(temperature=0.0, max_tokens=room)
    rehearsal.submit([([load.seed % VOCABULARY, 1, 1 + row % 32, 1 + row // 32], params) for row in range(rows)])
    early = _decode(rehearsal, rows * warm_up)
    start, before = rehearsal.stage.now, copy(rehearsal.forwards)
    came = _decode(rehearsal, rows * (warm_up + counted) - early)
    return Stint(came, rehearsal.stage.now - start, rehearsal.forwards.since(before))


def _decode(rehearsal: Rehearsal, tokens: int) -> int:
    """Run rounds until so many tokens have come; how many have."""
    came = 0
    while came < tokens:
        came += sum(len(output.tokens) for output in rehearsal.turn())
    return came


@cache
def _models(acceptance: float, rows: int, length: int, seed: int) -> tuple[TableModel, TableModel]:
    """A pair for this many rows of this length."""
    target = TableModel(VOCABULARY, contexts=CONTEXTS, seed=seed, rows=rows, max_length=length + 16, scratch=SCRATCH)
    return target, draft_of(target, acceptance, seed + 1)
