"""Foreign policies under our protocols, and our agents in a foreign evaluator's loop."""

from typing import Any

import numpy as np
import pytest
import torch

from worldloom.core.errors import DataError
from worldloom.core.seams import Agent
from worldloom.core.types import ActionSpec, Goal, Observations, ObservationSpec
from worldloom.evaluation import PROTOCOLS, ForeignPolicy, LentPolicy, evaluate

ACTION = ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0))
SPEC = ObservationSpec(pixels=(8, 8, 3), vector=2)


class Recorder:
    """A foreign policy that keeps what it was shown."""

    def __init__(self, answer: Any = None) -> None:
        self.answer, self.infos, self.envs = answer, [], []

    def set_env(self, env: Any) -> None:
        self.envs.append(env)

    def get_action(self, info: dict[str, Any]) -> Any:
        self.infos.append({name: np.array(value) for name, value in info.items()})
        size = len(info["pixels"])
        return np.full((size, 2), 0.5) if self.answer is None else self.answer(size)


def see(size: int, fill: int = 0) -> Observations:
    pixels = np.full((size, 8, 8, 3), fill, np.uint8)
    return Observations.from_numpy(pixels, np.full((size, 2), fill, np.float32))


def test_a_foreign_policy_sees_the_fields_layout() -> None:
    policy = Recorder()
    agent = ForeignPolicy(policy, ACTION)
    agent.reset(Goal(observations=see(3, 9)))
    first = agent.act(see(3, 1))
    agent.act(see(3, 2))
    assert policy.envs[0].num_envs == 3
    assert policy.envs[0].action_space.shape == (3, 2)
    begin, then = policy.infos
    assert begin["pixels"].shape == (3, 1, 8, 8, 3)
    assert begin["goal"].dtype == np.uint8
    assert (begin["goal"] == 9).all()
    assert (begin["goal_proprio"] == 9).all()
    assert begin["_needs_flush"].all()
    assert not then["_needs_flush"].any()
    assert np.isnan(begin["action"]).all()
    assert begin["terminated"].shape == (3, 1)
    np.testing.assert_array_equal(then["action"][:, 0], first.numpy())
    assert (then["pixels"] == 2).all()


def test_a_foreign_policy_stands_in_a_table_of_ours() -> None:
    protocol = PROTOCOLS["two-room@1"].customise(episodes=2, budget=3)
    policy = Recorder(lambda size: torch.full((size, 2), 7.0))  # beyond the bounds: clipped
    row = evaluate(protocol, {"foreign": lambda: ForeignPolicy(policy, ACTION)}, record=0).rows[0]
    assert row.overall.n == 2
    assert policy.infos[0]["pixels"].shape[1:] == (1, 64, 64, 3)


def test_a_seeded_foreign_policy_repeats_its_table() -> None:
    class Dice(Recorder):
        seed = 3

        def set_seed(self, seed: int) -> None:
            self.envs[-1].action_space.seed(seed)

        def get_action(self, info: dict[str, Any]) -> Any:
            super().get_action(info)
            return self.envs[-1].action_space.sample()

    protocol = PROTOCOLS["two-room@1"].customise(episodes=4, budget=3)
    tables = []
    for _ in range(2):
        policy = Dice()
        tables.append(evaluate(protocol, {"dice": lambda: ForeignPolicy(policy, ACTION)}, batch=2, record=0))  # noqa: B023
        acted = [info["action"] for info in policy.infos if not np.isnan(info["action"]).any()]
        assert not np.array_equal(acted[0], acted[2])  # the second batch draws on
    first, second = ([episode.end_distance for episode in table.rows[0].episodes] for table in tables)
    assert first == second


@pytest.mark.parametrize("wrong", [lambda size: np.zeros((size, 3)), lambda size: np.full((size, 2), np.nan)])
def test_a_foreign_policys_odd_answer_is_named(wrong: Any) -> None:
    agent = ForeignPolicy(Recorder(wrong), ACTION)
    agent.reset(Goal(observations=see(2)))
    with pytest.raises(DataError, match="Recorder returned actions"):
        agent.act(see(2))


class Toward(Agent):
    """An agent that counts its steps and goes where its goal's fill says."""

    narrows = True

    made: list["Toward"] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.made.append(self)

    def reset(self, goal: Goal) -> None:
        self.goal, self.steps = goal.observations.vector[:, :2].clone(), 0

    def select(self, rows: list[int]) -> None:
        self.goal = self.goal[rows]

    def act(self, observations: Observations) -> torch.Tensor:
        assert observations.axes[0] == len(self.goal)
        self.steps += 1
        return (self.goal - observations.vector).clamp(-1, 1)


