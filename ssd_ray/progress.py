"""A line on the terminal that shows how far many prompts have come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssd_ray.outputs import RequestOutput
from ssd_ray.stats import Stats, add


def track(
    outputs: Iterable[RequestOutput], *, total: int | None = None, done: int = 0, show: bool | None = None
) -> Iterator[RequestOutput]:
    """Hand on results, and show on standard error how many there are, tokens per second, hit rate and time left.

    Args:
        total: how many prompts there are, if that is known.
        done: how many of them were done before.
        show: None shows it on a terminal.
    """
    console = Console(stderr=True)
    figures = TextColumn("{task.fields[figures]}")
    columns = ("prompts", BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn())
    disable = not (console.is_terminal if show is None else show)
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        bar = progress.add_task("", total=total, completed=done, figures="")
        start, stats = perf_counter(), Stats()
        for output in outputs:
            stats = Stats(sums=reduce(add, (text.stats.sums for text in output.outputs), stats.sums))
            seconds = perf_counter() - start
            progress.update(bar, advance=1, figures=f"{stats.tokens / seconds:.1f} tokens/s, hits {stats.hit_rate:.0%}")
            yield output
