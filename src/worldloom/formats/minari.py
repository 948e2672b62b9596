"""Minari datasets in HDF5: `data/metadata.json` with the spaces, `data/main_data.hdf5` with one group per episode.

An episode has T + 1 observations and T actions, as in worldloom. Dictionaries and tuples of observations are groups;
pictures are raw bytes or JPEG.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import read_json, write_json
from worldloom.core.picture_layout import PictureLayout
from worldloom.core.types import MOST_ACTION_VALUES, Episode
from worldloom.data import decode_picture, metadata_json, room_for
from worldloom.formats.format import Bounds, Contents, add_format, chosen, flat, natural, spec_in, two_axes
from worldloom.formats.hdf5 import (
    OWN,
    Hdf5Source,
    PartsSink,
    attributes,
    group_names,
    h5py,
    hdf5_errors,
    json_or_text,
    opened_hdf5,
    own_attribute,
    own_metadata,
    whole_number,
)

METADATA, MAIN = "metadata.json", "main_data.hdf5"
VERSION = "0.5.4"  # the Minari version whose layout is written
_ALONE = "observation"  # the name of an observation that is not a dictionary
SCORES = "scores"  # worldloom's scores of discrete actions, if they are not one-hot
_MOST = 4096  # maximum number of values of an observation that is not a picture


class MinariSource(Hdf5Source):
    """A source that reads a Minari dataset, in the order of episode numbers.

    `Discrete` values become one-hot; values that are not numeric are left out, with a note.
    """

    format = "minari"
    roles = ("observation", "label", "camera")
    reason = "the metadata state the space of the actions, and the layout has no timestamps"

    def locate(self, path: Path) -> Path:
        """Return the directory of the two files, and read the metadata."""
        directory = _data(path)
        self._metadata = _read_metadata(directory)
        return directory

    @property
    def main(self) -> Path:
        """The HDF5 file."""
        return self.path / MAIN

    def describe_file(self) -> None:
        """Choose the observations from the spaces in the metadata."""
        where = self.path
        self._episodes = sorted((name for name in group_names(self.file) if name.startswith("episode_")), key=natural)
        stated = self._metadata.get("total_episodes")
        if not self._episodes:
            raise DataError(f"{self.main} has no episodes; expected at least one. Restore the file from a copy")
        if stated is not None and stated != len(self._episodes):
            raise DataError(
                f"{self.main} has {len(self._episodes)} episodes; expected {stated}, the total_episodes in {METADATA}. "
                f"Restore both files from a copy"
            )
        first = self.file[self._episodes[0]]
        self._compare_counts()
        own = spec_in(own_attribute(self.file))
        found = {name or _ALONE: (place, space) for name, place, space in _leaves(self._space("observation_space"))}
        self._own = own
        self._leaves = {name: space for name, (_, space) in found.items()}
        self._places = {name: place for name, (place, _) in found.items()}
        boxes = {name: space for name, space in self._leaves.items() if space.get("type") == "Box"}
        pictures, cameras = self.pictures_among(
            {name: (space["shape"], space["dtype"]) for name, space in boxes.items()},
            others=any(_size(space) for name, space in self._leaves.items() if name not in boxes),
        )
        sizes = {name: _size(space) for name, space in self._leaves.items()}
        numeric = [name for name, size in sizes.items() if name not in pictures and size]
        named = self.choose_labels([], numeric)
        self._camera = self.choose_camera(cameras)
        self._vector = self.choose_vector([name for name in numeric if name not in named], named)
        labels = {name: sizes[name] for name in named} if own is None else own.labels
        left = sorted({*sizes} - {*self._vector, *named, self._camera})
        self.note_left_out("observations", left, "not chosen, or not numeric")
        if own is None:
            names = [name for name in ("rewards", "terminations", "truncations", "infos") if name in first]
            self.note_left_out("columns", names, "worldloom learns without rewards")
        pixels: tuple[int, int, int] | None = None
        self._jpeg = False
        if self._camera is not None:
            space = self._leaves[self._camera]
            shape = space["shape"]
            # Some versions do not record the encoding; raw pictures have one axis more than their space (time).
            stored = first.get(self._places[self._camera])
            self._jpeg = isinstance(stored, h5py().Dataset) and len(stored.shape or ()) <= len(shape)
            if self._jpeg:
                self.picture_values(f"{where}: {self._camera}")
                self._layout = PictureLayout(shape=(*shape, 1)[:3], axes="hwc")
            else:
                what = f"{where}: observation {self._camera!r}"
                self.lay_out(shape, space["dtype"], what, own=own is not None, stated=_stated(space))
            assert self._layout is not None
            pixels = self._layout.pixels
        if self._jpeg:
            self.note(
                "info",
                f"{where}: the pictures were stored as JPEG, so they differ slightly from the rendered frames.",
            )
        self._action = self._space("action_space")
        size = _size(self._action)
        if size > MOST_ACTION_VALUES:
            raise DataError(
                f"{where}: an action has {size:,} values; at most {MOST_ACTION_VALUES:,} are supported. Record actions "
                f"with fewer values"
            )
        if size == 0 or self._action["type"] not in ("Box", "Discrete"):
            raise DataError(
                f"{where}: the action space is {self._action.get('type')}; expected a Box or a Discrete space. Record "
                f"the dataset with flattened actions"
            )
        discrete = self._action["type"] == "Discrete"
        bounds: Bounds | None = ([0.0] * size, [1.0] * size)
        if not discrete:
            low, high = (np.asarray(self._action[side], np.float64).reshape(-1).tolist() for side in ("low", "high"))
            bounds = (low, high) if np.isfinite([low, high]).all() else None
        vector = {name: sizes[name] for name in self._vector}
        stated_too = ("dataset_id", "algorithm_name")
        environment = chosen(self._camera, vector) | {
            key: self._metadata[key] for key in stated_too if key in self._metadata
        }
        if isinstance(self._metadata.get("env_spec"), str):
            environment["env_spec"] = self._metadata["env_spec"]
        self.describe(
            Contents(
                files=[where / METADATA, self.main],
                action=size,
                discrete=discrete,
                bounds=bounds,
                pixels=pixels,
                vector=vector,
                labels=labels,
                environment=environment,
                own=own,
                source=where.parent.name,
            )
        )

    def _compare_counts(self) -> None:
        """Add notes about stated numbers of steps that differ from the actions in the file, and about repeated ids."""
        total, different, ids = 0, [], []
        for name in self._episodes:
            group = self.file[name]
            column = group.get("actions")
            steps = len(column) if isinstance(column, h5py().Dataset) and column.shape else 0
            total += steps
            if whole_number(group, "total_steps") not in (None, steps):
                different.append(name)
            ids.append(whole_number(group, "id"))
        stated = self._metadata.get("total_steps")
        if type(stated) is int and stated != total:
            self.note(
                "info", f"{self.path / METADATA} has total_steps {stated}, but the episodes have {total} actions."
            )
        if different:
            shown = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
            self.note("info", f"{self.main}: total_steps differs from the number of actions in {shown}.")
        known = [each for each in ids if each is not None]
        if len({*known}) < len(known):
            self.note("info", f"{self.main}: several episodes have the same id.")

    def _space(self, name: str) -> dict[str, Any]:
        text = self._metadata.get(name)
        space = json_or_text(text)
        if not isinstance(space, dict):
            raise DataError(
                f"{self.path / METADATA} has no {name}; worldloom does not create the environment to look it up. "
                f"Write the dataset again with minari, passing observation_space and action_space"
            )
        return space

    def actions(self) -> Iterator[np.ndarray]:
        """Yield the actions of each episode with numeric actions."""
        for name in self._episodes:
            column = self.file[name].get("actions")
            if isinstance(column, h5py().Dataset) and column.dtype.kind in "fiub" and column.shape:
                yield two_axes(column[()])

    def __len__(self) -> int:
        return len(self._episodes)

    def read(self, index: int) -> list[Episode]:
        """Return an episode."""
        name = self._episodes[index]
        where = f"{self.main}: {name}"
        with hdf5_errors(self.main):
            group = self.file[name]
            actions = self._encode(self._numbers(group, "actions", where), self._action, f"{where}/actions")
            if self._own is not None and SCORES in group:
                actions = flat(group[SCORES][()])
            steps = len(actions)
            columns = {}
            for leaf in [*self._vector, *([] if self._own else self.spec.labels)]:
                place = self._places[leaf]
                column = self._numbers(group, place, where)
                columns[leaf] = self._encode(column, self._leaves[leaf], f"{where}/{place}")
                self._check(columns[leaf], steps, f"{where}/{place}")
            pixels = None if self._camera is None else self._pictures(group, steps, where, index)
            labels = {
                key: columns[key] if self._own is None else group[f"labels/{key}"][()] for key in self.spec.labels
            }
            if self._own is not None:
                metadata = own_metadata(group[OWN])
            else:
                self.note_unwritten(group, ["actions", *(self._places[leaf] for leaf in columns)], where, index)
                metadata = {"episode": name} | {key: value for key, value in attributes(group).items() if key != "id"}
        return self.episode(
            index,
            where,
            pixels=pixels,
            columns=columns,
            actions=actions,
            labels=labels,
            metadata=metadata,
        )

    def _numbers(self, group: Any, place: str, where: str) -> np.ndarray:
        column = group.get(place)
        if not isinstance(column, h5py().Dataset) or column.dtype.kind not in "fiub":
            came = "is missing" if column is None else f"is {getattr(column, 'dtype', 'a group')}"
            raise DataError(
                f"{where}/{place} {came}; expected numbers, as in the spaces in {METADATA}. Restore both files "
                f"from a copy"
            )
        numbers: np.ndarray = column[()]
        return numbers

    def _encode(self, column: np.ndarray, space: Mapping[str, Any], where: str) -> np.ndarray:
        """Return a column as (N, size); discrete choices become one-hot."""
        width = _size(space)
        if space["type"] == "Discrete":
            start = int(space.get("start", 0))
            choices = column.reshape(-1).astype(np.int64) - start
            if len(choices) != len(column) or ((choices < 0) | (choices >= width)).any():
                raise DataError(
                    f"{where}: expected one integer from {start} to {start + width - 1} in each row, as in {METADATA}; "
                    f"got other values, or several in a row. Restore the file from a copy"
                )
            return np.eye(width, dtype=np.float32)[choices]
        if column.ndim == 0 or int(np.prod(column.shape[1:])) != width:
            raise DataError(
                f"{where} has shape {column.shape}; expected {width} values per row, as in {METADATA}. Restore "
                f"the file from a copy"
            )
        return two_axes(column)

    def _check(self, column: np.ndarray, steps: int, where: str) -> None:
        if len(column) != steps + 1:
            raise DataError(
                f"{where} has {len(column)} rows for {steps} actions; expected one action fewer than observations. "
                f"Restore the file from a copy"
            )

    def _pictures(self, group: Any, steps: int, where: str, index: int) -> np.ndarray:
        camera = str(self._camera)
        place = self._places[camera]
        assert self._layout is not None
        shape, dtype = self._layout.shape, np.uint8 if self._jpeg else self._leaves[camera]["dtype"]
        column = group[place][()] if self._jpeg else self._numbers(group, place, where)
        where = f"{where}/{place}"
        self._check(column, steps, where)
        if self._jpeg:
            stored, column = column, room_for(len(column), np.empty(shape, np.uint8), where)
            for row, content in enumerate(stored):
                picture = decode_picture(np.asarray(content, np.uint8).tobytes(), f"{where}: row {row}")
                if picture.shape != shape:
                    raise DataError(
                        f"{where}: the picture in row {row} has shape {picture.shape}; expected {shape}, as in "
                        f"{METADATA}. Restore the file from a copy"
                    )
                column[row] = picture
        if column.dtype != dtype or column.shape[1:] != shape:
            raise DataError(
                f"{where} is {column.dtype} of shape {column.shape}; expected {dtype} pictures of shape {shape}. "
                f"Restore the file from a copy"
            )
        return self.to_pixels(column, where, index)


class MinariSink(PartsSink):
    """A sink that writes `data/main_data.hdf5` and, last, `data/metadata.json`; labels and metadata are extra entries.

    Pixels and a vector become a dictionary of observations. Rewards, which Minari requires, are zeros.
    """

    layout = "Minari's layout"

    @property
    def main(self) -> Path:
        """The HDF5 file."""
        return self.path / "data" / MAIN

    def assemble(self, file: Any, episodes: Iterator[Episode]) -> None:
        """Write one group per episode."""
        both = self.spec.observation.pixels is not None and self.spec.observation.vector > 0
        for number, episode in enumerate(episodes):
            group = file.create_group(f"episode_{number}")
            group.attrs["id"], group.attrs["total_steps"] = number, episode.steps
            if isinstance(episode.metadata.get("seed"), int):
                group.attrs["seed"] = episode.metadata["seed"]
            for name, column in (("pixels", episode.pixels), ("vector", episode.vector)):
                if column is not None:
                    group.create_dataset(f"observations/{name}" if both else "observations", data=column)
            choices = episode.actions.argmax(axis=1)
            group["actions"] = choices if self.spec.action.discrete else episode.actions
            one_hot = np.eye(self.spec.action.size, dtype=np.float32)[choices]
            if self.spec.action.discrete and not np.array_equal(one_hot, episode.actions):
                group[SCORES] = episode.actions
            group["rewards"] = np.zeros(episode.steps)
            group["terminations"] = np.zeros(episode.steps, bool)
            group["truncations"] = np.arange(episode.steps) == episode.steps - 1
            for name, column in episode.labels.items():
                group[f"labels/{name}"] = column
            group[OWN] = metadata_json(episode.metadata)

    def complete(self) -> None:
        """Assemble the HDF5 file, and write the metadata."""
        super().complete()
        with opened_hdf5(self.main) as file:
            steps = [int(group.attrs["total_steps"]) for group in file.values()]
        environment = self.spec.environment
        metadata: dict[str, Any] = {
            "total_episodes": len(steps),
            "total_steps": sum(steps),
            "data_format": "hdf5",
            "jpeg_encoding": False,
            "observation_space": json.dumps(self._observation_space()),
            "action_space": json.dumps(self._action_space()),
            "dataset_id": environment.get("dataset_id", f"worldloom/{self.path.name}-v0"),
            "minari_version": VERSION,
            "dataset_size": round(self.main.stat().st_size / 1e6, 1),
            "author": [],
            "author_email": [],
            "description": "Written by worldloom; rewards are zeros, because worldloom has none.",
        }
        write_json(self.path / "data" / METADATA, metadata)

    def _observation_space(self) -> dict[str, Any]:
        parts: dict[str, dict[str, Any]] = {}
        pixels, vector = self.spec.observation.pixels, self.spec.observation.vector
        if pixels is not None:
            parts["pixels"] = _box("uint8", np.zeros(pixels, np.uint8), np.full(pixels, 255, np.uint8))
        if vector:
            limit = np.full(vector, np.inf)
            parts["vector"] = _box("float32", -limit, limit)
        return {"type": "Dict", "subspaces": parts} if len(parts) > 1 else next(iter(parts.values()))

    def _action_space(self) -> dict[str, Any]:
        action = self.spec.action
        if action.discrete:
            return {"type": "Discrete", "dtype": "int64", "start": 0, "n": action.size}
        # In single precision, like the actions, so that rounding puts no action out of bounds.
        return _box("float32", np.array(action.low, np.float32), np.array(action.high, np.float32))


def _detects(path: Path) -> bool:
    """Return whether the metadata exist and have Minari's keys."""
    data = _data(path)
    if not (data / METADATA).is_file():
        return False
    try:
        metadata = read_json(data / METADATA)
    except StorageError:
        return (data / MAIN).is_file()  # `open` reports the problem
    return isinstance(metadata, dict) and "total_episodes" in metadata and "data_format" in metadata


