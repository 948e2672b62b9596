"""A folder of videos with a table for each: `NAME.mp4` and `NAME.parquet` or `NAME.csv`.

Columns: `timestamp` (seconds on the video's clock, 0 at its first frame), `action` or `action.*`, `observation` or
`observation.*`, `label.*`; lists of one length count as several values. `ReadOptions.columns` names others.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.files import read_json, storage_errors, write_atomic, write_json
from worldloom.core.registry import nearest
from worldloom.core.types import Episode, ObservationSpec
from worldloom.data import DatasetSpec, check_episode, metadata_json
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
    choose_vector,
    digest_files,
    natural,
    refuse,
)
from worldloom.formats.timebase import align, by_count
from worldloom.formats.video import VIDEO_SUFFIXES, frame_shape, frame_times, read_frames, write_video

TABLE_SUFFIXES = (".parquet", ".csv")
OWN_FILE, OWN = "worldloom.json", "worldloom"
ROLES = ("timestamp", "unit", "action", "observation", "label")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Which columns of the tables are what, in order."""

    timestamp: str | None
    action: list[str]
    observation: list[str]
    label: list[str]
    left: list[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Table:
    """The rows of one log."""

    times: Float64[np.ndarray, "R"] | None
    actions: Float32[np.ndarray, "R A"]
    vector: Float32[np.ndarray, "R V"] | None
    labels: dict[str, Float32[np.ndarray, "R _"]]
    metadata: dict[str, Any] | None  # our own


class FolderSource(Source):
    """Episodes are names; one without its video or its table gives a note and no episode."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        refuse(options, ["camera"] if options.camera != NO_CAMERA else [], "a folder holds one video an episode")
        self.path, self.options, self.notes = path, options, []
        unknown = sorted(set(options.columns) - set(ROLES))
        if unknown:
            raise ConfigError(f"unknown column role {unknown[0]!r}; {nearest(unknown[0], ROLES)}")
        if options.columns.get("unit", "s") not in _SECONDS:
            raise ConfigError(f"unknown unit {options.columns['unit']!r} of timestamps; {nearest('', _SECONDS)}")
        self._own: dict[str, Any] = read_json(path / OWN_FILE) if (path / OWN_FILE).is_file() else {}
        self._videos, self._tables = _files(path, VIDEO_SUFFIXES), _files(path, TABLE_SUFFIXES)
        own_spec = DatasetSpec.from_json(json.dumps(self._own.get("spec"))) if self._own else None
        self._pictures = options.camera != NO_CAMERA and (
            own_spec.observation.pixels is not None if own_spec else bool(self._videos)
        )
        if self._videos and not self._pictures:
            self.notes.append(Note(kind="dropped", what=f"{path}: {len(self._videos)} videos are left out."))
        wanted = {*self._tables, *(self._videos if self._pictures else [])}
        self._names = sorted(wanted, key=natural)
        whole = [name for name in self._names if name in self._tables and (name in self._videos or not self._pictures)]
        if not whole:
            raise DataError(
                f"{path} holds no video with a table of the same name, such as episode.mp4 and episode.csv; it has "
                f"{len(self._videos)} videos and {len(self._tables)} tables"
            )
        first = _read_table(self._tables[whole[0]])
        self._columns = self._choose(first, self._tables[whole[0]])
        if self._columns.left:
            what = f"{path}: the columns {', '.join(self._columns.left)} are left out; name them with --columns."
            self.notes.append(Note(kind="dropped", what=what))
        if not self._own:
            what = f"{path}: an action that leads to no frame, such as an episode's last, is left out."
            self.notes.append(Note(kind="info", what=what))
        sample = self._parse(whole[0])
        bounds, notes = choose_bounds(
            options,
            sample.actions.shape[1],
            known=(own_spec.action.low, own_spec.action.high) if own_spec else None,
            range_of_data=None if own_spec else self._range(whole),
            where=str(path),
            discrete=own_spec is not None and own_spec.action.discrete,
        )
        self.notes += notes
        environment: dict[str, Any] = {**(own_spec.environment if own_spec else {}), "format": "folder"}
        environment["source"] = path.name
        if not own_spec:
            environment |= {"columns": {key: value for key, value in asdict(self._columns).items() if key != "left"}}
        self._channels = own_spec.observation.pixels[2] if own_spec and own_spec.observation.pixels else 3
        shape = None
        if self._pictures:
            shape = (*(options.size or frame_shape(self._videos[whole[0]])), self._channels)
        self.spec = DatasetSpec(
            observation=ObservationSpec(
                pixels=shape, vector=0 if sample.vector is None else int(sample.vector.shape[1])
            ),
            action=bounds,
            labels={name: int(column.shape[1]) for name, column in sample.labels.items()},
            environment=environment,
        )
        own_file = [path / OWN_FILE] if self._own else []
        self.fingerprint = digest_files([*self._videos.values(), *self._tables.values(), *own_file], path)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> list[Episode]:
        """Return the stretches of an episode."""
        name = self._names[index]
        for files, kind in ((self._tables, "table"), (self._videos, "video")):
            if name not in files and (kind == "table" or self._pictures):
                what = f"{self.path / name} is skipped: it has no {kind}."
                self.notes.append(Note(kind="skipped", what=what, episode=index))
                return []
        table = self._parse(name)
        self._check_sizes(table, name)
        where = str(self._tables[name])
        if len(table.actions) == 0:
            self.notes.append(Note(kind="skipped", what=f"{where} is skipped: it has no row.", episode=index))
            return []
        video = self._videos[name] if self._pictures else None
        row_times, camera_times = self._times(table, video, index)
        stretches, notes = align(
            camera_times,
            row_times,
            table.actions,
            where=where,
            rate=self.options.rate,
            how=self.options.actions,
            gap=self.options.gap,
            observed=table.vector is not None or bool(table.labels),
            until=float(camera_times[-1]) if table.times is None else None,
            episode=index,
        )
        self.notes += notes
        pixels = None
        if video is not None and stretches:
            numbers = np.concatenate([stretch.frames for stretch in stretches])
            pixels = read_frames(video, numbers, self.options.size)[..., : self._channels]
            if pixels.shape[1:] != self.spec.observation.pixels:
                raise DataError(
                    f"{video} has frames of shape {pixels.shape[1:]}; the first video has "
                    f"{self.spec.observation.pixels}. Give one size for all with --size HxW"
                )
        episodes: list[Episode] = []
        first = 0
        for part, stretch in enumerate(stretches):
            last = first + len(stretch.frames)
            metadata = table.metadata
            if metadata is None:
                metadata = {"name": name, "start": float(stretch.times[0])}
                metadata |= {"part": part} if len(stretches) > 1 else {}
            episodes += build_episode(
                self.notes,
                index,
                where,
                pixels=None if pixels is None else np.ascontiguousarray(pixels[first:last]),
                vector=None if table.vector is None else table.vector[stretch.rows],
                actions=stretch.actions,
                labels={key: column[stretch.rows] for key, column in table.labels.items()},
                metadata=metadata,
            )
            first = last
        return episodes

    def _times(
        self, table: _Table, video: Path | None, index: int
    ) -> tuple[Float64[np.ndarray, "R"], Float64[np.ndarray, "F"]]:
        """Return the times of the rows and of the frames, on one clock."""
        rows = len(table.actions)
        if video is None:
            times = np.arange(rows, dtype=np.float64) if table.times is None else table.times
            return times, times
        camera = frame_times(video)
        if table.metadata is not None and table.times is not None:  # our own: a row a frame, whatever the rounding
            if len(camera) != rows:
                raise DataError(
                    f"{video} has {len(camera)} frames and was written with {rows}: it is cut. Restore it from a copy"
                )
            return table.times, table.times
        if table.times is None:
            by_count(len(camera), rows, str(video))
            return camera[:rows], camera
        times = table.times
        finite = times[np.isfinite(times)]
        if len(finite) and (finite.min() > camera[-1] + 1.0 or finite.max() < -1.0):
            what = (
                f"{video}: the log runs from {finite[0]:.6f} s and the video from 0 to {camera[-1]:.3f} s, so they "
                f"have no moment in common; the video is taken to begin with the first row."
            )
            self.notes.append(Note(kind="repaired", what=what, episode=index))
            times = times - finite[0]
        return times, camera

    def _choose(self, table: pa.Table, file: Path) -> _Columns:
        names = list(table.column_names)
        given = {role: text.split(",") for role, text in self.options.columns.items() if role != "unit"}
        for role, chosen in given.items():
            for name in chosen:
                if name not in names:
                    raise ConfigError(f"{file} has no column {name!r} for {role}; {nearest(name, names)}")

        def pick(role: str) -> list[str]:
            found = [name for name in names if name == role or name.startswith(f"{role}.")]
            return given.get(role, sorted(found, key=natural))

        timestamp = given.get("timestamp", [name for name in names if name == "timestamp"])
        action, observation, label = pick("action"), pick("observation"), pick("label")
        if not action:
            raise DataError(
                f"{file} has no column 'action' or 'action.*'; it has {', '.join(names)}. Name them with "
                f"--columns action=NAME,NAME"
            )
        numeric = [name for name in observation if not _is_text(table.schema.field(name).type)]
        if "observation" not in given:
            observation = choose_vector(numeric, self.options, str(file))
        left = [name for name in names if name not in {*timestamp, *action, *observation, *label}]
        return _Columns(
            timestamp=timestamp[0] if timestamp else None,
            action=action,
            observation=observation,
            label=label,
            left=left,
        )

    def _parse(self, name: str) -> _Table:
        file = self._tables[name]
        table = _read_table(file)
        columns = self._columns
        needed = [*columns.action, *columns.observation, *columns.label]
        for column in [*needed, *([columns.timestamp] if columns.timestamp else [])]:
            if column not in table.column_names:
                there = ", ".join(table.column_names)
                raise DataError(f"{file} has no column {column!r}, which the first table has; it has {there}")
        parts = {column: _numbers(table[column], column, file) for column in needed}
        metadata = None
        text = (table.schema.metadata or {}).get(OWN.encode())
        if text is not None:
            metadata = json.loads(text.decode())
        vector = None
        if columns.observation:
            vector = np.concatenate([parts[column] for column in columns.observation], axis=1)
        return _Table(
            times=self._seconds(table[columns.timestamp], file) if columns.timestamp else None,
            actions=np.concatenate([parts[column] for column in columns.action], axis=1),
            vector=vector,
            labels={column.removeprefix("label."): parts[column] for column in columns.label},
            metadata=metadata,
        )

    def _seconds(self, column: pa.ChunkedArray, file: Path) -> Float64[np.ndarray, "R"]:
        if pa.types.is_timestamp(column.type):
            stamps = column.cast(pa.timestamp("ns", tz=column.type.tz)).cast(pa.int64()).to_numpy()
            return np.asarray(stamps / 1e9, np.float64)
        if not (_is_number(column.type) or pa.types.is_null(column.type)):
            raise DataError(f"{file}: timestamps are {column.type}; expected seconds as numbers, or Parquet timestamps")
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return np.asarray(values * _SECONDS[self.options.columns.get("unit", "s")], np.float64)

    def _check_sizes(self, table: _Table, name: str) -> None:
        sizes = {
            "actions": (table.actions.shape[1], self.spec.action.size),
            "observations": (0 if table.vector is None else table.vector.shape[1], self.spec.observation.vector),
            **{f"label {key}": (column.shape[1], self.spec.labels[key]) for key, column in table.labels.items()},
        }
        for what, (came, expected) in sizes.items():
            if came != expected:
                raise DataError(f"{self._tables[name]}: {what} have {came} values and {expected} in the first table")

    def _range(self, names: Sequence[str]) -> tuple[list[float], list[float]] | None:
        low: np.ndarray | None = None
        high: np.ndarray | None = None
        for name in names:
            try:
                actions = self._parse(name).actions.astype(np.float64)
            except DataError:
                continue  # raised again, or noted, when it is read
            if not len(actions) or (low is not None and actions.shape[1:] != low.shape):
                continue  # the same
            actions = np.where(np.isfinite(actions), actions, np.nan)
            least, most = np.fmin.reduce(actions), np.fmax.reduce(actions)
            low, high = (least, most) if low is None or high is None else (np.fmin(low, least), np.fmax(high, most))
        if low is None or high is None or not np.isfinite([low, high]).all():
            return None
        return low.tolist(), high.tolist()


class FolderSink(Sink):
    """Writes `000000.mp4` (or .mkv, lossless) and `000000.parquet`, the table last; `worldloom.json` at the end."""

    def __init__(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> None:
        pixels = spec.observation.pixels
        if pixels is not None and pixels[2] not in (1, 3):
            raise DataError(f"video holds 1 or 3 channels; the dataset has {pixels[2]}. Choose another format")
        if path.exists() and not resume:
            raise DataError(f"{path} is there already; choose another path, or delete it")
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        self.path, self.spec, self.options = path, spec, options
        self.written = 0
        while self._table(self.written).exists():
            self.written += 1
        self._count = self.written

    def _table(self, number: int) -> Path:
        return self.path / f"{number:06d}.parquet"

    def write(self, episode: Episode) -> None:
        """Write the video, then the table, which makes the episode whole."""
        import pyarrow.parquet as pq

        number, options = self._count, self.options
        check_episode(episode, self.spec, f"episode {number}")
        if episode.pixels is not None:
            video = self.path / f"{number:06d}{'.mkv' if options.lossless else '.mp4'}"
            frames = np.repeat(episode.pixels, 3 // episode.pixels.shape[3], axis=3)
            write_video(video, frames, fps=options.fps, crf=options.crf, lossless=options.lossless)
        columns: dict[str, Any] = {"timestamp": pa.array(np.arange(episode.steps + 1) / options.fps)}
        columns["action"] = _lists(np.concatenate([episode.actions, np.zeros_like(episode.actions[:1])]))
        if episode.vector is not None:
            columns["observation"] = _lists(episode.vector)
        columns |= {f"label.{name}": _lists(column) for name, column in episode.labels.items()}
        table = pa.table(columns).replace_schema_metadata({OWN: metadata_json(episode.metadata)})
        write_atomic(self._table(number), lambda temporary: pq.write_table(table, temporary))
        self._count += 1

    def finish(self) -> list[Note]:
        """Write `worldloom.json`: bounds, sizes and where the data is from."""
        write_json(self.path / OWN_FILE, {"spec": json.loads(self.spec.to_json())})
        if self.spec.observation.pixels is None or self.options.lossless:
            return []
        what = f"{self.path}: pixels went through H.264 at crf {self.options.crf} and come back nearly the same only."
        return [Note(kind="info", what=what)]


class Folder(Format):
    """A folder of videos and tables."""

    name = "folder"
    description = "a folder with NAME.mp4 (.mkv, .avi, .mov, .webm) and NAME.parquet or NAME.csv for each episode"
    lossless_pixels = False

    def detects(self, path: Path) -> bool:
        """Look for a video and a table of the same name."""
        if not path.is_dir():
            return False
        try:
            tables = _files(path, TABLE_SUFFIXES)
            videos = _files(path, VIDEO_SUFFIXES)
        except DataError:
            return True  # opening says what is wrong
        return bool(set(videos) & set(tables)) or ((path / OWN_FILE).is_file() and bool(tables))

    def open(self, path: Path, options: ReadOptions) -> Source:
        """Open a folder."""
        return FolderSource(path, options)

    def create(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> Sink:
        """Begin or go on with a folder."""
        return FolderSink(path, spec, options, resume=resume)


def _files(path: Path, suffixes: Sequence[str]) -> Mapping[str, Path]:
    """Return the files with these suffixes, by stem."""
    found: dict[str, Path] = {}
    with storage_errors(path):
        for file in sorted(path.iterdir()):
            if file.suffix.lower() in suffixes and not file.name.startswith("."):
                if file.stem in found:
                    raise DataError(f"{path} holds both {found[file.stem].name} and {file.name}; leave one of them")
                found[file.stem] = file
    return found


def _read_table(file: Path) -> pa.Table:
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    try:
        with storage_errors(file):
            if file.stat().st_size == 0:
                raise DataError(f"{file} is empty; expected a table with a column of actions")
            return pq.read_table(file, partitioning=None) if file.suffix == ".parquet" else csv.read_csv(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as a table ({error}); it is cut or damaged. Restore it") from error


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind))


def _numbers(column: pa.ChunkedArray, name: str, file: Path) -> Float32[np.ndarray, "R n"]:
    """Return a column of numbers, or of lists of one length, as (R, n); what is missing is NaN."""
    kind = column.type
    rows = len(column)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        values = column.to_pylist()
        lengths = {len(value) for value in values if value is not None}
        if len(lengths) > 1:
            row = next(row for row, value in enumerate(values) if value is None or len(value) != len(values[0] or []))
            raise DataError(
                f"{file}: the lists of column {name!r} have {min(lengths)} to {max(lengths)} values (row {row} differs "
                f"from row 0); expected one length"
            )
        width = lengths.pop() if lengths else int(getattr(kind, "list_size", 1))
        kind = kind.value_type
        if _is_number(kind):
            filled = [[np.nan] * width if value is None else value for value in values]
            return np.array(filled, np.float32).reshape(rows, width)
    if _is_number(kind) or pa.types.is_null(kind):
        numbers: np.ndarray = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return numbers.astype(np.float32).reshape(rows, 1)
    raise DataError(f"{file}: column {name!r} is {column.type}; expected numbers, or lists of numbers of one length")


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _lists(array: Float32[np.ndarray, "N n"]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(array).reshape(-1)), array.shape[1])


FORMATS.register(Folder.name)(Folder())
