"""Every example runs and does what its docstring says; test_job.py runs that of a job."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as a script; what it has printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr()

    return run


@pytest.mark.slow
def test_offline(run, pair):
    out = run("offline.py", *pair).out
    assert len(re.findall(r"^--- (?:length|stop) after \d+ tokens$", out, re.MULTILINE)) == 2
    assert re.search(r"^--- \d\.\d\d tokens per round, hit rate \d+%, misses {'fan_out'", out, re.MULTILINE)


@pytest.mark.slow
def test_streaming(run, pair):
    out = run("streaming.py", *pair).out
    assert out.startswith("class Stack:\n")
    assert re.search(r"\n--- (length|stop), \d\.\d\d tokens per round\n$", out)


@pytest.mark.slow
def test_scale_drafts(run, pair):
    printed = run("scale_drafts.py", *pair)
    assert re.match(r"\d+ texts of \d+ characters, all the same", printed.out)
    assert [line[1] for line in printed.err.splitlines() if line.startswith("[")] == ["3", "0", "1"]
