"""Folders of real models, and the figures that tests leave."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

VARIABLE = "SSD_RAY_REAL_MODELS"


@dataclass(frozen=True)
class Models:
    """A target, and a draft that shares its vocabulary."""

    target: Path
    draft: Path


def given() -> list[Models]:
    """What the variable names: ``target`` or ``target,draft``, several of them separated as in PATH. A target that
    comes alone is its own draft."""
    pairs = [entry.split(",") for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]
    return [Models(Path(pair[0]).expanduser(), Path(pair[-1]).expanduser()) for pair in pairs]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of ``models`` runs for each of them."""
    if "models" in metafunc.fixturenames:
        params = given() or [pytest.param(None, marks=pytest.mark.skip(reason=f"{VARIABLE} names no folders"))]
        metafunc.parametrize("models", params, ids=lambda models: models and models.target.name, scope="module")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the figures that tests recorded."""
    reports = [report for report in terminalreporter.getreports("passed") if report.user_properties]
    for report in reports:
        figures = ", ".join(f"{name} {value}" for name, value in report.user_properties)
        terminalreporter.write_line(f"{report.nodeid.split('::')[-1]}: {figures}")
