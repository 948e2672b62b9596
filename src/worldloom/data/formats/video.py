"""Video files by PyAV: times and frames of one stream, one frame in memory at a time, and a writer."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from worldloom.core.errors import DataError
from worldloom.core.files import write_atomic
from worldloom.data.formats.base import resize

VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm")


def frame_times(path: Path) -> Float64[np.ndarray, "n"]:
    """Return the presentation time of each frame in seconds, the first being 0; nothing is decoded.

    Raises:
        DataError: the file cannot be read, has no video, is cut, or has frames without a time.
    """
    with _opened(path) as (container, stream):
        stamps = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        promised, base = stream.frames, float(stream.time_base)
    if any(stamp is None for stamp in stamps):
        raise DataError(f"{path} has frames without a presentation time; encode it again into an .mp4 or .mkv file")
    if not stamps or len(stamps) < promised:
        raise DataError(
            f"{path} is cut: it holds {len(stamps)} frames and its header promises {promised}; restore it from a copy"
        )
    ticks = np.sort(np.array(stamps, np.int64))
    times: np.ndarray = (ticks - ticks[0]) * base
    return times


def frame_shape(path: Path) -> tuple[int, int]:
    """Return the height and width that a video states."""
    with _opened(path) as (_, stream):
        return int(stream.height), int(stream.width)


def read_frames(
    path: Path, keep: Int64[np.ndarray, "N"], size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "N H W 3"]:
    """Return the frames with these numbers (ascending, an equal one repeats) in order of presentation, resized.

    Raises:
        DataError: a frame is missing or does not decode, or the size of frames changes on the way.
    """
    out: np.ndarray | None = None
    there = 0
    shape: tuple[int, int] | None = None
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            if there == len(keep):
                break
            if frame.is_corrupt:
                raise DataError(f"{path} does not decode at frame {number}; restore it from a copy")
            shape = shape or (frame.height, frame.width)
            if (frame.height, frame.width) != shape:
                raise DataError(
                    f"{path} changes its frame size from {shape} to {(frame.height, frame.width)} (height, width) at "
                    f"frame {number}; expected one size. Encode it again, or cut it there"
                )
            if keep[there] != number:
                continue
            picture = resize(frame.to_ndarray(format="rgb24")[None], size)[0]
            if out is None:
                out = np.empty((len(keep), *picture.shape), np.uint8)
            while there < len(keep) and keep[there] == number:
                out[there] = picture
                there += 1
    if out is None or there < len(keep):
        raise DataError(f"{path} decodes only up to frame {number}; frame {keep[there]} is missing. Restore it")
    return out


def write_video(path: Path, frames: UInt8[np.ndarray, "N H W 3"], *, fps: float, crf: int, lossless: bool) -> None:
    """Write a video atomically: H.264 without chroma subsampling (.mp4), or lossless FFV1 (.mkv).

    Raises:
        StorageError: the disk is full or refuses.
    """
    import av

    def write(temporary: Path) -> None:
        with av.open(str(temporary), "w", format="matroska" if lossless else "mp4") as container:
            rate = Fraction(fps).limit_denominator(10_000)
            options = {} if lossless else {"crf": str(crf)}
            stream: Any = container.add_stream("ffv1" if lossless else "libx264", rate=rate, options=options)
            stream.pix_fmt = "bgr0" if lossless else "yuv444p"
            stream.height, stream.width = frames.shape[1:3]
            for picture in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())

    write_atomic(path, write)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path} holds no video; check the file")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise DataError(
            f"{path} cannot be read as a video ({error.strerror}): it is cut, damaged or of another kind. Restore it "
            f"from a copy"
        ) from error
