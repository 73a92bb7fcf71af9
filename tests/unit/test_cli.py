"""The command line: its flags, what it prints and its exit codes, with a made-up engine."""

import dataclasses
import json
import logging
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from datetime import datetime, timedelta
from types import SimpleNamespace

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from ssd_ray import __version__, cli
from ssd_ray.cli import _prompt, app
from ssd_ray.cluster import runtime
from ssd_ray.config import EngineConfig, SamplingParams
from ssd_ray.errors import ConfigError, EngineError, ModelError, PromptTooLongError, RequestFailedError, ResourceError
from ssd_ray.flags import _explanations, from_flags
from ssd_ray.stats import EngineStats, Stats
from ssd_ray.wire import Backups, Misses, RequestStats, TokenLogprobs

SUMS = RequestStats(
    rounds=2, tokens=4, prompt_tokens=7, hits=1, misses=Misses(late=3), verify_ms=3.0, host_ms=1.0, prefill_ms=5.0
)


@dataclasses.dataclass
class Output:
    prompt: str
    text: str = "one two"
    token_ids: tuple = (1, 2)
    finish_reason: str = "length"
    stats: Stats = dataclasses.field(default_factory=lambda: Stats(sums=SUMS))
    n: int = 1
    logprobs: list | None = None
    seed: int = 9
    error: str | None = None

    @property
    def outputs(self):
        return [self] * self.n


class Stream:
    def __init__(self, prompt):
        self.prompt = prompt

    def __iter__(self):
        return iter(["one ", "two"])

    def wait(self):
        return Output(self.prompt)


class FakeLLM:
    """Writes "one two" for every prompt."""

    made: list = []  # noqa: RUF012
    failure = None

    def __init__(self, **options):
        self.config = EngineConfig(**options)
        self.params = []
        self.closed = False
        FakeLLM.made.append(self)
        if self.failure is not None:
            raise self.failure

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def stream(self, prompt, params, *, timeout=None):
        self.timeout = timeout
        self.params.append(params)
        return Stream(prompt)

    def outputs(self, prompts, params, *, timeout=None, on_error="stop"):
        self.timeout = timeout
        logprobs = [TokenLogprobs(1, -0.5, 2, {3: -0.25})]
        for prompt, each in zip(prompts, params, strict=True):
            self.params.append(each)
            if "long" in prompt and on_error == "stop":
                raise PromptTooLongError("prompt: too long")
            if "long" in prompt:
                yield Output(prompt, error="prompt: too long")
                continue
            yield Output(prompt, n=each.n, logprobs=None if each.logprobs is None else logprobs)

    def generate(self, prompts, params, *, timeout=None):
        return list(self.outputs(prompts, [params] * len(prompts), timeout=timeout))

    def stats(self):
        return EngineStats(sums=SUMS, requests=1)


@pytest.fixture(autouse=True)
def llm(monkeypatch):
    monkeypatch.setitem(sys.modules, "ssd_ray.llm", SimpleNamespace(LLM=FakeLLM))
    monkeypatch.setattr(FakeLLM, "made", [])
    return FakeLLM


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def test_help_teaches():
    result = run("--help")
    assert result.exit_code == 0
    assert "generate" in result.stdout
    assert "Exit code" in result.stdout
    assert "serve" in result.stdout
    assert "chat" not in result.stdout


def test_no_command_shows_the_help():
    assert "Usage" in run().output


def test_version():
    assert run("--version").stdout.strip() == f"ssd-ray {__version__}"


@pytest.mark.parametrize("config", [EngineConfig, SamplingParams])
def test_every_field_is_an_explained_flag(config):
    text = run("generate", "--help").stdout
    for field in dataclasses.fields(config):
        assert "--" + field.name.replace("_", "-") in text
    explained = _explanations(config)
    assert set(explained) == {field.name for field in dataclasses.fields(config)}
    assert all(explained.values())


def test_defaults_are_those_of_the_configuration(llm):
    assert run("generate", "x").exit_code == 0
    assert llm.made[0].config == EngineConfig()
    assert llm.made[0].params == [SamplingParams()]