def _data(path: Path) -> Path:
    if path.name == MAIN:
        return path.parent
    return path / "data" if (path / "data").is_dir() else path


def _read_metadata(path: Path) -> dict[str, Any]:
    metadata = read_json(path / METADATA)
    if not isinstance(metadata, dict) or "data_format" not in metadata:
        raise DataError(f"{path / METADATA} has no data_format, so it is not Minari metadata; check the path")
    if metadata["data_format"] != "hdf5":
        raise DataError(
            f"{path} has data_format {metadata['data_format']!r}; expected 'hdf5'. Save the dataset as HDF5 with minari"
        )
    return metadata


def _leaves(
    space: Mapping[str, Any], name: str = "", place: str = "observations"
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (name, path of the column, space) for each leaf of a space, which may be nested."""
    parts: dict[str, tuple[str, Any]] = {}
    if space.get("type") == "Dict":
        parts = {key: (key, part) for key, part in space["subspaces"].items()}
    elif space.get("type") == "Tuple":
        parts = {str(index): (f"_index_{index}", part) for index, part in enumerate(space["subspaces"])}
    else:
        yield name, place, space
    for key, (where, part) in parts.items():
        yield from _leaves(part, f"{name}.{key}" if name else key, f"{place}/{where}")


def _stated(space: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the bounds of a box, if they are the same for all values."""
    low, high = (np.asarray(space[side], np.float64) for side in ("low", "high"))
    return (float(low.min()), float(high.max())) if low.min() == low.max() and high.min() == high.max() else None


def _size(space: Mapping[str, Any]) -> int:
    """Return the number of float values that represent a value of a space; 0 for unsupported spaces."""
    kind = space.get("type")
    if kind == "Box":
        size = math.prod(space["shape"])
        return size if size <= _MOST and np.dtype(space["dtype"]).kind in "fiub" else 0
    if kind == "Discrete":
        return int(space["n"])
    if kind == "MultiBinary":
        return math.prod(space["n"]) if isinstance(space["n"], list) else int(space["n"])
    return int(np.size(space["nvec"])) if kind == "MultiDiscrete" else 0


def _box(dtype: str, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    return {"type": "Box", "dtype": dtype, "shape": list(low.shape), "low": low.tolist(), "high": high.tolist()}


add_format(MinariSource, MinariSink, _detects, "a dataset of Minari: data/metadata.json and data/main_data.hdf5")
