"""`ssd-ray serve` ends as one expects; the tests of what it serves end it in another way."""

from __future__ import annotations

import signal

import openai
import pytest

from tests.support.served import served

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_control_c_ends_it_and_leaves_nothing(pair: tuple[str, str]) -> None:
    with served("--target", pair[0], "--draft", pair[1]) as server:
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none") as client:
            reply = client.completions.create(model=pair[0], prompt="def add(a, b):", max_tokens=2, temperature=0.0)
            assert reply.choices[0].text
        server.end(signal.SIGINT)
