"""A logging policy that moves Reacher's arm smoothly to one random pose after another. It sees the joint angles."""

import math

import numpy as np
from jaxtyping import Float64
from pydantic import Field, model_validator

from worldloom.core.config import Config
from worldloom.core.types import ActionSpec
from worldloom.data.expert import Expert, ExpertEpisode, Infos
from worldloom.data.policies import register_policy

_STEP = 0.02  # s
# Gymnasium's arm is nearly a pair of independent joints with an inertia of 1, a damping of 1 and a gear of 200.
_DAMPING, _GEAR = 1.0, 200.0
_STOP = 2.8  # rad; the second joint has a stop at 3.0


class ReacherExpertOptions(Config):
    """Options of the policy "reacher-expert"."""

    slowest: float = Field(default=6.0, gt=0)  # rad/s; the controller's natural frequency, drawn per episode
    fastest: float = Field(default=15.0, gt=0)
    noise: float = Field(default=0.2, ge=0)  # the standard deviation of an episode's noise lies between 0 and this
    near: float = Field(default=0.05, gt=0)  # rad; a target is reached if each joint is this near ...
    still: float = Field(default=1.0, gt=0)  # ... and no joint is faster, in rad/s
    patience: int = Field(default=75, ge=1)  # steps after which a target is replaced if it is not reached
    torque: float = Field(default=0.1, gt=0, le=1)  # as in the environment

    @model_validator(mode="after")
    def _ordered(self) -> "ReacherExpertOptions":
        if self.slowest > self.fastest:
            raise ValueError(f"'slowest' must not exceed 'fastest'; got {self.slowest} and {self.fastest}")
        return self


class _Arm(ExpertEpisode):
    """The expert of one episode: a critically damped controller of each joint."""

    def __init__(self, options: ReacherExpertOptions, generator: np.random.Generator) -> None:
        self._options, self._generator = options, generator
        self._frequency = generator.uniform(options.slowest, options.fastest)
        self._noise = generator.uniform(0, options.noise)
        self._target = self._draw()
        self._left = options.patience
        self._last: Float64[np.ndarray, "2"] | None = None

    @property
    def target(self) -> Float64[np.ndarray, "2"]:
        """The angles of the joints to which the arm moves."""
        return self._target

    def act(self, infos: Infos) -> Float64[np.ndarray, "2"]:
        """Return the next action, in multiples of the largest action."""
        options, joints = self._options, infos["joints"]
        speed = np.zeros(2) if self._last is None else _around(joints - self._last) / _STEP
        self._last, self._left = joints, self._left - 1
        gap = self._gap(joints)
        if self._left < 0 or (np.abs(gap).max() < options.near and np.abs(speed).max() < options.still):
            self._target, self._left = self._draw(), options.patience
            gap = self._gap(joints)
        acceleration = self._frequency**2 * gap - (2 * self._frequency - _DAMPING) * speed
        action: np.ndarray = acceleration / (_GEAR * options.torque)
        # The largest joint's torque limits both, so that the arm moves on a line in the space of the joints.
        action = action / max(1.0, float(np.abs(action).max()))
        return action + self._noise * self._generator.standard_normal(2)

    def _gap(self, joints: Float64[np.ndarray, "2"]) -> Float64[np.ndarray, "2"]:
        """Return by which angles the joints must turn. Only the first joint can turn all the way round."""
        gap = self._target - joints
        return np.array([_around(gap)[0], gap[1]])

    def _draw(self) -> Float64[np.ndarray, "2"]:
        return self._generator.uniform((-math.pi, -_STOP), (math.pi, _STOP))


def _around(angles: Float64[np.ndarray, "2"]) -> Float64[np.ndarray, "2"]:
    return (angles + math.pi) % (2 * math.pi) - math.pi


@register_policy("reacher-expert", ReacherExpertOptions)
class ReacherExpert(Expert):
    """A policy that moves the arm to one random pose after another, with a speed and noise of each episode.

    A target is the angle of each joint in radians.
    """

    sees = ("joints",)
    size = 2

    def __init__(self, action: ActionSpec, options: ReacherExpertOptions) -> None:
        super().__init__(action, "reacher-expert")
        self._options = options

    def begin(self, generator: np.random.Generator) -> ExpertEpisode:
        """Return the expert of one episode."""
        return _Arm(self._options, generator)
