"""A logging policy that picks up OGBench's cube and puts it down at one random place after another.

It acts in the phases of OGBench's scripted expert (Park et al., "OGBench", 2025): above the cube, down, grasp, lift,
above the target, down, release, up. The environment's state vector contains all that it needs.
"""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float64
from pydantic import Field, model_validator

from worldloom.core.config import Config
from worldloom.core.errors import DataError
from worldloom.core.types import ActionSpec, Observations
from worldloom.data.expert import Expert, ExpertEpisode, Infos
from worldloom.data.policies import register_policy

_VECTOR = 28  # values of the state vector; lengths in metres below
_EFFECTOR, _EFFECTOR_YAW, _CONTACT, _BLOCK, _BLOCK_YAW = slice(12, 15), slice(15, 17), 18, slice(19, 22), slice(26, 28)
_ORIGIN, _SCALE = np.array([0.425, 0.0, 0.0]), 10.0
_REACH, _TURN = 0.05, 0.3  # m and rad; what an action of 1 does
_TABLE = 0.02  # height of the centre of a cube on the table
_TARGETS = ((0.32, -0.28), (0.53, 0.28))  # x and y; inside OGBench's bounds of targets
_CLEAR = 0.1  # height at which the fingers clear the cube
_LIFTED = (0.1, 0.25)  # the height of a carried cube lies between these
_CLOSE, _FINE = 0.02, 0.012  # a place is reached
_LOST = 0.06  # between effector and cube if the gripper has lost it
_GRASP, _DOWN = 8, 30  # the largest number of steps in these phases

# The phases in their order, and in which of them the gripper is closed.
_PHASES = ("above", "down", "grasp", "lift", "carry", "lower", "release", "up", "rest")
_CLOSED = ("grasp", "lift", "carry", "lower")
_EXACT = ("down", "carry", "lower")


class CubeExpertOptions(Config):
    """Options of the policy "cube-expert"."""

    slowest: float = Field(default=0.2, gt=0, le=1)  # the largest action of an episode lies between these two
    fastest: float = Field(default=0.7, gt=0, le=1)
    noise: float = Field(default=0.2, ge=0)  # the standard deviation of an episode's noise lies between 0 and this
    patience: int = Field(default=200, ge=1)  # steps after which a target is replaced if it is not reached

    @model_validator(mode="after")
    def _ordered(self) -> "CubeExpertOptions":
        if self.slowest > self.fastest:
            raise ValueError(f"'slowest' must not exceed 'fastest'; got {self.slowest} and {self.fastest}")
        return self


