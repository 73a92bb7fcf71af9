"""`RAY_AUTH_MODE=token ray job submit --working-dir . -- python examples/job.py` on a cluster of one machine, which has
a token as it is when Ray has been used there."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from urllib.request import Request, urlopen

import psutil
import pytest

from tests.support.processes import free_port, free_ports

ROOT = Path(__file__).parents[2]
MARK = "SSD_RAY_TEST_CLUSTER"

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def marked(folder):
    """Processes of the cluster, orphans included."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == folder:
                found.append(process)
    return found


def kill_marked(folder):
    """Until none is left: a process of Ray's that is just being started is in no list yet."""
    for _ in range(20):
        if not (left := marked(folder)):
            return
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)
    raise AssertionError(f"still there: {left}")


@contextmanager
def running_cluster(environment, folder, dashboard_port):
    ports = ("port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    numbers = dict(zip(ports, free_ports(len(ports)), strict=True)) | {"dashboard-port": dashboard_port}
    command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    command += [f"--{name}={port}" for name, port in numbers.items()]
    command += [f"--temp-dir={folder}", "--num-cpus=2", "--disable-usage-stats", "--object-store-memory=100000000"]
    # Into a file: nobody would read a pipe.
    with open(Path(folder) / "start.log", "w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        head.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(20)
        kill_marked(folder)
        head.wait(5)


@pytest.fixture
def cluster_environment():
    """A cluster of our own; the environment in which the ray command reaches it."""
    folder = tempfile.mkdtemp(prefix="ssdj-", dir="/tmp")  # short: Ray's sockets lie there
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {
        "PATH": path,
        "TMPDIR": folder,
        MARK: folder,
    }  # Ray leaves a socket there
    token = Path(folder) / "token"
    token.write_text(secrets.token_hex(32))
    environment |= {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_worker_niceness": "0"}
    environment.pop("RAY_AUTH_MODE", None)  # a Ray that was started in this process has left it
    try:
        with running_cluster(environment, folder, port):
            yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{port}", "RAY_AUTH_MODE": "token"}
    finally:
        shutil.rmtree(folder)


def wait_for_dashboard(environment):
    """The list of jobs is there as soon as jobs can be submitted."""
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = Request(f"{environment['RAY_ADDRESS']}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = monotonic() + 120.0
    while monotonic() < deadline:
        with suppress(OSError), urlopen(request) as reply:
            assert json.load(reply) == []
            return
        sleep(0.1)
    raise AssertionError("the cluster does not come up")


def test_a_job_writes_its_results(cluster_environment, pair, tmp_path):
    wait_for_dashboard(cluster_environment)
    prompts, results = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    prompts.write_text("def f():\nclass Node:\n")
    job = ["python", "examples/job.py", "--target", pair[0], "--draft", "ngram"]
    job += ["--prompts", str(prompts), "--output", str(results)]
    submit = ["ray", "job", "submit", "--working-dir", ".", "--", *job]
    run = subprocess.run(submit, cwd=ROOT, env=cluster_environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 results in" in run.stdout
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["def f():", "class Node:"]
    assert all(line["text"] and line["finish_reason"] in ("length", "stop") for line in lines)
