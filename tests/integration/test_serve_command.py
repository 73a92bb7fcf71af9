"""`ssd-ray serve`, as a user starts and stops it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import openai
import psutil
import pytest

from ssd_ray.cluster.runtime import MARK
from tests.support.processes import free_port, started

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture
def folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="ssd-", dir="/tmp")  # short: Ray's sockets lie there
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def left(folder: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK, "").startswith(folder):
                found.append(process)
    return found


@pytest.mark.parametrize("ending", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_it_serves_until_it_is_told_to_stop_and_leaves_nothing(
    pair: tuple[str, str], folder: str, ending: signal.Signals
) -> None:
    port = str(free_port())
    script = "from ssd_ray.cli import main; main()"
    flags = ["--target", pair[0], "--draft", "ngram", "--port", port]
    command = [sys.executable, "-c", script, "serve", *flags]
    environment = os.environ | {"TMPDIR": folder}
    root = Path(__file__).parents[2]
    with started(command, stderr=subprocess.PIPE, text=True, cwd=root, env=environment) as server:
        said = server.stderr.readline()
        assert said == f"serving at http://127.0.0.1:{port}\n"
        assert left(folder)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            reply = client.completions.create(model=pair[0], prompt="def add(a, b):", max_tokens=2, temperature=0.0)
            assert reply.choices[0].text
        server.send_signal(ending)
        said = server.stderr.read()
        assert server.wait(60) == 0
    assert not re.search("Traceback|Error", said), said
    deadline = monotonic() + 15.0
    while left(folder) or os.listdir(folder):
        assert monotonic() < deadline
        sleep(0.1)
