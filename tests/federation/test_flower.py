"""Flower as the transport: its keys, what passes the gate, what is asked again, and a deployment on this machine."""

import ast
import asyncio
import base64
import datetime
import gc
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from asyncio import sslproto
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.federation import Tls, make_node_keys, make_tls

pytest.importorskip("flwr", reason="needs pip install 'worldloom[weave]'")

import httpx
from flwr.app import Error, Message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, TIMESTAMP_HEADER, ErrorCode
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.task_identity import TaskIdentity

from worldloom.federation import Reply, Transport
from worldloom.federation.transport import flower_internals
from worldloom.federation.transport.flower import FlowerTransport, _carried, _carry, join, serve
from worldloom.federation.transport.flower_process import PASS, Door, Gate, Limits
from worldloom.federation.transport.keys import connection_key

NODE = """
import sys
from worldloom.federation.transport.flower import join

name, folder, address, patience = sys.argv[1:]

def answer(data):
    if data == b"fail":
        raise ValueError("what only the owner may know")
    return name.encode() + b":" + data

join(answer, home=f"{folder}/{name}", server=address, authority=f"{folder}/tls/ca.pem",
     secret=f"{folder}/keys/{name}.ssh", timeout_seconds=float(patience))
"""
COORDINATOR = """
import sys, time
from pathlib import Path
from worldloom.federation.transport.flower import serve
from worldloom.federation.transport.keys import Tls

folder, port = Path(sys.argv[2]), int(sys.argv[3])
tls = Tls(authority=folder / "tls/ca.pem", certificate=folder / "tls/server.pem", secret=folder / "tls/server.key")
with serve(folder / "link", tls, {"north": (folder / "keys/north.ssh.pub").read_text()}, port=port):
    print("up", flush=True)
    time.sleep(300)
"""


# -- keys ------------------------------------------------------------------------------------------------------------


def test_the_keys_of_a_node_are_what_flower_reads_and_the_secret_is_its_owners_alone(tmp_path: Path) -> None:
    public = make_node_keys(tmp_path / "keys", "north")
    stored = public.with_suffix("")
    secret = serialization.load_ssh_private_key(stored.read_bytes(), password=None)
    assert isinstance(secret, ec.EllipticCurvePrivateKey)
    assert isinstance(secret.curve, ec.SECP384R1)
    assert serialization.load_ssh_public_key(public.read_bytes()) == secret.public_key()
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    before = stored.read_bytes()
    with pytest.raises(StorageError, match="never overwritten"):
        make_node_keys(tmp_path / "keys", "north")
    assert stored.read_bytes() == before


def test_a_public_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    text = other.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    for wrong in (text, "", "ssh-ed25519 AAAA", make_node_keys(tmp_path, "north").with_suffix("").read_text()):
        with pytest.raises(DataError, match="north's public key"):
            connection_key("north", wrong)


