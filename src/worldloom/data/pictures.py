"""Pictures that a user names: read as what a model observes."""

from pathlib import Path

import numpy as np

from worldloom.core.errors import DataError
from worldloom.core.files import storage_errors
from worldloom.core.types import Observations


def read_picture(path: Path, expected: tuple[int, int, int]) -> Observations:
    """Read a picture as a batch of one observation of this shape.

    Raises:
        DataError: it is no picture, or of another size.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with storage_errors(path), Image.open(path) as image:
            pixels = np.array(image.convert("RGB" if expected[2] == 3 else "L"), np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # Pillow's words for a damaged file
        raise DataError(f"{path} is not a picture: {error}; expected a PNG of {expected[1]}x{expected[0]}") from None
    pixels = pixels.reshape(1, *pixels.shape[:2], -1)
    if pixels.shape[1:] != expected:
        raise DataError(f"{path} has shape {pixels.shape[1:]}; the model was trained on {expected}. Resize it")
    return Observations.from_numpy(pixels, None)
