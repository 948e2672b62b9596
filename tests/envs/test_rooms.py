from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import worldloom.envs
from worldloom.core.errors import ConfigError
from worldloom.envs import FourRoomsFactors, MazeFactors, RoomEnv, RoomFactors, RoomsVectorEnv, TwoRoomFactors
from worldloom.envs.simulator import Simulator, free

WORLDS = ["worldloom/TwoRoom-v0", "worldloom/FourRooms-v0", "worldloom/Maze-v0", "worldloom/Pits-v0"]
FACTORS: list[type[RoomFactors]] = [TwoRoomFactors, FourRoomsFactors, MazeFactors]


def vector(env_id: str, count: int, **kwargs: Any) -> RoomsVectorEnv:
    envs = gymnasium.make_vec(env_id, num_envs=count, vectorization_mode="vector_entry_point", **kwargs)
    assert isinstance(envs, RoomsVectorEnv)
    return envs


def placed(factors: RoomFactors, position: tuple[float, float]) -> Simulator:
    simulator = Simulator(1, 64)
    simulator.place(0, factors, np.array(position), np.random.default_rng(0))
    return simulator


@pytest.mark.parametrize("env_id", WORLDS)
def test_gymnasium_finds_nothing_wrong(env_id: str) -> None:
    check_env(gymnasium.make(env_id, render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("env_id", WORLDS)
def test_an_environment_alone_equals_its_place_in_a_batch(env_id: str) -> None:
    seeds, kwargs = [11, 5, 8], {"vary": ["distractors", "agent_radius", "agent_colour"]}
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (20, 3, 2)).astype(np.float32)
    envs = vector(env_id, 3, **kwargs)
    batch = [envs.reset(seed=seeds)[0]] + [envs.step(action)[0] for action in actions]
    for row, seed in enumerate(seeds):
        env = gymnasium.make(env_id, **kwargs).unwrapped
        alone = [env.reset(seed=seed)[0]] + [env.step(action[row])[0] for action in actions]
        assert all((one == many[row]).all() for one, many in zip(alone, batch, strict=True))


@pytest.mark.parametrize("factors", FACTORS)
@given(seed=st.integers(0, 2**20))
@settings(max_examples=25)
def test_no_action_leads_into_a_wall(factors: type[RoomFactors], seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = factors.parse({name: draw(rng) for name, draw in factors.draws().items() if name != "distractors"})
    points = rng.uniform(0, 64, (400, 2))
    simulator = placed(drawn, tuple(points[free(drawn, points)][0]))
    for action in rng.uniform(-1, 1, (60, 1, 2)):
        simulator.step(action, np.ones(1, bool))
        assert free(drawn, simulator.position)[0]


def test_a_wall_stops_across_and_lets_slide_along() -> None:
    factors = TwoRoomFactors(door_position=50.0)
    simulator = placed(factors, (20.0, 20.0))
    for _ in range(10):
        simulator.step(np.array([[1.0, 0.4]]), np.ones(1, bool))
    left_face = 32 - 2 - 2.5
    assert simulator.position[0] == pytest.approx([left_face, 20 + 10 * 0.4 * 2.5])


def test_motion_in_the_open_is_undone_by_its_negative() -> None:
    simulator = placed(TwoRoomFactors(), (15.0, 15.0))
    actions = np.random.default_rng(0).uniform(-0.3, 0.3, (8, 1, 2))
    for action in [*actions, *-actions[::-1]]:
        simulator.step(action, np.ones(1, bool))
    assert simulator.position[0] == pytest.approx([15, 15])


@pytest.mark.parametrize(("offset", "passes"), [(0.0, True), (3.9, True), (-3.9, True), (4.1, False), (-4.1, False)])
@pytest.mark.parametrize("axis", ["vertical", "horizontal"])
def test_the_door_is_as_wide_as_it_says_and_the_only_way(axis: str, offset: float, passes: bool) -> None:
    factors = TwoRoomFactors.parse({"door_position": 30.0, "door_size": 4.0, "wall_axis": axis})
    start, forward = (20.0, 30.0 + offset), np.array([[1.0, 0.0]])
    if axis == "horizontal":
        start, forward = start[::-1], forward[:, ::-1]
    simulator = placed(factors, start)
    for _ in range(12):
        simulator.step(forward, np.ones(1, bool))
    assert (simulator.position.max() > 40) == passes


def test_without_the_wall_there_is_a_single_room() -> None:
    factors = TwoRoomFactors.parse({"wall": False, "door_position": 50.0})
    simulator = placed(factors, (10.0, 10.0))
    for _ in range(16):
        simulator.step(np.array([[1.0, 0.0]]), np.ones(1, bool))
    assert simulator.position[0] == pytest.approx([50, 10])
    assert not factors.rooms(simulator.position).any()
    envs = RoomsVectorEnv("TwoRoom", 1, factors={"wall": False})
    with pytest.raises(ConfigError, match="no start and goal"):
        envs.reset(seed=0, options={"task": {"split": "cross-room"}})
    envs.reset(seed=0, options={"task": {"split": "same-room"}})


@pytest.mark.parametrize("env_id", WORLDS)
def test_the_picture_shows_the_agent_where_it_is(env_id: str) -> None:
    envs = vector(env_id, 20, vary=[], factors={"agent_colour": (255, 0, 0), "floor_colour": (0, 0, 0)})
    frames, infos = envs.reset(seed=3)
    red = frames[..., 0] * ((frames[..., 1] < 30) & (frames[..., 0] > frames[..., 1] + 20)).astype(float)
    grid = np.arange(64) + 0.5
    centre = np.stack([red.sum(1) @ grid, red.sum(2) @ grid], axis=1) / red.sum((1, 2))[:, None]
    assert np.abs(centre - infos["position"]).max() < 0.5


@pytest.mark.parametrize("factors", FACTORS)
def test_each_factor_changes_what_it_names_and_nothing_else(factors: type[RoomFactors]) -> None:
    base = factors()
    for name, draw in factors.draws().items():
        changed = set()
        for seed in range(5):
            drawn = factors.parse({name: draw(np.random.default_rng(seed))})
            changed |= {key for key in factors.model_fields if getattr(drawn, key) != getattr(base, key)}
        assert changed == {name}


@pytest.mark.parametrize(
    ("name", "value"),
    [("wall_colour", (10, 90, 10)), ("door_position", 45.0), ("distractors", 3), ("agent_radius", 3.5)],
)
def test_a_given_factor_is_seen_and_leaves_the_rest_alone(name: str, value: Any) -> None:
    env = RoomEnv("TwoRoom", vary=["door_position", "agent_colour"])
    before, infos = env.reset(seed=4, options={"factors": {"door_position": 20.0}})
    after, changed = env.reset(seed=4, options={"factors": {"door_position": 20.0, name: value}})
    assert (before != after).any()
    if name in ("wall_colour", "distractors"):
        assert (infos["position"] == changed["position"]).all()
    again, _ = env.reset(seed=4, options={"factors": {"door_position": 20.0}})
    assert (again == before).all()


def test_distractors_move_and_stop_nobody() -> None:
    env = RoomEnv("TwoRoom", vary=[], factors={"distractors": 8})
    plain = RoomEnv("TwoRoom", vary=[])
    frames, paths = [], []
    for each in (env, plain):
        frame, infos = each.reset(seed=1)
        path = [infos["position"]]
        for _ in range(30):
            last = frame
            frame, *_, infos = each.step(np.array([0.3, -0.2], np.float32))
            path.append(infos["position"])
        frames.append((last, frame))
        paths.append(np.array(path))
    assert (paths[0] == paths[1]).all()
    changed = [(before != after).any(-1).sum() for before, after in frames]
    assert changed[0] > changed[1] + 10


def test_frames_that_were_returned_are_not_written_again() -> None:
    envs = RoomsVectorEnv("TwoRoom", 4)
    first, _ = envs.reset(seed=0)
    kept = first.copy()
    envs.step(np.ones((4, 2), np.float32))
    assert (first == kept).all()


def test_a_larger_frame_shows_the_same_world() -> None:
    small, infos = RoomEnv("TwoRoom").reset(seed=9)
    large, same = RoomEnv("TwoRoom", size=128).reset(seed=9)
    assert (infos["position"] == same["position"]).all()
    assert np.abs(large.reshape(64, 2, 64, 2, 3).mean((1, 3)) - small).mean() < 3


def test_an_episode_ends_only_at_its_limit_and_the_next_begins() -> None:
    envs = vector(WORLDS[0], 2, max_episode_steps=3)
    _, infos = envs.reset(seed=0)
    door = infos["door_position"].copy()
    ends = []
    for _ in range(4):
        _, _, terminated, truncated, infos = envs.step(np.zeros((2, 2), np.float32))
        assert not terminated.any()
        ends.append(truncated.tolist())
    assert ends == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]
    assert (infos["door_position"] != door).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RoomEnv("TwoRoom", vary=["door_positon"]), "did you mean 'door_position'"),
        (lambda: RoomEnv("TwoRoom", factors={"door_position": 3.0}, vary=[]), "door_position"),
        (lambda: RoomEnv("TwoRoom", factors={"door_position": 30.0}), "both 'factors' and 'vary'"),
        (lambda: RoomEnv("TwoRoom").reset(options={"factor": {}}), "did you mean 'factors'"),
        (lambda: RoomEnv("TwoRoom").reset(options={"factors": {"door_sise": 3}}), "did you mean 'door_size'"),
        (lambda: RoomEnv("TwoRoom").reset(options={"task": {"split": "crossroom"}}), "split"),
        (lambda: RoomEnv("TwoRoom", size=4), "16 to 512"),
        (lambda: RoomsVectorEnv("TwoRoom", 2).reset(seed=[1]), "expected 2 seeds"),
        (lambda: _step(np.array([np.nan, 0.0])), "finite actions"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def _step(action: np.ndarray) -> None:
    env = RoomEnv("TwoRoom")
    env.reset(seed=0)
    env.step(action)


def test_importing_the_worlds_twice_registers_them_once() -> None:
    worldloom.envs.register_envs()
    assert set(WORLDS) <= set(gymnasium.registry)


@pytest.mark.parametrize(
    ("turn", "mirror", "moved"),
    [(0, False, (2, 1)), (90, False, (-1, 2)), (180, False, (-2, -1)), (270, False, (1, -2)), (90, True, (-1, -2))],
)
def test_an_action_is_what_its_convention_says(turn: int, mirror: bool, moved: tuple[int, int]) -> None:
    env = gymnasium.make("worldloom/TwoRoom-v0", factors={"action_turn": turn, "action_mirror": mirror})
    _, before = env.reset(seed=0, options={"factors": {"door_position": 20.0}, "task": {}})
    _, _, _, _, after = env.step(np.array([0.2, 0.1], np.float32))
    np.testing.assert_allclose(after["position"] - before["position"], 0.25 * np.array(moved), atol=1e-4)


def test_worlds_that_differ_in_their_convention_look_alike() -> None:
    first, second = (
        gymnasium.make("worldloom/TwoRoom-v0", factors={"action_turn": turn}).reset(seed=3)[0] for turn in (0, 180)
    )
    np.testing.assert_array_equal(first, second)
