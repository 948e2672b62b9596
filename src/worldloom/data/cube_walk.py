"""A clumsy arm: it fumbles about an object whose place it sees, and now and then has it in its gripper."""

from typing import Any

import numpy as np
from jaxtyping import Float32, Float64
from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.protocols import Policy
from worldloom.core.types import ActionSpec, Observations
from worldloom.data.policies import POLICIES

_AXES = 5  # x, y, z, yaw, gripper


class CubeWalkOptions(Config):
    """How the arm fumbles; the defaults are OGBench's cube, lengths in metres.

    `effector` and `block` are where their places (x, y, z) begin in the vector that is seen, `scale` its units to
    the metre and `origin` what it counts from. `reach` is how far an action of 1 goes.
    """

    effector: int = Field(default=12, ge=0)
    block: int = Field(default=19, ge=0)
    scale: float = Field(default=10.0, gt=0)
    origin: tuple[float, float, float] = (0.425, 0.0, 0.0)
    low: tuple[float, float, float] = (0.30, -0.28, 0.02)  # where the effector goes; beyond, the block gets lost
    high: tuple[float, float, float] = (0.55, 0.28, 0.25)
    reach: float = Field(default=0.05, gt=0)

    spread: float = Field(default=0.03, gt=0)  # standard deviation of the places about the block, along x and y
    elsewhere: float = Field(default=0.15, ge=0, le=1)  # share of places that are drawn anywhere
    down: float = Field(default=0.6, ge=0, le=1)  # share of heights at the table
    patience: float = Field(default=12.0, ge=1)  # mean number of steps before a place is drawn anew; so heights ...
    grip_patience: float = Field(default=10.0, ge=1)  # ... and whether the gripper opens or closes
    gain: float = Field(default=0.5, gt=0)  # share of the way that is left, for each step
    noise: float = Field(default=0.3, ge=0)  # standard deviation of each action, in shares of the largest


class CubeWalk:
    """Draws places about the block, heights, and whether to open or close, each by a clock of its own.

    It aims at nothing: no draw knows of another, nor of where the block should go. It reads no more than two
    places of the vector that any agent sees. The action is (x, y, z, yaw, closing of the gripper).
    """

    def __init__(self, action: ActionSpec, options: CubeWalkOptions) -> None:
        if action.size != _AXES or action.discrete:
            raise ConfigError(
                f"the policy 'cube-walk' moves an arm by (x, y, z, yaw, gripper) and needs {_AXES} continuous actions; "
                f"this world has {action.size}. Choose another (directed-walk)"
            )
        self._options = options
        self._low, self._high = np.array(action.low), np.array(action.high)
        self._generators: list[np.random.Generator] = []
        self._place: Float64[np.ndarray, "B 2"] = np.zeros((0, 2))  # metres; relative to the block unless `_free`
        self._free: np.ndarray = np.zeros(0, bool)
        self._height: np.ndarray = np.zeros(0)
        self._grip: np.ndarray = np.zeros(0)
        self._turn: np.ndarray = np.zeros(0)

    def reset(self, generators: list[np.random.Generator]) -> None:
        """Start one episode for each generator."""
        self._generators = generators
        count = len(generators)
        self._place, self._free = np.zeros((count, 2)), np.zeros(count, bool)
        self._height, self._grip, self._turn = np.zeros(count), np.zeros(count), np.zeros(count)
        for row, generator in enumerate(generators):
            self._draw_place(row, generator)
            self._draw_height(row, generator)
            self._draw_grip(row, generator)

    def act(self, observations: Observations) -> Float32[np.ndarray, "B A"]:
        """Return one action for each episode.

        Raises:
            DataError: the observations hold no vector, or one that is too short.
        """
        options = self._options
        size = 0 if observations.vector is None else observations.vector.shape[1]
        if observations.vector is None or size < max(options.effector, options.block) + 3:
            raise DataError(
                f"the policy 'cube-walk' reads a vector's values {options.effector} and {options.block} and the two "
                f"after each; this world shows {size}. Choose another, or give the options effector and block"
            )
        vector = observations.vector.numpy().astype(np.float64)
        noise = np.empty((len(vector), _AXES))
        for row, generator in enumerate(self._generators):
            place, height, grip = generator.random(3)
            if place < 1 / options.patience:
                self._draw_place(row, generator)
            if height < 1 / options.patience:
                self._draw_height(row, generator)
            if grip < 1 / options.grip_patience:
                self._draw_grip(row, generator)
            noise[row] = generator.standard_normal(_AXES)
        effector, block = (
            vector[:, first : first + 3] / options.scale + options.origin for first in (options.effector, options.block)
        )
        flat = np.where(self._free[:, None], self._place, block[:, :2] + self._place)
        target = np.clip(np.column_stack([flat, self._height]), options.low, options.high)
        wish = np.column_stack([options.gain * (target - effector) / options.reach, self._turn, self._grip])
        actions: np.ndarray = np.clip((wish + options.noise * noise) * self._high, self._low, self._high)
        return actions.astype(np.float32)

    def _draw_place(self, row: int, generator: np.random.Generator) -> None:
        options = self._options
        self._free[row] = generator.random() < options.elsewhere
        near, anywhere = generator.standard_normal(2), generator.uniform(options.low[:2], options.high[:2])
        self._place[row] = anywhere if self._free[row] else options.spread * near
        self._turn[row] = generator.uniform(-1, 1)

    def _draw_height(self, row: int, generator: np.random.Generator) -> None:
        low, high = self._options.low[2], self._options.high[2]
        down, anywhere = generator.random() < self._options.down, generator.uniform(low, high)
        self._height[row] = low if down else anywhere

    def _draw_grip(self, row: int, generator: np.random.Generator) -> None:
        self._grip[row] = generator.choice([-1.0, 1.0]) * generator.uniform(0.3, 1.0)


@POLICIES.register("cube-walk")
def cube_walk(action: ActionSpec, **options: Any) -> Policy:
    """Return a cube walk; `options` are the fields of `CubeWalkOptions`."""
    return CubeWalk(action, CubeWalkOptions.parse(options))
