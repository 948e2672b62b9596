"""What a transport promises, on the one of this process."""

import threading

import pytest

from worldloom.federation import InProcess, Reply, Transport


def test_each_node_is_asked_its_own_message_and_its_answer_comes_back() -> None:
    transport = InProcess({"north": lambda data: b"north " + data, "east": lambda data: b"east " + data})
    assert isinstance(transport, Transport)
    assert transport.nodes() == ("north", "east")
    replies = list(transport.exchange({"north": b"1", "east": b"2"}, seconds=30.0))
    assert {reply.node: reply.data for reply in replies} == {"north": b"north 1", "east": b"east 2"}
    assert all(not reply.error for reply in replies)


def test_only_those_are_asked_who_are_named() -> None:
    asked: list[str] = []
    transport = InProcess({name: lambda data, name=name: asked.append(name) or data for name in ("north", "east")})
    assert [reply.node for reply in transport.exchange({"east": b""}, seconds=30.0)] == ["east"]
    assert asked == ["east"]
    assert list(transport.exchange({}, seconds=30.0)) == []


@pytest.mark.parametrize("error", [ValueError("broken"), KeyError("x"), MemoryError()])
def test_a_node_that_raises_is_told_with_the_cause_and_the_others_answer(error: Exception) -> None:
    def raises(_: bytes) -> bytes:
        raise error

    replies = {
        reply.node: reply
        for reply in InProcess({"bad": raises, "good": lambda data: data}).exchange(
            {"bad": b"x", "good": b"y"}, seconds=30.0
        )
    }
    assert replies["good"] == Reply(node="good", data=b"y")
    assert replies["bad"].data is None
    assert type(error).__name__ in replies["bad"].error


def test_a_name_that_no_node_has_is_an_answer_too() -> None:
    (reply,) = InProcess({}).exchange({"nobody": b""}, seconds=30.0)
    assert reply.node == "nobody"
    assert reply.data is None
    assert reply.error


def test_who_is_late_is_told_last_with_the_time() -> None:
    release = threading.Event()

    def slow(data: bytes) -> bytes:
        release.wait(30)
        return data

    try:
        transport = InProcess({"quick": lambda data: data, "slow": slow})
        replies = list(transport.exchange({"quick": b"q", "slow": b"s"}, seconds=0.5))
    finally:
        release.set()
    assert [reply.node for reply in replies] == ["quick", "slow"]
    assert replies[0].data == b"q"
    assert replies[1].data is None
    assert "0.5 s" in replies[1].error
