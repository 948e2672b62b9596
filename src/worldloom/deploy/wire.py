"""The wire format between a plant and its agent: length-prefixed messages with a JSON header and raw bytes.

A message has three parts: a prefix of 16 bytes in network order (magic `WLNK`, version, 0, length of the header, length
of the body); the header, a JSON object in UTF-8 with the message's `type` and its `arrays` as `[name, dtype, shape]`;
and the body, the arrays one after the other, little-endian, in C order. docs/deploy.md lists the message types.
Reading never executes code from a message. Messages above the size limits are rejected before they are read.
"""

import contextlib
import json
import os
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.core.errors import ConfigError, EnvironmentFailure

VERSION = 1
MAGIC = b"WLNK"
HEADER_LIMIT = 64 * 1024  # bytes
BODY_LIMIT = 32 * 1024 * 1024
_PREFIX = struct.Struct("!4sHHII")
_DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("u1"), "float32": np.dtype("<f4")}
_AXES = 8
_LEFT = getattr(select, "POLLRDHUP", 0) | select.POLLHUP  # the first is Linux's, for data that is still unread


class LinkError(EnvironmentFailure):
    """A link to a plant is broken or silent, or uses a different wire format."""


@dataclass(frozen=True, kw_only=True)
class WireMessage:
    """One message: its type, the other fields of its header, and named arrays of uint8 or float32."""

    type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


def encode(message: WireMessage) -> bytes:
    """Return the message's bytes.

    Raises:
        LinkError: an array has an unsupported dtype, or the message exceeds the size limits.
    """
    described, parts = [], []
    for name, array in message.arrays.items():
        if array.dtype.name not in _DTYPES:
            raise LinkError(
                f"array {name!r} has dtype {array.dtype}; expected one of {', '.join(_DTYPES)}. Convert the array"
            )
        described.append([name, array.dtype.name, list(array.shape)])
        parts.append(np.ascontiguousarray(array, _DTYPES[array.dtype.name]).tobytes())
    values = {**message.fields, "type": message.type, "arrays": described}
    header = json.dumps(values, allow_nan=False, separators=(",", ":")).encode()
    body = b"".join(parts)
    _check_sizes(len(header), len(body))
    return _PREFIX.pack(MAGIC, VERSION, 0, len(header), len(body)) + header + body


def decode(header: bytes, body: bytes) -> WireMessage:
    """Return the message with this header and body.

    Raises:
        LinkError: the data is not a message in this format.
    """
    try:
        values = json.loads(header.decode("utf-8"), parse_constant=_no_constant)
        kind, described = values.pop("type"), values.pop("arrays")
        if not isinstance(kind, str):
            raise ValueError("the type of the message is not text")
        arrays: dict[str, np.ndarray] = {}
        place = 0
        for name, dtype, shape in described:
            sides = [int(side) for side in shape]
            if not isinstance(name, str) or len(sides) > _AXES or min(sides, default=0) < 0:
                raise ValueError(f"the header contains an invalid array {[name, dtype, shape]}")
            count = int(np.prod(sides, dtype=object)) if sides else 1
            end = place + count * _DTYPES[dtype].itemsize
            if end > len(body):
                raise ValueError(f"array {name!r} of shape {sides} is longer than the body of {len(body)} bytes")
            arrays[name] = np.frombuffer(bytearray(body[place:end]), _DTYPES[dtype]).reshape(sides)
            place = end
        if place != len(body):
            raise ValueError(f"the arrays have {place} bytes, but the body has {len(body)} bytes")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise LinkError(
            f"a message cannot be read ({type(error).__name__}: {str(error)[:200]}); the sender must use version "
            f"{VERSION} of the format in docs/deploy.md"
        ) from None
    return WireMessage(type=kind, fields=values, arrays=arrays)


def _no_constant(name: str) -> float:
    raise ValueError(f"the header contains {name}, which is not valid JSON")


def _check_sizes(header: int, body: int, body_limit: int = BODY_LIMIT) -> None:
    if header > HEADER_LIMIT or body > body_limit:
        raise LinkError(
            f"a message has a header of {header} bytes and a body of {body} bytes; the limits are {HEADER_LIMIT} and "
            f"{body_limit} bytes. Send smaller pictures, or check that the other side uses this format"
        )


