"""``ssd-ray bench``: what it measures, a table, and one JSON line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ssd_ray.bench.methods import OWN, THEIRS, Result, compare, on_cores, per_round, target_cores, verdict
from ssd_ray.bench.prompts import held_out_prompts
from ssd_ray.config import EngineConfig, Quantize, SamplingParams

if TYPE_CHECKING:
    from ssd_ray.bench.batches import Figure as BatchFigure
    from ssd_ray.bench.grid import Figure as GridFigure
    from ssd_ray.bench.machine import Figures as MachineFigures
    from ssd_ray.bench.policies import Figure

SHORT = {"transformers": "hf", "assisted": "hf+draft"}

_GRID_HELP = {
    "token_cost": "A further token costs this fraction of a forward's fixed part; default: 0, 0.03, 0.1, 0.3.",
    "step": "A draft step is this fraction of a verification; default: 1/3, 1/6, 1/16.",
    "drag": "Drafting beside it slows a verification by this fraction; default: 0, 0.2, 0.6.",
    "acceptance": "Drafted tokens that are accepted; default: 0.3, 0.5, 0.7, 0.9.",
}

app = typer.Typer(help="Measure. Each command prints a table and ends with one JSON line.", invoke_without_command=True)


@app.callback()
def default(context: typer.Context) -> None:
    """Without a command: `methods`."""
    if context.invoked_subcommand is None:
        methods()


@app.command()
def methods(
    target: Annotated[str | None, typer.Option(help="Target model; default: the bundled one.")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft model; default: the bundled one.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 20,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 192,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 128,
    temperature: Annotated[list[float] | None, typer.Option(help="Repeat for several; default: 0 and 1.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Repeat for several; default: all.")] = None,
    lookahead: Annotated[int | None, typer.Option(help="Default: auto.")] = None,
    num_drafts: Annotated[int, typer.Option(min=0)] = 1,
    dtype: Annotated[str, typer.Option()] = "auto",
    quantize: Annotated[
        Quantize,
        typer.Option(help="Bits of weights in our engines alone.", metavar="<choice>"),
    ] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    transport: Annotated[str, typer.Option()] = "auto",
    lookup: Annotated[bool, typer.Option(help="Look tokens up in the text, too.")] = True,
) -> None:
    """Compare ar, sd and ssd with transformers' generation and assisted generation, on the same prompts and cores."""
    from ssd_ray.models.info import load_tokenizer

    config = EngineConfig.from_kwargs(
        target=target,
        draft=draft,
        lookahead=lookahead or "auto",
        num_drafts=num_drafts,
        dtype=dtype,
        quantize=quantize,
        device=device,
        transport=transport,
        max_num_seqs=1,
        text_lookup=lookup,
    )
    chosen = held_out_prompts(load_tokenizer(target), count=prompts, tokens=prompt_tokens)
    base = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    params = [replace(base, temperature=value) for value in temperature or [0.0, 1.0]]
    console = Console(stderr=True)
    with console.status("starting") as status:
        results = compare(config, chosen, params, method or (*OWN, *THEIRS), status.update)
    out = _console()
    for each in params:
        out.print(_table([result for result in results if result.temperature == each.temperature], each, len(chosen)))
    out.print(verdict(results))
    _report("methods", [result.as_dict() for result in results])


