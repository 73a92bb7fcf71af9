"""`ssd-ray serve` as a user starts and stops it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

import psutil

from ssd_ray.cluster.runtime import MARK
from tests.support.processes import free_port, started


class Served:
    """A server in a process of its own, whose Ray and engine leave their traces in a folder.

    Attributes:
        address: where it serves.
        process: the command.
    """

    def __init__(self, process: subprocess.Popen[str], folder: str, port: int) -> None:
        self.process, self.address = process, f"http://127.0.0.1:{port}"
        self._folder = folder

    def processes(self) -> list[psutil.Process]:
        """What it has started, orphans included."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK, "").startswith(self._folder):
                    found.append(process)
        return found

    def end(self, ending: signal.Signals) -> None:
        """Tell it to stop: it does so without a word of trouble, and leaves nothing."""
        assert self.processes()
        self.process.send_signal(ending)
        said = self.process.stderr.read()
        assert self.process.wait(60) == 0
        assert not re.search("Traceback|Error", said), said
        deadline = monotonic() + 15.0
        while self.processes() or os.listdir(self._folder):
            assert monotonic() < deadline
            sleep(0.1)


@contextmanager
def served(*flags: str) -> Iterator[Served]:
    """Serve with these flags until the block ends, unless it has been told to stop."""
    port, folder = free_port(), tempfile.mkdtemp(prefix="ssd-", dir="/tmp")  # short: Ray's sockets lie there
    script = "from ssd_ray.cli import main; main()"
    command = [sys.executable, "-c", script, "serve", "--port", str(port), *flags]
    root, environment = Path(__file__).parents[2], os.environ | {"TMPDIR": folder}
    try:
        with started(command, stderr=subprocess.PIPE, text=True, cwd=root, env=environment) as process:
            server = Served(process, folder, port)
            said = []  # a slow machine may be remarked upon first
            while f"serving at {server.address}\n" not in said:
                said.append(process.stderr.readline())
                assert said[-1], "".join(said)
            yield server
            process.send_signal(signal.SIGTERM)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
