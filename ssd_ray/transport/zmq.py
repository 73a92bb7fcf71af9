"""Channels over ZeroMQ: a ROUTER at the hub, a DEALER at each spoke, CURVE on every connection.

On Linux the peers of one machine meet at an abstract socket, a name in the kernel without a file: whoever dies, nothing
is left behind. Such a name is open to every process of the machine, as a TCP port is to every process of the network,
so all connections are encrypted and authenticated by CURVE with a key pair made for each hub. Of the peers of one
machine the kernel also says whose they are, and only connections of users who belong there are taken at all.

The hub's *public* key is the capability to talk to it. A CURVE client proves in its first message that it knows that
key, and the key itself never crosses the wire. It is handed to spokes, inside :class:`ZmqAddress`, by Ray. Checking
client keys as well would add nothing, since they would have to be handed out in the same envelope.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from time import monotonic
from typing import Literal

import zmq

from ssd_ray.errors import EngineError, ResourceError
from ssd_ray.transport.channel import HUB, MAX_FRAME_BYTES, Channel, Frame
from ssd_ray.transport.inbox import QUEUE_FRAMES

_CURVE_OVERHEAD_BYTES = 256
"""Upper bound on what encryption adds to a frame."""

_DROPPED = (zmq.EAGAIN, zmq.EHOSTUNREACH)
"""What sending says when the peer's queue is full, or nobody of that name is connected."""

_LINGER_MS = 50
"""How long close() waits for a last frame, such as a goodbye, to leave; a peer that reads takes it in one."""

_HANDSHAKE_MS = 5000
"""How long a connection may take to prove that it knows the key; until then it holds a descriptor."""

_HEARTBEAT_MS = 1000
_HEARTBEAT_TIMEOUT_MS = 5000
_RECONNECT_MS = 10
_RECONNECT_MAX_MS = 500


def key_pair() -> tuple[bytes, bytes]:
    """A new pair of CURVE keys: public, secret.

    Raises:
        ResourceError: this libzmq has no CURVE.
    """
    if not zmq.has("curve"):
        raise ResourceError(
            f"libzmq {zmq.zmq_version()} was built without CURVE, which every connection needs: install pyzmq's own "
            "wheel (pip install --force-reinstall --only-binary pyzmq pyzmq), or use transport='ray'"
        )
    return zmq.curve_keypair()


@dataclass(frozen=True, slots=True)
class ZmqAddress:
    """Where a hub listens and the key that opens it. Picklable; hand it over in private: it is a capability."""

    url: str
    server_key: bytes = field(repr=False)


class _ZmqChannel(Channel):
    """One socket in a context of its own, with the options that both ends share."""

    def __init__(self, name: str, kind: int) -> None:
        self.name = name
        self._refused = 0
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(kind)
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        options = {
            zmq.LINGER: _LINGER_MS,
            zmq.SNDHWM: QUEUE_FRAMES,
            zmq.RCVHWM: QUEUE_FRAMES,
            zmq.MAXMSGSIZE: MAX_FRAME_BYTES + _CURVE_OVERHEAD_BYTES,
            zmq.HANDSHAKE_IVL: _HANDSHAKE_MS,
            zmq.HEARTBEAT_IVL: _HEARTBEAT_MS,
            zmq.HEARTBEAT_TIMEOUT: _HEARTBEAT_TIMEOUT_MS,
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._woken, zmq.POLLIN)

    def receive(self, timeout: float = 0.0) -> tuple[str, Frame] | None:
        if self._socket.closed:
            return None
        deadline = None
        while True:
            try:
                while (item := self._open(self._socket.recv_multipart(zmq.NOBLOCK))) is None:
                    self._refused += 1
                return item
            except zmq.Again:
                now = monotonic()
            deadline = now + timeout if deadline is None else deadline
            if now >= deadline or not self._wait(ceil((deadline - now) * 1000)):
                return None

    @property
    def refused(self) -> int:
        return self._refused

    def wake(self) -> None:
        with suppress(OSError):  # closed, or woken often enough
            self._waker.send(b"!")

    def _wait(self, timeout_ms: int) -> bool:
        """Wait for a frame; False if none came in time or before a wake."""
        ready = dict(self._poller.poll(timeout_ms))
        if self._woken.fileno() in ready:
            self._woken.recv(4096)
        return self._socket in ready

    def close(self) -> None:
        self._woken.close()
        self._waker.close()
        self._socket.close()
        self._context.term()

    def _offer(self, parts: list[bytes]) -> bool:
        if not self._socket.closed and len(parts[-1]) <= MAX_FRAME_BYTES:
            try:
                self._socket.send_multipart(parts, zmq.NOBLOCK)
                return True
            except zmq.ZMQError as error:
                if error.errno not in _DROPPED:
                    raise EngineError(f"channel {self.name}: {error}") from error
        self.dropped += 1
        return False

    def _open(self, parts: list[bytes]) -> tuple[str, bytes] | None:
        """Turn the parts of a message into (peer, frame); None if there are too few or too many."""
        raise NotImplementedError


