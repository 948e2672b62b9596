"""robomimic's HDF5 layout: data/demo_K with actions, obs/KEY and next_obs/KEY, and masks with lists of demos."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.core.errors import DataError
from worldloom.core.types import Episode
from worldloom.data import metadata_json
from worldloom.formats.format import Contents, action_range, add_format, chosen, natural, spec_in, spec_values
from worldloom.formats.hdf5 import (
    OWN,
    Hdf5Source,
    PartsSink,
    hdf5_errors,
    is_hdf5,
    json_or_text,
    opened_hdf5,
    own_attribute,
    own_metadata,
    width,
)

_UNIT = 1.0 + 1e-6  # robomimic expects actions in [-1, 1]


class RobomimicSource(Hdf5Source):
    """A source that reads a robomimic file, in the order of demo numbers; `next_obs`, if present, adds a last frame."""

    format = "robomimic"

    def describe_file(self) -> None:
        """Choose the columns from the first demo."""
        data = self.file["data"]
        self._demos = sorted(data, key=natural)
        self._masks: dict[str, list[str]] = {}
        for name, members in self.file.get("mask", {}).items():
            for demo in members[()]:
                self._masks.setdefault(demo.decode() if isinstance(demo, bytes) else str(demo), []).append(name)
        if not self._demos:
            raise DataError(f"{self.path} has no demos; expected the groups data/demo_0 and so on. Check the file")
        first = data[self._demos[0]]
        if "actions" not in first or "obs" not in first:
            there = ", ".join(first) or "nothing"
            raise DataError(
                f"{self.path}: {first.name} has {there}; expected 'actions' and a group 'obs'. Check the file"
            )
        own = spec_in(own_attribute(data))
        observed = first["obs"]
        pictures, cameras = self.pictures_among(
            {key: (column.shape[1:], column.dtype) for key, column in observed.items()}
        )
        numeric = [
            key for key, column in observed.items() if key not in pictures and _is_table(column.shape, column.dtype)
        ]
        self._own = own is not None
        self._camera, self._vector = self.choose_camera(cameras), self.choose_vector(numeric)
        left = sorted({*observed} - {*self._vector, self._camera})
        self.note_left_out("observations", left, "not chosen, or not numeric")
        self._closing = "next_obs" in first
        if not self._closing:
            self.note(
                "info",
                f"{self.path} has no next_obs: the last action of each demo has no following frame and is left out.",
            )
        if "rewards" in first and own is None:
            self.note(
                "dropped", f"{self.path}: rewards and dones are left out, because worldloom learns without rewards."
            )
        self._labels = sorted(first["labels"]) if own and "labels" in first else []
        if own is None and "states" in first:
            if self._closing:
                what = f"{self.path}: 'states' is left out, because it has no row for the frame that next_obs adds."
                self.note("dropped", what)
            else:
                self._labels = ["states"]
        action = first["actions"]
        if action.ndim != 2 or action.dtype.kind not in "fiub":
            raise DataError(
                f"{self.path}: {action.name} is {action.dtype} of shape {action.shape}; expected numbers of shape "
                f"(T, A). Check the file"
            )
        size = int(action.shape[1])
        found = action_range(self.actions(), size) if own is None else None
        unit = found is not None and bool(np.all(np.abs(found) <= _UNIT))
        layout = None
        if self._camera is not None:
            images = observed[self._camera]
            layout = self.lay_out(
                images.shape[1:],
                images.dtype,
                f"{self.path}: obs/{self._camera}",
                own=own is not None,
                sample=images[:8],
            )
        vector = {name: width(observed[name]) for name in self._vector}
        environment = chosen(self._camera, vector)
        if "env_args" in data.attrs:
            environment["env_args"] = json_or_text(data.attrs["env_args"])
        self.describe(
            Contents(
                files=[self.path],
                action=size,
                bounds=([-1.0] * size, [1.0] * size) if unit else None,
                range=found,
                pixels=None if layout is None else layout.pixels,
                vector=vector,
                labels={name: width(first["labels"][name] if own else first[name]) for name in self._labels},
                environment=environment,
                own=own,
            )
        )

    def actions(self) -> Iterator[np.ndarray]:
        """Yield the actions of each demo with numeric actions."""
        for demo in self._demos:
            column = self.file["data"][demo].get("actions")
            if column is not None and column.dtype.kind in "fiub":
                yield column[()]

    def __len__(self) -> int:
        return len(self._demos)

    def read(self, index: int) -> list[Episode]:
        """Return a demo."""
        demo = self._demos[index]
        where = f"{self.path}: data/{demo}"
        with hdf5_errors(self.path):
            group = self.file["data"][demo]
            wanted = [name for name in (self._camera, *self._vector) if name is not None]
            for name in ("actions", *(f"obs/{name}" for name in wanted)):
                if name not in group:
                    raise DataError(
                        f"{where} has no {name}, unlike the first demo. Restore the file, or leave the demo out"
                    )
            actions = np.asarray(group["actions"][()])
            if actions.ndim != 2 or actions.dtype.kind not in "fiub" or actions.shape[1] != self.spec.action.size:
                size = self.spec.action.size
                raise DataError(
                    f"{where}/actions is {actions.dtype} of shape {actions.shape}; expected (T, {size}). Restore the "
                    f"file from a copy"
                )
            if self._closing != ("next_obs" in group):
                raise DataError(
                    f"{where} has {'no ' if self._closing else ''}next_obs, unlike the first demo; convert demos with "
                    f"and without next_obs separately"
                )
            columns = {name: self._column(group, name, len(actions), where) for name in wanted}
            labels = {name: (group["labels"] if self._own else group)[name][()] for name in self._labels}
            stated = group.attrs.get("num_samples")
            if stated is not None and int(stated) != len(actions):
                raise DataError(
                    f"{where} has {len(actions)} actions but num_samples {int(stated)}; restore the file from a copy"
                )
            metadata = self._metadata(group, demo)
        return self.episode(
            index,
            where,
            pixels=None if self._camera is None else self.to_pixels(columns[self._camera], where, index),
            columns=columns,
            actions=actions.astype(np.float32)[: None if self._closing else -1],
            labels=labels,
            metadata=metadata,
        )

    def _column(self, group: Any, name: str, steps: int, where: str) -> np.ndarray:
        column = np.asarray(group["obs"][name][()])
        if len(column) != steps:
            raise DataError(
                f"{where}/obs/{name} has {len(column)} rows for {steps} actions; restore the file from a copy"
            )
        if self._closing:
            if name not in group["next_obs"] or len(group["next_obs"][name]) != steps:
                raise DataError(
                    f"{where}/next_obs/{name} is missing, or does not have {steps} rows; restore the file from a copy"
                )
            column = np.concatenate([column, np.asarray(group["next_obs"][name][-1:])])
        return column

    def _metadata(self, group: Any, demo: str) -> dict[str, Any]:
        own = group.get(OWN)
        if own is not None:
            return own_metadata(own)
        metadata: dict[str, Any] = {"demo": demo}
        attributes = {name: json_or_text(value) for name, value in group.attrs.items() if name != "num_samples"}
        if attributes:
            metadata["attributes"] = attributes
        if demo in self._masks:
            metadata["masks"] = sorted(self._masks[demo])
        return metadata


class RobomimicSink(PartsSink):
    """A sink that writes obs and next_obs with keys `image` and `vector`, and extra entries for labels and metadata.

    For robomimic's loaders, rewards are zeros, and dones are zeros with a final one.
    """

    layout = "robomimic's layout"

    def assemble(self, file: Any, episodes: Iterator[Episode]) -> None:
        """Write one group per demo."""
        data = file.create_group("data")
        masks: dict[str, list[str]] = {}
        total = 0
        for number, episode in enumerate(episodes):
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
        data.attrs[OWN] = json.dumps(spec_values(self.spec))
        for name, members in masks.items():
            file[f"mask/{name}"] = np.array(members, dtype="S")


def _detects(path: Path) -> bool:
    """Return whether the file has a group `data` with demos."""
    if not is_hdf5(path):
        return False
    with opened_hdf5(path) as file:
        return "data" in file and any("actions" in demo for demo in list(file["data"].values())[:1])


def _is_table(shape: tuple[int, ...], dtype: Any) -> bool:
    return 1 <= len(shape) <= 3 and dtype.kind in "fiub" and int(np.prod(shape[1:])) <= 4096


def _strings(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


add_format(RobomimicSource, RobomimicSink, _detects, "an HDF5 file of robomimic: data/demo_K with actions and obs/KEY")
