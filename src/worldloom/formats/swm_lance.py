"""stable-worldmodel's Lance tables: a row a frame, with `episode_idx` and `step_idx`, and columns as in its HDF5 files.

Pictures are encoded (JPEG as that library writes them; PNG where we write losslessly), numbers are lists of float32,
text is text. The action of an episode's last row leads to no frame.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from worldloom.core.errors import DataError, WorldloomError
from worldloom.core.types import Episode, ObservationSpec
from worldloom.data import FORMAT, DatasetSpec, check_episode, lance_errors, metadata_json, open_table
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
    refuse,
    resize,
)
from worldloom.formats.store import decoded_bytes
from worldloom.formats.swm_hdf5 import ACTION, COUNTERS, METADATA, PIXELS, REWARDS, VECTOR, roles

EPISODE, STEP = "episode_idx", "step_idx"
OWN = b"worldloom"
QUALITY = 95  # of JPEG, as that library writes it
COMMIT_BYTES, COMMIT_EPISODES = 2**26, 256  # decoded bytes, or episodes, that make a commit


class SwmLanceSource(Source):
    """One table. Which columns are observations and which labels is as for that library's HDF5 files."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        why = "stable-worldmodel's layout has no timestamps and fixed names"
        refuse(options, ["rate", "actions", "gap", "columns"], why)
        self.path, self.options, self.notes = _table(path), options, []
        where = str(self.path)
        self._lance = open_table(self.path)
        schema = self._lance.schema
        for name in (EPISODE, STEP, ACTION):
            if name not in schema.names:
                raise DataError(f"{where} has no column {name!r}; it holds {', '.join(schema.names) or 'nothing'}")
        text = (schema.metadata or {}).get(OWN)
        self._own = None if text is None else DatasetSpec.from_json(text.decode())
        self._starts = self._find_episodes()
        cameras = [field.name for field in schema if _is_binary(field.type)]
        self._text = [field.name for field in schema if _is_text(field.type) and field.name != METADATA]
        columns = {
            field.name: ((1, _width(field.type)), np.dtype(np.float32)) for field in schema if _width(field.type)
        }
        self._widths = {name: shape[1] for name, (shape, _) in columns.items()}
        # Pictures stand among the columns, as `roles` looks whether there are some.
        pictures = {name: ((1, 1, 1, 3), np.dtype(np.uint8)) for name in cameras}
        observed, labels, left = roles({**columns, **pictures})
        if self._own is not None:
            observed = [VECTOR] if self._own.observation.vector else []
            labels, left = list(self._own.labels), []
        self._camera = choose_camera(cameras, options, where)
        every = [*observed, *labels]
        if self._camera is None and options.vector is None and not observed:
            observed = ["state"] if "state" in labels else labels
        self._vector = choose_vector(every if options.vector is not None else observed, options, where)
        self._labels = [name for name in every if name not in self._vector]
        self._describe_left([*left, *(set(schema.names) - {*columns, *cameras, *self._text, METADATA})])
        if ACTION not in columns:
            raise DataError(f"{where}: action is {schema.field(ACTION).type}; expected lists of numbers of one length")
        own = self._own
        bounds, notes = choose_bounds(
            options,
            self._widths[ACTION],
            known=None if own is None else (own.action.low, own.action.high),
            range_of_data=None if own is not None else self._range(),
            where=where,
            discrete=own is not None and own.action.discrete,
        )
        self.notes += notes
        environment: dict[str, Any] = {"format": "swm-lance", "source": self.path.name, "camera": self._camera}
        environment["vector"] = [[name, self._widths[name]] for name in self._vector]
        if own is not None:
            environment = {**own.environment, "format": "swm-lance", "source": self.path.name}
        self.spec = DatasetSpec(
            observation=ObservationSpec(pixels=self._shape(), vector=sum(self._widths[name] for name in self._vector)),
            action=bounds,
            labels={name: self._widths[name] for name in self._labels},
            environment=environment,
        )
        self.fingerprint = digest_files((file for file in self.path.rglob("*") if file.is_file()), self.path)

    def _find_episodes(self) -> np.ndarray:
        """Return where each episode begins, and the number of rows."""
        with lance_errors(str(self.path), "read"):
            table = self._lance.to_table(columns=[EPISODE, STEP])
        episodes, steps = (table[name].to_numpy().astype(np.int64) for name in (EPISODE, STEP))
        changes = np.flatnonzero(np.diff(episodes)) + 1
        if (np.diff(episodes) < 0).any():
            row = int(np.flatnonzero(np.diff(episodes) < 0)[0]) + 1
            raise DataError(
                f"{self.path}: {EPISODE} falls from {episodes[row - 1]} to {episodes[row]} in row {row}; expected "
                f"episodes one after the other. Write the table again, sorted"
            )
        starts = np.array([0, *changes, len(episodes)] if len(episodes) else [0], np.int64)
        expected = np.arange(len(steps)) - np.repeat(starts[:-1], np.diff(starts))
        if not np.array_equal(steps, expected):
            row = int(np.flatnonzero(steps != expected)[0])
            raise DataError(
                f"{self.path}: {STEP} is {steps[row]} in row {row}; expected {expected[row]}, as steps count from 0 in "
                f"each episode. Rows are missing or out of order: write the table again, sorted"
            )
        return starts

    def _describe_left(self, left: list[str]) -> None:
        where = str(self.path)
        schema = set(self._lance.schema.names)
        cameras = {name for name in schema if _is_binary(self._lance.schema.field(name).type)} - {self._camera}
        rewards = sorted(name for name in left if name in REWARDS)
        others = {*left, *cameras} - {ACTION, EPISODE, STEP, str(self._camera), *REWARDS, *COUNTERS}
        if rewards:
            what = f"{where}: {', '.join(rewards)} are left out; worldloom learns without rewards."
            self.notes.append(Note(kind="dropped", what=what))
        if others:
            what = f"{where}: the columns {', '.join(sorted(others))} are left out (not chosen, or not numeric)."
            self.notes.append(Note(kind="dropped", what=what))
        if self._own is None:
            what = f"{where}: the last action of each episode leads to no frame and is left out."
            self.notes.append(Note(kind="info", what=what))

    def _shape(self) -> tuple[int, int, int] | None:
        if self._camera is None:
            return None
        if self._own is not None and self._own.observation.pixels is not None:
            height, width, channels = self._own.observation.pixels
        else:
            first = self._rows(0, 1, [self._camera])[self._camera]
            height, width, channels = self._decode(first, "row 0").shape[1:] if len(first) else (1, 1, 3)
        return (*(self.options.size or (height, width)), channels)

    def _rows(self, first: int, last: int, names: list[str]) -> pa.Table:
        with lance_errors(str(self.path), "read"):
            return self._lance.take(list(range(first, last)), columns=names)

    def _range(self) -> tuple[list[float], list[float]] | None:
        width = self._widths[ACTION]
        low, high = np.full(width, np.inf), np.full(width, -np.inf)
        for first, last in zip(self._starts[:-1], self._starts[1:], strict=True):
            if last - first > 1:
                taken = _numbers(self._rows(int(first), int(last) - 1, [ACTION])[ACTION], width).astype(np.float64)
                taken = np.where(np.isfinite(taken), taken, np.nan)
                low, high = np.fmin(low, np.fmin.reduce(taken)), np.fmax(high, np.fmax.reduce(taken))
        return (low.tolist(), high.tolist()) if np.isfinite([low, high]).all() else None

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, index: int) -> list[Episode]:
        """Return an episode."""
        first, last = int(self._starts[index]), int(self._starts[index + 1])
        where = f"{self.path}: episode {index}"
        own = [METADATA] if self._own is not None else []
        names = [*self._vector, *self._labels, *self._text, *own, ACTION]
        table = self._rows(first, last, [*names, *([self._camera] if self._camera else [])])
        columns = {name: _numbers(table[name], self._widths[name]) for name in (*self._vector, *self._labels, ACTION)}
        if self._own is not None:
            metadata: dict[str, Any] = json.loads(table[METADATA][0].as_py() or "{}")
        else:
            metadata = {"index": index} | {name: table[name][0].as_py() for name in self._text}
        pixels = None
        if self._camera is not None:
            pixels = resize(self._decode(table[self._camera], where), self.options.size)
            expected = self.spec.observation.pixels
            if expected is not None and pixels.shape[3] == 3 and expected[2] == 1:
                pixels = np.ascontiguousarray(pixels[..., :1])
            if pixels.shape[1:] != expected:
                raise DataError(
                    f"{where} has frames of shape {pixels.shape[1:]}; the first episode has {expected}. Give one size "
                    f"for all with --size HxW"
                )
        return build_episode(
            self.notes,
            index,
            where,
            pixels=pixels,
            vector=concatenate(columns, self._vector),
            actions=columns[ACTION][:-1],
            labels={name: flat(columns[name]) for name in self._labels},
            metadata=metadata,
        )

    def _decode(self, column: pa.ChunkedArray, where: str) -> np.ndarray:
        pictures: list[np.ndarray] = []
        for row, value in enumerate(column):
            try:
                with Image.open(io.BytesIO(value.as_py() or b"")) as opened:
                    grey = opened.mode == "L"
                    picture = np.asarray(opened.convert("L" if grey else "RGB"))
            except (UnidentifiedImageError, OSError, SyntaxError) as error:
                raise DataError(
                    f"{where}: the picture of {self._camera!r} in step {row} does not decode ({error}); restore it"
                ) from error
            pictures.append(picture[..., None] if grey else picture)
            if picture.shape != pictures[0].shape[: picture.ndim]:
                raise DataError(
                    f"{where}: the picture of {self._camera!r} in step {row} changes its size; repair the table"
                )
        return np.stack(pictures)


