"""OpenAI's API as `ssd-ray serve` has it on a real Ray Serve, through OpenAI's own client."""

import json
import re
import runpy
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from time import sleep

import openai
import pytest

from ssd_ray import SamplingParams
from ssd_ray.cluster.serve import serving
from ssd_ray.config import EngineConfig
from ssd_ray.errors import ConfigError
from ssd_ray.models.info import load_tokenizer
from tests.support.engines import at_rest, in_time, target_alone
from tests.support.served import served

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

PROMPT = "def add(a, b):"
SHORT = {"max_tokens": 24, "seed": 3, "extra_body": {"ignore_eos": True}}
LONG = {"max_tokens": 400, "seed": 5, "extra_body": {"ignore_eos": True}}
MESSAGES = [{"role": "system", "content": "You add."}, {"role": "user", "content": "1 + 1?"}]
MAX_QUEUE = 4


@pytest.fixture(scope="module")
def server(pair):
    with served("--target", pair[0], "--draft", pair[1], "--max-queue", str(MAX_QUEUE)) as server:
        yield server


@pytest.fixture(scope="module")
def address(server):
    return server.address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60.0) as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    (model,) = client.models.list().data
    return model.id


@pytest.fixture(scope="module")
def complete(client, model):
    return lambda **options: client.completions.create(**{"model": model, "prompt": PROMPT} | SHORT | options)


@pytest.fixture(scope="module")
def chat(client, model):
    return lambda **options: client.chat.completions.create(**{"model": model, "messages": MESSAGES} | SHORT | options)


@pytest.fixture(scope="module")
def expected(pair):
    """What the target alone makes of it."""
    tokenizer = load_tokenizer(pair[0])
    conversation = "system: You add.\nuser: 1 + 1?\nassistant:"
    params = SamplingParams(max_tokens=24, seed=3, ignore_eos=True)
    prompts = [tokenizer.encode(text) for text in (PROMPT, conversation)]
    return tokenizer.batch_decode(target_alone(pair[0], prompts, params), skip_special_tokens=True)


def stats(client):
    return client.get("/../health", cast_to=object)["stats"]


def free_rows(client):
    return at_rest(lambda: stats(client))


@pytest.fixture(autouse=True)
def nothing_is_held(server, client):
    yield
    if server.process.poll() is None:
        free_rows(client)


def test_the_model_is_called_as_its_folder(client, model, pair):
    assert model == pair[0]
    assert client.models.retrieve(model).id == model


def test_a_completion(complete, expected):
    completion = complete()
    (choice,) = completion.choices
    assert (completion.object, choice.index, choice.finish_reason) == ("text_completion", 0, "length")
    assert choice.text == expected[0]
    assert completion.usage.prompt_tokens == len(PROMPT)
    assert completion.usage.completion_tokens == 24
    assert completion.usage.total_tokens == len(PROMPT) + 24


def test_usage_tells_that_the_beginning_of_a_prompt_was_cached(complete):
    usages = [complete(prompt="y = 2\n" * 20, max_tokens=2).usage for _ in range(2)]
    assert [usage.prompt_tokens_details.cached_tokens for usage in usages] == [0, 64]


def test_a_completion_of_several_prompts(complete, expected):
    completion = complete(prompt=["x", PROMPT])
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert completion.choices[1].text == expected[0]
    assert completion.usage.prompt_tokens == 1 + len(PROMPT)


def test_a_stop_string_ends_a_completion(complete, expected):
    stop = expected[0][9:11]
    (choice,) = complete(stop=stop).choices
    assert (choice.finish_reason, choice.text) == ("stop", expected[0][: expected[0].index(stop)])


def test_a_streamed_completion(complete, expected):
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert len(parts) > 2
    assert "".join(part.choices[0].text for part in parts) == expected[0]
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert all(part.usage is None for part in parts)
    assert (last.choices, last.usage.completion_tokens, last.usage.prompt_tokens) == ([], 24, len(PROMPT))
    assert len({part.id for part in chunks}) == 1


