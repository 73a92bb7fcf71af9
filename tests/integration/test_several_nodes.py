"""A cluster of several nodes: texts are those of one, and stay so when nodes are lost."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from ssd_ray import LLM
from tests.support.nodes import PARAMS, PROMPT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_texts_outlive_the_nodes_that_write_them(cluster: Any, pair: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "tests.support.nodes", *pair]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    report = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("{")))
    assert len(set(report["nodes"])) == 2
    assert report["changed by a draft's node"] == report["changed by the target's node"] == 0
    assert report["restarts"][1] == 1
    with LLM(*pair) as llm:
        here = [list(output.token_ids) for output in llm.generate([PROMPT] * len(PARAMS), PARAMS)]
    assert report["texts"] == here
