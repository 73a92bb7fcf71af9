"""What a machine costs: measured once, kept, chosen from, shown."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from ssd_ray.bench.cli import app
from ssd_ray.bench.rehearsal import Hooked
from ssd_ray.config import MAX_LOOKAHEAD
from ssd_ray.models import calibration, dtypes
from ssd_ray.models.calibration import GRID, WIDTHS, Calibration, calibrate, calibrate_steps, choose_sizes, kept_or_made
from ssd_ray.models.loader import load_runner
from ssd_ray.models.table import TableModel
from ssd_ray.saguaro.costs import Measured
from tests.support.tiny import tiny_pair


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSD_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Machine:
    """A clock that forwards of a model move on."""

    def __init__(self, row_ms: float = 0.0, token_ms: float = 0.5) -> None:
        self.now, self._row_ms, self._token_ms = 0.0, row_ms, token_ms

    def __call__(self) -> float:
        return self.now

    def append(self, rows: int, tokens: int) -> None:
        self.now += 1e-3 * (5.0 + self._row_ms * (rows - 1) + self._token_ms * tokens)

    def extend(self, tokens: int) -> None:
        self.now += 1e-3 * (1.0 + 0.1 * tokens)


def test_a_calibration_finds_what_forwards_cost() -> None:
    machine = Machine(row_ms=0.25)
    found = calibrate(Hooked(TableModel(rows=4), machine.append), clock=machine)
    assert found.steady == tuple(size for size in GRID if size <= 4 * (MAX_LOOKAHEAD + 1))
    assert found.unsteady == ()
    assert found.measured.row_ms == pytest.approx(0.25)
    assert found.measured.sizes == found.steady
    assert found.measured.ms == pytest.approx([5.0 + 0.5 * size for size in found.steady])


def test_on_a_slow_machine_one_row_is_enough() -> None:
    machine = Machine(token_ms=1000.0)
    assert calibrate(Hooked(TableModel(rows=64), machine.append), clock=machine).steady[-1] == MAX_LOOKAHEAD + 1


def test_rows_that_stand_on_no_pages_get_some_for_the_while() -> None:
    model = TableModel(rows=4, pages=9)
    machine = Machine()
    calibrate(Hooked(model, machine.append), bound=False, clock=machine)
    calibrate_steps(Hooked(model, on_extend=machine.extend), bound=False, clock=machine)
    with pytest.raises(ValueError, match="not bound"):
        model.append([0], [[1]], [0])


def test_steps_are_measured_by_their_width() -> None:
    machine = Machine()
    measured = calibrate_steps(Hooked(TableModel(), on_extend=machine.extend), clock=machine).measured
    assert measured.sizes == WIDTHS
    assert measured.ms == pytest.approx([1.0 + 0.1 * width for width in WIDTHS])


class Rounding(Hooked):
    """A model that gives other bits to fewer than four tokens."""

    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        logits = super().append(rows, tokens, starts)
        return [each * (1.0 + 1e-6) for each in logits] if sum(map(len, tokens)) < 4 else logits


@pytest.mark.parametrize(
    ("dtype", "token_ms", "steady", "unsteady"),
    [(torch.bfloat16, 2.0, 4, ()), (torch.float32, 2.0, 1, (1, 2, 3)), (torch.float32, 0.1, 4, ())],
)
def test_what_gives_other_bits_is_run_in_single_precision_where_it_is_much_faster(
    dtype: torch.dtype, token_ms: float, steady: int, unsteady: tuple[int, ...]
) -> None:
    machine = Machine(token_ms=token_ms)
    runner = Rounding(TableModel(), machine.append)
    runner.dtype = dtype
    found = calibrate(runner, clock=machine)
    assert (found.steady[0], found.unsteady) == (steady, unsteady)


def test_what_costs_more_than_a_larger_number_is_not_run() -> None:
    assert choose_sizes([1, 2, 4, 8], [5.0, 9.0, 7.0, 8.0], [True] * 4, exact=True) == ((1, 4, 8), ())
    assert choose_sizes([1, 2, 4], [1.0, 2.0, 3.0], [False, True, False], exact=True) == ((2,), ())


def test_what_was_measured_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = (Calibration(Measured((1, 8), (float(ms), 2.0 * ms), 0.5), (1, 8), (1,)) for ms in count(1))
    first = kept_or_made("this", lambda: next(made))
    assert kept_or_made("this", lambda: next(made)) == first
    assert kept_or_made("other", lambda: next(made)) != first
    (folder / "this.json").write_bytes(b"{")
    assert kept_or_made("this", lambda: next(made)) not in (first, None)
    monkeypatch.setenv("SSD_RAY_CACHE", "")
    assert kept_or_made("this", lambda: next(made)) != kept_or_made("this", lambda: next(made))
    monkeypatch.setenv("SSD_RAY_CACHE", str(folder / "this.json"))  # no folder: nothing is kept, and nobody minds
    assert kept_or_made("this", lambda: next(made)).steady == (1, 8)


def test_without_instructions_for_its_dtype_a_checkpoint_is_served_in_the_faster_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dtypes, "has_instructions", lambda dtype: False)
    times = {torch.bfloat16: 2.0, torch.float32: 1.0}
    monkeypatch.setattr(dtypes, "forward_ms", times.__getitem__)
    assert dtypes.faster_dtype(torch.bfloat16, lambda dtype: dtype, "a model") == torch.float32  # type: ignore
    times[torch.float32] = 3.0
    assert dtypes.faster_dtype(torch.bfloat16, lambda dtype: dtype, "a model") == torch.float32  # type: ignore
    assert dtypes.faster_dtype(torch.bfloat16, lambda dtype: dtype, "another") == torch.bfloat16  # type: ignore
    assert dtypes.faster_dtype(torch.float32, lambda dtype: dtype, "a third") == torch.float32  # type: ignore


@pytest.mark.parametrize("isa", ["AVX2", "avx512_core"])
def test_a_limit_of_the_instructions_is_heeded(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert not dtypes.has_instructions(torch.bfloat16)


def test_loading_says_what_the_machine_costs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target, _ = tiny_pair(tmp_path)
    with caplog.at_level(logging.INFO, "ssd_ray.models.loader"):
        runner = load_runner(target, role="target", rows=1, scratch=16, calibrated=True)
    assert runner.measured is not None
    (line,) = caplog.messages
    assert line.startswith("target in float32 on cpu")
    assert f"{runner.measured.sizes[-1]}: {runner.measured.ms[-1]:.2f}" in line
    again = load_runner(target, role="target", rows=1, scratch=16, calibrated=True)
    assert (again.packed, again.measured) == (runner.packed, runner.measured)


def test_the_command_shows_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SECONDS", 0.1)
    target, draft = tiny_pair(tmp_path)
    result = CliRunner().invoke(app, ["machine", "--target", target, "--draft", draft], catch_exceptions=False)
    assert "target: a verification in float32 on cpu" in result.stdout
    ours, theirs = json.loads(result.stdout.splitlines()[-1])["results"]
    assert (ours["role"], theirs["role"]) == ("target", "draft")
    assert ours["sizes"][-1] == MAX_LOOKAHEAD + 1
    assert len(ours["sizes"]) == len(ours["ms"])
    assert theirs["sizes"] == list(WIDTHS)
    assert all(ms > 0.0 for each in (ours, theirs) for ms in each["ms"])
