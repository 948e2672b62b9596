"""A wire that is listened to: it stands between a node and the coordinator, and keeps what TLS hides from others."""

import json
import socket
import ssl
import struct
import threading
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

    def _carry(self, raw: socket.socket) -> None:
        sent, received = bytearray(), bytearray()
        self.connections.append((sent, received))
        try:
            with (
                self._server.wrap_socket(raw, server_side=True) as node,
                socket.create_connection(("127.0.0.1", self.port)) as far,
                self._client.wrap_socket(far, server_hostname="127.0.0.1") as coordinator,
            ):
                up = threading.Thread(target=self._pump, args=(node, coordinator, sent), daemon=True)
                up.start()
                self._pump(coordinator, node, received)
        except OSError:
            raw.close()

    @staticmethod
    def _pump(source: ssl.SSLSocket, sink: ssl.SSLSocket, kept: bytearray) -> None:
        try:
            while data := source.recv(65536):
                kept += data
                sink.sendall(data)
        except (OSError, ValueError):
            pass
        finally:
            for end in (source, sink):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def close(self) -> None:
        self._listening.close()
