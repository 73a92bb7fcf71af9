"""`ssd-ray train-draft` from end to end: stopped, gone on with, and its draft served beside its target."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ssd_ray import LLM, SamplingParams
from ssd_ray.errors import EngineError
from ssd_ray.training.texts import Text
from ssd_ray.training.workers import Workers
from tests.support.tiny import save_model, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

COMMAND = [sys.executable, "-c", "from ssd_ray.cli import main; main()", "train-draft"]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("train_draft")
    save_model(folder / "target", tiny_model(layers=4))
    (folder / "data.txt").write_text("one text of many that the target goes on with\n" * 40, encoding="utf-8")
    options = {"target": "target", "data": "data.txt", "out": "draft"}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(folder / value))]
    return [*COMMAND, *flags, "--texts", "64", "--steps", "80", "--device", "cpu", "--processes", "2", "--json"]


def test_a_stopped_command_goes_on_and_its_draft_serves(command: list[str]) -> None:
    out = Path(command[command.index("--out") + 1])
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as begun:
        while not any(out.glob("training/lessons/00001.npy")):
            assert begun.poll() is None, begun.stderr and begun.stderr.read()
            time.sleep(0.05)
        os.killpg(begun.pid, signal.SIGTERM)
        assert begun.wait(60) != 0
    assert not (out / "config.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["after"]["temperature_1"]["acceptance"] > figures["before"]["temperature_1"]["acceptance"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert json.loads(again.stdout) == figures

    target = command[command.index("--target") + 1]
    params = SamplingParams(max_tokens=24, seed=3, ignore_eos=True)
    with LLM(target, method="ar", max_num_seqs=1) as plain:
        expected = plain.generate(["one text"], params)[0].token_ids
    with LLM(target, str(out), max_num_seqs=1) as llm:
        (output,) = llm.generate(["one text"], params)
    assert output.token_ids == expected
    assert output.stats.tokens_per_round > 1


def test_a_worker_that_dies_ends_the_training_with_an_error(tmp_path: Path) -> None:
    target = tiny_model()
    ids = tmp_path / "ids.npy"
    np.save(ids, np.arange(90, dtype=np.int32))
    workers = Workers(2, target, Text(ids))
    workers.gradients(target, 0, 2, 16)
    workers.processes[0].kill()
    with pytest.raises(EngineError, match="a process that trains ended early"):
        workers.gradients(target, 0, 2, 16)
    workers.close()
