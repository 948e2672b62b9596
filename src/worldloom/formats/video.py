"""Video files through PyAV: a reader of times and frames, with one frame in memory at a time, and a writer."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from worldloom.core.errors import DataError
from worldloom.core.files import write_atomic
from worldloom.core.untrusted import try_files
from worldloom.core.untrusted_child import VIDEO_FORMATS
from worldloom.data import encode_video, resize, room_for

VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm")
TURNED = "the frames are turned or mirrored, as the display matrix of the video requires"
LOSSY_CODEC = "H.264 at crf {crf}"  # the codec of `write_video`


@dataclass(frozen=True, kw_only=True, eq=False)
class Presentation:
    """The frames of a video as a player shows them: their times in seconds, in order.

    Time 0 is the start of playback. The first frame is at 0, or later if an edit list (MP4, MOV) delays the video.
    `hidden` is the number of frames in the file that an edit list hides.
    """

    times: Float64[np.ndarray, "n"]
    hidden: int


def presentation(path: Path) -> Presentation:
    """Return the times at which a player shows the frames of a video, without decoding them.

    Raises:
        DataError: the file cannot be read, has no video, is truncated, or has frames without a time.
    """
    present, stamps, promised, base = _stamps(path)
    if present < promised:  # an edit list may leave out frames at the end
        present = _stamps(path, ignore_editlist=True)[0]
    if any(stamp is None for stamp in stamps):
        raise DataError(f"{path} has frames without a presentation time; convert it to an .mp4 or .mkv file")
    if present == 0 or present < promised:
        raise DataError(
            f"{path} is truncated: it has {present} frames, expected {promised} from its header. Restore the video "
            f"from a copy"
        )
    if not stamps:
        raise DataError(f"{path}: the edit list hides all {present} frames; export the video again")
    ticks = np.sort(np.array(stamps, np.int64))
    delayed = ticks[0] > 0 and min(_stamps(path, ignore_editlist=True)[1], default=ticks[0]) != ticks[0]
    times: np.ndarray = (ticks - (0 if delayed else ticks[0])) * base
    return Presentation(times=times, hidden=max(present - len(ticks), 0))


def frame_times(path: Path) -> Float64[np.ndarray, "n"]:
    """Return the time of each frame in seconds; see `presentation`."""
    return presentation(path).times


def frame_shape(path: Path) -> tuple[int, int]:
    """Return the height and width at which a player shows a video."""
    with suppress(DataError), closing(FrameStream(path)) as stream:
        height, width, _ = stream.read(np.array([0])).shape[1:]
        return height, width
    with _opened(path) as (_, stream):  # reading the frames reports why they do not decode
        return int(stream.height), int(stream.width)


class FrameStream:
    """A video reader that decodes forward; a request for an earlier frame restarts from the first frame.

    Frames are as a player shows them: frames that an edit list hides have no number, and the others are turned or
    mirrored as the display matrix requires. `turned` is set once a frame was turned or mirrored. Of several videos in a
    file, the first is read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.turned, self._videos = path, False, 1
        self._context: Any = None
        self._frames: Iterator[Any] = iter(())
        self._next = 0
        self._shape: tuple[int, int] | None = None
        self._last: tuple[int, Any] | None = None  # the last decoded frame, which the next call may need again

    def read(
        self, numbers: Int64[np.ndarray, "N"], size: tuple[int, int] | None = None
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """Return the frames with these numbers in presentation order, resized to `size` (H, W).

        The numbers must be ascending; a repeated number repeats a frame.

        Raises:
            DataError: a frame is missing or does not decode, the frames need too much memory, the frame size changes
                within the video, or the display matrix turns frames by an angle that is not a multiple of 90 degrees.
        """
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
            picture = resize(self._upright(self._last[1])[None], size)[0]
            if out is None:
                out = room_for(len(numbers), picture, str(self.path))
            while there < len(numbers) and numbers[there] == self._last[0]:
                out[there] = picture
                there += 1
        if out is None or there < len(numbers):
            raise DataError(
                f"{self.path} decodes only up to frame {self._next - 1}; frame {numbers[there]} is missing. Restore "
                f"the video from a copy"
            )
        return out

    @property
    def remarks(self) -> list[tuple[Literal["info", "guessed"], str]]:
        """Notes on the frames that were read: the kind of each note, and its sentence without a full stop."""
        said: list[tuple[Literal["info", "guessed"], str]] = []
        if self.turned:
            said.append(("info", TURNED))
        if self._videos > 1:
            said.append(
                ("guessed", f"the first of {self._videos} videos in the file is read. Split the file to read another")
            )
        return said

    def _begin(self) -> None:
        self.close()
        self._context = _opened(self.path)
        container, stream = self._context.__enter__()
        self._videos = len(_shown(container))
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
        if frame.format.name.startswith("gray") and (bits := frame.format.components[0].bits) > 8:
            raise DataError(
                f"{self.path} has {bits} bits of grey, such as depth, of which only 8 would be read. Convert the video "
                f"to 8 bits with the range that you need, or leave it out with --camera none"
            )
        self._last, self._next = (number, frame), number + 1
        return True

    def _upright(self, frame: Any) -> UInt8[np.ndarray, "H W 3"]:
        """Return a frame as a player shows it, turned and mirrored by its display matrix."""
        picture: np.ndarray = frame.to_ndarray(format="rgb24")
        across, down, swapped = _orientation(frame, self.path)
        self.turned = self.turned or (across, down, swapped) != (1, 1, False)
        return (picture.transpose(1, 0, 2) if swapped else picture)[::down, ::across]

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


def _stamps(path: Path, *, ignore_editlist: bool = False) -> tuple[int, list[Any], int, float]:
    """Return the number of frames in the file, the shown frames' time stamps, the header's count, and the time base."""
    with _opened(path, {"ignore_editlist": "1"} if ignore_editlist else {}) as (container, stream):
        packets = [(packet.pts, packet.is_discard) for packet in container.demux(stream) if packet.size]
        stamps = [stamp for stamp, hidden in packets if not hidden]
        return len(packets), stamps, int(stream.frames), float(stream.time_base)


def _orientation(frame: Any, path: Path) -> tuple[int, int, bool]:
    """Return the steps through the columns and rows of a frame (1 or -1), and whether rows and columns are swapped.

    A display matrix maps the coded position (p, q) to the shown position x = a p + c q, y = b p + d q.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 1, False
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), np.int32)[:5])
    swapped = abs(a) + abs(d) < abs(b) + abs(c)
    across, down, other = (c, b, abs(a) + abs(d)) if swapped else (a, d, abs(b) + abs(c))
    if other > 0.01 * (abs(across) + abs(down)):
        raise DataError(
            f"{path} has a display matrix that does not turn by a multiple of 90 degrees ({a}, {b}, {c}, {d}); "
            f"expected 0, 90, 180 or 270 degrees. Encode the video again with upright frames"
        )
    return -1 if across < 0 else 1, -1 if down < 0 else 1, swapped


@contextmanager
def _opened(path: Path, options: dict[str, str] | None = None) -> Iterator[tuple[Any, Any]]:
    import av

    try_files("video", [path])
    with _video_errors(path), av.open(str(path), options={**VIDEO_FORMATS, **(options or {})}) as container:
        streams = _shown(container)
        if not streams:
            raise DataError(f"{path} has no video stream; check the file")
        yield container, streams[0]


def _shown(container: Any) -> list[Any]:
    """Return the video streams without cover pictures, which are video streams too."""
    from av.stream import Disposition

    return [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]


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
