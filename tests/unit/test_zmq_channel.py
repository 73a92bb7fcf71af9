"""What only the ZeroMQ channel can get wrong: keys, hostile peers, and what it leaves behind."""

import os
import pickle
import socket
import subprocess
import sys
import threading
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest
import zmq

from ssd_ray.errors import ResourceError
from ssd_ray.transport.channel import HUB, MAX_FRAME_BYTES
from ssd_ray.transport.zmq import ZmqAddress, ZmqHub, ZmqSpoke

linux = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets and /proc")


@pytest.fixture(params=["ipc", "tcp"])
def hub(request):
    with ZmqHub(request.param) as hub:
        yield hub


def send_soon(spoke, frame=b"hello", seconds=5.0):
    """Send as soon as the spoke is connected; False if it never is."""
    deadline = monotonic() + seconds
    while not spoke.send(HUB, frame):
        if monotonic() > deadline:
            return False
        sleep(0.005)
    return True


def assert_serves(hub):
    with ZmqSpoke(hub.address, "honest") as spoke:
        assert send_soon(spoke)
        assert hub.receive(5.0) == ("honest", b"hello")
        assert hub.send("honest", b"welcome")
        assert spoke.receive(5.0) == (HUB, b"welcome")


@contextmanager
def raw_dealer(address, name=b"raw", *, key=None):
    """A bare socket that connects to a hub; without a key it speaks in the clear."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.SNDTIMEO, 5000)
        dealer.setsockopt(zmq.IDENTITY, name)
        if key is not None:
            public, secret = zmq.curve_keypair()
            dealer.setsockopt(zmq.CURVE_SERVERKEY, key)
            dealer.setsockopt(zmq.CURVE_PUBLICKEY, public)
            dealer.setsockopt(zmq.CURVE_SECRETKEY, secret)
        dealer.connect(address.url)
        yield dealer


def raw_connection(url):
    """A stream socket to a hub that knows nothing of ZeroMQ."""
    kind, _, place = url.partition("://")
    if kind == "ipc":
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect("\0" + place.removeprefix("@"))
    else:
        host, _, port = place.rpartition(":")
        connection = socket.create_connection((host, int(port)))
    return closing(connection)


def test_a_wrong_key_gets_nothing_in_and_nothing_out(hub):
    stranger = replace(hub.address, server_key=zmq.curve_keypair()[0])
    with ZmqSpoke(stranger, "stranger") as spoke:
        assert not send_soon(spoke, seconds=0.3)
        assert not hub.send("stranger", b"secret")
        assert hub.receive() is None
        assert spoke.receive() is None
        assert_serves(hub)


def test_the_key_of_another_engine_gets_nothing_in(hub):
    with ZmqHub() as other, ZmqSpoke(replace(hub.address, server_key=other.address.server_key), "guest") as spoke:
        assert not send_soon(spoke, seconds=0.3)
        assert hub.receive() is None
        assert_serves(hub)
        assert_serves(other)


@contextmanager
def listener(url):
    """Stands between a hub and a spoke, and tells what it hears of the spoke."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        heard, links = bytearray(), []

        def pass_on(source, sink, keep):
            with suppress(OSError):
                while data := source.recv(1 << 16):
                    heard.extend(data if keep else b"")
                    sink.sendall(data)

        def accept():
            links.extend([server.accept()[0], socket.create_connection(tcp_place(url))])
            near, far = links
            back = threading.Thread(target=pass_on, args=(far, near, False))
            back.start()
            pass_on(near, far, True)
            back.join()

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}", heard, links
        for link in links:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        thread.join()
        for link in links:
            link.close()


def tcp_place(url):
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    return host, int(port)


@pytest.mark.parametrize("change", [0, 1], ids=["as it was", "changed"])
def test_what_a_listener_repeats_never_arrives(change):
    with ZmqHub("tcp") as hub, listener(hub.address.url) as (url, heard, links):
        with ZmqSpoke(ZmqAddress(url, hub.address.server_key), "speaker") as spoke:
            assert send_soon(spoke)
            assert hub.receive(5.0) == ("speaker", b"hello")
            before = len(heard)
            assert spoke.send(HUB, b"once")
            assert hub.receive(5.0) == ("speaker", b"once")
            assert b"once" not in heard
            again = heard[before:]
            again[-1] ^= change
            links[1].sendall(again)
            assert hub.receive(0.3) is None
        with closing(socket.create_connection(tcp_place(hub.address.url))) as connection:
            connection.sendall(heard)
            assert hub.receive(0.3) is None
        assert_serves(hub)


def test_a_peer_without_encryption_gets_nothing_in(hub):
    with raw_dealer(hub.address) as dealer:
        dealer.send(b"in the clear")
        assert hub.receive(0.3) is None
        assert not hub.send("raw", b"secret")
        assert_serves(hub)


@pytest.mark.parametrize(
    "garbage",
    [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 64, b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(64)],
    ids=["nothing", "http", "noise", "greeting"],
)
def test_garbage_from_a_raw_socket_is_survived(hub, garbage):
    with raw_connection(hub.address.url) as connection:
        connection.sendall(garbage)
        assert_serves(hub)
        assert hub.receive() is None


@pytest.mark.parametrize("parts", [[b"one", b"two"], [b""] * 5], ids=["two", "five"])
def test_messages_of_more_than_one_part_are_dropped(hub, parts):
    with raw_dealer(hub.address, key=hub.address.server_key) as dealer:
        dealer.send_multipart(parts)
        dealer.send(b"one part")
        assert hub.receive(5.0) == ("raw", b"one part")
        assert hub.refused == 1


