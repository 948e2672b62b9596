"""The plant's side of a link: it sends observations at a fixed rate, applies actions on arrival, and has a watchdog.

The plant's watchdog does not depend on the agent: after a period without an action it applies the safe action. An agent
that hangs, crashes or is disconnected therefore cannot keep the plant moving.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from worldloom.core.errors import DataError
from worldloom.core.types import ActionSpec, ObservationSpec
from worldloom.deploy.link import RATES, PlantReading, greeting
from worldloom.deploy.lobby import Lobby
from worldloom.deploy.newest import Newest
from worldloom.deploy.sparing_log import SparingLog
from worldloom.deploy.wire import Address, Connection, LinkError, WireMessage

_log = logging.getLogger(__name__)
_ROUTINE, _SAFETY = 10_000, 100_000  # entries of the log that are kept
_KINDS = frozenset({"agent", "late", "safe", "watchdog", "environment"})
_MESSAGES = 20, 100  # an agent may send 20 messages in each period, and 100 per second in any case
_SEEDS = 2**63
_TICK = 0.25  # seconds between two looks at `stop`, while nothing else happens
_OWN_FAULT = "the plant's own code raised an error; the session ends with the safe action"


@dataclass
class PlantLog:
    """A log of the plant's events, with times in seconds on the plant's monotonic clock.

    Only the newest observations and actions are kept (10,000), and the newest safe actions (100,000). The attribute
    `total` of each list counts all its entries, including those that were dropped.
    """

    observations: Newest[tuple[int, float]] = field(default_factory=lambda: Newest(_ROUTINE))  # sequence, time sent
    actions: Newest[tuple[int, str, float]] = field(
        default_factory=lambda: Newest(_ROUTINE)
    )  # sequence of the observation, kind, arrival
    safe: Newest[tuple[int, float]] = field(
        default_factory=lambda: Newest(_SAFETY)
    )  # sequence without an action, time of the safe action
    late: int = 0  # periods in which the plant sent its observation late
    refused: int = 0  # rejected actions: wrong shape or dtype, not finite, or received during a reset
    superseded: int = 0  # actions that were not applied, because a newer action had already arrived
    failed: int = 0  # safe actions that could not be applied, because `write` raised an error
    sessions: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the log as JSON values, with the number of all events as `totals`."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        totals = {name: part.total for name, part in values.items() if isinstance(part, Newest)}
        return {**values, "totals": totals}


class PlantServer:
    """Serves a plant to one agent at a time.

    `read()` returns the current `PlantReading`. While an agent is connected, `serve` calls `read` at the rate, in the
    thread that called `serve`. `write(action)` applies an action, and is called from several threads, one at a time. If
    several actions have arrived, only the newest is applied. No action is applied during a reset. The values
    `safe_action` are written after a period without an action, when the agent disconnects, and at the end.
    `reset(seed)` starts an episode. The server listens as soon as it is created. For port 0, the attribute `address`
    contains the actual port.

    If `read`, `write` or `reset` raises an error, the server applies the safe action, logs the error, tells the agent
    and ends the session; then it serves the next agent. If another agent waits, an agent that has sent no action
    for `idle` seconds, or for two periods if they are longer, is disconnected.

    Raises:
        DataError: the safe action has the wrong size, is not finite, or is out of bounds; or the rate or a time is not
            possible.
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
        idle: float = 5.0,
    ) -> None:
        self._read, self._write, self._reset = read, write, reset
        self._observation, self._action, self._rate = observation, action, rate
        if not RATES[0] <= rate <= RATES[1]:
            raise DataError(f"'rate' must be from {RATES[0]:g} to {RATES[1]:g} Hz; got {rate}")
        if not (0 < silence < float("inf") and 0 < idle < float("inf")):
            raise DataError(f"'silence' and 'idle' must be positive numbers of seconds; got {silence} and {idle}")
        self._safe_action = np.array(safe_action, np.float32)
        if self._safe_action.shape != (action.size,) or not np.isfinite(self._safe_action).all():
            raise DataError(
                f"'safe_action' must have {action.size} finite values; got {safe_action}. Correct the values"
            )
        if not np.array_equal(action.clip(self._safe_action), self._safe_action):
            raise DataError(
                f"'safe_action' must lie within the action's bounds, {action.low} to {action.high}; got {safe_action}. "
                f"Correct the values"
            )
        self._name, self._silence, self._idle = name, silence, max(idle, 2 / rate)
        self._said, self._unsafe = SparingLog(_log), SparingLog(_log)
        self._acted = 0.0  # the time of the last action or of the beginning of the episode
        self.log = PlantLog()
        self._stop = threading.Event()
        self._woken = threading.Event()  # by the listening thread, when a reset has arrived or the session has ended
        self._applying = threading.Lock()
        self._safe = True
        self._overdue: deque[int] = deque(maxlen=64)  # observations answered too late, not yet reported to the agent
        self._watched = threading.Condition()
        self._began, self._due = 0.0, float("inf")  # start of the current period; time of the safe action
        self._acting: list[LinkError] | None = None  # of the session whose actions are applied; changed under _applying
        self._pending_reset: tuple[int | None, int] | None = None  # changed under _applying
        self._sequence, self._episode, self._resets = 0, 0, 0  # the last two are for this session
        place = Address.parse(address)
        self._listener = place.listen()
        if not place.path:
            place = replace(place, port=self._listener.getsockname()[1])
        self.address = str(place)

    def stop(self) -> None:
        """End `serve` soon, also within a long period. Signal handlers and other threads can call this."""
        self._stop.set()

    def serve(self) -> PlantLog:
        """Serve until `stop`. When an agent disconnects, apply the safe action and wait for the next agent."""
        hello = greeting(self._observation, self._action, self._rate, self._safe_action, self._name)
        with Lobby(self._listener, hello, silence=self._silence) as lobby:
            try:
                while not self._stop.is_set():
                    connection = lobby.next(0.1)
                    if connection is None:
                        if not self._safe:  # `write` failed before
                            self._apply_safe()
                        continue
                    try:
                        self._session(connection, lobby)
                    except LinkError as error:
                        self._said.log(logging.WARNING, "the agent disconnected: %s", error)
                    finally:
                        self._apply_safe()
                        connection.close()
            finally:
                self._apply_safe()
        return self.log

    def _session(self, connection: Connection, lobby: Lobby) -> None:
        self.log.sessions += 1
        self._acted = time.monotonic()
        self._episode = self._resets = 0
        self._pending_reset = None
        self._overdue.clear()
        ended: list[LinkError] = []
        self._acting = ended
        threads = [
            threading.Thread(target=self._listen, args=(connection, ended), name="worldloom-plant", daemon=True),
            threading.Thread(target=self._watch, args=(ended,), name="worldloom-plant-watchdog", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            self._run(connection, ended, lobby)
        except LinkError as error:
            self._tell(connection, error)
            raise
        except Exception as error:
            self._said.log(logging.ERROR, "%s", _OWN_FAULT, trace=True)
            failure = _own_fault(error)
            self._tell(connection, failure)
            raise failure from error
        finally:
            with self._applying:
                self._acting = None
                ended.append(LinkError("the session is over"))
            self._arm(float("inf"))
            connection.close()
            for thread in threads:
                thread.join()
        if len(ended) > 1:
            raise ended[0]

    def _tell(self, connection: Connection, error: LinkError) -> None:
        """Tell the agent why its session ends, if the connection still works."""
        with contextlib.suppress(LinkError):
            connection.send(WireMessage(type="error", fields={"message": str(error)[:500]}), timeout=0.1)

    def _run(self, connection: Connection, ended: list[LinkError], lobby: Lobby) -> None:
        start, period, count = time.monotonic(), 1 / self._rate, 0
        beat = self._silence / 4
        while not (self._stop.is_set() or ended):
            self._woken.clear()
            if self._pending_reset is not None and self._begin_episode(connection, ended):
                start, count = time.monotonic(), 0
            if time.monotonic() - self._acted > self._idle and lobby.waiting:
                raise LinkError(f"the agent sent no action for {self._idle:g} s while another agent waits")
            now = time.monotonic()
            if now >= start + count * period:
                self._observe(connection)
                count += 1
                now = time.monotonic()
                behind = int((now - start - count * period) / period) + 1 if now > start + count * period else 0
                self.log.late += behind
                count += behind
            elif now - connection.sent >= beat:
                connection.send(_heartbeat(now), timeout=self._silence)
            self._wait_until(min(start + count * period, now + min(beat, _TICK)))

    def _wait_until(self, moment: float) -> None:
        """Wait until a time, or until the listening thread wakes this thread."""
        # In two steps, because a sleep can end a millisecond late when other programs run.
        if not self._woken.wait(max(0.0, moment - time.monotonic() - 0.002)):
            time.sleep(max(0.0, moment - time.monotonic()))

    def _observe(self, connection: Connection) -> None:
        reading = self._read()
        arrays: dict[str, np.ndarray] = {f"label/{name}": values for name, values in reading.labels.items()}
        for name, part in (("pixels", reading.pixels), ("vector", reading.vector)):
            if part is not None:
                arrays[name] = part
        now = time.monotonic()
        fields: dict[str, Any] = {"sequence": self._sequence, "time": now, "episode": self._episode, "safe": self._safe}
        overdue = [self._overdue.popleft() for _ in range(len(self._overdue))]
        fields |= {"unanswered": self.log.safe.total, "overdue": overdue}
        self.log.observations.append((self._sequence, now))
        self._sequence += 1
        self._began = now
        # The observation that ends an unanswered period must not postpone that period's safe action.
        if self._due == float("inf") or self._due > now + 0.5 / self._rate:
            self._arm(now + 1 / self._rate)
        connection.send(WireMessage(type="observation", fields=fields, arrays=arrays), timeout=self._silence)

    def _begin_episode(self, connection: Connection, ended: list[LinkError]) -> bool:
        """Apply the safe action and call the reset function. Send heartbeats meanwhile, because both may take long.

        Return False if the safe action could not be applied. The reset then waits, because an operator may be near the
        plant during a reset.
        """
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self._silence / 4) and not ended:
                try:
                    connection.send(_heartbeat(time.monotonic()))
                except LinkError:
                    return  # the listening thread also gets this error

        beating = threading.Thread(target=beat, daemon=True)
        beating.start()
        try:
            self._apply_safe()
            if not self._safe:
                return False
            self._arm(float("inf"))
            with self._applying:
                assert self._pending_reset is not None
                seed, number = self._pending_reset
                self._pending_reset = None  # a reset that arrives from now on is another one
            if self._reset is not None:
                self._reset(seed)
        finally:
            done.set()
            beating.join()
        self._episode, self._acted = number, time.monotonic()
        with self._applying:
            if self._pending_reset is None:
                self._acting = ended
        return True

    def _listen(self, connection: Connection, ended: list[LinkError]) -> None:
        allowed = max(_MESSAGES[0] * self._rate, _MESSAGES[1])
        second, count = time.monotonic(), 0
        action: WireMessage | None = None  # received, and not yet applied
        try:
            while not (self._stop.is_set() or ended):
                message = connection.receive(0.0 if action else self._silence / 4)
                if action is not None and (message is None or message.type in ("reset", "bye")):
                    self._act(action, ended)
                    action = None
                elif message is None and time.monotonic() - connection.received > self._silence:
                    raise LinkError(
                        f"the agent has sent nothing for {self._silence:g} s; check the agent and the network"
                    )
                if message is None:
                    continue
                if time.monotonic() - second > 1:
                    second, count = time.monotonic(), 0
                count += 1
                if count > allowed:
                    raise LinkError(f"the agent sent more than {allowed:g} messages in a second; send one per period")
                if message.type == "action":
                    if not self._is_valid(message):
                        self.log.refused += 1
                        continue
                    if action is not None:
                        self._supersede(action)
                    action = message
                elif message.type == "reset":
                    seed = message.fields.get("seed")
                    if seed is not None and (type(seed) is not int or not 0 <= seed < _SEEDS):
                        raise LinkError(f"the seed of a reset must be an integer from 0 to {_SEEDS - 1}, or null")
                    with self._applying:
                        self._acting = None  # until the reset has ended
                        self._resets += 1
                        self._pending_reset = (seed, self._resets)
                    self._woken.set()
                elif message.type == "bye":
                    self._apply_safe()
                    ended.append(LinkError("the agent ended the session"))
                    self._woken.set()
                    return
        except LinkError as error:
            failure = error
        except BaseException as error:  # also an exit in `write`
            self._said.log(logging.ERROR, "%s", _OWN_FAULT, trace=True)
            failure = _own_fault(error)
        else:
            return
        if ended:  # the connection was closed at the end of the session
            return
        self._apply_safe()  # at once, not at the end of the period
        self._tell(connection, failure)
        ended.append(failure)
        self._woken.set()

    def _act(self, message: WireMessage, session: list[LinkError]) -> None:
        now = time.monotonic()
        bounded = self._action.clip(message.arrays["action"])
        with self._applying:
            if self._acting is not session:
                self.log.refused += 1
                return
            self._safe = False  # also if `write` fails halfway
            self._write(bounded)
            # The action is valid until the end of the next period, in case the sensor hangs and no observation follows.
            self._arm(self._began + 2 / self._rate)
        self._acted = now
        answers, kind = _answers(message), message.fields.get("kind")
        self.log.actions.append((answers, kind if isinstance(kind, str) and kind in _KINDS else "other", now))
        if answers >= 0 and kind == "agent" and (answers != self._sequence - 1 or now > self._began + 1 / self._rate):
            self._overdue.append(answers)

    def _is_valid(self, message: WireMessage) -> bool:
        action = message.arrays.get("action")
        return (
            action is not None
            and action.shape == (self._action.size,)
            and action.dtype == np.float32
            and bool(np.isfinite(action).all())
        )

    def _supersede(self, message: WireMessage) -> None:
        """Count an action that a newer one has replaced, and tell the agent with the next observation."""
        self.log.superseded += 1
        if (answers := _answers(message)) >= 0 and message.fields.get("kind") == "agent":
            self._overdue.append(answers)

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
            try:
                self._write(self._safe_action.copy())  # `write` may change its argument
                self._safe = True
            except BaseException as error:  # the watchdog must go on, so that it tries again in the next period
                self._safe = False
                self.log.failed += 1
                self._unsafe.log(logging.ERROR, "the safe action could not be applied", trace=True)
                if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                    raise


def _answers(message: WireMessage) -> int:
    """Return the sequence number of the observation that an action answers; -1 if the agent stated none."""
    answers = message.fields.get("answers")
    return answers if type(answers) is int and abs(answers) < 2**53 else -1


def _heartbeat(now: float) -> WireMessage:
    return WireMessage(type="heartbeat", fields={"time": now})


def _own_fault(error: BaseException) -> LinkError:
    return LinkError(f"the plant's own code raised {type(error).__name__}: {error}. Repair the plant's code")