class ZmqHub(_ZmqChannel):
    """The hub. ``address`` is what its spokes are made with."""

    def __init__(
        self, bind: Literal["ipc", "tcp"] = "ipc", host: str = "127.0.0.1", users: Collection[int] = ()
    ) -> None:
        """Listen on this machine alone ("ipc") or on a free port of ``host``, an address of this machine ("tcp").

        An abstract socket takes connections of this process's user, and of ``users``, by their ids. Without abstract
        sockets, that is outside Linux, "ipc" is a port of the loopback interface.

        Raises:
            ResourceError: nothing can listen there, or there is no encryption.
        """
        public, secret = key_pair()
        super().__init__(HUB, zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self.address = ZmqAddress(self._listen(bind, host, users), public)

    def send(self, peer: str, frame: bytes) -> bool:
        return self._offer([peer.encode(), frame])

    def _listen(self, bind: Literal["ipc", "tcp"], host: str, users: Collection[int]) -> str:
        if bind == "ipc" and sys.platform == "linux":
            url = f"ipc://@ssd-ray-{secrets.token_hex(16)}"
            # libzmq ends the process where connections to such a socket use its descriptors up, whoever makes them. The
            # kernel says whose they are: those of others are closed before they can be many.
            for user in {os.getuid(), *users}:
                self._socket.setsockopt(zmq.IPC_FILTER_UID, user)
        else:
            host = "127.0.0.1" if bind == "ipc" else host
            self._socket.setsockopt(zmq.IPV6, ":" in host)
            url = f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*"
        try:
            self._socket.bind(url)
        except zmq.ZMQError as error:
            self.close()
            raise ResourceError(f"cannot listen on {url}: {error}") from error
        return self._socket.get_string(zmq.LAST_ENDPOINT)

    def _open(self, parts: list[bytes]) -> tuple[str, bytes] | None:
        # The name is whatever the peer says it is: one that nobody has given out is the caller's to ignore.
        return (parts[0].decode(errors="backslashreplace"), parts[1]) if len(parts) == 2 else None


class ZmqSpoke(_ZmqChannel):
    """A spoke. One made under a name that is in use takes that name over."""

    def __init__(self, address: ZmqAddress, name: str) -> None:
        public, secret = key_pair()
        super().__init__(name, zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, address.server_key)
        self._socket.setsockopt(zmq.IPV6, "[" in address.url)
        self._socket.connect(address.url)

    def send(self, peer: str, frame: bytes) -> bool:
        if peer != HUB:
            self.dropped += 1
            return False
        return self._offer([frame])

    def _open(self, parts: list[bytes]) -> tuple[str, bytes] | None:
        return (HUB, parts[0]) if len(parts) == 1 else None
