"""What holds for every world, seed and layout: no way through walls, tasks as stated, alone as in a batch."""

import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.core.errors import ConfigError
from worldloom.envs import (
    FourRoomsFactors,
    MazeFactors,
    RoomEnv,
    RoomFactors,
    RoomsVectorEnv,
    TaskOptions,
    TwoRoomFactors,
)
from worldloom.envs.simulator import Simulator, free
from worldloom.envs.tasks import draw_free, draw_task, steps_from

WORLDS = ["worldloom/TwoRoom-v0", "worldloom/FourRooms-v0", "worldloom/Maze-v0"]
FACTORS: list[type[RoomFactors]] = [TwoRoomFactors, FourRoomsFactors, MazeFactors]
PIXELS = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), axis=-1).reshape(-1, 2)
GO = np.ones(1, bool)


def draw(factors: type[RoomFactors], rng: np.random.Generator, without: tuple[str, ...] = ()) -> RoomFactors:
    return factors.parse({name: one(rng) for name, one in factors.draws().items() if name not in without})


def placed(factors: RoomFactors, position: np.ndarray) -> Simulator:
    simulator = Simulator(1, 64)
    simulator.place(0, factors, position, np.random.default_rng(0))
    return simulator


def same(one: Any, row: dict[str, Any], index: int) -> None:
    assert one.keys() == row.keys()
    for name, value in one.items():
        assert np.array_equal(value, row[name][index]), name


def make_batch(env_id: str, count: int, **kwargs: Any) -> Any:
    return gymnasium.make_vec(env_id, num_envs=count, vectorization_mode="vector_entry_point", **kwargs)


@pytest.mark.parametrize("env_id", WORLDS)
def test_the_episodes_and_tasks_that_follow_a_seed_are_those_of_its_place_in_a_batch(env_id: str) -> None:
    seeds = [21, 4]
    options: list[dict[str, Any] | None] = [None, {"task": {"split": "cross-room"}}, {"task": {"max_distance": 25.0}}]
    batch = make_batch(env_id, 2, vary=["distractors", "floor_colour"])
    alone = [gymnasium.make(env_id, vary=["distractors", "floor_colour"]).unwrapped for _ in seeds]
    for number, option in enumerate(options):
        frames, infos = batch.reset(seed=seeds if number == 0 else None, options=option)
        for row, env in enumerate(alone):
            frame, info = env.reset(seed=seeds[row] if number == 0 else None, options=option)
            assert np.array_equal(frame, frames[row])
            same(info, infos, row)


@pytest.mark.parametrize("env_id", WORLDS)
def test_the_native_batch_equals_gymnasiums_own(env_id: str) -> None:
    """Time limit, the episode that follows it and all infos included."""
    ours = make_batch(env_id, 3, max_episode_steps=4)
    theirs = gymnasium.make_vec(env_id, num_envs=3, vectorization_mode="sync", max_episode_steps=4)
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    actions = np.random.default_rng(0).uniform(-1, 1, (12, 3, 2)).astype(np.float32)
    results = [[envs.reset(seed=5)] + [envs.step(action) for action in actions] for envs in (ours, theirs)]
    for mine, other in zip(*results, strict=True):
        for part, expected in zip(mine[:-1], other[:-1], strict=True):
            assert np.array_equal(part, expected)
        for name, column in mine[-1].items():
            assert np.array_equal(column, other[-1][name]), name


def test_a_seed_may_be_a_numpy_integer() -> None:
    envs = RoomsVectorEnv("TwoRoom", 2)
    assert np.array_equal(envs.reset(seed=np.int64(7))[0], envs.reset(seed=[7, 8])[0])


@pytest.mark.parametrize("factors", FACTORS)
def test_every_factor_may_vary_and_is_drawn_within_its_range(factors: type[RoomFactors]) -> None:
    assert set(factors.draws()) == set(factors.model_fields)
    rng = np.random.default_rng(0)
    drawn = [draw(factors, rng) for _ in range(60)]  # parsing refuses what is out of range
    for name in factors.draws():
        assert len({getattr(one, name) for one in drawn}) > 1, name


