"""robomimic's HDF5 layout: data/demo_K with actions, obs/KEY and next_obs/KEY, and masks with lists of demos."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.core.errors import DataError
from worldloom.core.types import Episode
from worldloom.data import metadata_json
from worldloom.formats.format import (
    Contents,
    action_range,
    add_format,
    chosen,
    natural,
    spec_in,
    spec_values,
    two_axes,
)
from worldloom.formats.hdf5 import (
    OWN,
    Hdf5Source,
    PartsSink,
    arrays,
    attributes,
    entry_of,
    group_names,
    h5py,
    hdf5_errors,
    is_hdf5,
    opened_hdf5,
    own_attribute,
    own_metadata,
    whole_number,
    width,
)

ACTIONS = "actions"
_UNIT = 1.0 + 1e-6  # robomimic expects actions in [-1, 1]


class RobomimicSource(Hdf5Source):
    """A source that reads a robomimic file, in the order of demo numbers; `next_obs`, if present, adds a last frame.

    Columns in `obs` are named by their path below `obs`, all other columns by their path below the demo. Columns in
    groups below `obs` (Isaac Lab) are observed by default only if `obs` has no numeric column of its own.
    """

    format = "robomimic"

    def describe_file(self) -> None:
        """Choose the columns from the first demo with actions."""
        data = entry_of(self.file, "data")
        groups = group_names(data) if isinstance(data, h5py().Group) else []
        self._demos = sorted((name for name in groups if name.startswith("demo") or ACTIONS in data[name]), key=natural)
        if not self._demos:
            raise DataError(f"{self.path} has no demos; expected the groups data/demo_0 and so on. Check the file")
        self.note_left_out("entries", sorted({*data} - {*self._demos}, key=natural), "in 'data', but not demos")
        self._masks = self._read_masks()
        first = next((data[demo] for demo in self._demos if ACTIONS in data[demo]), data[self._demos[0]])
        if ACTIONS not in first:
            there = ", ".join(first) or "nothing"
            raise DataError(f"{self.path}: {first.name} has {there}; expected 'actions' and 'obs'. Check the file")
        own = spec_in(own_attribute(data))
        self._own, self._closing = own is not None, "next_obs" in first
        columns, odd = arrays(first)
        observed = {
            place.removeprefix("obs/"): place for place in columns if place == "obs" or place.startswith("obs/")
        }
        reserved = ("obs", "next_obs", "labels") if own else ("obs", "next_obs")
        beside = {place: place for place in columns if place.partition("/")[0] not in reserved}
        tables = {place for place, column in columns.items() if _is_table(column.shape, column.dtype)}
        actions = self.choose_actions([place for place in beside if place in tables], (ACTIONS,))
        self._actions = {place: width(columns[place]) for place in actions}
        steps = len(columns[actions[0]])
        uneven = [
            name
            for name, place in observed.items()
            if not self._is_per_step(first, place, steps) and not self._is_ever_per_step(place)
        ]
        even = {name: place for name, place in observed.items() if name not in uneven}
        pictures, cameras = self.pictures_among(
            {name: (columns[place].shape[1:], columns[place].dtype) for name, place in even.items()}
        )
        numeric = [name for name, place in even.items() if name not in pictures and place in tables]
        others = [place for place in beside if place in tables and not self._closing]
        direct = [name for name in numeric if "/" not in name]
        self._camera, self._vector = (
            self.choose_camera(cameras),
            self.choose_vector(direct or numeric, [*numeric, *others]),
        )
        default = ["states"] if "states" in others else []
        labels = self.choose_labels(default, [*numeric, *others])
        self._places = {**beside, **even}
        self._label_places = {name: self._places[name] for name in labels}
        if own is not None:
            self._label_places = {name: f"labels/{name}" for name in own.labels}
        used = {*self._actions, *self._label_places.values()}
        used |= {self._places[name] for name in [self._camera, *self._vector] if name is not None}
        self._note_columns(
            [name for name, place in even.items() if place not in used],
            uneven,
            [place for place in beside if place not in used],
            odd,
            nested=not direct and bool(numeric),
            own=self._own,
        )
        size = sum(self._actions.values())
        found = action_range(self.actions(), size) if own is None else None
        unit = found is not None and bool(np.all(np.abs(found) <= _UNIT))
        layout = None
        if self._camera is not None:
            images = columns[self._places[self._camera]]
            layout = self.lay_out(
                images.shape[1:],
                images.dtype,
                f"{self.path}: obs/{self._camera}",
                own=own is not None,
                sample=images[:8],
            )
        integer = all(columns[place].dtype.kind in "iub" for place in self._actions)
        vector = {name: width(columns[self._places[name]]) for name in self._vector}
        environment = chosen(self._camera, vector)
        stated = attributes(data)
        if "env_args" in stated:
            environment["env_args"] = stated["env_args"]
        self._count_rows(stated)
        self.describe(
            Contents(
                files=[self.path],
                action=size,
                integer=integer,
                bounds=([-1.0] * size, [1.0] * size) if unit else None,
                range=found,
                pixels=None if layout is None else layout.pixels,
                vector=vector,
                labels={name: width(columns[place]) for name, place in self._label_places.items()},
                environment=environment,
                own=own,
            )
        )

    def _read_masks(self) -> dict[str, list[str]]:
        """Return the names of the masks that contain each demo."""
        masks: dict[str, list[str]] = {}
        members = entry_of(self.file, "mask")
        for name in members if isinstance(members, h5py().Group) else ():
            column = entry_of(members, name)
            if _has_rows(column) and column.ndim == 1:
                for demo in column[()]:
                    masks.setdefault(
                        demo.decode(errors="replace") if isinstance(demo, bytes) else str(demo), []
                    ).append(name)
        missing = sorted({*masks} - {*self._demos}, key=natural)
        self.note_left_out("demos", missing, "named in 'mask', but not in the file")
        return masks

    def _is_per_step(self, demo: Any, place: str, steps: int) -> bool:
        """Return whether a column of a demo has one row per action, also in next_obs if the demo has that group."""
        places = [place, place.replace("obs", "next_obs", 1)] if self._closing else [place]
        columns = [entry_of(demo, each) for each in places]
        return all(_has_rows(column) and len(column) == steps for column in columns)

    def _is_ever_per_step(self, place: str) -> bool:
        """Return whether a column has one row per action in any demo; demos in which it has not are then damaged."""
        demos = [self.file["data"][demo] for demo in self._demos]
        actions = [entry_of(demo, next(iter(self._actions))) for demo in demos]
        return any(
            _has_rows(column) and self._is_per_step(demo, place, len(column))
            for demo, column in zip(demos, actions, strict=True)
        )

    def _note_columns(
        self, observed: list[str], uneven: list[str], beside: list[str], odd: dict[str, str], *, nested: bool, own: bool
    ) -> None:
        """Add notes about the columns that are left out, and about guesses."""
        self.note_left_out("observations", sorted(observed), "not chosen, or not numeric")
        self.note_left_out("observations", sorted(uneven), "no demo has one row per action")
        for reason in sorted({*odd.values()}):
            self.note_left_out(
                "entries", sorted(name for name, why in odd.items() if why == reason and not own), reason
            )
        if nested and "observation" not in self.options.columns and self.options.vector is None:
            self.note(
                "guessed",
                f"{self.path}: the vector is taken from groups in 'obs': {', '.join(self._vector)}. Name other columns "
                f"with --columns observation=NAME,NAME.",
            )
        if not self._closing:
            self.note(
                "info",
                f"{self.path} has no next_obs: the last action of each demo has no following frame and is left out.",
            )
        if own:
            return
        if "rewards" in beside:
            self.note(
                "dropped", f"{self.path}: rewards and dones are left out, because worldloom learns without rewards."
            )
        if "states" in beside and self._closing:
            what = f"{self.path}: 'states' is left out, because it has no row for the frame that next_obs adds."
            self.note("dropped", what)
        rest = sorted({*beside} - {"rewards", "dones", *(["states"] if self._closing else [])})
        self.note_left_out("columns", rest, "outside 'obs' and not chosen")

    def _count_rows(self, stated: Mapping[str, Any]) -> None:
        """Add a note if the file states another total of rows than it has."""
        total = whole_number(self.file["data"], "total")
        place = next(iter(self._actions))
        rows = sum(len(column) for demo in self._demos if _has_rows(column := entry_of(self.file["data"][demo], place)))
        if total is not None and total != rows:
            self.note("info", f"{self.path} states a total of {total} rows, but its demos have {rows}.")

    def actions(self) -> Iterator[np.ndarray]:
        """Yield the actions of each demo with numeric actions; raise the first error if no demo has any."""
        errors: list[DataError] = []
        for demo in self._demos:
            try:
                yield self._joined_actions(self.file["data"][demo], f"{self.path}: data/{demo}")
            except DataError as error:  # `read` raises it again
                errors.append(error)
        if len(errors) == len(self._demos):
            raise errors[0]

    def __len__(self) -> int:
        return len(self._demos)

    def read(self, index: int) -> list[Episode]:
        """Return a demo."""
        demo = self._demos[index]
        where = f"{self.path}: data/{demo}"
        with hdf5_errors(self.path):
            group = self.file["data"][demo]
            if not len(group):
                self.note("skipped", f"{where} is skipped: it is an empty group.", index)
                return []
            actions = self._joined_actions(group, where)
            if self._closing != ("next_obs" in group):
                raise DataError(
                    f"{where} has {'no ' if self._closing else ''}next_obs, unlike the first demo; convert demos with "
                    f"and without next_obs separately"
                )
            steps = len(actions)
            wanted = [name for name in (self._camera, *self._vector) if name is not None]
            columns = {name: self._column(group, self._places[name], steps, where) for name in wanted}
            labels = {
                name: _rows(group, place, where) if self._own else self._column(group, place, steps, where)
                for name, place in self._label_places.items()
            }
            stated = whole_number(group, "num_samples")
            if stated is not None and stated != steps:
                raise DataError(f"{where} has {steps} actions but num_samples {stated}; restore the file from a copy")
            metadata = self._metadata(group, demo)
            used = [*self._actions, *(self._places[name] for name in wanted), *self._label_places.values()]
            self.note_unwritten(group, used, where, index)
        return self.episode(
            index,
            where,
            pixels=None if self._camera is None else self.to_pixels(columns.pop(self._camera), where, index),
            columns=columns,
            actions=self.encode(actions, where)[: None if self._closing else -1],
            labels=labels,
            metadata=metadata,
        )

    def _joined_actions(self, group: Any, where: str) -> np.ndarray:
        """Return the chosen actions of a demo as (T, A)."""
        parts: list[np.ndarray] = []
        for place, size in self._actions.items():
            column = _rows(group, place, where)
            if width(column) != size or (parts and len(column) != len(parts[0])):
                raise DataError(
                    f"{where}/{place} is {column.dtype} of shape {column.shape}; expected (T, {size}). Restore the "
                    f"file from a copy"
                )
            parts.append(two_axes(column))
        return np.concatenate(parts, axis=1)

    def _column(self, group: Any, place: str, steps: int, where: str) -> np.ndarray:
        column = _rows(group, place, where)
        if len(column) != steps:
            raise DataError(f"{where}/{place} has {len(column)} rows for {steps} actions; restore the file from a copy")
        if self._closing:
            later = place.replace("obs", "next_obs", 1)
            closing = _rows(group, later, where)
            if closing.shape != column.shape:
                raise DataError(
                    f"{where}/{later} has shape {closing.shape}; expected {column.shape}, as obs. Restore the file "
                    f"from a copy"
                )
            column = np.concatenate([column, closing[-1:]])
        return column

    def _metadata(self, group: Any, demo: str) -> dict[str, Any]:
        own = group.get(OWN)
        if own is not None:
            return own_metadata(own)
        metadata: dict[str, Any] = {"demo": demo}
        if stated := {name: value for name, value in attributes(group).items() if name != "num_samples"}:
            metadata["attributes"] = stated
        if demo in self._masks:
            metadata["masks"] = sorted(self._masks[demo])
        return metadata


class RobomimicSink(PartsSink):
    """A sink that writes obs and next_obs with keys `image` and `vector`, and extra entries for labels and metadata.

    robomimic's loaders need rewards and dones: rewards are 0, and dones are 0 except for a 1 in the last row.
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
        data = entry_of(file, "data")
        return isinstance(data, h5py().Group) and any(ACTIONS in data[name] for name in group_names(data))


def _has_rows(column: Any) -> bool:
    return isinstance(column, h5py().Dataset) and bool(column.shape)


def _rows(group: Any, place: str, where: str) -> np.ndarray:
    """Return a numeric column of a demo.

    Raises:
        DataError: the column is missing, or has no rows of numbers.
    """
    column = entry_of(group, place)
    if column is None:
        raise DataError(f"{where} has no {place}, unlike the first demo. Restore the file, or leave the demo out")
    if not _has_rows(column) or column.dtype.kind not in "fiub":
        came = f"{column.dtype} of shape {column.shape}" if isinstance(column, h5py().Dataset) else "a group"
        raise DataError(
            f"{where}/{place} is {came}; expected numbers with one row per step, as in the first demo. Restore the "
            f"file from a copy"
        )
    rows: np.ndarray = column[()]
    return rows


def _is_table(shape: tuple[int, ...], dtype: Any) -> bool:
    return 1 <= len(shape) <= 3 and dtype.kind in "fiub" and 1 <= int(np.prod(shape[1:])) <= 4096


def _strings(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


add_format(RobomimicSource, RobomimicSink, _detects, "an HDF5 file of robomimic: data/demo_K with actions and obs/KEY")
