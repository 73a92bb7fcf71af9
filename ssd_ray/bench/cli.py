"""``ssd-ray bench``: what it measures, a table, and one JSON line."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ssd_ray.bench.methods import OWN, THEIRS, Result, compare, on_cores, per_round, target_cores
from ssd_ray.bench.prompts import held_out_prompts
from ssd_ray.config import MAX_LOOKAHEAD, EngineConfig, SamplingParams

BUDGETS = (8, 16, 32)

SHORT = {"transformers": "hf", "assisted": "hf+draft"}

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
    transport: Annotated[str, typer.Option()] = "auto",
    lookup: Annotated[bool, typer.Option(help="Look tokens up in the text, too.")] = True,
) -> None:
    """Compare ar, sd and ssd with transformers' generation and assisted generation, on the same prompts and cores."""
    from ssd_ray.models.loader import load_tokenizer

    config = EngineConfig.from_kwargs(
        target=target,
        draft=draft,
        lookahead=lookahead or "auto",
        num_drafts=num_drafts,
        dtype=dtype,
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
    out = Console()
    for each in params:
        out.print(_table([result for result in results if result.temperature == each.temperature], each, len(chosen)))
    print(json.dumps({"bench": "methods", "machine": machine(), "results": [result.as_dict() for result in results]}))


@app.command()
def policies(
    target: Annotated[str | None, typer.Option(help="Target model; default: the bundled one.")] = None,
    draft: Annotated[str | None, typer.Option(help="Draft model; default: the bundled one.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 10,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 192,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 128,
    temperature: Annotated[list[float] | None, typer.Option(help="Repeat for several; default: 0, 0.7, 1.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Draft steps during a verification.")] = 6,
    lookup: Annotated[bool, typer.Option(help="Look tokens up in the text, too.")] = True,
) -> None:
    """Compare fan-out policies at equal budgets on the same rounds: the share of outcomes prepared for."""
    from ssd_ray.bench.policies import Rehearsal, compare_policies
    from ssd_ray.models.loader import load_runner, load_tokenizer
    from ssd_ray.speculation.draft import SCRATCH

    chosen = held_out_prompts(load_tokenizer(target), count=prompts, tokens=prompt_tokens)
    runners = [
        load_runner(path, role=role, rows=1, scratch=SCRATCH)  # type: ignore[arg-type]
        for path, role in ((target, "target"), (draft, "draft"))
    ]
    figures = {}
    for value in temperature or [0.0, 0.7, 1.0]:
        rehearsal = Rehearsal(*runners, steps=steps, text_lookup=lookup)
        for seed, prompt in enumerate(chosen):
            params = SamplingParams(temperature=value, max_tokens=max_tokens, seed=seed, ignore_eos=True)
            rehearsal.run(prompt, params)
        figures[value] = compare_policies(rehearsal.recorder.records, BUDGETS)
    Console().print(_policy_table(figures, len(chosen)))
    print(json.dumps({"bench": "policies", "machine": machine(), "budgets": BUDGETS, "hit_rates": figures}))


@app.command()
def shapes(
    target: Annotated[str | None, typer.Option(help="Target model; default: the bundled one.")] = None,
    dtype: Annotated[str, typer.Option()] = "auto",
    start: Annotated[int, typer.Option(min=1, help="Tokens before.")] = 300,
) -> None:
    """Show what one fixed shape of 8 tokens costs, and whether smaller shapes would round alike."""
    from ssd_ray.bench.shapes import equal_rows, forward_ms
    from ssd_ray.models.loader import load_runner

    sizes = tuple(range(1, MAX_LOOKAHEAD + 2))
    with on_cores(target_cores()):
        runner = load_runner(target, role="target", rows=1, scratch=sizes[-1], dtype=dtype)
        times, equal = forward_ms(runner, sizes, start=start), equal_rows(runner, sizes, start=start)
    table = Table(title=f"one forward after {start} tokens, {runner.dtype}", caption="against the fixed shape of 8")
    for column in ("tokens", "ms", "8 tokens cost more by", "same bits"):
        table.add_column(column, justify="right")
    for size in sizes:
        more = times[sizes[-1]] / times[size] - 1.0
        table.add_row(str(size), f"{times[size]:.2f}", f"{more:+.0%}", "yes" if equal[size] else "no")
    Console().print(table)
    print(json.dumps({"bench": "shapes", "machine": machine(), "ms": times, "same_bits": equal}))


def _table(results: Sequence[Result], params: SamplingParams, prompts: int) -> Table:
    table = Table(
        title=f"temperature {params.temperature:g}, {prompts} held-out prompts x {params.max_tokens} tokens; medians",
        caption="x sd: times as fast as sd. A round: ms of verifying + waiting for drafts + all else in the loop",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    others = [result for result in results if result.method != "ssd"]
    table.add_column("method")
    headers = ("tokens/s", *(f"x {SHORT.get(each.method, each.method)}" for each in others))
    for column in (*headers, "tokens/round", "hits", "duty", "a round"):
        table.add_column(column, justify="right")
    for result in results:
        ratios = [f"{result.ratio(other):.2f}" for other in others]
        table.add_row(result.method, f"{result.rate:.1f}", *ratios, *_round(result))
    return table


def _policy_table(figures: dict[float, dict[str, list[float]]], prompts: int) -> Table:
    table = Table(title=f"outcomes among the first B guesses, {prompts} held-out prompts", box=SIMPLE)
    table.add_column("policy")
    for value in figures:
        for budget in BUDGETS:
            table.add_column(f"T={value:g}\nB={budget}", justify="right")
    for name in next(iter(figures.values())):
        table.add_row(name, *(f"{rate:.3f}" for rates in figures.values() for rate in rates[name]))
    return table


def _round(result: Result) -> list[str]:
    """The last columns of a row: empty for what is not ours."""
    if result.stats is None:
        return []
    figures = per_round(result.stats)
    parts = "+".join(f"{figures[name]:.1f}" for name in ("verify_ms", "wait_ms", "host_ms"))
    return [*(f"{figures[name]:.2f}" for name in ("tokens_per_round", "hit_rate", "duty_cycle")), parts]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch
    import transformers

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": cores,
        "gpu": gpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
