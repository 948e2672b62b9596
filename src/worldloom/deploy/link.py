"""Links to plants that run on their own clock: observations arrive at a fixed rate even if the agent is not ready.

`CallbackLink` wraps two functions. `SocketLink` connects to a plant in another process or on another machine with the
wire format of `worldloom.deploy.wire`; `worldloom.deploy.plant` is the other end.
"""

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float32

from worldloom.core.closing import Closing
from worldloom.core.errors import DataError
from worldloom.core.types import ActionSpec, Observations, ObservationSpec
from worldloom.deploy.wire import BODY_LIMIT, VERSION, Address, Connection, LinkError, WireMessage

RATES = 1e-3, 1e5  # Hz
_COUNT = 2**53  # limit of the counts that a plant sends
_OVERDUE = 1024  # overdue sequence numbers that are kept until the control loop reads them


@dataclass(frozen=True, kw_only=True, eq=False)
class PlantReading:
    """One observation of a plant.

    `sequence` increases by one with each observation. `sent` is in seconds of the plant's monotonic clock, `arrived` in
    seconds of the agent's monotonic clock. `episode` counts the resets since the agent connected. `safe` means that the
    plant is applying its own safe action. `unanswered` counts the periods without an action since the plant started.
    """

    pixels: np.ndarray | None = None  # uint8 (H, W, C)
    vector: np.ndarray | None = None  # float32 (V,)
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)  # float32 (L,) each
    sequence: int = -1
    sent: float = 0.0
    arrived: float = 0.0
    episode: int = 0
    safe: bool = False
    unanswered: int = 0

    def observations(self) -> Observations:
        """Return the observation as a batch of one."""
        return Observations.from_numpy(
            None if self.pixels is None else self.pixels[None], None if self.vector is None else self.vector[None]
        )

    def check(self, spec: ObservationSpec) -> None:
        """Raise `LinkError` if the observation does not match the spec in the plant's greeting, or is not finite."""
        pixels = None if self.pixels is None else self.pixels.shape
        vector = 0 if self.vector is None else self.vector.size
        wrong_type = (self.pixels is not None and self.pixels.dtype != np.uint8) or (
            self.vector is not None and (self.vector.dtype != np.float32 or self.vector.ndim != 1)
        )
        if pixels != spec.pixels or vector != spec.vector or wrong_type:
            raise LinkError(
                f"observation {self.sequence} has a wrong shape or dtype: pixels {pixels} and a vector of {vector} "
                f"values; expected uint8 pixels {spec.pixels} and a float32 vector of {spec.vector} values, as in the "
                f"plant's greeting. Correct the plant's code"
            )
        if self.vector is not None and not np.isfinite(self.vector).all():
            raise LinkError(
                f"the vector of observation {self.sequence} is not finite: {self.vector}; check the plant's sensors"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sent:
    """An action that was sent: in the plant's period `number`, and valid until the end of the next period."""

    values: Float32[np.ndarray, "A"]
    number: int
    until: float


class Link(Closing, ABC):
    """A connection to a plant: it receives the newest observation and sends actions. All methods are thread-safe.

    `counts` counts observations: `received`; `unread` (replaced by a newer one before `receive` was called); `lost`
    (never arrived); and `out of order` (arrived late and dropped). `overdue` contains the sequence numbers of
    observations whose action reached the plant only after the observation's period. `safe_action` is the plant's own
    safe action, or None if the link does not know it.
    """

    observation: ObservationSpec
    action: ActionSpec
    rate: float
    safe_action: Float32[np.ndarray, "A"] | None

    def __init__(
        self,
        observation: ObservationSpec,
        action: ActionSpec,
        rate: float,
        safe_action: Float32[np.ndarray, "A"] | None = None,
    ) -> None:
        if not RATES[0] <= rate <= RATES[1]:
            raise LinkError(
                f"expected a 'rate' from {RATES[0]:g} to {RATES[1]:g} observations per second; got {rate}. Correct "
                f"the rate"
            )
        self.observation, self.action, self.rate = observation, action, float(rate)
        self.safe_action = safe_action
        self.counts: Counter[str] = Counter()
        self.overdue: list[int] = []
        self._changed = threading.Condition()
        self._newest: PlantReading | None = None  # not yet received by the caller
        self._latest: PlantReading | None = None  # received by the caller or not
        self._last = -1
        self._sent: _Sent | None = None
        self._failure: LinkError | None = None

    def receive(self, timeout: float) -> PlantReading | None:
        """Return the newest observation, or None if no new observation arrives within `timeout` seconds.

        Raises:
            LinkError: the link is broken.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None or self._failure is not None, timeout)
            reading, self._newest = self._newest, None
            if reading is None and self._failure is not None:
                raise self._failure
            return reading

    def check(self) -> None:
        """Raise the `LinkError` of a broken link."""
        if self._failure is not None:
            raise self._failure

    def send(self, action: Float32[np.ndarray, "A"], *, kind: str = "agent", answers: int = -1) -> None:
        """Send an action, clipped to the plant's bounds.

        `answers` is the sequence number of the observation that the action is for. The plant logs `kind` and `answers`.

        Raises:
            LinkError: the link is broken.
            DataError: the action has the wrong size or is not finite.
        """
        self.check()
        values = self.action.clip(action)
        self._send(values, kind, answers)
        with self._changed:
            number, began = self._period()
            self._sent = _Sent(values=values, number=number, until=began + 2 / self.rate)

    def applied(self) -> Float32[np.ndarray, "A"] | None:
        """Return the action that the plant is applying: the last one that was sent, or the plant's own safe action.

        A plant applies its safe action until the first action arrives, during a reset, and when an action is older than
        the end of the period after its own. None: no action was sent, and the safe action is not known.
        """
        with self._changed:
            sent, latest = self._sent, self._latest
            if sent is None or self.safe_action is None:
                return self.safe_action if sent is None else sent.values
            now = time.monotonic()
            lapsed = now > sent.until
            if latest is not None:
                # Earlier observations can be from before the action arrived.
                lapsed |= latest.safe and latest.sequence >= sent.number + 2
                lapsed |= now > latest.arrived + 2 / self.rate
            return self.safe_action if lapsed else sent.values

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> None:
        """Request a new episode. The first observation of the episode follows once the plant is ready."""
        self._reset(seed, options)
        with self._changed:
            self._sent = None  # the plant applies its safe action

    @abstractmethod
    def _send(self, values: Float32[np.ndarray, "A"], kind: str, answers: int) -> None:
        """Send an action within the plant's bounds; see `send`."""

    @abstractmethod
    def _reset(self, seed: int | None, options: Mapping[str, Any] | None) -> None:
        """Request a new episode; see `reset`."""

    def close(self) -> None:
        """Close the link; the plant applies its own safe action."""
        self._fail(LinkError("the link was closed by this program; open a new one"))

    def _put(self, reading: PlantReading) -> None:
        reading.check(self.observation)
        with self._changed:
            if reading.sequence <= self._last:
                self.counts["out of order"] += 1
                return
            self.counts["received"] += 1
            self.counts["lost"] += reading.sequence - self._last - 1 if self._last >= 0 else 0
            self.counts["unread"] += self._newest is not None
            self._last, self._newest, self._latest = reading.sequence, reading, reading
            self._changed.notify_all()

    def _fail(self, failure: LinkError) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _period(self) -> tuple[int, float]:
        """Return the number and the beginning of the plant's current period, by this machine's clock."""
        now = time.monotonic()
        if self._latest is None:
            return self._last, now
        since = int((now - self._latest.arrived) * self.rate)
        return self._latest.sequence + since, self._latest.arrived + since / self.rate


class CallbackLink(Link):
    """A link to a plant through two functions.

    `read()` returns the next observation, or None if no new observation exists. It is called in another thread, and may
    block. `write(action)` applies an action and must return at once. Readings without a sequence number are numbered in
    the order of arrival.
    """

    def __init__(
        self,
        read: Callable[[], PlantReading | None],
        write: Callable[[np.ndarray], object],
        *,
        observation: ObservationSpec,
        action: ActionSpec,
        rate: float,
        reset: Callable[[int | None], object] | None = None,
    ) -> None:
        super().__init__(observation, action, rate)
        self._read, self._write, self._begin = read, write, reset
        self._episode = 0
        self._writing = threading.Lock()
        threading.Thread(target=self._listen, name="worldloom-callback-link", daemon=True).start()

    def _send(self, values: Float32[np.ndarray, "A"], kind: str, answers: int) -> None:
        """Call `write`."""
        with self._writing:
            try:
                self._write(values.copy())  # `write` may change its argument
            except Exception as error:
                raise LinkError(
                    f"the function 'write' raised {type(error).__name__}: {error}. Repair 'write'"
                ) from error

    def _reset(self, seed: int | None, options: Mapping[str, Any] | None) -> None:
        """Call the reset function, if there is one, with the seed; `options` are ignored."""
        if self._begin is not None:
            self._begin(seed)
        with self._changed:
            self._newest = None
            self._episode += 1

    def _listen(self) -> None:
        number = 0
        while self._failure is None:
            try:
                episode = self._episode
                reading = self._read()
                if reading is None:
                    time.sleep(0.001)
                    continue
                now = time.monotonic()
                sequence = number if reading.sequence < 0 else reading.sequence
                sent = reading.sent or now
                self._put(replace(reading, sequence=sequence, sent=sent, arrived=now, episode=episode))
                number = sequence + 1
            except LinkError as error:
                self._fail(error)
            except BaseException as error:  # also an exit: the next `receive` raises it
                self._fail(LinkError(f"the function 'read' raised {type(error).__name__}: {error}. Repair 'read'"))


class SocketLink(Link):
    """A link to a plant through a socket, `tcp://host:port` or `unix:path`.

    The plant must accept the connection and send a greeting within `connect_timeout` seconds. A link is broken after
    `silence` seconds without a message, so each side sends heartbeats when it is idle.

    Raises:
        LinkError: no plant answers, or the plant uses a different wire format.
    """

    def __init__(self, address: str | Address, *, connect_timeout: float = 10.0, silence: float = 2.0) -> None:
        address = Address.parse(address) if isinstance(address, str) else address
        self.address, self._silence = address, silence
        self._connection = Connection(address.connect(connect_timeout), silence=silence)
        try:
            self._connection.send(WireMessage(type="hello", fields={"version": VERSION, "role": "agent"}))
            self.hello = self._greeting(connect_timeout)
            _check_size(ObservationSpec.from_json(self.hello["observation"]))
            action = ActionSpec.from_json(self.hello["action"])
            super().__init__(
                ObservationSpec.from_json(self.hello["observation"]),
                action,
                float(self.hello["rate"]),
                _safe_action(self.hello.get("safe_action"), action),
            )
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, DataError) as error:
            self._connection.close()
            raise LinkError(
                f"the greeting of the plant at {address} has no valid observation, action, rate and safe action "
                f"({error!r}). Correct the greeting as described in docs/deploy.md"
            ) from error
        except LinkError:
            self._connection.close()
            raise
        self._sequence = 0
        self._numbering = threading.Lock()
        self._awaited = 0
        self._thread = threading.Thread(target=self._listen, name="worldloom-socket-link", daemon=True)
        self._thread.start()

    def _send(self, values: Float32[np.ndarray, "A"], kind: str, answers: int) -> None:
        """Send an action."""
        timeout = min(1 / self.rate, self._silence)
        with self._numbering:
            fields = {"sequence": self._sequence, "time": time.monotonic(), "kind": kind, "answers": answers}
            self._sequence += 1
            self._connection.send(WireMessage(type="action", fields=fields, arrays={"action": values}), timeout=timeout)

    def _reset(self, seed: int | None, options: Mapping[str, Any] | None) -> None:
        """Request a new episode."""
        with self._changed:
            self._awaited += 1
            self._newest = None
        self._connection.send(WireMessage(type="reset", fields={"seed": seed, "options": dict(options or {})}))

    def close(self) -> None:
        """End the session and close the link; the plant then applies its own safe action."""
        if self._failure is None:
            try:
                self._connection.send(WireMessage(type="bye"), timeout=0.2)
                # An immediate close would discard data that the plant has not read yet, even the last action.
                self._connection.finish()
                self._thread.join(timeout=0.3)
            except LinkError:
                self.counts["unsaid goodbyes"] += 1
        super().close()
        self._connection.close()
        self._thread.join(timeout=1.0)

    def _greeting(self, timeout: float) -> dict[str, Any]:
        message = self._connection.receive(timeout)
        if message is None:
            raise LinkError(
                f"{self.address} accepted the connection but sent no greeting within {timeout:g} s; disconnect "
                f"other agents, or restart the plant"
            )
        if message.type != "hello" or message.fields.get("version") != VERSION:
            raise LinkError(
                f"expected a greeting of version {VERSION}; got {message.type!r} {dict(message.fields)}. "
                "Use the same version of worldloom on both sides"
            )
        return dict(message.fields)

    def _listen(self) -> None:
        try:
            while self._failure is None:
                message = self._connection.receive(min(self._silence / 4, 0.25))
                now = time.monotonic()
                if now - self._connection.sent > self._silence / 4:
                    self._connection.send(WireMessage(type="heartbeat", fields={"time": now}))
                if message is None:
                    if now - self._connection.received > self._silence:
                        raise LinkError(
                            f"the plant has sent nothing for {self._silence:g} s; check the plant and the network"
                        )
                elif message.type == "observation":
                    self._observed(message, now)
                elif message.type == "error":
                    raise LinkError(
                        f"the plant reports: {str(message.fields.get('message'))[:500]}. Check the plant's log"
                    )
                elif message.type == "bye":
                    raise LinkError("the plant ended the session; start the plant again")
        except LinkError as error:
            self._fail(error)
        except BaseException as error:  # without this thread, the link would be silent
            self._fail(LinkError(f"the link raised {type(error).__name__}: {error}. Open a new link"))
            raise
        finally:
            self._connection.close()

    def _observed(self, message: WireMessage, now: float) -> None:
        fields, arrays = message.fields, dict(message.arrays)
        pixels, vector = arrays.pop("pixels", None), arrays.pop("vector", None)
        try:
            if any(abs(int(fields.get(name, 0))) >= _COUNT for name in ("sequence", "episode", "unanswered")):
                raise ValueError("a count is too large")
            if not np.isfinite(float(fields["time"])):
                raise ValueError("the time is not finite")
            reading = PlantReading(
                pixels=pixels,
                vector=vector,
                labels={name.removeprefix("label/"): values.reshape(-1) for name, values in arrays.items()},
                sequence=int(fields["sequence"]),
                sent=float(fields["time"]),
                arrived=now,
                episode=int(fields.get("episode", 0)),
                safe=bool(fields.get("safe", False)),
                unanswered=int(fields.get("unanswered", 0)),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise LinkError(
                f"an observation has no valid sequence number or time ({error!r}). Correct the plant's messages as "
                f"described in docs/deploy.md"
            ) from None
        overdue = fields.get("overdue")
        if isinstance(overdue, list):
            self.overdue = [*self.overdue, *(number for number in overdue if isinstance(number, int))][-_OVERDUE:]
        if reading.episode >= self._awaited:
            self._put(reading)
        else:
            self.counts["before the reset"] += 1
            self._last = max(self._last, reading.sequence)


def _check_size(observation: ObservationSpec) -> None:
    """Check that an observation fits into a message, before memory of its size is allocated."""
    size = 4 * observation.vector + (0 if observation.pixels is None else math.prod(observation.pixels))
    if size > BODY_LIMIT:
        raise DataError(f"an observation has {size:,} bytes; a message has at most {BODY_LIMIT:,}")


def _safe_action(stated: Any, action: ActionSpec) -> Float32[np.ndarray, "A"] | None:
    """Return the safe action that a plant states in its greeting; None if it states none."""
    if stated is None:
        return None
    with np.errstate(over="ignore"):
        values = np.array(stated, np.float32)
    if values.shape != (action.size,) or not np.isfinite(values).all():
        raise ValueError(f"the safe action {str(stated)[:200]} does not have {action.size} finite values")
    return values


def greeting(
    observation: ObservationSpec, action: ActionSpec, rate: float, safe_action: np.ndarray, name: str
) -> WireMessage:
    """Return the greeting, the first message of a plant."""
    fields = {
        "version": VERSION,
        "role": "plant",
        "name": name,
        "observation": asdict(observation),
        "action": asdict(action),
        "rate": rate,
        "safe_action": [float(value) for value in safe_action],
        "time": time.monotonic(),
    }
    return WireMessage(type="hello", fields=fields)
