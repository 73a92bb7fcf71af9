"""The command line: it builds configurations from flags, calls the public API and maps errors to exit codes."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from io import TextIOWrapper
from itertools import tee
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from typer.core import TyperGroup

from ssd_ray import __version__
from ssd_ray.config import EngineConfig, OnError, Quantize, SamplingParams, check_timeout, is_text
from ssd_ray.errors import ConfigError, ModelError, RequestError, RequestFailedError, ResourceError, SsdRayError
from ssd_ray.flags import from_flags, said, with_flags
from ssd_ray.heap import collector_rests, keep_what_is_there
from ssd_ray.logs import LogFormat, formatter
from ssd_ray.prompt_files import Item, ResultFile, count_prompts, read_prompts
from ssd_ray.training.config import TrainingConfig

if TYPE_CHECKING:
    from rich.console import Console

    from ssd_ray.llm import LLM, Completion, RequestOutput
    from ssd_ray.stats import Stats

INPUT_ERRORS = (ConfigError, ModelError, RequestError, ResourceError)
"""What the caller can mend: exit code 2, all other errors of ours 1."""

FALLBACK_PROMPT = "def fibonacci(n):\n"
BUNDLED_LINES = 24
"""How much of a bundled prompt to begin with where none is given."""


class _Commands(TyperGroup):
    """The commands. Errors of this package end them with one line, and ``bench`` is imported when it is asked for."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        with _errors_end_it():
            _require_text(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        with _errors_end_it():
            return super().invoke(ctx)

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return [*super().list_commands(ctx), *(["bench"] if find_spec("ssd_ray.bench.cli") else [])]

    def get_command(self, ctx: typer.Context, name: str) -> Any:  # type: ignore[override]
        command: Any = super().get_command(ctx, name)
        if name == "bench" and find_spec("ssd_ray.bench.cli"):
            command = typer.main.get_command(import_module("ssd_ray.bench.cli").app)
            command.name = name
        for flag in self._log_flags() if command is not None else ():
            _take_flag(command, flag)
        return command

    def _log_flags(self) -> Iterator[Any]:
        """Those of the group's flags that its commands take, too."""
        for parameter in self.params:
            if (act := _LOG_FLAGS.get(parameter.name or "")) is not None:
                flag = copy(parameter)
                flag.expose_value = False
                flag.default = None  # what is not said here has been said before the command, or is as it was
                flag.callback = partial(_act, act)
                yield flag


def _act(act: Callable[[Any], None], _context: Any, _flag: Any, value: Any) -> None:
    if value:
        act(value)


def _take_flag(command: Any, flag: Any) -> None:
    """Let a command, and those below it, take a flag that acts by its callback alone."""
    for each in getattr(command, "commands", {}).values():
        _take_flag(each, flag)
    if not any(parameter.name == flag.name for parameter in command.params):
        command.params.append(flag)


@contextmanager
def _errors_end_it() -> Iterator[None]:
    try:
        yield
    except SsdRayError as error:
        verbose = logging.getLogger(__name__).isEnabledFor(logging.DEBUG)
        if verbose:
            logging.getLogger(__name__).exception("the command failed")
        typer.echo(f"ssd-ray: {' '.join(str(error).split())}", err=True)
        if isinstance(error, INPUT_ERRORS) and not isinstance(error, RequestFailedError):
            raise typer.Exit(2) from error
        if not verbose:
            typer.echo("ssd-ray: --verbose shows what Ray and the actors log", err=True)
        raise typer.Exit(1) from error


def _require_text(args: list[str]) -> None:
    """Refuse arguments in another encoding: Ray, which is told the command line, does not start with them."""
    for number, argument in enumerate(args, 1):
        if not is_text(argument):
            raise ConfigError(f"argument {number}", "text in UTF-8", argument)


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
    try:
        app(prog_name="ssd-ray")
    finally:
        keep_what_is_there()  # else the interpreter looks through all of it before it ends


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ssd-ray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Log what happens, also in actors, and where the logs are. Show tracebacks."
        ),
    ] = False,
    log_format: Annotated[
        LogFormat,
        typer.Option(help="How what is logged is written: `text`, or `json`, an object a line.", metavar="<choice>"),
    ] = "text",
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
    _log_to_stderr(logging.DEBUG if verbose else logging.WARNING, log_format)


