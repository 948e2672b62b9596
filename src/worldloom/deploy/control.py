"""A control loop on a plant's clock, with one command per period: a plan that is ready in time, or the safe action.

Period k begins at start + k / rate on the monotonic clock, so timing errors do not accumulate. In each period the loop
reads the newest observation, the agent plans in another thread, and the loop sends the action once it is ready. An
action that is not ready by the deadline is a *miss*: the loop sends the safe action, and logs the miss with its time
and cause. A second thread, the watchdog, sends the safe action if the loop sends nothing.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from worldloom.core.errors import ConfigError, DataError, PlanningError, WorldloomError
from worldloom.core.seams import Agent
from worldloom.core.types import Goal
from worldloom.deploy.link import Link, PlantReading
from worldloom.deploy.newest import Newest
from worldloom.deploy.sparing_log import SparingLog
from worldloom.deploy.wire import LinkError

_log = logging.getLogger(__name__)

# The share of the time before the deadline that the agent may use for planning; the rest is for sending the action.
_PLANNING_SHARE = 0.8
_TICK = 0.25  # seconds between two looks at the link and at `stop`, while nothing else happens
_KEPT = 100_000  # entries of each list of a report
_WATCHDOG_FAILED = "the loop's watchdog cannot reach the plant; the plant's own watchdog must act: %s"


SafeAction = Literal["hold"] | Sequence[float] | Callable[[PlantReading | None], np.ndarray]
"""The command if no plan is ready in time: the last action ("hold"), a constant, or a function of the last reading.

