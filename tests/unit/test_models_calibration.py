"""What is measured on a machine: costs, numbers of tokens that leave bits alone, the dtype; and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from math import inf
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ssd_ray.models import dtypes
from ssd_ray.models.calibration import (
    GRID,
    PER_ROW,
    WIDTHS,
    WORTH,
    Calibration,
    cache_path,
    calibrate,
    calibrate_steps,
    choose_sizes,
    keep,
    kept_or_made,
    machine_name,
    read,
)
from ssd_ray.models.runner import HFRunner
from ssd_ray.models.table import TableModel
from ssd_ray.saguaro.costs import Measured
from tests.support.tiny import tiny_model

SOME = Calibration(Measured((1, 8), (3.0, 9.0), 0.5), (1, 8), (1,))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where things are kept."""
    monkeypatch.setenv("SSD_RAY_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


TRIED = st.lists(st.tuples(st.floats(0.1, 100.0), st.booleans()), min_size=1, max_size=len(GRID))


@given(TRIED, st.booleans())
def test_the_sizes_are_the_cheapest_that_leave_bits_alone(tried: list[tuple[float, bool]], exact: bool) -> None:
    sizes, (ms, alike) = GRID[: len(tried)], zip(*tried, strict=True)
    assume(any(alike))  # most are
    steady, unsteady = choose_sizes(sizes, ms, alike, exact=exact)
    cost, same = dict(zip(sizes, ms, strict=True)), dict(zip(sizes, alike, strict=True))
    assert list(steady) == sorted(set(steady))
    assert set(steady) <= set(sizes)
    assert set(unsteady) == {size for size in steady if not same[size]}
    assert not (exact and unsteady)
    assert max(steady) == max(size for size in sizes if same[size] or not exact)
    costs = [cost[size] for size in steady]
    assert costs == sorted(set(costs))  # more tokens take more time: else fewer are run as more
    for size in unsteady:
        assert all(cost[size] < WORTH * cost[larger] for larger in steady if larger > size)


@given(TRIED, st.booleans())
def test_no_number_of_tokens_runs_dearer_than_a_size_that_is_alike(
    tried: list[tuple[float, bool]], exact: bool
) -> None:
    sizes, (ms, alike) = GRID[: len(tried)], zip(*tried, strict=True)
    assume(any(alike))  # most are
    steady, _ = choose_sizes(sizes, ms, alike, exact=exact)
    cost = dict(zip(sizes, ms, strict=True))
    for size, same in zip(sizes, alike, strict=True):
        if same:
            run_as = next(each for each in steady if each >= size)
            assert cost[run_as] <= cost[size]


def test_a_size_with_other_bits_is_run_only_in_float32_and_only_where_it_gains_much() -> None:
    sizes, alike = (1, 2, 4), (False, True, True)
    assert choose_sizes(sizes, (5.0, 8.0, 9.0), alike, exact=True) == ((2, 4), ())
    assert choose_sizes(sizes, (5.0, 8.0, 9.0), alike, exact=False) == ((1, 2, 4), (1,))
    assert choose_sizes(sizes, (7.5, 8.0, 9.0), alike, exact=False) == ((2, 4), ())


class TestKeeping:
    def test_what_was_made_is_read_again(self) -> None:
        made: list[Calibration] = []

        def make() -> Calibration:
            made.append(SOME)
            return SOME

        assert kept_or_made("a", make) == kept_or_made("a", make) == SOME
        assert len(made) == 1
        kept_or_made("b", make)
        assert len(made) == 2

    def test_nothing_else_is_left_behind(self, folder: Path) -> None:
        kept_or_made("a", lambda: SOME)
        assert [each.name for each in folder.iterdir()] == ["a.json"]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"\xff\x00",
            b"null",
            b"[1, 2]",
            b'{"measured": {"sizes": [], "ms": []}, "steady": []}',
            b'{"torch.bfloat16": 1.0}',
        ],
    )
    def test_what_is_broken_or_another_programs_is_made_again(self, folder: Path, content: bytes) -> None:
        folder.mkdir()
        (folder / "a.json").write_bytes(content)
        assert kept_or_made("a", lambda: SOME) == SOME
        assert msgspec.json.decode((folder / "a.json").read_bytes(), type=Calibration) == SOME

    def test_an_empty_name_of_the_folder_keeps_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SSD_RAY_CACHE", "")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_path("a") is None
        made = count()
        for _ in range(2):
            kept_or_made("a", lambda: Calibration(SOME.measured, (next(made) + 1,)))
        assert next(made) == 2
        assert list(tmp_path.iterdir()) == []

    def test_by_default_it_is_the_users_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SSD_RAY_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_path("a") == tmp_path / "ssd-ray" / "a.json"

    def test_a_folder_that_cannot_be_written_is_no_error(self, folder: Path) -> None:
        folder.write_text("in the way")
        keep(cache_path("a"), SOME)
        assert read(cache_path("a"), Calibration) is None
        assert kept_or_made("a", lambda: SOME) == SOME


