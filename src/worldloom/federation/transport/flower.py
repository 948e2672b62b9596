"""Flower as the transport of a real deployment: `serve` for a coordinator, `join` for a node.

Flower's SuperLink and SuperNode transmit the messages over TLS; nodes authenticate with their keys. Normally a Flower
coordinator sends its nodes the program that they run. Here no program is sent, and a received program is never run: a
node passes the bytes of each message to a handler in its own process, and the coordinator keeps its state in its own
process. `flower_internals` lists the parts of Flower outside its public API that are used.
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
from typing import Any, Protocol, runtime_checkable

from worldloom.core.errors import ConfigError, DataError, TrainingError
from worldloom.core.extras import missing_extra
from worldloom.core.files import check_private, exclusive_lock, storage_errors
from worldloom.core.signing import write_key
from worldloom.federation.transport import flower_process as child
from worldloom.federation.transport.keys import Tls, connection_key
from worldloom.federation.transport.messages import Handler, Reply

for _talkative in ("flwr", "httpx", "alembic"):  # one of these packages logs during its import
    logging.getLogger(_talkative).setLevel(logging.WARNING)

try:
    import httpx
    from flwr.app import Array, ArrayRecord, Error, Message, MessageType, RecordDict

    from worldloom.federation.transport import flower_internals as flower
except ImportError as error:
    raise ConfigError(missing_extra("weave", error)) from error

_log = logging.getLogger(__name__)
# A library must not print: Flower's log messages go to the handlers of this process.
for _handler in logging.getLogger("flwr").handlers[:]:
    logging.getLogger("flwr").removeHandler(_handler)

_RECORD = "worldloom"
_POLL_SECONDS = 0.2
_START_SECONDS = 120.0  # two busy cores take half a minute
_STOP_SECONDS = 10.0
_STEADY_SECONDS = 30.0  # a process that has run for this long has started successfully
_RESTARTS = 3  # of a SuperLink that never ran for that long
_BACKOFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0)
_LONGEST_ERROR = 1000  # characters
_MOST_LOST = 10  # times that a message is sent again in one exchange, because its node lost it
_AWAY_SECONDS = 20  # a SuperNode without its SuperLink ends after this time, and is restarted
# Errors for messages that a node's process lost when it ended: the message is sent again when the node is back.
_LOST = (
    flower.ErrorCode.MESSAGE_UNAVAILABLE, flower.ErrorCode.REPLY_MESSAGE_UNAVAILABLE, flower.ErrorCode.NODE_UNAVAILABLE,
    flower.ErrorCode.CLIENT_APP_CRASHED,
)  # fmt: skip
# Flower requires a program for a run. This program only raises an error if it is run.
_PROGRAM: dict[str, bytes | Path] = {
    "pyproject.toml": b"""\
[project]
name = "worldloom-weave"
version = "1.0.0"
license = "Apache-2.0"

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
    """The methods of a grid (Flower's interface for sending messages to nodes) that this module uses."""

    def get_nodes(self) -> Iterable[Any]:
        """Return the connected nodes."""
        ...

    def push_messages(self, messages: Sequence[Message]) -> Iterable[str | None]:
        """Send messages; return their ids, or None for a message that was not accepted."""
        ...

    def pull_messages(self, message_ids: Sequence[str]) -> Iterable[Message]:
        """Return the answers that have arrived to these messages."""
        ...