def test_flags_set_fields(llm):
    engine = "--target t --draft d --method sd --num-drafts 2 --lookahead 5 --budget auto --compile --max-model-len 64"
    sampling = (
        "--temperature 0 --top-k 7 --stop a --stop b --stop-token-ids 3 --seed 9 --ignore-eos "
        "--logit-bias 42=-100 --logit-bias 7=1.5 --skip-special-tokens false --include-stop-str-in-output "
        "--bad-words foo --bad-words-ids 3,4 --bad-words-ids 5"
    )
    result = run("generate", *engine.split(), *sampling.split(), "x")
    assert result.exit_code == 0, result.output
    (made,) = llm.made
    assert made.config == EngineConfig(
        target="t", draft="d", method="sd", num_drafts=2, lookahead=5, compile=True, max_model_len=64
    )
    assert made.params == [
        SamplingParams(
            temperature=0.0,
            top_k=7,
            stop=("a", "b"),
            stop_token_ids=(3,),
            seed=9,
            ignore_eos=True,
            logit_bias={42: -100, 7: 1.5},
            skip_special_tokens=False,
            include_stop_str_in_output=True,
            bad_words=("foo",),
            bad_words_ids=((3, 4), (5,)),
        )
    ]


def test_other_values_are_ignored_where_a_configuration_is_built():
    values = {field.name: getattr(EngineConfig(), field.name) for field in dataclasses.fields(EngineConfig)}
    assert from_flags(EngineConfig, values | {"temperature": 1.0}) == EngineConfig()


def test_the_text_goes_to_stdout_and_the_figures_to_stderr(llm):
    result = run("generate", "x")
    assert result.stdout == "one two\n"
    for figure in ("tokens/s", "(4 tokens in", "2.00", "25.0%", "3 late", "75.0%", "5 ms for 7 prompt tokens"):
        assert figure in result.stderr
    assert llm.made[0].closed


def test_without_a_draft_nothing_is_said_of_one(monkeypatch):
    alone = msgspec.structs.replace(SUMS, hits=0, misses=Misses(no_draft=3), backups=Backups(ngram=2, none=1))
    monkeypatch.setitem(globals(), "SUMS", alone)
    told = run("generate", "x").stderr
    assert re.search(r"from the text +2 rounds began with what followed the same tokens earlier", told)
    assert not re.search("hit rate|misses|trees", told)


def test_what_memory_did_is_told_if_it_did_anything(monkeypatch):
    assert "not prefilled" not in (silent := run("generate", "x").stderr)
    assert "preemptions" not in silent
    monkeypatch.setitem(globals(), "SUMS", msgspec.structs.replace(SUMS, cached_tokens=64, preemptions=2))
    told = run("generate", "x").stderr
    assert re.search(r"cached +64 tokens were not prefilled", told)
    assert re.search(r"preemptions +2", told)


def test_one_json_document():
    document = json.loads(run("generate", "--json", "x").stdout)
    assert (document["prompt"], document["text"], document["token_ids"]) == ("x", "one two", [1, 2])
    assert document["stats"]["misses"]["late"] == 3
    assert document["seconds"] >= 0
    assert document.keys().isdisjoint({"logprobs", "others"})


def test_log_probabilities_and_further_texts_are_in_the_document():
    document = json.loads(run("generate", "--json", "--logprobs", 1, "--n", 3, "x").stdout)
    assert document["logprobs"] == [{"token_id": 1, "logprob": -0.5, "rank": 2, "top": {"3": -0.25}}]
    assert [other["text"] for other in document["others"]] == ["one two"] * 2
    assert document["others"][0]["logprobs"] == document["logprobs"]


def test_several_texts_are_printed_one_after_the_other(llm):
    assert run("generate", "--n", 2, "--seed", 5, "x").stdout == "one two\n" * 2
    assert llm.made[0].params == [SamplingParams(seed=5), SamplingParams(seed=6)]


def test_the_prompt_may_come_from_stdin_or_be_a_bundled_one(llm):
    assert json.loads(run("generate", "--json", "-", stdin="from stdin").stdout)["prompt"] == "from stdin"
    assert json.loads(run("generate", "--json").stdout)["prompt"] == _prompt(None) != ""


def test_a_file_of_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    lines = run("generate", "--prompt-file", file).stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["one", "two"]


