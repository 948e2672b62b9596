"""stable-worldmodel's Lance tables: one row per frame, with `episode_idx` and `step_idx`; see swm_columns.py.

Pictures are encoded as JPEG, like stable-worldmodel's own, or as PNG if written losslessly. Numbers are lists of
float32.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from worldloom.core.errors import DataError, WorldloomError
from worldloom.core.types import Episode
from worldloom.data import (
    FORMAT,
    DatasetSpec,
    decode_picture,
    encode_picture,
    float_lists,
    lance_errors,
    open_table,
    room_for,
    table_written,
)
from worldloom.formats.arrow import is_binary, is_integer, is_number, is_text, numbers
from worldloom.formats.format import CLOCK, Sink, Source, add_format, files_below, only_one, with_last_action
from worldloom.formats.swm_columns import ACTION, METADATA, PIXELS, RESERVED, VECTOR, choose_columns, metadata_column

EPISODE, STEP = "episode_idx", "step_idx"
OWN = b"worldloom"
QUALITY = 95  # JPEG quality, the same as stable-worldmodel's


class SwmLanceSource(Source):
    """A source that reads a table, or a directory with one table. Columns have the same roles as in the HDF5 files."""

    format = "swm-lance"
    refused = CLOCK
    roles = ("action", "choice", "observation", "label", "camera")
    reason = "this layout has no timestamps"

    def begin(self) -> None:
        """Open the table, check its columns, and choose among them."""
        self._lance = open_table(self.path)
        schema = self._lance.schema
        for name in (EPISODE, STEP):
            if name not in schema.names:
                raise DataError(
                    f"{self.path} has no column {name!r}; it has {', '.join(schema.names) or 'none'}. Check the path"
                )
        if (
            ACTION in schema.names
            and not _width(schema.field(ACTION).type)
            and not {*self.options.columns} & {*self.roles[:2]}
        ):
            raise DataError(
                f"{self.path}: column 'action' has type {schema.field(ACTION).type}; expected a list of numbers in "
                f"each row, of the same length in all rows. Convert the column"
            )
        text = (schema.metadata or {}).get(OWN)
        self._own = None if text is None else DatasetSpec.from_json(text.decode())
        self._starts = self._find_episodes()
        self._text = [field.name for field in schema if is_text(field.type) and field.name != METADATA]
        self._widths = {field.name: _width(field.type) for field in schema}
        columns: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        for field in schema:
            if is_binary(field.type):
                columns[field.name] = ((1, 1, 1, 3), np.dtype(np.uint8))
            elif self._widths[field.name]:
                kind = np.int64 if is_integer(field.type) else np.float32
                columns[field.name] = ((1, self._widths[field.name]), np.dtype(kind))
            elif field.name not in (*self._text, METADATA):
                columns[field.name] = ((1,), np.dtype(object))
        self._chosen = choose_columns(self, columns, self._own)
        self._values = self.picture_values(str(self.path))
        files = files_below(self.path)
        shape = self._picture_shape()
        self.describe(self._chosen.contents(columns, files=files, pixels=shape, own=self._own))

    def locate(self, path: Path) -> Path:
        """Return the path of the table."""
        return only_one(_tables(path), path, "Lance tables")

    def _find_episodes(self) -> np.ndarray:
        """Return the first row of each episode, followed by the number of rows."""
        with lance_errors(str(self.path), "read"):
            table = self._lance.to_table(columns=[EPISODE, STEP])
        episodes, steps = (table[name].to_numpy().astype(np.int64) for name in (EPISODE, STEP))
        changes = np.flatnonzero(np.diff(episodes)) + 1
        if (np.diff(episodes) < 0).any():
            row = int(np.flatnonzero(np.diff(episodes) < 0)[0]) + 1
            raise DataError(
                f"{self.path}: {EPISODE} decreases from {episodes[row - 1]} to {episodes[row]} in row {row}; expected "
                f"episodes in ascending order. Sort the table and write it again"
            )
        starts = np.array([0, *changes, len(episodes)] if len(episodes) else [0], np.int64)
        expected = np.arange(len(steps)) - np.repeat(starts[:-1], np.diff(starts))
        if not np.array_equal(steps, expected):
            row = int(np.flatnonzero(steps != expected)[0])
            raise DataError(
                f"{self.path}: {STEP} is {steps[row]} in row {row}; expected {expected[row]}, because steps count from "
                f"0 in each episode. Rows are missing or out of order. Sort the table by episode and step, or restore "
                f"the missing rows"
            )
        return starts

    def _picture_shape(self) -> tuple[int, int, int] | None:
        camera = self._chosen.camera
        if camera is None:
            return None
        if self._own is not None and self._own.observation.pixels is not None:
            return self._own.observation.pixels
        first = self._rows(0, 1, [camera])[camera]
        height, width, channels = self._decode(first, "row 0").shape[1:] if len(first) else (1, 1, 3)
        return height, width, channels

    def _rows(self, first: int, last: int, names: list[str]) -> pa.Table:
        with lance_errors(str(self.path), "read"):
            return self._lance.take(list(range(first, last)), columns=names)

    def actions(self) -> Iterator[np.ndarray]:
        """Yield each episode's actions, without its last action."""
        for first, last in zip(self._starts[:-1], self._starts[1:], strict=True):
            if last - first > 1:
                yield self._joined_actions(self._rows(int(first), int(last) - 1, self._chosen.action), str(self.path))

    def _joined_actions(self, table: pa.Table, where: str) -> np.ndarray:
        return np.concatenate([numbers(table[name], name, where) for name in self._chosen.action], axis=1)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, index: int) -> list[Episode]:
        """Return an episode."""
        first, last = int(self._starts[index]), int(self._starts[index + 1])
        where = f"{self.path}: episode {index}"
        chosen, numeric = self._chosen, [*self._chosen.vector, *self._chosen.labels]
        own = [METADATA] if self._own is not None else []
        pictures = [chosen.camera] if chosen.camera else []
        table = self._rows(first, last, [*{*numeric, *chosen.action, *self._text, *own, *pictures}])
        columns = {name: numbers(table[name], name, where) for name in numeric}
        if self._own is not None:
            metadata: dict[str, Any] = json.loads(table[METADATA][0].as_py() or "{}")
        else:
            metadata = {"index": index} | {name: table[name][0].as_py() for name in self._text}
        pixels = None
        if chosen.camera is not None:
            pixels = self._decode(table[chosen.camera], where)
        return self.episode(
            index,
            where,
            pixels=pixels,
            columns=columns,
            actions=self.encode(self._joined_actions(table, where)[:-1], where),
            labels={name: columns[name] for name in chosen.labels},
            metadata=metadata,
        )

    def _decode(self, column: pa.ChunkedArray, where: str) -> np.ndarray:
        out: np.ndarray | None = None
        for row, value in enumerate(column):
            what = f"{where}: the picture of {self._chosen.camera!r} in step {row}"
            picture = decode_picture(value.as_py(), what, values=self._values)
            if out is None:
                out = room_for(len(column), picture, where)
            if picture.shape != out.shape[1:]:
                raise DataError(
                    f"{what} has a different shape from the first picture; resize the pictures in the table"
                )
            out[row] = picture
        assert out is not None, "an episode has rows"
        return out


