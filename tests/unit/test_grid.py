"""The grid of machines: drafts that slow a verification down, what costs what, and what is compared with what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from ssd_ray.bench import grid
from ssd_ray.bench.cli import app
from ssd_ray.bench.grid import QUICK, Axes, Cell, Figure, Load, draft_of, reached, survey
from ssd_ray.bench.rehearsal import Part, Play, Rehearsal, Stage, Stretch
from ssd_ray.bench.simulate import Hardware, ideal, plain
from ssd_ray.config import MAX_LOOKAHEAD, SamplingParams
from ssd_ray.models.table import TableModel
from ssd_ray.saguaro.planner import Planner
from ssd_ray.speculation.window import SCRATCH
from ssd_ray.stats import Stats, add

HARDWARE = Hardware(20.0, 2.0, 1.0, 0.5, token_ms=0.3, row_ms=0.7, verify_token_ms=1.1)
TARGET = TableModel(scratch=SCRATCH, vocab_size=64, rows=3)
DRAFT = TARGET.blurred(0.7)


def rehearse(play: Play, hardware: Hardware = HARDWARE, rows: int = 1, tokens: int = 60) -> tuple[Rehearsal, Stats]:
    play = replace(play, text_lookup=False, target=play.target | {"concurrency": rows})
    rehearsal = Rehearsal(TARGET, [DRAFT], hardware, play)
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    first, *others = (stats for _, stats in rehearsal.run_all([([1, 2, row], params) for row in range(rows)]))
    for other in others:
        first = add(first, other)
    return rehearsal, Stats(sums=first)


class Worker:
    """A draft that works when its turn comes, as often as it is told to."""

    def __init__(self, part: Part, milliseconds: Sequence[float]) -> None:
        self.part, self.steps = part, list(milliseconds)

    def turn(self, idle_seconds: float = 0.0) -> bool:
        if not self.steps:
            return False
        self.part.work(1e-3 * self.steps.pop(0))
        return True


@pytest.mark.parametrize(
    ("slices", "end"),
    [
        ([], 10.0),
        ([(0.0, 100.0)], 15.0),
        ([(0.0, 3.0)], 11.0),
        ([(4.0, 7.0)], 11.0),
        ([(0.0, 3.0), (3.0, 6.0)], 12.0),
        ([(0.0, 3.0), (0.0, 3.0), (1.0, 2.0)], 11.0),  # two at work are no worse than one
        ([(0.0, 3.0), (2.0, 6.0)], 12.0),
        ([(9.0, 99.0)], 10.5),  # the last millisecond takes one and a half
        ([(0.0, 50.0), (20.0, 60.0)], 15.0),
    ],
)
def test_while_a_draft_works_the_target_progresses_more_slowly(slices: list[tuple[float, float]], end: float) -> None:
    stretch = Stretch(0.0, 10.0, 0.5)
    for start, until in slices:
        stretch.beside(start, until)
    assert stretch.end == pytest.approx(end)


def test_without_drag_drafts_are_free() -> None:
    stretch = Stretch(5.0, 10.0, 0.0)
    stretch.beside(5.0, 100.0)
    assert stretch.end == 15.0


@pytest.mark.parametrize(
    ("steps", "now_ms"),
    [
        ([[]], 10.0),
        ([[2.0]], 11.0),
        ([[2.0, 2.0], [4.0]], 12.0),  # side by side
        ([[1.0] * 100], 20.0),
        ([[50.0]], 20.0),
    ],
)
def test_a_verification_beside_drafts(steps: list[list[float]], now_ms: float) -> None:
    stage = Stage(delay=0.0, host=0.0, meanwhile=True)
    for number, milliseconds in enumerate(steps):
        part = stage.cast(f"draft-{number}")
        part.player = Worker(part, milliseconds)
    stage.verify(10e-3, 1.0)
    assert stage.now == pytest.approx(1e-3 * now_ms)


def test_a_step_that_began_before_the_verification_slows_it_until_it_ends() -> None:
    stage = Stage(delay=0.0, host=0.0, meanwhile=True)
    part = stage.cast("draft-0")
    part.player = Worker(part, [6.0])
    stage.elapse(2e-3)  # the step goes on for 4 ms
    stage.verify(10e-3, 1.0)
    assert stage.now == pytest.approx(2e-3 + 12e-3)


def test_a_draft_that_never_rests_slows_every_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "price", 0.0)
    slow = replace(HARDWARE, step_ms=30.0, drag=0.5)
    _, stats = rehearse(Play(), slow)
    tokens = rehearse(Play(), slow)[0].forwards.tokens
    alone = stats.rounds * (slow.verify_ms - slow.verify_token_ms) + tokens * slow.verify_token_ms
    assert stats.verify_ms == pytest.approx(1.5 * alone, rel=0.03)


def test_what_waits_for_its_draft_is_not_slowed() -> None:
    play = Play("sd", target={"lookahead": 3, "exact_lookahead": True})
    assert rehearse(play, replace(HARDWARE, drag=0.6))[1] == rehearse(play)[1]


def test_every_row_and_every_token_of_a_verification_has_its_price() -> None:
    rehearsal, stats = rehearse(Play("ar"), rows=3)
    forwards = rehearsal.forwards
    assert forwards.rows == 3 * forwards.verifications == stats.rounds
    assert forwards.tokens >= forwards.rows
    per_round = HARDWARE.verify(3, forwards.tokens // forwards.verifications)
    assert stats.verify_ms == pytest.approx(forwards.verifications * per_round)


@pytest.mark.parametrize("lookahead", [0, 1, 4, MAX_LOOKAHEAD])
def test_plain_decoding_does_the_same_on_every_machine_and_has_the_sum_of_its_prices(lookahead: int) -> None:
    play = Play("sd", target={"lookahead": lookahead, "exact_lookahead": True}) if lookahead else Play("ar")
    played, stats = rehearse(play, rows=3)
    elsewhere, _ = rehearse(play, Hardware(1.0, 7.0), rows=3)
    assert elsewhere.forwards == played.forwards
    taken = stats.verify_ms + stats.wait_ms + stats.host_ms
    assert elsewhere.forwards.one_by_one_ms(HARDWARE) == pytest.approx(taken, rel=1e-6)


@pytest.mark.parametrize("acceptance", [0.3, 0.5, 0.7, 0.9])
def test_a_draft_is_right_as_often_as_it_is_to_be_and_surer_where_it_is(acceptance: float) -> None:
    target = TableModel(64, contexts=2048)
    draft = draft_of(target, acceptance, seed=1)
    assert target.agreement(draft) == pytest.approx(acceptance, abs=0.01)
    best = draft._table.topk(2)
    lead, right = best.values[:, 0] - best.values[:, 1], best.indices[:, 0] == target._table.argmax(-1)
    sure = lead > lead.median()
    assert right[sure].double().mean() > right[~sure].double().mean() + 0.1
    assert torch.equal(draft._table, draft_of(target, acceptance, seed=1)._table)


def test_a_cell_is_a_machine() -> None:
    hardware = Cell(token_cost=0.1, step=0.25, drag=0.2, acceptance=0.5, rows=4).hardware
    assert hardware.step(4) == pytest.approx(0.25 * hardware.verify(4, 4))
    assert hardware.verify(2, 11) == pytest.approx(2 * hardware.verify(1, 1))
    assert hardware.drag == 0.2


def test_the_grid_has_every_combination_once() -> None:
    cells = Axes().cells
    assert len(cells) == len(set(cells)) == 4 * 3 * 3 * 4 * 4
    assert set(QUICK.cells) <= set(cells)


def test_as_many_tokens_are_decoded_as_come_in_so_many_rounds() -> None:
    load = Load(rounds=320, least=16, warm_up=10)
    assert load.tokens(0.0, 1) == (10, 320)
    assert load.tokens(1.0, 4) == (10 * (MAX_LOOKAHEAD + 1), 80 * (MAX_LOOKAHEAD + 1))
    assert load.tokens(0.0, 64) == (10, 16)


def test_theory_in_closed_form() -> None:
    """Everything is hidden but the verification, and each is as long as it can be."""
    free = Hardware(verify_ms=10.0, step_ms=0.1)
    tokens = sum(0.5**k for k in range(MAX_LOOKAHEAD + 1))
    assert ideal(free, 0.5).tokens_per_s == pytest.approx(1e3 * tokens / 10.0)
    best_sd = max(sum(0.5**i for i in range(k + 1)) / (10.0 + 0.1 * k) for k in range(1, MAX_LOOKAHEAD + 1))
    assert plain(free, 0.5).tokens_per_s == pytest.approx(1e3 * best_sd)


def test_theory_knows_what_tokens_and_drafts_beside_cost() -> None:
    dear = Hardware(verify_ms=10.0, step_ms=4.0, verify_token_ms=5.0, drag=0.5)
    assert plain(dear, 0.3).tokens_per_s == pytest.approx(1e3 / 10.0)  # ar
    assert ideal(dear, 0.3).tokens_per_s == plain(dear, 0.3).tokens_per_s
    one_step = 1e3 * 1.9 / (15.0 + 4.0 * 0.5 / 1.5)
    two_steps = 1e3 * 2.71 / (20.0 + 8.0 * 0.5 / 1.5)
    three_steps = 1e3 * 3.439 / (25.0 + 12.0 * 0.5 / 1.5)
    assert ideal(dear, 0.9).tokens_per_s >= max(one_step, two_steps, three_steps) - 1e-9
    assert dear.beside(10.0, 100.0) == pytest.approx(15.0)


def test_a_figure_is_against_the_better_of_the_two() -> None:
    cell = QUICK.cells[0]
    figure = Figure(cell, ar=10.0, sd=20.0, lookahead=3, ssd=25.0, plain=21.0, ideal=42.0, verified=1.0, drafting=0.5)
    assert (figure.ratio, figure.ceiling) == (1.25, 2.0)
    assert replace(figure, ar=50.0).ratio == 0.5
    flat = figure.as_dict()
    assert (flat["rows"], flat["ratio"], flat["lookahead"]) == (1, 1.25, 3)
    assert "cell" not in flat


def test_how_much_of_what_is_possible_is_reached() -> None:
    figure = Figure(QUICK.cells[0], 10.0, 20.0, 3, ssd=25.0, plain=20.0, ideal=40.0, verified=1.0, drafting=0.5)
    assert reached([figure]) == pytest.approx(0.25)
    assert reached([figure, replace(figure, ssd=35.0), replace(figure, ssd=40.0)]) == pytest.approx(0.75)
    assert reached([figure, replace(figure, ideal=20.1)]) == pytest.approx(0.25)  # nothing to gain there
    assert reached([replace(figure, ideal=20.1)]) == 1.0


def test_a_survey_measures_what_theory_says_of_plain_decoding() -> None:
    (figure,) = survey([Cell(0.0, 1 / 16, 0.0, 0.7, rows=4)], Load(rounds=60, warm_up=5))
    assert max(figure.ar, figure.sd) == pytest.approx(figure.plain, rel=0.15)
    assert figure.ar == pytest.approx(4e3 / (20.0 + 0.6))
    assert figure.ratio > 1.0
    assert figure.verified >= 1.0
    assert 0.0 < figure.drafting < 1.05  # a step may have begun before


@pytest.mark.slow
def test_several_processes_find_the_same() -> None:
    cells, load = QUICK.cells[:2], Load(rounds=20, warm_up=5)
    assert list(survey(cells, load, processes=2)) == list(survey(cells, load))


def test_the_command_prints_a_table_and_draws_a_picture(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(grid, "BRIEF", Load(least=2, warm_up=2))
    picture = tmp_path / "grid.png"
    arguments = ["grid", "--quick", "--rounds", 4, "--acceptance", 0.7, "--drag", 0, "--drag", 0.2, "--step", 0.25]
    arguments += ["--processes", 1, "--plot", picture]
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    figures = json.loads(result.stdout.splitlines()[-1])["results"]
    assert [(each["token_cost"], each["drag"]) for each in figures] == [(0.0, 0.0), (0.0, 0.2), (0.3, 0.0), (0.3, 0.2)]
    assert all(each["ssd"] > 0.0 and each["ceiling"] >= 1.0 for each in figures)
    assert "70% accepted" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