def test_a_certificate_holds_for_its_hosts_and_days_and_is_not_written_over(tmp_path: Path) -> None:
    made = make_tls(tmp_path, hosts=("weave.example", "10.0.0.7", "::1"), days=90)
    certificate = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["weave.example"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "::1"]
    assert 90 <= (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds() / 86400 < 90.1
    for path in (made.secret, tmp_path / "ca.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(StorageError, match="never overwritten"):
        make_tls(tmp_path)
    with pytest.raises(ConfigError, match="at least one host and days"):
        make_tls(tmp_path / "other", days=0)


def test_the_authority_signs_again_and_only_with_its_own_key(tmp_path: Path) -> None:
    first = make_tls(tmp_path)
    authority = first.authority.read_bytes()
    for path in (first.certificate, first.secret):
        path.unlink()
    assert make_tls(tmp_path).authority.read_bytes() == authority
    assert _handshake(first, authority, "localhost") == ""
    for path in (first.certificate, first.secret):
        path.unlink()
    other = make_tls(tmp_path / "other")
    shutil.copy(other.authority, first.authority)
    with pytest.raises(DataError, match="is not the secret key of"):
        make_tls(tmp_path)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_who_trusts_the_authority_connects(tmp_path: Path, host: str) -> None:
    made = make_tls(tmp_path)
    assert _handshake(made, made.authority.read_bytes(), host) == ""


def test_another_authority_and_another_host_are_refused(tmp_path: Path) -> None:
    made, other = make_tls(tmp_path / "ours"), make_tls(tmp_path / "theirs")
    assert "unable to get local issuer certificate" in _handshake(made, other.authority.read_bytes(), "localhost")
    assert "Hostname mismatch" in _handshake(made, made.authority.read_bytes(), "elsewhere.example")


def test_an_expired_certificate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worldloom.federation.transport import keys

    class Past(keys.datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) - keys.datetime.timedelta(days=3)

    made = make_tls(tmp_path)
    made.certificate.unlink()
    made.secret.unlink()
    monkeypatch.setattr(keys.datetime, "datetime", Past)
    assert "expired" in _handshake(make_tls(tmp_path, days=2), made.authority.read_bytes(), "localhost")


def _handshake(server: Tls, authority: bytes, host: str) -> str:
    """Return why a client that trusts an authority does not connect to a server as that host; nothing where it does."""
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(server.certificate, server.secret)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.load_verify_locations(cadata=authority.decode())
    # What every client of Python 3.13 and newer asks.
    theirs.verify_flags |= ssl.VERIFY_X509_STRICT
    one, two = socket.socketpair()

    def accept() -> None:
        try:
            with ours.wrap_socket(one, server_side=True) as connected:
                connected.recv(1)
        except OSError:
            one.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        with theirs.wrap_socket(two, server_hostname=host):
            return ""
    except ssl.SSLCertVerificationError as error:
        return str(error)
    finally:
        two.close()
        thread.join(10)


# -- the gate --------------------------------------------------------------------------------------------------------


@dataclass
class Arrival:
    """A request that arrives at the gate in pieces, and what became of it."""

    path: str = "/v1/fleet/push-object"
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    reached: list[bytes] = field(default_factory=list)  # the bodies that the app got
    sent: list[Any] = field(default_factory=list)
    read: int = 0

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (event := await receive())["more_body"]:
            body += event["body"]
        self.reached.append(body + event["body"])

    async def receive(self) -> Any:
        piece = self.pieces[self.read] if self.pieces else b""
        self.read += 1
        return {"type": "http.request", "body": piece, "more_body": self.read < len(self.pieces)}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def at(self, gate: Gate, kind: str = "http") -> "Arrival":
        gate._app = self.app
        scope = {"type": kind, "path": self.path, "headers": self.headers, "client": ("192.0.2.1", 5)}
        asyncio.run(gate(scope, self.receive, self.send))
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"]) if self.sent else 200

    @property
    def why(self) -> str:
        return str(json.loads(self.sent[1]["body"])["detail"])


NODE_KEY = ec.generate_private_key(ec.SECP384R1())


def pem_of(secret: ec.EllipticCurvePrivateKey) -> bytes:
    return secret.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def signed(secret: ec.EllipticCurvePrivateKey = NODE_KEY, *, late: float = 0.0, stamp: str = "") -> list[Any]:
    """Return the headers by which Flower's nodes sign a request."""
    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=late)
    signature = secret.sign(now.isoformat().encode(), ec.ECDSA(SHA256()))
    values = (
        (FLEET_HTTP_PUBLIC_KEY_HEADER, base64.b64encode(pem_of(secret))),
        (TIMESTAMP_HEADER, (stamp or now.isoformat()).encode()),
        (FLEET_HTTP_SIGNATURE_HEADER, base64.b64encode(signature)),
    )
    return [(name.encode(), value) for name, value in values]


def gate(*, message: int = 1000, clock: Any = time.monotonic) -> Gate:
    limits = Limits(keys=(pem_of(NODE_KEY).decode(),), message=message)
    return Gate(Arrival().app, "secret", limits, clock=clock)


@pytest.mark.parametrize(
    ("path", "shown", "passes"),
    [
        ("/v1/control/register-node", None, False),
        ("/v1/control/start-run", b"guess", False),
        ("/v1/runtime/acquire-task", b"", False),
        ("/docs", None, False),
        ("/v1/fleet", None, False),
        ("/x/v1/fleet/", None, False),
        ("/v1/control/register-node", b"secret", True),
        ("/v1/runtime/acquire-task", b"secret", True),
    ],
)
def test_the_gate_lets_all_to_what_nodes_use_and_the_coordinator_to_the_rest(
    path: str, shown: bytes | None, passes: bool
) -> None:
    headers = [] if shown is None else [(PASS.encode(), shown)]
    came = Arrival(path, headers).at(gate())
    assert bool(came.reached) is passes
    assert came.status == (200 if passes else 403)
    assert not Arrival(path, headers).at(gate(), "websocket").reached


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        (list, "the key is not that of a node"),
        (lambda: [(b"flwr-public-key", b"\xff not base64")], "the key is not that of a node"),
        (lambda: signed(ec.generate_private_key(ec.SECP384R1())), "the key is not that of a node"),
        (lambda: signed()[:1], "not signed with the node's key"),
        (lambda: signed(stamp=datetime.datetime.now(datetime.UTC).isoformat()), "not signed with the node's key"),
        (lambda: signed(late=400), "the clocks of node and coordinator differ by 400 s"),
        (lambda: signed(late=-400), "the clocks of node and coordinator differ by 400 s"),
    ],
)
def test_of_a_request_without_a_nodes_key_no_byte_is_read(headers: Callable[[], list[Any]], why: str) -> None:
    came = Arrival(headers=headers(), pieces=[bytes(300)] * 10).at(gate())
    assert (came.reached, came.read, came.status) == ([], 0, 401)
    assert why in came.why
    assert (b"connection", b"close") in came.sent[0]["headers"]


