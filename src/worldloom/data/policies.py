"""Logging policies, which collect data without reward or goal. Each episode has its own random generator.

A policy receives observations only. A `SeeingPolicy`, such as an expert, also receives infos of the simulator.

To add a policy, register a factory `factory(action_spec, **options) -> Policy` in `POLICIES`.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, Float64
from pydantic import Field, model_validator

from worldloom.core.config import Config
from worldloom.core.registry import Registry
from worldloom.core.seams import Policy, SeeingPolicy
from worldloom.core.types import ActionSpec, Observations
from worldloom.envs import Frame

OptionsT = TypeVar("OptionsT", bound=Config)
PolicyType = Callable[[ActionSpec, OptionsT], Policy]

POLICIES: Registry[Callable[..., Policy]] = Registry("policy")


def register_policy(name: str, options: type[OptionsT]) -> Callable[[PolicyType[OptionsT]], PolicyType[OptionsT]]:
    """Return a decorator that registers a policy class with the constructor arguments (action, options).

    Users pass the options by name; the class `options` parses them.
    """

    def decorate(policy: PolicyType[OptionsT]) -> PolicyType[OptionsT]:
        POLICIES.register(name)(lambda action, **given: policy(action, options.parse(given)))
        return policy

    return decorate


def infos_for(policy: Policy, frame: Frame, name: str) -> dict[str, Float64[np.ndarray, "R L"]]:
    """Return the infos of a frame that the policy `name` sees; empty for a policy that sees observations only.

    Raises:
        ConfigError: the environment lacks an info that the policy needs.
    """
    needed = policy.sees if isinstance(policy, SeeingPolicy) else ()
    return {info: frame.numbers(info, f"the policy {name!r}") for info in needed}


class DirectedWalkOptions(Config):
    """Options of the policy "directed-walk"."""

    heading_noise: float = Field(default=0.3, ge=0)  # standard deviation per step, in radians
    turn_probability: float = Field(default=0.05, ge=0, le=1)  # probability of a new heading or choice, per step
    min_speed: float = Field(default=0.4, ge=0, le=1)  # share of the largest action, sampled at each step
    max_speed: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> "DirectedWalkOptions":
        if self.min_speed > self.max_speed:
            raise ValueError(f"'min_speed' must not exceed 'max_speed'; got {self.min_speed} and {self.max_speed}")
        return self


class UniformOptions(Config):
    """The empty options of the policy "uniform"."""


@register_policy("directed-walk", DirectedWalkOptions)
class DirectedWalk:
    """A policy that walks along a heading, which drifts and sometimes changes at random.

    The walk covers more ground than independent random actions.

    For continuous actions of any dimension, the heading is a unit vector, and the action is heading times speed,
    scaled to the bounds. A discrete action is repeated until the heading changes.
    """

    def __init__(self, action: ActionSpec, options: DirectedWalkOptions) -> None:
        self._action, self._options = action, options
        self._generators: list[np.random.Generator] = []
        self._heading: Float64[np.ndarray, "B A"] = np.zeros((0, action.size))

    def reset(self, generators: list[np.random.Generator]) -> None:
        """Start one episode for each generator."""
        self._generators = generators
        self._heading = np.stack([self._draw(generator) for generator in generators])

    def act(self, observations: Observations) -> Float32[np.ndarray, "B A"]:
        """Return one action for each episode; the observations are ignored."""
        options, size = self._options, self._action.size
        speed = np.empty((len(self._generators), 1))
        noise = np.empty_like(self._heading)
        for row, generator in enumerate(self._generators):
            turn, share = generator.random(2)
            speed[row] = options.min_speed + (options.max_speed - options.min_speed) * share
            noise[row] = generator.standard_normal(size)
            if turn < options.turn_probability:
                self._heading[row] = self._draw(generator)
        if self._action.discrete:
            return self._heading.astype(np.float32)
        self._heading = _turned(self._heading, options.heading_noise * noise)
        return scale_to_bounds(self._heading * speed, self._action)

    def _draw(self, generator: np.random.Generator) -> Float64[np.ndarray, "A"]:
        if self._action.discrete:
            return _one_hot(generator, self._action.size)
        direction = generator.standard_normal(self._action.size)
        unit: np.ndarray = direction / np.linalg.norm(direction)
        return unit


@register_policy("uniform", UniformOptions)
class Uniform:
    """A policy that samples actions uniformly within the bounds, or discrete choices with equal probability."""

    def __init__(self, action: ActionSpec, options: UniformOptions) -> None:
        self._action = action
        self._generators: list[np.random.Generator] = []

    def reset(self, generators: list[np.random.Generator]) -> None:
        """Start one episode for each generator."""
        self._generators = generators

    def act(self, observations: Observations) -> Float32[np.ndarray, "B A"]:
        """Return one action for each episode; the observations are ignored."""
        size = self._action.size
        if self._action.discrete:
            return np.stack([_one_hot(generator, size) for generator in self._generators]).astype(np.float32)
        low, high = np.array(self._action.low), np.array(self._action.high)
        share = np.stack([generator.random(size) for generator in self._generators])
        drawn: np.ndarray = (low + (high - low) * share).astype(np.float32)
        return drawn


def scale_to_bounds(unit: Float64[np.ndarray, "B A"], action: ActionSpec) -> Float32[np.ndarray, "B A"]:
    """Map actions in [-1, 1] to the bounds, with -1 at the low bound and 1 at the high bound.

    An action of 0, which usually means rest, maps to 0 if 0 is between the bounds, else to the midpoint of the bounds.
    """
    low, high = np.array(action.low), np.array(action.high)
    middle = np.where((low < 0) & (high > 0), 0.0, (low + high) / 2)
    scaled: np.ndarray = (middle + np.where(unit > 0, high - middle, middle - low) * unit).astype(np.float32)
    return scaled


def _turned(heading: Float64[np.ndarray, "B A"], noise: Float64[np.ndarray, "B A"]) -> Float64[np.ndarray, "B A"]:
    """Rotate unit vectors by the part of `noise`, in radians, that is tangent to the unit sphere.

    In one dimension the tangent part is zero; in two dimensions it is one normally distributed angle.
    """
    tangent = noise - (noise * heading).sum(axis=1, keepdims=True) * heading
    angle = np.linalg.norm(tangent, axis=1, keepdims=True)
    # sinc(x) is sin(pi x) / (pi x), which also handles an angle of 0.
    turned: np.ndarray = np.cos(angle) * heading + np.sinc(angle / np.pi) * tangent
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)  # prevents drift from rounding
    return turned


def _one_hot(generator: np.random.Generator, size: int) -> Float64[np.ndarray, "A"]:
    choice = np.zeros(size)
    choice[generator.integers(size)] = 1.0
    return choice
