"""Reading of LeRobot datasets, versions 2.0, 2.1 and 3.0 (Parquet and MP4), without the `lerobot` package.

lerobot_layout.py describes the layout; lerobot_write.py contains the writers.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Float64, Int64, UInt8

from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.files import read_json, read_whole, storage_errors
from worldloom.core.types import Episode
from worldloom.core.untrusted import try_files
from worldloom.data import decode_picture, resize, room_for, to_rgb
from worldloom.formats.arrow import is_list, is_number, table_errors
from worldloom.formats.format import Bounds, Contents, Source, add_format, chosen, files_below, guess
from worldloom.formats.lerobot_layout import (
    ACTION,
    COUNTERS,
    INFO,
    LABEL,
    EpisodePlace,
    Layout,
    inside,
    is_numeric,
    picture_shape,
    width,
)
from worldloom.formats.lerobot_write import LeRobotSinkV2, LeRobotSinkV3
from worldloom.formats.timebase import Log, aligned_episodes, clock_difference, timestamps, unit_of
from worldloom.formats.video import FrameStream, frame_times

_SAME_RATE = 1e-3  # largest relative difference of two rates that count as equal
STATES = ("state", "states", "proprio")  # names of features for the vector if none has the prefix `observation`


class LeRobotSource(Source):
    """A source that reads a LeRobot dataset. Consecutive episodes in the same files are read in one pass."""

    roles = ("action", "choice", "observation", "label", "camera")
    reason = "LeRobot's timestamps have a fixed column and unit"
    major: str  # version
    _stream: FrameStream | None = None  # the video that was read last
    _values: tuple[float, float] | None = None  # of encoded pictures with more than 8 bits

    def begin(self) -> None:
        """Read the metadata, and choose among the features."""
        path = self.path
        self._meta = layout = Layout.read(path, self.major)
        self._opened = lru_cache(maxsize=1)(_open_rows)
        self._group = lru_cache(maxsize=2)(self._read_group)
        self._frame_times = lru_cache(maxsize=1)(frame_times)
        self._shared = Counter(file for entry in layout.entries for file, _ in entry.videos.values())
        self._ends = {entry.data: 0 for entry in layout.entries}
        for entry in layout.entries:
            self._ends[entry.data] = max(self._ends[entry.data], entry.first + entry.length)
        for remark in layout.remarks:
            self.note("info", remark)
        features, own = layout.features, layout.spec
        sizes = {name: width(feature) for name, feature in features.items() if is_numeric(feature)}
        numeric = [name for name in sizes if name not in COUNTERS]
        observed = {name for name in numeric if name.startswith("observation")}
        encoded = [name for name, feature in features.items() if feature["dtype"] in ("video", "image")]
        pictures, cameras = self.pictures_among(
            {name: (features[name]["shape"], features[name]["dtype"]) for name in observed}, others=bool(encoded)
        )
        self._camera = self.choose_camera([*encoded, *cameras])
        self._sharing = self._find_sharing()
        self._vector = self._choose_observations(
            [name for name in numeric if name not in pictures], guessing=own is None
        )
        self._actions = self.choose_actions(numeric, file=path / INFO)
        self._labels = self.choose_labels((name for name in sizes if name.startswith(LABEL)), numeric)
        if own is None and len(self._actions) > 1 and not self.options.columns:
            self.note(
                "guessed",
                f"{path}: the action joins {', '.join(f'{name} ({sizes[name]})' for name in self._actions)}. If they "
                f"repeat each other, name some of them with --columns action=NAME,NAME.",
            )
        left = sorted({*features} - {*self._vector, *self._actions, *self._labels, *COUNTERS, self._camera})
        self.note_left_out("features", left, "not chosen, rewards, or not numeric")
        if own is None:
            self.note_last_action()
        size = sum(sizes[name] for name in self._actions)
        vector = {name: sizes[name] for name in self._vector}
        pixels: tuple[int, int, int] | None = None
        if self._camera is not None:
            feature, what = features[self._camera], f"{path}: feature {self._camera!r}"
            if self._camera in pictures:
                pixels = self.lay_out(feature["shape"], feature["dtype"], what).pixels
            else:
                height, across = picture_shape(feature, self._camera, path)
                pixels = (height, across, own.observation.pixels[2] if own and own.observation.pixels else 3)
                self._values = self.picture_values(what)
                if self._values is not None and feature["dtype"] == "video":
                    raise ConfigError(f"{what} is a video, whose frames are bytes. Leave out --picture-range")
        files = {entry.data for entry in layout.entries}
        videos = {file for entry in layout.entries for key, (file, _) in entry.videos.items() if key == self._camera}
        try_files("parquet", files)  # all at once, because each child process takes time to start
        try_files("video", videos)
        files |= videos
        files |= {file for file in files_below(path / "meta") if file.suffix.startswith((".json", ".parquet"))}
        self.describe(
            Contents(
                files=[file for file in files if file.exists()],
                action=size,
                integer=all(np.dtype(features[name]["dtype"]).kind in "iub" for name in self._actions),
                range=layout.range if self._actions == [ACTION] and _fits(layout.range, size) else None,
                pixels=pixels,
                vector=vector,
                labels={name.removeprefix(LABEL): sizes[name] for name in self._labels},
                environment={**chosen(self._camera, vector), "fps": layout.fps},
                own=own,
            )
        )

    def _choose_observations(self, numeric: list[str], *, guessing: bool) -> list[str]:
        """Return the features of the vector: `observation*`, or, with a note, a feature that is named like a state."""
        default = [name for name in numeric if name.startswith("observation")]
        asked = self.options.vector is not None or "observation" in self.options.columns
        if not default and guessing and not asked:
            default, _ = guess(STATES, numeric)
            if default:
                self.note(
                    "guessed",
                    f"{self.path}: the vector is taken from {', '.join(default)}, because no feature has the prefix "
                    f"'observation'. Name other features with --columns observation=NAME,NAME.",
                )
        return self.choose_vector(default, numeric)

    def __len__(self) -> int:
        return len(self._meta.entries)

    def close(self) -> None:
        """Close the files."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def actions(self) -> Iterator[np.ndarray]:
        """Yield the actions of each episode that can be read."""
        for entry in self._meta.entries:
            try:
                table = self._rows(entry, self._actions)
                yield self._joined_actions(table, str(entry.data))
            except (DataError, StorageError):
                continue  # `read` raises or notes it

    def read(self, index: int) -> list[Episode]:
        """Return an episode, split at its gaps."""
        entry = self._meta.entries[index]
        where = f"{entry.data}: episode {entry.episode}"
        numeric = [*self._vector, *self._labels]
        pictures = [self._camera] if self._camera is not None and self._camera not in entry.videos else []
        table = self._rows(entry, [*numeric, *self._actions, *pictures])
        if table.num_rows == 0:
            self.note("skipped", f"{where} is skipped: it has no rows.", index)
            return []
        surplus = self._opened(entry.data)[0].metadata.num_rows - self._ends[entry.data]
        if surplus and entry.first + entry.length == self._ends[entry.data]:
            self.note("dropped", f"{entry.data}: the last {surplus} rows are left out; no episode has them.", index)
        columns = {name: self._numbers(table, name, where, index) for name in numeric}
        times = self._clock(table, where)
        log = Log(
            times=times,
            actions=self.encode(self._joined_actions(table, where, index), where),
            columns={name: columns[name] for name in self._vector},
            labels={name.removeprefix(LABEL): columns[name] for name in self._labels},
        )
        return aligned_episodes(
            self,
            index,
            where,
            log,
            row_times=times,
            camera_times=times,
            pixels=None if self._camera is None else lambda rows: self._pixels(entry, table, times, rows, where, index),
            metadata=lambda _: dict(entry.metadata),
            observed=True,
        )

    def _joined_actions(self, table: pa.Table, where: str, index: int | None = None) -> Float32[np.ndarray, "R A"]:
        return np.concatenate([self._numbers(table, name, where, index) for name in self._actions], axis=1)

    def _rows(self, entry: EpisodePlace, names: list[str]) -> pa.Table:
        """Return the rows of an episode; a row group with several episodes is decoded once."""
        with table_errors(entry.data, "Parquet"):
            file, starts = self._opened(entry.data)
            there = file.schema_arrow.names
            for name in [*names, "episode_index"]:
                if name not in there:
                    raise DataError(
                        f"{entry.data} has no column {name!r}; got {', '.join(there)}. Restore it and {INFO} from a "
                        f"copy"
                    )
            wanted = [*names, "episode_index", *(name for name in ("timestamp", "frame_index") if name in there)]
            if file.metadata.num_rows < entry.first + entry.length:
                raise DataError(
                    f"{entry.data} has {file.metadata.num_rows} rows, but episode {entry.episode} needs rows "
                    f"{entry.first} to {entry.first + entry.length}. The file is truncated, or does not match the "
                    f"metadata; restore both from a copy"
                )
            end = entry.first + entry.length
            groups = range(np.searchsorted(starts, entry.first, side="right") - 1, np.searchsorted(starts, end))
            parts = []
            for group in groups:
                low, high = max(entry.first - starts[group], 0), min(end, starts[group + 1]) - starts[group]
                parts.append(self._group(entry.data, group, tuple(wanted)).slice(low, high - low))
            table = pa.concat_tables(parts) if parts else file.schema_arrow.empty_table().select(wanted)
            numbers = table["episode_index"].to_numpy()
        strangers = np.flatnonzero(numbers != entry.episode)
        if len(strangers):
            raise DataError(
                f"{entry.data}: row {entry.first + strangers[0]} belongs to episode {numbers[strangers[0]]}; expected "
                f"{entry.episode}, as in the metadata. Data and metadata do not match; restore both from a copy"
            )
        return table

    def _read_group(self, path: Path, group: int, names: tuple[str, ...]) -> pa.Table:
        return self._opened(path)[0].read_row_group(group, columns=list(names))

    def _numbers(self, table: pa.Table, name: str, where: str, index: int | None) -> Float32[np.ndarray, "R n"]:
        """Return a feature, flattened to (R, n); missing values become NaN."""
        column = table[name].combine_chunks()
        size = width(self._meta.features[name])
        kind = column.type
        while is_list(column.type) and column.null_count == 0:
            column = column.flatten()
        if not (is_number(column.type) or pa.types.is_null(column.type)):
            raise DataError(
                f"{where}: column {name!r} has type {kind}; expected numbers, or lists of numbers without nulls. "
                f"Repair the column"
            )
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        if len(values) != table.num_rows * size:
            raise DataError(
                f"{where}: column {name!r} has {len(values)} values in {table.num_rows} rows; expected {size} per row, "
                f"as in {INFO}. Restore both files from a copy"
            )
        return self.single(values.reshape(table.num_rows, size), name, where, index)

    def _clock(self, table: pa.Table, where: str) -> Float64[np.ndarray, "R"]:
        """Return the time of each row in seconds: row / fps if the timestamps agree with it, else the timestamps."""
        ideal = np.arange(table.num_rows) / self._meta.fps
        if "timestamp" not in table.column_names or self.options.pair == "number":
            return ideal
        column = table["timestamp"].combine_chunks()
        if is_list(column.type):
            column = column.flatten()
        if not is_number(column.type) or len(column) != table.num_rows:
            raise DataError(
                f"{where}: column 'timestamp' has type {table['timestamp'].type}; expected one number per row. "
                f"Restore the file from a copy"
            )
        times = timestamps(column, f"{where}: column 'timestamp'")
        steps = np.diff(times)
        if len(steps) and (unit := unit_of(float(np.median(steps)), 1 / self._meta.fps)) is not None:
            raise DataError(
                f"{where}: the timestamps are {np.median(steps):.6g} apart at {self._meta.fps:g} frames per second, so "
                f"that they seem to be in {unit}; expected seconds. Convert them, or use --pair number if the k-th row "
                f"belongs to the k-th frame"
            )
        return ideal if np.allclose(times, ideal, rtol=1e-6, atol=0.01 / self._meta.fps) else times

    def _pixels(
        self,
        entry: EpisodePlace,
        table: pa.Table,
        times: Float64[np.ndarray, "R"],
        rows: Int64[np.ndarray, "N"],
        where: str,
        index: int,
    ) -> UInt8[np.ndarray, "N H W C"]:
        if self._camera in entry.videos:
            return self._video(entry, times, rows, index)
        if self._camera is not None and is_numeric(feature := self._meta.features[self._camera]):
            stored = self._numbers(table, self._camera, where, None)[rows].astype(feature["dtype"])
            return self.to_pixels(stored.reshape(-1, *feature["shape"]), where, entry.episode)
        return self._images(table[self._camera].combine_chunks(), rows, where)

    def _video(
        self, entry: EpisodePlace, times: Float64[np.ndarray, "R"], rows: Int64[np.ndarray, "N"], index: int
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """Return the frame nearest in time for each of these rows."""
        file, start = entry.videos[self._camera or ""]
        with storage_errors(file):
            file.stat()
        if (other := self._sharing.get(entry.episode)) is not None:
            raise DataError(
                f"{file}: episodes {entry.episode} and {other} have the same stretch of the video (episode "
                f"{entry.episode} starts at {start:.4g} s), so one of them would get the frames of the other. Correct "
                f"from_timestamp in the metadata, or merge the datasets again"
            )
        stamps = self._frame_times(file)
        wanted = start + times
        half = 0.5 / self._meta.fps
        between = int(((stamps > wanted[0] - half) & (stamps < wanted[-1] + half)).sum())
        count = len(stamps) if self._shared[file] == 1 else between
        nearest = np.searchsorted((stamps[1:] + stamps[:-1]) / 2, wanted)
        numbered = self._numbered(entry, stamps)
        if numbered is not None and self.options.pair == "number":
            nearest = numbered
        elif count != len(wanted) or np.abs(stamps[nearest] - wanted).max() > half:
            if numbered is not None and (said := clock_difference(wanted, stamps[numbered])) is not None:
                raise DataError(
                    f"{file} has a frame for each of the {len(wanted)} rows of episode {entry.episode}, but {said}. If "
                    f"row k belongs to frame k, use --pair number; otherwise correct the timestamps"
                )
            raise DataError(
                f"{file} has {count} frames for episode {entry.episode}; expected a frame for each of its "
                f"{len(wanted)} rows from {wanted[0]:.4g} s to {wanted[-1]:.4g} s. {_rates(stamps, wanted)}"
            )
        if self._stream is None or self._stream.path != file:
            if self._stream is not None:
                self._stream.close()
            self._stream = FrameStream(file)
        frames = self._stream.read(nearest[rows], self.options.size)
        for kind, what in self._stream.remarks:
            self.note(kind, f"{file}: {what}.", index)
        return frames

    def _find_sharing(self) -> dict[int, int]:
        """Return a mapping from each episode whose stretch of a video overlaps with another's to that other episode."""
        places: dict[Path, list[tuple[float, EpisodePlace]]] = {}
        for entry in self._meta.entries:
            if (video := entry.videos.get(self._camera or "")) is not None:
                file, start = video
                places.setdefault(file, []).append((start, entry))
        found: dict[int, int] = {}
        for stretches in places.values():
            stretches.sort(key=lambda stretch: stretch[0])
            for (first, before), (then, after) in itertools.pairwise(stretches):
                if then < first + (before.length - 0.5) / self._meta.fps:
                    found |= {before.episode: after.episode, after.episode: before.episode}
        return found

    def _numbered(self, entry: EpisodePlace, stamps: Float64[np.ndarray, "F"]) -> Int64[np.ndarray, "R"] | None:
        """Return the frame of each row of an episode, matched by number; None if rows and frames differ in number."""
        file, start = entry.videos[self._camera or ""]
        half = 0.5 / self._meta.fps
        first = 0 if self._shared[file] == 1 else int(np.searchsorted(stamps, start - half))
        count = len(stamps)
        if self._shared[file] > 1:
            count = int(np.searchsorted(stamps, start + (entry.length - 1) / self._meta.fps + half)) - first
        return first + np.arange(entry.length) if count == entry.length else None

    def _images(self, column: Any, rows: Int64[np.ndarray, "N"], where: str) -> UInt8[np.ndarray, "N H W 3"]:
        if not pa.types.is_struct(column.type) or {"bytes", "path"} - {each.name for each in column.type}:
            raise DataError(
                f"{where}: column {self._camera!r} has type {column.type}; expected pictures (bytes and path). "
                f"Convert the column"
            )
        out: np.ndarray | None = None
        for place, row in enumerate(rows):
            what = f"{where}: the picture of {self._camera!r} in row {row}"
            value = column[int(row)].as_py() or {}
            content = value.get("bytes")
            if content is None and value.get("path"):
                file = inside(self.path, str(value["path"]), self.path / INFO)
                content = read_whole(file)
            picture = resize(to_rgb(decode_picture(content, what, values=self._values))[None], self.options.size)[0]
            if out is None:
                out = room_for(len(rows), picture, where)
            if picture.shape != out.shape[1:]:
                raise DataError(
                    f"{what} has shape {picture.shape}; expected {out.shape[1:]}, as in the rows before. Resize all "
                    f"pictures with --size HxW"
                )
            out[place] = picture
        assert out is not None, "an episode has rows"
        return out


def _rates(frames: Float64[np.ndarray, "F"], rows: Float64[np.ndarray, "R"]) -> str:
    """Return a sentence that says whether the rates of frames and rows differ, and what to do."""
    if min(len(frames), len(rows)) > 1:
        video, table = (1 / float(np.median(np.diff(times))) for times in (frames, rows))
        if abs(video / table - 1) > _SAME_RATE:
            return (
                f"Their rates differ: the video has {video:.5g} frames per second and the table {table:.5g} rows, so "
                f"that they drift apart by {abs(1 - table / video):.4g} s in each second. Correct the timestamps and "
                f"the frame rate in {INFO}, or encode the video again"
            )
    return "The video is truncated, or does not match the rows; restore both from a copy"


def _fits(bounds: Bounds | None, size: int) -> bool:
    return bounds is not None and len(bounds[0]) == size


def _open_rows(path: Path) -> tuple[pq.ParquetFile, Int64[np.ndarray, "_"]]:
    """Open a Parquet file; return it and the first row of each row group."""
    try_files("parquet", [path])
    file = pq.ParquetFile(path)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return file, np.cumsum([0, *sizes])


class LeRobotSourceV2(LeRobotSource):
    """A source that reads LeRobot datasets of versions 2.0 and 2.1."""

    major, format = "v2", "lerobot-v21"


class LeRobotSourceV3(LeRobotSource):
    """A source that reads LeRobot datasets of version 3.0."""

    major, format = "v3", "lerobot-v3"


def _states(major: str, path: Path) -> bool:
    """Return whether meta/info.json has this major version; unknown versions count as v3, and opening refuses them."""
    if not (path / INFO).is_file():
        return False
    try:
        info = read_json(path / INFO)
    except StorageError:
        return major == "v3"  # opening reports the problem
    if not isinstance(info, dict) or "codebase_version" not in info:
        return False
    return str(info["codebase_version"]).startswith("v2") == (major == "v2")


add_format(
    LeRobotSourceV2,
    LeRobotSinkV2,
    partial(_states, "v2"),
    "a dataset of LeRobot, version 2.1: meta/info.json, a Parquet file and videos for each episode",
    lossless_pixels=False,
)
add_format(
    LeRobotSourceV3,
    LeRobotSinkV3,
    partial(_states, "v3"),
    "a dataset of LeRobot, version 3.0: meta/info.json, several episodes in each Parquet file and video",
    lossless_pixels=False,
)
