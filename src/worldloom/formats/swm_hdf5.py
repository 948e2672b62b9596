"""stable-worldmodel's HDF5 layout: flat columns, one row per frame, with `ep_len` and `ep_offset`.

swm_columns.py describes the columns.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.core.errors import DataError
from worldloom.core.types import Episode
from worldloom.formats.format import add_format, only_one, spec_in, two_axes, with_last_action
from worldloom.formats.hdf5 import (
    Hdf5Source,
    PartsSink,
    arrays,
    h5py,
    hdf5_errors,
    is_hdf5,
    opened_hdf5,
    own_attribute,
)
from worldloom.formats.swm_columns import (
    ACTION,
    LENGTH,
    METADATA,
    OBSERVED,
    OFFSET,
    PIXELS,
    RESERVED,
    VECTOR,
    Columns,
    choose_columns,
    metadata_column,
)


class SwmHdf5Source(Hdf5Source):
    """A source that reads an HDF5 file, or a directory that contains one such file."""

    format = "swm-hdf5"

    def locate(self, path: Path) -> Path:
        """Return the path of the file."""
        return only_one(_files(path), path, "HDF5 files")

    def describe_file(self) -> None:
        """Check the columns, and choose among them."""
        file, where, own = self.file, self.path, spec_in(own_attribute(self.file))
        for name in (LENGTH, OFFSET):
            if name not in file:
                raise DataError(f"{where} has no column {name!r}; it has {', '.join(file) or 'none'}. Check the file")
        found, odd = arrays(file)
        for name in (LENGTH, OFFSET):
            if name not in found or found[name].dtype.kind not in "iu" or found[name].ndim != 1:
                raise DataError(f"{where}: column {name!r} has no whole number for each episode. Restore the file")
        self._lengths, self._offsets = (found[name][()].astype(np.int64) for name in (LENGTH, OFFSET))
        if len(self._lengths) != len(self._offsets):
            raise DataError(
                f"{where} has {len(self._lengths)} lengths but {len(self._offsets)} offsets; restore the file"
            )
        columns = {
            name: (column.shape, column.dtype)
            for name, column in found.items()
            if name not in (LENGTH, OFFSET, METADATA)
        }
        rows = int((self._lengths + self._offsets).max(initial=0))
        short = {name for name, (shape, _) in columns.items() if shape[0] < rows}
        for name in sorted(short & {ACTION, PIXELS, *OBSERVED, *(own.labels if own else ())}):
            raise DataError(
                f"{where}: column {name!r} has shape {columns[name][0]}, but the episodes need {rows} rows. Restore "
                f"the file from a copy"
            )
        numbers = {name: column for name, column in columns.items() if name not in short}
        text = [name for name, why in odd.items() if why == "text" and name != METADATA]
        self._text = [name for name in text if file[name].shape and len(file[name]) >= rows]
        for reason in sorted({*odd.values()} - {"text"}):
            self.note_left_out("entries", sorted(name for name, why in odd.items() if why == reason), reason)
        self.note_left_out("columns", sorted(short), f"fewer than the {rows} rows of the episodes")
        self._chosen = chosen = choose_columns(self, numbers, own)
        self.note_unwritten(file, [*chosen.action, *chosen.vector], str(where))
        self._note_counts(numbers, rows)
        pixels: tuple[int, int, int] | None = None
        if (camera := self._chosen.camera) is not None:
            shape, dtype = columns[camera]
            what, sample = f"{where}: column {camera!r}", file[camera][:8]
            pixels = self.lay_out(shape[1:], dtype, what, own=own is not None, sample=sample).pixels
        self.describe(self._chosen.contents(numbers, files=[self.path], pixels=pixels, own=own))

    def _note_counts(self, columns: Columns, rows: int) -> None:
        """Add notes about rows that belong to no episode, and rows that belong to several."""
        taken = np.zeros(max(rows, 0) + 1, np.int64)
        for offset, length in zip(self._offsets, self._lengths, strict=True):
            if offset < 0 or length < 0:
                raise DataError(
                    f"{self.path} has an episode with offset {offset} and length {length}; expected numbers of at "
                    f"least 0. Restore the file from a copy"
                )
            taken[offset] += 1
            taken[offset + length] -= 1
        uses = np.cumsum(taken)[:rows]
        surplus = max([rows, *(int(shape[0]) for shape, _ in columns.values())]) - rows + int((uses == 0).sum())
        if surplus:
            self.note("dropped", f"{self.path}: {surplus} rows are left out, because they belong to no episode.")
        if (uses > 1).any():
            self.note("info", f"{self.path}: {int((uses > 1).sum())} rows belong to several episodes.")

    def actions(self) -> Iterator[np.ndarray]:
        """Yield each episode's actions, without its last action."""
        for offset, length in zip(self._offsets, self._lengths, strict=True):
            yield self._joined_actions(slice(int(offset), int(offset) + max(int(length) - 1, 0)))

    def _joined_actions(self, rows: slice) -> np.ndarray:
        return np.concatenate([two_axes(self.file[name][rows]) for name in self._chosen.action], axis=1)

    def __len__(self) -> int:
        return len(self._lengths)

    def read(self, index: int) -> list[Episode]:
        """Return an episode."""
        first, length = int(self._offsets[index]), int(self._lengths[index])
        rows, chosen = slice(first, first + length), self._chosen
        with hdf5_errors(self.path):
            columns = {name: np.asarray(self.file[name][rows]) for name in (*chosen.vector, *chosen.labels)}
            stored = None if chosen.camera is None else self.file[chosen.camera][rows]
            actions = self._joined_actions(rows)
            metadata: dict[str, Any] = {"index": index}
            if METADATA in self.file and length:
                metadata = json.loads(self.file[METADATA].asstr()[first] or "{}")
            elif length:
                metadata |= {name: str(self.file[name].asstr()[first]) for name in self._text}
        where = f"{self.path}: episode {index}"
        return self.episode(
            index,
            where,
            pixels=None if stored is None else self.to_pixels(stored, where, index),
            columns=columns,
            actions=self.encode(actions[:-1], where),
            labels={name: columns[name] for name in chosen.labels},
            metadata=metadata,
        )


