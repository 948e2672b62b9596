"""A local S3 server, and a proxy before it that does what networks do."""

import multiprocessing
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "logs-bucket"


def options_for(port: int) -> dict[str, str]:
    """Storage options for a server on this port of this machine, which gives up soon."""
    return {
        "endpoint": f"http://127.0.0.1:{port}",
        "region": "us-east-1",
        "access_key_id": "key",
        "secret_access_key": "secret",
        "allow_http": "true",
        "client_max_retries": "0",
        "request_timeout": "3s",
    }


@contextmanager
def s3_server() -> Iterator[int]:
    """Give the port of a server that holds an empty bucket.

    The server has its own process: it draws from `random`, which hypothesis watches in this one.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=_serve, args=(sender,), daemon=True)
    server.start()
    try:
        assert receiver.poll(60), "the S3 server did not start within 60 s"
        port = receiver.recv()
        boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        ).create_bucket(Bucket=BUCKET)
        yield port
    finally:
        server.kill()
        server.join()


def _serve(sender: Connection) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    sender.send(server.get_host_and_port()[1])
    threading.Event().wait()


class FaultyProxy:
    """Forwards HTTP, one request a connection; `fault(request line)` says what goes wrong with it.

    Faults: "" (none), "refuse" (closed without an answer), "503", "cut" (half of the body), "hang" (no answer),
    "lost" (carried out, but the connection breaks off), "silent" (carried out, but no answer).
    """

    def __init__(self, target: int) -> None:
        self.target, self.delay, self.bytes_per_second = target, 0.0, 0.0
        self.fault: Callable[[str], str] = lambda _: ""
        self.requests = 0
        self._stopped = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._stopped.set()
        # Closing alone would not wake the thread that accepts.
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            pass
        self._socket.close()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            connection, _ = self._socket.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            request = self._request(connection)
            if not request or self._stopped.is_set():
                return
            self.requests += 1
            fault = self.fault(request.split(b"\r\n", 1)[0].decode())
            if fault == "refuse":
                return
            if fault == "hang":
                self._stopped.wait(20)
                return
            time.sleep(self.delay)
            if fault == "503":
                connection.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            answer = self._forward(request)
            if fault == "lost":
                return
            if fault == "silent":
                self._stopped.wait(20)
                return
            if fault == "cut":
                head, _, body = answer.partition(b"\r\n\r\n")
                answer = head + b"\r\n\r\n" + body[: len(body) // 2]
            if self.bytes_per_second:
                time.sleep(len(answer) / self.bytes_per_second)
            connection.sendall(answer)

    def _request(self, connection: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            part = connection.recv(65536)
            if not part:
                return b""
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        while length and len(body) < int(length[1]):
            body += connection.recv(65536)
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)
        return head + b"\r\nConnection: close\r\n\r\n" + body

    def _forward(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.target), timeout=20) as server:
            server.sendall(request)
            answer = b""
            while part := server.recv(1 << 20):
                answer += part
        head, separator, body = answer.partition(b"\r\n\r\n")
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)
        return head + b"\r\nConnection: close" + separator + body