@app.command()
@with_flags(EngineConfig, SamplingParams)
def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The beginning of the text; - reads it from standard input.", show_default="a bundled one"),
    ] = None,
    *,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="Prompts, one a line. In a file named .jsonl or .json each line is a JSON string, or an object with a "
            "`prompt` and, if need be, sampling fields of its own; or the file is one JSON array of these.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="With `--prompt-file`: write results to this file, each as soon as it is there. The same command goes "
            "on where it was interrupted.",
        ),
    ] = None,
    on_error: Annotated[
        OnError,
        typer.Option(
            help="With `--prompt-file`: what a prompt does that cannot be served. `continue`: its result is an "
            "`error`, the others go on, and the exit code is 1. `stop`: it ends the command.",
        ),
    ] = "continue",
    timeout: Annotated[
        float | None, typer.Option(help="Seconds after which a text ends with what has come so far.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the text.")] = False,
    **values: Any,
) -> None:
    """Generate a text and print it as it comes, with the figures of the run after it (on standard error).

    With `--prompt-file`, print one JSON line for each prompt, or write it to `--output`.

    `ssd-ray generate --method ar --max-tokens 64 --seed 7 "import os"` decodes plainly, token by token. With
    `--method sd` or `ssd` the same text comes faster.

    `ssd-ray generate --prompt-file prompts.jsonl --output results.jsonl` serves any number of prompts.
    """
    config, params = from_flags(EngineConfig, values), from_flags(SamplingParams, values)
    if prompt_file is not None and prompt is not None:
        raise ConfigError("prompt", "nothing beside --prompt-file", prompt)
    if output is not None and prompt_file is None:
        raise ConfigError("output", "--prompt-file beside it", str(output))
    check_timeout(timeout)
    params = replace(_sampling(config), **{name: getattr(params, name) for name in said(context) & _SAMPLING})
    if prompt_file is not None:
        _generate_file(config, params, prompt_file, output, timeout, on_error)
        return
    text = _prompt(prompt)
    with _engine(config) as llm:
        if as_json:
            _print_json(llm, text, params, timeout)
        else:
            for each in params.texts():
                _print_text(llm, text, each, timeout)


_SAMPLING = {field.name for field in fields(SamplingParams)}


def _sampling(config: EngineConfig) -> SamplingParams:
    with _stderr().status("loading libraries"):
        from ssd_ray.cluster.preflight import default_sampling

        return default_sampling(config)


def _generate_file(
    config: EngineConfig,
    params: SamplingParams,
    prompts: Path,
    output: Path | None,
    timeout: float | None,
    on_error: OnError,
) -> None:
    total = count_prompts(prompts, params)  # a bad line is refused before anything is started
    items = read_prompts(prompts, params)
    with ExitStack() as stack:
        results = stack.enter_context(ResultFile(output, items, config)) if output else Printed(items)
        if results.done != total:
            llm = stack.enter_context(_engine(config))
            _serve_file(llm, results, total, timeout, on_error)
    if results.failed:
        typer.echo(f"ssd-ray: prompts that could not be served: {results.failed}", err=True)
        raise typer.Exit(1)


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
        from ssd_ray.cluster.runtime import logs_folder

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # not earlier: Ray has set a handler of its own
        typer.echo(f"serving at {address}", err=True)
        typer.echo(f"the logs are in {logs_folder()}", err=True)
        with suppress(KeyboardInterrupt):
            Event().wait()


