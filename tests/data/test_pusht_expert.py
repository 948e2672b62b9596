"""The expert for PushT reaches its targets, and what it logs says that it sees the simulator."""

import math
from pathlib import Path

import numpy as np
import pytest

from worldloom.core.errors import ConfigError
from worldloom.core.types import ActionSpec
from worldloom.data import POLICIES, EpisodeDataset, collect, infos_for
from worldloom.data.pusht_expert import PushTExpert
from worldloom.envs import VectorWorld
from worldloom.evaluation import gym_protocol
from worldloom.evaluation.goals import draw_tasks

pytest.importorskip("gym_pusht")

ACTION = ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))
WORLD = "worldloom/PushT-v0"


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


def test_most_targets_are_reached() -> None:
    size, patience = 6, 150
    reached, replaced = 0, 0
    with VectorWorld(WORLD, size, {"size": 8}) as world:
        expert = POLICIES["pusht-expert"](world.action, patience=patience)
        assert isinstance(expert, PushTExpert)
        expert.reset([np.random.default_rng(seed) for seed in range(size)])
        frame = world.reset(list(range(size)), lambda row: "")
        targets = expert.targets
        for _ in range(300):
            infos = infos_for(expert, frame, "pusht-expert")
            expert.see(infos)
            actions = expert.act(frame.observations)
            pose = np.concatenate([infos["block"], infos["angle"]], axis=1) - targets
            turn = np.abs((pose[:, 2] + math.pi) % (2 * math.pi) - math.pi)
            new = (expert.targets != targets).any(axis=1)
            near = (np.hypot(pose[:, 0], pose[:, 1]) < 20) & (turn < math.radians(20))
            replaced, reached = replaced + int(new.sum()), reached + int((new & near).sum())
            targets = expert.targets
            frame = world.step(actions, frame.rows)
    assert replaced >= 20  # 12 if none were reached
    assert reached / replaced > 0.8


def test_the_block_moves_with_a_purpose(tmp_path: Path) -> None:
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
    one, many = log_of(tmp_path / "one", "pusht-expert", 3, 1), log_of(tmp_path / "many", "pusht-expert", 3, 3)
    for first, second in ((one.episode(number), many.episode(number)) for number in range(3)):
        np.testing.assert_array_equal(first.actions, second.actions)
        np.testing.assert_array_equal(first.labels["block"], second.labels["block"])
    assert one.spec.environment["policy_sees"] == ["agent", "block", "angle"]
    assert "policy_sees" not in log_of(tmp_path / "weak", "near-object", 1, 1, steps=2).spec.environment
    assert len(log_of(tmp_path / "one", "pusht-expert", 4, 1)) == 4  # a dataset can be completed


def test_goals_come_from_the_expert() -> None:
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
