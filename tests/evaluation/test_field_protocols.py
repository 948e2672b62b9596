"""Starts in the middle of logged episodes, success rules of several conditions, and what the digests keep."""

import math
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom.core.errors import EnvironmentFailure
from worldloom.core.seams import Agent
from worldloom.core.types import Goal, Observations
from worldloom.evaluation import (
    PROTOCOLS,
    Protocol,
    Split,
    SuccessRule,
    default_protocol,
    draw_tasks,
    evaluate,
    open_world,
    table_rows,
)
from worldloom.reports import write_report

PUSHT = PROTOCOLS["pusht-25@1"].success


@given(
    far=st.floats(0, 60),
    direction=st.floats(0, 2 * math.pi),
    turn=st.floats(-math.pi, math.pi),
    turns=st.integers(-2, 2),
    angle=st.floats(0, 2 * math.pi),
)
def test_pusht_succeeds_where_the_fields_rule_says_so(
    far: float, direction: float, turn: float, turns: int, angle: float
) -> None:
    goal = np.array([100.0, 200.0, 300.0, 250.0, angle])
    values = goal + np.array([0, 0, far * math.cos(direction), far * math.sin(direction), turn + 2 * math.pi * turns])
    distance = float(PUSHT.distance(values, goal))
    expected = max(far, abs(turn) / (math.pi / 9) * 20)
    assert distance == pytest.approx(expected, abs=1e-6)


def test_reachers_joints_are_judged_one_by_one() -> None:
    rule = PROTOCOLS["reacher-25@1"].success
    goal = np.array([[math.pi - 0.01, 0.0]])
    assert rule.distance(np.array([[-math.pi + 0.03, 0.045]]), goal) <= rule.radius
    assert rule.distance(np.array([[math.pi - 0.01, 0.06]]), goal) > rule.radius


def test_a_rule_of_several_conditions_is_read_from_text() -> None:
    rule = SuccessRule.parse_text("agent+block:20,angle~:0.35,height:2")
    assert rule.names == ("agent", "block", "angle", "height")
    assert rule.also[0].period == pytest.approx(2 * math.pi)
    assert rule.distance(np.array([0.0, 0, 0, 0, 6.2, 0]), np.zeros(6)) < 20
    assert rule.distance(np.array([0.0, 0, 0, 0, 6.2, 3]), np.zeros(6)) == pytest.approx(30)


def test_older_protocols_keep_their_digests() -> None:
    digests = {title: PROTOCOLS[title].fingerprint for title in ("two-room@1", "four-rooms@1", "maze-far@1")}
    assert digests == {
        "two-room@1": "7fffc749745c0d49",
        "four-rooms@1": "d605cf699404f909",
        "maze-far@1": "774ed2588e4b397b",
    }


def test_the_usual_protocol_of_a_world() -> None:
    assert default_protocol("worldloom/TwoRoom-v0") == "two-room@1"
    assert default_protocol("worldloom/PushT-v0") == "pusht-25@1"
    assert default_protocol("nowhere") is None


class Drift(gymnasium.Env):
    """A point that keeps its velocity: the start depends on every action before it."""

    observation_space = gymnasium.spaces.Box(-1e3, 1e3, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    luck = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.velocity = self.np_random.uniform(-1, 1), 0.0
        return self._see()

    def step(self, action):
        self.velocity += float(action[0]) * (time.perf_counter() % 1 if self.luck else 1.0)
        self.position += self.velocity
        return *self._see()[:1], 0.0, False, False, self._see()[1]

    def _see(self):
        return np.array([self.position, self.velocity], np.float32), {"position": np.array([self.position])}


gymnasium.register("tests/Drift-v0", entry_point=Drift)
PROTOCOL = Protocol(
    name="drift",
    env_id="tests/Drift-v0",
    goal_source="logged-policy",
    splits={"ahead": Split(goal_offset=5, start_steps=9, episodes=12)},
    success=SuccessRule(source="info", name="position", radius=0.5),
    count_solved=True,
    budget=3,
)


class Still(Agent):
    """Pushes nothing."""

    def reset(self, goal: Goal) -> None:
        self.size = goal.observations.axes[0]

    def act(self, observations: Observations):
        return observations.vector.new_zeros(self.size, 1)


def test_episodes_start_where_the_logged_ones_were() -> None:
    with open_world(PROTOCOL, 12) as world:
        tasks, _ = draw_tasks(PROTOCOL, "ahead", world, 0, "here")
        frame = tasks.begin(PROTOCOL, "ahead", world, "again")  # checks the digests of what is seen
        lengths = [len(actions) for actions in tasks.before]
        assert len(set(lengths)) > 3
        assert max(lengths) <= 9
        assert np.abs(frame.observations.vector[:, 1].numpy()[np.array(lengths) > 2]).min() > 0
        np.testing.assert_allclose(frame.info("position")[:, 0], frame.observations.vector[:, 0].numpy(), rtol=1e-6)
        # The world goes on from there.
        after = world.step(np.zeros((12, 1), np.float32), frame.rows)
        moved = after.observations.vector[:, 0] - frame.observations.vector[:, 0]
        np.testing.assert_allclose(moved.numpy(), frame.observations.vector[:, 1].numpy(), rtol=1e-4, atol=1e-5)


def test_goals_solved_at_the_start_are_counted_and_said(tmp_path: Path) -> None:
    wide = {**PROTOCOL.model_dump(), "success": {**PROTOCOL.success.model_dump(), "radius": 20.0}}
    results = evaluate(Protocol.parse(wide), {"still": Still}, record=0)
    solved = sum(episode.success and episode.steps == 0 for episode in results.rows[0].episodes)
    assert 0 < solved < 12
    assert results.rows[0].solved_at_start == results.to_json()["rows"][0]["solved_at_start"] == solved
    report = tmp_path / "report.html"
    write_report(report, results)
    assert f"({solved} of 12, {solved / 12:.1%}, solved at the start)" in report.read_text()
    head = table_rows(results)[0][1]
    assert f", {solved / 12:.1%} solved at the start" in head
    strict = Protocol.parse({**wide, "count_solved": False})
    assert not [e for e in evaluate(strict, {"still": Still}, record=0).rows[0].episodes if e.success and not e.steps]


def test_a_world_that_does_not_repeat_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drift, "luck", True)
    with pytest.raises(EnvironmentFailure, match="a different observation"):
        evaluate(PROTOCOL, {"still": Still}, record=0)


def test_a_native_vector_world_starts_in_the_middle_too() -> None:
    protocol = PROTOCOLS["two-room-25@1"].customise(episodes=3, budget=2)
    with open_world(protocol, 3) as world:
        tasks, _ = draw_tasks(protocol, "25 steps ahead", world, 0, "here")
        assert any(len(actions) for actions in tasks.before)
        tasks.begin(protocol, "25 steps ahead", world, "again")
