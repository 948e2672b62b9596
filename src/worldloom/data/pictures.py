"""Single pictures: encoding, decoding, resizing, and conversion to observations."""

import hashlib
import io
from pathlib import Path

import numpy as np
import psutil
from jaxtyping import UInt8
from PIL import Image, ImageMode, ImageOps

from worldloom.core.errors import DataError, WorldloomError
from worldloom.core.files import read_bytes
from worldloom.core.picture_layout import PictureOptions, picture_layout
from worldloom.core.types import Observations
from worldloom.core.untrusted import try_files
from worldloom.core.untrusted_child import MOST_PIXELS, PICTURE_FORMATS

_LARGEST = 2**28  # bytes of a picture file


def read_picture(
    path: Path,
    expected: tuple[int, int, int],
    *,
    values: tuple[float, float] | None = None,
    colours: bool = False,
    digest: str | None = None,
) -> Observations:
    """Read a picture file as a batch of one observation of shape `expected` (H, W, C).

    If the picture has more than 8 bits, `values` are the two values that become 0 and 255, for example depths in mm.
    A grey picture gets `expected[2]` equal channels, unless `colours` says that the training pictures had colours.
    `digest` is the SHA-256 that the content of the file must have.

    Raises:
        StorageError: the file does not exist or cannot be read.
        DataError: the file is not a picture, has a different shape or digest, has more than 8 bits and `values` is not
            set, or is grey although the training pictures had colours.
    """
    try_files("picture", [path])
    content = read_bytes(path, _LARGEST)
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise DataError(f"{path} is not the picture that was verified: it was changed since. Restore the file")
    try:
        with Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as image:
            _check_size(image)
            if _is_deep(image) and values is None:
                raise DataError(
                    f"{path} has {image.mode} values rather than bytes, and the model was trained on bytes. Convert "
                    f"the picture to 8 bits in the same way as the pictures of the training data"
                )
            if colours and ImageMode.getmode(image.mode).basemode == "L":
                raise DataError(
                    f"{path} is a grey picture, and the model was trained on pictures with colours. Use a picture with "
                    f"colours; if all of the picture is grey indeed, save it with three channels (RGB)"
                )
            _turn_upright(image, str(path))
            deep = _deep(image, str(path), values)
            pixels = np.array(image.convert("RGB" if expected[2] == 3 else "L"), np.uint8) if deep is None else deep
    except WorldloomError:
        raise
    except MemoryError:
        raise DataError(f"{path} needs more memory than is free; resize the picture") from None
    except Exception as error:  # Pillow raises many types for a damaged file
        raise DataError(f"{path} is not a picture: {error}. Use a PNG of {expected[1]}x{expected[0]}") from None
    pixels = pixels.reshape(1, *pixels.shape[:2], -1)
    if deep is not None:
        pixels = pixels.repeat(expected[2], axis=3)
    if pixels.shape[1:] != expected:
        other_size = pixels.shape[1:3] != expected[:2]
        remedy = "Resize the picture" if other_size else "A file has 1 or 3 channels; use the goals of a protocol"
        raise DataError(f"{path} has shape {pixels.shape[1:]}; the model expects {expected}. {remedy}")
    return Observations.from_numpy(pixels, None)


def decode_picture(
    content: bytes | None, what: str, *, values: tuple[float, float] | None = None
) -> UInt8[np.ndarray, "H W C"]:
    """Decode a PNG, JPEG, TIFF, WebP, BMP, GIF or PPM picture; C is 1 for a grey picture, else 3.

    If the picture has more than 8 bits, `values` are the two values that become 0 and 255. Error messages begin with
    `what`.

    Raises:
        DataError: the content is not a picture, has more than 8 bits and no `values` are set, has 8 bits and `values`
            are set, or is coloured with more than 8 bits.
    """
    try:
        with Image.open(io.BytesIO(content or b""), formats=PICTURE_FORMATS) as opened:
            _check_size(opened)
            _turn_upright(opened, what)
            deep = _deep(opened, what, values)
            if deep is None and values is not None:
                raise DataError(
                    f"{what} already has 8 bits per channel, which need no scaling. Leave out --picture-range"
                )
            picture = np.asarray(opened.convert("L" if opened.mode == "L" else "RGB")) if deep is None else deep
    except WorldloomError:
        raise
    except MemoryError:
        raise DataError(f"{what} needs more memory than is free; resize the picture") from None
    except Exception as error:  # Pillow raises many types for damaged content
        raise DataError(f"{what} does not decode ({error}); restore the file from a copy") from error
    return picture if picture.ndim == 3 else picture[..., None]


def room_for(count: int, picture: UInt8[np.ndarray, "H W C"], what: str) -> UInt8[np.ndarray, "count H W C"]:
    """Return an uninitialised array for `count` pictures of the shape of `picture`. Error messages begin with `what`.

    Raises:
        DataError: there is not enough memory; even a small file can claim pictures of many gigabytes.
    """
    size = count * picture.nbytes
    try:
        if size > psutil.virtual_memory().available:
            raise MemoryError
        return np.empty((count, *picture.shape), np.uint8)
    except MemoryError:
        height, width = picture.shape[:2]
        raise DataError(
            f"{what}: {count} pictures of {height}x{width} need {size / 1e9:.1f} GB, more than the free memory. Resize "
            f"them with --size HxW, or split the episode"
        ) from None


def _check_size(image: Image.Image) -> None:
    """Raise `ValueError` if the header states too many pixels; Pillow's own limit is higher."""
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"it has {image.width}x{image.height} pixels; at most {MOST_PIXELS:,} are read")


def _deep(image: Image.Image, what: str, values: tuple[float, float] | None) -> UInt8[np.ndarray, "H W"] | None:
    """Return a grey picture with more than 8 bits, scaled to bytes; None for a picture with 8 bits per channel.

    Raises:
        DataError: the values are unknown.
    """
    if _is_deep(image):
        stored = np.asarray(image)
        options = PictureOptions(range=values)
        layout = picture_layout(stored.shape, stored.dtype, what, options=options, sample=stored)
        return layout.convert(stored[None], what)[0, ..., 0]
    return None


def _turn_upright(image: Image.Image, what: str) -> None:
    """Turn and mirror a picture as its EXIF orientation requires. Photos of phones have such an orientation.

    Raises:
        DataError: a coloured picture has more than 8 bits.
    """
    if not _is_deep(image) and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        # Pillow would drop the lower bits in silence.
        raise DataError(f"{what} has 16 bits per colour; expected 8. Convert the picture to 8 bits per colour")
    ImageOps.exif_transpose(image, in_place=True)


def _is_deep(image: Image.Image) -> bool:
    """Return whether a grey picture has more than 8 bits, for example 16-bit depth."""
    return image.mode in ("F", "I") or image.mode.startswith("I;")


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
