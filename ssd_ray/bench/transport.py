"""How long a frame takes to a peer and back: ``python -m ssd_ray.bench.transport``.

memory: a thread of this process. ipc, tcp: another process of this machine, over ZeroMQ with encryption. ray: an actor,
over object refs, from a driver that drains. Each frame is sent when the one before it is back.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import quantiles
from threading import Thread
from time import perf_counter
from typing import Literal

from ssd_ray.transport.channel import HUB, Channel
from ssd_ray.transport.memory import MemoryHub, MemorySpoke
from ssd_ray.transport.zmq import ZmqAddress, ZmqHub, ZmqSpoke

KINDS = ("memory", "ipc", "tcp", "ray")
SIZES = (100, 100_000)

_PEER = "echo"
_READY = b""
_STOP = b"stop"
_PATIENCE_SECONDS = 60.0


def round_trips(near: Channel, peer: str, size: int, count: int) -> list[float]:
    """Send ``count`` frames of ``size`` bytes to a peer that sends them back; returns the microseconds of each."""
    frame = bytes(size)
    times = []
    for _ in range(count):
        start = perf_counter()
        near.send(peer, frame)
        if near.receive(_PATIENCE_SECONDS) is None:
            raise TimeoutError(f"{peer} lost a frame of {size} bytes")
        times.append(1e6 * (perf_counter() - start))
    return times


def echo(channel: Channel) -> None:
    """Send back what comes, until told to stop."""
    while (item := channel.receive(_PATIENCE_SECONDS)) is not None and item[1] != _STOP:
        channel.send(item[0], bytes(item[1]))


@contextmanager
def _memory() -> Iterator[tuple[Channel, str]]:
    with MemoryHub() as hub, MemorySpoke(hub.address, _PEER) as spoke:
        thread = Thread(target=echo, args=(spoke,))
        thread.start()
        yield hub, _PEER
        hub.send(_PEER, _STOP)
        thread.join()


@contextmanager
def _zmq(bind: Literal["ipc", "tcp"]) -> Iterator[tuple[Channel, str]]:
    with ZmqHub(bind) as hub:
        process = multiprocessing.get_context("spawn").Process(target=_echo_process, args=(hub.address,))
        process.start()
        if hub.receive(_PATIENCE_SECONDS) is None:
            raise TimeoutError("the other process does not start")
        yield hub, _PEER
        hub.send(_PEER, _STOP)
        process.join()


def _echo_process(address: ZmqAddress) -> None:
    with ZmqSpoke(address, _PEER) as spoke:
        while not spoke.send(HUB, _READY):
            spoke.receive(0.01)
        echo(spoke)


@contextmanager
def _ray() -> Iterator[tuple[Channel, str]]:
    import ray

    from ssd_ray.cluster.refs import CONCURRENCY_GROUPS, DrainChannel, RefEndpoint

    class Echo(RefEndpoint):
        def run(self) -> None:
            echo(self.refs)

    with ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False):
        actor = ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(Echo).remote(HUB)
        actor.run.remote()
        with DrainChannel("driver", actor) as spoke:
            yield spoke, HUB


def measure(
    kinds: Sequence[str] = KINDS, sizes: Sequence[int] = SIZES, count: int = 1000
) -> dict[str, dict[str, float]]:
    """Median and 90th percentile of the round trip in microseconds, by "kind size"."""
    makers = {"memory": _memory, "ipc": lambda: _zmq("ipc"), "tcp": lambda: _zmq("tcp"), "ray": _ray}
    figures = {}
    for kind in kinds:
        with makers[kind]() as (near, peer):
            for size in sizes:
                round_trips(near, peer, size, count // 10)
                deciles = quantiles(round_trips(near, peer, size, count), n=10)
                figures[f"{kind} {size}"] = {"median_us": round(deciles[4], 1), "p90_us": round(deciles[8], 1)}
    return figures


def main() -> None:
    """Measure all kinds, print a table and one line of JSON."""
    figures = measure()
    print(f"{'round trip':<16}{'median us':>12}{'p90 us':>12}")
    for name, row in figures.items():
        print(f"{name:<16}{row['median_us']:>12}{row['p90_us']:>12}")
    print(json.dumps({"benchmark": "transport", **figures}))


if __name__ == "__main__":
    main()