class SwmHdf5Sink(PartsSink):
    """A sink that writes `pixels`, `observation`, `action` and a column per label; the last actions are zeros."""

    layout = "stable-worldmodel's layout"
    reserved = (*RESERVED, LENGTH, OFFSET)

    def assemble(self, file: Any, episodes: Iterator[Episode]) -> None:
        """Write the columns, one episode at a time. Each row is one HDF5 chunk, the same as in stable-worldmodel."""
        lengths: list[int] = []
        for episode in episodes:
            columns = {PIXELS: episode.pixels, VECTOR: episode.vector, ACTION: with_last_action(episode)}
            columns |= {**episode.labels, METADATA: np.array(metadata_column(episode), object)}
            if METADATA not in file:
                text = h5py().string_dtype()
                file.create_dataset(METADATA, shape=(0,), maxshape=(None,), chunks=(256,), dtype=text)
            for name, column in columns.items():
                if column is not None:
                    _extend(file, name, column)
            lengths.append(episode.steps + 1)
        file[LENGTH] = np.array(lengths, np.int32)
        file[OFFSET] = np.cumsum([0, *lengths[:-1]]).astype(np.int64)[: len(lengths)]
        if ACTION not in file:
            file[ACTION] = np.zeros((0, self.spec.action.size), np.float32)


def _detects(path: Path) -> bool:
    """Return whether the file has `ep_len` and `ep_offset`."""
    files = _files(path)
    if len(files) != 1 or not is_hdf5(files[0]):
        return False
    with opened_hdf5(files[0]) as file:
        return LENGTH in file and OFFSET in file


def _files(path: Path) -> list[Path]:
    return [path] if not path.is_dir() else sorted([*path.glob("[!.]*.h5"), *path.glob("[!.]*.hdf5")])


def _extend(file: Any, name: str, column: np.ndarray) -> None:
    if name not in file:
        shape = column.shape[1:]
        file.create_dataset(name, shape=(0, *shape), maxshape=(None, *shape), chunks=(1, *shape), dtype=column.dtype)
    there = file[name].shape[0]
    file[name].resize(there + len(column), axis=0)
    file[name][there:] = column


add_format(
    SwmHdf5Source,
    SwmHdf5Sink,
    _detects,
    "an HDF5 file of stable-worldmodel (or a directory with one): columns with ep_len and ep_offset",
)
