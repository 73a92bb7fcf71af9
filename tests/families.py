"""Families of models and what each does here, as one table of which every cell is a test.

``python -m tests.families`` runs the tests of all families, and of real models if ``SSD_RAY_REAL_MODELS`` names some,
and writes docs/families.md. Arguments go to pytest: ``-k "mistral or gemma2"`` runs a part, and leaves the other cells.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"

COLUMNS = ("loads", "ar", "sd", "ssd", "eight at once", "prefix cache")

TESTS = {
    "test_families_that_are_tested_are_found": "loads",
    "test_a_model_loads_in_a_dtype_that_suits_the_machine": "loads",
    "test_ar_writes_what_transformers_writes": "ar",
    "test_eight_at_once_where_memory_is_scarce": "eight at once",
    "test_a_prefix_that_is_there_already": "prefix cache",
}
"""Columns by tests; other tests name theirs among their parameters."""

FILES = ("tests/unit/test_families.py", "tests/integration/test_families.py")
REAL = "tests/real/test_real_models.py"

INTRODUCTION = """# Families

Made by `python -m tests.families` with transformers {version}, {date}. Every cell is a test: a small random model of
the family, whose windows are shorter than the prompts, in float32.

- loads: it is recognised, and its logits over scattered KV are those of its own attention;
- ar: plain decoding writes what transformers' `generate` writes;
- sd, ssd: they write what ar writes, greedy and sampled;
- eight at once: requests that have to give their memory back write what they write with enough of it;
- prefix cache: a text goes on behind a beginning that is there already.

Real models are compared with `generate` in all three ways; what they take beside that is in the cells.
"""

Cells = dict[tuple[str, str], str]
"""By row and column."""


class Recorder:
    """Notes what became of the tests that are cells."""

    def __init__(self) -> None:
        self.cells: Cells = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a test's result: of its call, or of its preparation if that failed."""
        cell = place(report.nodeid)
        if cell is None or (report.when != "call" and report.passed) or report.skipped:
            return
        figures = ", ".join(f"{name} {value}" for name, value in report.user_properties)
        self.cells[cell] = (figures or "yes") if report.passed else "**no**"


def place(nodeid: str) -> tuple[str, str] | None:
    """The row and the column of a test; None if it is no cell."""
    name, _, parameters = nodeid.partition("::")[2].rstrip("]").partition("[")
    found = [part for part in parameters.split("-") if part]
    column = TESTS.get(name) or next((part for part in found if part in COLUMNS), None)
    row = "-".join(part for part in found if part not in COLUMNS)
    return (row, column) if row and column else None


def document(cells: Mapping[tuple[str, str], str], date: str) -> str:
    """The page."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
    for row in sorted({row for row, _ in cells}):
        lines.append(f"| `{row}` | " + " | ".join(cells.get((row, column), "") for column in COLUMNS) + " |")
    return "\n".join([INTRODUCTION.format(version=version("transformers"), date=date), *lines, ""])


def read(page: str) -> Cells:
    """The cells of a page."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    pairs = [
        ((line[0].strip("`"), column), cell) for line in lines for column, cell in zip(COLUMNS, line[1:], strict=True)
    ]
    return {place: cell for place, cell in pairs if cell}


def main(arguments: Sequence[str]) -> int:
    """Run the tests and write the page."""
    recorder = Recorder()
    options = ["-n", "0", "-q", "-m", "not gpu", *arguments]
    status = int(pytest.main([*options, *(str(ROOT / file) for file in (*FILES, REAL))], plugins=[recorder]))
    before = read(PAGE.read_text()) if arguments and PAGE.exists() else {}
    PAGE.write_text(document(before | recorder.cells, f"{datetime.now(UTC):%Y-%m-%d}"))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
