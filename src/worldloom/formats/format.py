"""The interfaces of a dataset format: a `Source` reads it, a `Sink` writes it, and a `Format` opens both.

An `Episode` has T + 1 frames and T actions. Many formats store N rows of (frame, action) instead. Such an episode
becomes N frames and N - 1 actions: no frame follows the last action, which is therefore left out. If the format stores
that last frame, all N actions are kept. See docs/formats.md.
"""

import hashlib
import itertools
import json
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from pydantic import Field

from worldloom.core.closing import Closing
from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError, WorldloomError, one_line
from worldloom.core.files import storage_errors
from worldloom.core.picture_layout import PictureLayout, PictureOptions, is_picture, picture_layout
from worldloom.core.registry import Registry, nearest
from worldloom.core.types import ActionSpec, Episode, ObservationSpec
from worldloom.data import DatasetSpec, check_episode, resize

NO_CAMERA = "none"  # value of `ReadOptions.camera` that leaves the pixels out
CLOCK = ("rate", "actions", "gap", "pair")  # options for data with timestamps
ROLES = ("action", "choice", "observation", "label", "camera", "timestamp", "unit")  # keys of `ReadOptions.columns`
Kind = Literal["dropped", "repaired", "skipped", "guessed", "info"]
_MOST_CHOICES = 32  # integers up to this number are taken for choices
_MOST_NAMED_CHOICES = 4096
_FEW_VALUES = 5  # a column with at most so many different values holds flags or choices
_LOST = 0.1  # a rounding error above this share of the median change is noted
Bounds = tuple[Sequence[float], Sequence[float]]  # low and high, with one value per action dimension


@dataclass(frozen=True, kw_only=True)
class Note:
    """A note about data that was left out, repaired, skipped or guessed; `what` is a sentence that names the place."""

    kind: Kind
    what: str
    episode: int | None = None  # index of the source episode


class ReadOptions(Config):
    """Options for reading a dataset of another format; an unsupported option that is set raises an error."""

    camera: str | None = None  # image key, required if there are several; "none" leaves the pixels out
    vector: list[str] | None = None  # columns of the observation vector, in order; None: all numeric ones, sorted
    size: tuple[int, int] | None = None  # (H, W): frames are resized by area averaging
    pictures: PictureOptions | None = None  # how pictures are stored, if this is not clear from the files
    rate: float | None = Field(None, gt=0)  # steps per second; None: the camera's rate
    actions: Literal["hold", "mean"] = "hold"  # how actions with their own clock are aligned; see `align`
    gap: float = Field(4.0, gt=1)  # an episode is split at gaps longer than this many median periods
    pair: Literal["time", "number"] | None = None  # how rows match frames; None: by time, if number does not disagree
    action_low: list[float] | None = None  # bounds; None: those of the format, else the range of the data, with a note
    action_high: list[float] | None = None
    columns: dict[str, str] = Field(default_factory=dict)  # for each role (see `ROLES`), names joined by commas


