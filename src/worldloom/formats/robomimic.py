"""robomimic's HDF5 layout: data/demo_K with actions, obs/KEY and next_obs/KEY, and masks that name demos."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.core.errors import DataError
from worldloom.core.types import Episode, ObservationSpec
from worldloom.data import DatasetSpec, metadata_json
from worldloom.formats.format import (
    FORMATS,
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
    natural,
    refuse,
    resize,
)
from worldloom.formats.hdf5 import OWN, PartsSink, h5py, hdf5_errors, is_hdf5, is_image, own_attribute

_UNIT = 1.0 + 1e-6  # robomimic asks for actions in [-1, 1]


class RobomimicSource(Source):
    """Demos in numeric order; `next_obs`, where it is there, gives the frame that closes an episode."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        refuse(options, ["rate", "actions", "gap", "columns"], "robomimic's layout has no timestamps and fixed names")
        self.path, self.options, self.notes = path, options, []
        with hdf5_errors(path):
            self._file = h5py().File(path, "r")
        try:
            with hdf5_errors(path):
                self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        data = self._file["data"]
        self._demos = sorted(data, key=natural)
        self._masks: dict[str, list[str]] = {}
        for name, members in self._file.get("mask", {}).items():
            for demo in members[()]:
                self._masks.setdefault(demo.decode() if isinstance(demo, bytes) else str(demo), []).append(name)
        if not self._demos:
            raise DataError(f"{self.path} holds no demo under 'data'; expected data/demo_0 and so on")
        first = data[self._demos[0]]
        if "actions" not in first or "obs" not in first:
            there = ", ".join(first) or "nothing"
            raise DataError(f"{self.path}: {first.name} holds {there}; expected 'actions' and a group 'obs'")
        own = own_attribute(data)
        cameras = sorted(key for key, column in first["obs"].items() if is_image(column.shape, column.dtype))
        numeric = [
            key for key, column in first["obs"].items() if key not in cameras and _is_table(column.shape, column.dtype)
        ]
        where = str(self.path)
        self._camera = choose_camera(cameras, self.options, where)
        self._vector = choose_vector(numeric, self.options, where)
        left = sorted({*first["obs"]} - {*self._vector, self._camera})
        if left:
            what = f"{where}: the observations {', '.join(left)} are left out (not chosen, or not numeric)."
            self.notes.append(Note(kind="dropped", what=what))
        self._closing = "next_obs" in first
        if not self._closing:
            what = f"{where} has no next_obs: the last action of each demo leads to no frame and is left out."
            self.notes.append(Note(kind="info", what=what))
        if "rewards" in first and not own:
            what = f"{where}: rewards and dones are left out; worldloom learns without them."
            self.notes.append(Note(kind="dropped", what=what))
        self._labels = sorted(first["labels"]) if own and "labels" in first else []
        if not own and "states" in first:
            if self._closing:
                what = f"{where}: 'states' is left out; it has no row for the frame that next_obs adds."
                self.notes.append(Note(kind="dropped", what=what))
            else:
                self._labels = ["states"]
        environment: dict[str, Any] = {"format": "robomimic", "source": self.path.name, "camera": self._camera}
        environment["vector"] = [[name, int(np.prod(first["obs"][name].shape[1:]))] for name in self._vector]
        if "env_args" in data.attrs:
            environment["env_args"] = _json_or_text(data.attrs["env_args"])
        self._own = DatasetSpec.from_json(json.dumps(own["spec"])) if own else None
        shape = None if self._camera is None else first["obs"][self._camera].shape[1:]
        if shape is not None and self.options.size is not None:
            shape = (*self.options.size, shape[2])
        vector = sum(size for _, size in environment["vector"])
        action = first["actions"]
        if action.ndim != 2 or action.dtype.kind not in "fiub":
            raise DataError(
                f"{self.path}: {action.name} is {action.dtype} of shape {action.shape}; expected numbers (T, A)"
            )
        found = self._range(action.shape[1])
        known: tuple[Sequence[float], Sequence[float]] | None = None
        if self._own is not None:
            known = (self._own.action.low, self._own.action.high)
        elif found is not None and np.all(np.abs(found) <= _UNIT):
            known = ([-1.0] * action.shape[1], [1.0] * action.shape[1])
        bounds, notes = choose_bounds(
            self.options,
            action.shape[1],
            known=known,
            range_of_data=found,
            where=where,
            discrete=self._own is not None and self._own.action.discrete,
        )
        self.notes += notes
        if self._own is not None:
            environment = {**self._own.environment, "format": "robomimic", "source": self.path.name}
        self.spec = DatasetSpec(
            observation=ObservationSpec(pixels=shape, vector=vector),
            action=bounds,
            labels={name: _width(first["labels"][name] if own else first[name]) for name in self._labels},
            environment=environment,
        )
        self.fingerprint = digest_files([self.path], self.path)

    def _range(self, width: int) -> tuple[list[float], list[float]] | None:
        low, high = np.full(width, np.inf), np.full(width, -np.inf)
        for demo in self._demos:
            column = self._file["data"][demo].get("actions")
            if column is None or column.dtype.kind not in "fiub" or column.shape[1:] != (width,) or not len(column):
                continue  # named when it is read
            actions = np.asarray(column[()], np.float64)
            actions = np.where(np.isfinite(actions), actions, np.nan)
            low, high = np.fmin(low, np.fmin.reduce(actions)), np.fmax(high, np.fmax.reduce(actions))
        return (low.tolist(), high.tolist()) if np.isfinite([low, high]).all() else None

    def __len__(self) -> int:
        return len(self._demos)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, index: int) -> list[Episode]:
        """Return a demo."""
        demo = self._demos[index]
        where = f"{self.path}: data/{demo}"
        with hdf5_errors(self.path):
            group = self._file["data"][demo]
            wanted = [name for name in (self._camera, *self._vector) if name is not None]
            for name in ("actions", *(f"obs/{name}" for name in wanted)):
                if name not in group:
                    raise DataError(
                        f"{where} has no {name}, which the first demo has; restore it, or leave the demo out"
                    )
            actions = np.asarray(group["actions"][()])
            if actions.ndim != 2 or actions.dtype.kind not in "fiub" or actions.shape[1] != self.spec.action.size:
                size = self.spec.action.size
                raise DataError(f"{where}/actions is {actions.dtype} of shape {actions.shape}; expected (T, {size})")
            if self._closing != ("next_obs" in group):
                raise DataError(f"{where} differs from the first demo in having next_obs or not; convert them apart")
            columns = {name: self._column(group, name, len(actions), where) for name in wanted}
            labels = {name: flat((group["labels"] if self._own else group)[name][()]) for name in self._labels}
            stated = group.attrs.get("num_samples")
            if stated is not None and int(stated) != len(actions):
                raise DataError(
                    f"{where} states num_samples {int(stated)} and holds {len(actions)} actions; it is damaged"
                )
            metadata = self._metadata(group, demo)
        return build_episode(
            self.notes,
            index,
            where,
            pixels=None if self._camera is None else resize(columns[self._camera], self.options.size),
            vector=concatenate(columns, self._vector),
            actions=actions.astype(np.float32)[: None if self._closing else -1],
            labels=labels,
            metadata=metadata,
        )

    def _column(self, group: Any, name: str, steps: int, where: str) -> np.ndarray:
        column = np.asarray(group["obs"][name][()])
        if len(column) != steps:
            raise DataError(f"{where}/obs/{name} has {len(column)} rows and there are {steps} actions; it is damaged")
        if self._closing:
            if name not in group["next_obs"] or len(group["next_obs"][name]) != steps:
                raise DataError(f"{where}/next_obs has no {steps} rows of {name}; it is damaged")
            column = np.concatenate([column, np.asarray(group["next_obs"][name][-1:])])
        return column

    def _metadata(self, group: Any, demo: str) -> dict[str, Any]:
        own = group.get(OWN)
        if own is not None:
            values: dict[str, Any] = json.loads(own.asstr()[()])
            return values
        metadata: dict[str, Any] = {"demo": demo}
        attributes = {name: _json_or_text(value) for name, value in group.attrs.items() if name != "num_samples"}
        if attributes:
            metadata["attributes"] = attributes
        if demo in self._masks:
            metadata["masks"] = sorted(self._masks[demo])
        return metadata


