"""LeRobot's datasets, versions 2.1 (2.0) and 3.0, read without the `lerobot` package: Parquet and MP4.

`meta/info.json` names features, the rate and where files lie. Version 2.1 has a Parquet file and a video of each camera
for every episode, version 3.0 several episodes in each file; `meta/episodes` says which rows and which seconds are
whose. Row k shows the frame at its timestamp, and the action that leaves it.
"""

import io
import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int64, UInt8
from PIL import Image, UnidentifiedImageError

from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import read_json, storage_errors
from worldloom.core.types import Episode, ObservationSpec
from worldloom.data import DatasetSpec
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
    natural,
    refuse,
    resize,
)
from worldloom.formats.timebase import align
from worldloom.formats.video import FrameStream, frame_times

INFO, OWN = Path("meta/info.json"), Path("meta/worldloom.json")
METADATA = "worldloom_metadata"  # our metadata of an episode, as JSON text
COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
CHUNK = 1000  # files in a directory, where info.json does not say


@dataclass(frozen=True, kw_only=True)
class EpisodePlace:
    """Where an episode lies: rows from `first` of a Parquet file, and in each camera's video from a second on."""

    episode: int
    length: int
    data: Path
    first: int
    videos: Mapping[str, tuple[Path, float]] = field(default_factory=dict)
    metadata: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the metadata of a dataset say; `range` holds the least and greatest actions, where they are stated."""

    root: Path
    version: str
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    entries: list[EpisodePlace]
    range: tuple[list[float], list[float]] | None
    spec: DatasetSpec | None  # our own

    @classmethod
    def read(cls, root: Path, major: str) -> "Layout":
        """Read the metadata of a dataset of version `v2` or `v3`.

        Raises:
            DataError: another version, or metadata that are damaged or of another layout.
        """
        info = read_json(root / INFO)
        version = str(info.get("codebase_version")) if isinstance(info, dict) else "none"
        if version not in VERSIONS[major]:
            known = ", ".join(each for versions in VERSIONS.values() for each in versions)
            raise DataError(
                f"{root / INFO} states codebase_version {version!r}; expected {' or '.join(VERSIONS[major])} here "
                f"(known: {known}). Convert older or newer datasets with the lerobot package's own scripts"
            )
        with _layout_errors(root / INFO):
            features = dict(info["features"])
            fps = float(info["fps"])
            if not (np.isfinite(fps) and fps > 0):
                raise DataError(f"{root / INFO} states {fps} frames a second; expected a positive number")
            for feature in features.values():
                tuple(feature["shape"])
                str(feature["dtype"])
        cameras = [name for name, feature in features.items() if feature["dtype"] == "video"]
        entries = (_entries_v2 if major == "v2" else _entries_v3)(root, info, cameras)
        if not entries:
            raise DataError(f"{root} holds no episode; expected at least one in meta/episodes")
        spec = DatasetSpec.from_json(json.dumps(read_json(root / OWN)["spec"])) if (root / OWN).exists() else None
        found = _range(root)
        return cls(root=root, version=version, fps=fps, features=features, entries=entries, range=found, spec=spec)


VERSIONS = {"v2": ("v2.1", "v2.0"), "v3": ("v3.0",)}


class LeRobotSource(Source):
    """The episodes of a dataset; consecutive ones that share files are read in one pass."""

    def __init__(self, path: Path, options: ReadOptions, major: str) -> None:
        refuse(options, ["columns"], "LeRobot's layout names its columns")
        self.path, self.options, self.notes = path, options, []
        self._layout = layout = Layout.read(path, major)
        self._file: tuple[Path, Any, Int64[np.ndarray, "G+1"]] | None = None  # and where its row groups begin
        self._groups: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()
        self._stream: FrameStream | None = None
        self._times: tuple[Path, Float64[np.ndarray, "F"]] | None = None
        features, where = layout.features, str(path)
        cameras = [name for name, feature in features.items() if feature["dtype"] in ("video", "image")]
        numeric = [name for name, feature in features.items() if np.dtype("U").kind != _kind(feature)]
        self._camera = choose_camera(cameras, options, where)
        self._shared = Counter(file for entry in layout.entries for file, _ in entry.videos.values())
        observed = [name for name in numeric if name.startswith("observation")]
        self._vector = choose_vector(observed, options, where)
        self._actions = sorted((name for name in numeric if name.partition(".")[0] == "action"), key=natural)
        if not self._actions:
            raise DataError(f"{path / INFO} names no feature 'action'; it has {', '.join(features) or 'nothing'}")
        self._labels = [name for name in numeric if name.startswith("label.")]
        used = {*self._vector, *self._actions, *self._labels, *COUNTERS, self._camera}
        left = sorted(set(features) - used)
        if left:
            what = f"{where}: the features {', '.join(left)} are left out (not chosen, rewards, or not numeric)."
            self.notes.append(Note(kind="dropped", what=what))
        if layout.spec is None:
            what = f"{where}: the last action of each episode leads to no frame and is left out."
            self.notes.append(Note(kind="info", what=what))
        own = layout.spec
        width = sum(_width(features[name]) for name in self._actions)
        found = layout.range if layout.range is not None and len(layout.range[0]) == width else None
        if found is None and own is None:
            found = self._scan(width)
        bounds, notes = choose_bounds(
            options,
            width,
            known=None if own is None else (own.action.low, own.action.high),
            range_of_data=found,
            where=where,
            discrete=own is not None and own.action.discrete,
        )
        self.notes += notes
        name = FORMAT_NAMES[major]
        environment: dict[str, Any] = {"format": name, "source": path.name, "camera": self._camera, "fps": layout.fps}
        environment["vector"] = [[name, _width(features[name])] for name in self._vector]
        if own is not None:
            environment = {**own.environment, "format": name, "source": path.name}
        shape = None
        if self._camera is not None:
            height, width, channels = _picture(features[self._camera], self._camera, path)
            channels = own.observation.pixels[2] if own is not None and own.observation.pixels else channels
            shape = (*(options.size or (height, width)), channels)
        self.spec = DatasetSpec(
            observation=ObservationSpec(pixels=shape, vector=sum(_width(features[name]) for name in self._vector)),
            action=bounds,
            labels={name.removeprefix("label."): _width(features[name]) for name in self._labels},
            environment=environment,
        )
        files = {entry.data for entry in layout.entries}
        files |= {file for entry in layout.entries for key, (file, _) in entry.videos.items() if key == self._camera}
        files |= set((path / "meta").rglob("*.json*")) | set((path / "meta").rglob("*.parquet"))
        self.fingerprint = digest_files((file for file in files if file.exists()), path)

    def __len__(self) -> int:
        return len(self._layout.entries)

    def close(self) -> None:
        """Close the files."""
        if self._stream is not None:
            self._stream.close()
        if self._file is not None:
            self._file[1].close()
        self._stream = self._file = None
        self._groups.clear()

    def read(self, index: int) -> list[Episode]:
        """Return the stretches of an episode."""
        entry = self._layout.entries[index]
        where = f"{entry.data}: episode {entry.episode}"
        names = [*self._vector, *self._actions, *self._labels]
        picture = self._camera if self._layout.features.get(self._camera or "", {}).get("dtype") == "image" else None
        table = self._rows(entry, [*names, *([picture] if picture else [])])
        if table.num_rows == 0:
            self.notes.append(Note(kind="skipped", what=f"{where} is skipped: it has no row.", episode=index))
            return []
        columns = {name: self._numbers(table, name, where) for name in names}
        actions = np.concatenate([columns[name] for name in self._actions], axis=1)
        times = self._clock(table, where)
        stretches, notes = align(
            times,
            times,
            actions,
            where=where,
            rate=self.options.rate,
            how=self.options.actions,
            gap=self.options.gap,
            observed=True,
            episode=index,
        )
        self.notes += notes
        vector = concatenate(columns, self._vector)
        chosen = [stretch.frames for stretch in stretches]
        pixels = self._pixels(entry, table, times, np.concatenate(chosen), where) if chosen and self._camera else None
        episodes: list[Episode] = []
        first = 0
        for part, stretch in enumerate(stretches):
            last = first + len(stretch.frames)
            metadata = dict(entry.metadata) | ({"part": part} if len(stretches) > 1 else {})
            episodes += build_episode(
                self.notes,
                index,
                where,
                pixels=None if pixels is None else np.ascontiguousarray(pixels[first:last]),
                vector=None if vector is None else vector[stretch.rows],
                actions=stretch.actions,
                labels={name.removeprefix("label."): columns[name][stretch.rows] for name in self._labels},
                metadata=metadata,
            )
            first = last
        return episodes

    def _rows(self, entry: EpisodePlace, names: list[str]) -> pa.Table:
        """Return the rows of an episode; a row group that several episodes share is decoded once."""
        import pyarrow.parquet as pq

        with parquet_errors(entry.data):
            if self._file is None or self._file[0] != entry.data:
                if self._file is not None:
                    self._file[1].close()
                opened = pq.ParquetFile(entry.data)
                sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
                self._file = (entry.data, opened, np.cumsum([0, *sizes]))
            _, file, starts = self._file
            there = file.schema_arrow.names
            for name in [*names, "episode_index"]:
                if name not in there:
                    raise DataError(
                        f"{entry.data} has no column {name!r}, which {INFO} names; it has {', '.join(there)}"
                    )
            wanted = [*names, "episode_index", *(name for name in ("timestamp", "frame_index") if name in there)]
            if file.metadata.num_rows < entry.first + entry.length:
                raise DataError(
                    f"{entry.data} has {file.metadata.num_rows} rows; episode {entry.episode} needs rows {entry.first} "
                    f"to {entry.first + entry.length}. It is cut, or of another version; restore it"
                )
            parts = []
            end = entry.first + entry.length
            group = max(int(np.searchsorted(starts, entry.first, side="right")) - 1, 0)
            while group < len(starts) - 1 and starts[group] < end:
                if (entry.data, group) not in self._groups:
                    while len(self._groups) > 1:
                        self._groups.popitem(last=False)
                    self._groups[entry.data, group] = file.read_row_group(group, columns=wanted)
                low, high = max(entry.first - starts[group], 0), min(end, starts[group + 1]) - starts[group]
                parts.append(self._groups[entry.data, group].slice(low, high - low))
                group += 1
            table = pa.concat_tables(parts) if parts else file.schema_arrow.empty_table().select(wanted)
            numbers = table["episode_index"].to_numpy()
        strangers = np.flatnonzero(numbers != entry.episode)
        if len(strangers):
            raise DataError(
                f"{entry.data}: row {entry.first + strangers[0]} is of episode {numbers[strangers[0]]}; the metadata "
                f"say {entry.episode}. Data and metadata are of different versions; restore both"
            )
        return table

    def _numbers(self, table: pa.Table, name: str, where: str) -> Float32[np.ndarray, "R n"]:
        """Return a feature, flattened; what is missing is NaN."""
        column = table[name].combine_chunks()
        width = _width(self._layout.features[name])
        kind = column.type
        while _is_list(column.type) and column.null_count == 0:
            column = column.flatten()
        if not (_is_number(column.type) or pa.types.is_null(column.type)):
            raise DataError(f"{where}: column {name!r} is {kind}; expected numbers, or lists of them without nulls")
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        if len(values) != table.num_rows * width:
            raise DataError(
                f"{where}: column {name!r} holds {len(values)} values in {table.num_rows} rows; {INFO} states {width} "
                f"in each"
            )
        numbers: np.ndarray = values.astype(np.float32).reshape(table.num_rows, width)
        return numbers

    def _clock(self, table: pa.Table, where: str) -> Float64[np.ndarray, "R"]:
        """Return the time of each row: its timestamp, or its number by the rate where these agree (it is exact)."""
        ideal = np.arange(table.num_rows) / self._layout.fps
        if "timestamp" not in table.column_names:
            return ideal
        column = table["timestamp"].combine_chunks()
        if _is_list(column.type):
            column = column.flatten()
        if not _is_number(column.type) or len(column) != table.num_rows:
            raise DataError(f"{where}: column 'timestamp' is {table['timestamp'].type}; expected a number in each row")
        times: np.ndarray = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return ideal if np.allclose(times, ideal, rtol=1e-6, atol=0.01 / self._layout.fps) else times

    def _pixels(
        self,
        entry: EpisodePlace,
        table: pa.Table,
        times: Float64[np.ndarray, "R"],
        rows: Int64[np.ndarray, "N"],
        where: str,
    ) -> UInt8[np.ndarray, "N H W C"]:
        camera = self._camera
        assert camera is not None
        shape = self.spec.observation.pixels
        assert shape is not None
        if camera in entry.videos:
            frames = self._video(entry, times, rows)
        else:
            frames = self._images(entry, table[camera].combine_chunks(), rows, where)
        frames = frames[..., : shape[2]]
        if frames.shape[1:] != shape:
            raise DataError(
                f"{where}: camera {camera!r} has frames of shape {frames.shape[1:]}; {INFO} states {shape}. Give one "
                f"size for all with --size HxW"
            )
        return frames

    def _video(
        self, entry: EpisodePlace, times: Float64[np.ndarray, "R"], rows: Int64[np.ndarray, "N"]
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """Return the frames of these rows, each the one nearest to its time."""
        file, start = entry.videos[self._camera or ""]
        with storage_errors(file):
            file.stat()
        if self._times is None or self._times[0] != file:
            self._times = (file, frame_times(file))
        stamps = self._times[1]
        wanted = start + times
        half = 0.5 / self._layout.fps
        between = int(((stamps > wanted[0] - half) & (stamps < wanted[-1] + half)).sum())
        count = len(stamps) if self._shared[file] == 1 else between
        nearest = np.searchsorted((stamps[1:] + stamps[:-1]) / 2, wanted)
        if count != len(wanted) or np.abs(stamps[nearest] - wanted).max() > half:
            raise DataError(
                f"{file} has {count} frames for episode {entry.episode}, which has {len(wanted)} rows from "
                f"{wanted[0]:.4g} s to {wanted[-1]:.4g} s; expected a frame at each. It is cut, or of another version"
            )
        if self._stream is None or self._stream.path != file:
            if self._stream is not None:
                self._stream.close()
            self._stream = FrameStream(file)
        return self._stream.read(nearest[rows], self.options.size)

    def _images(
        self, entry: EpisodePlace, column: Any, rows: Int64[np.ndarray, "N"], where: str
    ) -> UInt8[np.ndarray, "N H W 3"]:
        if not pa.types.is_struct(column.type) or {"bytes", "path"} - {each.name for each in column.type}:
            raise DataError(f"{where}: column {self._camera!r} is {column.type}; expected pictures (bytes and path)")
        pictures: list[np.ndarray] = []
        for row in rows:
            value = column[int(row)].as_py() or {}
            content = value.get("bytes")
            if content is None and value.get("path"):
                file = _inside(self.path, str(value["path"]), self.path / INFO)
                with storage_errors(file):
                    content = file.read_bytes()
            try:
                with Image.open(io.BytesIO(content or b"")) as opened:
                    picture = np.asarray(opened.convert("RGB"))
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
                raise DataError(
                    f"{where}: the picture of {self._camera!r} in row {row} does not decode ({error}); restore the file"
                ) from error
            if pictures and picture.shape != pictures[0].shape and self.options.size is None:
                raise DataError(
                    f"{where}: the picture of {self._camera!r} in row {row} has shape {picture.shape} and those before "
                    f"{pictures[0].shape}. Give one size for all with --size HxW"
                )
            pictures.append(resize(picture[None], self.options.size)[0])
        return np.stack(pictures)

    def _scan(self, width: int) -> tuple[list[float], list[float]] | None:
        """Return the range of the actions, from the data."""
        low, high = np.full(width, np.inf), np.full(width, -np.inf)
        for entry in self._layout.entries:
            try:
                table = self._rows(entry, self._actions)
                parts = [self._numbers(table, name, str(entry.data)) for name in self._actions]
            except (DataError, StorageError):
                continue  # raised again, or noted, when it is read
            finally:
                self._groups.clear()
            taken = np.concatenate(parts, axis=1).astype(np.float64)
            taken = np.where(np.isfinite(taken), taken, np.nan)
            if len(taken):
                low, high = np.fmin(low, np.fmin.reduce(taken)), np.fmax(high, np.fmax.reduce(taken))
        return (low.tolist(), high.tolist()) if np.isfinite([low, high]).all() else None


@contextmanager
def parquet_errors(path: Path) -> Any:
    """Turn what Parquet raises on `path` into this library's errors."""
    try:
        with storage_errors(path):
            yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); it is cut or damaged. Restore it") from error


