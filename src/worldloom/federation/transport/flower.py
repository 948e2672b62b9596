"""Flower as the transport of a real deployment: `serve` for a coordinator, `join` for a node.

Flower's SuperLink and SuperNode carry the messages, over TLS, between processes that are known by their keys. What they
carry is bytes, and what is done with them is decided here: as Flower is used elsewhere, a coordinator sends its nodes
the program that they run. Here no program is sent, and none that is sent is run. A node hands each message to the
handler that its own process was started with, and a coordinator keeps its state in its own process. So the modules of
Flower that hand out tasks are used directly, and its version is pinned exactly.
"""

import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from typing import Protocol, runtime_checkable

from worldloom.core.errors import ConfigError, DataError, TrainingError
from worldloom.core.files import exclusive_lock, storage_errors
from worldloom.federation.transport import flower_process as child
from worldloom.federation.transport.keys import Tls
from worldloom.federation.transport.messages import Handler, Reply

for _talkative in ("flwr", "httpx", "alembic"):  # one of them talks while it is imported
    logging.getLogger(_talkative).setLevel(logging.WARNING)

try:
    import httpx
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.app import Array, ArrayRecord, Error, Message, MessageType, RecordDict
    from flwr.cli.build import build_fab_from_files
    from flwr.common.constant import ErrorCode, SubStatus
    from flwr.common.serde import run_from_proto
    from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
    from flwr.proto.fab_pb2 import Fab
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.proto.runtime_pb2 import (
        AcquireTaskRequest,
        PullTaskInputRequest,
        PushTaskOutputRequest,
        SendTaskHeartbeatRequest,
    )
    from flwr.supercore.constant import TaskType
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.heartbeat import HeartbeatSender
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.logger import console_handler
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid import HttpGrid
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message
except ImportError as error:
    raise ConfigError(f"Flower is needed here ({error}); run: pip install 'worldloom[weave]'") from error

_log = logging.getLogger(__name__)
# A library does not print; what Flower has to say goes where this process's logging goes.
logging.getLogger("flwr").removeHandler(console_handler)

