"""The lobby of a plant: several agents may connect, and one of those that sent a valid greeting is served."""

import contextlib
import logging
import random
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from worldloom.core.closing import Closing
from worldloom.deploy.sparing_log import SparingLog
from worldloom.deploy.wire import VERSION, Connection, LinkError, WireMessage

_log = logging.getLogger(__name__)
_WAITING = 64  # connections at a time, besides the agent that is served
_BODY = 64 * 1024  # bytes; an agent sends only actions
_TICK = 0.05  # seconds
_PATIENCE = 0.25  # seconds until the plant greets a silent connection first


@dataclass(kw_only=True)
class _Guest:
    connection: Connection
    came: float
    greeted: float | None = None  # when the plant's greeting was sent
    ready: bool = False  # whether the agent's greeting has arrived


class Lobby(Closing):
    """Accepts connections in its own thread, and waits for the greetings of all of them at once.

    While no agent is served, an agent whose greeting has arrived gets the plant's greeting, and is served next. If
    several wait, one of them is chosen at random, because agents that connect again and again would fill a queue. Some
    agents wait for the plant's greeting before they send their own. Therefore a connection that is silent for a quarter
    of a second gets the plant's greeting first. It is closed if its own greeting does not arrive within `silence`
    seconds, or if another agent is served. All other connections wait. At most 64 connections wait: a new connection
    replaces the oldest one without a greeting. If all 64 have sent a greeting, the new connection is closed.
    """

    def __init__(self, listener: socket.socket, greeting: WireMessage, *, silence: float) -> None:
        self._listener, self._greeting, self._silence = listener, greeting, silence
        self._guests: list[_Guest] = []
        self._chosen: _Guest | None = None
        self._free = False
        self._changed = threading.Condition()
        self._closing, self._said = threading.Event(), SparingLog(_log)
        listener.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="worldloom-plant-lobby", daemon=True)
        self._thread.start()

    def next(self, timeout: float) -> Connection | None:
        """Return the connection of the next agent, after both greetings, or None after `timeout` seconds."""
        with self._changed:
            self._free = self._chosen is None
            self._changed.wait_for(lambda: self._chosen is not None, timeout)
            guest, self._chosen = self._chosen, None
            return None if guest is None else guest.connection

    @property
    def waiting(self) -> bool:
        """Whether another agent has sent its greeting and waits."""
        with self._changed:
            return any(guest.ready for guest in self._guests)

    def close(self) -> None:
        """Close the listener and all connections that wait."""
        self._closing.set()
        self._thread.join()
        self._listener.close()
        for guest in [*self._guests, *([] if self._chosen is None else [self._chosen])]:
            guest.connection.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._step()
            except Exception:  # a fault here must not leave the plant without its server
                self._said.log(logging.ERROR, "the plant's lobby raised an error and continues", trace=True)
                self._closing.wait(_TICK)

    def _step(self) -> None:
        watched: list[socket.socket | Connection] = [self._listener]
        watched += [guest.connection for guest in self._guests if not guest.ready]
        readable = select.select(watched, [], [], _TICK)[0]
        if self._listener in readable:
            self._accept()
        for guest in [guest for guest in self._guests if guest.connection in readable]:
            self._guarded(guest, self._hear)
        now = time.monotonic()
        for guest in [guest for guest in self._guests if not guest.ready]:
            if guest.greeted is None and self._free and now - guest.came > _PATIENCE:
                self._guarded(guest, self._greet)
            elif guest.greeted is not None and now - guest.greeted > self._silence:
                self._drop(guest, f"no greeting of version {VERSION} came within {self._silence:g} s")
        for guest in [guest for guest in self._guests if guest.ready and guest.connection.left]:
            self._drop(guest, "the agent left before it was served")
        ready = [guest for guest in self._guests if guest.ready]
        if self._free and ready:
            self._guarded(random.choice(ready), self._choose)

    def _choose(self, guest: _Guest) -> None:
        if guest.greeted is None:
            self._greet(guest)
        with self._changed:
            self._guests.remove(guest)
            self._chosen, self._free = guest, False
            self._changed.notify_all()
        for other in [other for other in self._guests if other.greeted is not None]:
            self._drop(other, "another agent was faster", tell=True)  # it expects observations, which it would not get

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the client is gone already
            sock, _ = self._listener.accept()
            if len(self._guests) >= _WAITING:
                silent = next((guest for guest in self._guests if not guest.ready), None)
                if silent is None:
                    sock.close()
                    return
                self._drop(silent, "too many connections wait")
            connection = Connection(sock, silence=self._silence, body_limit=_BODY)
            with self._changed:
                self._guests.append(_Guest(connection=connection, came=time.monotonic()))

    def _greet(self, guest: _Guest) -> None:
        guest.connection.send(self._greeting, timeout=_TICK)
        guest.greeted = time.monotonic()

    def _hear(self, guest: _Guest) -> None:
        hello = guest.connection.poll()
        if hello is None:
            return
        if hello.type != "hello" or hello.fields.get("version") != VERSION:
            said = f"expected a greeting of version {VERSION}"
            guest.connection.send(WireMessage(type="error", fields={"message": said}), timeout=_TICK)
            raise LinkError(f"{said}; use the same version of worldloom on both sides")
        guest.ready = True

    def _guarded(self, guest: _Guest, step: Callable[[_Guest], None]) -> None:
        try:
            step(guest)
        except LinkError as error:
            self._drop(guest, str(error))

    def _drop(self, guest: _Guest, why: str, *, tell: bool = False) -> None:
        with self._changed:
            self._guests.remove(guest)
        if tell:
            with contextlib.suppress(LinkError):
                guest.connection.send(
                    WireMessage(type="error", fields={"message": f"{why}; connect again"}), timeout=0.0
                )
        guest.connection.close()
        self._said.log(logging.WARNING, "a connection to the plant was closed: %s", why)
