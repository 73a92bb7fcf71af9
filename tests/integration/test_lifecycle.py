"""Nothing is left behind, however an engine ends: no process, no socket, no file."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest

from ssd_ray.cluster.runtime import MARK

pytestmark = [pytest.mark.ray, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]

PATIENCE = 15.0
OURS = re.compile("plasma|ray|ssd|zmq")  # among what other programs put into /dev/shm at the same time


@dataclass
class Traces:
    """What an engine has put on the machine."""

    processes: list
    sockets: set
    files: set
    shared_memory: set


class Driver:
    """A process that starts and ends engines at our word."""

    def __init__(self, models):
        # Short, since Ray's sockets lie there; and empty, so that whatever is left in it was left by the engine.
        self.folder = Path(tempfile.mkdtemp(prefix="ssd-", dir="/tmp"))
        self.shared_memory = set(os.listdir("/dev/shm"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.lifecycle", *models],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"TMPDIR": str(self.folder)},
            text=True,
            start_new_session=True,
        )
        self.expect("imported")

    def say(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def expect(self, line):
        assert self.process.stdout.readline() == line + "\n"

    def start(self, ending):
        """Start an engine; what it has put on the machine while it runs."""
        self.say(ending)
        self.expect("running")
        traces = self.traces()
        assert len([process for process in traces.processes if "ray::" in process.name()]) >= 2
        assert {path.name.partition("-")[0] for path in traces.files} == {"ssd"}
        assert any("ssd-ray" in name for name in traces.sockets)
        self.say("go on")
        return traces

    def traces(self):
        processes = [process for process in psutil.process_iter() if self.started(process)]
        return Traces(
            processes,
            {socket.laddr for process in processes for socket in process.net_connections("unix") if socket.laddr},
            set(self.folder.iterdir()),
            {name for name in os.listdir("/dev/shm") if OURS.search(name)} - self.shared_memory,
        )

    def started(self, process):
        """Whether the process, its parent dead perhaps, comes from an engine of this driver."""
        try:
            inherited = process.environ().get(MARK, "").startswith(str(self.folder))
            return inherited or process.ppid() == self.process.pid
        except psutil.Error:
            return False  # it has ended, or is a zombie, or is another user's

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def driver(pair):
    driver = Driver(pair)
    yield driver
    driver.kill()
    shutil.rmtree(driver.folder, ignore_errors=True)


def open_sockets():
    """Names of all sockets of the machine, those in the kernel's own name space included."""
    return {line.split()[7] for line in Path("/proc/net/unix").read_text().splitlines()[1:] if len(line.split()) > 7}


def assert_gone(driver, before):
    deadline = monotonic() + PATIENCE
    while True:
        left = driver.traces()
        sockets = before.sockets & open_sockets()
        if not (left.processes or left.files or left.shared_memory or sockets):
            return
        assert monotonic() < deadline, (left, sockets)
        sleep(0.1)


@pytest.mark.slow
def test_after_an_orderly_end(driver):
    traces = driver.start("close")
    driver.expect("closed")
    assert_gone(driver, traces)


@pytest.mark.slow
def test_after_an_error_in_the_middle(driver):
    traces = driver.start("error")
    driver.expect("RuntimeError")
    driver.expect("closed")
    assert_gone(driver, traces)


@pytest.mark.slow
def test_after_control_c(driver):
    traces = driver.start("wait")
    sleep(0.2)
    os.killpg(driver.process.pid, signal.SIGINT)  # as a terminal does: also to those of Ray's processes in the group
    driver.expect("KeyboardInterrupt")
    driver.expect("closed")
    assert_gone(driver, traces)


def test_after_the_driver_was_killed(driver):
    traces = driver.start("wait")
    driver.process.kill()
    driver.process.wait()
    assert_gone(driver, traces)