class RobomimicSink(PartsSink):
    """Writes obs and next_obs with keys `image` and `vector`, and our labels and metadata as extra entries.

    Rewards and dones, which robomimic's loaders ask for, are zeros, and a one at the end of `dones`.
    """

    def assemble(self, file: Any, episodes: int) -> None:
        """Write the demos."""
        data = file.create_group("data")
        masks: dict[str, list[str]] = {}
        total = 0
        for number in range(episodes):
            episode = self.load(number)
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = episode.steps
            total += episode.steps
            demo["actions"] = episode.actions
            demo["rewards"] = np.zeros(episode.steps, np.float32)
            demo["dones"] = (np.arange(episode.steps) == episode.steps - 1).astype(np.int64)
            for name, column in (("image", episode.pixels), ("vector", episode.vector)):
                if column is not None:
                    demo[f"obs/{name}"], demo[f"next_obs/{name}"] = column[:-1], column[1:]
            for name, column in episode.labels.items():
                demo[f"labels/{name}"] = column
            demo[OWN] = metadata_json(episode.metadata)
            for name in _strings(episode.metadata.get("masks")):
                masks.setdefault(name, []).append(f"demo_{number}")
        data.attrs["total"] = total
        environment = self.spec.environment
        env_args = environment.get("env_args", {"env_name": environment.get("id", ""), "type": 2, "env_kwargs": {}})
        data.attrs["env_args"] = json.dumps(env_args)
        data.attrs[OWN] = json.dumps({"spec": json.loads(self.spec.to_json())})
        for name, members in masks.items():
            file[f"mask/{name}"] = np.array(members, dtype="S")


class Robomimic(Format):
    """robomimic's HDF5 files."""

    name = "robomimic"
    description = "an HDF5 file of robomimic: data/demo_K with actions and obs/KEY"

    def detects(self, path: Path) -> bool:
        """Look for a group `data` with demos."""
        if not is_hdf5(path):
            return False
        with hdf5_errors(path), h5py().File(path, "r") as file:
            return "data" in file and any("actions" in demo for demo in list(file["data"].values())[:1])

    def open(self, path: Path, options: ReadOptions) -> Source:
        """Open a file."""
        return RobomimicSource(path, options)

    def create(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> Sink:
        """Begin or go on with a file."""
        return RobomimicSink(path, spec, resume=resume)


def _is_table(shape: tuple[int, ...], dtype: Any) -> bool:
    return 1 <= len(shape) <= 3 and dtype.kind in "fiub" and int(np.prod(shape[1:])) <= 4096


def _width(column: Any) -> int:
    return int(np.prod(column.shape[1:]))


def _json_or_text(value: Any) -> Any:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _strings(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


FORMATS.register(Robomimic.name)(Robomimic())