@app.command()
def batches(
    target: Annotated[str | None, typer.Option(help="Target model; default: the bundled one.")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft model; default: the bundled one.")] = None,
    size: Annotated[list[int] | None, typer.Option(min=1, help="Repeat for several; default: 1, 2, 4, 8, 16.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Repeat for several; default: ar, sd, ssd.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate for each prompt.")] = 96,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    repeat: Annotated[int, typer.Option(min=1, help="Times that each batch is served.")] = 3,
    num_drafts: Annotated[int, typer.Option(min=0)] = 1,
    dtype: Annotated[str, typer.Option()] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    lookup: Annotated[bool, typer.Option(help="Look tokens up in the text, too.")] = True,
    prefix_cache: Annotated[bool, typer.Option(help="Also where a batch has been served before.")] = False,
) -> None:
    """Compare ar, sd and ssd with several requests at once: total tokens/s, time per token, and how even it is."""
    from ssd_ray.bench.batches import LONGEST, compare_batches
    from ssd_ray.models.info import load_tokenizer

    sizes = sorted(size or [1, 2, 4, 8, 16])
    config = EngineConfig.from_kwargs(
        target=target,
        draft=draft,
        num_drafts=num_drafts,
        dtype=dtype,
        device=device,
        max_num_seqs=max(sizes),
        text_lookup=lookup,
        prefix_cache=prefix_cache,
    )
    chosen = held_out_prompts(load_tokenizer(target), count=max(sizes), tokens=LONGEST)
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
    with Console(stderr=True).status("starting") as status:
        figures = compare_batches(
            config, chosen, params, sizes, methods=method or OWN, repeat=repeat, progress=status.update
        )
    title = f"temperature {temperature:g}, {max_tokens} tokens each, {repeat} times; medians"
    _console().print(_batches_table(figures, title))
    results = [_rounded(each) for each in figures]
    _report("batches", results)


@app.command()
def soak(
    target: Annotated[str | None, typer.Option(help="Target model; default: the bundled one.")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft model; default: the bundled one.")] = None,
    requests: Annotated[int, typer.Option(min=2, help="Requests to serve.")] = 5000,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests in which caches fill, before memory counts.")] = 2000,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that decode at the same time.")] = 16,
    num_drafts: Annotated[int, typer.Option(min=0)] = 1,
    seed: Annotated[int, typer.Option(help="Of all that is chosen.")] = 0,
) -> None:
    """Serve thousands of short requests, some cancelled, some forgotten: whether memory grows, and all comes back."""
    from ssd_ray.bench.soak import soak as serve
    from ssd_ray.models.info import load_tokenizer

    config = EngineConfig.from_kwargs(target=target, draft=draft, num_drafts=num_drafts, max_num_seqs=max_num_seqs)
    texts = held_out_prompts(load_tokenizer(target), count=30, tokens=400)
    warm_up = min(warm_up, requests - 1)
    with Console(stderr=True).status("") as status:
        report = serve(config, texts, requests, warm_up=warm_up, seed=seed, progress=status.update)
    table = Table(
        title=f"{requests} requests, {report.requests_per_s:.1f} per second, {report.tokens_per_s:.0f} tokens/s",
        caption=f"{report.kv_pages_held} of {report.kv_pages} KV pages held at the end",
        box=SIMPLE,
    )
    for column in ("MiB resident", f"after {warm_up}", "at the end", "per 1,000 requests"):
        table.add_column(column, justify="right")
    for name, each in report.memory.items():
        table.add_row(name, f"{each.start:.0f}", f"{each.end:.0f}", f"{each.growth:+.2f}")
    _console().print(table)
    _report("soak", asdict(report))


