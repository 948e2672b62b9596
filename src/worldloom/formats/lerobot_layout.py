"""The layout of LeRobot datasets, versions 2.0, 2.1 and 3.0, and their metadata.

`meta/info.json` contains the features, the frame rate and the paths of the files. Version 2.1 has a Parquet file and
one video per camera for every episode. Version 3.0 has several episodes in each file; `meta/episodes` contains the
rows of each episode, and the time at which it starts in a video. Row k contains the observation at its timestamp
(pixels may be in a video instead), and the action taken then.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from worldloom.core.errors import DataError
from worldloom.core.files import lines_of, read_json
from worldloom.core.untrusted import try_files
from worldloom.data import DatasetSpec
from worldloom.formats.arrow import table_errors
from worldloom.formats.format import Bounds, files_below, spec_in

INFO, OWN = Path("meta/info.json"), Path("meta/worldloom.json")
METADATA = "worldloom_metadata"  # worldloom's metadata of an episode, as JSON text
CHUNK = 1000  # files per directory, if info.json does not contain it
CAMERA, VECTOR, ACTION, LABEL = "observation.image", "observation.state", "action", "label."
COUNTERS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
V2_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V2_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
V3_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
V3_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_MOST_EPISODES = 2**20  # in one file, because all are kept in memory
VERSIONS = {"v2": ("v2.1", "v2.0"), "v3": ("v3.0",)}


@dataclass(frozen=True, kw_only=True)
class EpisodePlace:
    """The place of an episode: `length` rows of the Parquet file `data` from row `first` on, and its videos.

    `videos` maps each camera to a video file and to the time in seconds at which the episode starts in that file.
    """

    episode: int
    length: int
    data: Path
    first: int
    videos: Mapping[str, tuple[Path, float]] = field(default_factory=dict)
    metadata: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The metadata of a dataset; `range` is the minimum and maximum of actions, if the statistics contain them.

    `remarks` are sentences about counts in the metadata that disagree.
    """

    fps: float
    features: Mapping[str, Mapping[str, Any]]
    entries: list[EpisodePlace]
    range: Bounds | None
    remarks: list[str]
    spec: DatasetSpec | None  # if worldloom wrote the dataset

    @classmethod
    def read(cls, root: Path, major: str) -> "Layout":
        """Read the metadata of a dataset of version `v2` or `v3`.

        Raises:
            DataError: the version is not supported, or the metadata are damaged or do not follow the layout.
        """
        info = read_json(root / INFO)
        version = str(info.get("codebase_version")) if isinstance(info, dict) else "none"
        if version not in VERSIONS[major]:
            known = ", ".join(each for versions in VERSIONS.values() for each in versions)
            raise DataError(
                f"{root / INFO} has codebase_version {version!r}; expected {' or '.join(VERSIONS[major])} for this "
                f"format (supported: {known}). Convert other versions with the scripts of the lerobot package"
            )
        with _layout_errors(root / INFO):
            features = dict(info["features"])
            fps = float(info["fps"])
            if not (np.isfinite(fps) and fps > 0):
                raise DataError(f"{root / INFO} has fps {fps}; expected a positive number. Correct the file")
            for feature in features.values():
                tuple(feature["shape"])
                str(feature["dtype"])
        cameras = [name for name, feature in features.items() if feature["dtype"] == "video"]
        entries = (_entries_v2 if major == "v2" else _entries_v3)(root, info, cameras)
        if not entries:
            raise DataError(f"{root} has no episodes; expected at least one in its metadata. Restore meta/ from a copy")
        spec = spec_in(read_json(root / OWN) if (root / OWN).exists() else {})
        remarks = []
        once = [entry for entry, after in zip(entries, [*entries[1:], None], strict=True) if entry != after]
        if len(once) < len(entries):
            twice = len(entries) - len(once)
            remarks.append(f"{root}: {twice} episodes are stated twice in the metadata; each is read once.")
        for entry, after in itertools.pairwise(once):
            if entry.episode == after.episode:
                raise DataError(
                    f"{root} states episode {entry.episode} twice, with different values. Restore meta/ from a copy"
                )
        for name, count in (("total_episodes", len(once)), ("total_frames", sum(entry.length for entry in once))):
            if isinstance(info.get(name), int) and info[name] != count:
                remarks.append(f"{root / INFO} has {name} {info[name]}, but the episodes make {count}.")
        return cls(fps=fps, features=features, entries=once, range=_range(root), remarks=remarks, spec=spec)


@contextmanager
def _layout_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"{path} does not follow LeRobot's layout ({type(error).__name__}: {error}). Restore the dataset from a "
            f"copy, or write the dataset again with LeRobot"
        ) from error