class FlowerTransport:
    """A transport that sends messages through a Flower grid.

    `names` maps the nodes' public keys (PEM) to their names. `grid` returns the current grid. After a restart of the
    server it returns a new grid, and all unanswered messages are sent again.
    """

    def __init__(self, names: Mapping[bytes, str], grid: Callable[[], Nodes]) -> None:
        self._names, self._grid = dict(names), grid

    def nodes(self) -> tuple[str, ...]:
        """Return the names of the nodes that may connect."""
        return tuple(sorted(self._names.values()))

    def exchange(self, requests: Mapping[str, bytes], *, seconds: float, away: Collection[str] = ()) -> Iterator[Reply]:
        """Send each node its message once it is connected, and again after it reconnects; see `Transport`."""
        deadline = time.monotonic() + seconds
        waiting = {node: data for node, data in requests.items() if node in self._names.values()}
        for node in sorted(set(requests) - set(waiting)):
            yield Reply(node=node, data=None, error="no registered node has this name")
        losses = dict.fromkeys(waiting, 0)  # node -> how often it lost its message
        since: dict[str, str] = {}  # node -> start of the connection on which its message was sent
        looking: dict[str, threading.Event] = {}  # node -> the event that ends the wait for its answer
        found: Queue[tuple[str, Message | Exception]] = Queue()
        grid, trouble = None, ""
        online: dict[str, Any] | None = None
        # With many nodes, each node is polled less often.
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
                    trouble = f"; the last error was {type(error).__name__}: {error}"
                    _log.warning("Flower's server does not answer: %s", error)
                for node, message in _all_of(found, pause):
                    if node not in waiting:
                        continue
                    if isinstance(message, Exception):
                        trouble = f"; the last error was {type(message).__name__}: {message}"[:_LONGEST_ERROR]
                        continue
                    if message.has_error() and message.error.code in _LOST and losses[node] < _MOST_LOST:
                        losses[node] += 1
                        _log.warning("%s lost a message (%s); it is sent again", node, _reason(message))
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
                why = "not connected; the node has left, so the round does not wait for it"
            yield Reply(node=node, data=None, error=why + trouble)

    def _online(self, grid: Nodes) -> dict[str, Any]:
        return {self._names[info.public_key]: info for info in grid.get_nodes() if info.public_key in self._names}


def _await(
    grid: Nodes,
    number: str,
    node: str,
    found: "Queue[tuple[str, Message | Exception]]",
    pause: float,
) -> threading.Event:
    """Poll for the answer to a message in a separate thread; return the event that ends the thread.

    If a node dies while it sends an answer, Flower waits a long time for the rest of it. If one thread polled for all
    nodes, this would delay the answers of the others.
    """

    ended = threading.Event()

    def look() -> None:
        while not ended.wait(pause):
            try:
                messages = list(grid.pull_messages([number]))
            except Exception as error:  # any error: the exchange reports it if no answer arrives
                found.put((node, error))
                continue
            if messages:
                found.put((node, messages[0]))
                return

    threading.Thread(target=look, name=f"worldloom-{node}", daemon=True).start()
    return ended


def _all_of(found: "Queue[tuple[str, Message | Exception]]", seconds: float) -> "list[tuple[str, Message | Exception]]":
    """Wait for an item in a queue, and return all items in it; an empty list if none arrives in time."""
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
    largest: int = 2**30,
) -> Iterator[FlowerTransport]:
    """Run a SuperLink (Flower's server process) while the `with` block runs, and yield a transport that uses it.

    Nothing in `home` is needed for the next start, because the state is in the coordinator's ledger. If the SuperLink
    ends, it is restarted at the next exchange. It ends when this process ends or is killed.

    Args:
        home: a folder that only this process uses.
        tls: see `make_tls`; if `host` means all interfaces, the certificate must include 127.0.0.1.
        nodes: the nodes' names and public keys in OpenSSH's format. No other node can connect.
        host: the address to listen on.
        port: the port to listen on.
        largest: the size of the largest message in bytes; it limits the memory that a request to the SuperLink uses.

    Raises:
        ConfigError: another process serves from this folder, or the SuperLink does not start.
        DataError: a public key is invalid, or two nodes have the same key.
    """
    names: dict[bytes, str] = {}
    for name, text in nodes.items():
        public = connection_key(name, text)
        if public in names:
            raise DataError(f"{name} and {names[public]} have the same public key; give each node its own")
        names[public] = name
    home = Path(home)
    check_private(tls.secret)
    busy = ConfigError(f"another process serves from {home}; stop it, or choose another folder")
    with exclusive_lock(home / ".lock", busy):
        limits = child.Limits(keys=tuple(public.decode() for public in names), message=largest)
        link = _Link(home, tls, names, host, port, limits)
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
    """Run a SuperNode (Flower's client process), and answer the coordinator's messages here until `stop` is set.

    If the SuperNode ends, it is restarted with growing delays, because the coordinator may be down for a while. It ends
    when this process ends or is killed. If the handler raises, the coordinator receives only the exception's type; the
    details are logged here, because they may contain private data. A process can be either a node or a coordinator,
    because Flower stores the role per process.

    Args:
        handler: answers a message; it must check the sender itself.
        home: a folder that only this process uses.
        server: the coordinator's address, `host:port`.
        authority: the certificate of the coordinator's authority; see `make_tls`.
        secret: this node's secret key; see `make_node_keys`.
        timeout_seconds: how long to try to reach the coordinator.
        stop: ends the node when set, after the current message.

    Raises:
        ConfigError: another process uses the folder, or for `timeout_seconds` the coordinator could not be reached or
            refused the node's key.
    """
    home, stop = Path(home), stop or threading.Event()
    busy = ConfigError(f"another process runs a node in {home}; stop it, or choose another folder")
    for path in (Path(authority), Path(secret)):
        with storage_errors(path):
            path.read_bytes()
    check_private(secret)
    with exclusive_lock(home / ".lock", busy):
        node = _Node(home, server, Path(authority), Path(secret))
        try:
            node.run(handler, timeout_seconds, stop)
        finally:
            node.stop()


