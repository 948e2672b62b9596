"""The processes of SuperLink and SuperNode: `flower_process.py (superlink|supernode) PARENT [OPTION ...]`.

The file is run as a script, so that it loads neither worldloom nor torch. PARENT is the id of the process that started
it; the script ends when that process ends or is killed. `flower_internals` lists the parts of Flower that it uses.
"""

import base64
import binascii
import datetime
import gc
import hmac
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

PASS = "worldloom-pass"  # the header with the secret that all paths except those of nodes require
PASS_VARIABLE = "WORLDLOOM_PASS"
LIMITS_VARIABLE = "WORLDLOOM_LIMITS"  # the path of the file with the limits
_OPEN = "/v1/fleet/"
_PUSH = "/v1/fleet/push-object"
_KEY, _SIGNATURE, _TIMESTAMP = b"flwr-public-key", b"flwr-signature", b"flwr-timestamp"  # the headers of a node
_CLOCKS_SECONDS = 300  # the largest difference between the clocks of a node and the coordinator, as in Flower
_HEARTBEAT_SECONDS = 10  # a killed node can reconnect after two intervals; Flower's default is 30 s
_CHUNK = 5 * 2**20  # bytes: Flower sends arrays in pieces of this size
_ENVELOPE = 2**16  # bytes around a piece, or of a request without one
_LISTED = 512  # bytes by which a request that lists the pieces of a message grows per piece
_ADDRESSES = 4096  # addresses whose rate is remembered
_COLLECT = 64  # connections between collections of garbage

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the gate needs to know: the nodes' public keys (PEM), and the size of the largest message in bytes."""

    keys: tuple[str, ...]
    message: int

    @classmethod
    def load(cls, path: Path | str) -> "Limits":
        """Read limits that `save` wrote."""
        values = json.loads(Path(path).read_text())
        return cls(keys=tuple(values["keys"]), message=values["message"])

    def save(self, path: Path | str) -> None:
        """Write the limits as JSON."""
        Path(path).write_text(json.dumps(asdict(self)))

    def body(self, path: str) -> int:
        """Return the largest body of a request of a node, in bytes. A message travels in pieces, one per request."""
        if path == _PUSH:
            return min(self.message, _CHUNK) + _ENVELOPE
        return _ENVELOPE + _LISTED * (self.message // _CHUNK + 1)

    @property
    def connections(self) -> int:
        """The largest number of connections from one address; a node uses up to 6, and nodes may share an address."""
        return 16 + 6 * len(self.keys)

    @property
    def connections_per_second(self) -> float:
        """The largest mean rate of new connections from one address; a node opens less than one in a second."""
        return 5.0 + 2.0 * len(self.keys)

    @property
    def requests_per_second(self) -> float:
        """The largest mean rate of requests of one node."""
        return 100.0

    @property
    def requests_at_once(self) -> float:
        """The largest number of requests of one node in a burst: enough for every piece of two messages."""
        return 500.0 + 2.0 * self.message / _CHUNK


@dataclass
class Bucket:
    """Allows `rate` events in a second on average, and `burst` at once (a token bucket)."""

    rate: float
    burst: float
    clock: Clock = time.monotonic
    _left: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._left, self._at = self.burst, self.clock()

    def take(self) -> bool:
        """Count an event, and return whether it is allowed."""
        now = self.clock()
        self._left, self._at = min(self.burst, self._left + (now - self._at) * self.rate), now
        allowed = self._left >= 1
        self._left -= allowed
        return allowed


class _Accepted(socket.socket):
    """A connection; `door` is told when it is closed."""

    door: "Door"
    name: tuple[str, int]

    def close(self) -> None:
        self.door.guests.pop(self.name, None)
        super().close()


class Door(socket.socket):
    """A listening socket that accepts a limited number of connections.

    The number is limited in total, per address, and per address and second. If there are too many, the oldest
    connection on which the gate has accepted no request (see `welcome`) is closed. Connections from this machine, such
    as the coordinator's, are counted separately and may arrive at any rate, so that others cannot keep them out.

    A failed TLS handshake leaves about 0.3 MB in reference cycles of asyncio, which Python's own collector may not see
    for minutes; the door therefore collects garbage after a number of connections.
    """

    def __init__(self, family: int, limits: Limits, clock: Clock = time.monotonic) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self.guests: dict[tuple[str, int], _Accepted] = {}  # the oldest first
        self._welcome: set[tuple[str, int]] = set()
        self._limits, self._clock = limits, clock
        self._rates: dict[str, Bucket] = {}
        self._accepted = 0

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
            ConnectionAbortedError: the connection was closed, because there are too many; asyncio then goes on.
        """
        connection, address = super().accept()
        self._accepted += 1
        if self._accepted % _COLLECT == 0:
            gc.collect()
        host, here = str(address[0]), str(connection.getsockname()[0])
        self._welcome &= self.guests.keys()
        if not self._admits(host, here):
            connection.close()
            raise ConnectionAbortedError
        guest = _Accepted(fileno=connection.detach())
        guest.door, guest.name = self, (host, int(address[1]))
        self.guests[guest.name] = guest
        return guest, address

    def welcome(self, name: tuple[str, int] | None) -> None:
        """Record that the gate accepted a request on the connection from the address `name`."""
        if name is not None:
            self._welcome.add(name)

    def _admits(self, host: str, here: str) -> bool:
        if host == here:
            return self._has_room([name for name in self.guests if name[0] == here], 2 * self._limits.connections)
        if host not in self._rates:
            if len(self._rates) >= _ADDRESSES:
                self._rates.clear()
            burst = float(self._limits.connections)
            self._rates[host] = Bucket(self._limits.connections_per_second, burst, self._clock)
        # One address alone cannot fill the places of all.
        return (
            self._rates[host].take()
            and self._has_room([name for name in self.guests if name[0] == host], self._limits.connections)
            and self._has_room([name for name in self.guests if name[0] != here], 2 * self._limits.connections)
        )

    def _has_room(self, names: list[tuple[str, int]], most: int) -> bool:
        """Return whether another connection may join these; if they are too many, close the oldest unwelcome one."""
        if len(names) < most:
            return True
        oldest = next((name for name in names if name not in self._welcome), None)
        if oldest is None:
            return False
        try:
            self.guests.pop(oldest).shutdown(socket.SHUT_RDWR)  # the event loop, which owns the connection, closes it
        except OSError:  # the peer has closed it already
            return True
        return True


class Gate:
    """ASGI middleware that limits calls: nodes may call only the paths for nodes; the coordinator may call any path.

    On the paths of nodes, Flower checks the signature of a node's key only after it has read the whole request. The
    gate checks the signature first, and then reads at most as many bytes as an honest request has. On the same port
    Flower also serves calls that register nodes, start runs and send messages, without authentication; the gate
    requires the coordinator's secret for these.
    """

    def __init__(
        self, app: App, secret: str, limits: Limits, doors: Iterable[Door] = (), *, clock: Clock = time.monotonic
    ) -> None:
        self._app, self._secret, self._limits, self._doors = app, secret.encode(), limits, tuple(doors)
        self._keys: dict[bytes, Any] = {key.encode(): load_pem_public_key(key.encode()) for key in limits.keys}
        self._rates = {
            key: Bucket(limits.requests_per_second, limits.requests_at_once, clock) for key in self._keys
        }  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or refuse it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if hmac.compare_digest(headers.get(PASS.encode(), b""), self._secret):
            self._welcome(scope)
            await self._app(scope, receive, send)
            return
        path = str(scope["path"])
        if not path.startswith(_OPEN):
            await _refuse(send, 403, "only the coordinator may call this")
            return
        if reason := self._stranger(headers):
            await _refuse(send, 401, reason)
            return
        self._welcome(scope)
        if not self._rates[_decoded(headers[_KEY])].take():
            await _refuse(send, 503, f"a node may send {self._limits.requests_per_second:g} requests per second; wait")
            return
        limit = self._limits.body(path)
        body = None if _stated(headers) > limit else await _read(receive, limit)
        if body is None:
            await _refuse(
                send, 413, f"a request to {path} has too many bytes; expected at most {limit}, the size that the model "
                "of the constitution needs. Use the recipe of the consortium"
            )  # fmt: skip
            return
        await self._app(scope, _again(body, receive), send)

    def _stranger(self, headers: MutableMapping[bytes, bytes]) -> str:
        """Return why a request is not from a node of the constitution; an empty string if it is."""
        key = _decoded(headers.get(_KEY, b""))
        if key not in self._keys:
            return "the key is not that of a node in the constitution; use the secret key of this node"
        stamp = headers.get(_TIMESTAMP, b"")
        try:
            when = datetime.datetime.fromisoformat(stamp.decode("ascii"))
            apart = abs((datetime.datetime.now(datetime.UTC) - when).total_seconds())
            self._keys[key].verify(_decoded(headers.get(_SIGNATURE, b"")), stamp, ec.ECDSA(SHA256()))
        except (InvalidSignature, ValueError, TypeError, OverflowError):
            return "the request is not signed with the node's key; use the secret key of this node"
        if apart > _CLOCKS_SECONDS:
            return f"the clocks of node and coordinator differ by {apart:.0f} s; set both clocks"
        return ""

    def _welcome(self, scope: Scope) -> None:
        for door in self._doors:
            door.welcome(scope.get("client"))


def _decoded(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""


def _stated(headers: MutableMapping[bytes, bytes]) -> int:
    """Return the length of a body as its sender states it, or 0."""
    length = headers.get(b"content-length", b"")
    return int(length) if length.isdigit() and len(length) < 20 else 0


async def _read(receive: Receive, limit: int) -> bytes | None:
    """Return the body of a request, or None if it is longer than `limit` or its sender went away."""
    parts, size = [], 0
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return None
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            return None
        if not event.get("more_body", False):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` for the app: first the body, which was read already, and then all later events."""
    events: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> MutableMapping[str, Any]:
        return events.pop() if events else await receive()

    return read


async def _refuse(send: Send, status: int, reason: str) -> None:
    """Send an error that Flower's clients show, and close the connection without reading the rest of the request."""
    body = json.dumps({"code": 0, "detail": f"worldloom: {reason}"}).encode()
    length = str(len(body)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _doors(host: str, port: int, limits: Limits) -> list[Door]:
    """Return sockets that listen at an address."""
    made = []
    for family, _, _, _, address in socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        door = Door(family, limits)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            door.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        door.bind(address)
        made.append(door)
    return made


def superlink() -> None:
    """Run Flower's SuperLink behind the gate."""
    import uvicorn
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
    from flwr.superlink.main import create_app

    secret, limits = os.environ.pop(PASS_VARIABLE), Limits.load(os.environ.pop(LIMITS_VARIABLE))
    config = _parse_superlink_lifespan_config()
    doors = _doors(config.host, config.port, limits)
    app: Any = Gate(create_app(config, SuperLinkLifespan), secret, limits, doors)
    served = uvicorn.Config(
        app,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        log_level="warning",
        http="h11",  # it limits the size of headers, httptools does not
        ws="none",
        loop="asyncio",  # it accepts connections with `Door.accept`
    )
    listening: list[Any] = [*doors]
    gc.collect()
    gc.freeze()  # what the start created stays: each later collection then takes milliseconds
    uvicorn.Server(served).run(sockets=listening)


def supernode() -> None:
    """Run Flower's SuperNode."""
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection
    from flwr.supernode.cli import flower_supernode

    for module in (heartbeat, fleet_http_connection):
        vars(module)["HEARTBEAT_DEFAULT_INTERVAL"] = _HEARTBEAT_SECONDS
    flower_supernode()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)  # so that a SuperNode deregisters and can reconnect at once
    time.sleep(5)
    os._exit(1)


if __name__ == "__main__":
    which, parent = sys.argv[1], int(sys.argv[2])
    sys.argv = [f"flower-{which}", *sys.argv[3:]]
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    {"superlink": superlink, "supernode": supernode}[which]()
