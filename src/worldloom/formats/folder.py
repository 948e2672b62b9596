"""A folder of videos, each with a table of the same name: `NAME.mp4` and `NAME.parquet` or `NAME.csv`.

Columns: `timestamp` (seconds from the video's first frame), `action` or `action.*`, `observation` or `observation.*`,
and `label.*`. Lists of a fixed length are several values. `ReadOptions.columns` names other columns.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64, UInt8

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.files import read_json, read_whole, storage_errors, write_json
from worldloom.core.registry import nearest
from worldloom.core.types import Episode
from worldloom.core.untrusted import try_files
from worldloom.data import float_lists, metadata_json, to_rgb
from worldloom.formats.arrow import is_binary, is_integer, is_number, is_text, numbers, table_errors, write_parquet
from worldloom.formats.format import (
    NO_CAMERA,
    Contents,
    Sink,
    Source,
    add_format,
    count_files,
    natural,
    refuse,
    spec_in,
    spec_values,
    with_last_action,
)
from worldloom.formats.timebase import (
    AlignedSteps,
    Log,
    aligned_episodes,
    by_count,
    check_pairs,
    timestamps,
    unit_of,
)
from worldloom.formats.video import (
    LOSSY_CODEC,
    VIDEO_SUFFIXES,
    FrameStream,
    frame_shape,
    presentation,
    write_video,
)

TABLE_SUFFIXES = (".parquet", ".csv")
OWN_FILE, OWN = "worldloom.json", "worldloom"
EPISODES = frozenset({"episode", "episode_id", "episode_idx", "episode_index", "ep_idx", "traj_id", "trajectory_id"})
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


@dataclass(frozen=True, kw_only=True)
class _Roles:
    """The names of the columns for each role, in order; `left` contains the unused columns."""

    timestamp: str | None
    action: list[str]
    observation: list[str]
    label: list[str]
    left: list[str]


class FolderSource(Source):
    """A source that reads a folder, with one episode per name.

    A name without a video or a table is skipped, with a note.
    """

    format = "folder"
    roles = ("timestamp", "unit", "action", "choice", "observation", "label")
    reason = "a folder has one video per episode"

    def begin(self) -> None:
        """Find the files, and choose the columns from the first table."""
        path, options = self.path, self.options
        refuse(options, ["camera"] if options.camera != NO_CAMERA else [], "a folder has one video per episode")
        refuse(options, ["pictures"], "a folder has videos, whose frames are bytes")
        if options.columns.get("unit", "s") not in _SECONDS:
            raise ConfigError(f"unknown timestamp unit {options.columns['unit']!r}; {nearest('', _SECONDS)}")
        own = spec_in(read_json(path / OWN_FILE) if (path / OWN_FILE).is_file() else {})
        self._videos, self._tables = _files(path, VIDEO_SUFFIXES), _files(path, TABLE_SUFFIXES)
        self._pictures = options.camera != NO_CAMERA and (
            own.observation.pixels is not None if own else bool(self._videos)
        )
        if self._videos and not self._pictures:
            self.note("dropped", f"{path}: {len(self._videos)} videos are left out.")
        wanted = {*self._tables, *(self._videos if self._pictures else [])}
        self._names = sorted(wanted, key=natural)
        self._whole = [
            name for name in self._names if name in self._tables and (name in self._videos or not self._pictures)
        ]
        if not self._whole:
            raise DataError(
                f"{path} has {len(self._videos)} videos and {len(self._tables)} tables, but no video and table of the "
                f"same name. Give them the same name, for example episode.mp4 and episode.csv"
            )
        try_files("parquet", (table for table in self._tables.values() if table.suffix.lower() == ".parquet"))
        try_files("video", self._videos.values() if self._pictures else ())
        first = self._tables[self._whole[0]]
        table, separated = _read_table(first)
        if separated:
            self.note("guessed", f"{first} is read with {separated}; so are the other tables like it.")
        self._roles = self._choose(table, first)
        stamps = self._roles.timestamp
        self._unit_known = "unit" in options.columns or stamps is None or not is_number(table[stamps].type)
        if not self._pictures and options.pair is not None:
            raise ConfigError("the option 'pair' needs videos, which are left out here. Leave it out")
        self.note_left_out("columns", self._roles.left, "select them with --columns")
        if own is None:
            self.note(
                "info", f"{path}: actions without a following frame, such as the last of an episode, are left out."
            )
        sample = self._parse(self._whole[0])
        self._action_size = sample.actions.shape[1]
        columns = {key: value for key, value in asdict(self._roles).items() if key != "left"}
        channels = own.observation.pixels[2] if own and own.observation.pixels else 3
        self.describe(
            Contents(
                files=[*self._videos.values(), *self._tables.values(), *([path / OWN_FILE] if own else [])],
                action=self._action_size,
                integer=all(is_integer(table.schema.field(column).type) for column in self._roles.action),
                pixels=(*frame_shape(self._videos[self._whole[0]]), channels) if self._pictures else None,
                vector={name: column.shape[1] for name, column in sample.columns.items()},
                labels={name: column.shape[1] for name, column in sample.labels.items()},
                environment={"columns": columns},
                own=own,
            )
        )

    def __len__(self) -> int:
        return len(self._names)

    def actions(self) -> Iterator[np.ndarray]:
        """Yield the actions of each table that can be read."""
        for name in self._whole:
            try:
                yield self._parse(name).actions
            except DataError:
                continue  # `read` raises or notes it

    def read(self, index: int) -> list[Episode]:
        """Return an episode, split at its gaps."""
        name = self._names[index]
        for files, kind in ((self._tables, "table"), (self._videos, "video")):
            if name not in files and (kind == "table" or self._pictures):
                self.note("skipped", f"{self.path / name} is skipped: it has no {kind}.", index)
                return []
        log, where = self._parse(name, index), str(self._tables[name])
        self._check_sizes(log, name)
        log = replace(log, actions=self.encode(log.actions, where))
        if len(log.actions) == 0:
            self.note("skipped", f"{where} is skipped: it has no rows.", index)
            return []
        video = self._videos[name] if self._pictures else None
        row_times, camera_times = self._times(log, video, index, where)

        def metadata(stretch: AlignedSteps) -> dict[str, Any]:
            return {"name": name, "start": float(stretch.times[0])} if log.metadata is None else log.metadata

        return aligned_episodes(
            self,
            index,
            where,
            log,
            row_times=row_times,
            camera_times=camera_times,
            pixels=None if video is None else lambda numbers: self._frames(video, numbers, index),
            metadata=metadata,
            observed=bool(log.columns or log.labels),
            until=float(camera_times[-1]) if log.times is None or self.options.pair == "number" else None,
        )

    def _frames(self, video: Path, numbers: Int64[np.ndarray, "N"], index: int) -> UInt8[np.ndarray, "N H W C"]:
        with closing(FrameStream(video)) as stream:
            frames = stream.read(numbers, self.options.size)
        for kind, what in stream.remarks:
            self.note(kind, f"{video}: {what}.", index)
        return self.fit(frames, str(video))

    def _times(
        self, log: Log, video: Path | None, index: int, where: str
    ) -> tuple[Float64[np.ndarray, "R"], Float64[np.ndarray, "F"]]:
        """Return the times of the rows and of the frames, on one clock."""
        rows = len(log.actions)
        if video is None:
            times = np.arange(rows, dtype=np.float64) if log.times is None else log.times
            if self.options.rate is not None and rows > 1:  # else only the order of the times counts
                self._check_unit(times, (rows - 1) / self.options.rate, where, "the steps")
            return times, times
        shown = presentation(video)
        camera = shown.times
        if shown.hidden:
            self.note(
                "dropped", f"{video}: {shown.hidden} frames are left out, because its edit list hides them.", index
            )
        if log.metadata is not None and log.times is not None:  # written by worldloom: a row is a frame
            if len(camera) != rows:
                raise DataError(
                    f"{video} is truncated: it has {len(camera)} frames, expected {rows}. Restore the video from a copy"
                )
            return log.times, log.times
        if log.times is None or self.options.pair == "number":
            by_count(len(camera), rows, str(video))
            return camera[:rows], camera
        times = log.times
        self._check_unit(times, float(camera[-1]), where, "the video")
        finite = times[np.isfinite(times)]
        if len(finite) and (finite.min() > camera[-1] + 1.0 or finite.max() < -1.0):
            what = (
                f"{video}: the log starts at {finite[0]:.6f} s and the video covers 0 to {camera[-1]:.3f} s, so they "
                f"do not overlap; the video is assumed to start at the first row."
            )
            self.note("repaired", what, index)
            times = times - finite[0]
        if self.options.pair is None:
            check_pairs(times, camera, where)
        return times, camera

    def _check_unit(self, times: Float64[np.ndarray, "R"], seconds: float, where: str, what: str) -> None:
        """Raise `DataError` if times without a stated unit seem not to be seconds; `what` lasts `seconds` s."""
        span = float(np.ptp(times)) if len(times) and np.isfinite(times).all() else 0.0
        if not self._unit_known and (unit := unit_of(span, seconds)) is not None:
            raise DataError(
                f"{where}: the timestamps span {span:.6g} and {what} {seconds:.4g} s, so that the timestamps seem to "
                f"be in {unit} rather than seconds. State the unit with --columns unit={unit}, or --columns unit=s "
                f"if they are seconds"
            )

    def _choose(self, table: pa.Table, file: Path) -> _Roles:
        names = list(table.column_names)
        for role in self.options.columns:
            for name in [] if role == "unit" else self.named(role) or []:
                if name not in names:
                    raise ConfigError(f"{file} has no column {name!r} for {role}; {nearest(name, names)}")
        kinds = {name: table.schema.field(name).type for name in names}
        numeric = [name for name, kind in kinds.items() if not (is_text(kind) or is_binary(kind))]
        timestamp = self.named("timestamp") or [name for name in names if name == "timestamp"]
        action = self.choose_actions(names, file=file)
        observed = [name for name in numeric if name == "observation" or name.startswith("observation.")]
        observation = self.choose_vector(observed, numeric)
        labelled = [name for name in names if name == "label" or name.startswith("label.")]
        label = self.choose_labels(sorted(labelled, key=natural), names)
        used = {*timestamp, *action, *observation, *label}
        left = [name for name in names if name not in used]
        return _Roles(
            timestamp=timestamp[0] if timestamp else None,
            action=action,
            observation=observation,
            label=label,
            left=left,
        )

    def _parse(self, name: str, index: int | None = None) -> Log:
        """Read a table as a `Log`; `index` is the episode's index in notes about the table."""
        file = self._tables[name]
        table, _ = _read_table(file)
        columns = self._roles
        needed = [*columns.action, *columns.observation, *columns.label]
        there = set(table.column_names)  # once, because a table may have thousands of columns
        for column in [*needed, *([columns.timestamp] if columns.timestamp else [])]:
            if column not in there:
                raise DataError(
                    f"{file} has no column {column!r}, but the first table has this column; got "
                    f"{', '.join(table.column_names)}. Use the same columns in all tables"
                )
        where = str(file)
        for column in sorted(EPISODES.intersection(columns.left, table.column_names)):
            if (count := len(table[column].unique())) > 1:
                raise DataError(
                    f"{file} has rows of {count} episodes, according to its column {column!r}; expected the rows of "
                    f"one. Write a table for each episode, or rename the column if it is something else"
                )
        parts = {column: self.single(numbers(table[column], column, where), column, where, index) for column in needed}
        metadata = None
        text = (table.schema.metadata or {}).get(OWN.encode())
        if text is not None:
            metadata = json.loads(text.decode())
        return Log(
            times=self._seconds(table[columns.timestamp], file) if columns.timestamp else None,
            actions=np.concatenate([parts[column] for column in columns.action], axis=1),
            columns={column: parts[column] for column in columns.observation},
            labels={column.removeprefix("label."): parts[column] for column in columns.label},
            metadata=metadata,
        )

    def _seconds(self, column: pa.ChunkedArray, file: Path) -> Float64[np.ndarray, "R"]:
        if pa.types.is_timestamp(column.type):
            stamps = column.cast(pa.timestamp("ns", tz=column.type.tz)).cast(pa.int64()).to_numpy()
            return np.asarray(stamps / 1e9, np.float64)
        if not (is_number(column.type) or pa.types.is_null(column.type)):
            raise DataError(
                f"{file}: timestamps have type {column.type}; expected numbers, or Parquet timestamps. Convert "
                f"the column"
            )
        values = timestamps(column, f"{file}: the timestamp column")
        return np.asarray(values * _SECONDS[self.options.columns.get("unit", "s")], np.float64)

    def _check_sizes(self, log: Log, name: str) -> None:
        sizes = {
            "actions": (log.actions.shape[1], self._action_size),
            "observations": (sum(column.shape[1] for column in log.columns.values()), self.spec.observation.vector),
            **{f"label {key}": (column.shape[1], self.spec.labels[key]) for key, column in log.labels.items()},
        }
        for what, (came, expected) in sizes.items():
            if came != expected:
                raise DataError(
                    f"{self._tables[name]}: {what} have {came} values; expected {expected}, as in the first table. "
                    f"Use the same columns in all tables"
                )


