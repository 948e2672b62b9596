"""A logging policy for an arm: random moves near an object, with occasional grasps, without any goal."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64
from pydantic import Field, model_validator

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.types import ActionSpec, Observations
from worldloom.data.policies import register_policy

_AXES = 5  # x, y, z, yaw, gripper
_OVER = 0.015  # m; tolerance for "above the block" and "at the table"
_ABOVE = 0.1  # m; height at which the fingers clear the block


@dataclass(frozen=True, kw_only=True)
class _Bout:
    """A target of the arm for a random number of steps; `place` (x, y) is relative to the block unless `free` is set.

    `turn` and `grip` are the actions for the yaw and the gripper.
    """

    place: Float64[np.ndarray, "2"]
    height: float
    turn: float
    grip: float
    free: bool = False
    grasps: bool = False


class CubeWalkOptions(Config):
    """Options of the policy "cube-walk", with lengths in metres. The defaults are for OGBench's cube.

    `effector` and `block` are the indices in the observation vector at which the positions (x, y, z) of the effector
    and the block start. Positions in the vector are relative to `origin` and multiplied by `scale`, the vector's units
    per metre. `reach` is the distance that the effector moves for an action of 1.
    """

    effector: int = Field(default=12, ge=0)
    block: int = Field(default=19, ge=0)
    scale: float = Field(default=10.0, gt=0)
    origin: tuple[float, float, float] = (0.425, 0.0, 0.0)
    low: tuple[float, float, float] = (0.35, -0.25, 0.02)  # bounds of the targets; outside, blocks get lost
    high: tuple[float, float, float] = (0.52, 0.25, 0.15)
    reach: float = Field(default=0.05, gt=0)

    grasp: float = Field(default=0.5, ge=0, le=1)  # share of bouts that grasp the block
    elsewhere: float = Field(default=0.4, ge=0, le=1)  # share of bouts to a random place, gripper unchanged
    spread: float = Field(default=0.04, gt=0)  # standard deviation of targets near the block, along x and y
    patience: float = Field(default=10.0, ge=1)  # mean number of steps of a bout
    gain: float = Field(default=0.7, gt=0)  # share of the remaining distance that one step covers
    noise: float = Field(default=0.2, ge=0)  # standard deviation, as a share of the largest action

    @model_validator(mode="after")
    def _shares(self) -> "CubeWalkOptions":
        if self.grasp + self.elsewhere > 1:
            raise ValueError(
                f"'grasp' plus 'elsewhere' must be at most 1; got {self.grasp} and {self.elsewhere}. Lower one"
            )
        return self


@register_policy("cube-walk", CubeWalkOptions)
class CubeWalk:
    """A policy that moves an arm in bouts of random length. A bout has one target: near the block, on it, or random.

    A bout with a target on the block grasps the block.

    The policy has no goal for the block. It reads only the positions of the effector and the block in the observation
    vector. The action is (x, y, z, yaw, closing of the gripper).
    """

    def __init__(self, action: ActionSpec, options: CubeWalkOptions) -> None:
        if action.size != _AXES or action.discrete:
            raise ConfigError(
                f"the policy 'cube-walk' needs {_AXES} continuous action values (x, y, z, yaw, gripper); this "
                f"environment has {action.size} {'discrete' if action.discrete else 'continuous'} ones. Use another "
                f"policy, such as directed-walk"
            )
        self._options = options
        self._low, self._high = np.array(action.low), np.array(action.high)
        self._generators: list[np.random.Generator] = []
        self._bouts: list[_Bout] = []

    def reset(self, generators: list[np.random.Generator]) -> None:
        """Start one episode for each generator."""
        self._generators = generators
        self._bouts = [self._draw(generator, 0.0) for generator in generators]

    def act(self, observations: Observations) -> Float32[np.ndarray, "B A"]:
        """Return one action for each episode.

        Raises:
            DataError: the observations have no vector, or the vector is too short.
        """
        options = self._options
        size = 0 if observations.vector is None else observations.vector.shape[1]
        if observations.vector is None or size < max(options.effector, options.block) + 3:
            raise DataError(
                f"the policy 'cube-walk' needs three values of the observation vector from index {options.effector} "
                f"on, and three from index {options.block} on; the vector of this environment has {size} values. Set "
                f"the options 'effector' and 'block' to smaller indices, or use another policy"
            )
        vector = observations.vector.numpy().astype(np.float64)
        effector, block = (
            vector[:, first : first + 3] / options.scale + options.origin for first in (options.effector, options.block)
        )
        wish = np.empty((len(vector), _AXES))
        for row, generator in enumerate(self._generators):
            if generator.random() < 1 / options.patience:
                self._bouts[row] = self._draw(generator, self._bouts[row].grip)
            wish[row] = self._wish(self._bouts[row], effector[row], block[row])
            wish[row] += options.noise * generator.standard_normal(_AXES)
        actions: np.ndarray = np.clip(wish * self._high, self._low, self._high).astype(np.float32)
        return actions

    def _draw(self, generator: np.random.Generator, grip: float) -> "_Bout":
        """Sample a bout; a bout with a random target keeps the gripper at `grip`."""
        options = self._options
        kind, height = generator.random(2)
        near, turn = options.spread * generator.standard_normal(2), float(generator.uniform(-1, 1))
        anywhere = generator.uniform(options.low, options.high)
        opens = float(generator.uniform(-1, 1))
        if kind < options.grasp:
            return _Bout(place=near / 6, height=options.low[2], turn=0.0, grip=1.0, grasps=True)
        if kind < options.grasp + options.elsewhere:
            return _Bout(
                place=anywhere[:2],
                height=anywhere[2] if height < 0.5 else options.low[2],
                turn=turn,
                grip=grip,
                free=True,
            )
        return _Bout(place=near, height=options.low[2] if height < 0.8 else anywhere[2], turn=turn, grip=opens)

    def _wish(self, bout: "_Bout", effector: Float64[np.ndarray, "3"], block: Float64[np.ndarray, "3"]) -> np.ndarray:
        options = self._options
        flat = bout.place if bout.free else block[:2] + bout.place
        height, grip = bout.height, bout.grip
        if bout.grasps and np.abs(flat - effector[:2]).max() > _OVER:
            height = _ABOVE
        if bout.grasps and effector[2] > options.low[2] + _OVER:
            grip = -1.0
        if not bout.grasps:  # a grasp must reach the block; a push outside the bounds would move it further out
            flat = np.clip(flat, options.low[:2], options.high[:2])
        target = np.array([*flat, height])
        return np.array([*(options.gain * (target - effector) / options.reach), bout.turn, grip])
