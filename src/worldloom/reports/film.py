"""Videos of episodes: the agent's frames beside its goal, several episodes at once."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from worldloom.core.errors import DataError
from worldloom.data import encode_video
from worldloom.evaluation import Recording

_CODECS = ("libx264", "h264", "libopenh264")  # H.264 encoders; the available ones depend on the build of PyAV
_REACHED, _FAILED, _RUNNING, _PAPER, _INK = (0, 158, 115), (213, 94, 0), (140, 148, 156), (22, 26, 30), (228, 231, 234)


@dataclass(frozen=True, kw_only=True)
class Video:
    """An MP4, or the reason for its absence."""

    data: bytes
    width: int = 0
    height: int = 0
    absent: str = ""


def choose(recordings: Sequence[Recording], method: str, *, successes: int = 4, failures: int = 2) -> list[Recording]:
    """Return recordings of one method with frames, alternating between splits: successes first, then failures."""
    chosen: list[Recording] = []
    for outcome, count in ((True, successes), (False, failures)):
        groups: dict[str, list[Recording]] = {}
        for recording in recordings:
            if recording.method == method and recording.success is outcome and recording.frames is not None:
                groups.setdefault(recording.split, []).append(recording)
        longest = max(map(len, groups.values()), default=0)
        alternating = [group[place] for place in range(longest) for group in groups.values() if place < len(group)]
        chosen.extend(alternating[:count])
    return chosen


def episodes_video(recordings: Sequence[Recording], *, fps: int = 12, columns: int = 3) -> Video:
    """Return an MP4 (H.264, yuv420p) of episodes side by side, each beside its goal.

    An episode that has ended shows its last frame. The border of an episode turns green when the goal is reached and
    orange when the budget is used up.
    """
    import av

    shown = [recording for recording in recordings if recording.frames is not None]
    if not shown:
        return Video(data=b"", absent="no episode with pixels was recorded")
    codec = next((name for name in _CODECS if name in av.codecs_available and _encodes(name)), None)
    if codec is None:
        return Video(data=b"", absent="this build of PyAV has no H.264 encoder; install the wheel from PyPI")
    steps = max(recording.steps for recording in shown)
    first = _sheet(shown, 0, columns)
    file = io.BytesIO()
    sheets = (_sheet(shown, step, columns) for step in [*range(steps + 1), *[steps] * fps])  # show the last for 1 s
    encode_video(file, sheets, rate=fps, codec=codec, options={"crf": "20"} if codec == "libx264" else {})
    return Video(data=file.getvalue(), width=first.shape[1], height=first.shape[0])


def episodes_gif(recordings: Sequence[Recording], *, fps: int = 15, columns: int = 4) -> bytes:
    """Return the video of `episodes_video` as a GIF that repeats, for pages that cannot show videos.

    Raises:
        DataError: no episode with pixels was recorded.
    """
    from PIL import Image

    shown = [recording for recording in recordings if recording.frames is not None]
    if not shown:
        raise DataError(
            "no episode with pixels was recorded; evaluate a world with pixels, and call evaluate() with record > 0"
        )
    steps = max(recording.steps for recording in shown)
    frames = [Image.fromarray(_sheet(shown, step, columns, foot=0)) for step in [*range(steps + 1), *[steps] * fps]]
    palette = frames[-1].quantize(128)  # one palette for all frames, so that colours do not flicker
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=1000 // fps, loop=0, optimize=True)
    return file.getvalue()


def _encodes(name: str) -> bool:
    import av

    try:
        return av.Codec(name, "w").is_encoder
    except ValueError:  # av.codec.codec.UnknownCodecError
        return False


def _sheet(recordings: Sequence[Recording], step: int, columns: int, *, foot: int = 64) -> UInt8[np.ndarray, "H W 3"]:
    """Draw all episodes at one step; `foot` pixels are left empty for the controls of video players."""
    tiles = [_tile(recording, step) for recording in recordings]
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    height, width = max(tile.shape[0] for tile in tiles), max(tile.shape[1] for tile in tiles)
    gap = 16
    # H.264 with chroma subsampling needs even numbers of pixels.
    sheet = np.empty(((rows * (height + gap) + foot) // 2 * 2, (columns * (width + gap) + gap) // 2 * 2, 3), np.uint8)
    sheet[:] = _PAPER
    for place, tile in enumerate(tiles):
        top = gap + place // columns * (height + gap)
        left = gap + place % columns * (width + gap)
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def _tile(recording: Recording, step: int) -> UInt8[np.ndarray, "H W 3"]:
    """Draw one episode: a caption, then the frame and the goal in a border that shows the outcome."""
    from PIL import Image, ImageDraw, ImageFont

    assert recording.frames is not None
    ended = step >= recording.steps
    frame = to_size(recording.frames[min(step, recording.steps)])
    pair = [frame] if recording.goal is None else [frame, to_size(recording.goal)]
    border, caption = 4, 22
    height, width = frame.shape[0], sum(part.shape[1] for part in pair) + border * (len(pair) - 1)
    tile = Image.new("RGB", (width + 2 * border, height + 2 * border + caption), _PAPER)
    brush = ImageDraw.Draw(tile)
    colour = (_REACHED if recording.success else _FAILED) if ended else _RUNNING
    brush.rectangle((0, caption, width + 2 * border - 1, height + 2 * border + caption - 1), fill=colour)
    left = border
    for part in pair:
        tile.paste(Image.fromarray(part), (left, border + caption))
        left += part.shape[1] + border
    state = f"step {min(step, recording.steps)}"
    if ended:
        state = f"reached in {recording.steps}" if recording.success else f"not reached in {recording.steps}"
    font = ImageFont.load_default(14)
    brush.text((1, 1), f"{recording.split}: {state}", fill=_INK, font=font)
    if recording.goal is not None:
        brush.text((width + border, 1), "goal", fill=_INK, font=font, anchor="ra")
    drawn: UInt8[np.ndarray, "H W 3"] = np.asarray(tile)
    return drawn


def to_size(picture: UInt8[np.ndarray, "H W C"], side: int = 128) -> UInt8[np.ndarray, "h w 3"]:
    """Return the picture in RGB, resized to about `side` pixels on the shorter side by repeating or omitting pixels."""
    rgb = picture[..., :3] if picture.shape[-1] >= 3 else np.repeat(picture[..., :1], 3, axis=-1)
    shorter = min(rgb.shape[:2])
    if shorter > side:
        stride = shorter // side
        return np.ascontiguousarray(rgb[::stride, ::stride])
    factor = -(-side // shorter)
    return np.ascontiguousarray(rgb.repeat(factor, axis=0).repeat(factor, axis=1))
