"""A robot among hazards: it has mass, hazards stop nobody and are seen by lidar, and tasks lie clear of them."""

from importlib.util import find_spec

import gymnasium
import numpy as np
import pytest

import worldloom.envs  # noqa: F401 - names the world
from worldloom.core.errors import ConfigError, EnvironmentFailure
from worldloom.envs import rendering
from worldloom.envs.point_hazards import BINS, EXTENT, HAZARDS, RADIUS, PointHazardsEnv

if find_spec("mujoco") is None:
    pytest.skip("MuJoCo is not installed", allow_module_level=True)


def alone(*places: tuple[float, float]) -> PointHazardsEnv:
    """A robot at (-1, 0) that looks to the right, with hazards at these places and the others far away."""
    env = PointHazardsEnv()
    env.reset(seed=0)
    env._hazards = np.array([*places, *[(100.0 + n, 100.0) for n in range(HAZARDS - len(places))]])
    env._put(np.array([-1.0, 0.0]), 0.0)
    return env


def test_it_speeds_up_slows_down_and_stops_at_the_wall() -> None:
    env = alone()
    speeds = [float(env.step(np.array([1.0, 0.0]))[0][4]) for _ in range(10)]
    assert speeds == sorted(speeds)
    assert 0.1 < speeds[0] < 0.5 * speeds[-1]
    assert speeds[-1] < 0.8
    rolling = [float(env.step(np.array([0.0, 0.0]))[0][4]) for _ in range(5)]
    assert 0 < rolling[-1] < rolling[0] < speeds[-1]  # it has mass: to stop takes time
    for _ in range(60):
        *_, infos = env.step(np.array([1.0, 0.0]))
    assert infos["position"][0] == pytest.approx(EXTENT, abs=0.06)


def test_a_hazard_is_measured_and_stops_nobody() -> None:
    env = alone((0.0, 0.0))
    depths, costs = [], []
    for _ in range(40):
        *_, infos = env.step(np.array([1.0, 0.0]))
        depths.append(float(infos["hazard_depth"]))
        costs.append(float(infos["cost"]))
    assert max(depths) == pytest.approx(RADIUS, abs=0.05)
    assert depths[-1] < 0 < infos["position"][0]
    assert [cost == 1 for cost in costs] == [depth > 0 for depth in depths]


def test_lidar_tells_where_and_how_near_and_turns_with_the_robot() -> None:
    env = alone((0.5, 0.0), (-1.0, 0.75))
    lidar = env._observe()[7:]
    assert lidar[0] == pytest.approx(0.5)  # straight ahead, 1.5 m away
    assert lidar[BINS // 4] == pytest.approx(0.75)  # to the left
    assert np.count_nonzero(lidar > 1e-6) == 2
    env._put(np.array([-1.0, 0.0]), np.pi / 2)
    turned = env._observe()[7:]
    assert turned[0] == pytest.approx(0.75)
    assert turned[-BINS // 4] == pytest.approx(0.5)
    env._put(np.array([-1.0, 0.0]), np.pi / BINS)  # half a bin: shared by two
    assert env._observe()[7:][[0, -1]] == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize("obstructed", [True, False])
def test_tasks_lie_clear_with_a_hazard_in_between_where_that_is_asked(obstructed: bool) -> None:
    env = PointHazardsEnv()
    for seed in range(20):
        seen, infos = env.reset(seed=seed, options={"task": {"obstructed": obstructed, "min_distance": 1.2}})
        assert infos["wall_between"] == obstructed
        assert np.linalg.norm(infos["goal_position"] - infos["position"]) > 1.2
        assert infos["hazard_depth"] < -0.19
        assert infos["goal"][:2] == pytest.approx(infos["goal_position"])
        assert infos["goal"].shape == seen.shape == (7 + BINS,)


def test_a_seed_says_all() -> None:
    env, other = gymnasium.make("worldloom/PointHazards-v0"), gymnasium.make("worldloom/PointHazards-v0")
    first, again = env.reset(seed=3)[0], other.reset(seed=3)[0]
    assert np.array_equal(first, again)
    for action in np.random.default_rng(0).uniform(-1, 1, (20, 2)).astype(np.float32):
        assert np.array_equal(env.step(action)[0], other.step(action)[0])


def test_a_layout_stays_the_same_and_others_do_not() -> None:
    fixed, again, drawn = PointHazardsEnv(layout=3), PointHazardsEnv(layout=3), PointHazardsEnv()
    places = []
    for env in (fixed, again, drawn):
        for seed in (0, 1):
            env.reset(seed=seed)
            places.append(env._hazards)
    assert all(np.array_equal(places[0], other) for other in places[1:4])
    assert not np.array_equal(places[4], places[5])


def test_wrong_options_are_named() -> None:
    env = PointHazardsEnv()
    with pytest.raises(ConfigError, match="unknown reset option 'tsk'"):
        env.reset(seed=0, options={"tsk": {}})
    with pytest.raises(ConfigError, match="min_distance"):
        env.reset(seed=0, options={"task": {"min_distance": -1}})
    with pytest.raises(EnvironmentFailure, match="must be 8 to 480"):
        PointHazardsEnv(size=4)


def test_it_is_drawn_from_above() -> None:
    try:
        rendering.choose_gl()
    except EnvironmentFailure as failure:
        pytest.skip(str(failure))
    env = PointHazardsEnv(render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (64, 64, 3)
    blue = (picture[..., 2].astype(int) - picture[..., 0]) > 60
    assert blue.sum() > 50
