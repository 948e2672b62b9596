"""What counts as a picture, and how its values become pixels: one rule for environments, foreign files and goals.

Pixels are unsigned bytes with axes (H, W, C). Values of other types are scaled only if their range is known, and axes
in another order are moved only if the order is clear from the shape. Anything else is an error that names the option.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from pydantic import field_validator

from worldloom.core.config import Config
from worldloom.core.errors import DataError

MOST_CHANNELS = 16  # an axis with more values is not an axis of channels, nor of stacked frames
_USUAL_CHANNELS = (1, 3, 4)
_LEAST_SIDE = 32  # minimum height and width of arrays that count as pictures because of their shape alone
_KNOWN_RANGES = ((0.0, 1.0), (0.0, 255.0))  # ranges that a space states for pictures that were converted from bytes


class PictureOptions(Config):
    """How pictures are stored, where this is not clear from their shape and dtype.

    `axes` has one letter for each axis: `h` height, `w` width, `c` channels, `s` stacked frames (which become
    channels). `range` contains the values that become 0 and 255; values outside of it are clipped.
    """

    axes: str | None = None
    range: tuple[float, float] | None = None

    @field_validator("axes")
    @classmethod
    def _letters(cls, axes: str | None) -> str | None:
        if axes is not None and not (set("hw") <= set(axes) <= set("hwcs") and len(set(axes)) == len(axes)):
            raise ValueError("expected each of the letters h and w once, and c and s at most once, such as chw")
        return axes

    @field_validator("range")
    @classmethod
    def _ascending(cls, limits: tuple[float, float] | None) -> tuple[float, float] | None:
        if limits is not None and not limits[0] < limits[1]:
            raise ValueError("expected the low value below the high value")
        return limits


@dataclass(frozen=True, kw_only=True)
class PictureLayout:
    """How one picture is stored: its shape, the letter of each axis, and the values that become 0 and 255.

    `range` is None for bytes. Values outside of the range are clipped if `clips` is set, and are an error otherwise.
    """

    shape: tuple[int, ...]
    axes: str
    range: tuple[float, float] | None = None
    clips: bool = True

    @property
    def pixels(self) -> tuple[int, int, int]:
        """The shape (H, W, C) of the pixels."""
        size = dict(zip(self.axes, self.shape, strict=True))
        return size["h"], size["w"], size.get("s", 1) * size.get("c", 1)

    @property
    def changes(self) -> str | None:
        """How pixels differ from the stored values, as the end of a sentence; None if they do not."""
        said = [] if self.axes in ("hw", "hwc") else [f"have the axes {self.axes}, which become hwc"]
        if self.range is not None:
            low, high = self.range
            said.append(f"are scaled to bytes ({low:g} becomes 0 and {high:g} becomes 255)")
        return " and ".join(said) or None

    def convert(self, stored: Shaped[np.ndarray, "N ..."], what: str) -> UInt8[np.ndarray, "N H W C"]:
        """Return pictures as pixels; error messages begin with `what`.

        Raises:
            DataError: the shape differs from the layout, or a value is NaN or outside of a range that is not clipped.
        """
        if stored.shape[1:] != self.shape or (self.range is None and stored.dtype != np.uint8):
            raise DataError(
                f"{what} is {stored.dtype} of shape {stored.shape[1:]}; expected pictures of shape {self.shape}, as "
                f"before. Use the same size and type for all pictures"
            )
        order = [1 + self.axes.index(axis) for axis in "hwsc" if axis in self.axes]
        moved = stored.transpose(0, *order).reshape(len(stored), *self.pixels)
        if self.range is None:
            return np.ascontiguousarray(moved)
        out = np.empty(moved.shape, np.uint8)
        for index, picture in enumerate(moved):  # one at a time, because a scaled copy has eight times the size
            out[index] = self._scaled(picture, f"{what}, picture {index},")
        return out

    def outside(self, stored: Shaped[np.ndarray, "N ..."]) -> int:
        """Return how many values are outside of the range."""
        return 0 if self.range is None else int(((stored < self.range[0]) | (stored > self.range[1])).sum())

    def _scaled(self, picture: np.ndarray, what: str) -> np.ndarray:
        assert self.range is not None
        low, high = self.range
        shares = (picture.astype(np.float64) - low) / (high - low)
        if np.isnan(shares).any():
            raise DataError(f"{what} has values that are not a number (NaN). Replace them, or drop the picture")
        if not self.clips and not (shares.min() >= -1e-3 and shares.max() <= 1 + 1e-3):
            raise DataError(
                f"{what} has values from {picture.min():g} to {picture.max():g}; expected {low:g} to {high:g}. Correct "
                f"the stated bounds, or set the range of the values with --picture-range LOW:HIGH"
            )
        return np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8)


def is_picture(shape: Sequence[int], dtype: Any, options: PictureOptions | None = None) -> bool:
    """Return whether values with this shape (without a time axis) and dtype are pictures.

    Bytes with three axes are pictures. Other arrays with 2 to 4 axes are pictures if their two longest axes (height and
    width) have at least 32 values, and all other axes at most 16. If `options.axes` is given, bytes with as many axes
    as it has letters are pictures at any size.
    """
    if np.dtype(dtype).kind not in "fiub" or not 2 <= len(shape) <= 4 or min(shape) < 1:
        return False
    named = options is not None and options.axes is not None and len(options.axes) == len(shape)
    if np.dtype(dtype) == np.uint8 and (named or len(shape) == 3):
        return True
    sides = sorted(shape)
    return sides[-2] >= _LEAST_SIDE and all(size <= MOST_CHANNELS for size in sides[:-2])


def picture_layout(
    shape: Sequence[int],
    dtype: Any,
    what: str,
    *,
    options: PictureOptions | None = None,
    stated: tuple[float, float] | None = None,
    sample: np.ndarray | None = None,
) -> PictureLayout:
    """Return how pictures with this shape (without a time axis) and dtype are stored. Errors begin with `what`.

    `stated` is the range of values that the source itself states. `sample` contains some of the pictures: if the range
    is unknown, the error gives the lowest and highest value of the sample.

    Raises:
        DataError: the order of the axes, or the range of values that are not bytes, is unknown or does not fit.
    """
    options, size = options or PictureOptions(), tuple(int(each) for each in shape)
    axes = options.axes or _axes(size)
    if axes is None:
        raise DataError(
            f"{what} has pictures of shape {size}, whose order of axes is not clear. State the order with "
            f"--picture-axes, with one letter per axis: h (height), w (width), c (channels), s (stacked frames); for "
            f"example hwc or shwc. To keep only the newest of stacked frames, remove the stacking from the source"
        )
    if len(axes) != len(size):
        raise DataError(
            f"{what} has pictures of shape {size}; --picture-axes {axes} has {len(axes)} letters. State one letter for "
            f"each axis"
        )
    kind = np.dtype(dtype)
    if kind == np.uint8:
        if options.range is not None:
            raise DataError(f"{what} has pictures of bytes, which are not scaled. Leave out --picture-range")
        return PictureLayout(shape=size, axes=axes)
    if options.range is not None:
        return PictureLayout(shape=size, axes=axes, range=options.range)
    known = (0.0, 1.0) if kind == np.bool_ else stated
    if known in _KNOWN_RANGES:
        return PictureLayout(shape=size, axes=axes, range=known, clips=False)
    found = "" if sample is None or not sample.size else f", such as {np.nanmin(sample):g} to {np.nanmax(sample):g}"
    raise DataError(
        f"{what} has pictures of shape {size} with {kind} values{found}; expected bytes. Set the values that become 0 "
        f"and 255 with --picture-range LOW:HIGH, or leave the pictures out"
    )


def _axes(shape: tuple[int, ...]) -> str | None:
    """Return the letters of the axes, or None if they are not clear from the shape."""
    if len(shape) == 2:
        return "hw"
    if len(shape) != 3:
        return None
    first, middle, last = shape
    if min(first, last) > MOST_CHANNELS:
        return None
    evidence = (  # from strong to weak; only small pictures need more than the first
        (first <= MOST_CHANNELS, last <= MOST_CHANNELS),
        (first in _USUAL_CHANNELS, last in _USUAL_CHANNELS),
        (middle == last != first, first == middle != last),
        (first == 3, last == 3),
    )
    for leading, trailing in evidence:
        if leading != trailing:
            return "chw" if leading else "hwc"
    return None
