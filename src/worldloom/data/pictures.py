"""Single pictures: encoding, decoding, resizing, and conversion to observations."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from worldloom.core.errors import DataError, WorldloomError
from worldloom.core.files import storage_errors
from worldloom.core.types import Observations
from worldloom.core.untrusted import try_files


def read_picture(path: Path, expected: tuple[int, int, int]) -> Observations:
    """Read a picture file as a batch of one observation of shape `expected` (H, W, C).

    Raises:
        StorageError: the file does not exist or cannot be read.
        DataError: the file is not a picture, or has a different shape.
    """
    try_files("picture", [path])
    try:
        with storage_errors(path), Image.open(path) as image:
            pixels = np.array(image.convert("RGB" if expected[2] == 3 else "L"), np.uint8)
    except WorldloomError:
        raise
    except Exception as error:  # Pillow raises many types for a damaged file
        raise DataError(f"{path} is not a picture: {error}. Use a PNG of {expected[1]}x{expected[0]}") from None
    pixels = pixels.reshape(1, *pixels.shape[:2], -1)
    if pixels.shape[1:] != expected:
        raise DataError(f"{path} has shape {pixels.shape[1:]}; the model expects {expected}. Resize the picture")
    return Observations.from_numpy(pixels, None)


def decode_picture(content: bytes | None, what: str) -> UInt8[np.ndarray, "H W C"]:
    """Decode a picture in any of Pillow's formats; C is 1 for a grey picture, else 3. Error messages begin with `what`.

    Raises:
        DataError: the content is not a picture.
    """
    try:
        with Image.open(io.BytesIO(content or b"")) as opened:
            picture = np.asarray(opened.convert("L" if opened.mode == "L" else "RGB"))
    except Exception as error:  # Pillow raises many types for damaged content
        raise DataError(f"{what} does not decode ({error}); restore the file from a copy") from error
    return picture if picture.ndim == 3 else picture[..., None]


def encode_picture(frame: UInt8[np.ndarray, "H W C"], *, jpeg_quality: int | None = None) -> bytes:
    """Encode a picture with 1 or 3 channels as PNG, or as JPEG if `jpeg_quality` is set."""
    buffer = io.BytesIO()
    picture = Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame)
    if jpeg_quality is None:
        picture.save(buffer, format="PNG", compress_level=3)
    else:
        picture.save(buffer, format="JPEG", quality=jpeg_quality)
    return buffer.getvalue()


def resize(frames: UInt8[np.ndarray, "N H W C"], size: tuple[int, int] | None) -> UInt8[np.ndarray, "N H2 W2 C"]:
    """Resize frames with any number of channels to `size` (H, W) by area averaging; None leaves them unchanged."""
    if size is None or frames.shape[1:3] == size or len(frames) == 0:
        return frames
    height, width = size
    out = np.empty((len(frames), height, width, frames.shape[3]), np.uint8)
    for index, frame in enumerate(frames):
        for channel in range(frames.shape[3]):
            picture = Image.fromarray(np.ascontiguousarray(frame[..., channel]))
            out[index, ..., channel] = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    return out
