"""What every channel must pass, see ssd_ray/transport/channel.py.

To test an implementation, write a :class:`Network` for it and derive a test class from :class:`ChannelSuite`.
"""

from abc import ABC, abstractmethod
from contextlib import closing
from threading import Timer
from time import monotonic

import pytest

from ssd_ray.transport.channel import HUB, MAX_FRAME_BYTES, Channel

PATIENCE = 10.0
"""Seconds for anything that must happen; only a failure waits as long."""


class Network(ABC):
    """One hub and its spokes. Tests share a network, each with spokes of its own names."""

    hub: Channel

    @abstractmethod
    def spoke(self, name: str) -> Channel:
        """Start a spoke of the hub."""

    @abstractmethod
    def stranded(self, name: str) -> Channel:
        """Start a spoke whose hub does not exist."""

    def kill(self, spoke: Channel) -> None:
        """End a spoke without a word; where each is a process, with SIGKILL."""
        spoke.close()

    @abstractmethod
    def close(self) -> None:
        """Close the hub and whatever is left."""


def meet(network: Network, name: str) -> Channel:
    """Start a spoke and wait until frames pass both ways."""
    spoke = network.spoke(name)
    deadline = monotonic() + PATIENCE
    while not spoke.send(HUB, b"hello"):
        assert monotonic() < deadline, "the spoke cannot send"
    while (received := network.hub.receive(PATIENCE)) != (name, b"hello"):
        assert received is not None, "the hub does not hear the spoke"  # else one of those before it was late
    while not network.hub.send(name, b"welcome"):
        assert monotonic() < deadline, "the hub cannot answer"
    assert spoke.receive(PATIENCE) == (HUB, b"welcome")
    return spoke


def drain(channel: Channel, quiet: float = 0.3) -> list[tuple[str, bytes]]:
    """Receive until nothing has come for ``quiet`` seconds."""
    items = []
    while (item := channel.receive(quiet)) is not None:
        items.append(item)
    return items