@app.command()
def chaos(
    target: Annotated[str | None, typer.Option(help="Target model; default: the bundled one.")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft model; default: the bundled one.")] = None,
    faults: Annotated[int, typer.Option(min=1, help="Faults, one after the other.")] = 100,
    every: Annotated[float, typer.Option(min=0.001, help="Seconds between two faults, on average.")] = 0.5,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Clients, each with a text under way.")] = 8,
    num_drafts: Annotated[int, typer.Option(min=1, help="Drafts at the start.")] = 1,
    most_drafts: Annotated[int, typer.Option(min=1, help="Drafts that there are at most.")] = 2,
    spare_targets: Annotated[int, typer.Option(min=0, help="Targets that wait to take over.")] = 0,
    dtype: Annotated[str, typer.Option()] = "auto",
    seed: Annotated[int, typer.Option(help="Of all that is chosen.")] = 0,
) -> None:
    """Stop, kill and scale an engine's processes under running requests: whether a text changes or a request is lost.

    The exit code is 1 if one does, or if a process outlives the engine.
    """
    from ssd_ray.bench.chaos import chaos as disturb
    from ssd_ray.models.info import load_tokenizer

    config = EngineConfig.from_kwargs(
        target=target,
        draft=draft,
        num_drafts=num_drafts,
        max_num_seqs=max_num_seqs,
        spare_targets=spare_targets,
        dtype=dtype,
    )
    texts = held_out_prompts(load_tokenizer(target), count=30, tokens=400)
    with Console(stderr=True).status("") as status:
        report = disturb(
            config, texts, faults, every_s=every, most_drafts=most_drafts, seed=seed, progress=status.update
        )
    table = Table(
        title=f"{report.texts} texts, {report.changed} changed, {sum(report.lost.values())} lost; "
        f"{report.left} processes left",
        caption=_stills(*report.still_ms),
        box=SIMPLE,
    )
    table.add_column("fault")
    table.add_column("times", justify="right")
    for kind, count in sorted(report.faults.items()):
        table.add_row(kind, str(count))
    _console().print(table)
    _report("chaos", asdict(report))
    if not report.held:
        raise typer.Exit(1)


@app.command()
def policies(
    target: Annotated[str | None, typer.Option(help="Target model; default: the bundled one.")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft model; default: the bundled one.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 192,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 96,
    temperature: Annotated[list[float] | None, typer.Option(help="Repeat for several; default: 0, 0.7, 1.")] = None,
    verify_ms: Annotated[float | None, typer.Option(min=0.001, help="A verification takes; default: measured.")] = None,
    step_ms: Annotated[float | None, typer.Option(min=0.001, help="A draft step takes; default: measured.")] = None,
    lookup: Annotated[bool, typer.Option(help="Look tokens up in the text, too.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture, too: a PNG file.")] = None,
) -> None:
    """Compare fan-outs, samplers and backups in virtual time: what each is worth on any hardware."""
    from ssd_ray.bench.plot import check_plotting
    from ssd_ray.bench.plot import plot as draw
    from ssd_ray.bench.policies import compare_policies
    from ssd_ray.bench.rehearsal import measure
    from ssd_ray.models.info import load_tokenizer
    from ssd_ray.models.loader import load_runner
    from ssd_ray.speculation.window import SCRATCH

    if plot is not None:
        check_plotting(plot)
    chosen = held_out_prompts(load_tokenizer(target), count=prompts, tokens=prompt_tokens)
    pair = (
        load_runner(target, role="target", rows=1, scratch=SCRATCH),
        load_runner(draft, role="draft", rows=1, scratch=SCRATCH),
    )
    temperatures = temperature or [0.0, 0.7, 1.0]
    figures = []
    with Console(stderr=True).status("measuring forwards") as status, on_cores(target_cores()):
        hardware = measure(*pair, chosen[0], max_tokens=max_tokens)
        given = {"verify_ms": verify_ms, "step_ms": step_ms}
        hardware = replace(hardware, **{name: value for name, value in given.items() if value is not None})
        variants = compare_policies(*pair, hardware, chosen, temperatures, max_tokens=max_tokens, text_lookup=lookup)
        for figure in variants:
            figures.append(figure)
            status.update(f"temperature {figure.temperature:g}, {figure.study}: {figure.name}, {figure.budget}")
    title = (
        f"{prompts} held-out prompts; a verification {hardware.verify_ms:.1f} ms, a draft step {hardware.step_ms:.1f}"
    )
    for study in ("fan-out", "sampler", "backup"):
        _console().print(_study_table([figure for figure in figures if figure.study == study], title))
    if plot is not None:
        draw(figures, plot, title)
    results = [_rounded(figure) for figure in figures]
    _report("policies", results, hardware=asdict(hardware))


@app.command()
def forecast(
    verify_ms: Annotated[float, typer.Option(min=0.001, help="A verification of the whole batch takes.")],
    step_ms: Annotated[float, typer.Option(min=0.001, help="A draft step takes.")],
    acceptance: Annotated[float, typer.Option(min=0.0, max=1.0, help="How often a drafted token is accepted.")],
    hit_rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="Outcomes that one draft prepares for.")] = 0.85,
    exponent: Annotated[float, typer.Option(min=0.0, help="r: n drafts miss n^-r times as often.")] = 0.7,
    host_ms: Annotated[float, typer.Option(min=0.0, help="A round's other work.")] = 0.6,
    message_ms: Annotated[float, typer.Option(min=0.0, help="To the draft and back.")] = 0.3,
) -> None:
    """Predict tokens/s of ar, sd and ssd on other hardware, with many drafts, and for batches, by simulation."""
    from ssd_ray.bench.simulate import Hardware
    from ssd_ray.bench.simulate import forecast as predict

    hardware = Hardware(verify_ms, step_ms, host_ms, message_ms)
    figures = predict(hardware, acceptance, hit_rate, exponent)
    table = Table(title="tokens/s of all rows together (share of the time verifying)", box=SIMPLE)
    table.add_column("rows in a batch", justify="right")
    for method in next(iter(figures.values())):
        table.add_column(method, justify="right")
    for rows, methods in figures.items():
        table.add_row(str(rows), *(f"{each.tokens_per_s:.0f} ({each.duty_cycle:.2f})" for each in methods.values()))
    _console().print(table)
    results = {rows: {name: asdict(each) for name, each in methods.items()} for rows, methods in figures.items()}
    print(json.dumps({"bench": "forecast", "hardware": asdict(hardware), "results": results}))


