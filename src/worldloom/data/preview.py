"""Previews of a dataset: a contact sheet and a video."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image, ImageDraw, ImageFont

from worldloom.core.errors import DataError
from worldloom.core.files import write_atomic
from worldloom.core.progress import SILENT, Progress, ProgressTask
from worldloom.data.dataset import EpisodeDataset

_TILE = 112  # minimum height and width of a frame on the contact sheet
_VIDEO = 256  # minimum height and width of a frame in the video
_MARGIN, _CAPTION = 6, 16
_PAPER, _INK = (255, 255, 255), (60, 60, 60)


def contact_sheet(dataset: EpisodeDataset, path: Path, *, episodes: int = 6, times: int = 8) -> None:
    """Write a PNG with one row of captioned frames per episode, from the first to the last frame of the episode.

    Raises:
        DataError: the dataset has no pixels or no episodes.
        StorageError: `path` cannot be written.
    """
    rows = []
    for number in _spread(_with_pixels(dataset), episodes):
        steps = _spread(int(dataset.lengths[number]) + 1, times)
        captions = [f"step {step}" if step else f"episode {number}" for step in steps]
        rows.append((captions, dataset.pixels(dataset.starts[number] + steps)))
    write_sheet(rows, path)


def write_sheet(rows: Sequence[tuple[Sequence[str], UInt8[np.ndarray, "_ H W C"]]], path: Path) -> None:
    """Write a PNG of rows of frames, each frame with a caption above it.

    Raises:
        StorageError: `path` cannot be written.
    """
    shown = [(captions, _upscaled(to_rgb(frames), _TILE)) for captions, frames in rows]
    height, width = shown[0][1].shape[1:3]
    columns = max(len(captions) for captions, _ in shown)
    step_x, step_y = width + _MARGIN, height + _CAPTION + _MARGIN
    sheet = Image.new("RGB", (_MARGIN + columns * step_x, _MARGIN + len(rows) * step_y), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, (captions, frames) in enumerate(shown):
        for column, (caption, frame) in enumerate(zip(captions, frames, strict=True)):
            x, y = _MARGIN + column * step_x, _MARGIN + row * step_y
            draw.text((x, y), caption, fill=_INK, font=font)
            sheet.paste(Image.fromarray(frame), (x, y + _CAPTION))
    write_atomic(Path(path), lambda temporary: sheet.save(temporary, format="PNG"))


def video(
    dataset: EpisodeDataset, path: Path, *, episodes: int = 4, rate: int = 15, progress: Progress = SILENT
) -> None:
    """Write an MP4 of some episodes, one after the other, at `rate` frames per second.

    Raises:
        DataError: the dataset has no pixels or no episodes.
        StorageError: `path` cannot be written.
    """
    import av

    chosen = _spread(_with_pixels(dataset), episodes)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with progress.task(f"video {path.name}", int((dataset.lengths[chosen] + 1).sum()), "frame") as task:
        pictures = _pictures(dataset, chosen, task)
        write_atomic(Path(path), lambda temporary: encode_video(str(temporary), pictures, rate=rate, codec=codec))


def encode_video(
    target: str | BytesIO,
    pictures: Iterable[UInt8[np.ndarray, "H W 3"]],
    *,
    rate: int | Fraction,
    codec: str,
    pixel_format: str = "yuv420p",
    container: str = "mp4",
    options: Mapping[str, str] | None = None,
) -> None:
    """Encode RGB pictures of the same size as a video with `rate` pictures per second.

    The other arguments have the same meaning as in FFmpeg.
    """
    import av

    with av.open(target, "w", format=container) as output:
        stream: Any = None
        for picture in pictures:
            if stream is None:
                stream = output.add_stream(codec, rate=rate, options=dict(options or {}))
                stream.pix_fmt = pixel_format
                stream.height, stream.width = picture.shape[:2]
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())


def _pictures(
    dataset: EpisodeDataset, episodes: Int64[np.ndarray, "E"], task: ProgressTask
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    for number in episodes:
        start, length = int(dataset.starts[number]), int(dataset.lengths[number])
        for first in range(0, length + 1, 64):
            steps = np.arange(first, min(first + 64, length + 1))
            frames = _upscaled(to_rgb(dataset.pixels(start + steps)), _VIDEO)
            for step, frame in zip(steps, frames, strict=True):
                yield _captioned(frame, f"episode {number}, step {step}")
                task.advance()


def to_rgb(frames: UInt8[np.ndarray, "*axes C"]) -> UInt8[np.ndarray, "*axes 3"]:
    """Convert frames to three channels: repeat one channel, add blue to two, or keep the first three of more."""
    channels = frames.shape[-1]
    if channels == 1:
        return np.repeat(frames, 3, axis=-1)
    if channels == 2:
        return np.concatenate([frames, np.zeros_like(frames[..., :1])], axis=-1)
    return frames[..., :3]


def _captioned(frame: UInt8[np.ndarray, "H W 3"], caption: str) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Add a line of text below the frame, and make height and width even, as yuv420p requires."""
    height, width = frame.shape[:2]
    picture = Image.new("RGB", (width + width % 2, height + height % 2 + 20), _PAPER)
    picture.paste(Image.fromarray(np.ascontiguousarray(frame)), (0, 0))
    ImageDraw.Draw(picture).text((4, height + 4), caption, fill=_INK, font=ImageFont.load_default(11))
    return np.asarray(picture)


def _upscaled(frames: UInt8[np.ndarray, "n H W 3"], least: int) -> UInt8[np.ndarray, "n H2 W2 3"]:
    """Enlarge frames by an integer factor so that the smaller side is at least `least` pixels."""
    factor = -(-least // min(frames.shape[1:3]))
    return np.repeat(np.repeat(frames, factor, axis=1), factor, axis=2)


def _spread(count: int, most: int) -> np.ndarray:
    """Return at most `most` of the numbers 0 to `count` - 1, evenly spaced from first to last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _with_pixels(dataset: EpisodeDataset) -> int:
    if dataset.spec.observation.pixels is None:
        raise DataError(f"{dataset.path} has no pixels to show; run 'worldloom data inspect {dataset.path}' instead")
    if len(dataset) == 0:
        raise DataError(f"{dataset.path} has no episodes; collect episodes first")
    return len(dataset)
