"""A room with pits: what falls in stays, pits move, and tasks lie clear of them."""

import gymnasium
import numpy as np
import pytest

from worldloom.core.errors import ConfigError
from worldloom.data import EpisodeDataset, collect
from worldloom.envs import PitsFactors, RoomsVectorEnv
from worldloom.envs.simulator import free

MIDDLE = (32.0, 32.0, 12.0, 52.0, 52.0, 52.0)  # a pit in the middle, two below


def room(count: int = 1, **factors: object) -> RoomsVectorEnv:
    return RoomsVectorEnv("Pits", count, vary=(), factors={"pits": MIDDLE, **factors})


def put(env: RoomsVectorEnv, *positions: tuple[float, float]) -> None:
    env._simulator.position[:] = positions


def test_who_falls_in_stays_and_the_episode_ends() -> None:
    env = room(2, linger=0)
    env.reset(seed=0)
    put(env, (20.0, 32.0), (20.0, 10.0))
    right, ended = np.array([[1.0, 0.0], [1.0, 0.0]]), []
    for _ in range(3):
        _, _, terminated, _, infos = env.step(right)
        ended.append(terminated.tolist())
    # The edge lies at 26: after three steps of 2.5 the first is 1.5 deep.
    assert ended == [[False, False], [False, False], [True, False]]
    assert infos["pit_depth"][0] == pytest.approx(1.5)
    assert infos["pit_depth"][1] < 0
    # The next step begins another episode for the one that fell, and for it alone.
    _, _, terminated, _, infos = env.step(right)
    assert not terminated.any()
    assert infos["position"][1, 0] == pytest.approx(30.0)


def test_an_episode_goes_on_for_a_while_after_a_fall() -> None:
    env = room(linger=3)
    env.reset(seed=0)
    put(env, (25.0, 32.0))
    ended, places = [], []
    for _ in range(4):
        _, _, terminated, _, infos = env.step(np.array([[1.0, 0.0]]))
        ended.append(bool(terminated[0]))
        places.append(float(infos["position"][0, 0]))
    assert ended == [False, False, False, True]
    assert places == [27.5] * 4  # where it fell, whatever it does


def test_a_pit_that_is_not_deadly_is_only_measured() -> None:
    env = room(deadly=False)
    env.reset(seed=0)
    put(env, (25.0, 32.0))
    depths = [env.step(np.array([[1.0, 0.0]]))[4]["pit_depth"][0] for _ in range(8)]
    assert max(depths) > 4
    assert depths[-1] < 0  # it came out on the other side


def test_pits_move_bounce_and_are_seen() -> None:
    env = room(pit_speed=2.0, pit_heading=(0.0, 0.0, 0.0))
    frame, infos = env.reset(seed=0)
    put(env, (3.0, 3.0))
    places = [infos["pit_positions"][0]]
    frames = [frame]
    for _ in range(30):
        frame, _, _, _, infos = env.step(np.zeros((1, 2)))
        frames.append(frame)
        places.append(infos["pit_positions"][0])
    across = np.array(places)[:, 0]
    assert across[1] == pytest.approx(34.0)
    assert across.max() <= 58.0
    assert across[-1] < across.max()  # it turned
    assert not np.array_equal(frames[0], frames[5])
    column, row = int(across[3]), 32
    assert np.array_equal(frames[3][0, row, column], PitsFactors().pit_colour)


def test_tasks_lie_clear_of_pits_with_one_in_between_where_that_is_asked() -> None:
    env = RoomsVectorEnv("Pits", 8)
    for obstructed in (True, False):
        _, infos = env.reset(seed=1, options={"task": {"obstructed": obstructed, "min_distance": 20.0}})
        assert (infos["wall_between"] == obstructed).all()
        assert np.isfinite(infos["shortest_steps"]).all()
        for row, factors in enumerate(env._simulator.factors):
            pits = factors.hazards()
            assert pits is not None
            for place in (infos["position"][row], infos["goal_position"][row]):
                assert pits.depth(place[None].astype(float))[0] <= -factors.pit_clearance + 1e-3


@pytest.mark.parametrize("which", ["goal", "start"])
def test_a_goal_or_a_start_may_lie_in_a_pit(which: str) -> None:
    env = RoomsVectorEnv("Pits", 8)
    _, infos = env.reset(seed=2, options={"task": {"in_a_pit": which, "min_distance": 12.0}})
    for row, factors in enumerate(env._simulator.factors):
        pits = factors.hazards()
        assert pits is not None
        places = {"start": infos["position"][row], "goal": infos["goal_position"][row]}
        for name, place in places.items():
            assert (pits.depth(place[None].astype(float))[0] > 0) == (name == which)
    assert (infos["pit_depth"] > 0).all() == (which == "start")


def test_only_a_world_with_pits_has_a_goal_in_one() -> None:
    with pytest.raises(ConfigError, match="'in_a_pit' needs the environment Pits"):
        RoomsVectorEnv("TwoRoom", 1).reset(seed=0, options={"task": {"in_a_pit": "goal"}})


def test_from_one_step_on_it_is_faster_and_the_wind_blows() -> None:
    env = room(shift_step=2, speed_after=1.5, wind_after=(0.0, -0.5))
    env.reset(seed=0)
    put(env, (10.0, 10.0))
    places = [env.step(np.array([[1.0, 0.0]]))[4]["position"][0].tolist() for _ in range(4)]
    # A room is as it is from the end of the second step on.
    assert places == [[12.5, 10.0], [15.0, 10.0], [18.75, 9.5], [22.5, 9.0]]
    # The wind drives against the wall, and no farther; who has fallen in lies still.
    for _ in range(20):
        _, _, _, _, infos = env.step(np.zeros((1, 2)))
    assert infos["position"][0].tolist() == [22.5, 2.5]
    env.reset(seed=0)
    put(env, (32.0, 27.0))
    still = [env.step(np.zeros((1, 2)))[4]["position"][0].tolist() for _ in range(4)]
    assert still == [[32.0, 27.0]] * 4


def test_where_nothing_may_begin_is_what_the_pits_take() -> None:
    factors = PitsFactors(pits=MIDDLE, pit_radius=5.0, pit_clearance=3.0)
    points = np.array([[32.0, 32.0], [32.0, 39.0], [32.0, 40.5]])
    assert free(factors, points).tolist() == [False, False, True]


def test_logs_end_where_somebody_fell(tmp_path) -> None:
    dataset = collect(tmp_path / "data", env_id="worldloom/Pits-v0", episodes=20, steps=60, num_envs=10, seed=0)
    assert isinstance(dataset, EpisodeDataset)
    lengths = dataset.lengths
    assert lengths.min() < 60
    assert lengths.max() == 60


def test_one_environment_says_that_it_is_over() -> None:
    env = gymnasium.make("worldloom/Pits-v0", vary=(), factors={"pits": MIDDLE, "linger": 0}).unwrapped
    env.reset(seed=0)
    env._batch._simulator.position[:] = (25.0, 32.0)
    *_, terminated, truncated, infos = env.step(np.array([1.0, 0.0]))
    assert terminated
    assert not truncated
    assert infos["pit_depth"] > 0
