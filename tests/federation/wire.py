"""A wire that is listened to: it stands between a node and the coordinator, and keeps what TLS hides from others."""

import json
import select
import socket
import ssl
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MAGIC = b"WLWEAVE\x01"


@dataclass
class Wire:
    """Stands between a node and the coordinator with the coordinator's certificate, and keeps every byte."""

    tls: Path
    port: int
    connections: list[tuple[bytearray, bytearray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(self.tls / "server.pem", self.tls / "server.key")
        self._server = server
        self._client = ssl.create_default_context(cafile=str(self.tls / "ca.pem"))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def sent(self) -> bytes:
        """What came from the node, one connection after another."""
        return b"".join(bytes(up) for up, _ in self.connections)

    def messages(self) -> list[bytes]:
        """The signed messages of worldloom that the node sent."""
        found = []
        for up, _ in self.connections:
            place = up.find(MAGIC)
            while place >= 0:
                (length,) = struct.unpack_from("<I", up, place + len(MAGIC))
                begin = place + len(MAGIC) + 4
                size = json.loads(up[begin : begin + length])["size"]
                found.append(bytes(up[place : begin + length + 64 + size]))
                place = up.find(MAGIC, place + 1)
        return found

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(raw,), daemon=True).start()

    # One thread carries both directions: before Python 3.13, two threads must not read and write one TLS connection.
    def _carry(self, raw: socket.socket) -> None:
        sent, received = bytearray(), bytearray()
        self.connections.append((sent, received))
        with (
            raw,
            suppress(OSError),
            self._server.wrap_socket(raw, server_side=True) as node,
            socket.create_connection(("127.0.0.1", self.port)) as far,
            self._client.wrap_socket(far, server_hostname="127.0.0.1") as coordinator,
        ):
            ways = {node: (coordinator, sent), coordinator: (node, received)}
            open_still = True
            while open_still:
                for source in select.select(list(ways), [], [])[0]:
                    data, open_still = _receive(source)
                    sink, kept = ways[source]
                    kept += data
                    sink.sendall(data)
                    if not open_still:
                        break

    def close(self) -> None:
        self._listening.close()


def _receive(source: ssl.SSLSocket) -> tuple[bytes, bool]:
    """Return what has arrived, and whether the connection is still open."""
    data = b""
    source.settimeout(0)
    try:
        while part := source.recv(65536):
            data += part
    except ssl.SSLWantReadError:
        return data, True
    finally:
        source.settimeout(None)
    return data, False
