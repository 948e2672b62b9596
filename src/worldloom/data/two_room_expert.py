"""A logging policy that walks through Two Rooms to one random place after another. It knows where the door is."""

import numpy as np
from jaxtyping import Float64
from pydantic import Field, model_validator

from worldloom.core.config import Config
from worldloom.core.types import ActionSpec
from worldloom.data.expert import Expert, ExpertEpisode, Infos
from worldloom.data.policies import register_policy

_SIDE = 64.0  # px
_ROUND = 1.0  # px between the agent and the wall on the way to the door and away from it


class TwoRoomExpertOptions(Config):
    """Options of the policy "two-room-expert", with lengths in px. The geometry is the environment's default."""

    slowest: float = Field(default=0.6, gt=0, le=1)  # the speed of an episode lies between these shares of the largest
    fastest: float = Field(default=1.0, gt=0, le=1)
    noise: float = Field(default=0.3, ge=0)  # the standard deviation of an episode's noise lies between 0 and this
    near: float = Field(default=2.0, gt=0)  # a target is reached if the agent is this near
    speed: float = Field(default=2.5, gt=0)  # of the agent, per step
    wall: float = Field(default=32.0, gt=0, lt=_SIDE)  # x of the middle of the wall
    clearance: float = Field(default=4.5, gt=0)  # between the middle of the wall and the agent's centre beside it
    margin: float = Field(default=4.0, ge=0, lt=_SIDE / 4)  # between targets and the edge

    @model_validator(mode="after")
    def _ordered(self) -> "TwoRoomExpertOptions":
        if self.slowest > self.fastest:
            raise ValueError(f"'slowest' must not exceed 'fastest'; got {self.slowest} and {self.fastest}")
        return self


class _Walker(ExpertEpisode):
    """The expert of one episode."""

    def __init__(self, options: TwoRoomExpertOptions, generator: np.random.Generator) -> None:
        self._options, self._generator = options, generator
        self._speed = generator.uniform(options.slowest, options.fastest)
        self._noise = generator.uniform(0, options.noise)
        self._target = self._draw()

    @property
    def target(self) -> Float64[np.ndarray, "2"]:
        """The place (x, y) to which the agent walks."""
        return self._target

    def act(self, infos: Infos) -> Float64[np.ndarray, "2"]:
        """Return the next action, in multiples of the largest action."""
        options, place = self._options, infos["position"]
        if np.linalg.norm(self._target - place) < options.near:
            self._target = self._draw()
        way = self._next(place, float(infos["door_position"][0])) - place
        # No action is longer than the way, so that the agent does not oscillate around the target.
        length = min(self._speed, float(np.linalg.norm(way)) / options.speed)
        action: np.ndarray = length * way / max(float(np.linalg.norm(way)), 1e-9)
        return action + self._noise * self._generator.standard_normal(2)

    def _next(self, place: Float64[np.ndarray, "2"], door: float) -> Float64[np.ndarray, "2"]:
        """Return the end of the straight line on which the shortest path to the target begins."""
        options = self._options
        side = 1.0 if self._target[0] > options.wall else -1.0
        beyond = side * (place[0] - options.wall)  # negative on the other side of the wall
        if beyond >= options.clearance:
            return self._target
        corner = options.clearance + _ROUND
        if beyond <= -options.clearance and abs(place[1] - door) > _ROUND:
            return np.array([options.wall - side * corner, door])
        return np.array([options.wall + side * corner, door])

    def _draw(self) -> Float64[np.ndarray, "2"]:
        margin, wall = self._options.margin, self._options.wall
        while True:
            place = self._generator.uniform(margin, _SIDE - margin, 2)
            if abs(place[0] - wall) > self._options.clearance + _ROUND:
                return place


@register_policy("two-room-expert", TwoRoomExpertOptions)
class TwoRoomExpert(Expert):
    """A policy that walks to one random place after another, by the door if necessary, with some noise.

    A target is a place (x, y) in px. The policy needs the info `door_position`, which Two Rooms returns if the door's
    position varies, as by default.
    """

    sees = ("position", "door_position")
    size = 2

    def __init__(self, action: ActionSpec, options: TwoRoomExpertOptions) -> None:
        super().__init__(action, "two-room-expert")
        self._options = options

    def begin(self, generator: np.random.Generator) -> ExpertEpisode:
        """Return the expert of one episode."""
        return _Walker(self._options, generator)