class WriteOptions(Config):
    """Options for writing a dataset in another format."""

    fps: float = Field(10.0, gt=0)  # frames per second, if the format has a clock
    crf: int = Field(18, ge=0, le=51)  # H.264's constant rate factor, if the format stores video
    lossless: bool = False  # use a lossless codec, if the format has one
    task: str = ""  # the task description, if the format stores one


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A description of what a source reads, from which `Source.describe` derives the spec.

    `vector` and `labels` map each column, in order, to its number of values. `bounds` are the action bounds that the
    format stores; `range` is the range of the data, if the format stores the range instead of bounds. `own` is the
    spec in files that worldloom wrote; the bounds and environment of `own` take precedence.
    """

    files: Iterable[Path]  # the files that the fingerprint covers
    action: int  # number of values of an action in the files
    integer: bool = False  # whether the files store actions as integers
    discrete: bool = False
    bounds: Bounds | None = None
    range: Bounds | None = None
    pixels: tuple[int, int, int] | None = None  # H, W, C before frames are resized
    vector: Mapping[str, int]
    labels: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    own: DatasetSpec | None = None
    source: str | None = None  # the dataset's name; None: the name of its path


class Source(Closing, ABC):
    """A dataset of another format, opened for reading; a context manager.

    `fingerprint` is a cheap digest of the names, sizes and modification times of the dataset's files. `notes` are added
    on opening and by `read`. Reading an episode twice returns equal results.

    `refused` lists the options that the format does not support, and `roles` the keys of the option `columns` that it
    supports. Any other option or key raises an error that contains `reason`, so that none is silently ignored.

    Raises:
        DataError, StorageError: the data has a different format, or is damaged.
        ConfigError: an option does not fit the data.
    """

    format: str  # the name of the format
    spec: DatasetSpec
    fingerprint: str
    notes: list[Note]
    refused: Sequence[str] = ()
    roles: Sequence[str] = ()
    reason: str = ""
    _layout: PictureLayout | None = None
    _choices: tuple[int, int] | None = None  # the lowest and highest value of an action that is a choice

    def __init__(self, path: Path, options: ReadOptions) -> None:
        refuse(options, self.refused, self.reason)
        for role in options.columns:
            if role not in ROLES:
                raise ConfigError(f"unknown column role {role!r}; {nearest(role, ROLES)}")
            if role not in self.roles:
                raise ConfigError(
                    f"the role {role!r} of the option 'columns' is not supported here: {self.reason}. Leave it out"
                )
        self.path, self.options, self.notes = self.locate(path), options, []
        self._noted: set[str] = set()  # pictures that a note of their own says are left out
        try:
            with foreign_errors(self.path, self.format):
                self.begin()
        except BaseException:
            self.close()
            raise

    def locate(self, path: Path) -> Path:
        """Return the path of the dataset's file or directory; the default is `path`."""
        return path

    @abstractmethod
    def begin(self) -> None:
        """Open the files, choose what to read, and set `spec` and `fingerprint`, usually by calling `describe`."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of source episodes."""

    @abstractmethod
    def read(self, index: int) -> list[Episode]:
        """Return a source episode as a list: one Episode, several if split at gaps, none (with a note) if unusable.

        Raises:
            DataError: the episode is damaged beyond repair; the message names the file.
        """

    def actions(self) -> Iterator[np.ndarray]:
        """Yield the actions (n, A) of each readable episode, for formats that may not store action bounds."""
        return iter(())

    def note(self, kind: Kind, what: str, episode: int | None = None) -> None:
        """Add a note."""
        self.notes.append(Note(kind=kind, what=what, episode=episode))

    def note_left_out(self, kind: str, names: Iterable[str], why: str) -> None:
        """Add one note that the parts `names` are left out, except parts that already have a note of their own."""
        if shown := ", ".join(name for name in names if name not in self._noted):
            self.note("dropped", f"{self.path}: the {kind} {shown} are left out ({why}).")

    def note_last_action(self) -> None:
        """Add a note that the action in an episode's last row is left out."""
        self.note("info", f"{self.path}: the last action of each episode has no following frame and is left out.")

    def named(self, role: str) -> list[str] | None:
        """Return the columns that the option `columns` names for a role; None if it does not contain the role.

        Raises:
            ConfigError: the option `vector` or `camera` also names columns for this role.
        """
        text = self.options.columns.get(role)
        if text is None:
            return None
        other = {"observation": self.options.vector, "camera": self.options.camera}.get(role)
        if other is not None:
            raise ConfigError(
                f"the role {role!r} of 'columns' and '{'vector' if role == 'observation' else 'camera'}' both name "
                f"columns; leave one out"
            )
        return [name.strip() for name in text.split(",") if name.strip()]

    def choose_camera(self, cameras: Sequence[str]) -> str | None:
        """Return the name of the selected camera, by default the only camera; None if no pixels are read.

        Raises:
            ConfigError: there are several cameras and none is selected, or the selected one does not exist.
        """
        named = self.named("camera")
        chosen = self.options.camera if named is None else ",".join(named)
        if chosen == NO_CAMERA:
            return None
        if chosen is not None:
            if chosen not in cameras:
                raise ConfigError(f"{self.path} has no camera {chosen!r}; {nearest(chosen, cameras)}")
            return chosen
        if len(cameras) > 1:
            raise ConfigError(
                f"{self.path} has {len(cameras)} cameras: {', '.join(sorted(cameras))}. Choose one with --camera "
                f"NAME, or leave the pixels out with --camera {NO_CAMERA}"
            )
        return cameras[0] if cameras else None

    def pictures_among(
        self, columns: Mapping[str, tuple[Sequence[int], Any]], *, others: bool = False
    ) -> tuple[set[str], list[str]]:
        """Return the columns that are pictures, and those of them that may be the camera.

        `columns` maps each observation column to its shape (without the time axis) and its dtype. `others` states that
        there are observations besides `columns`. A column in the option `vector` does not count as a picture. Pictures
        that are not bytes may be the camera in two cases: the options select a camera or a range, or there is nothing
        else to observe. Otherwise a note says how to select them.
        """
        options = self.options
        numeric = {name for name, (_, dtype) in columns.items() if np.dtype(dtype).kind in "fiub"}
        pictures = {
            name
            for name in numeric - set(options.vector or self.named("observation") or ())
            if is_picture(columns[name][0], columns[name][1], options.pictures)
        }
        scaled = {name for name in pictures if np.dtype(columns[name][1]) != np.uint8}
        if options.camera is not None or "camera" in options.columns:
            return pictures, sorted(pictures)
        if options.pictures is not None and options.pictures.range is not None:
            return pictures, sorted(scaled)
        if not scaled or not (others or numeric - scaled):
            return pictures, sorted(pictures)
        self._noted |= scaled
        for name in sorted(scaled):
            shape, dtype = columns[name]
            self.note(
                "dropped",
                f"{self.path}: the pictures {name} of shape {tuple(shape)} are left out, because they are {dtype} "
                f"rather than bytes. Use them with --camera {name} --picture-range LOW:HIGH, or as numbers with "
                f"--vector {name}.",
            )
        return pictures, sorted(pictures - scaled)

    def lay_out(
        self,
        shape: Sequence[int],
        dtype: Any,
        what: str,
        *,
        own: bool = False,
        stated: tuple[float, float] | None = None,
        sample: np.ndarray | None = None,
    ) -> PictureLayout:
        """Return how the camera's pictures are stored, and add a note if the pixels differ from the stored values.

        Set `own` if worldloom wrote the pictures. `core.picture_layout` describes the other arguments.

        Raises:
            DataError: it is not clear how the pictures are stored.
        """
        options = PictureOptions(axes="hwc") if own else self.options.pictures
        self._layout = picture_layout(shape, dtype, what, options=options, stated=stated, sample=sample)
        if self._layout.changes:
            self.note("info", f"{what}: the pictures {self._layout.changes}.")
        return self._layout

    def to_pixels(self, stored: Shaped[np.ndarray, "N ..."], where: str, index: int) -> UInt8[np.ndarray, "N H W C"]:
        """Return stored pictures as pixels, with a note about values that are clipped.

        Raises:
            DataError: the pictures do not have the layout that `lay_out` found.
        """
        assert self._layout is not None
        if outside := self._layout.outside(stored):
            what = (
                f"{where}: {outside} of {stored.size} values of the pictures are outside of the range and are clipped."
            )
            self.note("info", what, index)
        return self._layout.convert(stored, where)

    def picture_values(self, what: str) -> tuple[float, float] | None:
        """Return the values of encoded pictures that become 0 and 255, and add a note; None if the options set none.

        Raises:
            ConfigError: an order of axes is set, which encoded pictures do not need.
        """
        options = self.options.pictures
        if options is None:
            return None
        if options.axes is not None:
            raise ConfigError(f"{what} are encoded pictures, whose axes are known. Leave out --picture-axes")
        if options.range is not None:
            self._layout = PictureLayout(shape=(1, 1), axes="hw", range=options.range)
            self.note("info", f"{what}: the pictures {self._layout.changes}; values outside are clipped.")
        return options.range

    def choose_vector(self, columns: Iterable[str], others: Iterable[str] = ()) -> list[str]:
        """Return the columns of the observation vector: the selected columns in order, by default `columns`, sorted.

        Raises:
            ConfigError: a selected column is neither in `columns` nor in `others`.
        """
        default = sorted(columns)
        self._selectable = sorted({*default, *others})  # for the error if nothing is observed
        named = self.named("observation")
        selected = self.options.vector if named is None else named
        if selected is None:
            return default
        return self._existing(selected, self._selectable, "numeric observation column")

    def choose_actions(
        self, numeric: Iterable[str], guesses: Sequence[str] = ("action", "actions"), file: Path | None = None
    ) -> list[str]:
        """Return the action's columns: those that the options name, by default those of the first guess that matches.

        The function `guess` defines what a guess matches. If the guess is not obvious, a note says what was guessed.
        `file` is the file that the error names if no column matches.

        Raises:
            ConfigError: a named column does not exist.
            DataError: no column is named and no guess matches.
        """
        there = list(numeric)
        if {"action", "choice"} <= {*self.options.columns}:
            raise ConfigError("the roles 'action' and 'choice' of 'columns' exclude each other; leave one out")
        named = self.named("action") or self.named("choice")
        if named is not None:
            return self._existing(named, there, "numeric column")
        found, parts = guess(guesses, there)
        if not found:
            raise DataError(
                f"{file or self.path} has no numeric column {' or '.join(map(repr, guesses))}; it has "
                f"{', '.join(there) or 'none'}. Name the columns of the action with --columns action=NAME,NAME"
            )
        if parts:
            self.note(
                "guessed",
                f"{self.path}: the action is {found[0]!r} alone; {', '.join(parts)} are left out, because they may "
                f"repeat it. Name other columns with --columns action=NAME,NAME.",
            )
        elif found[0].partition(".")[0] != guesses[0]:
            self.note(
                "guessed",
                f"{self.path}: the action is taken from {', '.join(found)}. Name other columns with "
                f"--columns action=NAME,NAME.",
            )
        return found

    def choose_labels(self, default: Iterable[str], numeric: Iterable[str]) -> list[str]:
        """Return the label columns: those that the options name, in order, by default `default`.

        Raises:
            ConfigError: a named column does not exist.
        """
        named = self.named("label")
        return list(default) if named is None else self._existing(named, list(numeric), "numeric column")

    def _existing(self, names: Sequence[str], there: Sequence[str], kind: str) -> list[str]:
        known = set(there)
        for name in names:
            if name not in known:
                raise ConfigError(f"{self.path} has no {kind} {name!r}; {nearest(name, there)}")
        return list(names)

    def describe(self, contents: Contents) -> None:
        """Set `spec` and `fingerprint`. If `contents` has no bounds and no range, read all actions to find the range.

        Raises:
            ConfigError: the bounds in the options have the wrong size, or the option `columns` is set for a dataset
                that worldloom wrote, whose files state the role of each column.
            DataError: there are neither action bounds nor actions, or neither pixels nor a vector are read.
        """
        own = contents.own
        if own is not None and self.options.columns:
            raise ConfigError(
                f"worldloom wrote {self.path}, and the files state the role of each column; leave out 'columns'"
            )
        if contents.pixels is None and not contents.vector:
            raise DataError(
                f"{self.path} has nothing to observe: no pixels and no vector were chosen. Name the columns with "
                f"--vector NAME or --camera NAME; numeric columns: {', '.join(self._selectable) or 'none'}"
            )
        bounds = contents.bounds if own is None else (own.action.low, own.action.high)
        found = bounds or contents.range or action_range(self.actions(), contents.action)
        discrete = contents.discrete or (own is not None and own.action.discrete)
        size = contents.action
        environment = dict(contents.environment if own is None else own.environment)
        if own is None and not discrete:
            self._choices = self._find_choices(contents, contents.range or found)
        if self._choices is not None:
            low, high = self._choices
            discrete, size, environment["choices"] = True, high - low + 1, [low, high]
            bounds = found = ([0.0] * size, [1.0] * size)
        pixels = contents.pixels
        if pixels is not None:
            pixels = (*(self.options.size or pixels[:2]), pixels[2])
        environment |= {"format": self.format, "source": contents.source or self.path.name}
        if self._layout is not None and self._layout.changes:
            environment["pictures"] = {"axes": self._layout.axes, "range": self._layout.range}
        self.spec = DatasetSpec(
            observation=ObservationSpec(pixels=pixels, vector=sum(contents.vector.values())),
            action=self._bounds(size, found, stated=bounds is not None, discrete=discrete),
            labels=dict(contents.labels),
            environment=environment,
        )
        self.fingerprint = digest_files(contents.files, self.path)
        self._columns = list(contents.vector)

    def _find_choices(self, contents: Contents, found: Bounds | None) -> tuple[int, int] | None:
        """Return the lowest and highest value of actions that are choices (numbers of discrete actions), else None.

        The options name the column of choices. Without that, integer actions with few values are guessed to be choices,
        with a note.
        """
        named = self.options.columns.get("choice")
        if named is not None and contents.action != 1:
            raise ConfigError(
                f"the role 'choice' expects one column of one value; {named} has {contents.action} values"
            )
        if named is None and not contents.integer:
            return None
        ways = "Name the column with --columns choice=NAME if its values are choices"
        if named is None and (self.options.action_low is not None or self.options.action_high is not None):
            return None  # numbers, because they have bounds
        low, high = (0, 0) if found is None or contents.action != 1 else (int(found[0][0]), int(found[1][0]))
        limit = _MOST_CHOICES if named is None else _MOST_NAMED_CHOICES
        fits = low < high < low + limit and (named is not None or (low >= 0 and high < limit))
        if fits and (named is not None or "action" not in self.options.columns):
            if named is None:
                self.note(
                    "guessed",
                    f"{self.path}: the action is one integer from {low} to {high}, which is read as a choice, not as a "
                    f"number. Name the column with --columns action=NAME if it is a number.",
                )
            return low, high
        if named is not None:
            raise DataError(
                f"{self.path}: the values of {named} are {low} to {high}; expected choices, which are at "
                f"least two and at most {limit} consecutive integers. Use --columns action={named} for numbers"
            )
        if "action" not in self.options.columns:
            self.note(
                "guessed",
                f"{self.path}: the actions are integers and are read as numbers, between which a planner chooses any "
                f"value. {ways}.",
            )
        return None

    def single(
        self, values: Shaped[np.ndarray, "n m"], name: str, where: str, index: int | None
    ) -> Float32[np.ndarray, "n m"]:
        """Return a column as float32.

        Add a note if the rounding error is large compared with the changes per step, unless `index` is None.
        """
        with np.errstate(over="ignore"):
            rounded = np.asarray(values, np.float32)
        if index is None or values.dtype.itemsize < 4 or values.dtype == np.float32 or len(values) < 2:
            return rounded
        exact = np.asarray(values, np.float64)
        with np.errstate(invalid="ignore"):
            error, steps = np.nan_to_num(np.abs(exact - rounded), posinf=0.0), np.abs(np.diff(exact, axis=0))
        for number in range(values.shape[1]):
            changes = steps[:, number][steps[:, number] > 0]
            worst = float(error[:, number].max())
            if len(changes) and worst > _LOST * (change := float(np.median(changes))):
                value = float(exact[int(error[:, number].argmax()), number])
                self.note(
                    "info",
                    f"{where}: {name} loses precision in value {number}: float32 rounds {value:.10g} by {worst:.2g}, "
                    f"and the values change by {change:.2g} per step. Subtract an offset before converting.",
                    index,
                )
        return rounded

    def _note_constants(self, name: str, column: Float32[np.ndarray, "N n"], where: str, index: int) -> None:
        """Add a note about a number, such as -9999 or -1, that may stand for a missing value of a sensor.

        The number is an integer that is at least as far from all other values as these are from each other. Columns
        with few different values, such as flags, have no such numbers.
        """
        for number, values in enumerate(column.T):
            distinct, counts = np.unique(values.astype(np.float64), return_counts=True)
            if len(distinct) <= _FEW_VALUES:
                continue
            part = f"[{number}]" if column.shape[1] > 1 else ""
            for place, others in ((0, distinct[1:]), (-1, distinct[:-1])):
                value = distinct[place]
                if value == np.rint(value) and np.abs(value - others).min() >= np.ptp(others):
                    self.note(
                        "info",
                        f"{where}: {name}{part} is {value:.10g} in {counts[place]} of {len(values)} rows, far from its "
                        f"other values ({others[0]:.4g} to {others[-1]:.4g}). If {value:.10g} stands for a missing "
                        f"value, correct these rows, or leave out the column or the episode.",
                        index,
                    )

    def encode(self, actions: np.ndarray, where: str) -> np.ndarray:
        """Return actions (n, A) in the form that the spec describes: choices one-hot, and numbers unchanged.

        A missing choice (NaN) becomes a row of NaN.

        Raises:
            DataError: an action is not one of the choices.
        """
        if self._choices is None:
            return actions
        low, high = self._choices
        values = np.asarray(actions, np.float64)[:, 0]
        known = np.isfinite(values)
        wrong = known & ((values != np.rint(values)) | (values < low) | (values > high))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"{where}: the action in row {row} is {values[row]:g}; expected an integer from {low} to {high}, "
                f"because actions are choices. Use --columns action=NAME if they are numbers"
            )
        codes = np.where(known, values - low, 0).astype(np.int64)
        encoded: np.ndarray = np.eye(high - low + 1, dtype=np.float32)[codes]
        encoded[~known] = np.nan
        return encoded

    def _bounds(self, size: int, found: Bounds | None, *, stated: bool, discrete: bool) -> ActionSpec:
        """Return the action bounds: those in the options, by default `found`.

        The options may set one bound or both. If not `stated`, `found` is the range of the data: a note says so, and a
        dimension with a constant value gets a range of 1 around the value.
        """
        given = {"action_low": self.options.action_low, "action_high": self.options.action_high}
        for name, values in given.items():
            if values is not None and len(values) != size:
                raise ConfigError(
                    f"{name!r} has {len(values)} values; expected {size}, one per action dimension of {self.path}"
                )
        missing = [name for name, values in given.items() if values is None]
        if found is None and missing:
            raise DataError(f"{self.path} has no actions and no action bounds; set 'action_low' and 'action_high'")
        low, high = (
            np.array(bound, np.float64) for bound in found or (self.options.action_low, self.options.action_high)
        )
        if not stated:
            still = low >= high
            low, high = np.where(still, low - 0.5, low), np.where(still, high + 0.5, high)
        low = low if self.options.action_low is None else np.array(self.options.action_low)
        high = high if self.options.action_high is None else np.array(self.options.action_high)
        if not stated and missing:
            self.note(
                "info",
                f"{self.path} has no action bounds: {' and '.join(missing)} are set to the range of the data, "
                f"low {_short(low)} to high {_short(high)}. Set the true bounds if you know them.",
            )
        return ActionSpec(low=tuple(map(float, low)), high=tuple(map(float, high)), discrete=discrete)

    def fit(self, frames: UInt8[np.ndarray, "N H W C"], where: str) -> UInt8[np.ndarray, "N H2 W2 C2"]:
        """Return frames resized as the options specify, with one channel if the spec has one.

        Raises:
            DataError: the resulting shape differs from the spec.
        """
        frames, expected = resize(frames, self.options.size), self.spec.observation.pixels
        if expected is not None and expected[2] == 1:
            frames = frames[..., :1]
        if frames.shape[1:] != expected:
            raise DataError(
                f"{where} has frames of shape {frames.shape[1:]}; expected {expected}, as in the metadata or the first "
                f"episode. Set one size for all frames with --size HxW; the number of channels must match"
            )
        return frames

    def episode(
        self,
        index: int,
        where: str,
        *,
        pixels: np.ndarray | None,
        columns: Mapping[str, np.ndarray],
        actions: np.ndarray,
        labels: Mapping[str, np.ndarray],
        metadata: Mapping[str, Any],
    ) -> list[Episode]:
        """Return a list with one Episode, or, with a note, an empty list if the episode is too short or not finite.

        `columns` must contain the vector columns. Pixels are passed through `fit`. Notes and errors contain `where`.

        Raises:
            DataError: the parts do not match each other.
        """
        if len(actions) < 1:
            self.note("skipped", f"{where} is skipped: it has no action between two frames.", index)
            return []
        vector = [self.single(two_axes(columns[name]), name, where, index) for name in self._columns]
        actions = self.single(actions, "the action", where, index)
        joined = np.ascontiguousarray(np.concatenate(vector, axis=1)) if vector else None
        flat_labels = {name: self.single(two_axes(column), name, where, index) for name, column in labels.items()}
        named: dict[str, np.ndarray] = {"actions": actions}
        named |= dict(zip(self._columns, vector, strict=True))
        named |= {f"label {name!r}": column for name, column in flat_labels.items()}
        for name, column in named.items():
            if not np.isfinite(column).all():
                step = int(np.flatnonzero(~np.isfinite(column).all(axis=1))[0])
                reason = f"{name} has a value that is not finite (missing, NaN or infinite) at step {step}"
                self.note("skipped", f"{where} is skipped: {reason}.", index)
                return []
        for name, column in named.items():
            if name != "actions":
                self._note_constants(name, column, where, index)
        frames = None if pixels is None else self.fit(pixels, where)
        try:
            return [
                Episode(
                    pixels=frames,
                    vector=joined,
                    actions=actions,
                    labels=flat_labels,
                    metadata=metadata,
                )
            ]
        except DataError as error:
            raise DataError(
                f"{where} is not a valid episode: {error}. Restore the file from a copy, or convert without this "
                f"episode (--skip-damaged)"
            ) from error


