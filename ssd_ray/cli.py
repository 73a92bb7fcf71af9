"""The command line: it builds configurations from flags, calls the public API and maps errors to exit codes."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, replace
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ssd_ray import __version__
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError, ModelError, RequestError, ResourceError, SsdRayError
from ssd_ray.flags import from_flags, with_flags

if TYPE_CHECKING:
    from rich.console import Console

    from ssd_ray.llm import LLM, RequestOutput
    from ssd_ray.stats import Stats

INPUT_ERRORS = (ConfigError, ModelError, RequestError, ResourceError)
"""What the caller can mend: exit code 2, all other errors of ours 1."""

FALLBACK_PROMPT = "def fibonacci(n):\n"
BUNDLED_LINES = 24
"""How much of a bundled prompt to begin with where none is given."""


class _Commands(TyperGroup):
    """The commands. Errors of this package end them with one line, and ``bench`` is imported when it is asked for."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except SsdRayError as error:
            if ctx.params.get("verbose"):
                logging.getLogger(__name__).exception("the command failed")
            typer.echo(f"ssd-ray: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2 if isinstance(error, INPUT_ERRORS) else 1) from error

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return [*super().list_commands(ctx), *(["bench"] if find_spec("ssd_ray.bench.cli") else [])]

    def get_command(self, ctx: typer.Context, name: str) -> Any:  # type: ignore[override]
        if name == "bench" and find_spec("ssd_ray.bench.cli"):
            command = typer.main.get_command(import_module("ssd_ray.bench.cli").app)
            command.name = name
            return command
        return super().get_command(ctx, name)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    app(prog_name="ssd-ray")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ssd-ray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, and show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Speculative speculative decoding on Ray: a target verifies while a pool of drafts prepares what comes next.

    It decodes with any pair of Hugging Face causal language models that share a vocabulary; a small pair for Python
    code is bundled. The text depends on the target, the prompt, the sampling flags and the seed alone; the method and
    the drafts decide how fast it comes.

    `ssd-ray generate "def add(a, b):"` writes a text with the bundled pair.

    `ssd-ray generate --target DIR --draft DIR --num-drafts 2 --temperature 0 "..."` takes other models.

    Exit code: 0, or 2 if the input is at fault, or 1.
    """
    _log_to_stderr(logging.INFO if verbose else logging.WARNING)


@app.command()
@with_flags(EngineConfig, SamplingParams)
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The beginning of the text; - reads it from standard input.", show_default="a bundled one"),
    ] = None,
    *,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="Prompts, one a line. In a file named .jsonl each line is a JSON string, or an object with a `prompt` "
            "and, if need be, sampling fields of its own.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the text.")] = False,
    **values: Any,
) -> None:
    """Generate a text and print it as it comes, with the figures of the run after it (on standard error).

    With `--prompt-file`, print one JSON line for each prompt.

    `ssd-ray generate --method ar --max-tokens 64 --seed 7 "import os"` decodes plainly, token by token. With
    `--method sd` or `ssd` the same text comes faster.

    `ssd-ray generate --prompt-file prompts.jsonl > results.jsonl` serves many prompts.
    """
    config, params = from_flags(EngineConfig, values), from_flags(SamplingParams, values)
    if prompt_file is not None and prompt is not None:
        raise ConfigError("prompt", "nothing beside --prompt-file", prompt)
    requests = _read_prompts(prompt_file, params) if prompt_file else [(_prompt(prompt), params)]
    with _engine(config) as llm:
        if prompt_file is not None:
            _serve_file(llm, requests)
        elif as_json:
            _print_json(llm, *requests[0])
        else:
            _print_text(llm, *requests[0])


@app.command()
@with_flags(EngineConfig)
def serve(
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of the machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    **values: Any,
) -> None:
    """Serve OpenAI's API over HTTP, as a Ray Serve application, until Ctrl-C or SIGTERM.

    `ssd-ray serve --num-drafts 2 --port 9000` takes `/v1/completions`, `/v1/chat/completions`, `/v1/models` and
    `/health`. The same application on a cluster: `serve run ssd_ray.cluster.serve:build num_drafts=2`.
    """
    config = from_flags(EngineConfig, values)
    if find_spec("fastapi") is None:
        raise ResourceError("the server needs more packages: pip install 'ssd-ray[serve]'")
    with _serving(config, host, port) as address:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # not earlier: Ray has set a handler of its own
        typer.echo(f"serving at {address}", err=True)
        with suppress(KeyboardInterrupt):
            Event().wait()


@contextmanager
def _serving(config: EngineConfig, host: str, port: int) -> Iterator[str]:
    """Start the server, with a word on a terminal about what is being done."""
    with ExitStack() as server:
        with _stderr().status("loading libraries") as status, _follow(status.update):
            from ssd_ray.cluster.serve import serving

            level = logging.getLogger("ssd_ray").handlers[0].level
            logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= level)  # Serve sets the level
            address = server.enter_context(serving(config, host, port))
        yield address


def _print_text(llm: LLM, prompt: str, params: SamplingParams) -> None:
    if sys.stdout.isatty():
        typer.secho(prompt, dim=True, nl=False)
    start = perf_counter()
    stream = llm.stream(prompt, params)
    for piece in stream:
        typer.echo(piece, nl=False)
    seconds = perf_counter() - start
    typer.echo()
    _print_figures(stream.wait().stats, seconds)


def _print_json(llm: LLM, prompt: str, params: SamplingParams) -> None:
    start = perf_counter()
    (output,) = llm.generate([prompt], params)
    typer.echo(json.dumps(_document(output) | {"seconds": perf_counter() - start}))


def _serve_file(llm: LLM, requests: list[tuple[str, SamplingParams]]) -> None:
    from rich.progress import Progress

    start = perf_counter()
    prompts, params = [prompt for prompt, _ in requests], [each for _, each in requests]
    with Progress(console=_stderr(), transient=True) as progress:
        for output in progress.track(llm.outputs(prompts, params), total=len(requests), description="prompts"):
            typer.echo(json.dumps(_document(output)))
    _print_figures(llm.stats(), perf_counter() - start)


def _document(output: RequestOutput) -> dict[str, Any]:
    """A result as JSON has it."""
    return {
        "prompt": output.prompt,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stats": output.stats.as_dict(),
    }


def _print_figures(stats: Stats, seconds: float) -> None:
    from rich.table import Table

    misses = ", ".join(f"{count} {cause}" for cause, count in stats.misses.items() if count) or "none"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in (
        ("tokens/s", f"{stats.tokens / seconds:.1f}  ({stats.tokens} tokens in {seconds:.2f} s)"),
        ("prefill", f"{stats.sums.prefill_ms:.0f} ms for {stats.sums.prompt_tokens} prompt tokens, included above"),
        ("tokens per round", f"{stats.tokens_per_round:.2f}"),
        ("hit rate", f"{stats.hit_rate:.1%}"),
        ("misses", misses),
        ("duty cycle", f"{stats.duty_cycle:.1%} of the time inside verification"),
        (
            "trees",
            f"{stats.tree_use:.1%} of their tokens used, {stats.draft_waste:.1%} of the steps in vain",
        ),
    ):
        table.add_row(name, value)
    _stderr().print(table, style="dim")


def _prompt(prompt: str | None) -> str:
    if prompt == "-":
        return sys.stdin.read()
    if prompt is not None:
        return prompt
    folder = files("ssd_ray") / "assets" / "prompts"
    bundled = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    if not bundled:
        return FALLBACK_PROMPT
    return "".join((folder / bundled[0]).read_text(encoding="utf-8").splitlines(keepends=True)[:BUNDLED_LINES])


def _read_prompts(path: Path, params: SamplingParams) -> list[tuple[str, SamplingParams]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("prompt_file", "a text file", f"{path}: {error}") from None
    read = _read_json_line if path.suffix == ".jsonl" else lambda line, params: (line, params)
    return [read(line, params) for line in lines if line.strip()]


def _read_json_line(line: str, params: SamplingParams) -> tuple[str, SamplingParams]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigError("prompt_file", f"JSON lines ({error})", line) from None
    values = dict(entry) if isinstance(entry, dict) else {"prompt": entry}
    prompt = values.pop("prompt", None)
    if not isinstance(prompt, str):
        raise ConfigError("prompt_file", "a string, or an object with a prompt, in each line", line)
    known = [field.name for field in fields(SamplingParams)]
    for name in values.keys() - set(known):
        raise ConfigError(name, "a field of the sampling: " + ", ".join(known), values[name])
    return prompt, replace(params, **values)


@contextmanager
def _engine(config: EngineConfig) -> Iterator[LLM]:
    """Start an engine, with a word on a terminal about what is being done."""
    with _stderr().status("loading libraries") as status, _follow(status.update):
        from ssd_ray.llm import LLM

        status.update("looking at the models")
        llm = LLM(**{field.name: getattr(config, field.name) for field in fields(config)})
    with llm:
        yield llm


@contextmanager
def _follow(show: Any) -> Iterator[None]:
    """Show what the library logs."""
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: show(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ssd_ray")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("ssd-ray: %(message)s"))
    logger = logging.getLogger("ssd_ray")
    logger.handlers = [handler]
    logger.setLevel(level)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)