class FolderSink(Sink):
    """A sink that writes `000000.mp4` (lossless: .mkv) and `000000.parquet` per episode, then `worldloom.json`."""

    layout = "a folder of videos"
    encoded, lossy_codec = True, LOSSY_CODEC

    def begin(self, *, resume: bool) -> int:
        """Create the folder, and return the number of tables in it."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        return count_files(self._table)

    def _table(self, number: int) -> Path:
        return self.path / f"{number:06d}.parquet"

    def save(self, episodes: list[Episode]) -> None:
        """Write the video of an episode, then its table, which marks the episode as complete."""
        (episode,), options = episodes, self.options
        if episode.pixels is not None:
            video = self.path / f"{self.saved:06d}{'.mkv' if options.lossless else '.mp4'}"
            write_video(video, to_rgb(episode.pixels), fps=options.fps, crf=options.crf, lossless=options.lossless)
        columns: dict[str, Any] = {"timestamp": pa.array(np.arange(episode.steps + 1) / options.fps)}
        columns["action"] = float_lists(with_last_action(episode))
        if episode.vector is not None:
            columns["observation"] = float_lists(episode.vector)
        columns |= {f"label.{name}": float_lists(column) for name, column in episode.labels.items()}
        table = pa.table(columns).replace_schema_metadata({OWN: metadata_json(episode.metadata)})
        write_parquet(self._table(self.saved), table)

    def complete(self) -> None:
        """Write `worldloom.json`, which contains the spec."""
        write_json(self.path / OWN_FILE, spec_values(self.spec))


def _detects(path: Path) -> bool:
    """Return whether the folder has a video and a table of the same name."""
    if not path.is_dir():
        return False
    try:
        tables = _files(path, TABLE_SUFFIXES)
        videos = _files(path, VIDEO_SUFFIXES)
    except DataError:
        return True  # opening reports the problem
    return bool(set(videos) & set(tables)) or ((path / OWN_FILE).is_file() and bool(tables))


def _files(path: Path, suffixes: Sequence[str]) -> Mapping[str, Path]:
    """Return the files with these suffixes, by stem."""
    found: dict[str, Path] = {}
    with storage_errors(path):
        for file in sorted(path.iterdir()):
            if file.suffix.lower() in suffixes and not file.name.startswith(".") and not file.is_dir():
                if file.stem in found:
                    raise DataError(f"{path} has both {found[file.stem].name} and {file.name}; remove one of them")
                found[file.stem] = file
    return found


def _read_table(file: Path) -> tuple[pa.Table, str]:
    """Return a table, and a description of the separator if it is not a comma."""
    with table_errors(file, "a table"):
        content = read_whole(file) if file.suffix.lower() == ".csv" else b""
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty; expected a table with an action column. Restore or remove the file")
        if file.suffix.lower() == ".parquet":
            try_files("parquet", [file])
            _check_names(pq.read_schema(file).names, file)
            return pq.read_table(file, partitioning=None), ""
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file} is not encoded as UTF-8 (byte {error.start}); it may be Latin-1, Windows-1252 or UTF-16. Save "
                f"the table as UTF-8"
            ) from error
        header, _, rest = text.partition("\n")
        separator = max(",;\t", key=header.count)  # the first of several
        comma = separator == ";" and re.search(r"(^|;)-?\d+,\d+\s*(;|$)", rest[:4096], re.MULTILINE) is not None
        read = csv.read_csv(
            pa.BufferReader(content),
            parse_options=csv.ParseOptions(delimiter=separator),
            convert_options=csv.ConvertOptions(decimal_point="," if comma else "."),
        )
    read = read.rename_columns([name.strip().strip('"') for name in read.column_names])  # "t", "x": a blank each
    _check_names(read.column_names, file)
    named = {",": "", ";": "semicolons as separators", "\t": "tabs as separators"}[separator]
    return read, f"{named} and decimal commas" if comma else named


def _check_names(names: Sequence[str], file: Path) -> None:
    """Raise `DataError` if a name appears twice, or if all names are numbers, as in a table without a header."""
    if len(twice := [name for name, count in Counter(names).items() if count > 1]):
        raise DataError(f"{file} has several columns named {', '.join(twice)}; rename or remove all but one of each")
    if names and all(re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", name) for name in names):
        raise DataError(
            f"{file} has no header: its first row is {', '.join(names)}. Write a first row with the names of the "
            f"columns, such as timestamp,action.x,observation.x"
        )


add_format(
    FolderSource,
    FolderSink,
    _detects,
    "a folder with NAME.mp4 (.mkv, .avi, .mov, .webm) and NAME.parquet or NAME.csv for each episode",
    lossless_pixels=False,
)