class SwmLanceSink(Sink):
    """Appends to a table, with a commit for every 64 MiB of decoded data or 256 episodes; a commit is whole or not."""

    def __init__(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> None:
        for name in spec.labels:
            if name in {ACTION, PIXELS, VECTOR, METADATA, EPISODE, STEP, *REWARDS, *COUNTERS} or "." in name:
                raise DataError(f"label {name!r} has a name that stable-worldmodel's layout uses or forbids; rename it")
        pixels = spec.observation.pixels
        if pixels is not None and pixels[2] not in (1, 3):
            raise DataError(f"pictures have 1 or 3 channels; the dataset has {pixels[2]}. Choose another format")
        self.path = path if path.suffix == ".lance" else path / f"{path.name}.lance"
        self.spec, self.options = spec, options
        self._pending: list[Episode] = []
        self._bytes = self.written = 0
        self._schema = self._make_schema()
        self._there = self.path.exists()
        if self._there:
            table = open_table(self.path)
            if not resume:
                raise DataError(f"{self.path} is there already; choose another path, or delete it")
            if (table.schema.metadata or {}).get(OWN) != spec.to_json().encode():
                raise DataError(f"{self.path} holds something else; choose another path")
            with lance_errors(str(self.path), "read"):
                column = table.to_table(columns=[EPISODE])[EPISODE].to_numpy()
            self.written = int(column.max()) + 1 if len(column) else 0
        self._count = self.written

    def _make_schema(self) -> pa.Schema:
        fields = [pa.field(EPISODE, pa.int32()), pa.field(STEP, pa.int32())]
        if self.spec.observation.pixels is not None:
            fields.append(pa.field(PIXELS, pa.binary()))
        widths = {VECTOR: self.spec.observation.vector, ACTION: self.spec.action.size, **self.spec.labels}
        fields += [pa.field(name, pa.list_(pa.float32(), width)) for name, width in widths.items() if width]
        fields.append(pa.field(METADATA, pa.string()))
        return pa.schema(fields, metadata={OWN: self.spec.to_json().encode()})

    def write(self, episode: Episode) -> None:
        """Add an episode; a full commit is written."""
        check_episode(episode, self.spec, f"episode {self._count + len(self._pending)}")
        self._pending.append(episode)
        self._bytes += decoded_bytes(episode)
        if self._bytes >= COMMIT_BYTES or len(self._pending) >= COMMIT_EPISODES:
            self._commit()

    def _commit(self) -> None:
        import lance

        pending, self._pending, self._bytes = self._pending, [], 0  # a commit that failed is not tried again on closing
        if not pending and self._there:
            return
        batches = [self._batch(episode, number) for number, episode in enumerate(pending, self._count)]
        with lance_errors(str(self.path), "write"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            table = pa.Table.from_batches(batches, self._schema)
            lance.write_dataset(table, str(self.path), mode="append" if self._there else "create")
        self._there = True
        self._count += len(pending)

    def _batch(self, episode: Episode, number: int) -> pa.RecordBatch:
        rows = episode.steps + 1
        arrays = [pa.array(np.full(rows, number, np.int32)), pa.array(np.arange(rows, dtype=np.int32))]
        if episode.pixels is not None:
            arrays.append(pa.array([self._encode(frame) for frame in episode.pixels], pa.binary()))
        columns = {
            VECTOR: episode.vector,
            ACTION: np.concatenate([episode.actions, np.zeros_like(episode.actions[:1])]),
        }
        for column in [*columns.values(), *(episode.labels[name] for name in self.spec.labels)]:
            if column is not None:
                values = pa.array(np.ascontiguousarray(column).reshape(-1))
                arrays.append(pa.FixedSizeListArray.from_arrays(values, column.shape[1]))
        arrays.append(pa.array([metadata_json(episode.metadata), *[""] * (rows - 1)], pa.string()))
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)

    def _encode(self, frame: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        picture = Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame)
        if self.options.lossless:
            picture.save(buffer, format="PNG", compress_level=3)
        else:
            picture.save(buffer, format="JPEG", quality=QUALITY)
        return buffer.getvalue()

    def close(self) -> None:
        """Commit whole episodes that wait, after an error elsewhere too."""
        if self._pending:
            self._commit()

    def finish(self) -> list[Note]:
        """Commit the rest."""
        self._commit()
        if self.spec.observation.pixels is None or self.options.lossless:
            return []
        what = f"{self.path}: pixels went through JPEG at quality {QUALITY} and come back nearly the same only."
        return [Note(kind="info", what=what)]


class SwmLance(Format):
    """stable-worldmodel's Lance tables, or a directory with one such table."""

    name = "swm-lance"
    description = (
        "a Lance table of stable-worldmodel (or a directory with one): episode_idx, step_idx, encoded pictures"
    )
    lossless_pixels = False

    def detects(self, path: Path) -> bool:
        """Look for a Lance table with that library's counters."""
        tables = _tables(path)
        if len(tables) != 1:
            return False
        try:
            schema = open_table(tables[0]).schema
        except WorldloomError:
            return False
        return {EPISODE, STEP} <= set(schema.names) and (schema.metadata or {}).get(b"format") != FORMAT.encode()

    def open(self, path: Path, options: ReadOptions) -> Source:
        """Open a table."""
        return SwmLanceSource(path, options)

    def create(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> Sink:
        """Begin or go on with a table: `path`, or `path/NAME.lance` where it does not end in .lance."""
        return SwmLanceSink(path, spec, options, resume=resume)


def _tables(path: Path) -> list[Path]:
    return [path] if (path / "_versions").is_dir() else sorted(path.glob("*.lance"))


def _table(path: Path) -> Path:
    tables = _tables(path)
    if len(tables) != 1:
        names = ", ".join(table.name for table in tables) or "none"
        raise DataError(f"{path} holds these Lance tables: {names}; expected one. Name the table itself")
    return tables[0]


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _width(kind: pa.DataType) -> int:
    """Return how many numbers a row of a column holds; 0 for what is no list of them, nor a number."""
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) if _is_number(kind.value_type) else 0
    return int(_is_number(kind))


def _numbers(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Return a column as float32 (N, width); what is missing is NaN."""
    whole = column.combine_chunks()
    if not pa.types.is_fixed_size_list(whole.type):
        values = whole.cast(pa.float64()).to_numpy(zero_copy_only=False)
    elif whole.null_count:
        values = np.array([[np.nan] * width if row is None else row for row in whole.to_pylist()], np.float64)
    else:
        values = whole.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False)
    numbers: np.ndarray = values.astype(np.float32).reshape(len(whole), width)
    return numbers


FORMATS.register(SwmLance.name)(SwmLance())