@app.command()
def grid(
    token_cost: Annotated[list[float] | None, typer.Option(min=0.0, help=_GRID_HELP["token_cost"])] = None,
    step: Annotated[list[float] | None, typer.Option(min=0.001, help=_GRID_HELP["step"])] = None,
    drag: Annotated[list[float] | None, typer.Option(min=0.0, help=_GRID_HELP["drag"])] = None,
    acceptance: Annotated[list[float] | None, typer.Option(min=0.05, max=0.99, help=_GRID_HELP["acceptance"])] = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Requests at once; default: 1, 4, 16, 64.")] = None,
    quick: Annotated[bool, typer.Option(help="The corners alone, for one request, and shorter texts.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Of a cell; default: 400, quick: 200.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the models and prompts.")] = 0,
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one for each core.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture, too: a PNG file.")] = None,
) -> None:
    """Compare ssd with the best of ar and sd on many machines, in virtual time. Options may be repeated."""
    from ssd_ray.bench.grid import BRIEF, QUICK, Axes, Load, survey
    from ssd_ray.bench.plot import check_plotting, plot_grid

    if plot is not None:
        check_plotting(plot)
    given: dict[str, Any] = {
        "token_costs": token_cost,
        "steps": step,
        "drags": drag,
        "acceptances": acceptance,
        "rows": rows,
    }
    axes = replace(QUICK if quick else Axes(), **{name: sorted(values) for name, values in given.items() if values})
    load = replace(BRIEF if quick else Load(), seed=seed)
    load = load if rounds is None else replace(load, rounds=rounds)
    cells, figures = axes.cells, []
    with Console(stderr=True).status("plain decoding") as status:
        for figure in survey(cells, load, processes or cores()):
            figures.append(figure)
            status.update(f"{len(figures)} of {len(cells)} cells")
    for each in axes.rows:
        _console().print(_grid_table([figure for figure in figures if figure.cell.rows == each], each))
    if plot is not None:
        plot_grid(figures, plot)
    print(
        json.dumps({"bench": "grid", "load": asdict(load), "results": [_round_all(each.as_dict()) for each in figures]})
    )


