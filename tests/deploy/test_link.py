"""The wire format, both ends of a link, a plant as an environment; nothing depends on how fast the machine is."""

import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from line_plant import ACTION, OBSERVATION, Line, serve

from worldloom.agents import RandomAgent
from worldloom.core.errors import ConfigError, DataError, EnvironmentFailure
from worldloom.data import collect
from worldloom.deploy import SocketLink, wire
from worldloom.deploy.link import CallbackLink, PlantReading, greeting
from worldloom.deploy.link_env import LinkEnv
from worldloom.deploy.plant import PlantServer
from worldloom.deploy.wire import Address, Connection, LinkError, WireMessage, decode, encode
from worldloom.evaluation import evaluate, gym_protocol

PREFIX = struct.Struct("!4sHHII")
ARRAYS = st.sampled_from([np.uint8, np.float32]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)
FIELDS = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name not in ("type", "arrays")),
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False),
    max_size=4,
)


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "it never came about"
        time.sleep(0.005)


# The wire


@given(st.text(max_size=8), FIELDS, st.dictionaries(st.text(max_size=8), ARRAYS, max_size=3))
def test_what_is_sent_is_what_comes(kind: str, fields: dict[str, Any], parts: dict[str, np.ndarray]) -> None:
    data = encode(WireMessage(type=kind, fields=fields, arrays=parts))
    magic, version, _, header, body = PREFIX.unpack(data[: PREFIX.size])
    assert (magic, version, len(data)) == (b"WLNK", 1, PREFIX.size + header + body)
    came = decode(data[PREFIX.size : PREFIX.size + header], data[PREFIX.size + header :])
    assert (came.type, dict(came.fields), list(came.arrays)) == (kind, fields, list(parts))
    for name, array in parts.items():
        assert came.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(came.arrays[name], array)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.binary(max_size=40)
    | st.fixed_dictionaries({"type": JSON, "arrays": JSON}).map(lambda value: json.dumps(value).encode())
    | st.lists(st.tuples(JSON, st.sampled_from(["uint8", "float32", "object"]), JSON), max_size=3).map(
        lambda described: json.dumps({"type": "x", "arrays": described}).encode()
    ),
    st.binary(max_size=20),
)
def test_rubbish_is_one_named_error(header: bytes, body: bytes) -> None:
    try:
        message = decode(header, body)
    except LinkError:
        return
    assert sum(array.nbytes for array in message.arrays.values()) == len(body)


def test_deep_and_huge_headers() -> None:
    with pytest.raises(LinkError, match="cannot be read"):
        decode(b"[" * 60_000, b"")
    with pytest.raises(LinkError, match="longer than the body"):
        decode(b'{"type":"x","arrays":[["a","uint8",[4294967296,4294967296,4294967296]]]}', b"")
    with pytest.raises(LinkError, match="has dtype"):
        encode(WireMessage(type="x", arrays={"a": np.zeros(2)}))


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair()
    connection = Connection(ours, silence=0.1)
    yield connection, theirs
    connection.close()
    theirs.close()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "begin with b'WLNK'; got bytes b'GET '"),
        (PREFIX.pack(b"WLNK", 2, 0, 2, 0) + b"{}", "got version 2"),
        (PREFIX.pack(b"WLNK", 1, 0, wire.HEADER_LIMIT + 1, 0), f"the limits are {wire.HEADER_LIMIT}"),
        (PREFIX.pack(b"WLNK", 1, 0, 2, 2**32 - 1), "a body of 4294967295"),
        (PREFIX.pack(b"WLNK", 1, 0, 2, 0) + b"{}", "cannot be read"),
        (encode(WireMessage(type="x", arrays={"a": np.zeros(9, np.uint8)}))[:-1], "a message is incomplete"),
        (b"WL", "a message is incomplete"),
    ],
)
def test_what_is_no_message_is_said(pair: tuple[Connection, socket.socket], data: bytes, message: str) -> None:
    connection, peer = pair
    peer.sendall(data)
    with pytest.raises(LinkError, match=message):
        connection.receive(20.0)


