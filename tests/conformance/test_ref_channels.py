"""The channels that travel by Ray, held to the suite on a real cluster of one node."""

import contextlib
import os
import signal

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError

from ssd_ray.cluster.refs import CONCURRENCY_GROUPS, DrainChannel, RefChannel
from ssd_ray.transport.channel import HUB, Channel
from ssd_ray.transport.hybrid import HybridChannel
from ssd_ray.transport.inbox import QUEUE_FRAMES, Inbox
from ssd_ray.transport.memory import MemoryHub, MemorySpoke
from ssd_ray.transport.zmq import ZmqHub, ZmqSpoke
from ssd_ray.wire import Nodes, decode, encode
from tests.conformance.channel_actors import INLINE_MAX_BYTES, HybridNode, RefNode
from tests.conformance.channel_suite import PATIENCE, ChannelSuite, Network, drain, meet, numbered, numbers

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("cluster")]


class ActorChannel(Channel):
    """A channel inside an actor, operated by actor calls."""

    def __init__(self, actor, name: str):
        self.name, self.actor, self.closed = name, actor, False

    @classmethod
    def start(cls, node: type[RefNode], name: str, zmq_address=None):
        remote = ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(node)
        return cls(remote.remote(name, zmq_address), name)

    def send(self, peer, frame):
        accepted = self.call("send", peer, frame)
        self.dropped += not accepted
        return accepted

    def receive(self, timeout=0.0):
        return self.call("receive", timeout)

    def wake(self):
        self.call("wake")

    def close(self):
        self.closed = True
        with contextlib.suppress(RayActorError):
            self.call("close")

    def call(self, method, *args):
        return ray.get(getattr(self.actor, method).remote(*args))


class RefNetwork(Network):
    """Hub and spokes are actors."""

    node = RefNode

    def __init__(self):
        self.hub = ActorChannel.start(self.node, HUB)
        self._spokes = []

    def spoke(self, name):
        spoke = self._made(name)
        ray.get(spoke.actor.add_peer.remote(HUB, self.hub.actor))
        ray.get(self.hub.actor.add_peer.remote(name, spoke.actor))
        self._spokes.append(spoke)
        return spoke

    def _made(self, name):
        address = self.hub.call("zmq_address")
        for spoke in self._spokes:
            if spoke.closed:
                self._spokes.remove(spoke)
                ray.get(self.hub.actor.remove_peer.remote(spoke.name))
                spoke.call("begin_again", name, address)
                return ActorChannel(spoke.actor, name)
        return ActorChannel.start(self.node, name, address)

    def stranded(self, name):
        return RefChannel(name, Inbox())

    def kill(self, spoke):
        os.kill(spoke.call("pid"), signal.SIGKILL)
        self._spokes.remove(spoke)

    def close(self):
        for channel in (self.hub, *self._spokes):
            channel.close()
            ray.kill(channel.actor)


class HybridNetwork(RefNetwork):
    """Hub and spokes are actors with a ZeroMQ socket each."""

    node = HybridNode

    def stranded(self, name):
        with ZmqHub() as hub:
            return HybridChannel(ZmqSpoke(hub.address, name), super().stranded(name), INLINE_MAX_BYTES)


class DrainNetwork(RefNetwork):
    """The hub is an actor, the spokes are drivers."""

    def spoke(self, name):
        return DrainChannel(name, self.hub.actor, INLINE_MAX_BYTES)

    def stranded(self, name):
        hub = ActorChannel.start(self.node, HUB)
        ray.kill(hub.actor)
        return DrainChannel(name, hub.actor, INLINE_MAX_BYTES)

    def kill(self, spoke):
        spoke.close()
        ray.get(self.hub.actor.remove_peer.remote(spoke.name))


class TestRefs(ChannelSuite):
    network_type = RefNetwork
    load = 100
    flood = 400

    def test_keeps_the_order_of_small_and_large_frames(self, network):
        sizes = [INLINE_MAX_BYTES * 2 if number % 5 == 0 else 100 for number in range(60)]
        with meet(network, "mixed") as spoke:
            assert all(spoke.call("send_many", HUB, [numbered(number, size) for number, size in enumerate(sizes)]))
            received = drain(network.hub)
            assert numbers(received, "mixed") == list(range(60))
            assert [len(frame) for _, frame in received] == sizes


@pytest.mark.slow  # its halves are held to the suite above and in test_channels.py
class TestHybrid(ChannelSuite):
    network_type = HybridNetwork
    load = 100
    flood = 800


def test_large_frames_are_read_where_they_lie():
    """Two readers of one object: the same read-only memory, from the object store to the law that a message holds."""
    law = np.full(1 << 16, 2.0**-16, np.float32)
    nodes = Nodes(1, 0, 0, [-1], [7], sampled=[0], law_weights=memoryview(law.tobytes()))
    ref = ray.put(np.frombuffer(encode(3, nodes), np.uint8))
    addresses = set()
    for name in ("one", "other"):
        channel = RefChannel(name, Inbox())
        channel.deliver(HUB, ray.get(ref))
        _, frame = channel.receive()
        weights = np.frombuffer(decode(3, frame)[0].law_weights, np.float32)
        assert np.array_equal(weights, law)
        assert not weights.flags.writeable
        addresses.add(weights.ctypes.data)
    assert len(addresses) == 1


def test_frames_for_a_stuck_actor_are_dropped_instead_of_piling_up():
    stuck = ActorChannel.start(RefNode, "stuck")
    channel = RefChannel(HUB, Inbox(), {"stuck": stuck.actor})
    pid = stuck.call("pid")
    os.kill(pid, signal.SIGSTOP)
    try:
        accepted = [channel.send("stuck", numbered(number)) for number in range(300)]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert accepted == [True] * QUEUE_FRAMES + [False] * (300 - QUEUE_FRAMES)
    assert numbers(drain(stuck), HUB) == list(range(QUEUE_FRAMES))
    assert channel.send("stuck", b"again")
    assert stuck.receive(PATIENCE) == (HUB, b"again")
    ray.kill(stuck.actor)


@pytest.mark.slow  # an engine whose messages are actor calls is among the fast tests
class TestDrain(ChannelSuite):
    network_type = DrainNetwork
    load = 100
    flood = 400


def test_a_large_frame_reaches_a_peer_that_is_on_the_small_channel_alone():
    hub = MemoryHub()
    with HybridChannel(hub, RefChannel(HUB, Inbox()), 1024) as channel, MemorySpoke(hub.address, "driver") as driver:
        driver.send(HUB, b"here")
        assert channel.receive(1.0) == ("driver", b"here")
        assert channel.send("driver", bytes(5000))
        assert driver.receive(1.0) == (HUB, bytes(5000))
