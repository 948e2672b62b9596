"""How a coordinator and its nodes exchange messages: a seam that the core talks through, whatever carries the bytes."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Protocol, runtime_checkable

Handler = Callable[[bytes], bytes]
"""What a node does with a message: its answer."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of asking a node: its answer, or None and why."""

    node: str
    data: bytes | None
    error: str = ""


@runtime_checkable
class Transport(Protocol):
    """Carries messages to nodes, and their answers back."""

    def nodes(self) -> tuple[str, ...]:
        """Return the names of the nodes that can be asked."""
        ...

    def exchange(self, requests: Mapping[str, bytes], *, seconds: float, away: Collection[str] = ()) -> Iterator[Reply]:
        """Ask nodes, each its own message, and yield their answers as they come.

        A node that did not answer in so many seconds, or could not, is told last, with the cause. Those who are `away`
        are waited for only while they can be reached.
        """
        ...


class InProcess:
    """Nodes of this process, asked one after another in a thread of their own: for tests and for simulation."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = dict(handlers)

    def nodes(self) -> tuple[str, ...]:
        """Return the names of the nodes."""
        return tuple(self._handlers)

    def exchange(self, requests: Mapping[str, bytes], *, seconds: float, away: Collection[str] = ()) -> Iterator[Reply]:
        """Ask each node, all of which can be reached; see `Transport`."""
        answers: Queue[Reply] = Queue()

        def ask() -> None:
            for node, message in requests.items():
                try:
                    answers.put(Reply(node=node, data=self._handlers[node](message)))
                except Exception as error:  # whatever a handler raises: the node is one that could not answer
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
