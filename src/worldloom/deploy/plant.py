"""The plant's side of a link: it sends observations at a fixed rate, applies actions on arrival, and has a watchdog.

The plant's watchdog does not depend on the agent: after a period without an action it applies the safe action. An agent
that hangs, crashes or is disconnected therefore cannot keep the plant moving.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from worldloom.core.errors import DataError
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.deploy.link import PlantReading, greeting
from worldloom.deploy.wire import VERSION, Address, Connection, LinkError, WireMessage

_log = logging.getLogger(__name__)


@dataclass
class PlantLog:
    """A log of the plant's events, with times in seconds on the plant's monotonic clock."""

    observations: list[tuple[int, float]] = field(default_factory=list)  # sequence, time sent
    actions: list[tuple[int, str, float]] = field(default_factory=list)  # sequence of the observation, kind, arrival
    safe: list[tuple[int, float]] = field(default_factory=list)  # sequence without an action, time of the safe action
    late: int = 0  # periods in which the plant sent its observation late
    refused: int = 0  # rejected actions: wrong shape or dtype, or not finite
    sessions: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the log as JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class PlantServer:
    """Serves a plant to one agent at a time.

    `read()` returns the current `PlantReading`. While an agent is connected, `serve` calls `read` at the rate, in the
    thread that called `serve`. `write(action)` applies an action, and is called from several threads. The values
    `safe_action` are written after a period without an action, when the agent disconnects, and at the end.
    `reset(seed)` starts an episode. The server listens as soon as it is created. For port 0, the attribute `address`
    contains the actual port.

    Raises:
        DataError: the safe action has the wrong size, or is not finite.
        LinkError: the server cannot listen at the address.
    """

    def __init__(
        self,
        read: Callable[[], PlantReading],
        write: Callable[[np.ndarray], object],
        *,
        observation: ObservationSpec,
        action: ActionSpec,
        rate: float,
        safe_action: np.ndarray,
        address: str,
        reset: Callable[[int | None], object] | None = None,
        name: str = "",
        silence: float = 2.0,
    ) -> None:
        self._read, self._write, self._reset = read, write, reset
        self._observation, self._action, self._rate = observation, action, rate
        self._safe_action = np.asarray(safe_action, np.float32)
        if self._safe_action.shape != (action.size,) or not np.isfinite(self._safe_action).all():
            raise DataError(
                f"'safe_action' must have {action.size} finite values; got {safe_action}. Correct the values"
            )
        self._name, self._silence = name, silence
        self.log = PlantLog()
        self._stop = threading.Event()
        self._applying = threading.Lock()
        self._safe = True
        self._overdue: list[int] = []  # observations answered too late, not yet reported to the agent
        self._watched = threading.Condition()
        self._began, self._due = 0.0, float("inf")  # start of the current period; time of the safe action
        self._pending_reset: tuple[int | None, int] | None = None
        self._sequence, self._episode, self._resets = 0, 0, 0  # the last two are for this session
        place = Address.parse(address)
        self._listener = place.listen()
        if not place.path:
            place = Address(host=place.host, port=self._listener.getsockname()[1])
        self.address = str(place)

    def stop(self) -> None:
        """End `serve` within one period. Signal handlers and other threads can call this."""
        self._stop.set()

    def serve(self) -> PlantLog:
        """Serve until `stop`. When an agent disconnects, apply the safe action and wait for the next agent."""
        self._listener.settimeout(0.1)
        try:
            while not self._stop.is_set():
                try:
                    sock, _ = self._listener.accept()
                except TimeoutError:
                    continue
                connection = Connection(sock, silence=self._silence)
                try:
                    self._session(connection)
                except LinkError as error:
                    _log.warning("the agent disconnected: %s", error)
                finally:
                    self._apply_safe()
                    connection.close()
        finally:
            self._apply_safe()
            self._listener.close()
        return self.log

    def _session(self, connection: Connection) -> None:
        connection.send(greeting(self._observation, self._action, self._rate, self._safe_action, self._name))
        hello = connection.receive(self._silence)
        if hello is None or hello.type != "hello" or hello.fields.get("version") != VERSION:
            connection.send(WireMessage(type="error", fields={"message": f"expected a greeting of version {VERSION}"}))
            raise LinkError(
                f"the agent sent no greeting of version {VERSION}; use the same version of worldloom on both sides"
            )
        self.log.sessions += 1
        self._episode = self._resets = 0
        self._pending_reset = None
        ended: list[LinkError] = []
        threads = [
            threading.Thread(target=self._listen, args=(connection, ended), name="worldloom-plant", daemon=True),
            threading.Thread(target=self._watch, args=(ended,), name="worldloom-plant-watchdog", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            self._run(connection, ended)
        finally:
            ended.append(LinkError("the session is over"))
            self._arm(float("inf"))
            connection.close()
            for thread in threads:
                thread.join(timeout=1.0)
        if len(ended) > 1:
            raise ended[0]

    def _run(self, connection: Connection, ended: list[LinkError]) -> None:
        start, period, count = time.monotonic(), 1 / self._rate, 0
        while not self._stop.is_set() and not ended:
            if self._pending_reset is not None:
                self._begin_episode(connection, ended)
                start, count = time.monotonic(), 0
            self._observe(connection)
            count += 1
            now = time.monotonic()
            behind = int((now - start - count * period) / period) + 1 if now > start + count * period else 0
            self.log.late += behind
            count += behind
            # In two steps, because a sleep can end a millisecond late when other programs run.
            self._stop.wait(max(0.0, start + count * period - time.monotonic() - 0.002))
            time.sleep(max(0.0, start + count * period - time.monotonic()))

    def _observe(self, connection: Connection) -> None:
        reading = self._read()
        arrays: dict[str, np.ndarray] = {f"label/{name}": values for name, values in reading.labels.items()}
        for name, part in (("pixels", reading.pixels), ("vector", reading.vector)):
            if part is not None:
                arrays[name] = part
        now = time.monotonic()
        fields: dict[str, Any] = {"sequence": self._sequence, "time": now, "episode": self._episode, "safe": self._safe}
        overdue, self._overdue = self._overdue, []
        fields |= {"unanswered": len(self.log.safe), "overdue": overdue}
        self.log.observations.append((self._sequence, now))
        self._sequence += 1
        self._began = now
        # The observation that ends an unanswered period must not postpone its safe action.
        if self._due == float("inf") or self._due > now + 0.5 / self._rate:
            self._arm(now + 1 / self._rate)
        connection.send(WireMessage(type="observation", fields=fields, arrays=arrays), timeout=self._silence)

    def _begin_episode(self, connection: Connection, ended: list[LinkError]) -> None:
        """Call the reset function, and send heartbeats meanwhile, because the function may wait for an operator."""
        assert self._pending_reset is not None
        seed, number = self._pending_reset
        self._pending_reset = None
        self._arm(float("inf"))
        self._apply_safe()
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self._silence / 4) and not ended:
                try:
                    connection.send(WireMessage(type="heartbeat", fields={"time": time.monotonic()}))
                except LinkError:
                    return  # the listening thread also gets this error

        beating = threading.Thread(target=beat, daemon=True)
        beating.start()
        try:
            if self._reset is not None:
                self._reset(seed)
        finally:
            done.set()
            beating.join()
        self._episode = number

    def _listen(self, connection: Connection, ended: list[LinkError]) -> None:
        try:
            while not self._stop.is_set():
                message = connection.receive(self._silence / 4)
                if message is None:
                    if time.monotonic() - connection.received > self._silence:
                        raise LinkError(
                            f"the agent has sent nothing for {self._silence:g} s; check the agent and the network"
                        )
                elif message.type == "action":
                    self._act(message)
                elif message.type == "reset":
                    seed = message.fields.get("seed")
                    self._resets += 1
                    self._pending_reset = (seed if isinstance(seed, int) else None, self._resets)
                elif message.type == "bye":
                    raise LinkError("the agent ended the session")
        except LinkError as error:
            ended.append(error)
            self._apply_safe()  # at once, not at the end of the period

    def _act(self, message: WireMessage) -> None:
        now = time.monotonic()
        action = message.arrays.get("action")
        answers, kind = message.fields.get("answers"), message.fields.get("kind")
        if (
            action is None
            or action.shape != (self._action.size,)
            or action.dtype != np.float32
            or not np.isfinite(action).all()
        ):
            self.log.refused += 1
            return
        bounded = self._action.clip(action)
        with self._applying:
            self._write(bounded)
            self._safe = False
        # The action is valid until the end of the next period, in case the sensor hangs and no observation follows.
        self._arm(self._began + 2 / self._rate)
        answers = answers if isinstance(answers, int) else -1
        self.log.actions.append((answers, str(kind)[:32], now))
        if answers >= 0 and kind == "agent" and (answers != self._sequence - 1 or now > self._began + 1 / self._rate):
            self._overdue = [*self._overdue, answers][-64:]

    def _arm(self, due: float) -> None:
        with self._watched:
            self._due = due
            self._watched.notify_all()

    def _watch(self, ended: list[LinkError]) -> None:
        """Apply the safe action as soon as a period has ended without an action."""
        while not ended:
            with self._watched:
                left = self._due - time.monotonic()
                if left > 0:
                    self._watched.wait(min(left, 0.25))
                    continue
                self._due = float("inf")
                unanswered = self._sequence - 1
            self._apply_safe()
            self.log.safe.append((unanswered, time.monotonic()))

    def _apply_safe(self) -> None:
        with self._applying:
            self._write(self._safe_action)
            self._safe = True
