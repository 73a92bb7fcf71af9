"""The Ray under an engine: the caller's, a cluster's, or a private one that leaves nothing behind."""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from socket import create_connection
from typing import Literal
from urllib.parse import urlsplit

import ray
from ray._private.services import canonicalize_bootstrap_address

from ssd_ray.errors import EngineError, ResourceError

logger = logging.getLogger(__name__)

Kind = Literal["given", "cluster", "private"]

MARK = "SSD_RAY_PRIVATE_DIR"
"""Environment variable that all processes of a private Ray inherit; its value is the Ray's own folder."""

LOGICAL_CPUS = 64
"""CPUs that a private Ray believes in, so that it lets any reasonable number of drafts start. Real cores are dealt in
:mod:`ssd_ray.cluster.placement`."""

OBJECT_STORE_BYTES = 256 << 20

_LONGEST_DIR = 40
"""Ray appends up to 66 characters, and the path of a socket has 107 at most."""

_JANITOR_SECONDS = 15.0

_ANSWER_SECONDS = 5.0
"""How long the machine of a cluster may take to accept a connection."""

_TIMED_OUT = "timed out"
"""In Ray's words if its processes did not come up in the half minute that it gives them."""

# Started apart from the driver's process group. Its standard input ends when the driver closes it or dies, however that
# happens. Ray's own processes then go by themselves or, those that only look for their parent now and then, are ended.
_JANITOR = """
cat >/dev/null
left() { grep -lsz "^$MARK=$1\\$" /proc/[0-9]*/environ; }
tries=0
while [ $tries -lt 20 ] && [ -n "$(left "$1")" ]; do sleep 0.1; tries=$((tries + 1)); done
for file in $(left "$1"); do pid=${file#/proc/}; kill -9 "${pid%/environ}" 2>/dev/null; done
while [ $tries -lt 60 ] && [ -n "$(left "$1")" ]; do sleep 0.1; tries=$((tries + 1)); done
rm -rf "$1"
"""


def is_private() -> bool:
    """Whether a runtime that is made now is a private Ray on this machine."""
    return (_shared.kind if _shared.users else _next_kind()) == "private"


def logs_folder() -> str:
    """Where Ray, to which this process is connected, keeps the logs of the actors on this machine."""
    node = ray._private.worker._global_node
    return "the folder of the Ray that it is a client of" if node is None else str(node.get_logs_dir_path())


class RayRuntime:
    """Connects to the Ray that is there, or starts one; :meth:`close` undoes exactly that.

    - Ray was initialised by the caller: it is used, and left running.
    - ``RAY_ADDRESS`` names a cluster, as it does inside a Ray job: it is joined, and left at the end.
    - Otherwise a private Ray is started on this machine, on the loopback interface, in a folder of its own, which is
      removed together with Ray's processes, also when this process is killed.

    A process has one connection to Ray. Runtimes share what the first of them made, and the last one ends it.

    Raises:
        ResourceError: the cluster cannot be reached.
        EngineError: Ray does not start.
    """

    def __init__(self) -> None:
        with _shared.lock:
            if not _shared.users:
                _shared.kind, _shared.end = _connect()
                logger.info("the logs of Ray and of its actors on this machine are in %s", logs_folder())
            _shared.users += 1
            self.kind = _shared.kind

    def close(self) -> None:
        """Leave or stop Ray if it was joined or started here and nobody else uses it. To be called once."""
        with _shared.lock:
            _shared.users -= 1
            if not _shared.users:
                _shared.end()


@dataclass(slots=True)
class _Shared:
    """The process's connection to Ray, and how many runtimes use it."""

    lock: threading.Lock
    users: int
    kind: Kind
    end: Callable[[], None]


_shared = _Shared(threading.Lock(), 0, "given", lambda: None)


def _connect() -> tuple[Kind, Callable[[], None]]:
    """Make the connection; its kind, and what ends it."""
    kind = _next_kind()
    if kind == "given":
        return kind, lambda: None
    if kind == "cluster":
        _join(os.environ["RAY_ADDRESS"])
        return kind, ray.shutdown
    logger.info("starting Ray")
    return kind, _start_private().close