_RECORD = "worldloom"
_POLL_SECONDS = 0.2
_START_SECONDS = 120.0  # two cores that are busy with other things take half a minute
_STOP_SECONDS = 10.0
_STEADY_SECONDS = 30.0  # what has been up for so long was started well
_RESTARTS = 3  # of a SuperLink that was never up for so long
_BACKOFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0)
_AWAY_SECONDS = 20  # after so long without its SuperLink, a SuperNode ends, and is started again
# What a node's process lost when it ended: the node is asked again when it is back.
_LOST = (
    ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
)  # fmt: skip
# Flower runs nothing without a program. This one says so where somebody runs it all the same.
_PROGRAM: dict[str, bytes | Path] = {
    "pyproject.toml": b"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "worldloom-weave"
version = "1.0.0"
description = "Nothing runs from here."
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "worldloom"

[tool.flwr.app.components]
serverapp = "nothing:app"
clientapp = "nothing:app"
""",
    "nothing.py": b'raise RuntimeError("take part with: worldloom weave node")\n',
}


@runtime_checkable
class Nodes(Protocol):
    """What is used of a Flower grid."""

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes that are there."""
        ...

    def push_messages(self, messages: Sequence[Message]) -> Iterable[str | None]:
        """Send messages; return their ids, None for one that was not taken."""
        ...

    def pull_messages(self, message_ids: Sequence[str]) -> Iterable[Message]:
        """Return the answers to messages that are there."""
        ...


class FlowerTransport:
    """Asks nodes through a Flower grid.

    `names` are those of the nodes, by their public keys (PEM). `grid` returns the grid as it stands: another one than
    before where the server had to be started again, and then everything that is waited for is asked again.
    """

    def __init__(self, names: Mapping[bytes, str], grid: Callable[[], Nodes]) -> None:
        self._names, self._grid = dict(names), grid

    def nodes(self) -> tuple[str, ...]:
        """Return the names of the nodes that may connect; `present` tells who is there."""
        return tuple(sorted(self._names.values()))

    def present(self) -> tuple[str, ...]:
        """Return the names of the nodes that are connected now."""
        return tuple(sorted(self._online(self._grid())))

    def exchange(self, requests: Mapping[str, bytes], *, seconds: float, away: Collection[str] = ()) -> Iterator[Reply]:
        """Ask each node as soon as it is connected, and again after it connected anew; see `Transport`."""
        deadline = time.monotonic() + seconds
        waiting = {node: data for node, data in requests.items() if node in self._names.values()}
        for node in sorted(set(requests) - set(waiting)):
            yield Reply(node=node, data=None, error="no node of that name may connect")
        since: dict[str, str] = {}  # a node -> when the connection began on which it was asked
        looking: dict[str, threading.Event] = {}  # a node -> what ends looking for its answer
        found: Queue[tuple[str, Message | Exception]] = Queue()
        grid, trouble = None, ""
        online: dict[str, NodeInfo] | None = None
        # With many nodes each is looked for less often.
        pause = _POLL_SECONDS * max(1.0, len(waiting) / 10)
        try:
            while waiting:
                try:
                    now = self._grid()
                    if now is not grid:
                        grid, since = now, {}
                    online = self._online(grid)
                    for node, data in waiting.items():
                        if node in online and since.get(node) != online[node].last_activated_at:
                            remaining = max(1.0, deadline - time.monotonic())
                            number = next(iter(grid.push_messages([_ask(data, online[node].node_id, remaining)])), None)
                            if number is not None:
                                since[node] = online[node].last_activated_at
                                looking.setdefault(node, threading.Event()).set()
                                looking[node] = _await(grid, number, node, found, pause)
                    trouble = ""
                except (httpx.HTTPError, TrainingError) as error:
                    trouble = f"; the last trouble was {type(error).__name__}: {error}"
                    _log.warning("Flower's server does not answer: %s", error)
                for node, message in _all_of(found, pause):
                    if node not in waiting:
                        continue
                    if isinstance(message, Exception):
                        trouble = f"; the last trouble was {type(message).__name__}: {message}"
                        continue
                    if message.has_error() and message.error.code in _LOST:
                        _log.warning("%s lost a message (%s); it is asked again", node, message.error.reason)
                        since.pop(node, None)
                        continue
                    del waiting[node]
                    yield _reply(node, message)
                gone = online is not None and waiting.keys() <= {*away} - online.keys()
                if gone or time.monotonic() >= deadline:
                    break
        finally:
            for ended in looking.values():
                ended.set()
        for node in sorted(waiting):
            why = f"no answer within {seconds:g} s" if node in since else f"not connected within {seconds:g} s"
            if node in away and time.monotonic() < deadline:
                why = "not connected, and not waited for"
            yield Reply(node=node, data=None, error=why + trouble)

    def _online(self, grid: Nodes) -> dict[str, NodeInfo]:
        return {self._names[info.public_key]: info for info in grid.get_nodes() if info.public_key in self._names}


def _await(
    grid: Nodes,
    number: str,
    node: str,
    found: "Queue[tuple[str, Message | Exception]]",
    pause: float,
) -> threading.Event:
    """Look for the answer to a message, in a thread of its own; return what ends it.

    Flower waits long for the rest of an answer of which a node that died sent a part: meanwhile others are heard.
    """

    ended = threading.Event()

    def look() -> None:
        while not ended.wait(pause):
            try:
                messages = list(grid.pull_messages([number]))
            except Exception as error:  # whatever it is, the exchange tells it where no answer comes
                found.put((node, error))
                continue
            if messages:
                found.put((node, messages[0]))
                return

    threading.Thread(target=look, name=f"worldloom-{node}", daemon=True).start()
    return ended


def _all_of(found: "Queue[tuple[str, Message | Exception]]", seconds: float) -> "list[tuple[str, Message | Exception]]":
    """Return what is in a queue, as soon as something is."""
    there = []
    with suppress(Empty):
        there.append(found.get(timeout=seconds))
        while True:
            there.append(found.get_nowait())
    return there


@contextmanager
def serve(
    home: Path | str,
    tls: Tls,
    nodes: Mapping[str, str],
    *,
    host: str = "127.0.0.1",
    port: int = 9443,
) -> Iterator[FlowerTransport]:
    """Run a SuperLink while the block runs, and give the transport over it.

    Nothing in `home` is needed by the next start: what counts is the coordinator's own ledger. A SuperLink that ends
    is started again at the next exchange; it ends with this process, however that one ends.

    Args:
        home: a folder of this process's own.
        tls: see `make_tls`; the certificate must be for 127.0.0.1 too, where `host` is an address of all interfaces.
        nodes: the public key of each node by its name, as text in OpenSSH's format. No other node can connect.
        host: the address to listen at.
        port: the port to listen at.

    Raises:
        ConfigError: another process serves from this folder, or the SuperLink does not start.
        DataError: a public key is none, or two nodes have the same.
    """
    names: dict[bytes, str] = {}
    for name, text in nodes.items():
        public = _public(name, text)
        if public in names:
            raise DataError(f"{name} and {names[public]} have the same public key; each node needs its own")
        names[public] = name
    home = Path(home)
    busy = ConfigError(f"another process serves from {home}; stop it, or choose another folder")
    with exclusive_lock(home / ".lock", busy):
        link = _Link(home, tls, names, host, port)
        try:
            link.start()
            yield FlowerTransport(names, link.grid)
        finally:
            link.stop()


def join(
    handler: Handler,
    *,
    home: Path | str,
    server: str,
    authority: Path | str,
    secret: Path | str,
    timeout_seconds: float = 600.0,
    stop: threading.Event | None = None,
) -> None:
    """Run a SuperNode, and answer the coordinator's messages in this process until `stop` is set.

    A SuperNode that ends is started again, with growing pauses: the coordinator may be away for a while. It ends with
    this process, however that one ends. Of what a handler raises, the coordinator is told the kind; the rest is logged
    here, for it may speak of what is only this owner's. A process is a node or a coordinator, not both: Flower keeps
    for a whole process what it is.

    Args:
        handler: what answers a message; its answers are only as trustworthy as it checks who asks.
        home: a folder of this process's own.
        server: the coordinator's address, `host:port`.
        authority: the certificate of the coordinator's authority; see `make_tls`.
        secret: this node's secret key; see `make_node_keys`.
        timeout_seconds: how long to try to reach the coordinator.
        stop: ends the node when set, after the message in hand.

    Raises:
        ConfigError: another process uses the folder, or the coordinator could not be reached, or refused the node's
            key, for that long.
    """
    home, stop = Path(home), stop or threading.Event()
    busy = ConfigError(f"another process is a node with {home}; stop it, or choose another folder")
    for path in (Path(authority), Path(secret)):
        with storage_errors(path):
            path.read_bytes()
    with exclusive_lock(home / ".lock", busy):
        node = _Node(home, server, Path(authority), Path(secret))
        try:
            node.run(handler, timeout_seconds, stop)
        finally:
            node.stop()


class _Process:
    """A process of Flower in a group of its own, which ends with this one."""

    def __init__(self, which: str, arguments: Sequence[str], home: Path, **variables: str) -> None:
        (home / "flwr").mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
        environment = kept | {
            "FLWR_HOME": str((home / "flwr").absolute()),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_LOG_LEVEL": "WARNING",
            **variables,
        }
        self._log, self.which = home / f"{which}.log", which
        self.began = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                # -P: the folder of the file is no place to import from.
                [sys.executable, "-P", str(Path(child.__file__)), which, str(os.getpid()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def last_words(self) -> str:
        """Return the end of what it wrote, on one line."""
        with suppress(OSError):
            text = re.sub(r"\x1b\[[0-9;]*m", "", self._log.read_bytes()[-4000:].decode(errors="replace"))
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return " | ".join(lines[-8:])
        return ""

    def stop(self) -> None:
        """End it and everything that it started."""
        if not self.ended:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class _Link:
    """A SuperLink, the nodes that it knows, and the one run in which they are asked."""

    def __init__(self, home: Path, tls: Tls, names: Mapping[bytes, str], host: str, port: int) -> None:
        self._home, self._tls, self._names, self._host, self._port = home, tls, names, host, port
        self._here = f"{'127.0.0.1' if host in ('0.0.0.0', '') else '[::1]' if host == '::' else host}:{port}"
        self._process: _Process | None = None
        self._grid: _Grid | None = None
        self._heart: HeartbeatSender | None = None
        self._short = 0

    def grid(self) -> "_Grid":
        """Return the grid; where the SuperLink has ended, start it again.

        Raises:
            TrainingError: it ends again and again.
        """
        if self._process is None or self._process.ended or self._grid is None:
            words = self._process.last_words() if self._process else ""
            steady = self._process is not None and self._process.seconds >= _STEADY_SECONDS
            self._short = 0 if steady else self._short + 1
            if self._short > _RESTARTS:
                raise TrainingError(f"Flower's SuperLink ends again and again ({words}); free its port and run again")
            _log.warning("Flower's SuperLink ended (%s); it is started again", words)
            self.stop()
            try:
                self.start()
            except ConfigError as error:
                raise TrainingError(str(error)) from None
        if self._grid is None:
            raise TrainingError("Flower's SuperLink is not up")
        return self._grid

    def start(self) -> None:
        """Start the SuperLink, tell it the nodes, and begin a run.

        Raises:
            ConfigError: it does not start.
        """
        for path in self._home.glob("superlink.db*"):
            path.unlink()
        shutil.rmtree(self._home / "flwr", ignore_errors=True)
        _await_port(self._host, self._port)
        secret = secrets.token_hex(32)
        self._process = _Process(
            "superlink",
            [
                *("--host", self._host, "--port", str(self._port), "--isolation", "process"),
                *("--ssl-certfile", str(self._tls.certificate), "--ssl-keyfile", str(self._tls.secret)),
                *("--ssl-ca-certfile", str(self._tls.authority), "--enable-supernode-auth"),
                *("--database", str(self._home / "superlink.db"), "--disable-runtime-dependency-installation"),
            ],
            self._home,
            **{child.PASS_VARIABLE: secret},
        )
        with storage_errors(self._tls.authority):
            authority = self._tls.authority.read_bytes()
        opening = _Pass(secret)
        try:
            with ControlHttpClient.from_server_address(
                self._here, False, authority, [RuntimeVersionHttpInterceptor(component_name="worldloom"), opening]
            ) as control:
                self._wait(control)
                for public, name in self._names.items():
                    control.RegisterNode(RegisterNodeRequest(public_key=public, name=name))
                control.StartRun(StartRunRequest(fab=Fab(content=_program())))
            runtime = RuntimeHttpClient.from_server_address(
                self._here, False, authority, [RuntimeVersionHttpInterceptor(component_name="worldloom"), opening]
            )
            with runtime:
                found = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if not found.token:
                raise ConfigError("Flower's SuperLink began no run")
            self._grid = _Grid(self._here, authority, found.token, opening)
            self._heart = _heartbeat(self._grid.client)
            task = self._grid.client.PullTaskInput(PullTaskInputRequest())
            # Messages that this process makes are of this run: Flower keeps that for the whole process.
            TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
            TaskIdentity.node_id = task.context.node_id
            self._grid.set_run(run_from_proto(task.run))
        except httpx.HTTPError as error:
            words = self._process.last_words()
            self.stop()
            raise ConfigError(f"Flower's SuperLink at {self._here} does not answer: {error}. {words}") from None
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the run and the SuperLink."""
        if self._heart is not None and self._heart.is_running:
            self._heart.stop()
        if self._grid is not None:
            if self._process is not None and not self._process.ended:
                with suppress(httpx.HTTPError):
                    self._grid.client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))
            self._grid.close()
        if self._process is not None:
            self._process.stop()
        self._process = self._grid = self._heart = None

    def _wait(self, control: ControlHttpClient) -> None:
        process = self._process
        assert process is not None
        while True:
            try:
                control.ListNodes(ListNodesRequest())
            except httpx.TransportError as error:
                # A certificate that does not fit is not mended by waiting.
                if process.ended or process.seconds > _START_SECONDS or "CERTIFICATE" in str(error):
                    words = process.last_words()
                    raise ConfigError(f"Flower's SuperLink does not start at {self._here} ({error}). {words}") from None
                time.sleep(_POLL_SECONDS)
            else:
                return


class _Grid(HttpGrid):
    """The grid of a run, which shows the pass."""

    def __init__(self, address: str, authority: bytes, token: str, opening: "_Pass") -> None:
        super().__init__(address, False, authority, token=token)
        self._client = RuntimeHttpClient.from_server_address(
            address,
            False,
            authority,
            [
                RuntimeVersionHttpInterceptor(component_name="worldloom"),
                RuntimeTokenHttpInterceptor(token),
                opening,
            ],
        )
        self.client = self._client


class _Pass:
    """Shows the pass that opens the gate of `flower_process`."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[child.PASS] = self._secret
        return call_next(context)


class _Node:
    """A SuperNode, and what takes the messages from it."""

    def __init__(self, home: Path, server: str, authority: Path, secret: Path) -> None:
        self._home, self._server, self._authority, self._secret = home, server, authority, secret
        self._process: _Process | None = None
        self._address = ""
        self._shared = b""

    def run(self, handler: Handler, patience: float, stop: threading.Event) -> None:
        """Answer messages until told to stop; see `join`."""
        failing: float | None = None
        tries = 0
        while not stop.is_set():
            self._start()
            process = self._process
            assert process is not None
            if self._answer_until_it_ends(process, handler, stop):
                failing, tries = time.monotonic(), 0
            if stop.is_set():
                return
            words = process.last_words()
            failing = process.began if failing is None else failing
            if time.monotonic() - failing > patience:
                raise ConfigError(
                    f"the coordinator at {self._server} was not reached, or does not know this node's key, for "
                    f"{patience:g} s; Flower says: {words}"
                )
            _log.warning("Flower's SuperNode ended; it is started again. It said: %s", words)
            stop.wait(_BACKOFF_SECONDS[min(tries, len(_BACKOFF_SECONDS) - 1)])
            tries += 1

    def stop(self) -> None:
        """End the SuperNode."""
        if self._process is not None:
            self._process.stop()
        self._process = None

    def _start(self) -> None:
        self.stop()
        self._shared = secrets.token_bytes(32)
        shared = self._home / "tasks.secret"
        with storage_errors(shared):
            shared.unlink(missing_ok=True)
            with os.fdopen(os.open(shared, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(self._shared)
        port = _free_port()
        self._address = f"127.0.0.1:{port}"
        self._process = _Process(
            "supernode",
            [
                *("--superlink", self._server, "--root-certificates", str(self._authority)),
                *("--auth-supernode-private-key", str(self._secret), "--max-wait-time", str(_AWAY_SECONDS)),
                *("--isolation", "process", "--host", "127.0.0.1", "--port", str(port)),
                *("--superexec-auth-secret-file", str(shared)),
            ],
            self._home,
        )

    def _answer_until_it_ends(self, process: _Process, handler: Handler, stop: threading.Event) -> bool:
        """Answer messages; return whether the SuperNode was connected."""
        signing = SuperExecAuthHttpInterceptor(
            master_secret=self._shared, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
        )
        version = RuntimeVersionHttpInterceptor(component_name="worldloom")
        wanted = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        answered = False
        with RuntimeHttpClient.from_server_address(self._address, True, None, [version, signing]) as client:
            while not stop.is_set() and not process.ended:
                try:
                    found = client.AcquireTask(wanted)
                except httpx.HTTPError:  # it is not up yet, or not any more
                    stop.wait(_POLL_SECONDS)
                    continue
                if not found.token:
                    stop.wait(_POLL_SECONDS)
                    continue
                answered = True
                try:
                    with RuntimeHttpClient.from_server_address(
                        self._address, True, None, [version, RuntimeTokenHttpInterceptor(found.token)]
                    ) as task:
                        _answer(task, handler)
                except (httpx.HTTPError, RuntimeError) as error:
                    _log.warning("a message or its answer was lost: %s: %s", type(error).__name__, error)
        return answered or process.seconds > _AWAY_SECONDS + _STEADY_SECONDS


def _answer(client: RuntimeHttpClient, handler: Handler) -> None:
    """Take a message, and give its answer back. The program that came with it is not looked at."""
    heart = _heartbeat(client)
    status, details = SubStatus.COMPLETED, ""
    try:
        message, context, _, _ = pull_task_input(client)
        try:
            reply = Message(_carry(handler(_carried(message))), reply_to=message)
        except Exception as error:
            _log.exception("a message could not be answered")
            details = f"{type(error).__name__}; the node's log says why"
            status = SubStatus.FAILED
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=details), reply_to=message)
        push_message(client, reply, context)
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
    finally:
        heart.stop()


def _heartbeat(client: RuntimeHttpClient) -> HeartbeatSender:
    def beat() -> bool:
        try:
            return bool(client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
        except httpx.HTTPError:
            return False

    heart = HeartbeatSender(beat)
    heart.start()
    return heart


def _ask(data: bytes, node: int, seconds: float) -> Message:
    return Message(_carry(data), node, MessageType.QUERY, ttl=seconds)


def _carry(data: bytes) -> RecordDict:
    # Flower cuts an array into pieces of some megabytes; a value of another kind travels in one.
    return RecordDict({_RECORD: ArrayRecord({"data": Array("uint8", (len(data),), "worldloom.bytes", data)})})


def _carried(message: Message) -> bytes:
    try:
        record = message.content[_RECORD]
        data = record["data"].data if isinstance(record, ArrayRecord) else None
    except KeyError:
        data = None
    if not isinstance(data, bytes):
        raise DataError("a message through Flower carries no bytes of worldloom; start both sides with this version")
    return data


def _reply(node: str, message: Message) -> Reply:
    if message.has_error():
        return Reply(node=node, data=None, error=message.error.reason or f"Flower's error {message.error.code}")
    try:
        return Reply(node=node, data=_carried(message))
    except DataError as error:
        return Reply(node=node, data=None, error=str(error))


def _program() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower asks pathspec for something under its old name
        return build_fab_from_files(_PROGRAM)[0]


def _public(name: str, text: str) -> bytes:
    try:
        key = load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DataError(f"the public key of {name} is none ({error}); give the text of its .ssh.pub file") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise DataError(f"the public key of {name} is of another kind; expected ECDSA on P-384, as weave keys makes it")
    return public_key_to_bytes(key)


def _await_port(host: str, port: int) -> None:
    """Wait for a SuperLink whose coordinator was killed to let go of the port."""
    begun = time.monotonic()
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                found.bind((host, port))
            except OSError as error:
                if time.monotonic() - begun > _STOP_SECONDS:
                    raise ConfigError(f"cannot listen at {host}:{port} ({error}); choose another port") from None
            else:
                return
        time.sleep(_POLL_SECONDS)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
