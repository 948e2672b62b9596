"""Video files through PyAV: a reader of times and frames, with one frame in memory at a time, and a writer."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from worldloom.core.errors import DataError
from worldloom.core.files import write_atomic
from worldloom.core.untrusted import try_files
from worldloom.data import encode_video, resize

VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm")
LOSSY_CODEC = "H.264 at crf {crf}"  # the codec of `write_video`


def frame_times(path: Path) -> Float64[np.ndarray, "n"]:
    """Return the presentation time of each frame in seconds from the first frame, without decoding.

    Raises:
        DataError: the file cannot be read, has no video, is truncated, or has frames without a time.
    """
    with _opened(path) as (container, stream):
        stamps = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        promised, base = stream.frames, float(stream.time_base)
    if any(stamp is None for stamp in stamps):
        raise DataError(f"{path} has frames without a presentation time; convert it to an .mp4 or .mkv file")
    if not stamps or len(stamps) < promised:
        raise DataError(
            f"{path} is truncated: it has {len(stamps)} frames, expected {promised} from its header. Restore the video "
            f"from a copy"
        )
    ticks = np.sort(np.array(stamps, np.int64))
    times: np.ndarray = (ticks - ticks[0]) * base
    return times


def frame_shape(path: Path) -> tuple[int, int]:
    """Return the height and width in a video's header."""
    with _opened(path) as (_, stream):
        return int(stream.height), int(stream.width)


def read_frames(
    path: Path, numbers: Int64[np.ndarray, "N"], size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "N H W 3"]:
    """Return the frames with these numbers in presentation order, resized to `size` (H, W).

    The numbers must be ascending; a repeated number repeats a frame.

    Raises:
        DataError: a frame is missing or does not decode, or the frame size changes within the video.
    """
    with closing(FrameStream(path)) as stream:
        return stream.read(numbers, size)


class FrameStream:
    """A video reader that decodes forward; a request for an earlier frame restarts from the first frame."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._context: Any = None
        self._frames: Iterator[Any] = iter(())
        self._next = 0
        self._shape: tuple[int, int] | None = None
        self._last: tuple[int, Any] | None = None  # the last decoded frame, which the next call may need again

    def read(
        self, numbers: Int64[np.ndarray, "N"], size: tuple[int, int] | None = None
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """Return the frames with these numbers; see `read_frames`."""
        assert (np.diff(numbers) >= 0).all(), "frames are decoded forward; sort their numbers"
        if self._context is None or (len(numbers) and numbers[0] < (self._last[0] if self._last else 0)):
            self._begin()
        out: np.ndarray | None = None
        there = 0
        while there < len(numbers):
            if self._last is None or self._last[0] < numbers[there]:
                if not self._advance():
                    break
                continue
            picture = resize(self._last[1].to_ndarray(format="rgb24")[None], size)[0]
            if out is None:
                out = np.empty((len(numbers), *picture.shape), np.uint8)
            while there < len(numbers) and numbers[there] == self._last[0]:
                out[there] = picture
                there += 1
        if out is None or there < len(numbers):
            raise DataError(
                f"{self.path} decodes only up to frame {self._next - 1}; frame {numbers[there]} is missing. Restore "
                f"the video from a copy"
            )
        return out

    def _begin(self) -> None:
        self.close()
        self._context = _opened(self.path)
        container, stream = self._context.__enter__()
        stream.thread_type = "AUTO"
        self._frames = container.decode(stream)

    def _advance(self) -> bool:
        with _video_errors(self.path):
            frame = next(self._frames, None)
        if frame is None:
            return False
        number, shape = self._next, (frame.height, frame.width)
        if frame.is_corrupt:
            raise DataError(f"{self.path} does not decode at frame {number}; restore it from a copy")
        self._shape = self._shape or shape
        if shape != self._shape:
            raise DataError(
                f"{self.path} changes its frame size from {self._shape} to {shape} (height, width) at frame {number}; "
                f"expected one size. Resize all frames, or split the video there"
            )
        self._last, self._next = (number, frame), number + 1
        return True

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        context, self._context = self._context, None
        self._frames, self._next, self._shape, self._last = iter(()), 0, None, None
        if context is not None:
            context.__exit__(None, None, None)


def write_video(path: Path, frames: UInt8[np.ndarray, "N H W 3"], *, fps: float, crf: int, lossless: bool) -> None:
    """Write a video atomically: H.264 without chroma subsampling (.mp4), or lossless FFV1 (.mkv).

    Raises:
        StorageError: the file cannot be written.
    """
    lossy = {"codec": "libx264", "pixel_format": "yuv444p", "options": {"crf": str(crf)}}
    kind: Any = {"codec": "ffv1", "pixel_format": "bgr0", "container": "matroska"} if lossless else lossy
    rate = Fraction(fps).limit_denominator(10_000)
    write_atomic(path, lambda temporary: encode_video(str(temporary), frames, rate=rate, **kind))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    import av

    try_files("video", [path])
    with _video_errors(path), av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError(f"{path} has no video stream; check the file")
        yield container, container.streams.video[0]


@contextmanager
def _video_errors(path: Path) -> Iterator[None]:
    import av

    try:
        yield
    except av.FFmpegError as error:
        raise DataError(
            f"{path} cannot be read as a video ({error.strerror}): the file is truncated, damaged or not a video. "
            f"Restore the file from a copy"
        ) from error
