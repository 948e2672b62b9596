"""Frames that are mirrored or turned, with their actions: more views of the same episodes."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from pydantic import model_validator

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError
from worldloom.core.seeds import numpy_generator
from worldloom.core.types import Observations, Windows
from worldloom.data.frames import Frames, Pixels
from worldloom.data.spec import DatasetSpec

POSITIONS = 8  # of a square: four quarter turns, each with and without mirroring
_MIRRORED, _FLIPPED, _SWAPPED = 1, 2, 4  # left and right, top and bottom, then rows and columns


class SquareSymmetry(Config):
    """States that a world is the same if its square picture is mirrored or turned by quarter turns.

    The actions turn with the picture. `vectors` names the components of an action that form a vector in the picture's
    plane, as pairs (to the right, downward). `spins` names components that turn something in this plane, such as
    torques: they change their sign if the picture is mirrored. All other components stay as they are.
    """

    vectors: tuple[tuple[int, int], ...] = ()
    spins: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "SquareSymmetry":
        named = self._components
        if len(set(named)) < len(named) or any(component < 0 for component in named):
            raise ValueError(f"components of an action must be 0 or above, and named once; got {list(named)}")
        return self

    @property
    def _components(self) -> tuple[int, ...]:
        return (*(component for pair in self.vectors for component in pair), *self.spins)

    def check(self, spec: DatasetSpec) -> None:
        """Check that the symmetry fits a dataset.

        Raises:
            ConfigError: the observations are not square pictures only, or a component of the action does not exist.
        """
        require_square(spec, "the symmetry of a square")
        size = spec.action.size
        if beyond := [component for component in self._components if component >= size]:
            raise ConfigError(
                f"the symmetry names component {beyond[0]} of the action, but actions have {size} values, numbered "
                f"from 0; correct 'vectors' or 'spins'"
            )

    def turn_actions(
        self, actions: Float32[np.ndarray, "B *axes A"], positions: Int64[np.ndarray, "B"]
    ) -> Float32[np.ndarray, "B *axes A"]:
        """Return the actions that belong to pictures in these positions."""
        turned = actions.copy()
        seen = positions.reshape(-1, *[1] * (actions.ndim - 2))
        for right, down in self.vectors:
            x = np.where(seen & _MIRRORED, -actions[..., right], actions[..., right])
            y = np.where(seen & _FLIPPED, -actions[..., down], actions[..., down])
            turned[..., right] = np.where(seen & _SWAPPED, y, x)
            turned[..., down] = np.where(seen & _SWAPPED, x, y)
        odd = np.bitwise_count(seen) % 2 == 1
        for spin in self.spins:
            turned[..., spin] = np.where(odd, -actions[..., spin], actions[..., spin])
        return turned

    def turn_windows(self, windows: Windows, positions: Int64[np.ndarray, "B"], *, action_size: int) -> Windows:
        """Return the windows in these positions, without labels. A block contains actions of `action_size` values."""
        pixels, blocks = windows.observations.pixels, windows.actions
        assert pixels is not None
        actions = self.turn_actions(blocks.unflatten(-1, (-1, action_size)).numpy(), positions)
        return Windows(
            observations=Observations(pixels=torch.from_numpy(turn_pictures(pixels.numpy(), positions))),
            actions=torch.from_numpy(actions).flatten(2),
        )

    def turned(self, frames: Frames, *, seed: int) -> Frames:
        """Return the frames with each episode in one of its seven other positions, which depends only on the seed."""
        assert frames.pixels is not None
        chosen = numpy_generator(seed, "turned episodes").integers(1, POSITIONS, len(frames.lengths))
        positions = np.repeat(chosen, frames.lengths + 1)
        return replace(
            frames,
            pixels=TurnedPixels(frames.pixels, positions),
            actions=self.turn_actions(frames.actions, positions),
        )


def turn_pictures(
    pictures: UInt8[np.ndarray, "B *axes H W C"], positions: Int64[np.ndarray, "B"]
) -> UInt8[np.ndarray, "B *axes H W C"]:
    """Return square pictures in these positions: mirrored left and right (1), top and bottom (2), transposed (4)."""
    turned = pictures.copy()
    for bit, axis in ((_MIRRORED, -2), (_FLIPPED, -3)):
        chosen = positions & bit > 0
        turned[chosen] = np.flip(turned[chosen], axis)
    chosen = positions & _SWAPPED > 0
    turned[chosen] = turned[chosen].swapaxes(-2, -3)
    return turned


class TurnedPixels:
    """Square pictures, each in a position of its own; see `turn_pictures`."""

    def __init__(self, pixels: Pixels, positions: Int64[np.ndarray, "N"]) -> None:
        self._pixels, self._positions = pixels, positions

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (N, H, W, C)."""
        return self._pixels.shape

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, rows: Any, /) -> UInt8[np.ndarray, "*shape H W C"]:
        """Return the turned pictures of `rows`; see `Pixels`."""
        pictures, positions = np.asarray(self._pixels[rows]), np.asarray(self._positions[rows])
        turned = turn_pictures(pictures.reshape(-1, *pictures.shape[-3:]), positions.reshape(-1))
        return turned.reshape(pictures.shape)


def require_square(spec: DatasetSpec, what: str) -> None:
    """Check that observations are square pictures only, as `what` needs.

    Raises:
        ConfigError: the pictures are not square, or there is a vector, which cannot be turned.
    """
    seen = spec.observation
    if seen.vector or seen.pixels is None or seen.pixels[0] != seen.pixels[1]:
        raise ConfigError(
            f"{what} needs observations that are square pictures only; got pixels {seen.pixels} and a vector of "
            f"{seen.vector} values. Leave it out for this dataset"
        )