def test_an_end_in_the_middle_is_said_and_pieces_are_put_together(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    data = encode(WireMessage(type="x", arrays={"a": np.arange(9, dtype=np.uint8)}))
    for piece in (data[:3], data[3:20], data[20:] + data + data[:30]):
        peer.sendall(piece)
    for _ in range(2):
        came = connection.receive(1.0)
        assert came is not None
        assert came.arrays["a"].tolist() == list(range(9))
    peer.close()
    with pytest.raises(LinkError, match=r"in the middle of a message \(30 bytes"):
        connection.receive(1.0)


def test_a_message_that_is_complete_is_read_however_late(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    data = encode(WireMessage(type="x"))
    peer.sendall(data[:9])
    assert connection.poll() is None
    peer.sendall(data[9:])
    connection._touched -= 60.0  # the caller was busy
    assert connection.poll() is not None


def test_a_peer_that_takes_nothing_does_not_hold_up_the_sender(pair: tuple[Connection, socket.socket]) -> None:
    connection, _ = pair
    with pytest.raises(LinkError, match="accepted no data"):
        connection.send(WireMessage(type="x", arrays={"a": np.zeros(2**24, np.uint8)}), timeout=0.1)


def test_addresses() -> None:
    assert str(Address.parse("unix:/a/b")) == "unix:/a/b"
    assert Address.parse("tcp://[::1]:80") == Address(host="::1", port=80)
    for text in ("", "tcp://x", "x:1", "udp://x:1", "tcp://x:99999", "unix:"):
        with pytest.raises(ConfigError, match="expected tcp://HOST:PORT or unix:PATH"):
            Address.parse(text)
    assert str(Address.parse("unix:///a/b")) == "unix:/a/b"
    with pytest.raises(LinkError, match="no plant answers"):
        SocketLink("unix:/nowhere/at/all", connect_timeout=0.1)


@pytest.mark.parametrize(
    "text",
    [
        *("unix://", "tcp://[]:80", "tcp://[[]]:80", "tcp:// :80"),  # an empty host stands for all network interfaces
        *("tcp://127.0.0.1:²", "tcp://h:" + "9" * 5000, "tcp://h:-1", "tcp://h:80:", "tcp://h: 80"),
        *("tcp://plant..local:7777", f"tcp://{'x' * 70}:80", "tcp://\udc80:80", "tcp://a\0b:80", "tcp://a\nb:80"),
        *("unix:a\0b", "unix:\ud800"),
    ],
)
def test_a_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected tcp://HOST:PORT or unix:PATH"):
        Address.parse(text)


@given(st.sampled_from(["", "tcp://", "unix:"]).flatmap(lambda kind: st.text(max_size=90).map(kind.__add__)))
def test_an_address_names_one_host_or_one_path(text: str) -> None:
    try:
        address = Address.parse(text)
    except ConfigError:
        return
    assert bool(address.host) != bool(address.path)
    assert Address.parse(str(address)) == address or text.startswith("unix:////")


# The agent's end, against a plant that is written by hand


class Hand:
    """A plant that says what a test tells it to."""

    def __init__(self, path: Path, *, hello: WireMessage | None = None, silence: float = 1.0) -> None:
        self._listener = Address(path=str(path)).listen()
        self._hello = hello or greeting(OBSERVATION, ACTION, 20.0, np.zeros(2, np.float32), "hand")
        meeting = threading.Thread(target=self._meet)
        meeting.start()
        try:
            self.link: Any = SocketLink(f"unix:{path}", silence=silence)
        except LinkError:
            meeting.join()
            self.connection.close()
            self._listener.close()
            raise
        meeting.join()

    def _meet(self) -> None:
        sock, _ = self._listener.accept()
        self.connection = Connection(sock)
        self.connection.send(self._hello)

    def observe(self, sequence: int, vector: list[float] | None = None, **fields: Any) -> None:
        values = np.array([sequence, 0] if vector is None else vector, np.float32)
        fields = {"sequence": sequence, "time": 1.0, "episode": 0} | fields
        self.connection.send(WireMessage(type="observation", fields=fields, arrays={"vector": values}))

    def close(self) -> None:
        self.link.close()
        self.connection.close()
        self._listener.close()


@pytest.fixture
def hand(tmp_path: Path) -> Iterator[Hand]:
    hand = Hand(tmp_path / "s")
    yield hand
    hand.close()


def test_the_newest_observation_wins_and_the_rest_is_counted(hand: Hand) -> None:
    for sequence in (3, 4, 7, 5, 7):
        hand.observe(sequence)
    wait_for(lambda: hand.link.counts["received"] == 3 and hand.link.counts["out of order"] == 2)
    reading = hand.link.receive(1.0)
    assert (reading.sequence, reading.vector.tolist()) == (7, [7.0, 0.0])
    assert hand.link.receive(0.0) is None  # once only
    assert (hand.link.counts["unread"], hand.link.counts["lost"]) == (2, 2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda hand: hand.observe(1, [1.0, 2.0, 3.0]), "a vector of 3 values; expected"),
        (lambda hand: hand.observe(1, [np.nan, 2.0]), "is not finite"),
        (lambda hand: hand.observe("one", [1.0, 2.0]), "has no valid sequence number or time"),
        (lambda hand: hand.connection.send(WireMessage(type="error", fields={"message": "motor hot"})), "motor hot"),
        (lambda hand: hand.connection.send(WireMessage(type="bye")), "ended the session"),
        (lambda hand: hand.connection.close(), "closed the connection|the connection broke"),
        (lambda hand: None, "sent nothing for 1 s"),
    ],
)
def test_a_broken_plant_is_an_error_and_no_hang(hand: Hand, spoil: Callable[[Hand], object], message: str) -> None:
    spoil(hand)
    with pytest.raises(LinkError, match=message):
        assert hand.link.receive(20.0) is None
    with pytest.raises(LinkError):
        hand.link.send(np.zeros(2, np.float32))


