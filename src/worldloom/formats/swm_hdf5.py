"""stable-worldmodel's HDF5 layout: flat columns, a row a frame, with `ep_len` and `ep_offset`.

Row t holds what is observed at t and the action that leaves it, as that library's collection writes them; the action
of an episode's last row leads to no frame (there it holds the first action again, or NaN).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.core.errors import DataError
from worldloom.core.types import Episode, ObservationSpec
from worldloom.data import DatasetSpec, metadata_json
from worldloom.formats.format import (
    FORMATS,
    NO_CAMERA,
    Format,
    Note,
    ReadOptions,
    Sink,
    Source,
    WriteOptions,
    build_episode,
    choose_bounds,
    choose_camera,
    choose_vector,
    concatenate,
    digest_files,
    flat,
    refuse,
    resize,
)
from worldloom.formats.hdf5 import PartsSink, h5py, hdf5_errors, is_hdf5, is_image, own_attribute

LENGTH, OFFSET, ACTION, PIXELS, VECTOR = "ep_len", "ep_offset", "action", "pixels", "observation"
METADATA = "worldloom_metadata"  # a column of text: JSON in the first row of an episode
OBSERVED = ("observation", "proprio")  # columns that an agent sees; the others are what a simulator knows
REWARDS = ("reward", "terminated", "truncated", "done", "success")
COUNTERS = ("ep_idx", "episode_idx", "step_idx")
_MOST = 256  # values of a label


def roles(columns: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> tuple[list[str], list[str], list[str]]:
    """Return which columns, by name, shape (N, ...) and dtype, are observations, labels, and neither.

    `observation` and `proprio` are observations; without them, and without pictures, `state` is. Rewards and
    counters are neither.
    """
    numeric = [
        name
        for name, (shape, dtype) in columns.items()
        if dtype.kind in "fiub"
        and name not in (ACTION, LENGTH, OFFSET, *REWARDS, *COUNTERS)
        and int(np.prod(shape[1:])) <= _MOST
        and not is_image(shape, dtype)
    ]
    observed = [name for name in OBSERVED if name in numeric]
    if not observed and not any(is_image(*column) for column in columns.values()):
        observed = ["state"] if "state" in numeric else numeric
    labels = [name for name in sorted(numeric) if name not in observed]
    return observed, labels, sorted(set(columns) - {*observed, *labels})


class SwmSource(Source):
    """One HDF5 file; `keys` by stable-worldmodel's names."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        refuse(
            options,
            ["rate", "actions", "gap", "columns"],
            "stable-worldmodel's layout has no timestamps and fixed names",
        )
        self.path, self.options, self.notes = _file(path), options, []
        with hdf5_errors(self.path):
            self._file = h5py().File(self.path, "r")
        try:
            with hdf5_errors(self.path):
                self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        file, where = self._file, str(self.path)
        for name in (LENGTH, OFFSET, ACTION):
            if name not in file:
                raise DataError(f"{where} has no column {name!r}; it holds {', '.join(file) or 'nothing'}")
        self._lengths = np.asarray(file[LENGTH][()], np.int64)
        self._offsets = np.asarray(file[OFFSET][()], np.int64)
        if len(self._lengths) != len(self._offsets):
            raise DataError(f"{where} has {len(self._lengths)} lengths and {len(self._offsets)} offsets; it is damaged")
        own = own_attribute(file)
        columns = {
            name: (column.shape, column.dtype)
            for name, column in file.items()
            if name not in (LENGTH, OFFSET, METADATA)
        }
        rows = int((self._lengths + self._offsets).max(initial=0))
        for name, (shape, _) in columns.items():
            if len(shape) == 0 or shape[0] < rows:
                raise DataError(
                    f"{where}: column {name!r} has shape {shape} and the episodes need {rows} rows; it is cut"
                )
        self._text = [name for name, (_, dtype) in columns.items() if dtype.kind in "OSU"]
        cameras = [name for name, column in columns.items() if is_image(*column)]
        if own and not own["spec"]["observation"]["pixels"]:
            cameras = []
        self._camera = choose_camera(cameras, self.options, where)
        observed, labels, left = roles({name: columns[name] for name in columns if name not in self._text})
        if own:
            observed = [VECTOR] if own["spec"]["observation"]["vector"] else []
            labels = list(own["spec"]["labels"])
            left = []
        every = [*observed, *labels]
        if self._camera is None and self.options.vector is None and not observed:
            observed = ["state"] if "state" in labels else labels
        self._vector = choose_vector(every if self.options.vector is not None else observed, self.options, where)
        self._labels = [name for name in every if name not in self._vector]
        self._describe_left(left, cameras)
        action = file[ACTION]
        if action.ndim > 2 or action.dtype.kind not in "fiub":
            raise DataError(f"{where}: action is {action.dtype} of shape {action.shape}; expected numbers (N, A)")
        width = 1 if action.ndim == 1 else int(action.shape[1])
        self._own = DatasetSpec.from_json(json.dumps(own["spec"])) if own else None
        bounds, notes = choose_bounds(
            self.options,
            width,
            known=None if self._own is None else (self._own.action.low, self._own.action.high),
            range_of_data=None if self._own is not None else self._range(width),
            where=where,
            discrete=self._own is not None and self._own.action.discrete,
        )
        self.notes += notes
        environment: dict[str, Any] = {"format": "swm-hdf5", "source": self.path.name, "camera": self._camera}
        environment["vector"] = [[name, _width(file[name])] for name in self._vector]
        if self._own is not None:
            environment = {**self._own.environment, "format": "swm-hdf5", "source": self.path.name}
        shape = None if self._camera is None else file[self._camera].shape[1:]
        if shape is not None and self.options.size is not None:
            shape = (*self.options.size, shape[2])
        self.spec = DatasetSpec(
            observation=ObservationSpec(pixels=shape, vector=sum(_width(file[name]) for name in self._vector)),
            action=bounds,
            labels={name: _width(file[name]) for name in self._labels},
            environment=environment,
        )
        self.fingerprint = digest_files([self.path], self.path)

    def _describe_left(self, left: list[str], cameras: list[str]) -> None:
        where = str(self.path)
        rewards = [name for name in left if name in REWARDS]
        others = [name for name in left if name not in (ACTION, self._camera, *REWARDS, *COUNTERS)]
        if self.options.camera == NO_CAMERA:
            others = sorted({*others, *cameras})
        if rewards:
            what = f"{where}: {', '.join(rewards)} are left out; worldloom learns without rewards."
            self.notes.append(Note(kind="dropped", what=what))
        if others:
            names = ", ".join(others)
            what = f"{where}: the columns {names} are left out (not chosen, not numeric or over {_MOST} values)."
            self.notes.append(Note(kind="dropped", what=what))
        if not own_attribute(self._file):
            what = f"{where}: the last action of each episode leads to no frame and is left out."
            self.notes.append(Note(kind="info", what=what))

    def _range(self, width: int) -> tuple[list[float], list[float]] | None:
        low, high = np.full(width, np.inf), np.full(width, -np.inf)
        for offset, length in zip(self._offsets, self._lengths, strict=True):
            taken = np.asarray(self._file[ACTION][offset : offset + length - 1], np.float64).reshape(-1, width)
            if len(taken):
                taken = np.where(np.isfinite(taken), taken, np.nan)
                low, high = np.fmin(low, np.fmin.reduce(taken)), np.fmax(high, np.fmax.reduce(taken))
        return (low.tolist(), high.tolist()) if np.isfinite([low, high]).all() else None

    def __len__(self) -> int:
        return len(self._lengths)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, index: int) -> list[Episode]:
        """Return an episode."""
        first, length = int(self._offsets[index]), int(self._lengths[index])
        rows = slice(first, first + length)
        where = f"{self.path}: episode {index}"
        with hdf5_errors(self.path):
            columns = {name: np.asarray(self._file[name][rows]) for name in (*self._vector, *self._labels)}
            pixels = None if self._camera is None else resize(self._file[self._camera][rows], self.options.size)
            actions = flat(self._file[ACTION][rows])
            metadata: dict[str, Any] = {"index": index}
            if METADATA in self._file and length:
                metadata = json.loads(self._file[METADATA].asstr()[first] or "{}")
            elif length:
                metadata |= {name: str(self._file[name].asstr()[first]) for name in self._text}
        return build_episode(
            self.notes,
            index,
            where,
            pixels=pixels,
            vector=concatenate(columns, self._vector),
            actions=actions[:-1],
            labels={name: flat(columns[name]) for name in self._labels},
            metadata=metadata,
        )