def numbered(number: int, size: int = 40) -> bytes:
    return number.to_bytes(4, "big") * (size // 4)


def numbers(items: list[tuple[str, bytes]], peer: str) -> list[int]:
    """The numbers of a peer's frames, each of which must be whole."""
    frames = [frame for sender, frame in items if sender == peer]
    found = [int.from_bytes(frame[:4], "big") for frame in frames]
    assert all(frame == numbered(number, len(frame)) for number, frame in zip(found, frames, strict=True))
    return found


class ChannelSuite:
    """Derive, and set ``network_type``."""

    network_type: type[Network]

    load = 300
    """Frames that an endpoint sends while they are being read."""
    flood = 1500
    """Frames of 20 kB that nobody reads, more than the queues take."""

    @pytest.fixture(scope="class")
    @classmethod
    def network(cls):
        with closing(cls.network_type()) as network:
            yield network

    def test_echoes_frames_of_every_size(self, network):
        with meet(network, "echo") as spoke:
            for size in (0, 1, 100, 4096, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 1 << 20):
                frame = bytes(range(256)) * (size // 256) + bytes(size % 256)
                assert spoke.send(HUB, frame)
                assert network.hub.receive(PATIENCE) == ("echo", frame)
                assert network.hub.send("echo", frame)
                assert spoke.receive(PATIENCE) == (HUB, frame)

    def test_keeps_the_order_of_each_peer_under_load(self, network):
        with meet(network, "left") as left, meet(network, "right") as right:
            received = []
            for number in range(self.load):
                assert left.send(HUB, numbered(number))
                assert right.send(HUB, numbered(number, 8))
                if number % 50 == 49:
                    received += drain(network.hub, 0.05)
            received += drain(network.hub)
            assert numbers(received, "left") == list(range(self.load))
            assert numbers(received, "right") == list(range(self.load))

    def test_keeps_the_order_of_the_hub(self, network):
        with meet(network, "reader") as spoke:
            assert all(network.hub.send("reader", numbered(number)) for number in range(200))
            assert numbers(drain(spoke), HUB) == list(range(200))

    def test_a_full_queue_drops_and_never_blocks(self, network):
        with meet(network, "flooder") as spoke:
            slowest = 0.0
            for number in range(self.flood):
                start = monotonic()
                spoke.send(HUB, numbered(number, 20_000))
                slowest = max(slowest, monotonic() - start)
            assert slowest < 1.0
            found = numbers(drain(network.hub), "flooder")
            assert found == sorted(set(found))
            assert 0 < len(found) < self.flood
            assert spoke.send(HUB, b"again")
            assert network.hub.receive(PATIENCE) == ("flooder", b"again")

    def test_one_peer_that_floods_leaves_room_for_others(self, network):
        with meet(network, "loud") as loud, meet(network, "calm") as calm:
            for number in range(self.flood):
                loud.send(HUB, numbered(number, 20_000))
            assert calm.send(HUB, b"I am here")
            assert ("calm", b"I am here") in drain(network.hub)

    def test_unknown_peers_get_nothing(self, network):
        before = network.hub.dropped
        assert not network.hub.send("nobody", b"frame")
        assert network.hub.dropped == before + 1
        with meet(network, "lonely") as spoke, meet(network, "neighbour") as neighbour:
            assert not spoke.send("neighbour", b"spokes talk to the hub alone")
            assert spoke.dropped >= 1
            assert neighbour.receive(0.05) is None

    def test_an_overlong_frame_is_dropped(self, network):
        with meet(network, "long") as spoke:
            assert not spoke.send(HUB, bytes(MAX_FRAME_BYTES + 1))
            assert not network.hub.send("long", bytes(MAX_FRAME_BYTES + 1))
            assert spoke.send(HUB, b"next")
            assert network.hub.receive(PATIENCE) == ("long", b"next")

    def test_a_spoke_needs_no_hub(self, network):
        spoke = network.stranded("stranded")
        start = monotonic()
        for _ in range(10):
            spoke.send(HUB, b"is anybody there")
        assert spoke.receive(0.05) is None
        spoke.close()
        assert monotonic() - start < 3.0

    def test_receive_waits_as_long_as_it_is_told(self, network):
        drain(network.hub)
        start = monotonic()
        assert network.hub.receive() is None
        immediate = monotonic()
        assert network.hub.receive(0.2) is None
        waited = monotonic()
        assert immediate - start < 0.5
        assert 0.19 < waited - immediate < 1.5

    def test_a_frame_ends_the_wait(self, network):
        with meet(network, "waker") as spoke:
            timer = Timer(0.1, spoke.send, (HUB, b"wake up"))
            start = monotonic()
            timer.start()
            assert network.hub.receive(PATIENCE) == ("waker", b"wake up")
            assert monotonic() - start < PATIENCE / 2
            timer.join()

    def test_a_wake_ends_the_next_wait_and_no_other(self, network):
        with meet(network, "sleeper") as spoke:
            for channel in (network.hub, spoke):
                channel.wake()
                assert channel.receive() is None  # it does not wait
                start = monotonic()
                assert channel.receive(PATIENCE) is None
                assert monotonic() - start < PATIENCE / 2
                start = monotonic()
                assert channel.receive(0.2) is None
                assert monotonic() - start > 0.15

    def test_a_dead_spoke_changes_nothing_for_others(self, network):
        with meet(network, "survivor") as survivor:
            victim = meet(network, "victim")
            network.kill(victim)
            deadline = monotonic() + PATIENCE
            while network.hub.send("victim", b"are you there"):
                assert monotonic() < deadline, "the hub does not notice"
            assert survivor.send(HUB, b"I am")
            assert network.hub.receive(PATIENCE) == ("survivor", b"I am")
            assert network.hub.send("survivor", b"good")
            assert survivor.receive(PATIENCE) == (HUB, b"good")

    def test_a_restarted_spoke_takes_its_name_over(self, network):
        network.kill(meet(network, "phoenix"))
        with meet(network, "phoenix") as spoke:
            assert network.hub.send("phoenix", b"welcome back")
            assert spoke.receive(PATIENCE) == (HUB, b"welcome back")

    def test_networks_do_not_meet(self, network):
        with closing(self.network_type()) as other, meet(network, "ours"), meet(other, "theirs"):
            assert not network.hub.send("theirs", b"frame")
            assert not other.hub.send("ours", b"frame")

    def test_closing_twice_is_closing_once(self, network):
        other = self.network_type()
        spoke = meet(other, "closer")
        for channel in (spoke, other.hub):
            start = monotonic()
            channel.close()
            channel.close()
            assert monotonic() - start < 1.0
            assert not channel.send(HUB if channel is spoke else "closer", b"frame")
            assert channel.receive(0.01) is None
        other.close()
