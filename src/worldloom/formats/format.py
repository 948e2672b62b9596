"""What a foreign format is to worldloom: a `Source` to read, a `Sink` to write, and a `Format` that opens both.

Our `Episode` has T + 1 frames and T actions. A foreign episode of N rows (frame, action) gives N frames and N - 1
actions, as its last action leads to no frame, unless the format holds the closing frame. See docs/formats.md.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError
from worldloom.core.files import storage_errors
from worldloom.core.registry import Registry, nearest
from worldloom.core.types import ActionSpec, Episode
from worldloom.data import DatasetSpec

NO_CAMERA = "none"  # as `ReadOptions.camera`: leave the pixels out


@dataclass(frozen=True, kw_only=True)
class Note:
    """One thing that could not be carried, was repaired or left out: a whole sentence, with the place."""

    kind: Literal["dropped", "repaired", "skipped", "info"]
    what: str
    episode: int | None = None  # of the source


class ReadOptions(Config):
    """How a foreign dataset is read; an option that a format cannot honour is an error."""

    camera: str | None = None  # which image key, where there are several; "none" leaves the pixels out
    vector: list[str] | None = None  # observation columns of the vector, in order; None: all numeric ones, sorted
    size: tuple[int, int] | None = None  # (H, W): frames are resized by area averaging
    rate: float | None = Field(None, gt=0)  # steps a second; None: the camera's
    actions: Literal["hold", "mean"] = "hold"  # of an action stream with a clock of its own: see timebase.py
    gap: float = Field(4.0, gt=1)  # a gap longer than this many median periods splits an episode
    action_low: list[float] | None = None  # bounds; None: the format's, else the range of the data, with a note
    action_high: list[float] | None = None
    columns: dict[str, str] = Field(default_factory=dict)  # names of columns, for formats that let them be free


class WriteOptions(Config):
    """How a foreign dataset is written."""

    fps: float = Field(10.0, gt=0)  # frames a second, where the format has a clock
    crf: int = Field(18, ge=0, le=51)  # H.264's constant rate factor, where the format holds video
    lossless: bool = False  # a lossless codec, where the format takes one
    task: str = ""  # what is done in words, where the format asks for it


class Source(ABC):
    """A foreign dataset, opened for reading; a context manager.

    `fingerprint` is a cheap digest of the names, sizes and times of its files. `notes` is filled on opening, and by
    `read`. Reading the same episode again gives the same.
    """

    spec: DatasetSpec
    fingerprint: str
    notes: list[Note]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of source episodes."""

    @abstractmethod
    def read(self, index: int) -> list[Episode]:
        """Return a source episode: one Episode, several if it was split at gaps, none (with a note) if unusable.

        Raises:
            DataError: damage that no documented rule repairs; names the file.
        """

    def close(self) -> None:
        """Let go of the files."""
        return

    def __enter__(self) -> "Source":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Sink(ABC):
    """A dataset being written; a context manager. Leaving it after an error keeps what is whole.

    `written` is the number of whole episodes that were there when it was opened. A process killed at any moment
    leaves whole episodes, in order, only.
    """

    written: int

    @abstractmethod
    def write(self, episode: Episode) -> None:
        """Add one episode; it may be kept in memory until some more have come."""

    @abstractmethod
    def finish(self) -> list[Note]:
        """Make the dataset complete and readable, and return what could not be carried."""

    def close(self) -> None:
        """Keep what is whole and let go of the files."""
        return

    def __enter__(self) -> "Sink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Format(ABC):
    """A layout of data that others use. `lossless_pixels`: pixels come back as they were with the default options."""

    name: str
    description: str
    writable: bool = True
    lossless_pixels: bool = True

    @abstractmethod
    def detects(self, path: Path) -> bool:
        """Return whether `path` looks like this format; reads little, and raises nothing for what is foreign."""

    @abstractmethod
    def open(self, path: Path, options: ReadOptions) -> Source:
        """Open for reading.

        Raises:
            DataError, StorageError: it is not of this format, or damaged.
            ConfigError: an option does not fit what is there.
        """

    @abstractmethod
    def create(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> Sink:
        """Open for writing; with `resume`, go on with what an earlier `create` left there.

        Raises:
            DataError: something else is at `path`, or the format cannot hold such data.
            ConfigError: the format cannot be written.
        """


FORMATS: Registry[Format] = Registry("format")


def digest_files(paths: Iterable[Path], root: Path) -> str:
    """Return a digest of the names, sizes and times of files; their content is not read."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(paths):
        with storage_errors(path):
            stat = path.stat()
        name = path.relative_to(root).as_posix() if path != root else path.name
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def natural(name: str) -> list[tuple[int, int | str]]:
    """Return a sorting key that puts `demo_9` before `demo_10`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def choose_camera(cameras: Sequence[str], options: ReadOptions, where: str) -> str | None:
    """Return the image key that is asked for, or the only one, or None where there is none.

    Raises:
        ConfigError: there are several and none is chosen, or the chosen one is not there.
    """
    if options.camera == NO_CAMERA:
        return None
    if options.camera is not None:
        if options.camera not in cameras:
            raise ConfigError(f"{where} holds no camera {options.camera!r}; {nearest(options.camera, cameras)}")
        return options.camera
    if len(cameras) > 1:
        raise ConfigError(
            f"{where} holds {len(cameras)} cameras: {', '.join(sorted(cameras))}. Choose one with --camera NAME, or "
            f"{NO_CAMERA!r} for none"
        )
    return cameras[0] if cameras else None


def choose_vector(columns: Iterable[str], options: ReadOptions, where: str) -> list[str]:
    """Return the observation columns that make the vector: those asked for, in order, or all, sorted.

    Raises:
        ConfigError: one that is asked for is not there.
    """
    there = sorted(columns)
    if options.vector is None:
        return there
    for name in options.vector:
        if name not in there:
            raise ConfigError(f"{where} holds no numeric observation column {name!r}; {nearest(name, there)}")
    return list(options.vector)


def choose_bounds(
    options: ReadOptions,
    size: int,
    *,
    known: tuple[Sequence[float], Sequence[float]] | None,
    range_of_data: tuple[Sequence[float], Sequence[float]] | None,
    where: str,
    discrete: bool = False,
) -> tuple[ActionSpec, list[Note]]:
    """Return the bounds of actions: the options', else the format's (`known`), else the range of the data, noted.

    A dimension that never moves gets a range of 1 around its value. One bound alone may be given by the options.

    Raises:
        ConfigError: the options' bounds are not of this size.
        DataError: there are neither bounds nor data.
    """
    notes: list[Note] = []
    found = known if known is not None else range_of_data
    given = {"action_low": options.action_low, "action_high": options.action_high}
    for name, values in given.items():
        if values is not None and len(values) != size:
            raise ConfigError(f"{name} has {len(values)} values; the actions of {where} have {size}")
    if found is None:
        if options.action_low is None or options.action_high is None:
            raise DataError(f"{where} has neither bounds of actions nor an action; give action_low and action_high")
        found = (options.action_low, options.action_high)
    low, high = (np.array(bound, np.float64) for bound in found)
    still = low >= high
    if known is None:
        low, high = np.where(still, low - 0.5, low), np.where(still, high + 0.5, high)
    low = low if options.action_low is None else np.array(options.action_low)
    high = high if options.action_high is None else np.array(options.action_high)
    if known is None and (options.action_low is None or options.action_high is None):
        sides = [name for name, values in given.items() if values is None]
        what = (
            f"{where} states no bounds of actions: {' and '.join(sides)} are the range of the data, "
            f"low {_short(low)} to high {_short(high)}. Give the true ones where they are known."
        )
        notes.append(Note(kind="info", what=what))
    return ActionSpec(low=tuple(map(float, low)), high=tuple(map(float, high)), discrete=discrete), notes


def refuse(options: ReadOptions, names: Sequence[str], why: str) -> None:
    """Raise `ConfigError` where one of these options is set: a format that cannot honour it must not ignore it."""
    for name in names:
        if getattr(options, name) != ReadOptions.model_fields[name].get_default(call_default_factory=True):
            raise ConfigError(f"the option {name} cannot be used here: {why}")


def resize(frames: UInt8[np.ndarray, "N H W C"], size: tuple[int, int] | None) -> UInt8[np.ndarray, "N H2 W2 C"]:
    """Return frames of this (H, W), by area averaging; None leaves them as they are. Any number of channels."""
    if size is None or frames.shape[1:3] == size or len(frames) == 0:
        return frames
    height, width = size
    out = np.empty((len(frames), height, width, frames.shape[3]), np.uint8)
    for index, frame in enumerate(frames):
        for channel in range(frames.shape[3]):
            picture = Image.fromarray(np.ascontiguousarray(frame[..., channel]))
            out[index, ..., channel] = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    return out


def concatenate(columns: Mapping[str, np.ndarray], names: Sequence[str]) -> Float32[np.ndarray, "N V"] | None:
    """Return the named columns (N, ...), flattened and side by side; None for no name."""
    if not names:
        return None
    return np.ascontiguousarray(np.concatenate([flat(columns[name]) for name in names], axis=1))


def flat(column: np.ndarray) -> Float32[np.ndarray, "N n"]:
    """Return a column (N, ...) as float32 with one axis of values; N may be 0."""
    return np.asarray(column, np.float32).reshape(len(column), int(np.prod(column.shape[1:])))


def build_episode(notes: list[Note], index: int, where: str, **parts: Any) -> list[Episode]:
    """Return the Episode of these parts in a list, or none, with a note, if it is too short or not finite."""
    actions: np.ndarray = parts["actions"]
    if len(actions) < 1:
        what = f"{where} is skipped: it has no action that leads from one frame to another."
        notes.append(Note(kind="skipped", what=what, episode=index))
        return []
    named = {"actions": actions, "the vector": parts["vector"]}
    named |= {f"label {name!r}": column for name, column in parts.get("labels", {}).items()}
    for name, column in named.items():
        if column is not None and not np.isfinite(column).all():
            step = int(np.flatnonzero(~np.isfinite(column.reshape(len(column), -1)).all(axis=1))[0])
            what = (
                f"{where} is skipped: {name} has a value that is not finite (missing, NaN or infinite) at step {step}."
            )
            notes.append(Note(kind="skipped", what=what, episode=index))
            return []
    try:
        return [Episode(**parts)]
    except DataError as error:
        raise DataError(f"{where}: {error}. It is damaged, or of another layout") from error


def _short(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:8])
    return f"({shown})" if len(values) <= 8 else f"({shown}, ... {len(values)} values)"
