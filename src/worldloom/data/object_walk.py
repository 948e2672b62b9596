"""A logging policy for a hand in the plane: random moves near an object. Both are found in the pixels by colour."""

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.types import ActionSpec, Observations
from worldloom.data.policies import register_policy

Colour = tuple[int, int, int]


class ObjectWalkOptions(Config):
    """Options of the policy "near-object". The defaults are for PushT.

    `hand` and `object` are RGB colours. `radius` is a share of the frame's side length. `gain` is the action for a
    distance of one side length, in multiples of the largest action, before the action is clipped to the bounds.
    """

    hand: Colour = (65, 105, 225)
    object: Colour = (119, 136, 153)
    tolerance: int = Field(default=40, ge=0, le=255)  # difference allowed in each channel
    radius: float = Field(default=0.25, gt=0)  # maximum distance of a target from the object along x and y
    gain: float = Field(default=5.0, gt=0)
    noise: float = Field(default=0.3, ge=0)  # standard deviation, as a share of the largest action
    patience: float = Field(default=12.0, ge=1)  # mean number of steps until a new target
    margin: float = Field(
        default=0.1, ge=0, lt=0.5
    )  # share of the frame without targets, because objects get lost there


@register_policy("near-object", ObjectWalkOptions)
class ObjectWalk:
    """A policy that moves the hand straight to random places near the object, and so sometimes pushes the object.

    The policy has no goal for the object, and it reads only pixels. The action is a displacement of the hand (x, y).
    """

    def __init__(self, action: ActionSpec, options: ObjectWalkOptions) -> None:
        if action.size != 2 or action.discrete:
            raise ConfigError(
                f"the policy 'near-object' needs 2 continuous action values (x, y); this environment has {action.size} "
                f"{'discrete' if action.discrete else 'continuous'} ones. Use another policy, such as directed-walk"
            )
        self._options = options
        self._low, self._high = np.array(action.low), np.array(action.high)
        self._generators: list[np.random.Generator] = []
        self._place: Float64[np.ndarray, "B 2"] = np.zeros((0, 2))  # relative to the object, as a share of the side

    def reset(self, generators: list[np.random.Generator]) -> None:
        """Start one episode for each generator."""
        self._generators = generators
        self._place = np.stack([self._draw(generator) for generator in generators])

    def act(self, observations: Observations) -> Float32[np.ndarray, "B A"]:
        """Return one action for each episode.

        Raises:
            DataError: the observations have no pixels.
        """
        if observations.pixels is None:
            raise DataError(
                "the policy 'near-object' needs pixels, but this environment has none. Use another policy, such as "
                "directed-walk"
            )
        options, pixels = self._options, observations.pixels.numpy()
        noise = np.empty((len(pixels), 2))
        for row, generator in enumerate(self._generators):
            if generator.random() < 1 / options.patience:
                self._place[row] = self._draw(generator)
            noise[row] = generator.standard_normal(2)
        hand = _centre(pixels, options.hand, options.tolerance)
        target = _centre(pixels, options.object, options.tolerance) + self._place
        wish = options.gain * (np.clip(target, options.margin, 1 - options.margin) - hand) + options.noise * noise
        # If the hand or the object is not visible, the action is only noise.
        wish = np.where(np.isnan(wish), options.noise * noise, wish)
        actions: np.ndarray = np.clip(wish * self._high, self._low, self._high).astype(np.float32)
        return actions

    def _draw(self, generator: np.random.Generator) -> Float64[np.ndarray, "2"]:
        place: np.ndarray = generator.uniform(-self._options.radius, self._options.radius, 2)
        return place


def _centre(pixels: UInt8[np.ndarray, "B H W C"], colour: Colour, tolerance: int) -> Float64[np.ndarray, "B 2"]:
    """Return the mean (x, y) of the pixels with a colour, as shares of width and height; NaN if there are none."""
    near = (np.abs(pixels.astype(np.int16) - np.array(colour, np.int16)) <= tolerance).all(axis=3)
    count = near.sum(axis=(1, 2))
    rows, columns = near.sum(axis=2), near.sum(axis=1)
    height, width = near.shape[1:]
    x = (columns * (np.arange(width) + 0.5)).sum(axis=1) / width
    y = (rows * (np.arange(height) + 0.5)).sum(axis=1) / height
    with np.errstate(invalid="ignore"):
        centre: np.ndarray = np.stack([x, y], axis=1) / np.where(count == 0, np.nan, count)[:, None]
    return centre
