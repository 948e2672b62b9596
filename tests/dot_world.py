"""A tiny world that keeps the contract of the `task` option, agents for it, and a policy to log with."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from worldloom.core.seams import Agent
from worldloom.core.types import ActionSpec, Goal, Observations
from worldloom.data import POLICIES
from worldloom.evaluation import Protocol, Split, SuccessRule, gym_protocol

SIDE = 20.0


class Dot(gymnasium.Env[Any, Any]):
    """A point in a square of 20 units moves at most 1 unit along each axis; nothing is in its way.

    `fault` makes it raise or return NaN at step 3 of every episode that starts in its left half.
    """

    def __init__(self, fault: str = "", end_at: int | None = None, seeded: bool = True) -> None:
        self.observation_space = spaces.Dict(
            {"image": spaces.Box(0, 255, (16, 20, 3), np.uint8), "state": spaces.Box(0, SIDE, (2,), np.float32)}
        )
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self._fault, self._end_at, self._seeded = fault, end_at, seeded

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        generator = self.np_random if self._seeded else np.random.default_rng()
        self._position = generator.uniform(0, SIDE, 2).astype(np.float32)
        self._left, self._steps, self._goal = self._position[0] < SIDE / 2, 0, None
        info = self._info()
        if options and "task" in options:
            least = options["task"].get("min_distance", 0.0)
            goal = generator.uniform(0, SIDE, 2).astype(np.float32)
            while np.linalg.norm(goal - self._position) <= least:
                goal = generator.uniform(0, SIDE, 2).astype(np.float32)
            self._goal = goal
            info |= {
                "goal": self._observe(goal),
                "goal_position": goal,
                "shortest_steps": float(np.ceil(np.abs(goal - self._position).max())),
                "wall_between": bool((goal[0] < SIDE / 2) != self._left),
            }
        return self._observe(self._position), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        faulty = self._left and self._steps == 3
        if faulty and self._fault == "raise":
            raise RuntimeError("the motor is broken")
        self._position = np.clip(self._position + action, 0, SIDE).astype(np.float32)
        seen = self._observe(self._position)
        if faulty and self._fault == "nan":
            seen["state"] = np.full(2, np.nan, np.float32)
        return seen, 0.0, self._steps == self._end_at, False, self._info()

    def _info(self) -> dict[str, Any]:
        return {"position": self._position.copy(), "success": bool(self._position[0] > 15)}

    @staticmethod
    def _observe(position: np.ndarray) -> dict[str, np.ndarray]:
        image = np.full((16, 20, 3), 240, np.uint8)
        image[int(position[1] * 0.75), min(int(position[0]), 19)] = (200, 40, 40)
        return {"image": image, "state": position.copy()}


gymnasium.register("tests/Dot-v0", entry_point=Dot)


class Homing(Agent):
    """Walks straight to the goal's state."""

    def reset(self, goal: Goal) -> None:
        assert goal.observations.vector is not None
        self.goal = goal.observations.vector
        self.resets = [*getattr(self, "resets", []), self.goal]

    def act(self, observations: Observations) -> Tensor:
        assert observations.vector is not None
        return (self.goal - observations.vector).clamp(-1, 1)


class NarrowHoming(Homing):
    """The same, but forgets environments that are over; counts how many it acted for."""

    narrows = True

    acted = 0

    def select(self, rows: Sequence[int]) -> None:
        self.goal = self.goal[list(rows)]

    def act(self, observations: Observations) -> Tensor:
        self.acted += len(self.goal)
        return super().act(observations)


class Still(Homing):
    """Never moves."""

    def act(self, observations: Observations) -> Tensor:
        return torch.zeros_like(self.goal)


@POLICIES.register("tests-wander")
class Wander:
    """A logging policy: a new uniform action at each step."""

    def __init__(self, action: ActionSpec, reach: float = 1.0) -> None:
        self._size, self._reach = action.size, reach

    def reset(self, generators: list[np.random.Generator]) -> None:
        self._generators = generators
        self._bias = [generator.uniform(-0.7, 0.7, self._size) for generator in generators]

    def act(self, observations: Observations) -> np.ndarray:
        drawn = [
            bias + generator.uniform(-0.3, 0.3, self._size)
            for bias, generator in zip(self._bias, self._generators, strict=True)
        ]
        return (self._reach * np.stack(drawn)).astype(np.float32)


@pytest.fixture
def protocol() -> Protocol:
    return Protocol(
        name="dots",
        env_id="tests/Dot-v0",
        splits={"far": Split(episodes=12, task={"split": "any"}), "near": Split(episodes=7, task={"split": "any"})},
        success=SuccessRule(source="info", name="position", radius=0.5, unit="units"),
        min_distance=3.0,
        budget=25,
    )


@pytest.fixture
def logged() -> Protocol:
    return gym_protocol(
        "tests/Dot-v0", success="position:0.5", goal_offset=8, budget=20, episodes=9, policy="tests-wander", seed=3
    )


@pytest.fixture
def agents() -> dict[str, type[Homing]]:
    return {"homing": Homing, "narrow": NarrowHoming, "still": Still}


@pytest.fixture
def wander() -> type[Wander]:
    return Wander