def test_a_stream_of_several_prompts(complete, expected):
    texts = {0: "", 1: ""}
    for part in complete(prompt=["x", PROMPT], stream=True):
        texts[part.choices[0].index] += part.choices[0].text
    assert texts[1] == expected[0]
    assert texts[0] == complete(prompt="x").choices[0].text


def test_a_chat(chat, expected):
    reply = chat()
    (choice,) = reply.choices
    assert reply.object == "chat.completion"
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected[1], "length")
    assert reply.usage.completion_tokens == 24


def test_a_streamed_chat(chat, expected):
    parts = list(chat(stream=True))
    assert all(part.object == "chat.completion.chunk" and part.usage is None for part in parts)
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected[1]
    assert parts[-1].choices[0].finish_reason == "length"


def test_without_a_seed_texts_differ(complete):
    assert len({complete(seed=None).choices[0].text for _ in range(3)}) == 3


def test_several_texts_with_log_probabilities(complete, chat, expected):
    completion = complete(n=2, logprobs=2)
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert completion.choices[0].text == expected[0]
    assert completion.choices[1].text == complete(seed=4).choices[0].text
    assert completion.usage.prompt_tokens == len(PROMPT)
    assert completion.usage.completion_tokens == 48
    logprobs = completion.choices[0].logprobs
    assert "".join(logprobs.tokens) == expected[0]
    places = zip(logprobs.text_offset, logprobs.tokens, strict=True)
    assert all(expected[0][place:].startswith(piece) for place, piece in places)
    assert len(logprobs.token_logprobs) == 24
    assert max(logprobs.top_logprobs[3].values()) >= logprobs.token_logprobs[3]
    (choice,) = chat(logprobs=True, top_logprobs=1).choices
    assert "".join(entry.token for entry in choice.logprobs.content) == expected[1]
    assert bytes(byte for entry in choice.logprobs.content for byte in entry.bytes).decode() == expected[1]
    *_, last = chat(logprobs=True, stream=True)
    assert len(last.choices[0].logprobs.content) == 24


def test_penalties_and_biases_are_those_of_the_library(complete, expected):
    text = complete(presence_penalty=2.0, frequency_penalty=2.0).choices[0].text
    assert len(set(text)) > len(set(expected[0]))
    assert (
        complete(logit_bias={"40": 100}, temperature=0).choices[0].text
        == complete(logit_bias={"40": 100}, temperature=0, seed=9).choices[0].text
        == 24 * complete(logit_bias={"40": 100}, temperature=0, max_tokens=1).choices[0].text
    )


def test_two_streams_at_the_same_time(complete, chat, expected):
    def read(stream):
        return "".join(part.choices[0].text for part in stream)

    streams = [complete(stream=True), complete(stream=True)]
    with ThreadPoolExecutor() as threads:
        assert list(threads.map(read, streams)) == [expected[0]] * 2