class _Process:
    """A Flower process in its own process group; it ends when this process ends."""

    def __init__(self, which: str, arguments: Sequence[str], home: Path, **variables: str) -> None:
        with storage_errors(home):
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
        with storage_errors(self._log), self._log.open("wb") as log:
            self._process = subprocess.Popen(
                # -P: do not import modules from the script's folder.
                [sys.executable, "-P", str(Path(child.__file__)), which, str(os.getpid()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                umask=0o077,  # logs and the database of the process are its owner's
            )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def last_output(self) -> str:
        """Return the end of the process's output, on one line."""
        with suppress(OSError):
            text = re.sub(r"\x1b\[[0-9;]*m", "", self._log.read_bytes()[-4000:].decode(errors="replace"))
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return " | ".join(lines[-8:])
        return ""

    def stop(self) -> None:
        """End the process and its children."""
        if not self.ended:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class _Link:
    """A SuperLink, its registered nodes, and the single Flower run in which they receive messages."""

    def __init__(
        self, home: Path, tls: Tls, names: Mapping[bytes, str], host: str, port: int, limits: child.Limits
    ) -> None:
        self._home, self._tls, self._names, self._host, self._port = home, tls, names, host, port
        self._limits = limits
        self._here = f"{'127.0.0.1' if host in ('0.0.0.0', '') else '[::1]' if host == '::' else host}:{port}"
        self._process: _Process | None = None
        self._grid: _Grid | None = None
        self._heart: flower.HeartbeatSender | None = None
        self._short = 0

    def grid(self) -> "_Grid":
        """Return the grid; restart the SuperLink if it has ended.

        Raises:
            TrainingError: the SuperLink ends repeatedly.
        """
        if self._process is None or self._process.ended or self._grid is None:
            words = self._process.last_output() if self._process else ""
            steady = self._process is not None and self._process.seconds >= _STEADY_SECONDS
            self._short = 0 if steady else self._short + 1
            if self._short > _RESTARTS:
                raise TrainingError(
                    f"Flower's SuperLink ends repeatedly; correct the cause that its output shows, then start the "
                    f"coordinator again. Its output: {words}"
                )
            _log.warning("Flower's SuperLink ended and is restarted; its output: %s", words)
            self.stop()
            try:
                self.start()
            except ConfigError as error:
                raise TrainingError(str(error)) from None
        if self._grid is None:
            raise TrainingError("Flower's SuperLink is not running; start the coordinator again")
        return self._grid

    def start(self) -> None:
        """Start the SuperLink, register the nodes, and begin a run.

        Raises:
            ConfigError: the SuperLink does not start.
        """
        for path in self._home.glob("superlink.db*"):
            path.unlink()
        shutil.rmtree(self._home / "flwr", ignore_errors=True)
        _await_port(self._host, self._port)
        secret, limits = secrets.token_hex(32), self._home / "limits.json"
        with storage_errors(limits):
            limits.parent.mkdir(parents=True, exist_ok=True)
            self._limits.save(limits)
        self._process = _Process(
            "superlink",
            [
                *("--host", self._host, "--port", str(self._port), "--isolation", "process"),
                *("--ssl-certfile", str(self._tls.certificate), "--ssl-keyfile", str(self._tls.secret)),
                *("--ssl-ca-certfile", str(self._tls.authority), "--enable-supernode-auth"),
                *("--database", str(self._home / "superlink.db"), "--disable-runtime-dependency-installation"),
            ],
            self._home,
            **{child.PASS_VARIABLE: secret, child.LIMITS_VARIABLE: str(limits.absolute())},
        )
        with storage_errors(self._tls.authority):
            authority = self._tls.authority.read_bytes()
        opening = _Pass(secret)
        try:
            with _client(flower.ControlHttpClient, self._here, authority, opening) as control:
                self._wait(control)
                for public, name in self._names.items():
                    control.RegisterNode(flower.RegisterNodeRequest(public_key=public, name=name))
                control.StartRun(flower.StartRunRequest(fab=flower.Fab(content=_program())))
            with _client(flower.RuntimeHttpClient, self._here, authority, opening) as runtime:
                wanted = flower.AcquireTaskRequest(supported_task_types=[flower.TaskType.SERVER_APP])
                found = runtime.AcquireTask(wanted)
            if not found.token:
                raise ConfigError("Flower's SuperLink did not start a run; start the coordinator again")
            self._grid = _Grid(self._here, authority, found.token, opening)
            self._heart = _heartbeat(self._grid.client)
            task = self._grid.client.PullTaskInput(flower.PullTaskInputRequest())
            # Flower reads the run of every message of this process from here.
            flower.TaskIdentity.task_id, flower.TaskIdentity.run_id = task.task_id, task.run.run_id
            flower.TaskIdentity.node_id = task.context.node_id
            self._grid.set_run(flower.run_from_proto(task.run))
        except httpx.HTTPError as error:
            words = self._process.last_output()
            self.stop()
            raise ConfigError(
                f"Flower's SuperLink at {self._here} does not answer ({error}); start the coordinator "
                f"again. Its output: {words}"
            ) from None
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
                    self._grid.client.PushTaskOutput(
                        flower.PushTaskOutputRequest(sub_status=flower.SubStatus.COMPLETED)
                    )
            self._grid.close()
        if self._process is not None:
            self._process.stop()
        self._process = self._grid = self._heart = None

    def _wait(self, control: flower.ControlHttpClient) -> None:
        process = self._process
        assert process is not None
        while True:
            try:
                control.ListNodes(flower.ListNodesRequest())
            except httpx.TransportError as error:
                # An invalid certificate does not become valid by waiting.
                if process.ended or process.seconds > _START_SECONDS or "CERTIFICATE" in str(error):
                    words = process.last_output()
                    raise ConfigError(
                        f"Flower's SuperLink does not start at {self._here} ({error}); check "
                        f"the address and the TLS files. Its output: {words}"
                    ) from None
                time.sleep(_POLL_SECONDS)
            else:
                return


class _Grid(flower.HttpGrid):
    """The grid of a run; its client sends the secret that the gate requires."""

    def __init__(self, address: str, authority: bytes, token: str, opening: "_Pass") -> None:
        super().__init__(address, False, authority, token=token)
        pass_on = flower.RuntimeTokenHttpInterceptor(token), opening
        self.client = self._client = _client(flower.RuntimeHttpClient, address, authority, *pass_on)


class _Pass:
    """Adds the secret that the gate of `flower_process` requires to each request."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        context.request.headers[child.PASS] = self._secret
        return call_next(context)


class _Node:
    """A SuperNode, and the client that receives its messages."""

    def __init__(self, home: Path, server: str, authority: Path, secret: Path) -> None:
        self._home, self._server, self._authority, self._secret = home, server, authority, secret
        self._process: _Process | None = None
        self._address = ""
        self._shared = b""

    def run(self, handler: Handler, timeout: float, stop: threading.Event) -> None:
        """Answer messages until `stop` is set; see `join`."""
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
            words = process.last_output()
            failing = process.began if failing is None else failing
            if time.monotonic() - failing > timeout:
                raise ConfigError(
                    f"no connection to the coordinator at {self._server} for {timeout:g} s; check this address, "
                    f"and that this node's key is in the constitution. Flower's output: {words}"
                )
            _log.warning("Flower's SuperNode ended and is restarted; its output: %s", words)
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
        write_key(shared, self._shared)
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
        signing = flower.SuperExecAuthHttpInterceptor(
            master_secret=self._shared, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
        )
        wanted = flower.AcquireTaskRequest(supported_task_types=[flower.TaskType.CLIENT_APP])
        answered = False
        with _client(flower.RuntimeHttpClient, self._address, None, signing) as client:
            while not stop.is_set() and not process.ended:
                try:
                    found = client.AcquireTask(wanted)
                except httpx.HTTPError:  # the SuperNode is still starting, or has ended
                    stop.wait(_POLL_SECONDS)
                    continue
                if not found.token:
                    stop.wait(_POLL_SECONDS)
                    continue
                answered = True
                try:
                    token = flower.RuntimeTokenHttpInterceptor(found.token)
                    with _client(flower.RuntimeHttpClient, self._address, None, token) as task:
                        _answer(task, handler)
                except (httpx.HTTPError, RuntimeError) as error:
                    _log.warning("a message or its answer was lost: %s: %s", type(error).__name__, error)
        return answered or process.seconds > _AWAY_SECONDS + _STEADY_SECONDS


def _client(kind: Any, address: str, authority: bytes | None, *interceptors: Any) -> Any:
    """Return a Flower client; without an authority's certificate the connection is not encrypted."""
    version = flower.RuntimeVersionHttpInterceptor(component_name="worldloom")
    return kind.from_server_address(address, authority is None, authority, [version, *interceptors])


def _answer(client: flower.RuntimeHttpClient, handler: Handler) -> None:
    """Receive a message and send the answer. The program in the message is ignored."""
    heart = _heartbeat(client)
    status, details = flower.SubStatus.COMPLETED, ""
    try:
        message, context, _, _ = flower.pull_task_input(client)
        try:
            reply = Message(_carry(handler(_carried(message))), reply_to=message)
        except Exception as error:
            _log.exception("a message could not be answered")
            details = f"{type(error).__name__}; see the node's log for details"
            status = flower.SubStatus.FAILED
            reply = Message(Error(code=flower.ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=details), reply_to=message)
        flower.push_message(client, reply, context)
        client.PushTaskOutput(flower.PushTaskOutputRequest(sub_status=status, details=details))
    finally:
        heart.stop()


def _heartbeat(client: flower.RuntimeHttpClient) -> flower.HeartbeatSender:
    def beat() -> bool:
        try:
            return bool(client.SendTaskHeartbeat(flower.SendTaskHeartbeatRequest()).success)
        except httpx.HTTPError:
            return False

    heart = flower.HeartbeatSender(beat)
    heart.start()
    return heart


def _ask(data: bytes, node: int, seconds: float) -> Message:
    return Message(_carry(data), node, MessageType.QUERY, ttl=seconds)


def _carry(data: bytes) -> RecordDict:
    # Flower splits only arrays into chunks of some megabytes, not other records.
    return RecordDict({_RECORD: ArrayRecord({"data": Array("uint8", (len(data),), "worldloom.bytes", data)})})


def _carried(message: Message) -> bytes:
    try:
        record = message.content[_RECORD]
        data = record["data"].data if isinstance(record, ArrayRecord) else None
    except KeyError:
        data = None
    if not isinstance(data, bytes):
        raise DataError("a Flower message has no content from worldloom; run the same version on both sides")
    return data


def _reply(node: str, message: Message) -> Reply:
    if message.has_error():
        return Reply(node=node, data=None, error=_reason(message))
    try:
        return Reply(node=node, data=_carried(message))
    except DataError as error:
        return Reply(node=node, data=None, error=str(error))


def _reason(message: Message) -> str:
    """Return the error in a message, which is from a node; only its beginning, because nodes choose its length."""
    return (message.error.reason or f"Flower's error {message.error.code}")[:_LONGEST_ERROR]


def _program() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower uses a deprecated name of pathspec
        return flower.build_fab_from_files(_PROGRAM)[0]


def _await_port(host: str, port: int) -> None:
    """Wait until the SuperLink of a killed coordinator has freed the port."""
    begun = time.monotonic()
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                found.bind((host, port))
            except OSError as error:
                if time.monotonic() - begun > _STOP_SECONDS:
                    raise ConfigError(
                        f"cannot listen on {host}:{port} ({error}); choose another host or port"
                    ) from None
            else:
                return
        time.sleep(_POLL_SECONDS)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