def test_actions_carry_their_number_time_and_what_they_answer(hand: Hand) -> None:
    assert hand.connection.receive(1.0).type == "hello"
    for action in ([0.5, -0.5], [7.0, -7.0]):
        hand.link.send(np.array(action, np.float32), kind="safe", answers=41)
    came = [hand.connection.receive(1.0) for _ in range(2)]
    assert [message.fields["sequence"] for message in came] == [0, 1]
    assert came[0].fields["time"] <= came[1].fields["time"]
    assert {(message.fields["kind"], message.fields["answers"]) for message in came} == {("safe", 41)}
    assert [message.arrays["action"].tolist() for message in came] == [[0.5, -0.5], [1.0, -1.0]]  # clipped
    for wrong in ([0.0], [np.nan, 0.0]):
        with pytest.raises(DataError, match="2 finite values"):
            hand.link.send(np.array(wrong, np.float32))
    wait_for(lambda: hand.connection.receive(1.0).type == "heartbeat")  # when there is nothing to say


def test_observations_from_before_a_reset_are_dropped(hand: Hand) -> None:
    hand.link.reset(seed=3)
    hand.observe(1)
    hand.observe(2, episode=1)
    assert hand.link.receive(5.0).sequence == 2
    assert hand.link.counts["before the reset"] == 1


SAFE = np.array([0.25, -0.25], np.float32)


@pytest.fixture
def slow_hand(tmp_path: Path) -> Iterator[Hand]:
    """A plant with a period of 50 s, so that no period ends in a test."""
    hand = Hand(tmp_path / "s", hello=greeting(OBSERVATION, ACTION, 0.02, SAFE, "hand"), silence=20.0)
    yield hand
    hand.close()


