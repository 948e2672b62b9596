"""A clumsy hand: it wanders about an object that it knows by its colour alone."""

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.types import ActionSpec, Observations
from worldloom.data.policies import register_policy

Colour = tuple[int, int, int]


class ObjectWalkOptions(Config):
    """How the hand wanders; the defaults are PushT's.

    `radius` is a share of the picture's side, `gain` the action for a way of one such side (then clipped to the
    bounds).
    """

    hand: Colour = (65, 105, 225)
    object: Colour = (119, 136, 153)
    tolerance: int = Field(default=40, ge=0, le=255)  # of each channel
    radius: float = Field(default=0.25, gt=0)  # within which places about the object are drawn
    gain: float = Field(default=5.0, gt=0)
    noise: float = Field(default=0.3, ge=0)  # standard deviation of each action, in shares of the largest
    patience: float = Field(default=12.0, ge=1)  # mean number of steps before another place is drawn
    margin: float = Field(default=0.1, ge=0, lt=0.5)  # of the picture, where it does not go: objects get lost there


@register_policy("near-object", ObjectWalkOptions)
class ObjectWalk:
    """Draws places about the object, goes there whatever stands between, and so pushes it now and then.

    It aims at nothing: the place is drawn without regard to where the object should go. Nothing but the pixels
    is looked at. The action is a displacement of the hand (x, y).
    """

    def __init__(self, action: ActionSpec, options: ObjectWalkOptions) -> None:
        if action.size != 2 or action.discrete:
            raise ConfigError(
                f"the policy 'near-object' moves a hand in the plane and needs 2 continuous actions; this world has "
                f"{action.size}. Choose another (directed-walk)"
            )
        self._options = options
        self._low, self._high = np.array(action.low), np.array(action.high)
        self._generators: list[np.random.Generator] = []
        self._place: Float64[np.ndarray, "B 2"] = np.zeros((0, 2))  # relative to the object, in shares of the side

    def reset(self, generators: list[np.random.Generator]) -> None:
        """Start one episode for each generator."""
        self._generators = generators
        self._place = np.stack([self._draw(generator) for generator in generators])

    def act(self, observations: Observations) -> Float32[np.ndarray, "B A"]:
        """Return one action for each episode.

        Raises:
            DataError: the observations hold no pixels.
        """
        if observations.pixels is None:
            raise DataError("the policy 'near-object' looks at pixels; this world shows none. Choose another")
        options, pixels = self._options, observations.pixels.numpy()
        noise = np.empty((len(pixels), 2))
        for row, generator in enumerate(self._generators):
            if generator.random() < 1 / options.patience:
                self._place[row] = self._draw(generator)
            noise[row] = generator.standard_normal(2)
        hand = _centre(pixels, options.hand, options.tolerance)
        target = _centre(pixels, options.object, options.tolerance) + self._place
        wish = options.gain * (np.clip(target, options.margin, 1 - options.margin) - hand) + options.noise * noise
        # An unseen hand or object says nothing: then noise alone moves.
        wish = np.where(np.isnan(wish), options.noise * noise, wish)
        actions: np.ndarray = np.clip(wish * self._high, self._low, self._high).astype(np.float32)
        return actions

    def _draw(self, generator: np.random.Generator) -> Float64[np.ndarray, "2"]:
        place: np.ndarray = generator.uniform(-self._options.radius, self._options.radius, 2)
        return place


def _centre(pixels: UInt8[np.ndarray, "B H W C"], colour: Colour, tolerance: int) -> Float64[np.ndarray, "B 2"]:
    """Return the mean place (x, y) of the pixels of a colour, in shares of the side; NaN where there is none."""
    near = (np.abs(pixels.astype(np.int16) - np.array(colour, np.int16)) <= tolerance).all(axis=3)
    count = near.sum(axis=(1, 2))
    rows, columns = near.sum(axis=2), near.sum(axis=1)
    height, width = near.shape[1:]
    x = (columns * (np.arange(width) + 0.5)).sum(axis=1) / width
    y = (rows * (np.arange(height) + 0.5)).sum(axis=1) / height
    with np.errstate(invalid="ignore"):
        centre: np.ndarray = np.stack([x, y], axis=1) / np.where(count == 0, np.nan, count)[:, None]
    return centre
