"""Every channel that we have, held to the suite."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from threading import Timer
from time import monotonic

from ssd_ray.transport.channel import Channel
from ssd_ray.transport.hybrid import HybridChannel
from ssd_ray.transport.memory import MemoryAddress, MemoryHub, MemorySpoke
from ssd_ray.transport.zmq import ZmqAddress, ZmqHub, ZmqSpoke
from tests.conformance.channel_suite import PATIENCE, ChannelSuite, Network, meet


class MemoryNetwork(Network):
    def __init__(self):
        self.hub = MemoryHub()

    def spoke(self, name):
        return MemorySpoke(self.hub.address, name)

    def stranded(self, name):
        return MemorySpoke(MemoryAddress(), name)

    def close(self):
        self.hub.close()


class HybridMemoryNetwork(Network):
    """The hybrid by itself: both halves in memory."""

    def __init__(self):
        self._halves = MemoryNetwork(), MemoryNetwork()
        self.hub = HybridChannel(*(half.hub for half in self._halves), 1 << 16)

    def spoke(self, name):
        return HybridChannel(*(half.spoke(name) for half in self._halves), 1 << 16)

    def stranded(self, name):
        return HybridChannel(*(half.stranded(name) for half in self._halves), 1 << 16)

    def close(self):
        self.hub.close()


class ProcessSpoke(Channel):
    """A ZmqSpoke in a process of its own, operated through a pipe."""

    def __init__(self, address: ZmqAddress, name: str):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(far_end, address, name), daemon=True)
        self.process.start()
        far_end.close()

    def send(self, peer, frame):
        accepted = self._call("send", peer, frame)
        self.dropped += not accepted
        return accepted

    def receive(self, timeout=0.0):
        return self._call("receive", timeout)

    def wake(self):
        self._call("wake")

    def close(self):
        self._pipe.close()
        self.process.join(10)

    def _call(self, method, *args):
        self._pipe.send((method, args))
        return self._pipe.recv()


def _serve(pipe: Connection, address: ZmqAddress, name: str) -> None:
    with ZmqSpoke(address, name) as spoke, pipe:
        while True:
            try:
                method, args = pipe.recv()
            except EOFError:
                return
            pipe.send(getattr(spoke, method)(*args))


class ZmqNetwork(Network):
    bind = "ipc"

    def __init__(self):
        self.hub = ZmqHub(self.bind)

    def spoke(self, name):
        mortal = name in ("victim", "phoenix")
        return (ProcessSpoke if mortal else ZmqSpoke)(self.hub.address, name)

    def stranded(self, name):
        with ZmqHub(self.bind) as hub:
            address = hub.address
        return ZmqSpoke(address, name)

    def kill(self, spoke):
        os.kill(spoke.process.pid, signal.SIGKILL)
        spoke.close()

    def close(self):
        self.hub.close()


class ZmqTcpNetwork(ZmqNetwork):
    bind = "tcp"


class LocalSuite(ChannelSuite):
    """For endpoints in this very process."""

    def test_another_thread_wakes_the_one_that_waits(self, network):
        with meet(network, "sleeper") as spoke:
            Timer(0.1, spoke.wake).start()
            start = monotonic()
            assert spoke.receive(PATIENCE) is None
            assert monotonic() - start < PATIENCE / 2

    def test_a_closed_channel_may_be_woken(self, network):
        spoke = meet(network, "closed sleeper")
        spoke.close()
        spoke.wake()
        assert spoke.receive() is None


class TestMemory(LocalSuite):
    network_type = MemoryNetwork


class TestHybridMemory(LocalSuite):
    network_type = HybridMemoryNetwork


class TestZmqIpc(LocalSuite):
    network_type = ZmqNetwork


class TestZmqTcp(LocalSuite):
    network_type = ZmqTcpNetwork