@app.command("machine")
def costs(
    target: Annotated[str | None, typer.Option(help="Target model; default: the bundled one.")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft model; default: the bundled one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ..")] = "auto",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    compile: Annotated[bool, typer.Option(help="Compile the forwards.")] = False,
) -> None:
    """Show what verifications and draft steps cost here. What an engine has measured before is read; with
    SSD_RAY_CACHE set to nothing it is measured again."""
    from ssd_ray.bench.machine import examine

    config = EngineConfig(
        target=target,
        draft=draft,
        dtype=dtype,  # type: ignore[arg-type]
        device=device,
        max_num_seqs=max_num_seqs,
        compile=compile,
    )
    with Console(stderr=True).status("measuring forwards"), on_cores(target_cores()):
        figures = list(examine(config))
    for each in figures:
        _console().print(_costs_table(each))
    _report("machine", [asdict(each) for each in figures])


def _stills(median: float, most: float, longest: float) -> str:
    return f"A text stood still for {median:.0f} ms (median), {most:.0f} (99 %), {longest:.0f} (the longest)"


def _table(results: Sequence[Result], params: SamplingParams, prompts: int) -> Table:
    table = Table(
        title=f"temperature {params.temperature:g}, {prompts} held-out prompts x {params.max_tokens} tokens; medians",
        caption="x sd: times as fast as sd. CPU s: processor seconds for 1,000 tokens. verified: tokens for each one "
        "that is kept.\nA round: ms of verifying + waiting for drafts + all else in the loop",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    others = [result for result in results if result.method != "ssd"]
    table.add_column("method")
    headers = ("tokens/s", *(f"x {SHORT.get(each.method, each.method)}" for each in others))
    for column in (*headers, "CPU s", "tokens/round", "verified", "hits", "duty", "a round"):
        table.add_column(column, justify="right")
    for result in results:
        ratios = [f"{result.ratio(other):.2f}" for other in others]
        cpu = f"{result.processor_seconds:.1f}"
        table.add_row(result.method, f"{result.rate:.1f}", *ratios, cpu, *_round(result))
    return table


def _study_table(figures: Sequence[Figure], title: str) -> Table:
    """A row for each variant and budget, three columns for each temperature."""
    table = Table(title=f"{figures[0].study}: {title}", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("outcomes", justify="right")
    temperatures = sorted({figure.temperature for figure in figures})
    for value in temperatures:
        for column in ("hits", "tokens/round", "tokens/s"):
            table.add_column(f"T = {value:g}\n{column}", justify="right")
    for name, budget in dict.fromkeys((figure.name, figure.budget) for figure in figures):
        cells = []
        for value in temperatures:
            found = [each for each in figures if (each.name, each.budget, each.temperature) == (name, budget, value)]
            cells += (
                [f"{found[0].hit_rate:.3f}", f"{found[0].tokens_per_round:.2f}", f"{found[0].tokens_per_s:.1f}"]
                if found
                else [""] * 3
            )
        table.add_row(name, str(budget), *cells)
    return table


def _batches_table(figures: Sequence[BatchFigure], title: str) -> Table:
    table = Table(
        title=title,
        caption="ms per token: of one request, after its first tokens. slowest: against the median request, per token\n"
        "and per round. same: texts that are those of the smallest batch and the first method. verified: tokens\n"
        "for each that is kept. CPU s: processor seconds for 1,000 tokens",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    columns = {
        "ms per token": "median_ms",
        "99th": "p99_ms",
        "slowest": "slowest",
        "by round": "slowest_round",
        "same": "same",
        "duty": "duty_cycle",
        "hits": "hit_rate",
        "tokens/round": "tokens_per_round",
        "verified": "verified_per_token",
        "CPU s": "processor_seconds",
    }
    for column in ("at once", "method", "tokens/s", *columns):
        table.add_column(column, justify="right")
    for each in figures:
        rows = f"{each.rows} of all lengths" if each.mixed else str(each.rows)
        values = [f"{getattr(each, field):.2f}" for field in columns.values()]
        table.add_row(rows, each.method, f"{each.tokens_per_s:.1f}", *values)
    return table


def _grid_table(figures: Sequence[GridFigure], rows: int) -> Table:
    """A line for each machine, a column for each acceptance."""
    from ssd_ray.bench.grid import reached

    worst = min(figures, key=lambda figure: figure.ratio)
    table = Table(
        title=f"{rows} at once: ssd against the better of ar and sd's best fixed lookahead (what theory has at best)",
        caption=f"at worst {worst.ratio:.2f}; in {sum(each.ratio < 0.98 for each in figures)} of {len(figures)} cells "
        f"below 0.98; reached {reached(figures):.0%} of the gain that theory has (median where it has 5% or more)",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    acceptances = sorted({figure.cell.acceptance for figure in figures})
    for column in ("further token", "draft step", "drag", *(f"{each:.0%} accepted" for each in acceptances)):
        table.add_column(column, justify="right")
    machines: dict[tuple[float, float, float], list[str]] = {}
    for figure in figures:
        machine = (figure.cell.token_cost, figure.cell.step, figure.cell.drag)
        machines.setdefault(machine, []).append(f"{figure.ratio:.2f} ({figure.ceiling:.2f})")
    for (token_cost, step, drag), ratios in machines.items():
        table.add_row(f"{token_cost:.0%}", f"{step:.3f}", f"{drag:.0%}", *ratios)
    return table


def _costs_table(figures: MachineFigures) -> Table:
    """A line for each number of tokens up to the largest one that was tried."""
    what = "a verification" if figures.role == "target" else "a step"
    packed = ", packed" if figures.packed else ""
    table = Table(
        title=f"{figures.role}: {what} in {figures.dtype} on {figures.device}{packed}",
        caption=f"every further row adds {figures.row_ms:.2f} ms" if figures.role == "target" else None,
        box=SIMPLE,
    )
    for column in ("tokens", "run as", "ms", "a token", *(["same bits"] if figures.role == "target" else [])):
        table.add_column(column, justify="right")
    largest = max(figures.sizes, default=1)
    for tokens in (1 << power for power in range(largest.bit_length())):
        size, took = figures.run_as(tokens), figures.forward_ms(tokens)
        alike = [] if figures.role == "draft" else ["no" if size in figures.unsteady else "yes"]
        table.add_row(str(tokens), str(size), f"{took:.2f}", f"{took / tokens:.2f}", *alike)
    return table


def _rounded(figure: Any) -> dict[str, Any]:
    """The fields of a figure for JSON."""
    return _round_all(asdict(figure))


def _round_all(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}


def _console() -> Console:
    """The terminal; into a file or a pipe tables go unbroken."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _round(result: Result) -> list[str]:
    """The last columns of a row: empty for what is not ours."""
    if result.stats is None:
        return []
    figures = per_round(result.stats)
    parts = "+".join(f"{figures[name]:.1f}" for name in ("verify_ms", "wait_ms", "host_ms"))
    columns = ("tokens_per_round", "verified_per_token", "hit_rate", "duty_cycle")
    return [*(f"{figures[name]:.2f}" for name in columns), parts]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch
    import transformers

    from ssd_ray.models.processor import processor

    name, instructions = processor()
    return {
        "processor": name,
        "instructions": instructions,
        "limit": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "cores": cores(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _report(bench: str, results: Any, **more: Any) -> None:
    """Say what was measured on, and write all figures down as a line of JSON."""
    on = machine()
    said = ", ".join([*on["instructions"], *([f"limited to {on['limit']}"] if on["limit"] else [])])
    _console().print(f"Measured on {on['processor']}, {on['cores']} cores{said and f' ({said})'}.")
    print(json.dumps({"bench": bench, "machine": on, **more, "results": results}))