class SwmLanceSink(Sink):
    """A sink that appends to a table, with one atomic commit per 64 MiB of decoded data or 256 episodes."""

    layout = "stable-worldmodel's Lance layout"
    reserved, forbidden = RESERVED, "."
    encoded, lossy_codec = True, f"JPEG at quality {QUALITY}"
    most_bytes, most_episodes = 2**26, 256

    def locate(self, path: Path) -> Path:
        """Return `path` if it ends in .lance, else the path of a table with the same name in the directory `path`."""
        return path if path.suffix == ".lance" else path / f"{path.name}.lance"

    def begin(self, *, resume: bool) -> int:
        """Choose the columns, and return the number of episodes in the table."""
        spec = self.spec
        fields = [pa.field(EPISODE, pa.int32()), pa.field(STEP, pa.int32())]
        if spec.observation.pixels is not None:
            fields.append(pa.field(PIXELS, pa.binary()))
        widths = {VECTOR: spec.observation.vector, ACTION: spec.action.size, **spec.labels}
        fields += [pa.field(name, pa.list_(pa.float32(), width)) for name, width in widths.items() if width]
        fields.append(pa.field(METADATA, pa.string()))
        self._schema = pa.schema(fields, metadata={OWN: spec.to_json().encode()})
        self._there = self.path.exists()
        if not self._there:
            return 0
        table = open_table(self.path)
        if (table.schema.metadata or {}).get(OWN) != spec.to_json().encode():
            raise DataError(
                f"{self.path} already contains data with other columns or settings than the data to write; choose "
                f"another path"
            )
        with lance_errors(str(self.path), "read"):
            column = table.to_table(columns=[EPISODE])[EPISODE].to_numpy()
        return int(column.max(initial=-1)) + 1

    def save(self, episodes: list[Episode]) -> None:
        """Commit episodes; without episodes, create an empty table."""
        import lance

        batches = [self._batch(episode, number) for number, episode in enumerate(episodes, self.saved)]
        with lance_errors(str(self.path), "write"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            table = pa.Table.from_batches(batches, self._schema)
            lance.write_dataset(table, str(self.path), mode="append" if self._there else "create")
            table_written(self.path)
        self._there = True

    def _batch(self, episode: Episode, number: int) -> pa.RecordBatch:
        rows = episode.steps + 1
        arrays = [pa.array(np.full(rows, number, np.int32)), pa.array(np.arange(rows, dtype=np.int32))]
        if episode.pixels is not None:
            quality = None if self.options.lossless else QUALITY
            frames = [encode_picture(frame, jpeg_quality=quality) for frame in episode.pixels]
            arrays.append(pa.array(frames, pa.binary()))
        columns = [episode.vector, with_last_action(episode), *(episode.labels[name] for name in self.spec.labels)]
        arrays += [float_lists(column) for column in columns if column is not None]
        arrays.append(pa.array(metadata_column(episode), pa.string()))
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)

    def complete(self) -> None:
        """Write an empty table if there were no episodes."""
        if not self._there:
            self.save([])


def _detects(path: Path) -> bool:
    """Return whether `path` has a Lance table with `episode_idx` and `step_idx`."""
    tables = _tables(path)
    if len(tables) != 1:
        return False
    try:
        schema = open_table(tables[0]).schema
    except WorldloomError:
        return False
    return {EPISODE, STEP} <= set(schema.names) and (schema.metadata or {}).get(b"format") != FORMAT.encode()


def _tables(path: Path) -> list[Path]:
    return [path] if (path / "_versions").is_dir() else sorted(path.glob("[!.]*.lance"))


def _width(kind: pa.DataType) -> int:
    """Return the number of values in a row of a column; 0 unless the rows are numbers or lists of a fixed length."""
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) if is_number(kind.value_type) else 0
    return int(is_number(kind))


add_format(
    SwmLanceSource,
    SwmLanceSink,
    _detects,
    "a Lance table of stable-worldmodel (or a directory with one): episode_idx, step_idx, encoded pictures",
    lossless_pixels=False,
)
