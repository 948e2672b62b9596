"""The interface between a coordinator and its nodes: an exchange of messages, independent of the network."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Protocol, runtime_checkable

Handler = Callable[[bytes], bytes]
"""A node's function that maps a message to its answer."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A node's answer; if there is no answer, `data` is None and `error` has the reason."""

    node: str
    data: bytes | None
    error: str = ""


@runtime_checkable
class Transport(Protocol):
    """Sends messages to nodes, and returns their answers."""

    def nodes(self) -> tuple[str, ...]:
        """Return the names of the nodes that can receive messages."""
        ...

    def exchange(self, requests: Mapping[str, bytes], *, seconds: float, away: Collection[str] = ()) -> Iterator[Reply]:
        """Send each node its message, and yield the answers as they arrive.

        Nodes that failed or did not answer within `seconds` are yielded last, with the error. `away` has the nodes that
        have left. If only such nodes have not answered and none of them is connected, the exchange ends before
        `seconds` have passed.
        """
        ...


class InProcess:
    """A transport to nodes in this process, for tests and simulation; a thread calls them one after another."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = dict(handlers)

    def nodes(self) -> tuple[str, ...]:
        """Return the names of the nodes."""
        return tuple(self._handlers)

    def exchange(self, requests: Mapping[str, bytes], *, seconds: float, away: Collection[str] = ()) -> Iterator[Reply]:
        """Send each node its message; all nodes are reachable. See `Transport`."""
        answers: Queue[Reply] = Queue()

        def ask() -> None:
            for node, message in requests.items():
                try:
                    answers.put(Reply(node=node, data=self._handlers[node](message)))
                except Exception as error:  # any exception means that the node could not answer
                    answers.put(Reply(node=node, data=None, error=f"{type(error).__name__}: {error}"))

        threading.Thread(target=ask, name="worldloom-nodes", daemon=True).start()
        deadline, waiting = time.monotonic() + seconds, set(requests)
        while waiting:
            try:
                reply = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                break
            waiting.discard(reply.node)
            yield reply
        for node in sorted(waiting):
            yield Reply(node=node, data=None, error=f"no answer within {seconds:g} s")
