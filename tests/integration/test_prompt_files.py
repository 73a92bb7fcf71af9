"""`ssd-ray generate --prompt-file --output`, killed in the middle and run again."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep

import pytest
from typer.testing import CliRunner

from ssd_ray.cli import app
from tests.support.processes import started

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PROMPTS = 60


@pytest.fixture
def arguments(pair, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"x = {number}", "seed": number}) for number in range(PROMPTS)]
    prompts.write_text("\n".join(lines))
    models = ["--target", pair[0], "--draft", pair[1], "--max-num-seqs", "2"]
    return ["generate", "--prompt-file", str(prompts), *models, "--max-tokens", "80", "--ignore-eos"]


def run(arguments, output):
    result = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    return result


def kill_in_the_middle(arguments, output):
    """Start the command in a process of its own, and kill that when some results are there."""
    script = "from ssd_ray.cli import main; main()"
    with tempfile.TemporaryDirectory(prefix="ssd-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = os.environ | {"TMPDIR": folder}
        root = Path(__file__).parents[2]
        command = [sys.executable, "-c", script, *arguments, "--output", str(output)]
        with started(command, cwd=root, env=environment, stderr=subprocess.DEVNULL) as process:
            deadline = monotonic() + 120.0
            while not output.exists() or output.read_bytes().count(b"\n") < 5:
                assert process.poll() is None
                assert monotonic() < deadline
                sleep(0.01)
            process.kill()
        while os.listdir(folder):  # the janitor of the killed process's Ray
            assert monotonic() < deadline
            sleep(0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_killed_run_goes_on_to_the_same_file(arguments, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(arguments, whole)
    kill_in_the_middle(arguments, cut)
    assert 5 <= cut.read_bytes().count(b"\n") < PROMPTS
    with cut.open("ab") as file:
        file.write(whole.read_bytes().splitlines()[cut.read_bytes().count(b"\n")][:40])  # as if killed in a write
    run(arguments, cut)
    assert cut.read_bytes() == whole.read_bytes()
    assert [json.loads(line)["index"] for line in cut.read_text().splitlines()] == list(range(PROMPTS))
    assert run(arguments, cut).stderr == ""  # nothing is left to do, so nothing is started
    other = CliRunner().invoke(app, [*arguments, "--output", str(cut), "--temperature", "0.5"])
    assert other.exit_code == 2
    assert "output: expected results of the same prompts and parameters" in other.stderr
    assert cut.read_bytes() == whole.read_bytes()
