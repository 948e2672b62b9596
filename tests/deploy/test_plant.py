"""A plant's server outlives its user's faults and its clients' malice, and its log does not grow without end."""

import contextlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from line_plant import ACTION, OBSERVATION, Line

from worldloom.core.errors import DataError
from worldloom.deploy import LinkError, PlantServer, SocketLink
from worldloom.deploy.newest import Newest
from worldloom.deploy.plant import PlantLog
from worldloom.deploy.sparing_log import SparingLog
from worldloom.deploy.wire import Address, WireMessage, encode

HELLO = encode(WireMessage(type="hello", fields={"version": 1, "role": "agent"}))


class Serving:
    """A plant that serves in a thread."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.line = Line()
        self.server = PlantServer(
            lambda: self.line.read(),
            lambda action: self.line.write(action),
            observation=OBSERVATION,
            action=ACTION,
            address=f"unix:{path}",
            reset=lambda seed: self.line.reset(seed),
            **{"rate": 50.0, "silence": 1.0, "safe_action": np.zeros(2, np.float32), **options},
        )
        self.thread = threading.Thread(target=self.server.serve)
        self.thread.start()

    @property
    def address(self) -> str:
        return self.server.address

    def client(self) -> socket.socket:
        return Address.parse(self.address).connect(1.0)

    def close(self) -> None:
        self.server.stop()
        self.thread.join(timeout=10)
        assert not self.thread.is_alive()

    def serves(self, timeout: float = 5.0) -> bool:
        """Whether an honest agent gets an observation, and its action arrives."""
        with SocketLink(self.address, connect_timeout=timeout) as link:
            reading = link.receive(timeout)
            link.send(np.array([0.5, 0.5], np.float32))
            wait_for(lambda: [0.5, 0.5] in self.line.written)
        self.line.written.clear()
        return reading is not None


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def begin(**options: Any) -> Serving:
        started.append(Serving(tmp_path / f"s{len(started)}", **options))
        return started[-1]

    yield begin
    for one in started:
        one.close()


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "it never came about"
        time.sleep(0.005)


def told(link: SocketLink) -> str:
    """Return the error by which a session ends."""
    for _ in range(1000):
        try:
            link.receive(5.0)
        except LinkError as error:
            return str(error)
    raise AssertionError("the session goes on")


def action(value: float, answers: int = 0) -> bytes:
    """Return a message with an action."""
    values = np.full(2, value, np.float32)
    return encode(WireMessage(type="action", fields={"kind": "agent", "answers": answers}, arrays={"action": values}))


# When actions are applied


def test_no_action_is_applied_from_a_reset_until_it_has_ended(start) -> None:
    plant = start(silence=5.0)
    begun, go_on = threading.Event(), threading.Event()

    def reset(_: int | None) -> None:
        begun.set()
        go_on.wait(20)

    plant.line.reset = reset
    with plant.client() as client:
        client.sendall(HELLO + action(0.1))
        wait_for(lambda: [0.1, 0.1] in plant.line.written)
        client.sendall(encode(WireMessage(type="reset", fields={"seed": None})) + action(0.2))
        assert begun.wait(20)
        client.sendall(action(0.3))
        wait_for(lambda: plant.server.log.refused == 2)
        go_on.set()
        wait_for(lambda: client.send(action(0.4)) and [0.4, 0.4] in plant.line.written)
    assert [0.2, 0.2] not in plant.line.written
    assert [0.3, 0.3] not in plant.line.written


def test_a_slow_plant_applies_the_newest_action_and_none_after_its_session(start, caplog) -> None:
    caplog.set_level(logging.CRITICAL)
    plant = start(silence=5.0)
    whole, failed = plant.line.read, threading.Event()

    def read() -> Any:
        if failed.is_set():
            raise RuntimeError("the sensor is gone")
        return whole()

    def write(values: np.ndarray) -> None:
        time.sleep(0.02)  # a serial line
        Line.write(plant.line, values)

    plant.line.read, plant.line.write = read, write
    with plant.client() as client:
        client.sendall(HELLO + b"".join(action(number / 100, number) for number in range(95)))
        wait_for(lambda: [0.94, 0.94] in plant.line.written)
        assert plant.server.log.superseded > 80
        client.sendall(b"".join(action(-number / 1000) for number in range(40)))
        failed.set()
        wait_for(lambda: plant.server._acting is None)
        written = len(plant.line.written)
        time.sleep(0.2)
        assert not np.any(plant.line.written[written:])


HEARTBEAT = encode(WireMessage(type="heartbeat", fields={"time": 0.0}))


def slow_down(plant: Serving, seconds: float) -> None:
    """Let each action but the safe one take some time, as over a serial line."""

    def write(values: np.ndarray) -> None:
        time.sleep(seconds if values.any() else 0.0)
        Line.write(plant.line, values)

    plant.line.write = write


def test_heartbeats_between_actions_make_no_queue_of_them(start) -> None:
    plant = start(silence=5.0)
    slow_down(plant, 0.02)
    with plant.client() as client:
        client.sendall(HELLO + b"".join(action(number / 100) + HEARTBEAT for number in range(45)))
        wait_for(lambda: [0.44, 0.44] in plant.line.written)
        assert plant.server.log.superseded > 35


def test_a_write_that_takes_longer_than_the_silence_is_not_the_agents_silence(start) -> None:
    plant = start(silence=0.5)
    slow_down(plant, 0.8)
    with plant.client() as client:
        client.sendall(HELLO + action(0.1))
        for _ in range(12):
            time.sleep(0.1)
            client.sendall(HEARTBEAT)
        client.sendall(action(0.2))
        wait_for(lambda: [0.2, 0.2] in plant.line.written)
        assert plant.server.log.sessions == 1


def test_a_reset_waits_until_the_safe_action_is_applied(start, caplog) -> None:
    caplog.set_level(logging.CRITICAL)
    plant = start()
    resets: list[int | None] = []
    whole, plant.line.reset = plant.line.write, resets.append

    def broken(values: np.ndarray) -> None:
        raise RuntimeError("the motor is hot")

    with SocketLink(plant.address) as link:
        assert link.receive(5.0) is not None
        plant.line.write = broken
        link.reset(seed=3)
        wait_for(lambda: plant.server.log.failed > 3)
        assert not resets
        plant.line.write = whole
        reading = link.receive(20.0)
        assert reading is not None
        assert reading.episode == 1
    assert resets == [3]


def test_an_agent_hears_nothing_of_the_late_answers_of_the_one_before(start) -> None:
    plant = start()
    with plant.client() as client:
        client.sendall(HELLO)
        wait_for(lambda: plant.server.log.observations.total)
        client.sendall(b"".join(action(0.1, answers) for answers in range(20)))
    wait_for(lambda: plant.server._acting is None)
    assert plant.server.log.superseded
    with SocketLink(plant.address) as link:
        assert link.receive(5.0) is not None
        assert link.overdue == []


def test_a_driver_that_changes_its_argument_does_not_change_the_safe_action(start) -> None:
    values = np.full(2, 0.25, np.float32)
    plant = start(safe_action=values)
    values[:] = 1.0

    def write(action: np.ndarray) -> None:
        action *= 10
        plant.line.written.append(action.tolist())

    plant.line.write = write
    with plant.client() as client:
        client.sendall(HELLO)
        wait_for(lambda: len(plant.line.written) > 5)
    assert plant.line.written[-1] == [2.5, 2.5]


def test_a_safe_action_out_of_bounds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must lie within the action's bounds"):
        Serving(tmp_path / "s", safe_action=np.full(2, 1.5, np.float32))


# Faults of the user's own functions


class Stopped(BaseException):
    """What no `except Exception` catches, as the exceptions by which some libraries end a task."""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("read", RuntimeError),
        ("reset", RuntimeError),
        ("write", RuntimeError),
        ("write", SystemExit),
        ("write", Stopped),
    ],
)
def test_what_the_users_functions_raise_ends_the_session_only(start, name: str, kind: type[BaseException]) -> None:
    plant = start()
    whole = getattr(plant.line, name)

    def broken(*_: Any) -> Any:
        raise kind("the motor is hot")

    with SocketLink(plant.address) as link:
        assert link.receive(5.0) is not None
        setattr(plant.line, name, broken)
        if name == "reset":
            link.reset(seed=1)
        if name == "write":
            link.send(np.ones(2, np.float32))
        assert f"raised {kind.__name__}: the motor is hot" in told(link)
    plant.line.written.clear()
    setattr(plant.line, name, whole)
    if name == "write":
        assert plant.server.log.failed > 0
        wait_for(lambda: plant.line.written == [[0.0, 0.0]])  # tried until it works
    assert plant.serves()


@pytest.mark.parametrize("seed", [-1, 2**63, 10**400, True, "x", 1.5, []])
def test_a_seed_that_is_none_is_said_and_the_next_agent_is_served(start, seed: Any) -> None:
    plant = start()
    with SocketLink(plant.address) as link:
        link._connection.send(WireMessage(type="reset", fields={"seed": seed}))
        assert "the seed of a reset must be an integer" in told(link)
    assert plant.serves()


# Clients that dawdle, flood, or never leave


def test_an_honest_agent_is_served_while_others_dawdle(start) -> None:
    plant = start(silence=30.0)
    silent = [plant.client() for _ in range(5)]
    dripping = plant.client()
    dripping.sendall(HELLO[:20])
    began = time.monotonic()
    assert plant.serves()
    assert time.monotonic() - began < 15  # and not after 30 s for each of the others
    for sock in [*silent, dripping]:
        sock.close()


def test_connections_are_limited_and_an_agent_that_greets_gets_in(start) -> None:
    plant = start(silence=30.0)
    many = [plant.client() for _ in range(40)]
    assert plant.serves()
    for sock in many:
        sock.close()


def test_an_agent_that_never_acts_gives_way_to_one_that_waits(start) -> None:
    plant = start(idle=0.3)
    with SocketLink(plant.address) as idle:
        assert idle.receive(5.0) is not None
        time.sleep(0.5)
        idle.receive(5.0)  # alone, it may stay
        waiting = threading.Thread(target=plant.serves)
        waiting.start()
        assert "sent no action for 0.3 s while another agent waits" in told(idle)
    waiting.join()
    assert plant.server.log.sessions == 2


def test_nine_agents_that_idle_and_come_again_do_not_keep_an_honest_one_out(start) -> None:
    plant = start(idle=0.2)
    over = threading.Event()

    def pest() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), plant.client() as sock:
                sock.settimeout(0.1)
                sock.sendall(HELLO)
                open_, beat = True, time.monotonic()
                while open_ and not over.is_set():
                    with contextlib.suppress(TimeoutError):
                        open_ = bool(sock.recv(65536))
                    if time.monotonic() > beat + 0.1:
                        beat = time.monotonic()
                        sock.sendall(HEARTBEAT)

    pests = [threading.Thread(target=pest) for _ in range(9)]
    for each in pests:
        each.start()
    wait_for(lambda: plant.server.log.sessions > 2)  # all nine have come
    try:
        assert plant.serves(timeout=30.0)
    finally:
        over.set()
        for each in pests:
            each.join()


def test_agents_that_gave_up_waiting_take_no_place(start) -> None:
    plant = start()
    with SocketLink(plant.address) as acting:
        for _ in range(80):
            with plant.client() as gone:
                gone.sendall(HELLO + HEARTBEAT)
        with plant.client() as waiting:
            waiting.sendall(HELLO)
            for _ in range(20):
                assert acting.receive(5.0) is not None
                acting.send(np.ones(2, np.float32))
            acting.close()
            waiting.settimeout(20)
            assert b"hello" in waiting.recv(4096)
    assert plant.serves()


def test_an_agent_that_acts_keeps_its_place(start) -> None:
    plant = start(idle=0.3)
    with SocketLink(plant.address) as acting:
        other = plant.client()
        other.sendall(HELLO)
        for _ in range(40):
            assert acting.receive(5.0) is not None
            acting.send(np.ones(2, np.float32))
        other.close()
    assert plant.serves()


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("!4sHHII", b"WLNK", 1, 0, 2, 32 * 2**20) + b"{}",
        encode(WireMessage(type="action", arrays={"action": np.zeros(2**15, np.float32)})),
        encode(WireMessage(type="heartbeat", fields={"time": 0.0})) * 20_000,
    ],
)
def test_what_no_agent_needs_to_send_ends_its_session_at_once(start, data: bytes) -> None:
    plant = start(silence=30.0)
    sock = plant.client()
    sock.sendall(HELLO)
    wait_for(lambda: plant.server.log.sessions == 1)
    sock.settimeout(5.0)
    try:
        sock.sendall(data)
        while sock.recv(65536):
            pass
    except (BrokenPipeError, ConnectionResetError):
        pass
    sock.close()
    assert plant.serves()


# Plants with long periods


def test_a_slow_plant_sends_heartbeats_between_its_observations(start) -> None:
    plant = start(rate=0.4, silence=1.0)
    with SocketLink(plant.address, silence=1.0) as link:
        first = link.receive(5.0)
        second = link.receive(5.0)
    assert first is not None
    assert second is not None
    assert (first.sequence, second.sequence) == (0, 1)


def test_an_agent_that_answers_each_observation_of_a_slow_plant_keeps_its_place(start) -> None:
    plant = start(rate=3.0, silence=5.0, idle=0.05)
    with SocketLink(plant.address, silence=5.0) as acting, plant.client() as other:
        other.sendall(HELLO)
        for _ in range(5):
            assert acting.receive(5.0) is not None
            acting.send(np.ones(2, np.float32))
    assert plant.server.log.sessions >= 1


def test_within_a_long_period_sessions_end_and_resets_begin_at_once(start) -> None:
    plant = start(rate=0.02)
    began = time.monotonic()
    for _ in range(2):
        with SocketLink(plant.address) as link:
            assert link.receive(10.0) is not None
            link.reset(seed=1)
            reading = link.receive(10.0)
            assert reading is not None
            assert reading.episode == 1
    with SocketLink(plant.address) as link:
        assert link.receive(10.0) is not None
        plant.close()
    assert time.monotonic() - began < 25  # a period has 50 s


# Addresses


@pytest.mark.parametrize("kind", ["file", "folder", "link to a file", "link to nothing"])
def test_a_path_that_is_no_socket_is_never_removed(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "here", tmp_path / "other"
    if kind == "file":
        path.write_text("a thesis")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(other)
    if kind == "link to a file":
        other.write_text("a thesis")
    with pytest.raises(LinkError, match="is not a socket; choose another address"):
        Address.parse(f"unix:{path}").listen()
    assert path.is_symlink() or path.exists()
    assert not other.exists() or other.read_text() == "a thesis"


def test_the_address_of_a_plant_is_not_taken_from_it_but_taken_over_when_it_has_ended(start) -> None:
    plant = start()
    with pytest.raises(LinkError, match="another plant listens"):
        Address.parse(plant.address).listen()
    plant.close()
    Address.parse(plant.address).listen().close()


# The log


@given(limit=st.integers(1, 30), parts=st.lists(st.lists(st.integers(0, 3), max_size=20), max_size=20))
def test_the_newest_items_are_kept_and_all_are_counted(limit: int, parts: list[list[int]]) -> None:
    kept: Newest[int] = Newest(limit, key=str)
    every: list[int] = []
    for number, part in enumerate(parts):
        every += part
        if number % 2:
            kept += part
        else:
            kept.extend(part)
        assert list(kept) == every[len(every) - len(kept) :]
        assert min(limit, len(every)) <= len(kept) <= limit + max(1, limit // 10)
        assert kept.total == len(every)
        assert kept.kinds == {str(value): every.count(value) for value in set(every)}


def test_a_range_without_end_is_not_visited() -> None:
    kept: Newest[int] = Newest(10)
    kept += range(2**50)
    assert (len(kept), kept.total, kept[-1]) == (10, 2**50, 2**50 - 1)


def test_the_log_of_a_plant_is_bounded_and_its_counts_are_not() -> None:
    log = PlantLog()
    for number in range(120_000):
        log.observations.append((number, 0.0))
        log.actions.append((number, "agent", 0.0))
        log.safe.append((number, 0.0))
    assert len(log.observations) + len(log.actions) <= 22_000
    assert len(log.safe) <= 110_000
    assert log.to_json()["totals"] == {"observations": 120_000, "actions": 120_000, "safe": 120_000}


def test_messages_that_go_on_for_ever_are_logged_sparingly(caplog) -> None:
    log = SparingLog(logging.getLogger("worldloom.test"))
    for number in range(1000):
        log.log(logging.WARNING, "event %d", number)
    assert len(caplog.records) == 100 + 9
    assert caplog.records[-1].getMessage() == "event 999 (message 1000 of this kind)"
