"""The corrected rules of the field's tables: holding, symmetry, joints with a stop, pairs across a wall."""

import math
from importlib.util import find_spec
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from track_world import Shuttle, track

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.seams import Agent
from worldloom.core.types import Goal, Observations
from worldloom.envs import Frame
from worldloom.evaluation import (
    FIELD,
    LOGS,
    PROTOCOLS,
    RULES,
    Protocol,
    Split,
    draw_tasks,
    evaluate,
    field_title,
    open_world,
)

CUBE_ROTATIONS = Rotation.create_group("O")
CUBE = PROTOCOLS["cube-25-strict@1"].success


def scalar_first(rotation: Rotation) -> np.ndarray:
    return np.roll(rotation.as_quat(), 1, axis=-1)


@given(st.integers(0, 2**31), st.floats(0.1, 10), st.integers(0, 23))
def test_a_cubes_angle_is_the_smallest_over_its_24_rotations(seed: int, length: float, turn: int) -> None:
    goal, value = Rotation.random(2, random_state=np.random.RandomState(seed))
    (pose,) = CUBE.also
    found = float(pose.distance(length * scalar_first(value), scalar_first(goal)))
    assert found == pytest.approx(min((goal.inv() * value * other).magnitude() for other in CUBE_ROTATIONS), abs=1e-6)
    # A rotation of the cube into itself changes nothing, on either side, and neither does the quaternion's sign.
    turned = scalar_first(value * CUBE_ROTATIONS[turn])
    assert float(pose.distance(-turned, scalar_first(goal))) == pytest.approx(found, abs=1e-6)


@given(st.floats(0, 0.06), st.floats(0, math.pi / 4), st.integers(0, 23))
def test_the_cubes_pose_is_judged_by_3_cm_and_15_degrees(far: float, tilt: float, turn: int) -> None:
    goal = np.concatenate([[0.4, 0.1, 0.02], scalar_first(Rotation.identity())])
    pose = CUBE_ROTATIONS[turn] * Rotation.from_rotvec([0, 0, tilt])
    value = np.concatenate([goal[:3] + np.array([far, 0, 0]), scalar_first(pose)])
    expected = max(far, tilt / (math.pi / 12) * 0.03)
    assert float(CUBE.distance(value, goal)) == pytest.approx(expected, abs=1e-6)


def test_only_the_shoulder_of_the_arm_turns_all_the_way_round() -> None:
    historical, moderate = (PROTOCOLS[f"reacher-25{end}@1"].success for end in ("", "-moderate"))
    shoulder, wrist = np.array([[math.pi - 0.01, 0.0]]), np.array([[0.0, math.pi - 0.01]])
    for goal, around in ((shoulder, True), (wrist, False)):
        there = -goal
        assert historical.distance(there, goal) <= historical.radius
        assert (moderate.distance(there, goal) <= moderate.radius) == around


def test_pushts_strict_rule_judges_the_block_alone() -> None:
    rule = PROTOCOLS["pusht-25-strict@1"].success
    assert (rule.names, rule.hold) == (("block", "angle"), 3)
    goal = np.array([300.0, 250.0, 0.1])
    for x, turn, solved in (
        (9.9, 2 * math.pi - math.radians(9.9), True),
        (10.1, 0, False),
        (0, math.radians(10.1), False),
    ):
        assert (rule.distance(goal + np.array([x, 0, turn]), goal) <= rule.radius) == solved


def test_a_rule_with_hold_needs_consecutive_steps_and_counts_at_the_last() -> None:
    first = {each.index: each.steps for each in evaluate(track(success={"source": "info", "name": "position",
        "radius": 0.4}), {"m": lambda: Shuttle(9)}, record=0).rows[0].episodes}  # fmt: skip
    for stay, reached in ((9, 10), (3, 10), (2, 0)):
        row = evaluate(track(), {"m": lambda stay=stay: Shuttle(stay)}, record=0, batch=4).rows[0]
        assert row.overall.successes == reached
        for episode in row.episodes:
            assert episode.steps == (first[episode.index] + 2 if reached else 30)


def test_pairs_that_the_start_solves_are_replaced_from_the_same_sequence() -> None:
    loose = {"source": "info", "name": "position", "radius": 1.0}
    counted = track(success=loose, count_solved=True, policy="uniform")
    corrected = track(name="track-moderate", success=loose, pairs_of="track", policy="uniform")
    with open_world(counted, 10) as world:
        old, _ = draw_tasks(counted, "ahead", world, 0, "here")
        new, used = draw_tasks(corrected, "ahead", world, 0, "here")
    assert old.start_distance is not None
    unsolved = [digest for digest, far in zip(old.digests, old.start_distance, strict=True) if far > 1]
    assert 0 < len(unsolved) < 10
    assert list(new.digests[: len(unsolved)]) == unsolved
    assert used > 10
    assert new.start_distance is not None
    assert new.start_distance.min() > 1