def test_a_file_of_json_lines(llm, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"one\\ntwo"\n{"prompt": "three", "max_tokens": 5, "stop": ["x"]}\n')
    lines = run("generate", "--prompt-file", file, "--seed", 4).stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["one\ntwo", "three"]
    assert llm.made[0].params == [SamplingParams(seed=4), SamplingParams(seed=4, max_tokens=5, stop=("x",))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "JSON lines"),
        ('{"text": "x"}', "an object with a prompt"),
        ("3", "an object with a prompt"),
        ('{"prompt": "x", "colour": 1}', "colour: expected a field of the sampling: temperature, "),
        ('{"prompt": "x", "top_p": 2}', "top_p: expected"),
    ],
)
def test_a_bad_line_in_a_file(llm, tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(line + "\n")
    result = run("generate", "--prompt-file", file)
    assert result.exit_code == 2
    assert message in result.stderr
    assert llm.made == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-tokens", "0"],
        ["--max-tokens", "many"],
        ["--logit-bias", "42"],
        ["--logit-bias", "a=1"],
        ["--logit-bias", "42=101"],
        ["--skip-special-tokens", "maybe"],
        ["--bad-words-ids", "3,a"],
        ["--bad-words-ids", ""],
        ["--logprobs", "21"],
        ["--lookahead", "16"],
        ["--lookahead", "x"],
        ["--method", "magic"],
        ["--temperature", "-1"],
        ["--colour", "red"],
        ["--prompt-file", "/no/such/file"],
        ["--prompt-file", "/dev/null", "and a prompt"],
    ],
)
def test_bad_flags_are_refused_before_anything_starts(llm, arguments):
    result = run("generate", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert llm.made == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("dtype", "a type", "x"), 2),
        (ModelError("target: no folder at x"), 2),
        (PromptTooLongError("prompt: too long"), 2),
        (ResourceError("memory: too little"), 2),
    ],
)
def test_errors_are_one_line_and_an_exit_code(llm, monkeypatch, error, code):
    monkeypatch.setattr(llm, "failure", error)
    result = run("generate", "x")
    assert result.exit_code == code
    assert result.stderr == f"ssd-ray: {error}\n"


def test_an_engine_that_fails_says_how_to_see_more(llm, monkeypatch):
    monkeypatch.setattr(llm, "failure", EngineError("target died: why"))
    result = run("generate", "x")
    assert result.exit_code == 1
    assert result.stderr == "ssd-ray: target died: why\nssd-ray: --verbose shows what Ray and the actors log\n"


@pytest.mark.parametrize("arguments", [["--verbose", "generate"], ["generate", "--verbose"], ["generate", "-v"]])
def test_verbose_shows_the_traceback_and_what_is_logged(llm, monkeypatch, arguments):
    monkeypatch.setattr(llm, "failure", EngineError("why"))
    before = llm.__init__

    def logging_init(self, **options):
        logging.getLogger("ssd_ray.cluster").debug("level %d", logging.getLogger("ssd_ray").level)
        before(self, **options)

    monkeypatch.setattr(llm, "__init__", logging_init)
    result = run(*arguments, "x")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert f"ssd-ray: level {logging.DEBUG}\n" in result.stderr
    assert result.stderr.endswith("ssd-ray: why\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--log-format", "json", "-v", "generate"],
        ["-v", "generate", "--log-format", "json"],
        ["generate", "-v", "--log-format", "json"],
        ["--log-format", "json", "generate", "-v"],
    ],
)
def test_what_is_logged_may_be_json_lines(llm, monkeypatch, arguments):
    monkeypatch.setattr(llm, "failure", EngineError("why\nand where"))
    before = llm.__init__

    def logging_init(self, **options):
        logging.getLogger("ssd_ray.cluster").warning("draft-%d died:\nsomehow", 3)
        before(self, **options)

    monkeypatch.setattr(llm, "__init__", logging_init)
    *logged, said = run(*arguments, "a secret prompt").stderr.splitlines()
    assert said == "ssd-ray: why and where"
    warning, failure = (line for line in map(json.loads, logged) if line["level"] in ("WARNING", "ERROR"))
    assert datetime.fromisoformat(warning.pop("time")).utcoffset() == timedelta()
    assert warning == {"level": "WARNING", "logger": "ssd_ray.cluster", "message": "draft-3 died:\nsomehow"}
    assert (failure["logger"], failure["message"]) == ("ssd_ray.cli", "the command failed")
    assert failure["error"].startswith("Traceback")
    assert failure["error"].endswith("EngineError: why\nand where")
    assert "secret" not in "".join(logged)


def test_another_format_of_the_log_is_refused():
    result = run("--log-format", "xml", "generate", "x")
    assert result.exit_code == 2
    assert "--log-format" in result.stderr


def every_command(command, words=()):
    yield command, words
    names = command.list_commands(typer.Context(command)) if hasattr(command, "list_commands") else ()
    for name in names:
        yield from every_command(command.get_command(typer.Context(command), name), (*words, name))