@app.command()
def inspect(
    target: Annotated[str | None, typer.Argument(help="Target model.", show_default="the bundled one")] = None,
    draft: Annotated[
        str | None, typer.Argument(help="Draft model or head, mtp, or ngram.", show_default="the bundled one")
    ] = None,
    *,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and text together at most.")] = None,
    quantize: Annotated[Quantize, typer.Option(help="In how many bits weights are kept.", metavar="<choice>")] = "none",
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter of the target.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes along.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Say what a model or a pair is, what memory it takes and what to expect of it, without loading weights.

    Exit code 2, and the reason, if it cannot work here.

    `ssd-ray inspect DIR` describes a target with the draft that would be taken; `ssd-ray inspect DIR DRAFT` a pair.
    """
    config = EngineConfig(
        target=target,
        draft=draft,
        max_model_len=max_model_len,
        quantize=quantize,
        adapter=adapter,
        trust_remote_code=trust_remote_code,
    )
    with _stderr().status("loading libraries"):
        from ssd_ray.inspection import inspect_pair

        pair = inspect_pair(config)
    typer.echo(json.dumps(pair.as_dict())) if as_json else pair.show()
    if pair.problem is not None:
        raise pair.problem


@app.command("train-draft")
@with_flags(TrainingConfig)
def train_draft(
    *, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False, **values: Any
) -> None:
    """Train a draft for any target, in a folder that `--draft` takes: from minutes on two cores to as long as you like.

    The target writes texts, going on with pieces of your data, and the draft learns its choices. It begins as a few
    of the target's own layers with the target's vocabulary and embeddings; how many, and how wide, is chosen by the
    cost of a step and by a short trial of each shape. Killed and started again, the same command goes on.

    `ssd-ray train-draft --target DIR --data notes.txt --data code.py --out DRAFT --minutes 30` ends with a line that
    says what to expect of `ssd-ray generate --target DIR --draft DRAFT`.

    `ssd-ray train-draft --out DRAFT --minutes 5` trains one for the bundled target, from what that writes by itself.

    `ssd-ray bench methods --target DIR --draft DRAFT` then measures; also try `--draft ngram`, which needs no model.
    """
    config = from_flags(TrainingConfig, values)
    with _stderr().status("loading libraries"):
        from ssd_ray.training.recipe import train_draft
    with _follow(lambda text: typer.echo(f"ssd-ray: {text}", err=True)):
        trained = train_draft(config)
    typer.echo(json.dumps(trained.as_dict()) if as_json else "\n".join(trained.lines()))


@app.command()
def models(
    name: Annotated[list[str] | None, typer.Argument(help="As config.json calls it.", show_default="all")] = None,
    *,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a document instead of lines.")] = False,
) -> None:
    """Say which architectures of the installed transformers can be served: a small random model of each is made, run
    and compared, which takes a minute for all.

    `ssd-ray models llama gemma3_text` tries two of them.
    """
    with _stderr().status("loading libraries"):
        from ssd_ray.models.families import document, survey

    if markdown:
        typer.echo(document(list(survey(name))))
        return
    for family in survey(name):
        typer.echo(f"{family.name:<26} {family.verdict:<8} {family.reason}".rstrip())


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


def _print_text(llm: LLM, prompt: str, params: SamplingParams, timeout: float | None) -> None:
    if sys.stdout.isatty():
        typer.secho(prompt, dim=True, nl=False)
    start = perf_counter()
    stream = llm.stream(prompt, params, timeout=timeout)
    for piece in stream:
        typer.echo(piece, nl=False)
    seconds = perf_counter() - start
    typer.echo()
    _print_figures(stream.wait().stats, seconds)


def _print_json(llm: LLM, prompt: str, params: SamplingParams, timeout: float | None) -> None:
    start = perf_counter()
    (output,) = llm.generate([prompt], params, timeout=timeout)
    typer.echo(json.dumps(_document(output) | {"seconds": perf_counter() - start}))


class Printed:
    """Results that are printed, as :class:`~ssd_ray.prompt_files.ResultFile` has those that are written to a file."""

    figures = True

    def __init__(self, items: Iterator[Item]) -> None:
        self.done, self.failed, self.left = 0, 0, items

    def write(self, item: Item, result: dict[str, Any]) -> None:
        """Print a result."""
        self.failed += "error" in result
        typer.echo(json.dumps(result))


def _serve_file(
    llm: LLM, results: ResultFile | Printed, total: int | None, timeout: float | None, on_error: OnError
) -> None:
    """Print the result of each prompt, or write it to the file of results, as soon as it is there."""
    from ssd_ray.progress import track

    start = perf_counter()
    prompts, params, items = tee(results.left, 3)  # they stay as close together as requests are under way
    outputs = llm.outputs(
        (item.prompt for item in prompts), (item.params for item in params), timeout=timeout, on_error=on_error
    )
    for output in track(outputs, total=total, done=results.done):
        results.write(next(items), _document(output, figures=results.figures))
    _print_figures(llm.stats(), perf_counter() - start)


def _document(output: RequestOutput, *, figures: bool = True) -> dict[str, Any]:
    """A result as JSON has it: the prompt and its first text, and the others if there are any; or why there is none."""
    if output.error is not None:
        return {"error": output.error, "prompt": output.prompt}
    first, *others = [_text_document(completion, figures) for completion in output.outputs]
    return {"prompt": output.prompt} | first | ({"others": others} if others else {})


def _text_document(completion: Completion, figures: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
    }
    if figures:
        document["stats"] = completion.stats.as_dict()
    if completion.logprobs is not None:
        document["logprobs"] = [msgspec.structs.asdict(entry) for entry in completion.logprobs]
    return document


def _print_figures(stats: Stats, seconds: float) -> None:
    from rich.table import Table

    misses = ", ".join(f"{count} {cause}" for cause, count in stats.misses.items() if count) or "none"
    drafted = stats.sums.hits + sum(stats.misses.values()) > stats.misses["no_draft"]
    looked_up = stats.backups["ngram"]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in (
        ("tokens/s", f"{stats.tokens / seconds:.1f}  ({stats.tokens} tokens in {seconds:.2f} s)"),
        ("prefill", f"{stats.sums.prefill_ms:.0f} ms for {stats.sums.prompt_tokens} prompt tokens, included above"),
        ("cached", stats.cached_tokens and f"{stats.cached_tokens} tokens were not prefilled: their KV was there"),
        ("preemptions", stats.preemptions and f"{stats.preemptions} times a request made room and waited again"),
        ("tokens per round", f"{stats.tokens_per_round:.2f}"),
        ("hit rate", drafted and f"{stats.hit_rate:.1%}"),
        ("misses", drafted and misses),
        ("from the text", looked_up and f"{looked_up} rounds began with what followed the same tokens earlier in it"),
        ("duty cycle", f"{stats.duty_cycle:.1%} of the time inside verification"),
        (
            "trees",
            drafted and f"{stats.tree_use:.1%} of their tokens used, {stats.draft_waste:.1%} of the steps in vain",
        ),
    ):
        if value:
            table.add_row(name, value)
    _stderr().print(table, style="dim")


def _prompt(prompt: str | None) -> str:
    if prompt == "-":
        return _standard_input()
    if prompt is not None:
        return prompt
    folder = files("ssd_ray") / "assets" / "prompts"
    bundled = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    if not bundled:
        return FALLBACK_PROMPT
    return "".join((folder / bundled[0]).read_text(encoding="utf-8").splitlines(keepends=True)[:BUNDLED_LINES])


def _standard_input() -> str:
    try:
        return TextIOWrapper(typer.get_binary_stream("stdin"), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise ConfigError("prompt", "text in UTF-8 on standard input", str(error)) from None


@contextmanager
def _engine(config: EngineConfig) -> Iterator[LLM]:
    """Start an engine, with a word on a terminal about what is being done."""
    with _stderr().status("loading libraries") as status, _follow(status.update):
        with collector_rests():
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
    logger.setLevel(min(level, logging.INFO))
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _log_to_stderr(level: int, form: LogFormat) -> None:
    logging.getLogger("ssd_ray").handlers = [logging.StreamHandler()]
    _set_level(level)
    _set_format(form)


def _set_level(level: int) -> None:
    logger = logging.getLogger("ssd_ray")
    logger.setLevel(level)
    logger.handlers[0].setLevel(level)


def _set_format(form: LogFormat) -> None:
    logging.getLogger("ssd_ray").handlers[0].setFormatter(formatter(form))


_LOG_FLAGS: dict[str, Callable[[Any], None]] = {
    "verbose": lambda _: _set_level(logging.DEBUG),
    "log_format": _set_format,
}
"""Flags of the group that every command takes, too, and what they do there."""


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)