The function is called once per period, before planning, and must return at once.
"""

Late = Literal["discard", "use if fresh"]
Command = Literal["agent", "late", "safe", "watchdog"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The start and the deadline of each period, in seconds of the monotonic clock."""

    start: float
    period: float
    deadline: float

    def begins(self, number: int) -> float:
        """Return the time at which a period begins."""
        return self.start + number * self.period

    def due(self, number: int) -> float:
        """Return the deadline of a period's action."""
        return self.begins(number) + self.deadline

    def at(self, now: float) -> int:
        """Return the period that contains the time `now`."""
        number = int((now - self.start) // self.period)
        # Rounding may put the beginning of a period into the previous one.
        return number + 1 if self.begins(number + 1) <= now else number


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A period whose action was not ready by the deadline; `seconds` is this deadline, since the start of the loop."""

    period: int
    seconds: float
    cause: str
    observation: int


@dataclass(kw_only=True)
class Period:
    """The record of one period; times are in seconds since the beginning of the period."""

    number: int
    began: float = 0.0  # the time at which the loop woke up
    observation: int = -1
    age: float | None = None  # age of the observation when the loop read it
    sent: float | None = None
    kind: Command | None = None


@dataclass(kw_only=True)
class ControlReport:
    """The record of a control loop's run; `to_json` returns its figures.

    Each list keeps its newest 100,000 entries, more than an hour at 20 Hz; misses and acts of the watchdog have lists
    of their own and so are kept for longer. Counts cover the complete run. Percentiles cover only the entries that are
    kept.
    """

    rate: float
    deadline: float
    safe_action: str
    late: str
    periods: Newest[Period] = field(default_factory=lambda: Newest(_KEPT, key=lambda period: period.kind or "none"))
    misses: Newest[Miss] = field(default_factory=lambda: Newest(_KEPT, key=lambda miss: miss.cause))
    plans: Newest[float] = field(default_factory=lambda: Newest(_KEPT))  # duration of each call of the agent in seconds
    watchdog: Newest[tuple[int, float]] = field(
        default_factory=lambda: Newest(_KEPT)
    )  # period, seconds after the deadline
    stale: Newest[int] = field(default_factory=lambda: Newest(_KEPT))  # periods without a new observation
    skipped: Newest[int] = field(default_factory=lambda: Newest(_KEPT))  # observations that no period used
    unanswered: int = 0  # periods without a command, counted by the plant
    start: float = 0.0  # the beginning of period 0 on the monotonic clock
    restarts: int = 0  # number of agent resets after gaps in its history
    link: dict[str, int] = field(default_factory=dict)
    ended: str = "running"

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values. Times are in ms; the times of misses are in seconds since the start."""
        sent = [period.number / self.rate + period.sent for period in self.periods if period.sent is not None]
        wakes = [period.number / self.rate + period.began for period in self.periods]
        span = wakes[-1] - wakes[0] if len(wakes) > 1 else 0.0
        return {
            "periods": self.periods.total,
            "rate": self.rate,
            "rate_held": round((self.periods[-1].number - self.periods[0].number) / span, 4) if span > 0 else None,
            "deadline_ms": round(1e3 * self.deadline, 3),
            "safe_action": self.safe_action,
            "late_plans": self.late,
            "ended": self.ended,
            "commands": dict(self.periods.kinds),
            "misses": self.misses.total,
            "miss_causes": dict(self.misses.kinds),
            "missed": [asdict(miss) | {"seconds": round(miss.seconds, 4)} for miss in self.misses],
            "jitter_ms": _percentiles([period.began for period in self.periods]),
            "plan_ms": _percentiles(self.plans),
            "command_ms": _percentiles([period.sent for period in self.periods if period.sent is not None]),
            "observation_age_ms": _percentiles([period.age for period in self.periods if period.age is not None]),
            "longest_without_command_ms": round(1e3 * float(np.diff(sent).max()), 3) if len(sent) > 1 else None,
            "watchdog_acts": [[number, round(1e3 * after, 3)] for number, after in self.watchdog],
            "stale_observations": self.stale.total,
            "skipped_observations": self.skipped,
            "unanswered_by_plant": self.unanswered,
            "agent_restarts": self.restarts,
            "link": self.link,
        }


class ControlLoop:
    """Drives a plant with an agent, with one command per period.

    `rate` must be the link's rate (the default), because the plant's watchdog counts periods at that rate. `deadline`
    is in seconds after the beginning of a period, at most one period. `safe_action` (see `SafeAction`) has no default;
    "hold" sends nothing before the first action. An observation older than `max_age` (default: two periods) is not
    used; the period then also counts as a miss. By default, a plan that is ready only in a later period is discarded.
    With `late="use if fresh"`, the plan is used in the later period if the plan's observation is not older than
    `max_age`. A period in which the agent gets no observation is a gap in the agent's history; the agent is then reset
    with the same goal. `watchdog=False` disables the watchdog thread. `on_period(report)` is called at the end of each
    period and must return at once.

    Every command, including the safe action, satisfies the agent's guardrails on actions. With a limit on changes of
    the action, the commands therefore approach the safe action step by step.

    Raises:
        ConfigError: the rate differs from the link's, the deadline is not within a period, or the plant or the agent's
            guardrails do not accept the safe action.
    """

    def __init__(
        self,
        agent: Agent,
        link: Link,
        *,
        deadline: float,
        safe_action: SafeAction,
        rate: float | None = None,
        late: Late = "discard",
        max_age: float | None = None,
        watchdog: bool = True,
        on_period: Callable[[ControlReport], object] | None = None,
    ) -> None:
        self._rate = link.rate if rate is None else float(rate)
        if self._rate != link.rate:
            raise ConfigError(
                f"the plant sends {link.rate:g} observations per second; got rate={self._rate:g}. Leave out 'rate'"
            )
        period = 1 / self._rate
        if not 0 < deadline <= period:
            raise ConfigError(
                f"'deadline' must be above 0 and at most the period, {1e3 * period:g} ms; got {1e3 * deadline:g} ms"
            )
        self._link, self._deadline = link, deadline
        self._late, self._max_age = late, 2 * period if max_age is None else max_age
        self._guarded, self._on_period = watchdog, on_period
        self._safe_rule, self._safe = _safe_rule(safe_action, link)
        if self._safe is not None and not np.allclose(nearest := agent.limited(self._safe, None), self._safe, atol=0):
            raise ConfigError(
                f"the agent's guardrails do not permit the safe action {self._safe.tolist()}; the nearest permitted "
                f"action is {np.round(nearest, 6).tolist()}. Declare a safe action that the guardrails permit"
            )
        described = "a function" if callable(safe_action) else str(safe_action)
        self.report = ControlReport(rate=self._rate, deadline=deadline, safe_action=described, late=late)
        self._stopping, self._asked_to_stop = threading.Event(), False
        self._commanding = threading.Lock()
        self._schedule: Schedule | None = None
        self._commanded = -1  # the last period with a command
        self._last: np.ndarray | None = None  # the agent's last action
        self._applied = link.applied()  # by the plant, as the agent knows it
        self._period = Period(number=-1)
        self._unanswered_before: int | None = None
        self.reading: PlantReading | None = None
        """The latest reading that a period used."""
        self._misses_said, self._watchdog_said = SparingLog(_log), SparingLog(_log)
        self._watchdog_failed = SparingLog(_log)
        self._agent, self._worker = agent, _Worker(agent)

    def stop(self) -> None:
        """Stop `run` cleanly. Signal handlers and other threads can call this."""
        self._asked_to_stop = True
        self._stopping.set()

    def aim(self, goal: Goal) -> None:
        """Set a new goal for the agent during `run`; it takes effect with the next observation."""
        self._worker.aim(goal)

    def run(self, goal: Goal, *, duration: float | None = None) -> ControlReport:
        """Drive the plant toward a goal (a batch of one) for `duration` seconds, or until `stop` or Ctrl-C.

        The last command is the safe action or, with a limit on changes, the permitted action nearest to it. After an
        error, `report` contains the periods before the error.

        Raises:
            LinkError: the link broke.
            ConfigError: the loop has already run.
            WorldloomError: the agent raised an error.
        """
        if self.report.ended != "running" or self._schedule is not None:
            raise ConfigError("a control loop can run only once; create a new control loop")
        self._worker.aim(goal)
        # Python's interval for switching threads during planning; the default of 5 ms can be a tenth of a period.
        switching = sys.getswitchinterval()
        sys.setswitchinterval(min(switching, 0.001))
        ended = "failed"
        try:
            reading = self._receive(time.monotonic() + max(2.0, 4 / self._rate))
            if reading is not None:
                self._worker.prepare(reading, self._applied)
            first = self._receive(time.monotonic() + max(2.0, 4 / self._rate))
            if first is not None:
                self._drive(first, duration)
            elif not self._stopping.is_set():
                raise LinkError("no observation arrived at the start; check that the plant sends observations")
            ended = "stopped" if self._asked_to_stop else "done"
        except KeyboardInterrupt:
            ended = "interrupted"
        except WorldloomError as error:
            ended = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._stopping.set()
            sys.setswitchinterval(switching)
            self._worker.stop()
            self._leave_safe()
            self.report.ended = ended
            self.report.link = dict(self._link.counts)
        return self.report

    def _drive(self, first: PlantReading, duration: float | None) -> None:
        period = 1 / self._rate
        # The loop wakes up shortly after the plant's observations arrive, so that network jitter does not matter.
        start = first.arrived + 0.05 * period
        while start < time.monotonic():
            start += period
        schedule = Schedule(start=start, period=period, deadline=self._deadline)
        with self._commanding:
            self._schedule, self.report.start = schedule, schedule.start
        watching = threading.Thread(target=self._watch, name="worldloom-watchdog", daemon=True)
        if self._guarded:
            watching.start()
        reading, number = first, 0
        until = float("inf") if duration is None else schedule.start + duration - period / 2
        try:
            while not self._stopping.is_set() and schedule.begins(number) < until:
                while schedule.begins(number) - time.monotonic() > _TICK and not self._stopping.wait(_TICK):
                    self._link.check()
                _sleep_until(schedule.begins(number), self._stopping)
                if self._stopping.is_set():
                    break
                now = time.monotonic()
                current = schedule.at(now)
                for gone in range(number, current):
                    # This thread did not run, because the machine was busy or other code held the GIL.
                    self._missed(gone, "the loop was held up", self._period.observation)
                    after = dict(self.report.watchdog).get(gone)
                    self.report.periods.append(
                        Period(
                            number=gone,
                            began=now - schedule.begins(gone),
                            sent=None if after is None else schedule.deadline + after,
                            kind=None if after is None else "watchdog",
                        )
                    )
                    self._worker.mark_gap()
                reading = self._one(schedule, current, reading)
                number = current + 1
        finally:
            self._stopping.set()
            if self._guarded:
                watching.join(timeout=1.0)

    def _one(self, schedule: Schedule, number: int, before: PlantReading) -> PlantReading:
        """Run one period, and return the latest reading."""
        began, due, worker = schedule.begins(number), schedule.due(number), self._worker
        period = Period(number=number, began=time.monotonic() - began)
        self._period = period
        # Wait for a late observation, but leave half of the time before the deadline for planning.
        reading = self._receive(began + self._deadline / 2) or before
        fresh = reading.sequence != before.sequence or not self.report.periods
        if fresh:
            self.report.skipped += range(before.sequence + 1, reading.sequence)
        else:
            self.report.stale.append(number)
        self.reading = reading
        self._hear_of_overdue()
        if fresh and number > 1:  # the first commands are in transit
            if self._unanswered_before is None:
                self._unanswered_before = reading.unanswered
            self.report.unanswered = reading.unanswered - self._unanswered_before
        now = time.monotonic()
        period.observation, period.age = reading.sequence, now - reading.arrived
        if self._safe_rule is not None:
            self._safe = self._link.action.clip(self._safe_rule(reading))
        cause = None
        if period.age > self._max_age:
            cause = "no observation came"
            worker.mark_gap()
        elif worker.busy:
            cause = self._take_late(period, due)
        else:
            if not _equal(applied := self._link.applied(), self._applied):
                worker.mark_gap()  # the plant has replaced the last command by its safe action
            worker.ask(reading, now + _PLANNING_SHARE * (due - now), applied)
            cause = self._take(period, due, "agent")
        if cause is not None:
            self._command(period, None, "safe")
            if not self._stopping.is_set():  # a period that `stop` ends is not a miss
                self._missed(number, cause, reading.sequence)
        self.report.plans += worker.times()
        self.report.restarts = worker.restarts
        self.report.periods.append(period)
        if self._on_period is not None:
            self._on_period(self.report)
        return reading

    def _receive(self, until: float) -> PlantReading | None:
        """Return the newest observation, or None if none has arrived at the time `until` or when the loop stops."""
        reading = None
        while reading is None and not self._stopping.is_set():
            left = until - time.monotonic()
            reading = self._link.receive(min(max(left, 0.0), _TICK))
            if left <= _TICK:
                break
        return reading

    def _hear_of_overdue(self) -> None:
        """Count actions as misses if they were sent in time but reached the plant late."""
        numbers, self._link.overdue = self._link.overdue, []
        if not numbers:
            return
        missed = {miss.period for miss in self.report.misses[-200:]}
        recent = (period for period in self.report.periods[-200:] if period.kind == "agent")
        answered = {period.observation: period.number for period in recent if period.number not in missed}
        for number in numbers:
            if (period := answered.pop(number, None)) is not None:
                self._missed(period, "the action reached the plant late", number)

    def _take(self, period: Period, due: float, kind: Command) -> str | None:
        """Wait until `due` for the agent's action and send it; return the cause of a miss, or None."""
        worker = self._worker
        answer = worker.wait(due, self._stopping)
        if answer is None:
            return "the plan was late"
        if answer.error is not None:
            self._command(period, None, "safe")
            raise answer.error
        try:
            action = self._link.action.clip(answer.action)
        except DataError as error:
            worker.mark_gap()
            _log.warning("%s", error)
            return "the action was not valid"
        if time.monotonic() > due:  # the plan was ready, but this thread was not running
            worker.mark_gap()
            return "the loop was held up"
        if not self._command(period, action, kind, answer.sequence):
            worker.mark_gap()
            return "the watchdog was first"
        if period.sent is not None and period.sent > self._deadline:
            self._missed(period.number, "sent too late", period.observation)
        return None

    def _take_late(self, period: Period, due: float) -> str | None:
        """Use the unfinished plan of an earlier period if `late` allows it, else discard the plan.

        Return the cause of a miss, or None.
        """
        self._worker.mark_gap()
        asked = self._worker.asked
        if self._late == "use if fresh" and asked is not None:
            answer_by = min(due, asked.arrived + self._max_age)
            if answer_by > time.monotonic():
                cause = self._take(period, answer_by, "late")
                return "the planner was still busy" if cause == "the plan was late" else cause
        return "the planner was still busy"

    def _command(self, period: Period, action: np.ndarray | None, kind: Command, answers: int | None = None) -> bool:
        """Send one command for a period (None: the safe action); return False if the period already has one."""
        with self._commanding:
            if self._commanded >= period.number:
                return False
            self._commanded = period.number
            values = self._safe_values() if action is None else action
            if values is None:
                return True
            permitted = self._send(values, kind, period.observation if answers is None else answers)
            if kind in ("agent", "late"):
                self._last = permitted
                if not np.array_equal(permitted, values):
                    self._worker.mark_gap()  # the agent's history contains an action that was not applied
            assert self._schedule is not None
            period.sent, period.kind = time.monotonic() - self._schedule.begins(period.number), kind
            return True

    def _send(self, values: np.ndarray, kind: str, answers: int) -> np.ndarray:
        """Send the nearest action that the guardrails permit after the one that the plant applies, and return it."""
        permitted = self._agent.limited(values, self._link.applied())
        self._link.send(permitted, kind=kind, answers=answers)
        self._applied = permitted
        return permitted

    def _safe_values(self) -> np.ndarray | None:
        return self._last if self._safe is None else self._safe

    def _missed(self, number: int, cause: str, observation: int) -> None:
        seconds = number / self._rate + self._deadline
        self.report.misses.append(Miss(period=number, seconds=seconds, cause=cause, observation=observation))
        self._misses_said.log(logging.WARNING, "period %d, %.3f s: deadline missed, %s", number, seconds, cause)

    def _watch(self) -> None:
        """Send the safe action in each period in which the loop sent nothing until shortly after the deadline."""
        schedule = self._schedule
        assert schedule is not None
        grace = 0.1 * schedule.period
        number = 0
        while not self._stopping.is_set():
            _sleep_until(schedule.due(number) + grace, self._stopping)
            now = time.monotonic()
            if self._stopping.is_set():
                return
            current = max(number, schedule.at(now - schedule.deadline - grace))
            period = self._period if self._period.number == current else Period(number=current)
            if period.observation < 0:
                period.observation = self._period.observation
            try:
                if self._commanded < current and self._command(period, None, "watchdog"):
                    self.report.watchdog.append((current, time.monotonic() - schedule.due(current)))
                    self._watchdog_said.log(logging.WARNING, "period %d: the watchdog sent the safe action", current)
            except BaseException as error:  # also of the user's `write`; the watchdog tries again in the next period
                self._watchdog_failed.log(logging.ERROR, _WATCHDOG_FAILED, error)
            number = current + 1

    def _leave_safe(self) -> None:
        values = self._safe_values()
        if values is None:
            return
        try:
            with self._commanding:
                self._send(values, "safe", -1)
        except Exception as error:
            _log.error("the last safe action could not be sent; the plant's own watchdog must act: %s", error)


def _safe_rule(
    safe_action: SafeAction, link: Link
) -> tuple[Callable[[PlantReading | None], np.ndarray] | None, np.ndarray | None]:
    """Return the function that computes the safe action (None for a constant), and the current values.

    Both are None for "hold".
    """
    if isinstance(safe_action, str):
        if safe_action != "hold":
            raise ConfigError(f"'safe_action' must be 'hold', values or a function; got {safe_action!r}")
        return None, None
    values = np.asarray(safe_action(None) if callable(safe_action) else safe_action, np.float32).reshape(-1)
    low, high = (np.array(bound, np.float32) for bound in (link.action.low, link.action.high))
    if values.size != link.action.size or not bool(((values >= low) & (values <= high)).all()):
        raise ConfigError(
            f"the plant does not accept the safe action {values.tolist()}; expected {link.action.size} values from "
            f"{low.tolist()} to {high.tolist()}"
        )
    return (safe_action if callable(safe_action) else None), values


@dataclass(frozen=True, kw_only=True)
class _Answer:
    sequence: int = -1
    action: np.ndarray | None = None
    error: WorldloomError | None = None


class _Worker:
    """Calls the agent in another thread, one observation at a time."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._goal: Goal | None = None
        self._changed = threading.Condition()
        self._request: PlantReading | None = None
        self._deadline = float("inf")
        self._applied: np.ndarray | None = None
        self._answer: _Answer | None = None
        self._times: list[float] = []
        self._gap = self._aimed = self._stopped = False
        self.asked: PlantReading | None = None
        self.restarts = 0

    def prepare(self, reading: PlantReading, applied: np.ndarray | None) -> None:
        """Warm up the agent with two calls, because the first calls are slow, and start the thread.

        `applied` is the action that the plant is applying.
        """
        for _ in range(2):
            self._begin(applied)
            self._agent.act(reading.observations())
        self._begin(applied)
        self._aimed = False
        threading.Thread(target=self._run, name="worldloom-planner", daemon=True).start()

    def aim(self, goal: Goal) -> None:
        """Set a new goal for the next observation."""
        with self._changed:
            self._goal, self._aimed = goal, True

    def _begin(self, applied: np.ndarray | None) -> None:
        assert self._goal is not None
        self._agent.reset(self._goal)
        if applied is not None:
            self._agent.resume(torch.from_numpy(applied)[None])

    @property
    def busy(self) -> bool:
        """Whether the agent is planning."""
        with self._changed:
            return self._request is not None

    def ask(self, reading: PlantReading, deadline: float, applied: np.ndarray | None) -> None:
        """Request an action for an observation, after the action `applied` of the plant.

        An anytime agent ends its search by the deadline.
        """
        with self._changed:
            self._request, self._deadline, self._applied = reading, deadline, applied
            self.asked = reading
            self._answer = None
            self._changed.notify_all()

    def mark_gap(self) -> None:
        """Reset the agent before the next observation, because a period is missing in the agent's history."""
        with self._changed:
            self._gap = True

    def wait(self, until: float, stopping: threading.Event) -> _Answer | None:
        """Return the answer to the last request, or None if it is not ready at the time `until`."""
        with self._changed:
            while self._answer is None and (left := until - time.monotonic()) > 0 and not stopping.is_set():
                self._changed.wait(min(left, _TICK))  # `stopping` does not notify
            answer, self._answer = self._answer, None
            if answer is None:
                self._gap = True
            return answer

    def times(self) -> list[float]:
        """Return the durations in seconds of the agent calls that have ended since the last call of `times`."""
        with self._changed:
            times, self._times = self._times, []
            return times

    def stop(self) -> None:
        """End the thread after the agent returns."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._request is not None)
                if self._stopped:
                    return
                request, deadline, gap, aimed = self._request, self._deadline, self._gap, self._aimed
                applied = self._applied
                self._gap = self._aimed = False
            assert request is not None
            began = time.monotonic()
            try:
                if gap or aimed:
                    self._begin(applied)
                    self.restarts += gap
                observations = request.observations()
                action = self._agent.act_by(deadline, observations)[0].detach().cpu().numpy()
                answer = _Answer(sequence=request.sequence, action=action)
            except WorldloomError as error:
                answer = _Answer(error=error)
            except BaseException as error:  # also an exit: the loop's thread raises it after it sends the safe action
                failure = PlanningError(f"the agent raised {type(error).__name__}: {error}. Repair the agent")
                failure.__cause__ = error
                answer = _Answer(error=failure)
            with self._changed:
                self._times.append(time.monotonic() - began)
                self._answer, self._request = answer, None
                self._changed.notify_all()


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def _sleep_until(moment: float, stopping: threading.Event) -> None:
    """Sleep until `moment`, precise to a fraction of a millisecond. A plain sleep at the end gives this precision."""
    while (left := moment - time.monotonic()) > 0 and not stopping.is_set():
        if left > 0.004:
            stopping.wait(left - 0.002)
        else:
            time.sleep(left)


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    values = 1e3 * np.asarray(seconds)
    names = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    return {"n": float(len(values)), **{name: round(float(np.percentile(values, at)), 3) for name, at in names.items()}}
