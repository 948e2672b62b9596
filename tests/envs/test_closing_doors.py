"""A door that closes in the middle of an episode."""

import numpy as np
import pytest

from worldloom.core.errors import ConfigError
from worldloom.envs import FourRoomsFactors, RoomsVectorEnv
from worldloom.envs.factors import DOORS
from worldloom.envs.simulator import free
from worldloom.envs.tasks import steps_from

DOOR_AT = {"up": (32.0, 16.0), "down": (32.0, 48.0), "left": (16.0, 32.0), "right": (48.0, 32.0)}


@pytest.mark.parametrize("door", DOORS)
def test_only_the_closing_door_closes_and_only_when_it_is_time(door: str) -> None:
    factors = FourRoomsFactors(closing_door=door, closing_step=5)
    assert factors.after(4) is factors
    later = factors.after(5)
    assert later.after(99) is later
    assert later.closing_step == 0
    for name, place in DOOR_AT.items():
        assert free(factors, np.array([place]))[0]
        assert free(later, np.array([place]))[0] == (name != door)


def test_it_is_seen_to_close_and_stops_who_would_pass() -> None:
    env = RoomsVectorEnv("FourRooms", 2, vary=(), factors={"closing_door": "up", "closing_step": 3})
    env.reset(seed=0)
    env._simulator.position[:] = (20.0, 16.0)
    right = np.array([[1.0, 0.0], [0.0, 0.0]])
    frames = [env.step(right)[0][1] for _ in range(12)]
    assert np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[1], frames[3])
    assert np.array_equal(frames[3], frames[11])
    assert env._simulator.position[0, 0] < 32


def test_it_waits_for_who_stands_in_it() -> None:
    env = RoomsVectorEnv("FourRooms", 1, vary=(), factors={"closing_door": "up", "closing_step": 1})
    env.reset(seed=0)
    env._simulator.furnish(0, FourRoomsFactors(closing_door="up", closing_step=1))
    env._simulator.position[:] = (32.0, 16.0)
    stay, right = np.zeros((1, 2)), np.array([[1.0, 0.0]])
    open_ = env.step(stay)[0]
    assert env._simulator.factors[0].closing_step == 1
    assert np.array_equal(env.step(stay)[0], open_)
    for _ in range(4):
        env.step(right)
    assert env._simulator.factors[0].closing_step == 0
    assert env._simulator.position[0, 0] > 32 + 4


def test_a_task_closes_the_door_on_its_way_and_leaves_another() -> None:
    env = RoomsVectorEnv("FourRooms", 6)
    _, infos = env.reset(seed=3, options={"task": {"split": "cross-room", "closes_after": 8}})
    for row, factors in enumerate(env._simulator.factors):
        goal, start = infos["goal_position"][row].astype(float), infos["position"][row].astype(int)
        before, after = (steps_from(factors.after(step), goal)[64 * start[1] + start[0]] for step in (0, 8))
        assert np.isfinite(after)
        assert after > before + 4
    # The same worlds, but for when the door closes.
    _, open_ = env.reset(seed=3, options={"task": {"split": "cross-room", "closes_after": 1_000_000}})
    assert np.array_equal(open_["goal"], infos["goal"])
    assert np.array_equal(open_["position"], infos["position"])


def test_a_world_with_one_way_has_no_door_to_close() -> None:
    with pytest.raises(ConfigError, match="needs the environment FourRooms"):
        RoomsVectorEnv("Maze", 1).reset(seed=0, options={"task": {"closes_after": 8}})