def _entries_v2(root: Path, info: Mapping[str, Any], cameras: list[str]) -> list[EpisodePlace]:
    file = root / "meta" / "episodes.jsonl"
    entries = []
    with _layout_errors(file):
        lines = sorted(read_lines(file), key=lambda line: _whole(line, "episode_index"))
        for line in lines:
            number = _whole(line, "episode_index")
            names = {"episode_chunk": number // max(1, _whole({"chunks_size": CHUNK, **info}, "chunks_size"))}
            names["episode_index"] = number
            videos = {key: (_named(root, info, "video_path", video_key=key, **names), 0.0) for key in cameras}
            entries.append(_place(line, _named(root, info, "data_path", **names), 0, videos))
    return entries


def _entries_v3(root: Path, info: Mapping[str, Any], cameras: list[str]) -> list[EpisodePlace]:
    folder = root / "meta" / "episodes"
    files = [file for file in files_below(folder) if file.suffix == ".parquet"]
    if not files:
        raise DataError(
            f"{folder} has no Parquet files; expected chunk-000/file-000.parquet. Restore meta/ from a copy"
        )
    rows = [row for file in files for row in read_rows(file)]
    entries: list[EpisodePlace] = []
    with _layout_errors(folder):
        rows.sort(key=lambda row: _whole(row, "episode_index"))
        starts: dict[Path, int] = {}  # the row of the dataset with which a file begins
        for row in rows:
            data = _named(root, info, "data_path", **_numbered(row, "data"))
            first = _whole(row, "dataset_from_index")
            starts[data] = min(starts.get(data, first), first)
        for row in rows:
            data = _named(root, info, "data_path", **_numbered(row, "data"))
            videos = {}
            for key in cameras:
                video = _named(root, info, "video_path", video_key=key, **_numbered(row, f"videos/{key}"))
                videos[key] = (video, float(row[f"videos/{key}/from_timestamp"]))
            first, last = _whole(row, "dataset_from_index"), _whole(row, "dataset_to_index")
            entries.append(_place(row, data, first - starts[data], videos))
            if last - first != entries[-1].length:
                raise DataError(
                    f"{folder}: episode {entries[-1].episode} has length {entries[-1].length} but rows {first} to "
                    f"{last}; the metadata are damaged. Restore them from a copy"
                )
    return entries


def _named(root: Path, info: Mapping[str, Any], pattern: str, **names: Any) -> Path:
    """Fill these names into a path pattern of info.json, and return the path.

    Only `{NAME}` and `{NAME:0Nd}` are replaced, because other format specifications can read attributes, or fill all
    memory with spaces.
    """
    text = info[pattern]
    if not isinstance(text, str):
        raise TypeError(f"{pattern} is {text!r}; expected a text")

    def fill(found: re.Match[str]) -> str:
        value = names[found["name"]]
        return str(value) if found["digits"] is None else f"{value:0{int(found['digits'])}d}"

    path = re.sub(r"\{(?P<name>\w+)(?::0(?P<digits>[1-9])d)?\}", fill, text)
    if "{" in path or "}" in path:
        raise ValueError(f"{pattern} is {text!r}; expected names in braces, such as {{episode_index:06d}}")
    return inside(root, path, root / INFO)


def _whole(row: Mapping[str, Any], name: str) -> int:
    """Return an integer of the metadata that is at least 0."""
    value = row[name]
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"{name} is {value!r}; expected an integer from 0 on")
    return value


def _numbered(row: Mapping[str, Any], prefix: str) -> dict[str, int]:
    return {name: _whole(row, f"{prefix}/{name}") for name in ("chunk_index", "file_index")}


def _place(row: Mapping[str, Any], data: Path, first: int, videos: Mapping[str, tuple[Path, float]]) -> EpisodePlace:
    """Return the location of the episode that a row of meta/episodes describes."""
    number, own = _whole(row, "episode_index"), row.get(METADATA)
    foreign = {"episode": number, "tasks": [str(task) for task in row.get("tasks") or []]}
    return EpisodePlace(
        episode=number,
        length=_whole(row, "length"),
        data=data,
        first=first,
        videos=videos,
        metadata=foreign if own is None else json.loads(own),
    )


def read_rows(file: Path, *, stats: bool = False) -> list[dict[str, Any]]:
    """Return the rows of a file of meta/episodes without the statistics; with `stats`, return only the statistics."""
    try_files("parquet", [file])
    with table_errors(file, "Parquet"), pq.ParquetFile(file) as opened:
        if opened.metadata.num_rows > _MOST_EPISODES:
            raise DataError(
                f"{file} has {opened.metadata.num_rows:,} rows, one per episode; at most {_MOST_EPISODES:,} are read. "
                f"Split the dataset"
            )
        names = [name for name in opened.schema_arrow.names if name.startswith("stats/") == stats]
        rows: list[dict[str, Any]] = opened.read(columns=names).to_pylist()
    return rows


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file with one object per line."""
    lines = []
    for number, line in enumerate(lines_of(file), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8", errors="replace"))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}: line {number} is not valid JSON ({error}); restore the file from a copy"
            ) from error
        if not isinstance(value, dict):
            raise DataError(f"{file}: line {number} is not a JSON object; restore the file from a copy")
        lines.append(value)
    return lines


def _range(root: Path) -> Bounds | None:
    """Return the minimum and maximum of actions from the statistics, or None if the statistics lack them."""
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


def inside(root: Path, name: str, stated: Path) -> Path:
    """Return the path of the file `name`, to which `stated` refers; the path must be inside the dataset `root`."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{stated} refers to the file {name!r} outside of the dataset; correct the path")
    return root / name


def is_numeric(feature: Mapping[str, Any]) -> bool:
    """Return whether a feature contains numbers, rather than for example text or pictures."""
    try:
        return np.dtype(feature["dtype"]).kind in "fiub"
    except TypeError:
        return False


def width(feature: Mapping[str, Any]) -> int:
    """Return the number of values in a row of a feature."""
    return int(np.prod(feature["shape"]))


def picture_shape(feature: Mapping[str, Any], name: str, path: Path) -> tuple[int, int]:
    """Return the height and width of a camera; some datasets have the channels first."""
    shape = [int(size) for size in feature["shape"]]
    if len(shape) != 3:
        raise DataError(
            f"{path / INFO}: feature {name!r} has shape {shape}; expected height, width and channels. Correct the file"
        )
    names = [str(each) for each in feature.get("names") or []]
    first = names[0].startswith("channel") if len(names) == 3 else shape[2] not in (1, 3, 4)
    return (shape[1], shape[2]) if first else (shape[0], shape[1])
