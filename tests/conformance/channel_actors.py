"""Actors that own a channel and can be operated from a test."""

import os

from ssd_ray.cluster.refs import RefEndpoint
from ssd_ray.transport.channel import HUB
from ssd_ray.transport.hybrid import HybridChannel
from ssd_ray.transport.zmq import ZmqHub, ZmqSpoke

INLINE_MAX_BYTES = 1 << 16


class RefNode(RefEndpoint):
    """An endpoint of the object-ref channel."""

    def __init__(self, name, zmq_address=None):
        super().__init__(name, INLINE_MAX_BYTES)
        self.channel = self.refs

    def begin_again(self, name, zmq_address=None):
        """Be an endpoint of another name, without peers, as a new actor is, which takes seconds to start."""
        self.__init__(name, zmq_address)

    def send(self, peer, frame):
        return self.channel.send(peer, frame)

    def send_many(self, peer, frames):
        return [self.channel.send(peer, frame) for frame in frames]

    def receive(self, timeout):
        return self.channel.receive(timeout)

    def wake(self):
        self.channel.wake()

    def close(self):
        self.channel.close()

    def pid(self):
        return os.getpid()

    def zmq_address(self):
        return None


class HybridNode(RefNode):
    """An endpoint of ZeroMQ and object refs together."""

    def __init__(self, name, zmq_address=None):
        super().__init__(name)
        zmq = ZmqHub() if name == HUB else ZmqSpoke(zmq_address, name)
        self._address = zmq.address if name == HUB else None
        self.channel = HybridChannel(zmq, self.refs, INLINE_MAX_BYTES)

    def zmq_address(self):
        return self._address
