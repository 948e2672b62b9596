"""Policies that collect data without reward or goal. Each episode has its own generator.

A policy of your own: a factory `factory(action_spec, **options) -> Policy` registered in `POLICIES`.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, Float64
from pydantic import Field, model_validator

from worldloom.core.config import Config
from worldloom.core.registry import Registry
from worldloom.core.seams import Policy
from worldloom.core.types import ActionSpec, Observations

OptionsT = TypeVar("OptionsT", bound=Config)
PolicyType = Callable[[ActionSpec, OptionsT], Policy]

POLICIES: Registry[Callable[..., Policy]] = Registry("policy")


def register_policy(name: str, options: type[OptionsT]) -> Callable[[PolicyType[OptionsT]], PolicyType[OptionsT]]:
    """Return a decorator that registers a class of (action, options); `options` parses what users give by name."""

    def decorate(policy: PolicyType[OptionsT]) -> PolicyType[OptionsT]:
        POLICIES.register(name)(lambda action, **given: policy(action, options.parse(given)))
        return policy

    return decorate


class DirectedWalkOptions(Config):
    """How a directed walk turns and how fast it is."""

    heading_noise: float = Field(default=0.3, ge=0)  # standard deviation per step, in radians
    turn_probability: float = Field(default=0.05, ge=0, le=1)  # of a new heading or choice, per step
    min_speed: float = Field(default=0.4, ge=0, le=1)  # share of the largest action, drawn anew at each step
    max_speed: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> "DirectedWalkOptions":
        if self.min_speed > self.max_speed:
            raise ValueError(f"min_speed {self.min_speed} is above max_speed {self.max_speed}")
        return self


class UniformOptions(Config):
    """Nothing can be chosen."""


@register_policy("directed-walk", DirectedWalkOptions)
class DirectedWalk:
    """Keeps a heading that drifts and, now and then, is drawn anew: it goes far where noise stays in place.

    In a box of any dimension the heading is a unit vector; the action is heading times speed, scaled to the
    bounds. Of discrete actions it repeats one.
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
        """Return one action for each episode; the observations are not looked at."""
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
    """Draws each action uniformly within the bounds, or each choice with equal probability."""

    def __init__(self, action: ActionSpec, options: UniformOptions) -> None:
        self._action = action
        self._generators: list[np.random.Generator] = []

    def reset(self, generators: list[np.random.Generator]) -> None:
        """Start one episode for each generator."""
        self._generators = generators

    def act(self, observations: Observations) -> Float32[np.ndarray, "B A"]:
        """Return one action for each episode; the observations are not looked at."""
        size = self._action.size
        if self._action.discrete:
            return np.stack([_one_hot(generator, size) for generator in self._generators]).astype(np.float32)
        low, high = np.array(self._action.low), np.array(self._action.high)
        share = np.stack([generator.random(size) for generator in self._generators])
        drawn: np.ndarray = (low + (high - low) * share).astype(np.float32)
        return drawn


def scale_to_bounds(unit: Float64[np.ndarray, "B A"], action: ActionSpec) -> Float32[np.ndarray, "B A"]:
    """Map actions in [-1, 1] to the bounds: -1 to the lowest, 1 to the highest.

    0 maps to 0 where that lies between the bounds (it mostly means rest), else to their middle.
    """
    low, high = np.array(action.low), np.array(action.high)
    middle = np.where((low < 0) & (high > 0), 0.0, (low + high) / 2)
    scaled: np.ndarray = (middle + np.where(unit > 0, high - middle, middle - low) * unit).astype(np.float32)
    return scaled


def _turned(heading: Float64[np.ndarray, "B A"], noise: Float64[np.ndarray, "B A"]) -> Float64[np.ndarray, "B A"]:
    """Turn unit vectors along the sphere by the part of `noise`, in radians, that is tangent to it.

    In one dimension nothing is tangent; in two it is one normal angle.
    """
    tangent = noise - (noise * heading).sum(axis=1, keepdims=True) * heading
    angle = np.linalg.norm(tangent, axis=1, keepdims=True)
    # sinc is sin(pi x) / (pi x): the limit at angle 0 is taken care of.
    turned: np.ndarray = np.cos(angle) * heading + np.sinc(angle / np.pi) * tangent
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)  # against drift by rounding
    return turned


def _one_hot(generator: np.random.Generator, size: int) -> Float64[np.ndarray, "A"]:
    choice = np.zeros(size)
    choice[generator.integers(size)] = 1.0
    return choice
