"""The control loop on a plant that runs on its own clock.

A slow planner here takes ten periods, so that what must happen does not depend on how fast the machine is.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import ConfigError, PlanningError
from worldloom.core.seams import Agent
from worldloom.core.types import ActionSpec, Goal, Observations, ObservationSpec
from worldloom.deploy import CallbackLink, ControlLoop, ControlReport, SocketLink, draw_timeline
from worldloom.deploy.control import Miss, Period, Schedule
from worldloom.deploy.link import PlantReading
from worldloom.deploy.plant import PlantServer
from worldloom.deploy.wire import LinkError

RATE, PERIOD = 20.0, 0.05
ACTION = ActionSpec(low=(-1.0,), high=(1.0,))
GOAL = Goal(observations=Observations.from_numpy(None, np.zeros((1, 1))))
SAFE = [-0.5]


@dataclass
class Plant:
    """What was applied, in order; the observation counts the periods."""

    server: Any = None
    written: list[float] = field(default_factory=list)
    frozen: threading.Event = field(default_factory=threading.Event)
    thawed: threading.Event = field(default_factory=threading.Event)
    seen: int = 0

    def read(self) -> PlantReading:
        if self.frozen.is_set():
            self.thawed.wait(30)
        self.seen += 1
        return PlantReading(vector=np.array([self.seen], np.float32))

    def write(self, action: np.ndarray) -> None:
        self.written.append(round(float(action[0]), 4))

    @property
    def kinds(self) -> list[str]:
        return [kind for _, kind, _ in self.server.log.actions]


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    plant = Plant()
    plant.server = PlantServer(
        plant.read,
        plant.write,
        observation=ObservationSpec(vector=1),
        action=ACTION,
        rate=RATE,
        safe_action=np.array([-0.25], np.float32),
        address=f"unix:{tmp_path / 's'}",
        silence=10.0,
    )
    serving = threading.Thread(target=plant.server.serve)
    serving.start()
    yield plant
    plant.thawed.set()
    plant.server.stop()
    serving.join(timeout=20)
    assert not serving.is_alive()


@pytest.fixture
def link(plant: Plant) -> Iterator[SocketLink]:
    with SocketLink(plant.server.address, silence=10.0) as link:
        yield link


class Counting(Agent):
    """Its n-th action is n hundredths, so that each can be told apart; `slow` calls take ten periods."""

    def __init__(self, slow: Callable[[int], bool] = lambda n: False) -> None:
        self.calls = self.resets = 0
        self.given: list[float] = []
        self.goals: list[float] = []
        self._slow = slow

    def reset(self, goal: Goal) -> None:
        assert goal.observations.vector is not None
        self.resets += 1
        self.goals.append(float(goal.observations.vector[0, 0]))

    def act(self, observations: Observations) -> torch.Tensor:
        self.calls += 1
        if self._slow(self.calls):
            time.sleep(10 * PERIOD)
        self.given.append(round(self.calls / 100, 4))
        return torch.tensor([[self.given[-1]]])


class Limited(Counting):
    """Jumps between its bounds; its guardrails permit actions up to 0.6, and changes of up to 0.2."""

    def __init__(self, slow: Callable[[int], bool] = lambda n: False) -> None:
        super().__init__(slow)
        self.resumed: list[float] = []

    def act(self, observations: Observations) -> torch.Tensor:
        return super().act(observations) * 0 + (1.0 if self.calls % 8 < 4 else -1.0)

    def resume(self, taken: torch.Tensor) -> None:
        self.resumed.append(float(taken[0, 0]))

    def limited(self, action: np.ndarray, taken: np.ndarray | None) -> np.ndarray:
        action = action.clip(-0.6, 0.6)
        return action if taken is None else action.clip(taken - 0.2, taken + 0.2)


def loop_of(agent: Any, link: SocketLink, **options: Any) -> ControlLoop:
    return ControlLoop(agent, link, **{"deadline": 0.8 * PERIOD, "safe_action": SAFE} | options)


def unnoticed(report: ControlReport, plant: Plant) -> set[int]:
    """Return the observations that by the plant's log nobody planned for in time, and that the report does not name.

    What became of the last action is not told any more.
    """
    used = [period.observation for period in report.periods if period.observation >= 0]
    sent = {number: at for number, at in plant.server.log.observations if used[0] <= number < used[-2]}
    answered = {
        number
        for number, kind, at in plant.server.log.actions
        if kind == "agent" and number in sent and at < sent[number] + PERIOD
    }
    late = {period.observation for period in report.periods if period.kind == "late"}
    return set(sent) - answered - {miss.observation for miss in report.misses} - set(report.skipped) - late


@given(st.floats(0, 1e7), st.floats(0.5, 1000), st.integers(0, 10**7))
def test_no_error_adds_up(start: float, rate: float, number: int) -> None:
    schedule = Schedule(start=start, period=1 / rate, deadline=0.5 / rate)
    assert schedule.begins(number) == start + number * (1 / rate)
    assert schedule.at(schedule.due(number)) == number
    assert schedule.at(schedule.begins(number)) == number


def test_a_quick_agent_commands_every_period_and_the_safe_action_ends_it(plant: Plant, link: SocketLink) -> None:
    agent = Counting()
    report = loop_of(agent, link).run(GOAL, duration=1.0)
    assert report.ended == "done"
    assert [period.number for period in report.periods] == list(range(20))
    assert "agent" in plant.kinds
    sent = [value for value in plant.written if value > 0]
    assert sent == [value for value in agent.given if value in sent]  # in order, each once
    assert unnoticed(report, plant) == set()
    link.close()
    assert (plant.kinds[-1], [value for value in plant.written if value != -0.25][-1]) == ("safe", SAFE[0])


def test_a_late_plan_is_replaced_counted_and_thrown_away(plant: Plant, link: SocketLink) -> None:
    agent = Counting(slow=lambda n: n == 6)
    report = loop_of(agent, link, max_age=15 * PERIOD).run(GOAL, duration=1.5)
    assert {"the plan was late", "the planner was still busy"} <= {miss.cause for miss in report.misses}
    assert len(report.misses) >= 9
    assert 0.06 in agent.given
    assert 0.06 not in plant.written  # it came, and too late
    assert any(value > 0.06 for value in plant.written)  # and the agent went on
    # What left in time and came late to the plant, on a machine that is busy, was sent as it was planned.
    replaced = {
        miss.period for miss in report.misses if miss.cause in ("the plan was late", "the planner was still busy")
    }
    assert len(replaced) >= 9
    assert all(
        period.kind in ("safe", "watchdog") for period in report.periods if period.number in replaced and period.sent
    )
    assert agent.resets >= 4  # three at the start, and one after the hole in its history
    assert report.restarts >= 1
    assert unnoticed(report, plant) == set()


class Anytime(Counting):
    """Thinks as long as it may."""

    def act_by(self, deadline: float, observations: Observations) -> torch.Tensor:
        time.sleep(max(0.0, deadline - time.monotonic()))
        return self.act(observations)


def test_an_agent_that_plans_any_time_is_told_when_its_action_is_due(plant: Plant, link: SocketLink) -> None:
    agent = Anytime()
    report = loop_of(agent, link).run(GOAL, duration=1.0)
    assert len(report.misses) <= 2, "what thinks until its deadline is in time"
    assert any(value in plant.written for value in agent.given[-10:])
    assert min(report.plans) > 0.1 * PERIOD, "and it is given most of the time there is"


def test_a_late_plan_may_be_used_while_it_is_fresh(plant: Plant, link: SocketLink) -> None:
    agent = Counting(slow=lambda n: n == 6)
    report = loop_of(agent, link, late="use if fresh", max_age=15 * PERIOD).run(GOAL, duration=1.5)
    assert 0.06 in plant.written
    assert "late" in plant.kinds
    assert report.misses
    assert unnoticed(report, plant) == set()


def test_a_late_plan_that_is_not_fresh_is_thrown_away(plant: Plant, link: SocketLink) -> None:
    agent = Counting(slow=lambda n: n == 6)
    loop_of(agent, link, late="use if fresh", max_age=3 * PERIOD).run(GOAL, duration=1.5)
    assert 0.06 in agent.given
    assert 0.06 not in plant.written


def test_a_planner_that_hangs_does_not_hold_up_the_loop(plant: Plant, link: SocketLink) -> None:
    free = threading.Event()

    class Hanging(Counting):
        def act(self, observations: Observations) -> torch.Tensor:
            if self.calls == 4:
                free.wait(60)
            return super().act(observations)

    report = loop_of(Hanging(), link).run(GOAL, duration=1.0)
    assert (report.ended, len(report.periods)) == ("done", 20)
    assert len(report.misses) >= 16
    assert unnoticed(report, plant) == set()
    link.close()
    assert SAFE[0] in plant.written
    assert [value for value in plant.written if value != -0.25][-1] == SAFE[0]
    free.set()


def test_holding_repeats_the_last_action(plant: Plant, link: SocketLink) -> None:
    report = loop_of(Counting(slow=lambda n: n >= 6), link, safe_action="hold").run(GOAL, duration=1.0)
    safe = [number for number, (_, kind, _) in enumerate(plant.server.log.actions) if kind == "safe"]
    assert safe
    assert report.misses
    actions = [value for value in plant.written if value != -0.25]  # but for the plant's own
    assert set(actions) <= {0.03, 0.04, 0.05}
    assert actions == sorted(actions)


def test_a_function_is_given_the_last_observation(plant: Plant, link: SocketLink) -> None:
    def retreat(reading: PlantReading | None) -> np.ndarray:
        return np.array([-1.0 if reading is None else -0.001 * float(reading.vector[0])], np.float32)  # type: ignore[index]

    report = loop_of(Counting(slow=lambda n: n >= 4), link, safe_action=retreat).run(GOAL, duration=1.0)
    used = {round(-0.001 * (period.observation + 1), 4) for period in report.periods}
    assert {value for value in plant.written if -0.25 < value < 0} <= used
    assert len({value for value in plant.written if -0.25 < value < 0}) > 3


@pytest.mark.parametrize("safe", [SAFE, "hold", lambda reading: np.array([1.0 if reading else 0.0])])
def test_every_command_obeys_the_agents_guardrails_on_actions(
    link: SocketLink, safe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[float, float]] = []
    send = link.send

    def noted(action: np.ndarray, **options: Any) -> None:
        applied = link.applied()
        assert applied is not None
        given.append((float(applied[0]), float(action[0])))
        send(action, **options)

    monkeypatch.setattr(link, "send", noted)
    agent = Limited(slow=lambda n: n == 12)
    report = loop_of(agent, link, safe_action=safe).run(GOAL, duration=40 * PERIOD)
    assert {"agent", "safe"} <= {period.kind for period in report.periods}
    assert len(given) > 20
    assert max(abs(action) for _, action in given) <= 0.6 + 1e-6
    assert max(abs(action - applied) for applied, action in given) <= 0.2 + 1e-6
    assert agent.resumed  # after a gap, the agent knows what was applied last
    assert set(agent.resumed) <= {-0.25} | {action for _, action in given}


def test_a_limit_on_changes_counts_from_what_the_plant_applies(plant: Plant, link: SocketLink) -> None:
    stalls = [10, 24]

    def stall(report: ControlReport) -> None:
        if stalls and len(report.periods) >= stalls[0]:
            stalls.pop(0)
            time.sleep(8 * PERIOD)  # the plant's own watchdog acts

    agent = Limited()
    report = loop_of(agent, link, on_period=stall, watchdog=False).run(GOAL, duration=45 * PERIOD)
    own = [value == -0.25 for value in plant.written]
    first = own.index(False)
    after = [n for n in range(first + 1, len(own)) if all(own[n - 4 : n]) and not own[n]]
    assert len(after) >= 2
    for number in (first, *after):  # the first command, and the first after each stall
        assert abs(plant.written[number] - -0.25) <= 0.2 + 1e-4
    assert agent.resumed.count(-0.25) >= 3 + 2  # the agent plans from there, too
    assert report.restarts >= 2


def test_a_safe_action_that_the_guardrails_forbid_is_refused(link: SocketLink) -> None:
    with pytest.raises(ConfigError, match=r"do not permit the safe action \[-0.75\].*nearest permitted .* \[-0.6"):
        loop_of(Limited(), link, safe_action=[-0.75])


def test_the_watchdog_acts_where_the_loop_itself_is_stuck(plant: Plant, link: SocketLink) -> None:
    stuck = 0.0

    def block(report: ControlReport) -> None:
        nonlocal stuck
        if len(report.periods) == 5:
            time.sleep(10 * PERIOD)
            stuck = 1.0

    report = loop_of(Counting(), link, on_period=block).run(GOAL, duration=1.2)
    assert stuck
    assert len(report.watchdog) >= 5
    assert plant.kinds.count("watchdog") == len(report.watchdog)
    held = {miss.period for miss in report.misses if miss.cause == "the loop was held up"}
    assert {number for number, _ in report.watchdog} & held
    assert len({period.number for period in report.periods}) == len(report.periods) == 24
    assert unnoticed(report, plant) == set()


@pytest.mark.parametrize("kind", [OSError, SystemExit])
def test_the_watchdog_goes_on_after_an_error(plant: Plant, link: SocketLink, monkeypatch, caplog, kind) -> None:
    send, failed = link.send, []

    def glitch(action: np.ndarray, *, kind: str = "agent", answers: int = -1) -> None:
        if kind == "watchdog" and not failed:
            failed.append(1)
            raise kind("the bus is off")
        send(action, kind=kind, answers=answers)

    def block(report: ControlReport) -> None:
        if len(report.periods) == 5:
            time.sleep(10 * PERIOD)

    monkeypatch.setattr(link, "send", glitch)
    report = loop_of(Counting(), link, on_period=block).run(GOAL, duration=1.2)
    assert failed
    assert len(report.watchdog) >= 4
    assert "the loop's watchdog cannot reach the plant" in caplog.text


def test_without_a_watchdog_the_plants_own_acts(plant: Plant, link: SocketLink) -> None:
    def block(report: ControlReport) -> None:
        if len(report.periods) == 5:
            time.sleep(10 * PERIOD)

    report = loop_of(Counting(), link, watchdog=False, on_period=block).run(GOAL, duration=1.2)
    assert report.watchdog == []
    assert len(plant.server.log.safe) >= 5
    assert report.unanswered >= 5  # by the plant's own word
    assert -0.25 in plant.written


def test_observations_that_stop_are_misses_and_end_in_an_error(plant: Plant, link: SocketLink) -> None:
    def freeze(report: ControlReport) -> None:
        if len(report.periods) == 5:
            plant.frozen.set()

    report = loop_of(Counting(), link, on_period=freeze).run(GOAL, duration=1.0)
    causes = [miss.cause for miss in report.misses]
    assert causes.count("no observation came") >= 5
    assert len(report.stale) >= 5


def test_a_link_that_breaks_ends_the_loop_and_keeps_its_report(plant: Plant, link: SocketLink) -> None:
    def cut(report: ControlReport) -> None:
        if len(report.periods) == 5:
            plant.server.stop()

    loop = loop_of(Counting(), link, on_period=cut)
    with pytest.raises(LinkError):
        loop.run(GOAL, duration=30.0)
    assert loop.report.ended.startswith("LinkError")
    assert len(loop.report.periods) >= 5
    end = time.monotonic() + 10
    while plant.written[-1] != -0.25 and time.monotonic() < end:  # the plant notices on its own clock
        time.sleep(PERIOD)
    assert plant.written[-1] == -0.25


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, GeneratorExit])
def test_an_agent_that_raises_ends_the_loop_safely(plant: Plant, link: SocketLink, kind: type[BaseException]) -> None:
    class Raising(Counting):
        def act(self, observations: Observations) -> torch.Tensor:
            if self.calls == 5:
                raise kind("out of ideas")
            return super().act(observations)

    loop = loop_of(Raising(), link)
    with pytest.raises(PlanningError, match=f"the agent raised {kind.__name__}: out of ideas"):
        loop.run(GOAL, duration=30.0)
    link.close()
    assert [value for value in plant.written if value != -0.25][-1] == SAFE[0]
    assert "out of ideas" in loop.report.ended


@pytest.mark.parametrize("wrong", [torch.tensor([[float("nan")]]), torch.zeros(1, 2)])
def test_what_is_no_action_is_a_miss(plant: Plant, link: SocketLink, wrong: torch.Tensor) -> None:
    class Wrong(Counting):
        def act(self, observations: Observations) -> torch.Tensor:
            super().act(observations)
            return wrong

    report = loop_of(Wrong(), link).run(GOAL, duration=0.5)
    assert {miss.cause for miss in report.misses} >= {"the action was not valid"}
    assert len(report.misses) == len(report.periods) == 10
    assert set(plant.written) <= {SAFE[0], -0.25}


def test_stop_ends_it_and_a_new_goal_reaches_the_agent(plant: Plant, link: SocketLink) -> None:
    agent = Counting()
    other = Goal(observations=Observations.from_numpy(None, np.full((1, 1), 7.0)))

    def steer(report: ControlReport) -> None:
        if len(report.periods) == 4:
            loop.aim(other)
        if len(report.periods) == 10:
            loop.stop()

    loop = loop_of(agent, link, on_period=steer)
    report = loop.run(GOAL)
    assert report.ended == "stopped"
    assert len(report.periods) == 10
    assert agent.goals[:3] == [0.0] * 3
    assert agent.goals[-1] == 7.0
    with pytest.raises(ConfigError, match="can run only once"):
        loop.run(GOAL)


class Long:
    """A plant with a period of 20 s, of which the first two observations come at once."""

    def __init__(self) -> None:
        self.seen, self.broken, self.free = 0, threading.Event(), threading.Event()
        self.link = CallbackLink(
            self.read, lambda action: None, observation=ObservationSpec(vector=1), action=ACTION, rate=0.05
        )

    def read(self) -> PlantReading:
        self.seen += 1
        if self.seen > 2:
            self.broken.wait(60)
            raise RuntimeError("the sensor is gone")
        time.sleep(0.1)
        return PlantReading(vector=np.array([self.seen], np.float32))


@pytest.mark.parametrize("what", ["stop while the agent plans", "stop between periods", "break between periods"])
def test_a_loop_with_long_periods_ends_soon(what: str) -> None:
    plant = Long()
    plans = threading.Event()

    class Thinking(Counting):
        def act(self, observations: Observations) -> torch.Tensor:
            if self.calls == 2:
                plans.set()
                if "plans" in what:
                    plant.free.wait(60)
            return super().act(observations)

    loop = ControlLoop(Thinking(), plant.link, deadline=15.0, safe_action=SAFE)
    ended: list[str] = []

    def drive() -> None:
        with contextlib.suppress(LinkError):
            loop.run(GOAL)
        ended.append(loop.report.ended)

    driving = threading.Thread(target=drive)
    driving.start()
    assert plans.wait(20)
    time.sleep(0.2)
    began = time.monotonic()
    if "stop" in what:
        loop.stop()
    else:
        plant.broken.set()
    driving.join(timeout=10)
    assert time.monotonic() - began < 5
    assert ended[0] == "stopped" or "the sensor is gone" in ended[0]
    plant.free.set()
    plant.broken.set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline": 0.06}, "at most the period, 50 ms; got 60 ms"),
        ({"deadline": 0.0}, "at most the period"),
        ({"safe_action": [2.0]}, "does not accept the safe action"),
        ({"safe_action": [0.0, 0.0]}, "does not accept the safe action"),
        ({"safe_action": [float("nan")]}, "does not accept the safe action"),
        ({"rate": 10.0}, "sends 20 observations per second"),
    ],
)
def test_what_cannot_be_is_said_before_anything_moves(link: SocketLink, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loop_of(Counting(), link, **options)
    with pytest.raises(TypeError, match="safe_action"):
        ControlLoop(Counting(), link, deadline=0.04)  # type: ignore[call-arg]


def test_the_report_is_json_and_is_drawn(plant: Plant, link: SocketLink, tmp_path: Path) -> None:
    report = loop_of(Counting(slow=lambda n: n == 5), link).run(GOAL, duration=0.8)
    figures = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert figures["periods"] == 16 == sum(figures["commands"].values())
    assert figures["misses"] == len(figures["missed"]) == sum(figures["miss_causes"].values())
    assert {"p50", "p95", "p99", "max"} <= set(figures["plan_ms"])
    json.dumps(ControlReport(rate=20.0, deadline=0.04, safe_action="hold", late="discard").to_json(), allow_nan=False)
    draw_timeline(report, tmp_path / "t.svg")
    assert "deadlines missed" in (tmp_path / "t.svg").read_text() or (tmp_path / "t.svg").stat().st_size > 5000


def test_a_report_of_a_long_run_keeps_its_newest_periods_and_counts_all() -> None:
    report = ControlReport(rate=20.0, deadline=0.04, safe_action="hold", late="discard")
    for number in range(230_000):
        report.periods.append(Period(number=number, began=0.001, sent=0.01, kind="safe" if number < 10 else "agent"))
    report.misses.append(Miss(period=3, seconds=0.1, cause="the plan was late", observation=3))
    report.skipped += range(2**40)  # a plant that jumps in its numbers
    figures = report.to_json()
    assert len(report.periods) <= 110_000
    assert (figures["periods"], figures["commands"]) == (230_000, {"safe": 10, "agent": 229_990})
    assert [miss["period"] for miss in figures["missed"]] == [3]
    assert figures["rate_held"] == 20.0
    assert len(figures["skipped_observations"]) <= 110_000
