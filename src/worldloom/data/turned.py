"""Frames that are mirrored or turned, to fit heads on more views of the same episodes."""

from typing import Any

import numpy as np
from jaxtyping import UInt8

from worldloom.core.seeds import numpy_generator
from worldloom.data.frames import Pixels


class TurnedPixels:
    """Square frames, each in one of its seven other positions: mirrored, turned by quarter turns, or both.

    The position of each frame is random, and depends only on `seed` and the row.
    """

    def __init__(self, pixels: Pixels, *, seed: int) -> None:
        self._pixels = pixels
        self._positions = numpy_generator(seed, "turned pixels").integers(1, 8, len(pixels))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (N, H, W, C)."""
        return self._pixels.shape

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, rows: Any, /) -> UInt8[np.ndarray, "*shape H W C"]:
        """Return the turned frames of `rows`; see `Pixels`."""
        frames, positions = np.array(self._pixels[rows]), self._positions[rows]
        for mirrored, axis in ((positions & 1, -2), (positions & 2, -3)):
            chosen = mirrored > 0
            frames[chosen] = np.flip(frames[chosen], axis)
        chosen = positions & 4 > 0
        frames[chosen] = frames[chosen].swapaxes(-2, -3)
        return frames