def test_a_machines_name_tells_instruction_sets_threads_and_models_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    plain = machine_name("llama")
    assert plain == machine_name("llama")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine_name("llama") != plain
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert len({plain, machine_name("llama"), machine_name("qwen")}) == 3
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert machine_name("llama") != plain


def ticking() -> Callable[[], float]:
    """A clock on which every look takes a millisecond."""
    ticks = count()
    return lambda: 1e-3 * next(ticks)


def tiny_runner(**options: int) -> HFRunner:
    return HFRunner(tiny_model(), rows=2, max_length=64, scratch=128, **options)


def bound_pages(runner: HFRunner) -> list[list[int]]:
    return [runner._kv.table.of(row, runner.slots) for row in range(runner.rows)]


class TestCalibrating:
    def test_it_finds_sizes_and_what_they_cost(self) -> None:
        runner = tiny_runner()
        found = calibrate(runner, clock=ticking())
        assert found.steady == found.measured.sizes
        assert set(found.steady) <= set(GRID)
        assert PER_ROW <= max(found.steady) <= 2 * PER_ROW
        assert set(found.unsteady) <= set(found.steady)
        assert len(found.measured.ms) == len(found.steady)
        assert all(0.0 < ms < inf for ms in found.measured.ms)
        assert found.measured.row_ms >= 0.0

    @pytest.mark.parametrize(("bound", "options"), [(True, {}), (False, {"pages": 96})])
    def test_it_tells_tokens_rows_and_slots_apart(self, bound: bool, options: dict[str, int]) -> None:
        now = 0.0

        class Costly(TableModel):
            def append(self, rows, tokens, starts):  # type: ignore[no-untyped-def]
                nonlocal now
                now += 1e-3 * (5.0 + 0.5 * sum(map(len, tokens)) + 0.3 * (len(rows) - 1) + 0.01 * sum(starts))
                return super().append(rows, tokens, starts)

        model = Costly(rows=4, max_length=256, page_slots=16, **options)
        measured = calibrate(model, bound=bound, clock=lambda: now).measured
        assert measured.ms == pytest.approx([5.0 + 0.5 * size for size in measured.sizes])
        assert (measured.row_ms, measured.slot_ms) == (pytest.approx(0.3), pytest.approx(0.01))

    def test_a_disturbance_does_not_make_many_rows_cheaper_than_one_token(self) -> None:
        """Should nothing but the forwards of many rows of one token be slow, as others need the processor then."""
        now, model = 0.0, TableModel(rows=32, max_length=256, page_slots=16)
        append = model.append

        def disturbed(rows, tokens, starts):  # type: ignore[no-untyped-def]
            nonlocal now
            alone = max(map(len, tokens)) == 1 and len(rows) > 2
            now += 1e-3 * (5.0 + 0.01 * sum(map(len, tokens)) + 50.0 * alone)
            return append(rows, tokens, starts)

        model.append = disturbed  # type: ignore[method-assign]
        found = calibrate(model, clock=lambda: now)
        assert min(found.steady) == 1
        assert min(found.measured.ms) == pytest.approx(found.measured.ms[0])

    @pytest.mark.parametrize("find", [calibrate, calibrate_steps])
    def test_pages_are_left_as_they_were(self, find: Callable[..., Calibration]) -> None:
        whole = tiny_runner()
        before = bound_pages(whole)
        find(whole, clock=ticking())
        assert bound_pages(whole) == before
        pooled = tiny_runner(pages=6)
        before = bound_pages(pooled)
        assert before[0] == [pooled.num_pages] * len(before[0])  # nothing is bound
        find(pooled, bound=False, clock=ticking())
        assert bound_pages(pooled) == before

    def test_a_small_pool_has_few_rows(self) -> None:
        runner = tiny_runner(pages=1)
        found = calibrate(runner, bound=False, clock=ticking())
        assert max(found.steady) <= PER_ROW
        assert found.measured.row_ms == 0.0

    def test_sizes_for_which_there_is_no_time_are_left_out(self) -> None:
        """All tokens of one row are tried, however long it takes."""
        slow = count()
        found = calibrate(tiny_runner(), clock=lambda: float(next(slow)))
        assert max(found.steady) == PER_ROW

    def test_a_drafts_steps_have_their_widths(self) -> None:
        found = calibrate_steps(tiny_runner(), clock=ticking())
        assert found.measured.sizes == WIDTHS
        assert all(0.0 < ms < inf for ms in found.measured.ms)

    def test_what_was_found_can_be_kept_and_run(self) -> None:
        runner = tiny_runner()
        found = calibrate(runner, clock=ticking())
        keep(cache_path("a"), found)
        assert read(cache_path("a"), Calibration) == found
        tokens = [[1, 2, 3, 4, 5], [6, 7]]
        before = runner.append([0, 1], tokens, [0, 0])
        runner.adopt(found)
        assert runner.measured == found.measured
        for one, other in zip(before, runner.append([0, 1], tokens, [0, 0]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    def test_bits_that_differ_are_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A model that rounds otherwise in forwards of up to three tokens; nothing else is remarkable about them."""
        runner = tiny_runner()
        append = runner.append

        def rounding(rows: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
            few = sum(map(len, tokens)) <= 3
            return [logits + 1e-6 * few for logits in append(rows, tokens, starts)]

        monkeypatch.setattr(runner, "append", rounding)
        runner.dtype = torch.bfloat16
        assert min(calibrate(runner, clock=ticking()).steady) > 3


class TestDtype:
    """A checkpoint in a dtype for which the processor has no instructions."""

    @staticmethod
    def choose(
        monkeypatch: pytest.MonkeyPatch, own_ms: float, float32_ms: float, *, instructions: bool = False
    ) -> list:
        """The dtype that is chosen, and those that were loaded."""
        loaded: list[torch.dtype] = []

        def load(dtype: torch.dtype) -> torch.dtype:
            loaded.append(dtype)
            return dtype

        times = {torch.bfloat16: own_ms, torch.float32: float32_ms}
        monkeypatch.setattr(dtypes, "has_instructions", lambda dtype: instructions)
        monkeypatch.setattr(dtypes, "forward_ms", times.__getitem__)
        return [dtypes.faster_dtype(torch.bfloat16, load, "model"), *loaded]  # type: ignore[arg-type]

    def test_the_faster_one_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.choose(monkeypatch, 20.0, 10.0)[0] == torch.float32

    def test_its_own_is_taken_where_it_is_no_slower(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.choose(monkeypatch, 10.0, 10.0)[0] == torch.bfloat16

    def test_it_is_measured_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.choose(monkeypatch, 20.0, 10.0) == [torch.float32, torch.bfloat16, torch.float32]
        assert self.choose(monkeypatch, 10.0, 20.0) == [torch.float32]  # kept
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "another")  # as if it were another machine
        assert self.choose(monkeypatch, 10.0, 20.0)[0] == torch.bfloat16

    @pytest.mark.parametrize("content", [b"{}", b'{"own": 1.0}', b"nonsense", b'{"own": "fast"}'])
    def test_a_broken_file_is_measured_anew(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, content: bytes
    ) -> None:
        self.choose(monkeypatch, 20.0, 10.0)
        (file,) = folder.iterdir()
        file.write_bytes(content)
        assert self.choose(monkeypatch, 10.0, 20.0) == [torch.bfloat16, torch.bfloat16, torch.float32]

    def test_with_instructions_nothing_is_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.choose(monkeypatch, 20.0, 10.0, instructions=True) == [torch.bfloat16]

    def test_a_limit_of_the_instruction_set_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        assert dtypes.has_instructions(torch.bfloat16)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core")
        assert not dtypes.has_instructions(torch.bfloat16)

    def test_forwards_take_time(self) -> None:
        assert dtypes.forward_ms(tiny_model()) > 0.0