@pytest.mark.parametrize("path", ["/v1/fleet/push-object", "/v1/fleet/push-messages", "/v1/fleet/activate-node"])
@pytest.mark.parametrize("message", [1000, 40_000_000])
def test_a_body_is_read_up_to_what_the_model_needs_and_no_further(path: str, message: int) -> None:
    limit = gate(message=message)._limits.body(path)
    whole = Arrival(path, signed(), [bytes(limit // 2), bytes(limit - limit // 2)]).at(gate(message=message))
    assert (whole.status, [len(body) for body in whole.reached]) == (200, [limit])
    stated = [*signed(), (b"content-length", str(limit + 1).encode())]
    for headers, read in ((stated, 0), (signed(), 3)):
        came = Arrival(path, headers, [bytes(limit // 2)] * 10).at(gate(message=message))
        assert (came.reached, came.read, came.status) == ([], read, 413)
        assert f"expected at most {limit}" in came.why
    # A piece of a message fits, and a list of its pieces.
    assert limit > (min(message, FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE) if path.endswith("object") else message // 2**16)


def test_a_node_that_asks_too_often_waits_while_others_do_not() -> None:
    now = [0.0]
    there = gate(clock=lambda: now[0])
    burst = int(there._limits.requests_at_once)
    statuses = [Arrival(headers=signed()).at(there).status for _ in range(burst + 2)]
    assert statuses == [200] * burst + [503] * 2
    now[0] += 0.1
    assert [Arrival(headers=signed()).at(there).status for _ in range(11)] == [200] * 10 + [503]
    assert Arrival(path="/v1/runtime/x", headers=[(PASS.encode(), b"secret")]).at(there).status == 200


def test_the_door_takes_a_limited_number_and_those_go_first_that_were_not_welcomed() -> None:
    limits = Limits(keys=(), message=0)
    most = 2 * limits.connections  # from this machine
    inside = []
    with Door(socket.AF_INET, limits) as door:
        door.bind(("127.0.0.1", 0))
        door.listen(200)
        outside = [socket.create_connection(door.getsockname()) for _ in range(most + 3)]
        for number in range(most):
            guest, address = door.accept()
            inside.append(guest)
            if number in (1, 2):
                door.welcome(address)
        held = list(door.guests)
        assert len(held) == most
        inside += [door.accept()[0] for _ in range(3)]
        assert len(door.guests) == most
        assert [name in door.guests for name in held[:6]] == [False, True, True, False, False, True]
        assert outside[0].recv(1) == b""  # it was closed
        for name in list(door.guests):
            door.welcome(name)
        late = socket.create_connection(door.getsockname())
        with pytest.raises(ConnectionAbortedError):
            door.accept()
        assert late.recv(1) == b""
        door.guests[held[1]].close()
        again = socket.create_connection(door.getsockname())
        inside.append(door.accept()[0])
        for one in [*outside, *inside, late, again]:
            one.close()
        assert not door.guests


def test_the_door_slows_down_an_address_and_keeps_places_for_others() -> None:
    now = [0.0]
    limits = Limits(keys=("x",), message=0)
    with Door(socket.AF_INET, limits, clock=lambda: now[0]) as door:
        took = [door._admits("192.0.2.1", "192.0.2.9") for _ in range(limits.connections + 5)]
        assert took == [True] * limits.connections + [False] * 5
        assert door._admits("192.0.2.2", "192.0.2.9")
        assert all(door._admits("192.0.2.9", "192.0.2.9") for _ in range(1000))  # the coordinator itself
        now[0] += 1.0
        took = [door._admits("192.0.2.1", "192.0.2.9") for _ in range(10)]
        assert took == [True] * 7 + [False] * 3


def test_what_broken_handshakes_leave_is_collected_without_waiting_for_python() -> None:
    """Each leaves an `SSLProtocol` with its buffers in a cycle."""

    async def served(count: int) -> int:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with Door(socket.AF_INET, Limits(keys=(), message=0)) as door:
            door.bind(("127.0.0.1", 0))
            server = await asyncio.start_server(lambda *_: None, sock=door, ssl=tls)
            for _ in range(count):
                _, writer = await asyncio.open_connection(*door.getsockname())
                writer.write(b"\x16\x03\x01\x40\x00" + bytes(3000))
                writer.close()
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.1)
            server.close()
        return sum(type(one) is sslproto.SSLProtocol for one in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(served(300)) <= 100
    finally:
        gc.enable()


# -- what is used of Flower ------------------------------------------------------------------------------------------


def test_every_internal_of_flower_that_is_used_is_listed() -> None:
    listed = set(re.findall(r"`(\w+)`", flower_internals.__doc__ or ""))
    used = set()
    for path in Path(flower_internals.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr"):
                assert path.name in ("flower_internals.py", "flower_process.py") or node.module == "flwr.app"
                used |= {name.name for name in node.names if node.module != "flwr.app"}
    modules = {"heartbeat", "fleet_http_connection"}  # in which one constant is replaced
    assert used - modules <= listed
    for module in modules:
        where = {"heartbeat": "flwr.supercore", "fleet_http_connection": "flwr.supernode"}[module]
        assert vars(import_module(f"{where}.{module}"))["HEARTBEAT_DEFAULT_INTERVAL"] == 30


# -- exchanges over a grid that is a list ----------------------------------------------------------------------------


@dataclass
class Grid:
    """A Flower grid of this process: `connected` holds since when each node is there; `answers` what each answers."""

    connected: dict[str, str] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, bytes]] = field(default_factory=list)
    ready: dict[str, Message] = field(default_factory=dict)

    def get_nodes(self) -> list[NodeInfo]:
        return [
            NodeInfo(public_key=name.encode(), node_id=NAMES.index(name) + 1, last_activated_at=since)
            for name, since in self.connected.items()
        ]

    def push_messages(self, messages: Sequence[Message]) -> list[str | None]:
        ids: list[str | None] = []
        for message in messages:
            name, number = NAMES[message.metadata.dst_node_id - 1], f"message {len(self.asked)}"
            self.asked.append((name, _carried(message)))
            message.metadata.__dict__["_message_id"] = number
            content = self.answers.get(name)
            content = content(len(self.asked)) if callable(content) else content
            if content is not None:
                self.ready[number] = Message(content, reply_to=message)
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Sequence[str]) -> list[Message]:
        return [self.ready.pop(number) for number in message_ids if number in self.ready]


NAMES = ("north", "east", "south")


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Grid:
    for part in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, part, 1)
    monkeypatch.setattr("worldloom.federation.transport.flower._POLL_SECONDS", 0.01)
    return Grid(connected=dict.fromkeys(NAMES, "1"), answers={name: _carry(name.encode()) for name in NAMES})


def over(grid: Any) -> FlowerTransport:
    return FlowerTransport({name.encode(): name for name in NAMES}, grid if callable(grid) else lambda: grid)


def ask(transport: FlowerTransport, *names: str, seconds: float = 5.0) -> dict[str, Reply]:
    return {
        reply.node: reply for reply in transport.exchange({name: b"to " + name.encode() for name in names},
                                                          seconds=seconds)
    }  # fmt: skip


def test_nodes_are_asked_by_their_keys_and_answer_under_their_names(grid: Grid) -> None:
    assert isinstance(over(grid), Transport)
    assert over(grid).nodes() == ("east", "north", "south")
    replies = ask(over(grid), *NAMES)
    assert {name: reply.data for name, reply in replies.items()} == {name: name.encode() for name in NAMES}
    assert sorted(grid.asked) == sorted((name, b"to " + name.encode()) for name in NAMES)


def test_who_is_not_there_or_does_not_answer_is_told_with_the_cause_when_the_time_is_over(grid: Grid) -> None:
    del grid.connected["east"]
    grid.answers["south"] = None
    begun = time.monotonic()
    replies = ask(over(grid), "north", "east", "south", "west", seconds=0.5)
    assert 0.4 < time.monotonic() - begun < 4
    assert replies["north"].data == b"north"
    assert replies["east"].error == "not connected within 0.5 s"
    assert replies["south"].error == "no answer within 0.5 s"
    assert replies["west"].error == "no registered node has this name"
    assert sorted(over(grid)._online(grid)) == ["north", "south"]


def test_who_connects_late_or_anew_is_asked_then_and_nobody_twice_on_one_connection(grid: Grid) -> None:
    del grid.connected["east"]
    grid.answers["south"] = lambda count: _carry(b"second") if grid.connected["south"] == "2" else None

    def arrive() -> None:
        time.sleep(0.3)
        grid.connected["south"] = "2"
        grid.connected["east"] = "1"

    thread = threading.Thread(target=arrive)
    thread.start()
    replies = ask(over(grid), *NAMES)
    thread.join()
    assert {name: reply.data for name, reply in replies.items()} == {
        "north": b"north",
        "east": b"east",
        "south": b"second",
    }
    assert [name for name, _ in grid.asked].count("south") == 2
    assert [name for name, _ in grid.asked].count("north") == 1


def test_a_message_that_a_node_lost_is_sent_again_but_a_refusal_is_an_answer(grid: Grid) -> None:
    lost = Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason="gone")
    grid.answers["north"] = lambda count: lost if count == 1 else _carry(b"found")
    grid.answers["east"] = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="ValueError")
    assert ask(over(grid), "north")["north"].data == b"found"
    assert ask(over(grid), "east")["east"] == Reply(node="east", data=None, error="ValueError")
    assert [name for name, _ in grid.asked] == ["north", "north", "east"]


def test_a_node_that_loses_every_message_is_given_up_and_its_long_reasons_are_cut(
    grid: Grid, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid.answers["north"] = Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason="gone" * 10**6)
    reply = ask(over(grid), "north")["north"]
    assert reply.error == "gone" * 250
    assert [name for name, _ in grid.asked] == ["north"] * 11
    assert max(len(record.message) for record in caplog.records) < 1100


def test_who_is_away_is_waited_for_only_while_it_is_connected(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    pull, may = grid.pull_messages, threading.Event()

    def late(message_ids: Sequence[str]) -> list[Message]:
        asked = grid.asked[int(message_ids[0].removeprefix("message "))][0]
        return pull(message_ids) if asked != "south" or may.is_set() else []

    monkeypatch.setattr(grid, "pull_messages", late)
    del grid.connected["north"]
    begun = time.monotonic()
    threading.Timer(0.5, may.set).start()
    asked = dict.fromkeys(NAMES, b"?")
    replies = {one.node: one for one in over(grid).exchange(asked, seconds=60.0, away=("north", "south"))}
    assert time.monotonic() - begun < 30
    assert replies["north"] == Reply(
        node="north", data=None, error="not connected; the node has left, so the round does not wait for it"
    )
    assert all(replies[name].data is not None for name in ("east", "south"))


def test_an_answer_that_hangs_on_its_way_holds_up_no_other(grid: Grid) -> None:
    pull, hanging = grid.pull_messages, threading.Event()

    def stuck(message_ids: Sequence[str]) -> list[Message]:
        if message_ids == ["message 0"]:  # a node died while it sent the rest of it
            hanging.wait(20)
        return pull(message_ids)

    grid.pull_messages = stuck  # type: ignore[method-assign]
    try:
        replies = list(over(grid).exchange(dict.fromkeys(NAMES, b"?"), seconds=1.0))
    finally:
        hanging.set()
    assert [reply.node for reply in replies if reply.data is None] == [grid.asked[0][0]]
    assert "no answer within 1 s" in replies[-1].error
    assert len(replies) == 3


def test_a_server_that_was_started_again_is_asked_everything_again(grid: Grid) -> None:
    second = Grid(connected=dict(grid.connected), answers=dict(grid.answers))
    grid.answers["east"] = None
    grids = iter([grid, grid])
    replies = ask(over(lambda: next(grids, second)), "north", "east")
    assert {name: reply.data for name, reply in replies.items()} == {"north": b"north", "east": b"east"}
    assert [name for name, _ in second.asked] == ["east"]


def test_a_server_that_is_away_for_a_moment_is_asked_on_and_named_where_it_stays_away(grid: Grid) -> None:
    tries = iter(range(1000))

    def flaky() -> Grid:
        if next(tries) in (0, 2, 3):
            raise httpx.ConnectError("away")
        return grid

    assert ask(over(flaky), "north")["north"].data == b"north"

    def gone() -> Grid:
        raise httpx.ConnectError("away")

    assert "ConnectError: away" in ask(over(gone), "north", seconds=0.3)["north"].error


def test_what_carries_no_bytes_of_ours_is_no_answer(grid: Grid) -> None:
    from flwr.app import ConfigRecord, RecordDict

    for content in (RecordDict({}), RecordDict({"worldloom": ConfigRecord({"data": "text"})})):
        grid.answers["north"] = content
        reply = ask(over(grid), "north")["north"]
        assert reply.data is None
        assert "no content from worldloom" in reply.error


# -- a deployment ----------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _of(folder: Path) -> list[psutil.Process]:
    """Return the processes that were started with something below a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and any(str(folder) in each for each in process.info["cmdline"] or ()):
            found.append(process)
    return found


def _until_none(folder: Path, seconds: float = 20.0) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    while (left := _of(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@dataclass
class Deployment:
    """Keys and certificates in a folder, and the processes that were started from it."""

    folder: Path
    port: int = field(default_factory=_free_port)
    started: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tls = make_tls(self.folder / "tls")
        for name in ("north", "east", "stranger"):
            make_node_keys(self.folder / "keys", name)

    def public(self, *names: str) -> Mapping[str, str]:
        return {name: (self.folder / "keys" / f"{name}.ssh.pub").read_text() for name in names}

    def node(self, name: str, *, patience: float = 120) -> "subprocess.Popen[bytes]":
        return self._start(NODE, name, str(self.folder), f"127.0.0.1:{self.port}", str(patience))

    def coordinator(self) -> "subprocess.Popen[bytes]":
        return self._start(COORDINATOR, "coordinator", str(self.folder), str(self.port))

    def said(self, process: "subprocess.Popen[bytes]") -> str:
        return (self.folder / f"{self.started.index(process)}.out").read_text()

    def stop(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for left in _of(self.folder):
            left.kill()
        _until_none(self.folder)

    def _start(self, script: str, *arguments: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{len(self.started)}.out").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", script, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self.started.append(process)
        return process


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path)
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_deployment_answers_refuses_strangers_and_survives_kills(deployment: Deployment) -> None:
    with serve(
        deployment.folder / "link", deployment.tls, deployment.public("north", "east"), port=deployment.port
    ) as transport:
        north, east = deployment.node("north"), deployment.node("east")
        stranger = deployment.node("stranger", patience=3)

        large = os.urandom(12_000_000)
        first = {reply.node: reply for reply in transport.exchange({"north": b"one", "east": large}, seconds=120.0)}
        assert {name: reply.error for name, reply in first.items()} == {"north": "", "east": ""}
        assert (first["north"].data, first["east"].data) == (b"north:one", b"east:" + large)

        # Of an error, the coordinator learns the kind alone.
        second = {reply.node: reply for reply in transport.exchange({"north": b"fail", "east": b""}, seconds=120.0)}
        assert second["east"].data == b"east:"
        assert second["north"].data is None
        assert second["north"].error == "ValueError; see the node's log for details"

        # A node whose key is not known does not get in, and cannot make itself known.
        assert stranger.wait(90) != 0
        assert "this node's key is in the constitution" in deployment.said(stranger)
        assert sorted(transport._online(transport._grid())) == ["east", "north"]
        with (
            ControlHttpClient.from_server_address(
                f"127.0.0.1:{deployment.port}", False, deployment.tls.authority.read_bytes(), []
            ) as control,
            pytest.raises(httpx.HTTPStatusError, match="403"),
        ):
            control.RegisterNode(
                RegisterNodeRequest(public_key=connection_key("x", deployment.public("stranger")["stranger"]))
            )

        # A node that is killed with all that belongs to it, and started again, answers.
        for process in _of(deployment.folder / "north"):
            process.kill()
        north.kill()
        north = deployment.node("north")
        third = {reply.node: reply for reply in transport.exchange({"north": b"three"}, seconds=120.0)}
        assert (third["north"].data, third["north"].error) == (b"north:three", "")

        # So does everyone when it is the server that was killed.
        (link,) = [each for each in _of(deployment.folder / "link") if "superlink" in each.cmdline()]
        link.send_signal(signal.SIGKILL)
        fourth = {reply.node: reply for reply in transport.exchange({"north": b"4", "east": b"4"}, seconds=120.0)}
        assert {name: reply.data for name, reply in fourth.items()} == {"north": b"north:4", "east": b"east:4"}
        for process in (north, east):
            process.kill()
            process.wait()
    assert _until_none(deployment.folder) == []


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_who_has_no_key_takes_no_memory_and_keeps_no_node_out(deployment: Deployment) -> None:
    with serve(
        deployment.folder / "link", deployment.tls, deployment.public("north"), port=deployment.port, largest=20_000_000
    ) as transport:
        (link,) = [each for each in _of(deployment.folder / "link") if "superlink" in each.cmdline()]
        before = link.memory_info().rss
        trusting = ssl.create_default_context(cafile=str(deployment.tls.authority))

        def connected() -> ssl.SSLSocket:
            raw = socket.create_connection(("127.0.0.1", deployment.port), timeout=20)
            return trusting.wrap_socket(raw, server_hostname="127.0.0.1")

        for length in (b"content-length: 300000000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"):
            head = b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-type: application/protobuf\r\n" + length
            with connected() as stranger, suppress(OSError):
                stranger.sendall(head)
                for _ in range(300):
                    stranger.sendall(b"f4240\r\n" + bytes(1_000_000) + b"\r\n")
        with connected() as stranger, suppress(OSError):
            stranger.sendall(b"GET / HTTP/1.1\r\n")
            for number in range(2000):
                stranger.sendall(b"x%d: " % number + b"a" * 50_000 + b"\r\n")
        assert link.memory_info().rss - before < 50_000_000
        held = [socket.create_connection(("127.0.0.1", deployment.port), timeout=20) for _ in range(300)]
        deployment.node("north")
        large = os.urandom(12_000_000)
        (reply,) = transport.exchange({"north": large}, seconds=120.0)
        assert (reply.data, reply.error) == (b"north:" + large, "")
        for one in held:
            one.close()


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_killed_coordinator_leaves_nothing_behind_and_another_takes_its_place(deployment: Deployment) -> None:
    for _ in range(2):
        coordinator = deployment.coordinator()
        while "up" not in deployment.said(coordinator):
            assert coordinator.poll() is None, deployment.said(coordinator)
            time.sleep(0.2)
        assert len([each for each in _of(deployment.folder / "link") if "superlink" in each.cmdline()]) == 1
        coordinator.kill()
        coordinator.wait()
    assert _until_none(deployment.folder) == []


def test_a_folder_serves_once_and_two_nodes_have_two_keys(tmp_path: Path) -> None:
    from worldloom.core.files import exclusive_lock

    tls, public = make_tls(tmp_path), make_node_keys(tmp_path, "north").read_text()
    with exclusive_lock(tmp_path / "home" / ".lock", ConfigError("")):
        with pytest.raises(ConfigError, match="another process serves"), serve(tmp_path / "home", tls, {}):
            pass
        with pytest.raises(ConfigError, match="another process runs a node"):
            join(bytes, home=tmp_path / "home", server="x:1", authority=tls.authority, secret=tls.secret)
    with pytest.raises(DataError, match="the same public key"), serve(tmp_path, tls, {"a": public, "b": public}):
        pass
    with pytest.raises(StorageError, match="does not exist"):
        join(bytes, home=tmp_path, server="x:1", authority=tls.authority, secret=tmp_path / "none")


def test_a_port_that_is_taken_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worldloom.federation.transport.flower._STOP_SECONDS", 0.3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(ConfigError, match="choose another host or port"),
            serve(tmp_path / "link", make_tls(tmp_path), {}, port=taken.getsockname()[1]),
        ):
            pass