def test_a_name_that_is_no_text_arrives_as_one(hub):
    with raw_dealer(hub.address, b"\xff\xfe", key=hub.address.server_key) as dealer:
        dealer.send(b"frame")
        assert hub.receive(5.0) == ("\\xff\\xfe", b"frame")


def test_an_overlong_frame_of_a_hostile_peer_never_arrives(hub):
    with raw_dealer(hub.address, key=hub.address.server_key) as dealer:
        dealer.send(bytes(MAX_FRAME_BYTES + 4096))
        assert hub.receive(0.5) is None
        assert_serves(hub)


def test_a_spoke_connects_to_a_hub_that_starts_later():
    public, secret = zmq.curve_keypair()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with ZmqSpoke(ZmqAddress(url, public), "early") as spoke, zmq.Context() as context:
        assert not send_soon(spoke, b"too early", seconds=0.05)
        with context.socket(zmq.ROUTER) as router:
            router.setsockopt(zmq.LINGER, 0)
            router.setsockopt(zmq.RCVTIMEO, 5000)
            router.setsockopt(zmq.CURVE_SERVER, 1)
            router.setsockopt(zmq.CURVE_SECRETKEY, secret)
            router.bind(url)
            assert send_soon(spoke)
            assert router.recv_multipart() == [b"early", b"hello"]


def test_the_last_frames_before_close_arrive(hub):
    frames = [bytes([number]) * 10_000 for number in range(50)]
    with ZmqSpoke(hub.address, "leaver") as spoke:
        assert send_soon(spoke)
        for frame in frames:
            assert spoke.send(HUB, frame)
    for frame in (b"hello", *frames):
        assert hub.receive(5.0) == ("leaver", frame)


def test_close_does_not_wait_for_a_hub_that_reads_nothing(hub):
    with ZmqSpoke(hub.address, "flooder") as spoke:
        assert send_soon(spoke)
        while spoke.send(HUB, bytes(100_000)):
            pass
        start = monotonic()
        spoke.close()
        assert monotonic() - start < 10.0


@linux
@pytest.mark.parametrize("bind", ["ipc", "tcp"])
def test_close_leaves_no_thread_no_descriptor_and_no_name(bind):
    before = footprint()
    hub = ZmqHub(bind)
    assert_serves(hub)
    assert footprint() != before
    hub.close()
    assert footprint() == before
    assert hub.address.url.partition("://")[2] not in Path("/proc/net/unix").read_text()


def footprint():
    """Threads of any kind and open descriptors of this process."""
    return threading.active_count(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


@linux
def test_ipc_has_no_file():
    with ZmqHub("ipc") as hub:
        name = hub.address.url.removeprefix("ipc://")
        assert name.startswith("@")
        assert name in Path("/proc/net/unix").read_text()


@linux
@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_cannot_use_descriptors_up():
    """libzmq ends the process when it cannot accept: hence in one of its own."""
    done = subprocess.run([sys.executable, "-c", BESIEGED], capture_output=True, text=True, timeout=60)
    assert done.stdout == "still here\n", done.stderr


BESIEGED = """
import os, resource, socket
from ssd_ray.transport.channel import HUB
from ssd_ray.transport.zmq import ZmqHub, ZmqSpoke

with ZmqHub() as hub:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, most))
        os.setuid(65534)
        kept = [socket.socket(socket.AF_UNIX) for _ in range(200)]
        for connection in kept:
            connection.connect("\\0" + hub.address.url.removeprefix("ipc://@"))
        os._exit(any(connection.recv(10) for connection in kept))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with ZmqSpoke(hub.address, "own") as spoke:
        while not spoke.send(HUB, b"hello"):
            spoke.receive(0.01)
        assert hub.receive(10.0) == ("own", b"hello")
print("still here")
"""


@linux
def test_an_abstract_socket_takes_its_own_user_and_those_it_is_told_of(monkeypatch):
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with ZmqHub() as hub, ZmqSpoke(hub.address, "foreign") as spoke:
        assert not send_soon(spoke, seconds=0.3)
    with ZmqHub(users=[own]) as hub:
        assert_serves(hub)


def test_without_curve_it_is_said_what_to_do(monkeypatch):
    monkeypatch.setattr(zmq, "has", lambda capability: False)
    for make in (ZmqHub, lambda: ZmqSpoke(ZmqAddress("tcp://127.0.0.1:1", b""), "a")):
        with pytest.raises(ResourceError, match=r"without CURVE.*or use transport='ray'"):
            make()


def test_ipc_falls_back_to_the_loopback_interface(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with ZmqHub("ipc", host="192.0.2.1") as hub:
        assert hub.address.url.startswith("tcp://127.0.0.1:")


def test_an_address_travels_whole_and_prints_without_its_key(hub):
    assert pickle.loads(pickle.dumps(hub.address)) == hub.address
    assert hub.address.server_key.decode() not in repr(hub.address)


def test_a_host_that_is_not_this_machine_is_refused():
    with pytest.raises(ResourceError, match="cannot listen on"):
        ZmqHub("tcp", host="192.0.2.1")


def test_ipv6():
    try:
        hub = ZmqHub("tcp", host="::1")
    except ResourceError:
        pytest.skip("no IPv6 here")
    with hub:
        assert_serves(hub)
