"""A point on a line, a protocol for it, and an agent that goes to its goal and away again."""

from typing import Any

import gymnasium
import numpy as np
import torch

from worldloom.core.seams import Agent
from worldloom.core.types import Goal, Observations
from worldloom.evaluation import Protocol, Split


class Track(gymnasium.Env):
    """A point on a line, moved by the action."""

    observation_space = gymnasium.spaces.Box(-1e3, 1e3, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = float(self.np_random.uniform(-2, 2))
        return self._see(), self._tell()

    def step(self, action):
        self.position += float(action[0])
        return self._see(), 0.0, False, False, self._tell()

    def _see(self):
        return np.array([self.position], np.float32)

    def _tell(self) -> dict[str, Any]:
        return {"position": self._see(), "pose": np.append(self._see(), 0), "pair": np.zeros(2, np.float32)}


gymnasium.register("tests/Track-v0", entry_point=Track)


def track(**changes: Any) -> Protocol:
    values = {
        "name": "track",
        "env_id": "tests/Track-v0",
        "goal_source": "logged-policy",
        "splits": {"ahead": Split(goal_offset=6, episodes=10)},
        "success": {"source": "info", "name": "position", "radius": 0.4, "hold": 3},
        "budget": 30,
        **changes,
    }
    return Protocol.parse(values)


class Shuttle(Agent):
    """Goes to the goal; once there, stays for `stay` steps and then goes away for one step, again and again."""

    narrows = False

    def __init__(self, stay: int) -> None:
        self.stay = stay

    def reset(self, goal: Goal) -> None:
        assert goal.observations.vector is not None
        self.goal = goal.observations.vector
        self.there = torch.zeros(len(self.goal))

    def act(self, observations: Observations) -> torch.Tensor:
        assert observations.vector is not None
        away = self.goal - observations.vector
        near = away[:, 0].abs() <= 0.4
        self.there = torch.where(near, self.there + 1, 0.0)
        leaves = self.there >= self.stay
        return torch.where(leaves[:, None], 1.0, away.clamp(-1, 1))