class Sink(Closing, ABC):
    """A dataset opened for writing; a context manager. If an error occurs, complete episodes are kept.

    `written` is the number of complete episodes in the dataset when the sink was opened. With `resume`, the sink
    continues a dataset that an earlier sink started at `path`. Pending episodes are saved together once their decoded
    size reaches `most_bytes` or their number `most_episodes`. If the process is killed, the dataset contains only
    complete episodes, in order.

    `layout` is the name of the format in messages. A label must not have a name in `reserved` or contain the character
    `forbidden`. If `encoded` is set, pictures must have 1 or 3 channels. `lossy_codec` is the codec for pixels unless
    the option `lossless` is set; None means that pixels are stored without loss.

    Raises:
        DataError: `path` contains different data, or the format cannot store data with this spec.
        ConfigError: an option does not fit the format.
    """

    layout: str
    reserved: Collection[str] = ()
    forbidden: str | None = None
    encoded: bool = False
    lossy_codec: str | None = None
    most_bytes: int = 0
    most_episodes: int = 1

    def __init__(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> None:
        for name in spec.labels:
            if name in self.reserved or (self.forbidden is not None and self.forbidden in name):
                what = " or ".join(["reserves", *([f"forbids ({self.forbidden!r})"] if self.forbidden else [])])
                raise DataError(f"label {name!r} has a name that {self.layout} {what}; rename the label")
        channels = 3 if spec.observation.pixels is None else spec.observation.pixels[2]
        if self.encoded and channels not in (1, 3):
            raise DataError(
                f"{self.layout} supports 1 or 3 channels; the dataset has {channels}. Choose another format"
            )
        self.path, self.spec, self.options = self.locate(path), spec, options
        self._bytes = 0
        self._pending: list[Episode] = []
        for place in [] if resume else self.places():
            if place.exists():
                raise DataError(f"{place} already exists; choose another path, or delete it")
        self.saved = self.written = self.begin(resume=resume)

    def locate(self, path: Path) -> Path:
        """Return the path of the dataset's file or directory; the default is `path`."""
        return path

    def places(self) -> list[Path]:
        """Return the paths that must not exist when writing starts without `resume`."""
        return [self.path]

    @abstractmethod
    def begin(self, *, resume: bool) -> int:
        """Prepare the path, and return the number of complete episodes that an earlier sink wrote there."""

    def write(self, episode: Episode) -> None:
        """Add one episode, and save the pending episodes if they reach a limit."""
        check_episode(episode, self.spec, f"episode {self.saved + len(self._pending)}")
        self._pending.append(episode)
        self._bytes += decoded_bytes(episode)
        if self._bytes >= self.most_bytes or len(self._pending) >= self.most_episodes:
            self._flush()

    @abstractmethod
    def save(self, episodes: list[Episode]) -> None:
        """Write episodes, the first with the number `saved`; a killed process must leave only complete episodes."""

    @abstractmethod
    def complete(self) -> None:
        """Write the remaining files of the dataset after all episodes are saved."""

    def finish(self) -> list[Note]:
        """Save the pending episodes, complete the dataset, and return a note if pixels were stored with loss."""
        self._flush()
        self.complete()
        if self.lossy_codec is None or self.spec.observation.pixels is None or self.options.lossless:
            return []
        codec = self.lossy_codec.format(crf=self.options.crf)
        what = f"{self.path}: pixels are stored with loss, as {codec}."
        return [Note(kind="info", what=what)]

    def close(self) -> None:
        """Save the pending episodes, even after an error elsewhere."""
        self._flush()

    def _flush(self) -> None:
        pending, self._pending, self._bytes = self._pending, [], 0  # a failed save is not retried on closing
        if pending:
            self.save(pending)
            self.saved += len(pending)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A dataset format: its name, and the functions that detect, read and write it.

    `detects` returns whether a path looks like this format. It reads little, and it does not fail on other data.
    `open` and `create` have the arguments of the constructors of `Source` and `Sink`; a format without `create` is
    read-only. `lossless_pixels` is set if writing with the default options keeps pixels unchanged.
    """

    name: str
    description: str
    detects: Callable[[Path], bool]
    open: Callable[[Path, ReadOptions], Source]
    create: Callable[..., Sink] | None = None
    lossless_pixels: bool = True

    @property
    def writable(self) -> bool:
        """Whether the format can be written."""
        return self.create is not None


FORMATS: Registry[Format] = Registry("format")


def add_format(
    source: type[Source],
    sink: type[Sink],
    detects: Callable[[Path], bool],
    description: str,
    *,
    lossless_pixels: bool = True,
) -> None:
    """Register the format with the name `source.format`, its source and its sink; see `Format`."""
    FORMATS.register(source.format)(
        Format(
            name=source.format,
            description=description,
            detects=detects,
            open=source,
            create=sink,
            lossless_pixels=lossless_pixels,
        )
    )


@contextmanager
def foreign_errors(path: Path, format: str) -> Iterator[None]:
    """Convert each exception to a `DataError` on `path`, except worldloom's own errors and failed assertions.

    Damaged or unusual files cause exceptions of many types in the code that reads them. NumPy's warnings are ignored,
    because values that are not finite are found and noted later.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    except (WorldloomError, AssertionError):
        raise
    except MemoryError as error:
        raise DataError(
            f"reading {path} needs more memory than is free ({one_line(error)}). Leave out columns, resize pictures "
            f"with --size HxW, or split the episodes"
        ) from error
    except Exception as error:
        raise DataError(
            f"{path} does not follow the layout of the format {format!r}, or is damaged ({type(error).__name__}: "
            f"{one_line(error)}). Restore it from a copy, or write it again"
        ) from error


def refuse(options: ReadOptions, names: Sequence[str], why: str) -> None:
    """Raise `ConfigError` if one of these options, which the format does not support, is set."""
    for name in names:
        if getattr(options, name) != ReadOptions.model_fields[name].get_default(call_default_factory=True):
            raise ConfigError(f"the option {name!r} is not supported here: {why}. Leave it out")


def guess(names: Sequence[str], columns: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the columns that match the first of `names` with any match, and the columns that may repeat their values.

    A name matches the column with exactly this name; the columns `name.*` and `name/*` may then repeat it. Without such
    a column, the name matches the columns `name.*` and `name/*`, in natural order.
    """
    there = list(columns)
    for name in names:
        parts = sorted((each for each in there if each.startswith((f"{name}.", f"{name}/"))), key=natural)
        if name in there:
            return [name], parts
        if parts:
            return parts, []
    return [], []


def count_files(place: Callable[[int], Path]) -> int:
    """Return the number of files that exist in the sequence `place(0)`, `place(1)`, ..., before the first gap."""
    return next(number for number in itertools.count() if not place(number).exists())


def only_one(found: Sequence[Path], path: Path, kind: str) -> Path:
    """Return the only element of `found`, the files or tables of one `kind` at `path`.

    Raises:
        DataError: there are none or several.
    """
    if len(found) != 1:
        names = ", ".join(each.name for each in found) or "none"
        raise DataError(f"{path} has these {kind}: {names}; expected one. Use the path of a single one")
    return found[0]


def files_below(path: Path) -> list[Path]:
    """Return all files below a directory except hidden ones, sorted; links to directories are followed once.

    Hidden files, such as the `._NAME` of macOS on foreign disks, are left out because file managers write them.
    """
    found: list[Path] = []
    seen = {os.path.realpath(path)}
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if os.path.realpath(Path(folder, name)) not in seen]
        seen |= {os.path.realpath(Path(folder, name)) for name in folders}
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def digest_files(paths: Iterable[Path], root: Path) -> str:
    """Return a digest of the names, sizes and modification times of files; their content is not read."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(paths):
        with storage_errors(path):
            stat = path.stat()
        name = path.relative_to(root).as_posix() if path != root else path.name
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def natural(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key that puts `demo_9` before `demo_10`."""
    parts = re.split(r"(\d{1,99})", name)  # limited, because `int` rejects texts of more than 4,300 digits
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def action_range(actions: Iterable[np.ndarray], size: int) -> Bounds | None:
    """Return the minimum and maximum finite value of each dimension of actions (n, `size`).

    Return None if a dimension has no finite value. Actions with a different shape are ignored.
    """
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    for part in actions:
        if part.shape[1:] == (size,) and len(part):
            taken = np.where(np.isfinite(part), part.astype(np.float64), np.nan)
            low, high = np.fmin(low, np.fmin.reduce(taken)), np.fmax(high, np.fmax.reduce(taken))
    return (low.tolist(), high.tolist()) if np.isfinite([low, high]).all() else None


def chosen(camera: str | None, vector: Mapping[str, int]) -> dict[str, Any]:
    """Return the camera and vector columns that were chosen, for the spec's `environment`."""
    return {"camera": camera, "vector": [[name, size] for name, size in vector.items()]}


def spec_values(spec: DatasetSpec) -> dict[str, Any]:
    """Return a spec as the JSON values that worldloom stores in the files it writes."""
    return {"spec": json.loads(spec.to_json())}


def spec_in(values: Mapping[str, Any]) -> DatasetSpec | None:
    """Return the spec that `spec_values` stored, or None if worldloom did not write the files."""
    return DatasetSpec.from_json(json.dumps(values["spec"])) if values else None


def with_last_action(episode: Episode) -> Float32[np.ndarray, "N A"]:
    """Return one action per frame of an episode, with a zero action for the last frame."""
    return np.concatenate([episode.actions, np.zeros_like(episode.actions[:1])])


def decoded_bytes(episode: Episode) -> int:
    """Return the size of an episode's arrays in memory."""
    arrays = [episode.pixels, episode.vector, episode.actions, *episode.labels.values()]
    return sum(array.nbytes for array in arrays if array is not None)


def flat(column: np.ndarray) -> Float32[np.ndarray, "N n"]:
    """Flatten a column (N, ...) to float32 (N, n)."""
    return np.asarray(two_axes(column), np.float32)


def two_axes(column: np.ndarray) -> Shaped[np.ndarray, "N n"]:
    """Flatten a column (N, ...) to (N, n); N may be 0."""
    return column.reshape(len(column), int(np.prod(column.shape[1:])))


def _short(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:8])
    return f"({shown})" if len(values) <= 8 else f"({shown}, ... {len(values)} values)"
