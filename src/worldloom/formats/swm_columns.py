"""The columns of stable-worldmodel's layouts, which are the same in its HDF5 files and its Lance tables.

A row is a frame. Row t contains the observation at step t and the action taken there. No frame follows the action in
the last row of an episode; stable-worldmodel stores a copy of the first action or NaN there.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.core.types import Episode
from worldloom.data import DatasetSpec, metadata_json
from worldloom.formats.format import Contents, Source, chosen

LENGTH, OFFSET, ACTION, PIXELS, VECTOR = "ep_len", "ep_offset", "action", "pixels", "observation"
METADATA = "worldloom_metadata"  # a text column with JSON in the first row of an episode
OBSERVED = ("observation", "proprio")  # columns that an agent observes; the others are simulator state
REWARDS = ("reward", "terminated", "truncated", "done", "success")
COUNTERS = ("ep_idx", "episode_idx", "step_idx")
_UNSEEN = (LENGTH, OFFSET, ACTION, *REWARDS, *COUNTERS)
RESERVED = (ACTION, PIXELS, VECTOR, METADATA, *REWARDS, *COUNTERS)  # names that labels cannot have
_MOST = 256  # maximum number of values of a label

Columns = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]  # by name: shape (N, ...) and dtype; pictures are uint8


@dataclass(frozen=True, kw_only=True)
class ChosenColumns:
    """The columns that a source reads: the action, the camera, the vector columns and the labels."""

    action: list[str]
    camera: str | None
    vector: list[str]
    labels: list[str]

    def contents(
        self,
        columns: Columns,
        *,
        files: Iterable[Path],
        pixels: tuple[int, int, int] | None,
        own: DatasetSpec | None,
    ) -> Contents:
        """Return the description of a source with these columns; `pixels` is the (H, W, C) shape of the frames."""
        sizes = {name: int(np.prod(shape[1:])) for name, (shape, _) in columns.items()}
        vector = {name: sizes[name] for name in self.vector}
        return Contents(
            files=files,
            action=sum(sizes[name] for name in self.action),
            integer=all(columns[name][1].kind in "iub" for name in self.action),
            pixels=pixels,
            vector=vector,
            labels={name: sizes[name] for name in self.labels},
            environment=chosen(self.camera, vector),
            own=own,
        )


def choose_columns(source: Source, columns: Columns, own: DatasetSpec | None) -> ChosenColumns:
    """Choose the columns to read, using the source's options, and add notes about the columns that are left out.

    By default, the vector consists of `observation` and `proprio`. Without these and without pictures, it is `state`
    or, if that is missing too, all numeric columns. Other numeric columns are labels, except rewards and counters.
    """
    usable = {name: (shape[1:], dtype) for name, (shape, dtype) in columns.items() if name not in _UNSEEN}
    pictures, cameras = source.pictures_among(usable)
    action = source.choose_actions(_numeric(columns, [*COUNTERS, LENGTH, OFFSET, *pictures]), (ACTION,))
    if own is not None and own.observation.pixels is None:
        cameras = []
    camera = source.choose_camera(cameras)
    if own is None:
        observed, labels = _roles(columns, pictures, action)
        left = {*columns} - {*observed, *labels}
    else:
        observed, labels, left = [VECTOR] if own.observation.vector else [], list(own.labels), set()
    every = [*observed, *labels]
    if camera is None and not observed:
        observed = ["state"] if "state" in labels else labels
    vector = source.choose_vector(observed, every)
    others = [name for name in every if name not in vector]
    labels = source.choose_labels(others, others)
    rewards = sorted(left & {*REWARDS})
    source.note_left_out("columns", rewards, "worldloom learns without rewards")
    rest = sorted({*left, *cameras, *others} - {*action, *labels, camera, *REWARDS, *COUNTERS})
    source.note_left_out("columns", rest, f"not chosen, not numeric or more than {_MOST} values")
    if own is None:
        source.note_last_action()
    return ChosenColumns(action=action, camera=camera, vector=vector, labels=labels)


def metadata_column(episode: Episode) -> list[str]:
    """Return the text column with an episode's metadata, as JSON in its first row."""
    return [metadata_json(episode.metadata), *[""] * episode.steps]


def _roles(columns: Columns, pictures: Collection[str], action: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the observation columns and the label columns."""
    numeric = _numeric(columns, [*_UNSEEN, *pictures, *action])
    observed = [name for name in OBSERVED if name in numeric]
    if not observed and not pictures:
        observed = ["state"] if "state" in numeric else numeric
    return observed, [name for name in sorted(numeric) if name not in observed]


def _numeric(columns: Columns, but: Collection[str]) -> list[str]:
    return [
        name
        for name, (shape, dtype) in columns.items()
        if dtype.kind in "fiub" and name not in but and int(np.prod(shape[1:])) <= _MOST
    ]