class _Picker(ExpertEpisode):
    """The expert of one episode."""

    def __init__(self, options: CubeExpertOptions, generator: np.random.Generator) -> None:
        self._options, self._generator = options, generator
        self._largest = generator.uniform(options.slowest, options.fastest)
        self._noise = generator.uniform(0, options.noise)
        self._draw()

    @property
    def target(self) -> Float64[np.ndarray, "3"]:
        """The place (x, y, z) to which the cube is brought."""
        return self._target

    def _draw(self) -> None:
        """Draw a new target, the cube's yaw there, and where the arm goes afterwards."""
        generator = self._generator
        self._target = np.array([*generator.uniform(*_TARGETS), _TABLE])
        self._yaw = generator.uniform(-math.pi / 4, math.pi / 4)
        self._height = generator.uniform(*_LIFTED)
        self._rest = np.array([*generator.uniform(*_TARGETS), generator.uniform(*_LIFTED)])
        self._left = self._options.patience
        self._begin("above")

    def _begin(self, phase: str) -> None:
        self._phase, self._waited = phase, 0

    def act(self, infos: Infos) -> Float64[np.ndarray, "5"]:
        """Return the next action: x, y, z, yaw and the closing of the gripper."""
        effector, block = infos["effector"], infos["block"]
        self._left, self._waited = self._left - 1, self._waited + 1
        if self._left < 0:
            self._draw()
        elif self._failed(float(np.linalg.norm(block - effector))):
            self._begin("above")
        elif self._over(self._place(effector, block) - effector, bool(infos["contact"][0] > 0.5)):
            if self._phase == "rest":
                self._draw()
            else:
                self._begin(_PHASES[_PHASES.index(self._phase) + 1])
        move = (self._place(effector, block) - effector) / _REACH
        move *= min(1.0, self._largest / max(float(np.abs(move).max()), 1e-9))
        # The fingers turn to the nearest sides of the cube, and with the cube to the target's yaw.
        yaw = self._yaw if self._phase in _CLOSED[1:] else float(infos["block_yaw"][0])
        turn = 0.0 if self._phase in ("up", "rest") else math.remainder(yaw - float(infos["yaw"][0]), math.pi / 2)
        turn = min(max(turn / _TURN, -self._largest), self._largest)
        noise = self._noise * self._largest * self._generator.standard_normal(4)
        return np.array([*(np.array([*move, turn]) + noise), 1.0 if self._phase in _CLOSED else -1.0])

    def _place(self, effector: Float64[np.ndarray, "3"], block: Float64[np.ndarray, "3"]) -> Float64[np.ndarray, "3"]:
        """Return where the effector should be in the present phase."""
        places: dict[str, np.ndarray] = {
            "above": block + np.array([0.0, 0.0, _CLEAR]),
            "down": block,
            "grasp": block,
            "lift": np.array([*effector[:2], self._height]),
            "carry": np.array([*self._target[:2], self._height]),
            "lower": self._target,
            "release": effector,
            "up": np.array([*effector[:2], _TABLE + _CLEAR]),
            "rest": self._rest,
        }
        return places[self._phase]

    def _failed(self, distance: float) -> bool:
        """Return whether the cube must be approached again, at this distance from the effector."""
        if self._phase in _CLOSED[1:]:
            return distance > _LOST
        longest = {"down": _DOWN, "grasp": _GRASP}.get(self._phase)
        return longest is not None and self._waited > longest

    def _over(self, gap: Float64[np.ndarray, "3"], contact: bool) -> bool:
        """Return whether the present phase is over, with this gap between the effector and its place."""
        if self._phase == "grasp":
            return contact
        if self._phase == "release":
            return not contact or self._waited > _GRASP
        if self._phase == "above":
            return bool(np.linalg.norm(gap[:2]) < _FINE and abs(gap[2]) < 2 * _CLOSE)
        return bool(np.linalg.norm(gap) < (_FINE if self._phase in _EXACT else _CLOSE))


@register_policy("cube-expert", CubeExpertOptions)
class CubeExpert(Expert):
    """A policy that carries the cube to one random place after another, with a speed and noise of each episode.

    A target is a place (x, y, z) in metres. The policy reads the state vector, so pixels alone are not enough: use
    `observation="both"`.
    """

    sees = ()
    size = 5

    def __init__(self, action: ActionSpec, options: CubeExpertOptions) -> None:
        super().__init__(action, "cube-expert")
        self._options = options

    def begin(self, generator: np.random.Generator) -> ExpertEpisode:
        """Return the expert of one episode."""
        return _Picker(self._options, generator)

    def states(self, observations: Observations) -> list[Mapping[str, Float64[np.ndarray, "L"]]]:
        """Return what the state vector says of each episode.

        Raises:
            DataError: the observations have no vector, or a vector of another size.
        """
        size = 0 if observations.vector is None else observations.vector.shape[1]
        if observations.vector is None or size != _VECTOR:
            raise DataError(
                f"the policy 'cube-expert' needs the state vector of worldloom/Cube-v0, with {_VECTOR} values; this "
                f"environment has a vector of {size}. Use observation=vector or observation=both, or another policy"
            )
        return [
            {
                "effector": row[_EFFECTOR] / _SCALE + _ORIGIN,
                "yaw": np.arctan2(row[_EFFECTOR_YAW][1:], row[_EFFECTOR_YAW][:1]),
                "contact": row[_CONTACT : _CONTACT + 1],
                "block": row[_BLOCK] / _SCALE + _ORIGIN,
                "block_yaw": np.arctan2(row[_BLOCK_YAW][1:], row[_BLOCK_YAW][:1]),
            }
            for row in observations.vector.numpy().astype(np.float64)
        ]
