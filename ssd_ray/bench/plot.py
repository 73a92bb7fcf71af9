"""What `ssd-ray bench policies` and `ssd-ray bench grid` found, as one picture each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ssd_ray.bench.grid import Figure as GridFigure
from ssd_ray.bench.policies import Figure
from ssd_ray.errors import ConfigError

_STYLES = {
    "uniform": ("o", "tab:gray"),
    "geometric": ("s", "tab:brown"),
    "histogram": ("^", "tab:orange"),
    "confidence": ("D", "tab:blue"),
    "auto": ("x", "tab:green"),
}
"""Marker and colour of each fan-out policy; on paper without colour the marker tells."""


def check_plotting(path: Path) -> None:
    """See that a picture can be drawn there, before anything is measured.

    Raises:
        ConfigError: matplotlib is missing, or the folder is.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError("plot", "a file in a folder that exists", str(path))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        expected = "left out, or matplotlib installed: pip install 'ssd-ray[bench]'"
        raise ConfigError("plot", expected, str(path)) from None


def plot(figures: Sequence[Figure], path: Path, title: str) -> None:
    """Draw a picture of the studies: a row for each, a column for each temperature; PNG by the name's ending."""
    from matplotlib.figure import Figure as Sheet

    temperatures = sorted({figure.temperature for figure in figures})
    sheet = Sheet(figsize=(1.5 + 4.0 * len(temperatures), 11.0), layout="constrained")
    grid = sheet.subplots(3, len(temperatures), squeeze=False, sharey="row")
    for column, temperature in enumerate(temperatures):
        here = [figure for figure in figures if figure.temperature == temperature]
        _fan_out(grid[0][column], [figure for figure in here if figure.study == "fan-out"])
        _bars(grid[1][column], [figure for figure in here if figure.study == "sampler"], "tab:blue")
        _bars(grid[2][column], [figure for figure in here if figure.study == "backup"], "tab:green")
        grid[0][column].set_title(f"temperature {temperature:g}", fontweight="bold")
    grid[0][0].legend()
    grid[0][0].set_ylabel("which outcomes to prepare for\nshare of rounds that were prepared for")
    grid[1][0].set_ylabel("how to sample, 16 outcomes a round\ntokens/s (on the bars: rounds prepared for)")
    grid[2][0].set_ylabel("what to do when not prepared\ntokens/s (on the bars: tokens a round)")
    sheet.suptitle(title)
    sheet.savefig(path, dpi=120)


def _fan_out(axes: Any, figures: Sequence[Figure]) -> None:
    """Lines of hit rate over budget."""
    for name, (marker, colour) in _STYLES.items():
        line = sorted((figure.budget, figure.hit_rate) for figure in figures if figure.name == name)
        axes.plot(*zip(*line, strict=True), marker=marker, color=colour, label=name)
    axes.set_xscale("log", base=2)
    budgets = sorted({figure.budget for figure in figures})
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.set_xlabel("outcomes that may be prepared for in a round")
    axes.grid(alpha=0.3)


def _bars(axes: Any, figures: Sequence[Figure], colour: str) -> None:
    """A bar of tokens/s for each variant, the fastest one in full colour."""
    best = max(figures, key=lambda figure: figure.tokens_per_s)
    shades = [1.0 if figure is best else 0.45 for figure in figures]
    names = [figure.name.replace(", ", ",\n") for figure in figures]
    bars = axes.bar(names, [figure.tokens_per_s for figure in figures], color=[(colour, shade) for shade in shades])
    sampler = figures[0].study == "sampler"
    labels = [f"{figure.hit_rate:.0%}" if sampler else f"{figure.tokens_per_round:.2f}" for figure in figures]
    axes.bar_label(bars, labels)
    axes.set_xlim(-0.6, max(len(figures), 3) - 0.4)
    axes.tick_params(axis="x", labelsize="small")


def plot_grid(figures: Sequence[GridFigure], path: Path) -> None:
    """Draw a picture of a grid: a panel for each batch and acceptance; in it a column for each cost of a token, a line
    for each step and drag, and in each cell how many times as fast ssd is, and how many times theory has at best."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure as Sheet

    batches = sorted({figure.cell.rows for figure in figures})
    acceptances = sorted({figure.cell.acceptance for figure in figures})
    machines = {(figure.cell.step, figure.cell.drag) for figure in figures}
    sheet = Sheet(figsize=(2.0 + 3.4 * len(acceptances), 1.2 + (0.9 + 0.3 * len(machines)) * len(batches)))
    sheet.set_layout_engine("constrained")
    panels = sheet.subplots(len(batches), len(acceptances), squeeze=False, sharex=True, sharey=True)
    norm = TwoSlopeNorm(1.0, 0.5, 2.0)
    for (row, batch), (column, acceptance) in product(enumerate(batches), enumerate(acceptances)):
        axes = panels[row][column]
        here = [each for each in figures if (each.cell.rows, each.cell.acceptance) == (batch, acceptance)]
        image = _panel(axes, here, norm)
        axes.set_title(f"{batch} at once, {acceptance:.0%} accepted", fontsize="medium")
    sheet.supxlabel("what a further token costs, of the fixed part of a forward", fontsize="medium")
    sheet.supylabel("draft step, of a verification; drag", fontsize="medium")
    sheet.colorbar(image, ax=panels, shrink=0.6)
    sheet.suptitle(
        "ssd against the better of ar and sd (in brackets: what theory has at best)\nbold: below 0.98",
        fontsize="medium",
    )
    sheet.savefig(path, dpi=110)


def _panel(axes: Any, figures: Sequence[GridFigure], norm: Any) -> Any:
    """One batch and acceptance; returns what the colours belong to."""
    costs = sorted({figure.cell.token_cost for figure in figures})
    machines = sorted(
        {(figure.cell.step, figure.cell.drag) for figure in figures}, key=lambda each: (-each[0], each[1])
    )
    places = {(cost, *machine): (x, y) for x, cost in enumerate(costs) for y, machine in enumerate(machines)}
    values = [[1.0] * len(costs) for _ in machines]
    for figure in figures:
        x, y = places[figure.cell.token_cost, figure.cell.step, figure.cell.drag]
        values[y][x] = figure.ratio
        weight = "bold" if figure.ratio < 0.98 else "normal"
        axes.text(
            x, y, f"{figure.ratio:.2f} ({figure.ceiling:.2f})", ha="center", va="center", fontsize=7, weight=weight
        )
    axes.set_xticks(range(len(costs)), [f"{cost:.0%}" for cost in costs])
    axes.set_yticks(range(len(machines)), [f"1/{1 / step:.3g}, {drag:.0%}" for step, drag in machines], fontsize=7)
    return axes.imshow(values, cmap="RdYlGn", norm=norm, aspect="auto")