def test_a_link_knows_which_action_the_plant_applies(slow_hand: Hand) -> None:
    link, sent = slow_hand.link, np.array([0.5, 0.5], np.float32)

    def applies(action: np.ndarray) -> bool:
        return bool(np.array_equal(link.applied(), action))

    assert applies(SAFE)
    for number, action in ((5, sent), (6, sent), (7, SAFE)):
        # In period 5 an action is sent; it is valid until the end of period 6. Observation 6 may be older than it.
        slow_hand.observe(number, safe=number > 5)
        assert link.receive(5.0).sequence == number
        if number == 5:
            link.send(sent)
        assert applies(action)
    link.send(sent)
    assert applies(sent)
    link.reset()
    assert applies(SAFE)


def test_an_action_lapses_at_the_end_of_the_next_period(hand: Hand) -> None:
    hand.observe(1)
    assert hand.link.receive(5.0) is not None
    hand.link.send(np.ones(2, np.float32))
    began = time.monotonic()
    wait_for(lambda: not hand.link.applied().any())  # the plant stays silent
    assert time.monotonic() - began > 0.04


def test_a_plant_without_a_safe_action_applies_the_last_action(tmp_path: Path) -> None:
    hello = greeting(OBSERVATION, ACTION, 20.0, SAFE, "hand")
    fields = {name: value for name, value in hello.fields.items() if name != "safe_action"}
    hand = Hand(tmp_path / "s", hello=WireMessage(type="hello", fields=fields))
    assert hand.link.applied() is None
    hand.observe(1)
    hand.link.send(np.ones(2, np.float32))
    hand.observe(9, safe=True)
    assert hand.link.receive(5.0) is not None
    assert hand.link.applied().tolist() == [1.0, 1.0]
    hand.close()


@pytest.mark.parametrize(
    "value", ["x", {}, 0.5, [0.5], [0.5, "x"], [0.5, None], [10**400, 0], [1e60, 0.0], [[0.5], [0.5]]]
)
def test_a_useless_safe_action_is_said(tmp_path: Path, value: Any) -> None:
    hello = greeting(OBSERVATION, ACTION, 20.0, SAFE, "hand")
    with pytest.raises(LinkError, match="no valid observation, action, rate and safe action"):
        Hand(tmp_path / "s", hello=WireMessage(type="hello", fields={**hello.fields, "safe_action": value}))


@pytest.mark.parametrize("field", ["rate", "observation", "action"])
@pytest.mark.parametrize("value", [None, -1, "x", {}])
def test_a_useless_greeting_is_said(tmp_path: Path, field: str, value: Any) -> None:
    hello = greeting(OBSERVATION, ACTION, 20.0, np.zeros(2, np.float32), "hand")
    with pytest.raises(LinkError):
        Hand(tmp_path / "s", hello=WireMessage(type="hello", fields={**hello.fields, field: value}))


def test_pictures_that_no_message_can_carry_are_refused(tmp_path: Path) -> None:
    hello = greeting(OBSERVATION, ACTION, 20.0, np.zeros(2, np.float32), "hand")
    large = {"observation": {"pixels": [40000, 40000, 3], "vector": 0}}
    with pytest.raises(LinkError, match="4,800,000,000 bytes; a message has at most"):
        Hand(tmp_path / "s", hello=WireMessage(type="hello", fields={**hello.fields, **large}))


def test_another_version_is_said(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="expected a greeting of version 1"):
        Hand(tmp_path / "s", hello=WireMessage(type="hello", fields={"version": 9}))


# The plant's end


@pytest.fixture
def line(tmp_path: Path) -> Iterator[tuple[Line, PlantServer]]:
    line = Line()
    server = serve(line, f"unix:{tmp_path / 's'}", 50.0)
    serving = threading.Thread(target=server.serve)
    serving.start()
    yield line, server
    server.stop()
    serving.join(timeout=10)
    assert not serving.is_alive()
    assert line.written[-1] == [0.0, 0.0]