class Connection:
    """A socket that sends and receives complete messages, with a timeout for each call.

    A message that stays incomplete for `silence` seconds is an error, and so is a received message whose body is longer
    than `body_limit` bytes; the body of such a message is not read. One thread can receive while others send.
    """

    def __init__(self, sock: socket.socket, *, silence: float = 2.0, body_limit: int = BODY_LIMIT) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._silence, self._body_limit = sock, silence, body_limit
        self._bytes = bytearray()
        self._touched = time.monotonic()
        self._sending = threading.Lock()
        self._closed = False
        self.sent = self.received = time.monotonic()  # times of the last messages

    def send(self, message: WireMessage, *, timeout: float = 1.0) -> None:
        """Send a complete message.

        Raises:
            LinkError: the other side disconnected, or accepted no data for `timeout` seconds. The connection is then
                closed, because part of the message may have been sent.
        """
        rest = memoryview(encode(message))
        until = time.monotonic() + timeout
        if not self._sending.acquire(timeout=timeout):
            raise LinkError(f"the other side accepted no data for {timeout:g} s; check that it is running")
        try:
            while rest:
                self._wait(write=True, seconds=until - time.monotonic())
                try:
                    rest = rest[self._socket.send(rest) :]
                except BlockingIOError:
                    if time.monotonic() >= until:
                        self.close()
                        raise LinkError(
                            f"the other side accepted no data for {timeout:g} s; check that it is running"
                        ) from None
                except OSError as error:
                    raise self._broken(error) from error
            self.sent = time.monotonic()
        finally:
            self._sending.release()

    def receive(self, timeout: float) -> WireMessage | None:
        """Return the next message, or None if no message is complete after `timeout` seconds.

        Raises:
            LinkError: the other side disconnected, a message stays incomplete, or the data is not a message.
        """
        until = time.monotonic() + timeout
        while True:
            message = self._whole()
            if message is not None:
                return message
            if self._wait(write=False, seconds=until - time.monotonic()):
                self._fill()
                continue
            now = time.monotonic()
            if self._bytes and now - self._touched > self._silence:
                raise LinkError(
                    f"a message is incomplete: {len(self._bytes)} bytes arrived, but no more within "
                    f"{self._silence:g} s. Restart the other side"
                )
            if now >= until:
                return None

    def poll(self) -> WireMessage | None:
        """Return the next message, or None if no complete message has arrived.

        Raises:
            LinkError: see `receive`.
        """
        return self.receive(0.0)

    @property
    def left(self) -> bool:
        """Whether the other side has closed the connection; messages that it sent before can still be received."""
        poll = select.poll()
        poll.register(self._socket, _LEFT)
        return bool(poll.poll(0))

    def fileno(self) -> int:
        """Return the file descriptor of the socket, for `select`; -1 if it is closed."""
        return self._socket.fileno()

    def finish(self) -> None:
        """Tell the other side that no more data will be sent; receiving is still possible."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket; a `receive` in another thread raises `LinkError`."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _fill(self) -> None:
        try:
            came = self._socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError as error:
            raise self._broken(error) from error
        if not came:
            half = f" in the middle of a message ({len(self._bytes)} bytes arrived)" if self._bytes else ""
            raise LinkError(f"the other side closed the connection{half}; start the other side again")
        self._bytes += came
        self._touched = time.monotonic()

    def _whole(self) -> WireMessage | None:
        if len(self._bytes) < _PREFIX.size:
            return None
        magic, version, _, header, body = _PREFIX.unpack_from(self._bytes)
        if magic != MAGIC or version != VERSION:
            came = f"version {version}" if magic == MAGIC else f"bytes {bytes(magic)!r}"
            raise LinkError(
                f"expected messages of version {VERSION} that begin with {MAGIC!r}; got {came}. Check the address, "
                f"and use the same version of worldloom on both sides"
            )
        _check_sizes(header, body, self._body_limit)
        end = _PREFIX.size + header + body
        if len(self._bytes) < end:
            return None
        data = bytes(self._bytes[_PREFIX.size : end])
        del self._bytes[:end]
        self.received = time.monotonic()
        return decode(data[:header], data[header:])

    def _wait(self, *, write: bool, seconds: float) -> bool:
        watched = [self._socket]
        try:
            ready = select.select([] if write else watched, watched if write else [], [], max(0.0, min(seconds, 0.25)))
        except (OSError, ValueError) as error:  # ValueError: the socket was closed
            raise self._broken(error) from error
        return bool(ready[0] or ready[1])

    def _broken(self, error: Exception) -> LinkError:
        if self._closed:
            return LinkError("the connection was closed by this program; open a new connection")
        return LinkError(f"the connection broke ({error}); check and restart the other side")


@dataclass(frozen=True, kw_only=True)
class Address:
    """The address of a plant, `tcp://host:port` or `unix:path`; either `host` or `path` is empty.

    Raises:
        ConfigError: `host` and `path` are both set or both empty, or a value is not a valid host name, port or path.
    """

    host: str = ""
    port: int = 0
    path: str = ""

    def __post_init__(self) -> None:
        # An empty host would stand for all network interfaces.
        valid = bool(self.host) != bool(self.path) and 0 <= self.port < 65536 and "\0" not in self.host + self.path
        try:
            self.host.encode("idna")
            os.fsencode(self.path)
        except UnicodeError:
            valid = False
        if not valid:
            raise ConfigError(f"invalid address {str(self)!r}; expected tcp://HOST:PORT or unix:PATH")

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Parse an address.

        Raises:
            ConfigError: the text is not an address.
        """
        if unix := re.fullmatch(r"unix:(?://)?+([^\0]+)", text):
            return cls(path=unix[1])
        if tcp := re.fullmatch(r"tcp://(\[\S+\]|[^\s\[\]]+):([0-9]{1,5})", text):
            return cls(host=tcp[1].strip("[]"), port=int(tcp[2]))
        raise ConfigError(f"invalid address {text!r}; expected tcp://HOST:PORT or unix:PATH")

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"tcp://{self.host}:{self.port}"

    def connect(self, timeout: float) -> socket.socket:
        """Connect, and retry for `timeout` seconds, because a plant may need time to start.

        Raises:
            LinkError: no plant accepts the connection.
        """
        until = time.monotonic() + timeout
        while True:
            try:
                if not self.path:
                    return socket.create_connection((self.host, self.port), timeout=max(until - time.monotonic(), 0.05))
                sock = socket.socket(socket.AF_UNIX)
                try:
                    sock.settimeout(max(until - time.monotonic(), 0.05))
                    sock.connect(self.path)
                except OSError:
                    sock.close()
                    raise
                return sock
            except OSError as error:
                if time.monotonic() + 0.05 >= until:
                    raise LinkError(
                        f"no plant answers at {self} ({error}); start the plant, or check the address"
                    ) from error
                time.sleep(0.05)

    def listen(self) -> socket.socket:
        """Return a socket that listens at the address.

        Raises:
            LinkError: the address is in use or not permitted.
        """
        try:
            if not self.path:
                return socket.create_server((self.host, self.port), backlog=4)
            self._clear_path()
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(self.path)
            sock.listen(4)
        except OSError as error:
            raise LinkError(f"cannot listen at {self} ({error}); choose another address") from error
        return sock

    def _clear_path(self) -> None:
        """Remove the socket of a plant that has ended from the path; never remove any other file."""
        path = Path(self.path)
        if not path.exists() and not path.is_symlink():
            return
        if path.is_symlink() or not path.is_socket():
            raise LinkError(f"{path} exists and is not a socket; choose another address, or remove the file yourself")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(0.5)
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:  # nobody listens any more
                path.unlink(missing_ok=True)
                return
            except OSError as error:
                raise LinkError(
                    f"cannot tell if a plant listens at {self} ({error}); choose another address"
                ) from error
        raise LinkError(f"another plant listens at {self}; end it, or choose another address")