def test_every_command_takes_the_flags_of_the_log():
    commands = {words: command for command, words in every_command(typer.main.get_command(app))}
    assert {("generate",), ("serve",), ("bench",), ("bench", "methods")} <= commands.keys()
    for words, command in commands.items():
        (flag,) = [parameter for parameter in command.params if "--verbose" in parameter.opts]
        assert "-v" in flag.opts, words
        assert len([parameter for parameter in command.params if "--log-format" in parameter.opts]) == 1, words


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["train-draft", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    script = (
        "import sys\nfrom ssd_ray.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'numpy', 'zmq'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


LONG = "one\na long one\ntwo\n"


def test_a_prompt_that_cannot_be_served_is_a_result_and_the_others_go_on(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(LONG)
    result = run("generate", "--prompt-file", file)
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert [document["prompt"] for document in documents] == ["one", "a long one", "two"]
    assert documents[1] == {"prompt": "a long one", "error": "prompt: too long"}
    assert documents[2]["text"] == "one two"
    assert result.exit_code == 1
    assert "ssd-ray: prompts that could not be served: 1\n" in result.stderr


def test_so_it_is_in_a_file_of_results_which_is_complete_then(llm, tmp_path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    prompts.write_text(LONG)
    for _ in range(2):
        result = run("generate", "--prompt-file", prompts, "--output", output)
        assert result.exit_code == 1
        assert result.stderr.endswith("ssd-ray: prompts that could not be served: 1\n")
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert [line.get("error") for line in lines] == [None, "prompt: too long", None]
    assert len(llm.made) == 1


def test_or_it_ends_the_command(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(LONG)
    result = run("generate", "--prompt-file", file, "--on-error", "stop")
    assert result.exit_code == 2
    assert result.stderr == "ssd-ray: prompt: too long\n"
    assert len(result.stdout.splitlines()) == 1


def test_a_result_names_its_seed():
    assert json.loads(run("generate", "--json", "x").stdout)["seed"] == 9


@pytest.mark.parametrize("arguments", [["generate", "caf\udce9"], ["generate", "--target", "\udcff"], ["\udcff"]])
def test_arguments_in_another_encoding_are_refused(llm, arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert re.fullmatch(r"ssd-ray: argument \d: expected text in UTF-8, got '.*\\udc..'\n", result.stderr)
    assert llm.made == []


def test_standard_input_in_another_encoding_is_refused(llm):
    result = run("generate", "-", stdin=b"caf\xe9")
    assert result.exit_code == 2
    assert result.stderr.startswith("ssd-ray: prompt: expected text in UTF-8 on standard input, got ")
    assert llm.made == []


def test_a_byte_order_mark_on_standard_input_is_no_text():
    document = json.loads(run("generate", "--json", "-", stdin="\N{BYTE ORDER MARK}é\r\n".encode()).stdout)
    assert document["prompt"] == "é\n"


@pytest.mark.parametrize(("flag", "kept"), [("--seed=-1", {"seed": -1}), ("--top-k=-1", {"top_k": 0})])
def test_flags_take_what_callers_are_used_to(llm, flag, kept):
    assert run("generate", flag, "x").exit_code == 0
    assert llm.made[0].params == [SamplingParams(**kept)]


def test_an_error_of_the_target_is_no_fault_of_the_input(llm, monkeypatch):
    monkeypatch.setattr(llm, "failure", RequestFailedError("the target could not go on with it"))
    assert run("generate", "x").exit_code == 1


def test_results_go_to_a_file_without_figures_that_differ_from_run_to_run(llm, tmp_path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    prompts.write_text("one\ntwo\n")
    result = run("generate", "--prompt-file", prompts, "--output", output, "--timeout", 7.5)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "tokens/s" in result.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["index"], line["prompt"], line["text"]) for line in lines] == [
        (0, "one", "one two"),
        (1, "two", "one two"),
    ]
    assert "stats" not in lines[0]
    assert llm.made[0].timeout == 7.5


@pytest.mark.parametrize("arguments", [["--output", "x", "a prompt"], ["--timeout", "0"], ["--timeout", "nan"]])
def test_bad_limits_and_outputs_are_refused_before_anything_starts(llm, arguments):
    result = run("generate", *arguments)
    assert result.exit_code == 2
    assert llm.made == []


def test_serving_says_where_the_logs_are(monkeypatch):
    @contextmanager
    def serving(config, host, port):
        yield f"http://{host}:{port}"

    class Ended:
        def wait(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_serving", serving)
    monkeypatch.setattr(cli, "Event", Ended)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(runtime, "logs_folder", lambda: "/tmp/ray/logs")
    result = CliRunner().invoke(app, ["serve", "--port", "9000"])
    assert result.exit_code == 0
    assert result.stderr == "serving at http://127.0.0.1:9000\nthe logs are in /tmp/ray/logs\n"


def test_serve_takes_every_field_of_the_engine():
    text = run("serve", "--help").stdout
    for field in dataclasses.fields(EngineConfig):
        assert "--" + field.name.replace("_", "-") in text
    assert "--port" in text
