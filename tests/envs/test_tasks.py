import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.core.errors import ConfigError
from worldloom.envs import RoomsVectorEnv, TaskOptions, TwoRoomFactors
from worldloom.envs.simulator import Simulator, free
from worldloom.envs.tasks import draw_task, steps_from


@pytest.mark.parametrize("world", ["TwoRoom", "FourRooms", "Maze"])
@pytest.mark.parametrize("split", ["any", "cross-room", "same-room"])
def test_a_task_is_what_its_split_promises(world: str, split: str) -> None:
    limit = 4.0 if world == "Maze" else 10.0
    envs = RoomsVectorEnv(world, 12)
    frames, infos = envs.reset(seed=7, options={"task": {"split": split, "min_distance": limit}})
    start, goal = infos["position"].astype(float), infos["goal_position"].astype(float)
    assert (np.linalg.norm(start - goal, axis=1) > limit).all()
    for row, factors in enumerate(envs._simulator.factors):
        rooms = factors.rooms(np.stack([start[row], goal[row]]))
        if split != "any":
            assert (rooms >= 0).all()
            assert (rooms[0] == rooms[1]) == (split == "same-room")
    # The goal's picture is the world with the agent at the goal.
    assert (infos["goal"] == envs._simulator.render(goal)).mean() > 0.999
    assert (infos["goal"] != frames).any((1, 2, 3)).all()
    again, same = RoomsVectorEnv(world, 12).reset(seed=7, options={"task": {"split": split, "min_distance": limit}})
    assert (again == frames).all()
    assert (same["goal"] == infos["goal"]).all()


def test_far_goals_exist_in_the_maze() -> None:
    _, infos = RoomsVectorEnv("Maze", 10).reset(seed=0, options={"task": {"min_steps": 101}})
    assert (infos["shortest_steps"] > 100).all()


def test_a_task_that_no_layout_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="no start and goal"):
        RoomsVectorEnv("TwoRoom", 1).reset(seed=0, options={"task": {"min_steps": 500}})


def test_shortest_steps_without_walls_in_between_is_the_larger_axis_over_the_speed() -> None:
    factors = TwoRoomFactors()
    steps = steps_from(factors, np.array([10.5, 10.5])).reshape(64, 64)
    assert steps[10, 10] == 0
    assert steps[20, 25 - 1] == pytest.approx(14 / 2.5)
    assert np.isinf(steps[0, 0])  # too near the edge for the agent


@given(st.integers(0, 10_000))
@settings(max_examples=15)
def test_following_the_shortest_way_takes_that_many_steps(seed: int) -> None:
    """Descend the map of steps greedily in the simulator: the reference is reached, and not by much more."""
    rng = np.random.default_rng(seed)
    factors = TwoRoomFactors(door_position=float(rng.uniform(11, 53)))
    task = draw_task(factors, TaskOptions(split="cross-room"), rng)
    steps = steps_from(factors, task.goal).reshape(64, 64)
    simulator = Simulator(1, 64)
    simulator.place(0, factors, task.start, rng)
    for count in range(1, 80):  # noqa: B007 - the count is what is asserted
        column, row = simulator.position[0].astype(int)
        around = steps[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
        down, right = np.unravel_index(np.argmin(around), around.shape)
        aim = np.array([max(column - 2, 0) + right + 0.5, max(row - 2, 0) + down + 0.5])
        simulator.step(np.clip((aim - simulator.position) / factors.agent_speed, -1, 1), np.ones(1, bool))
        if np.linalg.norm(simulator.position[0] - task.goal) < 3:
            break
    assert task.shortest_steps - 3 <= count <= 1.6 * task.shortest_steps + 5


def test_a_wall_between_is_a_wall_on_the_straight_way() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        factors = TwoRoomFactors(door_position=float(rng.uniform(11, 53)))
        task = draw_task(factors, TaskOptions(), rng)
        way = task.start + np.linspace(0, 1, 200)[:, None] * (task.goal - task.start)
        if not task.wall_between:
            assert free(factors, way).mean() > 0.98
        elif free(factors, way).all():
            pytest.fail("a wall is said to lie between, and every point of the way is free")