def _start_private() -> _PrivateRay:
    """Start a private Ray. Where others keep the machine busy its processes may be late; they get a second chance."""
    try:
        return _PrivateRay()
    except EngineError as error:
        if _TIMED_OUT not in str(error):
            raise
        logger.warning("%s Trying once more", error)
        return _PrivateRay()


class _PrivateRay:
    """A Ray of this process alone.

    Linux ends Ray's processes when the *thread* that started them ends, so that is a thread which lives as long as they
    shall, and not the caller's.
    """

    def __init__(self) -> None:
        self._dir = _short_dir()
        self._janitor = _start_janitor(self._dir)
        self._stop = threading.Event()
        self._started = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._live, name="ssd-ray-private-ray", daemon=True)
        self._thread.start()
        try:
            self._started.wait()
        except BaseException:
            self.close()
            raise
        if self._error is not None:
            self.close()
            raise EngineError(f"Ray does not start: {self._error}") from self._error

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._janitor.stdin is not None:
            self._janitor.stdin.close()
        try:
            self._janitor.wait(_JANITOR_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("processes of Ray in %s are slow to end; they are still being removed", self._dir)

    def _live(self) -> None:
        try:
            with _environment(_settings(self._dir)):
                _start_ray(self._dir)
        except Exception as error:
            self._error = error
        finally:
            self._started.set()
        self._stop.wait()
        ray.shutdown()


def _next_kind() -> Kind:
    if ray.is_initialized():
        return "given"
    return "private" if os.environ.get("RAY_ADDRESS", "local") in ("", "local") else "cluster"


def _start_ray(folder: str) -> None:
    """Start Ray in a folder of its own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ray.init(
        address="local",
        num_cpus=max(LOGICAL_CPUS, cores),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=logger.isEnabledFor(logging.DEBUG),
        logging_level=logging.ERROR,
        _temp_dir=folder,
        _node_ip_address="127.0.0.1",
    )


def _join(address: str) -> None:
    logger.info("joining the Ray cluster at %s", address)
    require_cluster()
    try:
        ray.init(log_to_driver=logger.isEnabledFor(logging.DEBUG), logging_level=logging.ERROR)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError: whatever Ray makes of the address
        raise ResourceError(
            f"no Ray cluster at {address} (RAY_ADDRESS): {error}; one that wants a token is joined with "
            "RAY_AUTH_MODE=token"
        ) from error


def require_cluster() -> None:
    """Check that the cluster which ``ray.init()`` would join answers: Ray itself tries for minutes.

    That is the one which ``RAY_ADDRESS`` names, or else the latest that was started on this machine. Ray keeps a record
    of it, also when it has crashed.

    Raises:
        ResourceError: nothing answers.
    """
    address = given = os.environ.get("RAY_ADDRESS") or None
    try:
        address = urlsplit(given).netloc if given and "://" in given else canonicalize_bootstrap_address(None)
        if address is not None:
            host, _, port = address.rpartition(":")
            create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError, ValueError) as error:
        where = f"{given} (RAY_ADDRESS)" if given else f"{address}, where the latest of this machine was"
        other = "" if given else "; RAY_ADDRESS=local starts another"
        raise ResourceError(f"no Ray cluster answers at {where}: {error}{other}") from error


def _settings(folder: str) -> dict[str, str]:
    return {
        MARK: folder,
        "RAY_worker_niceness": "0",  # Ray's default of 15 starves actors that share a machine with anything else
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what will be the default; without it Ray warns
    }


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables, for processes that start in the meantime."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _short_dir() -> str:
    """A new folder, readable to this user alone, whose path leaves room for the names of sockets."""
    parent = tempfile.gettempdir()
    if len(parent) + len("/ssd-ray-12345678") > _LONGEST_DIR:
        parent = "/tmp"
    return tempfile.mkdtemp(prefix="ssd-ray-", dir=parent)


def _start_janitor(folder: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", "-c", _JANITOR.replace("$MARK", MARK), "ssd-ray-janitor", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