class SwmSink(PartsSink):
    """Writes `pixels`, `observation`, `action` and our labels by their names; zeros stand for the last action."""

    def __init__(self, path: Path, spec: DatasetSpec, *, resume: bool) -> None:
        taken = {LENGTH, OFFSET, ACTION, PIXELS, VECTOR, METADATA, *REWARDS, *COUNTERS}
        for name in spec.labels:
            if name in taken or "/" in name:
                raise DataError(f"label {name!r} has a name that stable-worldmodel's layout uses; rename it")
        super().__init__(path, spec, resume=resume)

    def assemble(self, file: Any, episodes: int) -> None:
        """Write the columns, an episode at a time, with a chunk a row as that library does."""
        lengths: list[int] = []
        for number in range(episodes):
            episode = self.load(number)
            rows = episode.steps + 1
            columns = {
                PIXELS: episode.pixels,
                VECTOR: episode.vector,
                ACTION: np.concatenate([episode.actions, np.zeros_like(episode.actions[:1])]),
                **episode.labels,
            }
            for name, column in columns.items():
                if column is not None:
                    self._extend(file, name, column)
            if METADATA not in file:
                text = h5py().string_dtype()
                file.create_dataset(METADATA, shape=(0,), maxshape=(None,), chunks=(256,), dtype=text)
            self._extend(file, METADATA, np.array([metadata_json(episode.metadata), *[""] * (rows - 1)], object))
            lengths.append(rows)
        file[LENGTH] = np.array(lengths, np.int32)
        file[OFFSET] = np.cumsum([0, *lengths[:-1]]).astype(np.int64)[: len(lengths)]
        if ACTION not in file:
            file[ACTION] = np.zeros((0, self.spec.action.size), np.float32)

    def _extend(self, file: Any, name: str, column: np.ndarray) -> None:
        if name not in file:
            shape = column.shape[1:]
            file.create_dataset(
                name, shape=(0, *shape), maxshape=(None, *shape), chunks=(1, *shape), dtype=column.dtype
            )
        there = file[name].shape[0]
        file[name].resize(there + len(column), axis=0)
        file[name][there:] = column


class SwmHdf5(Format):
    """stable-worldmodel's HDF5 files, or a directory with one such file."""

    name = "swm-hdf5"
    description = "an HDF5 file of stable-worldmodel (or a directory with one): columns with ep_len and ep_offset"

    def detects(self, path: Path) -> bool:
        """Look for `ep_len` and `ep_offset`."""
        files = _files(path)
        if len(files) != 1 or not is_hdf5(files[0]):
            return False
        with hdf5_errors(files[0]), h5py().File(files[0], "r") as file:
            return LENGTH in file and OFFSET in file

    def open(self, path: Path, options: ReadOptions) -> Source:
        """Open a file."""
        return SwmSource(path, options)

    def create(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> Sink:
        """Begin or go on with a file."""
        return SwmSink(path, spec, resume=resume)


def _file(path: Path) -> Path:
    files = _files(path)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{path} holds these HDF5 files: {names}; expected one. Name the file itself")
    return files[0]


def _files(path: Path) -> list[Path]:
    return [path] if not path.is_dir() else sorted([*path.glob("*.h5"), *path.glob("*.hdf5")])


def _width(column: Any) -> int:
    return int(np.prod(column.shape[1:]))


FORMATS.register(SwmHdf5.name)(SwmHdf5())