def test_a_period_without_an_action_ends_with_the_plants_safe_one(line: tuple[Line, PlantServer]) -> None:
    point, server = line
    with SocketLink(server.address) as link:
        link.send(np.ones(2, np.float32))
        wait_for(lambda: point.written and [1.0, 1.0] in point.written)
        wait_for(lambda: len(server.log.safe) >= 2)  # and now the agent says nothing, but is there
        assert point.written[-1] == [0.0, 0.0]
        reading = link.receive(5.0)
        wait_for(lambda: link.receive(5.0).unanswered > reading.unanswered)
        assert link.receive(5.0).safe


def test_a_sensor_that_hangs_does_not_keep_the_plant_moving(tmp_path: Path) -> None:
    point, free, count = Line(), threading.Event(), [0]

    def read() -> PlantReading:
        count[0] += 1
        if count[0] > 3:
            free.wait(20)
        return Line.read(point)

    point.read = read  # type: ignore[method-assign]  # a camera that stops
    server = serve(point, f"unix:{tmp_path / 's'}", 50.0)
    serving = threading.Thread(target=server.serve)
    serving.start()
    with SocketLink(server.address, silence=30.0) as link:
        wait_for(lambda: count[0] > 3)
        link.send(np.ones(2, np.float32))
        wait_for(lambda: [1.0, 1.0] in point.written)
        wait_for(lambda: point.written[-1] == [0.0, 0.0])
        free.set()
    server.stop()
    serving.join(timeout=10)


def test_an_agent_that_is_gone_leaves_the_safe_action_and_the_next_is_served(line: tuple[Line, PlantServer]) -> None:
    point, server = line
    for _ in range(2):
        point.written.clear()
        link = SocketLink(server.address)
        link.send(np.ones(2, np.float32))
        wait_for(lambda: [1.0, 1.0] in point.written)
        link._connection.close()  # as a process that is killed
        wait_for(lambda: point.written[-1] == [0.0, 0.0])
        link.close()
    assert server.log.sessions == 2


def test_what_is_no_action_is_refused_and_counted(line: tuple[Line, PlantServer]) -> None:
    point, server = line
    with SocketLink(server.address) as link:
        for wrong in ({"action": np.ones(3, np.float32)}, {}, {"action": np.array([np.nan, 1], np.float32)}):
            link._connection.send(WireMessage(type="action", fields={}, arrays=wrong))
        wait_for(lambda: server.log.refused == 3)
        link._connection.send(WireMessage(type="action", arrays={"action": np.array([9, -9], np.float32)}))
        wait_for(lambda: [1.0, -1.0] in point.written)
    assert not [written for written in point.written if written not in ([0.0, 0.0], [1.0, -1.0])]
    json.dumps(server.log.to_json(), allow_nan=False)


def test_an_answer_that_comes_after_its_period_is_told(line: tuple[Line, PlantServer]) -> None:
    _, server = line
    with SocketLink(server.address) as link:
        first = link.receive(5.0)
        wait_for(lambda: link.receive(5.0).sequence > first.sequence)
        link.send(np.ones(2, np.float32), kind="agent", answers=first.sequence)
        wait_for(lambda: link.overdue)
        assert set(link.overdue) == {first.sequence}


def test_a_stranger_is_sent_away(line: tuple[Line, PlantServer]) -> None:
    _, server = line
    sock = Address.parse(server.address).connect(1.0)
    sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with SocketLink(server.address) as link:
        assert link.receive(10.0) is not None
    sock.close()


# Functions, and environments


def test_functions_make_a_link() -> None:
    written: list[list[float]] = []
    waiting = threading.Semaphore(0)

    def read() -> PlantReading:
        waiting.acquire()
        if len(written) > 1:
            raise OSError("the camera is unplugged")
        return PlantReading(vector=np.full(2, len(written), np.float32))

    link = CallbackLink(
        read, lambda action: written.append(action.tolist()), observation=OBSERVATION, action=ACTION, rate=20.0
    )
    for number in range(2):
        waiting.release()
        reading = link.receive(20.0)
        assert reading is not None
        assert reading.vector is not None
        assert (reading.sequence, reading.vector.tolist()) == (number, [number, number])
        link.send(np.array([5.0, 0.0], np.float32))
    assert written == [[1.0, 0.0]] * 2
    waiting.release()
    with pytest.raises(LinkError, match="'read' raised OSError: the camera is unplugged"):
        link.receive(20.0)