@pytest.mark.parametrize("factors", FACTORS)
@given(seed=st.integers(0, 2**20))
@settings(max_examples=20)
def test_each_free_place_can_be_reached_from_each_other(factors: type[RoomFactors], seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = draw(factors, rng)
    steps = steps_from(drawn, draw_free(drawn, rng))
    assert np.isfinite(steps[free(drawn, PIXELS)]).all()


@pytest.mark.parametrize("factors", [TwoRoomFactors, FourRoomsFactors])
@given(seed=st.integers(0, 2**20))
@settings(max_examples=20)
def test_rooms_touch_nowhere_but_in_doorways(factors: type[RoomFactors], seed: int) -> None:
    drawn = draw(factors, np.random.default_rng(seed), without=("wall",))
    open_ = free(drawn, PIXELS).reshape(64, 64)
    rooms = np.where(open_, drawn.rooms(PIXELS).reshape(64, 64), -2)
    assert set(np.unique(rooms)) == {-2, -1, *range(2 if factors is TwoRoomFactors else 4)}
    for one, other in ((rooms[1:], rooms[:-1]), (rooms[:, 1:], rooms[:, :-1])):
        assert not ((one != other) & (one >= 0) & (other >= 0)).any()
    if isinstance(drawn, TwoRoomFactors):
        doorway = PIXELS[(rooms == -1).reshape(-1)]
        along = doorway[:, 1 if drawn.wall_axis == "vertical" else 0]
        assert np.abs(along - drawn.door_position).max() <= drawn.door_size


@pytest.mark.parametrize("factors", FACTORS)
@given(seed=st.integers(0, 2**20))
@settings(max_examples=20)
def test_the_whole_way_of_a_step_is_free_at_any_speed(factors: type[RoomFactors], seed: int) -> None:
    """A jump over a wall would end in free space too: so look along the way, first x and then y."""
    rng = np.random.default_rng(seed)
    values = draw(factors, rng, without=("distractors", "agent_speed", "agent_radius", "wall_thickness"))
    drawn = factors.parse({**values.model_dump(), "agent_speed": 4.0, "agent_radius": 1.0, "wall_thickness": 1.0})
    simulator = placed(drawn, draw_free(drawn, rng))
    shares = np.linspace(0, 1, 17)[:, None]
    for action in np.clip(rng.normal(0, 1.5, (60, 1, 2)), -1, 1):
        before = simulator.position[0].copy()
        simulator.step(action, GO)
        after = simulator.position[0]
        corner = np.array([after[0], before[1]])
        way = np.concatenate([before + shares * (corner - before), corner + shares * (after - corner)])
        # Sums of numbers that lie on a wall's face may round to the inside of it.
        assert free(drawn, np.where(np.abs(way - after) < 1e-9, after, way)).all()
        assert (np.abs(after - before) <= 4.0 + 1e-9).all()


@given(seed=st.integers(0, 2**20))
@settings(max_examples=25)
def test_no_run_is_much_faster_than_the_shortest_way(seed: int) -> None:
    """The reference is the way over pixels: a step may cut a corner, and both ends lie within a pixel."""
    rng = np.random.default_rng(seed)
    factors = TwoRoomFactors(door_position=float(rng.uniform(11, 53)))
    start = draw_free(factors, rng)
    steps, simulator = steps_from(factors, start).reshape(64, 64), placed(factors, start)
    heading = np.sign(rng.normal(size=(1, 2)))
    for count in range(1, 80):
        if rng.random() < 0.15:
            heading = np.sign(rng.normal(size=(1, 2)))
        simulator.step(heading, GO)
        column, row = simulator.position[0].astype(int)
        if np.isfinite(steps[row, column]):
            assert steps[row, column] <= count + 2.5


@pytest.mark.parametrize("factors", FACTORS)
def test_a_task_keeps_its_limits(factors: type[RoomFactors]) -> None:
    rng = np.random.default_rng(0)
    options = TaskOptions(min_distance=12.0, max_distance=30.0, min_steps=6.0, max_steps=60.0)
    for _ in range(15):
        drawn = draw(factors, rng, without=("distractors", "agent_speed"))
        task = draw_task(drawn, options, rng)
        assert 12 < np.linalg.norm(task.start - task.goal) <= 30
        assert 6 <= task.shortest_steps <= 60
        assert free(drawn, np.stack([task.start, task.goal])).all()
        assert task.shortest_steps >= np.abs(task.start - task.goal).max() / drawn.agent_speed - 1.5


@pytest.mark.parametrize("factors", FACTORS)
def test_a_wall_is_between_where_the_straight_way_crosses_one(factors: type[RoomFactors]) -> None:
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(30):
        drawn = draw(factors, rng, without=("agent_speed",))
        task = draw_task(drawn, TaskOptions(), rng)
        lengths = [_length_inside(task.start, task.goal, wall, drawn.agent_radius) for wall in drawn.walls()]
        crossed = max(lengths, default=0.0)
        if crossed == 0 or crossed > 1:  # a corner clipped by less than a pixel may go either way
            assert task.wall_between == (crossed > 1)
            seen.add(task.wall_between)
    assert seen == {True, False}


def _length_inside(start: np.ndarray, goal: np.ndarray, wall: np.ndarray, radius: float) -> float:
    """Clip the segment to the wall grown by the radius, and return the length that is left."""
    delta = goal - start
    enter, leave = 0.0, 1.0
    for axis in (0, 1):
        ends = (np.array([wall[axis] - radius, wall[axis + 2] + radius]) - start[axis]) / delta[axis]
        enter, leave = max(enter, float(ends.min())), min(leave, float(ends.max()))
    return max(0.0, leave - enter) * float(np.linalg.norm(delta))


def test_every_maze_holds_goals_more_than_100_steps_away() -> None:
    for layout in range(40):
        factors = MazeFactors(layout=layout)
        first = steps_from(factors, draw_free(factors, np.random.default_rng(layout)))
        end = PIXELS[np.where(np.isfinite(first), first, -1).argmax()]  # an end of the longest way in a tree
        farthest = steps_from(factors, end)
        assert farthest[np.isfinite(farthest)].max() > 101


def test_far_tasks_are_redrawn_the_same_from_the_same_seed() -> None:
    draws = [RoomsVectorEnv("Maze", 2).reset(seed=[3, 9], options={"task": {"min_steps": 101}})[1] for _ in range(2)]
    for name, column in draws[0].items():
        assert np.array_equal(column, draws[1][name]), name


def test_distractors_stay_in_the_picture_and_repeat_from_the_same_seed() -> None:
    factors = {"distractors": 4, "distractor_colour": (0, 0, 255), "floor_colour": (0, 0, 0), "wall_colour": (0, 0, 0)}
    runs = []
    for _ in range(2):
        env = RoomEnv("TwoRoom", vary=[], factors=factors)
        frames = [env.reset(seed=2)[0]] + [env.step(np.zeros(2, np.float32))[0] for _ in range(60)]
        runs.append(np.stack(frames))
    assert np.array_equal(*runs)
    blue = (runs[0][..., 2] / 255.0).sum((1, 2))
    assert blue.max() < 4 * np.pi * 2**2 + 8  # four discs of radius 2, less where they overlap, plus the agent's blue
    assert blue.min() > np.pi * 2**2


def test_a_distractor_turns_back_at_the_edge() -> None:
    env = RoomEnv("TwoRoom", vary=[], factors={"distractors": 1})
    frames = [env.reset(seed=2)[0]] + [env.step(np.zeros(2, np.float32))[0] for _ in range(300)]
    assert (np.diff(np.stack(frames[100:]).astype(int), axis=0) != 0).any((1, 2, 3)).mean() > 0.9


@pytest.mark.parametrize("size", [48, 64, 200])
def test_the_picture_shows_the_agent_where_it_is_at_any_resolution(size: int) -> None:
    factors = {"agent_colour": (255, 0, 0), "floor_colour": (0, 0, 0), "wall_colour": (0, 0, 0)}
    frames, infos = RoomsVectorEnv("TwoRoom", 30, vary=["agent_radius"], factors=factors, size=size).reset(seed=1)
    grid = (np.arange(size) + 0.5) * 64 / size
    red = frames[..., 0] / 255.0
    area = red.sum((1, 2))
    centre = np.stack([red.sum(1) @ grid, red.sum(2) @ grid], axis=1) / area[:, None]
    assert np.abs(centre - infos["position"]).max() < 0.1
    assert area * (64 / size) ** 2 == pytest.approx(np.pi * infos["agent_radius"] ** 2, rel=0.08)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RoomEnv("FourRooms", vary=[], factors={"door_positions": (32, 48, 16, 48)}), r"door_positions\.0"),
        (
            lambda: RoomEnv("FourRooms").reset(options={"factors": {"door_positions": (16, 48, 16, 99)}}),
            r"door_positions\.3",
        ),
        (lambda: RoomsVectorEnv("TwoRoom", 0), "at least 1"),
        (lambda: RoomEnv("TwoRoom").reset(options={"task": {"min_step": 3}}), "did you mean 'min_steps'"),
    ],
)
def test_what_is_out_of_range_or_misspelt_is_named(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_importing_the_worlds_is_light_and_silent() -> None:
    code = "import gymnasium, sys, worldloom.envs as w; w.register_envs(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
