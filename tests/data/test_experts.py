"""The experts reach their targets, and what they log says that they see the simulator."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldloom.agents.guarded_policy import GuardedPolicy
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.types import ActionSpec, Observations
from worldloom.data import POLICIES, EpisodeDataset, collect, infos_for
from worldloom.data.expert import Expert
from worldloom.envs import VectorWorld
from worldloom.evaluation import gym_protocol
from worldloom.evaluation.goals import draw_tasks

ACTION = ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))
WORLD = "worldloom/PushT-v0"
Near = Callable[[np.ndarray], np.ndarray]


def need(module: str) -> None:
    if find_spec(module) is None:  # not an import, because worldloom must choose OpenGL before mujoco is imported
        pytest.skip(f"{module} is not installed")


def log_of(path: Path, policy: str, episodes: int, num_envs: int, steps: int = 60) -> EpisodeDataset:
    return collect(
        path,
        env_id=WORLD,
        env_kwargs={"size": 8},
        episodes=episodes,
        steps=steps,
        policy=policy,
        num_envs=num_envs,
        seed=3,
    )


def reached_and_replaced(world: str, policy: str, info: str, steps: int, near: Near, **env_kwargs: Any) -> list[int]:
    """Return of how many targets of an expert were reached, and how many were replaced, in six episodes."""
    size, counts = 6, np.zeros(2, int)
    with VectorWorld(world, size, env_kwargs) as envs:
        expert = POLICIES[policy](envs.action)
        assert isinstance(expert, Expert)
        expert.reset([np.random.default_rng(seed) for seed in range(size)])
        frame = envs.reset(list(range(size)), lambda row: "")
        targets = expert.targets
        for _ in range(steps):
            expert.see(infos_for(expert, frame, policy))
            actions = expert.act(frame.observations)
            reached = near(frame.vector(info.split("+"), "info", "the test") - targets)
            new = (expert.targets != targets).any(axis=1)
            counts += [int((new & reached).sum()), int(new.sum())]
            targets = expert.targets
            frame = envs.step(actions, frame.rows)
    return counts.tolist()


def around(angles: np.ndarray) -> np.ndarray:
    return np.abs((angles + math.pi) % (2 * math.pi) - math.pi)


def test_most_targets_in_pusht_are_reached() -> None:
    need("gym_pusht")

    def near(gap: np.ndarray) -> np.ndarray:
        return (np.hypot(gap[:, 0], gap[:, 1]) < 20) & (around(gap[:, 2]) < math.radians(20))

    reached, replaced = reached_and_replaced(WORLD, "pusht-expert", "block+angle", 250, near, size=8)
    assert replaced >= 12  # after 250 steps, at most 6 targets were replaced without success
    assert reached / replaced > 0.8


def test_most_targets_in_two_rooms_are_reached() -> None:
    def near(gap: np.ndarray) -> np.ndarray:
        return np.linalg.norm(gap, axis=1) < 3

    reached, replaced = reached_and_replaced("worldloom/TwoRoom-v0", "two-room-expert", "position", 150, near)
    assert reached == replaced  # a target is never replaced without success
    assert replaced >= 30  # one in 30 steps, through the door in half of the cases


def test_most_targets_of_reacher_are_reached() -> None:
    need("mujoco")

    def near(gap: np.ndarray) -> np.ndarray:
        return around(gap).max(axis=1) < 0.1

    reached, replaced = reached_and_replaced("worldloom/Reacher-v0", "reacher-expert", "joints", 150, near, size=8)
    assert replaced >= 14  # after 150 steps, at most 6 targets were replaced without success
    assert reached / replaced > 0.9


def test_most_targets_of_the_cube_are_reached() -> None:
    need("ogbench")

    def near(gap: np.ndarray) -> np.ndarray:
        return np.linalg.norm(gap, axis=1) < 0.03

    reached, replaced = reached_and_replaced("worldloom/Cube-v0", "cube-expert", "block", 190, near)
    assert replaced >= 6  # none within 190 steps without success
    assert reached / replaced > 0.8


def test_the_block_moves_with_a_purpose(tmp_path: Path) -> None:
    need("gym_pusht")
    changed = {}
    for policy in ("pusht-expert", "near-object"):
        moves = []
        log = log_of(tmp_path / policy, policy, 6, 6, steps=75)
        for episode in map(log.episode, range(len(log))):
            block, angle = episode.labels["block"], episode.labels["angle"][:, 0]
            turn = np.abs((angle[25:] - angle[:-25] + math.pi) % (2 * math.pi) - math.pi)
            moves.append((np.linalg.norm(block[25:] - block[:-25], axis=1) > 5) | (turn > math.radians(5)))
        changed[policy] = np.concatenate(moves).mean()
    assert changed["pusht-expert"] > 0.9
    assert changed["pusht-expert"] > changed["near-object"] + 0.1


def test_the_log_does_not_depend_on_the_batch_and_names_what_was_seen(tmp_path: Path) -> None:
    need("gym_pusht")
    one, many = log_of(tmp_path / "one", "pusht-expert", 3, 1), log_of(tmp_path / "many", "pusht-expert", 3, 3)
    for first, second in ((one.episode(number), many.episode(number)) for number in range(3)):
        np.testing.assert_array_equal(first.actions, second.actions)
        np.testing.assert_array_equal(first.labels["block"], second.labels["block"])
    assert one.spec.environment["policy_sees"] == ["agent", "block", "angle"]
    assert "policy_sees" not in log_of(tmp_path / "weak", "near-object", 1, 1, steps=2).spec.environment
    assert len(log_of(tmp_path / "one", "pusht-expert", 4, 1)) == 4  # a dataset can be completed


def test_goals_come_from_the_expert() -> None:
    need("gym_pusht")
    protocol = gym_protocol(WORLD, success="block:20", policy="pusht-expert", env_kwargs={"size": 8}, episodes=4)
    with VectorWorld(WORLD, 4, {"size": 8}, native=False) as world:
        tasks, _ = draw_tasks(protocol, "25 steps away", world, 0, "goals")
    assert tasks.start_distance is not None
    assert (tasks.start_distance > 20).all()


def test_what_the_expert_needs() -> None:
    with pytest.raises(ConfigError, match="needs 2 continuous action values"):
        POLICIES["pusht-expert"](ActionSpec(low=(-1.0,), high=(1.0,)))
    with pytest.raises(ConfigError, match="must not exceed 'fastest'"):
        POLICIES["pusht-expert"](ACTION, slowest=0.9)
    protocol = gym_protocol("worldloom/TwoRoom-v0", success="position:3", policy="pusht-expert")
    with (
        VectorWorld("worldloom/TwoRoom-v0", 1) as world,
        pytest.raises(ConfigError, match="the policy 'pusht-expert' uses 'agent', which this environment does not"),
    ):
        draw_tasks(protocol, "25 steps away", world, 0, "goals")
    cube = POLICIES["cube-expert"](ActionSpec(low=(-1.0,) * 5, high=(1.0,) * 5))
    cube.reset([np.random.default_rng(0)])
    with pytest.raises(DataError, match="needs the state vector of worldloom/Cube-v0, with 28 values"):
        cube.act(Observations.from_numpy(None, np.zeros((1, 3), np.float32)))
    with pytest.raises(ConfigError, match="must act on observations, but PushTExpert sees the simulator's agent"):
        GuardedPolicy(POLICIES["pusht-expert"](ACTION), build=lambda **parts: pytest.fail("no agent was needed"))
