"""Thousands of requests of whatever can be expressed, on real engines: each is refused in our own words or served, and
those beside it do not notice."""

import json
import random
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from threading import Event

import pytest

from ssd_ray import LLM, SamplingParams
from ssd_ray.cluster.serve import serving
from ssd_ray.config import EngineConfig
from ssd_ray.errors import ConfigError, RequestError, RequestFailedError
from tests.support import fuzz
from tests.support.engines import at_rest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

CASES = 2_000
THREADS = 6
WITNESS = {"prompt": "def add(a, b):", "seed": 3, "max_tokens": 12, "ignore_eos": True}


def short(values, tokens=12, texts=3):
    """With bounds on how much is written: what is asked for is at issue, not how long it takes."""
    values = values if isinstance(values.get("max_tokens"), int) else values | {"max_tokens": tokens}
    return values | {"n": texts} if repr(values.get("n")) == "1024" else values  # not all values can be compared


def together(ask, witness):
    """Ask from several threads, beside a witness in one more; how often each answer came, and what the witness saw."""
    over = Event()

    def watch():
        seen = []
        while not over.is_set():
            seen.append(witness())
        return seen

    with ThreadPoolExecutor(THREADS + 1) as threads:
        watching = threads.submit(watch)
        try:
            answers = Counter(threads.map(ask, range(CASES)))
        finally:
            over.set()
        return answers, watching.result()


@pytest.mark.parametrize("method", ["ssd", "sd"])
def test_a_library(cluster, pair, method):
    with LLM(*pair, method=method, max_model_len=32) as llm:

        def ask(case):
            dice = random.Random(case)
            try:
                outputs = llm.generate(fuzz.prompt(dice), SamplingParams(**short(fuzz.parameters(dice))))
            except RequestFailedError as error:
                pytest.fail(f"case {case}: {error}")
            except (ConfigError, RequestError) as error:
                return type(error).__name__
            return outputs[0].finish_reason if outputs else "nothing"

        params = SamplingParams(**{name: value for name, value in WITNESS.items() if name != "prompt"})
        expected = llm.generate(WITNESS["prompt"], params)[0].token_ids
        answers, seen = together(ask, lambda: llm.generate(WITNESS["prompt"], params)[0].token_ids)
        print(method, answers, len(seen))
        assert seen
        assert all(tokens == expected for tokens in seen)
        assert answers["length"] > CASES // 8
        assert answers["ConfigError"] > CASES // 8
        at_rest(lambda: llm.stats().as_dict())


def test_a_server(cluster, pair):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = EngineConfig(target=pair[0], draft=pair[1], max_model_len=32)
    with serving(config, "127.0.0.1", port):

        def ask(case):
            dice = random.Random(case)
            path, body = request(dice)
            status, answer = exchange(port, "POST", path, body)
            assert status in (200, 400, 429), (case, path, body, answer)
            assert b"server_error" not in answer, (case, path, body, answer)  # as a part of a stream
            if status != 200:
                assert json.loads(answer)["error"]["message"], (case, path, body)
            return status

        def witness():
            _, answer = exchange(port, "POST", "/v1/completions", json.dumps(WITNESS).encode())
            return json.loads(answer)["choices"][0]["text"]

        expected = witness()
        answers, seen = together(ask, witness)
        print(answers, len(seen))
        assert seen
        assert all(text == expected for text in seen)
        assert answers[200] > CASES // 8
        assert answers[400] > CASES // 8
        at_rest(lambda: json.loads(exchange(port, "GET", "/health")[1])["stats"])


def exchange(port, method, path, body=None):
    """A request and the status and the body of its answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=300.0)
    try:
        connection.request(method, path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def request(dice):
    """A path and a body; some of these are no JSON."""
    values = short(fuzz.parameters(dice, python=False))
    if dice.random() < 0.5:
        path, said = "/v1/completions", {"prompt": fuzz.prompt(dice, python=False)}
    else:
        content = fuzz.text(dice) if dice.random() < 0.8 else fuzz.anything(dice, python=False)
        path, said = "/v1/chat/completions", {"messages": [{"role": fuzz.text(dice) or "user", "content": content}]}
    extra = {fuzz.text(dice): fuzz.anything(dice, python=False)} if dice.random() < 0.1 else {}
    body = fuzz.as_json(said | values | extra | ({"stream": True} if dice.random() < 0.2 else {}))
    if dice.random() < 0.03:
        body = bytearray(body)
        body[dice.randrange(len(body))] = dice.randrange(256)
    return path, bytes(body)