def lend() -> LentPolicy:
    Toward.made = []
    return LentPolicy(Toward, SPEC, ACTION)


def info_of(now: np.ndarray, goal: np.ndarray, **more: Any) -> dict[str, Any]:
    def pixels(values: np.ndarray) -> np.ndarray:
        return np.tile(values.astype(np.uint8)[:, None, None, None, None], (1, 1, 8, 8, 3))

    def proprio(values: np.ndarray) -> np.ndarray:
        return np.tile(values[:, None, None], (1, 1, 2)).astype(np.float32)

    return {
        "pixels": pixels(now), "goal": pixels(goal), "proprio": proprio(now), "goal_proprio": proprio(goal), **more,
    }  # fmt: skip


def test_ours_walks_to_its_goals_in_a_foreign_loop() -> None:
    """The calls of stable-worldmodel's evaluator: act, step, a flag where an episode was reset, dead rows masked."""
    policy = lend()
    policy.set_env(None)
    now, goal = np.array([0.0, 5.0, 9.0]), np.array([3.0, 5.0, 2.0])
    flush = np.array([True, True, True])
    for step in range(12):
        dead = now == goal
        action = policy.get_action(info_of(now, goal, _needs_flush=flush, terminated=dead), horizon=1)
        assert action.shape == (3, 2)
        assert (action[dead] == 0).all()
        now, flush = now + action[:, 0], np.zeros(3, bool)
        if step == 5:
            now[0], goal[0], flush[0] = 0.0, 4.0, True
    np.testing.assert_array_equal(now, goal)
    assert len(Toward.made) == 2  # one for the batch, one for the episode that began later


def test_a_changed_goal_begins_anew_without_a_flag() -> None:
    policy = lend()
    assert policy.get_action(info_of(np.zeros(2), np.array([5.0, 5.0])))[:, 0].tolist() == [1, 1]
    assert policy.get_action(info_of(np.array([9.0, 0.0]), np.array([5.0, 7.0])))[:, 0].tolist() == [-1, 1]
    assert len(Toward.made) == 2


def test_a_flag_left_standing_does_not_start_episodes_again() -> None:
    """stable-worldmodel never takes `_needs_flush` back; `step_idx` says what it means."""
    policy, flag, far = lend(), np.ones(2, bool), np.array([9.0, 9.0])
    for step in range(4):
        steps = np.array([[step], [step if step < 2 else step - 2]])
        policy.get_action(info_of(np.zeros(2), far, _needs_flush=flag, step_idx=steps))
    assert [agent.steps for agent in Toward.made] == [4, 2]
    policy.get_action(info_of(np.zeros(2), far, step_idx=np.zeros((2, 1), int)))  # a reset that nobody announced
    assert len(Toward.made) == 3
    policy.get_action(info_of(np.zeros(2), far, _needs_flush=flag, step_idx=np.zeros((2, 1), int)))  # ended at once
    assert len(Toward.made) == 4


def test_pictures_of_other_layouts_and_sizes_are_brought_to_the_models() -> None:
    seen: list[Observations] = []

    class Eye(Toward):
        def reset(self, goal: Goal) -> None:
            pass

        def act(self, observations: Observations) -> torch.Tensor:
            seen.append(observations)
            return torch.zeros(1, 2)

    policy = LentPolicy(Eye, ObservationSpec(pixels=(8, 8, 3)), ACTION)
    policy.set_env(None)
    picture = np.arange(16 * 16 * 3).reshape(16, 16, 3) % 200
    as_bytes = picture.astype(np.uint8)[None, None]
    for pixels in (as_bytes, as_bytes.transpose(0, 1, 4, 2, 3), torch.from_numpy(as_bytes / 255.0)):
        policy.get_action({"pixels": pixels, "goal": as_bytes})
    expected = picture.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    for observations in seen:
        assert np.abs(observations.pixels[0].numpy() - expected).max() <= 0.5
    with pytest.raises(DataError, match="before they are standardised"):
        policy.get_action({"pixels": as_bytes / 100.0 - 1, "goal": as_bytes})
    with pytest.raises(DataError, match="no key 'goal'; its keys are pixels"):
        policy.get_action({"pixels": as_bytes})