def test_pairs_can_be_restricted_to_different_sides_of_a_line() -> None:
    crossing = {"name": "position", "at": 0.5, "clearance": 0.25}
    protocol = track(crossing=crossing)
    with open_world(protocol, 10) as world:
        tasks, _ = draw_tasks(protocol, "ahead", world, 0, "here")
        starts = tasks.begin(protocol, "ahead", world, "again").observations.vector
        goals = tasks.goal.observations.vector
    assert starts is not None
    assert goals is not None
    assert bool(((starts - 0.5) * (goals - 0.5) < 0).all())
    assert min(float((starts - 0.5).abs().min()), float((goals - 0.5).abs().min())) >= 0.25
    assert "is 0.5, each at least 0.25 away" in "\n".join(protocol.describe())
    far = track(crossing={**crossing, "at": 500.0}, splits={"ahead": Split(goal_offset=1, episodes=1)})
    with pytest.raises(ConfigError, match=r"only \d+ of \d+ goals .* on the other side of the line"):
        evaluate(far, {"m": lambda: Shuttle(9)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"success": FIELD["pusht"].strict}, "the success rule uses 'block', which this environment does not return"),
        ({"success": CUBE}, "the success rule uses 'block'"),
        (
            {"success": {"name": "position", "radius": 1, "also": [{"name": "pair", "radius": 1, "size": 4,
              "symmetry": "cube"}]}},
            "needs 'pair' with 4 values; this environment returns 2",
        ),
        (
            {"success": {"name": "position", "radius": 1, "period": [6.0, 0.0]}},
            "needs 'position' with 2 values; this environment returns 1",
        ),
        ({"crossing": {"name": "room", "at": 0}}, "choice of pairs uses 'room', which this environment"),
        ({"crossing": {"name": "position", "index": 1, "at": 0}}, "needs value 1 of 'position'; .* returns 1 value"),
        ({"count_solved": True}, "'count_solved' needs .* hold 1; got .* hold 3"),
        ({"success": {"name": "a", "radius": 1, "also": [{"name": "b", "radius": 1, "symmetry": "cube"}]}}, "size 4"),
        ({"success": {"name": "position", "radius": 1, "hold": 0}}, "hold"),
    ],
)  # fmt: skip
def test_a_world_that_lacks_what_the_rule_needs_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(track(**changes), {"m": lambda: Shuttle(9)})


class TwoHands(Shuttle):
    """Returns one value too many for the world."""

    def act(self, observations: Observations) -> torch.Tensor:
        return super().act(observations).repeat(1, 2)


def test_actions_for_another_world_are_named() -> None:
    with pytest.raises(
        DataError, match="'m' returned actions of 2 values; tests/Track-v0 expects 1. Choose a protocol"
    ):
        evaluate(track(), {"m": lambda: TwoHands(9)})


def test_the_fields_protocols_are_one_catalogue() -> None:
    for world, log in LOGS:
        for offset in FIELD[world].offsets:
            for rule in RULES:
                title = field_title(world, log, offset, rule)
                if getattr(FIELD[world], rule) is None:
                    assert title not in PROTOCOLS
                    continue
                protocol = PROTOCOLS[title]
                assert protocol.policy == LOGS[world, log]
                assert protocol.count_solved == (rule == "historical")
                # Every rule draws from the pairs of the historical one.
                historical = PROTOCOLS[field_title(world, log, offset, "historical")]
                (split,) = protocol.splits
                assert protocol.episode_seed(split, 3) == historical.episode_seed(split, 3)
    assert field_title("pusht", "expert", 50, "strict") == "pusht-expert-50-strict@1"


class Wanders(Agent):
    """Moves straight in random directions, as fast as it can."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(3)

    def reset(self, goal: Goal) -> None:
        self.heading = torch.rand(goal.observations.axes[0], 1, generator=self._generator) * 2 * math.pi

    def act(self, observations: Observations) -> torch.Tensor:
        self.heading += torch.randn(len(self.heading), 1, generator=self._generator)
        return torch.cat([self.heading.cos(), self.heading.sin()], dim=1)


class Paths:
    """Records where every environment is at each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def begin(self, agent: Agent, size: int) -> None:
        self.steps = []

    def saw(self, frame: Frame, step: int) -> None:
        self.steps.append(
            (frame.rows, *(np.array(frame.numbers(name, "test")) for name in ("position", "door_position")))
        )


def test_in_two_rooms_every_path_to_the_other_room_passes_through_the_door() -> None:
    values = PROTOCOLS["two-room-50-moderate@1"].model_dump()
    values["splits"]["50 steps ahead"]["episodes"] = 12
    paths = Paths()
    evaluate(Protocol.parse({**values, "budget": 300}), {"wander": Wanders}, batch=12, record=0, witness=paths)
    crossings = 0
    for (rows, before, doors), (later, after, _) in zip(paths.steps[:-1], paths.steps[1:], strict=True):
        stays = np.isin(rows, later)
        assert (rows[stays] == later).all()
        start, end, door = before[stays], after, doors[stays, 0]
        # Within 4.5 px of the wall's middle the agent touches the wall's sides: it is in the door, up to 4 px beside
        # the door's centre.
        for one, other, centre in zip(start, end, door, strict=True):
            for part in np.linspace(0, 1, 21):
                x = one[0] + part * (other[0] - one[0])
                if abs(x - 32) < 4.5 - 1e-4 and one[1] == other[1]:
                    assert abs(one[1] - centre) <= 4 + 1e-4
            crossings += (one[0] - 32) * (other[0] - 32) < 0
            assert min(abs(one[1] - centre), abs(other[1] - centre)) <= 4 + 1e-4 or (one[0] - 32) * (other[0] - 32) > 0
    assert crossings > 0


@pytest.mark.skipif(find_spec("ogbench") is None, reason="OGBench is not installed")
def test_the_cube_tells_its_orientation() -> None:
    env = gymnasium.make("worldloom/Cube-v0")
    vector, infos = env.reset(seed=0)
    np.testing.assert_allclose(infos["quaternion"], vector[22:26], atol=1e-6)
    assert np.linalg.norm(infos["quaternion"]) == pytest.approx(1, abs=1e-5)
    env.close()