def test_a_function_that_fails_breaks_the_link(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("the bus is off")

    def leave() -> Any:
        raise SystemExit(3)

    link = CallbackLink(lambda: None, fail, observation=OBSERVATION, action=ACTION, rate=20.0)
    with link, pytest.raises(LinkError, match="'write' raised OSError: the bus is off"):
        link.send(np.ones(2, np.float32))
    assert link.applied() is None
    link = CallbackLink(leave, fail, observation=OBSERVATION, action=ACTION, rate=20.0)
    with link, pytest.raises(LinkError, match="'read' raised SystemExit: 3"):
        link.receive(20.0)


def test_an_environment_waits_for_a_slow_plant(tmp_path: Path) -> None:
    line = Line()
    server = serve(line, f"unix:{tmp_path / 's'}", 2.0)
    serving = threading.Thread(target=server.serve)
    serving.start()
    env = LinkEnv(server.address, timeout=0.05)
    env.reset(seed=0)
    for _ in range(2):
        _, _, _, _, info = env.step(np.ones(2, np.float32))
    assert info["sequence"] >= 2
    env.close()
    server.stop()
    serving.join(timeout=10)


@pytest.fixture(scope="module")
def plant_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    script = Path(__file__).with_name("line_plant.py")
    address = f"unix:{tmp_path_factory.mktemp('plant') / 's'}"
    process = subprocess.Popen([sys.executable, str(script), address, "25"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait(timeout=20)
    process.stdout.close()


def test_collect_logs_from_a_plant_in_another_process(tmp_path: Path, plant_process: str) -> None:
    arguments: dict[str, Any] = {"env_id": "worldloom/Plant-v0", "env_kwargs": {"address": plant_process}}
    dataset = collect(tmp_path / "d", **arguments, episodes=2, steps=12, num_envs=1, seed=0)
    assert dataset.spec.observation == OBSERVATION
    assert dataset.spec.action == ACTION
    assert {"position", "missed", "safe"} <= set(dataset.spec.labels)
    kept = 0
    for episode in (dataset.episode(number) for number in range(2)):
        assert episode.vector is not None
        moved = np.diff(episode.vector, axis=0)
        # A period that a slow machine missed is marked as such; all others follow the plant's law.
        unbroken = (episode.labels["missed"][1:, 0] == 0) & (episode.labels["safe"][1:, 0] == 0)
        np.testing.assert_allclose(moved[unbroken], 0.1 * episode.actions[unbroken], atol=1e-5)
        assert (np.diff(episode.labels["sequence"][:, 0]) == 1 + episode.labels["missed"][1:, 0]).all()
        kept += int(unbroken.sum())
    assert kept > 0


def test_methods_are_evaluated_on_a_plant(plant_process: str) -> None:
    protocol = gym_protocol(
        "worldloom/Plant-v0",
        success="position:0.05",
        policy="directed-walk",
        env_kwargs={"address": plant_process},
        goal_offset=4,
        budget=6,
        episodes=3,
        seed=0,
    )
    results = evaluate(protocol, {"random": lambda: RandomAgent(ACTION)})
    assert [(row.method, len(row.episodes)) for row in results.rows] == [("random", 3)]


def test_an_environment_that_nobody_answers_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected either 'address'"):
        LinkEnv()
    hand = Hand(tmp_path / "s")
    env = LinkEnv(link=hand.link, reset_timeout=0.05)
    with pytest.raises(EnvironmentFailure, match=r"no observation arrived within 0.05 s"):
        env.reset(seed=0)
    hand.close()