@contextmanager
def _layout_errors(path: Path) -> Any:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"{path} is damaged or of another layout ({type(error).__name__}: {error}); restore it from a copy"
        ) from error


def _entries_v2(root: Path, info: Mapping[str, Any], cameras: list[str]) -> list[EpisodePlace]:
    file = root / "meta" / "episodes.jsonl"
    entries = []
    for line in sorted(read_lines(file), key=lambda line: int(line.get("episode_index", 0))):
        with _layout_errors(file):
            number = int(line["episode_index"])
            names = {"episode_chunk": number // int(info.get("chunks_size", CHUNK)), "episode_index": number}
            entry = EpisodePlace(
                episode=number,
                length=int(line["length"]),
                data=_inside(root, str(info["data_path"]).format(**names), root / INFO),
                first=0,
                videos={
                    key: (_inside(root, str(info["video_path"]).format(video_key=key, **names), root / INFO), 0.0)
                    for key in cameras
                },
                metadata=_metadata(number, line.get("tasks"), line.get(METADATA)),
            )
        entries.append(entry)
    return entries


def _entries_v3(root: Path, info: Mapping[str, Any], cameras: list[str]) -> list[EpisodePlace]:
    folder = root / "meta" / "episodes"
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no Parquet file; expected chunk-000/file-000.parquet. Restore meta/")
    rows: list[dict[str, Any]] = []
    for file in files:
        rows += read_rows(file)
    entries: list[EpisodePlace] = []
    with _layout_errors(folder):
        rows.sort(key=lambda row: int(row["episode_index"]))
        starts: dict[tuple[int, int], int] = {}
        for row in rows:
            key = (int(row["data/chunk_index"]), int(row["data/file_index"]))
            starts[key] = min(starts.get(key, int(row["dataset_from_index"])), int(row["dataset_from_index"]))
        for row in rows:
            key = (int(row["data/chunk_index"]), int(row["data/file_index"]))
            data = str(info["data_path"]).format(chunk_index=key[0], file_index=key[1])
            videos = {}
            for camera in cameras:
                place = {name: int(row[f"videos/{camera}/{name}"]) for name in ("chunk_index", "file_index")}
                video = str(info["video_path"]).format(video_key=camera, **place)
                videos[camera] = (_inside(root, video, root / INFO), float(row[f"videos/{camera}/from_timestamp"]))
            number, first = int(row["episode_index"]), int(row["dataset_from_index"])
            length = int(row["length"])
            if int(row["dataset_to_index"]) - first != length:
                raise DataError(
                    f"{folder}: episode {number} has length {length} and rows {first} to {row['dataset_to_index']}; "
                    f"the metadata are damaged. Restore them"
                )
            entries.append(
                EpisodePlace(
                    episode=number,
                    length=length,
                    data=_inside(root, data, root / INFO),
                    first=first - starts[key],
                    videos=videos,
                    metadata=_metadata(number, row.get("tasks"), row.get(METADATA)),
                )
            )
    return entries


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of meta/episodes, without statistics."""
    import pyarrow.parquet as pq

    with parquet_errors(file), pq.ParquetFile(file) as opened:
        names = [name for name in opened.schema_arrow.names if not name.startswith("stats/")]
        rows: list[dict[str, Any]] = opened.read(columns=names).to_pylist()
    return rows


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one JSON object a line."""
    with storage_errors(file):
        text = file.read_text(encoding="utf-8", errors="replace")
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: line {number} is not whole JSON ({error}); restore it from a copy") from error
        if not isinstance(value, dict):
            raise DataError(f"{file}: line {number} is no JSON object; restore it from a copy")
        lines.append(value)
    return lines


def _metadata(number: int, tasks: Any, own: Any) -> dict[str, Any]:
    if own is not None:
        values: dict[str, Any] = json.loads(own)
        return values
    return {"episode": number, "tasks": [str(task) for task in tasks or []]}


def _range(root: Path) -> tuple[list[float], list[float]] | None:
    """Return the least and greatest actions that the statistics state."""
    stated: list[dict[str, Any]] = []
    if (root / "meta" / "stats.json").exists():
        stated.append(read_json(root / "meta" / "stats.json"))
    elif (root / "meta" / "episodes_stats.jsonl").exists():
        stated += [line.get("stats", {}) for line in read_lines(root / "meta" / "episodes_stats.jsonl")]
    found = [stats["action"] for stats in stated if isinstance(stats, dict) and "action" in stats]
    if not found or len(found) < len(stated):
        return None
    with _layout_errors(root / "meta"):
        low = np.min([np.ravel(np.asarray(stats["min"], np.float64)) for stats in found], axis=0)
        high = np.max([np.ravel(np.asarray(stats["max"], np.float64)) for stats in found], axis=0)
    return (low.tolist(), high.tolist()) if np.isfinite([low, high]).all() else None


def _inside(root: Path, name: str, stated: Path) -> Path:
    """Return a path that the dataset names, which must lie in it."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{stated} names the file {name!r}, which lies outside the dataset; correct it")
    return root / name


def _kind(feature: Mapping[str, Any]) -> str:
    """Return numpy's kind of a feature's dtype; text, pictures and the like count as text."""
    try:
        kind = np.dtype(feature["dtype"]).kind
    except TypeError:
        return "U"
    return kind if kind in "fiub" else "U"


def _width(feature: Mapping[str, Any]) -> int:
    return int(np.prod(feature["shape"]))


def _picture(feature: Mapping[str, Any], name: str, path: Path) -> tuple[int, int, int]:
    """Return height, width and channels; some datasets put the channels first."""
    shape = [int(size) for size in feature["shape"]]
    if len(shape) != 3:
        raise DataError(f"{path / INFO}: feature {name!r} has shape {shape}; expected height, width and channels")
    names = [str(each) for each in feature.get("names") or []]
    first = names[0].startswith("channel") if len(names) == 3 else shape[2] not in (1, 3, 4)
    height, width = shape[1:] if first else shape[:2]
    return height, width, 3


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


FORMAT_NAMES = {"v2": "lerobot-v21", "v3": "lerobot-v3"}


class LeRobot(Format):
    """LeRobot's datasets of one major version."""

    lossless_pixels = False

    def __init__(self, major: str, description: str) -> None:
        self.name, self.description, self._major = FORMAT_NAMES[major], description, major

    def detects(self, path: Path) -> bool:
        """Look for meta/info.json and the version that it states; version 3 takes unknown ones, to refuse them."""
        if not (path / INFO).is_file():
            return False
        try:
            info = read_json(path / INFO)
        except StorageError:
            return self._major == "v3"  # opening says what is wrong
        if not isinstance(info, dict) or "codebase_version" not in info:
            return False
        return str(info["codebase_version"]).startswith("v2") == (self._major == "v2")

    def open(self, path: Path, options: ReadOptions) -> Source:
        """Open a dataset."""
        return LeRobotSource(path, options, self._major)

    def create(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> Sink:
        """Begin or go on with a dataset."""
        from worldloom.formats.lerobot_write import LeRobotSinkV2, LeRobotSinkV3

        kind = LeRobotSinkV2 if self._major == "v2" else LeRobotSinkV3
        return kind(path, spec, options, resume=resume)


FORMATS.register(FORMAT_NAMES["v2"])(
    LeRobot("v2", "a dataset of LeRobot, version 2.1: meta/info.json, a Parquet file and videos for each episode")
)
FORMATS.register(FORMAT_NAMES["v3"])(
    LeRobot("v3", "a dataset of LeRobot, version 3.0: meta/info.json, several episodes in each Parquet file and video")
)