@pytest.mark.parametrize(
    ("options", "error", "param", "code"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, None, "model_not_found"),
        ({"top_p": 3.0}, openai.BadRequestError, "top_p", "invalid_value"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "invalid_value"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature", "invalid_type"),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "colour", "invalid_value"),
        ({"echo": True}, openai.BadRequestError, "echo", "invalid_value"),
        ({"prompt": "x" * 600}, openai.BadRequestError, None, "context_length_exceeded"),
        ({"prompt": ""}, openai.BadRequestError, None, None),
        ({"extra_body": {"repetition_penalty": 1e-45}}, openai.BadRequestError, "repetition_penalty", "invalid_value"),
        ({"temperature": True}, openai.BadRequestError, "temperature", "invalid_type"),
        ({"prompt": ["x"] * (MAX_QUEUE + 1)}, openai.RateLimitError, None, "rate_limit_exceeded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_openais_shape(client, complete, options, error, param, code, stream):
    with pytest.raises(error) as caught:
        complete(stream=stream, **options)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.body["message"]
    assert free_rows(client)["running"] == 0


def test_half_a_character_is_refused(address):
    """JSON can carry it, where UTF-8 cannot."""
    for path, said in (
        ("completions", {"prompt": "\ud83d"}),
        ("completions", {"prompt": "x", "stop": "\ud83d"}),
        ("completions", {"prompt": "x", "\ud83d": 1}),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud83d"}]}),
    ):
        body = urllib.request.Request(f"{address}/v1/{path}", json.dumps(said).encode())
        body.add_header("content-type", "application/json")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(body, timeout=60.0)
        with caught.value as reply:
            assert reply.status == 400
            assert json.load(reply)["error"]["type"] == "invalid_request_error"


def test_an_unknown_path_is_an_error_of_the_same_shape(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="x", input="y")
    assert caught.value.body["type"] == "invalid_request_error"


def test_the_example(address, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve_client.py", address])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "serve_client.py"), run_name="__main__")
    assert re.match(r"def add\(a, b\):.*\n--- (length|stop) after \d+ tokens\n", capsys.readouterr().out, re.DOTALL)


def test_harmless_fields_are_ignored(complete, expected):
    assert complete(user="me", best_of=1, echo=False).choices[0].text == expected[0]


def test_a_client_that_goes_away_in_the_middle_frees_its_row(client, complete):
    def leave():
        with complete(stream=True, **LONG) as stream:
            next(iter(stream))

    leave_in_the_middle(client, leave, requests=1)


def test_however_many_go_away_the_engine_goes_on(client, complete):
    for _ in range(50):
        with complete(stream=True, **LONG) as stream:
            next(iter(stream))
        assert free_rows(client)["running"] == 0


def leave_in_the_middle(client, leave, requests):
    def tokens():
        before = free_rows(client)
        leave()
        after = free_rows(client)
        assert after["requests"] == before["requests"] + requests
        return after["tokens"] - before["tokens"]

    in_time(tokens, lambda tokens: tokens < requests * LONG["max_tokens"])


def test_a_client_that_loses_patience_frees_its_row(client, address, model):
    """Before anything of the answer has come."""
    fields = {"model": model, "prompt": ["x"] * MAX_QUEUE, **LONG, **LONG["extra_body"]}
    del fields["extra_body"]

    def leave():
        requests = stats(client)["requests"]
        with closing(HTTPConnection(address.removeprefix("http://"), timeout=60.0)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(fields), {"Content-Type": "application/json"})
            while (now := stats(client))["running"] + now["requests"] - requests < MAX_QUEUE:
                sleep(0.005)

    leave_in_the_middle(client, leave, requests=MAX_QUEUE)


@pytest.mark.slow
def test_a_replica_whose_target_dies_goes_on(server, client, complete, expected):
    before = stats(client)["target_restarts"]
    targets = [process for process in server.processes() if process.name().startswith("ray::TargetProc")]
    assert targets  # one of them may be the ended one of another engine, still being buried
    for target in targets:
        target.kill()
    assert [complete().choices[0].text for _ in range(5)] == [expected[0]] * 5
    assert stats(client)["target_restarts"] == before + 1


def test_a_port_in_use_is_refused_at_once(address, pair):
    port = int(address.rpartition(":")[2])
    with (
        pytest.raises(ConfigError, match="port: expected one that is free"),
        serving(EngineConfig(), "127.0.0.1", port),
    ):
        pass


def test_it_serves_until_it_is_told_to_stop_and_leaves_nothing(server):
    """The last of those that ask it anything."""
    server.end(signal.SIGTERM)


@pytest.mark.slow
def test_serve_run_can_build_before_it_connects():
    """As it does; nothing stays of the Ray that was asked what there is."""
    script = """
import ray
from ssd_ray.cluster.serve import build
build({"num_drafts": "2"})
assert not ray.is_initialized()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, cwd=Path(__file__).parents[2])
