"""Writers of LeRobot's datasets, versions 2.1 and 3.0; their readers and the layout are in lerobot.py.

Our spec stands in `meta/worldloom.json`, which LeRobot ignores; labels are features `label.NAME`; the last row of an
episode holds a zero action. Pictures are H.264 in yuv444p, or, lossless, PNG in the Parquet files (dtype `image`).
"""

import io
import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.files import read_json, storage_errors, write_atomic, write_json, write_text
from worldloom.core.types import Episode
from worldloom.data import DatasetSpec, check_episode, metadata_json
from worldloom.formats.format import Note, Sink, WriteOptions
from worldloom.formats.lerobot import CHUNK, INFO, METADATA, OWN, parquet_errors, read_rows
from worldloom.formats.store import decoded_bytes
from worldloom.formats.video import write_video

CAMERA, VECTOR, ACTION = "observation.image", "observation.state", "action"
FILE_BYTES, FILE_EPISODES = 2**26, 64  # decoded bytes, or episodes, that make a file of version 3.0
_V3_DATA, _V3_VIDEO = (
    "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    ("videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"),
)
_V2_DATA, _V2_VIDEO = (
    "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    ("videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"),
)
_COUNTERS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
Stats = dict[str, dict[str, Any]]  # feature -> min, max, mean, std, count, as lists


class LeRobotSink(Sink):
    """What both versions share: features, rows, statistics, and the files that describe them."""

    version: str

    def __init__(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> None:
        pixels = spec.observation.pixels
        if pixels is not None and pixels[2] not in (1, 3):
            raise DataError(
                f"LeRobot's pictures have 1 or 3 channels; the dataset has {pixels[2]}. Choose another format"
            )
        for name in spec.labels:
            if "/" in name:
                raise DataError(f"label {name!r} holds a '/', which LeRobot does not allow in a name; rename it")
        if options.fps != int(options.fps):
            raise ConfigError(f"LeRobot takes a whole number of frames a second; fps is {options.fps}")
        self.path, self.spec, self.options, self.fps = path, spec, options, int(options.fps)
        self.lossless = options.lossless
        if path.exists() and not resume:
            raise DataError(f"{path} is there already; choose another path, or delete it")
        there = read_json(path / OWN) if (path / OWN).exists() else None
        wanted = {"spec": json.loads(spec.to_json()), "version": self.version, "write": options.model_dump(mode="json")}
        if there is None:
            if path.exists() and any(path.iterdir()):
                raise DataError(f"{path} holds something else; choose another path")
            with storage_errors(path):
                path.mkdir(parents=True, exist_ok=True)
            write_json(path / OWN, wanted)
        elif there != wanted:
            raise DataError(f"{path} holds something else, or was begun with other options; choose another path")
        self.tasks: dict[str, int] = {}
        self.frames = 0

    @abstractmethod
    def _stats(self) -> list[Stats]:
        """Return the statistics of the episodes that are there."""

    def features(self) -> dict[str, Any]:
        """Return what info.json says of each column."""
        found: dict[str, Any] = {}
        if self.spec.observation.pixels is not None:
            height, width, _ = self.spec.observation.pixels
            found[CAMERA] = {
                "dtype": "image" if self.lossless else "video",
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
            }
            if not self.lossless:
                found[CAMERA]["info"] = {
                    "video.height": height,
                    "video.width": width,
                    "video.codec": "h264",
                    "video.pix_fmt": "yuv444p",
                    "video.is_depth_map": False,
                    "video.fps": self.fps,
                    "video.channels": 3,
                    "has_audio": False,
                }
        columns = {ACTION: self.spec.action.size}
        if self.spec.observation.vector:
            columns[VECTOR] = self.spec.observation.vector
        columns |= {f"label.{name}": size for name, size in self.spec.labels.items()}
        found |= {name: {"dtype": "float32", "shape": [size], "names": None} for name, size in columns.items()}
        kinds = {**_COUNTERS, "task_index": "int64"}
        return found | {name: {"dtype": kind, "shape": [1], "names": None} for name, kind in kinds.items()}

    def task(self, episode: Episode) -> str:
        """Return what an episode does in words, and give it a number."""
        tasks = episode.metadata.get("tasks")
        known = tasks[0] if isinstance(tasks, list) and tasks and isinstance(tasks[0], str) else self.options.task
        self.tasks.setdefault(known, len(self.tasks))
        return known

    def table(self, episode: Episode, number: int, task: str) -> tuple[pa.Table, Stats]:
        """Return the rows of an episode, and their statistics."""
        rows = episode.steps + 1
        numbers: dict[str, np.ndarray] = {ACTION: np.concatenate([episode.actions, np.zeros_like(episode.actions[:1])])}
        if episode.vector is not None:
            numbers[VECTOR] = episode.vector
        numbers |= {f"label.{name}": column for name, column in episode.labels.items()}
        steps = np.arange(rows)
        counters: dict[str, np.ndarray] = {
            "timestamp": (steps / self.fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(rows, number),
            "index": self.frames + steps,
            "task_index": np.full(rows, self.tasks[task]),
        }
        stats: Stats = {}
        columns: dict[str, Any] = {}
        for name, column in numbers.items():
            stats[name] = _describe(episode.actions if name == ACTION else column)
            flat = pa.array(np.ascontiguousarray(column).reshape(-1))
            columns[name] = flat if column.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, column.shape[1])
        for name, column in counters.items():
            columns[name], stats[name] = pa.array(column), _describe(column[:, None])
        if episode.pixels is not None:
            frames = rgb(episode.pixels)
            stats[CAMERA] = _describe_pixels(frames)
            if self.lossless:
                columns[CAMERA] = pa.array(
                    [{"bytes": _png(frame), "path": None} for frame in frames],
                    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
                )
        return pa.table(columns), stats

    def types(self) -> dict[str, str]:
        """Return the metadata of a Parquet file by which the `datasets` package tells pictures from other structs."""
        found: dict[str, Any] = {}
        for name, feature in self.features().items():
            value = {"dtype": feature["dtype"], "_type": "Value"}
            if feature["dtype"] == "image":
                found[name] = {"_type": "Image"}
            elif feature["dtype"] != "video":
                size = feature["shape"][0]
                found[name] = value if size == 1 else {"feature": value, "length": size, "_type": "Sequence"}
        return {"huggingface": json.dumps({"info": {"features": found}})}

    def describe(self, episodes: int, info: dict[str, Any]) -> None:
        """Write meta/stats.json and, last, meta/info.json."""
        write_json(self.path / "meta" / "stats.json", _together(self._stats()))
        write_json(
            self.path / INFO,
            {
                "codebase_version": self.version,
                "robot_type": None,
                "total_episodes": episodes,
                "total_frames": self.frames,
                "total_tasks": len(self.tasks),
                "chunks_size": CHUNK,
                "fps": self.fps,
                "splits": {"train": f"0:{episodes}"},
                **info,
                "features": self.features(),
            },
        )

    def notes(self) -> list[Note]:
        """Return what could not be carried."""
        if self.spec.observation.pixels is None or self.lossless:
            return []
        what = f"{self.path}: pixels went through H.264 at crf {self.options.crf} and come back nearly the same only."
        return [Note(kind="info", what=what)]


class LeRobotSinkV2(LeRobotSink):
    """A Parquet file for each episode, written after its video, makes it whole; meta/ is written at the end."""

    version = "v2.1"

    def __init__(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> None:
        super().__init__(path, spec, options, resume=resume)
        self._lines: list[dict[str, Any]] = []
        while self._file(_V2_DATA, len(self._lines)).exists():
            line = self._read(len(self._lines))
            for task in line["tasks"]:
                self.tasks.setdefault(task, len(self.tasks))
            self.frames += int(line["length"])
            self._lines.append(line)
        self.written = len(self._lines)

    def _file(self, pattern: str, number: int) -> Path:
        names = {"episode_chunk": number // CHUNK, "episode_index": number, "video_key": CAMERA}
        return self.path / pattern.format(**names)

    def _read(self, number: int) -> dict[str, Any]:
        import pyarrow.parquet as pq

        file = self._file(_V2_DATA, number)
        with parquet_errors(file):
            found = (pq.read_schema(file).metadata or {}).get(b"worldloom")
        if found is None:
            raise DataError(f"{file} was not written here; choose another path")
        line: dict[str, Any] = json.loads(found)
        return line

    def write(self, episode: Episode) -> None:
        """Write the video, then the table."""
        import pyarrow.parquet as pq

        number = len(self._lines)
        check_episode(episode, self.spec, f"episode {number}")
        task = self.task(episode)
        table, stats = self.table(episode, number, task)
        line = {
            "episode_index": number,
            "tasks": [task],
            "length": episode.steps + 1,
            METADATA: metadata_json(episode.metadata),
        }
        if episode.pixels is not None and not self.lossless:
            file = self._file(_V2_VIDEO, number)
            write_video(file, rgb(episode.pixels), fps=float(self.fps), crf=self.options.crf, lossless=False)
        described = {"worldloom": json.dumps(line), "stats": json.dumps(stats), **self.types()}
        table = table.replace_schema_metadata(described)
        write_atomic(self._file(_V2_DATA, number), lambda temporary: pq.write_table(table, temporary))
        self._lines.append(line)
        self.frames += episode.steps + 1

    def _stats(self) -> list[Stats]:
        import pyarrow.parquet as pq

        found: list[Stats] = []
        for number in range(len(self._lines)):
            file = self._file(_V2_DATA, number)
            with parquet_errors(file):
                found.append(json.loads(pq.read_schema(file).metadata[b"stats"]))
        return found

    def finish(self) -> list[Note]:
        """Write meta/."""
        meta, count = self.path / "meta", len(self._lines)
        _write_lines(meta / "episodes.jsonl", self._lines)
        _write_lines(meta / "tasks.jsonl", [{"task_index": index, "task": task} for task, index in self.tasks.items()])
        stats = [{"episode_index": number, "stats": each} for number, each in enumerate(self._stats())]
        _write_lines(meta / "episodes_stats.jsonl", stats)
        cameras = int(self.spec.observation.pixels is not None and not self.lossless)
        more: dict[str, Any] = {"total_videos": cameras * count, "total_chunks": -(-count // CHUNK)}
        self.describe(count, {**more, "data_path": _V2_DATA, "video_path": _V2_VIDEO if cameras else None})
        return self.notes()


class LeRobotSinkV3(LeRobotSink):
    """Collects up to 64 MiB or 64 episodes for a file; its part of meta/episodes, written last, makes them whole."""

    version = "v3.0"

    def __init__(self, path: Path, spec: DatasetSpec, options: WriteOptions, *, resume: bool) -> None:
        super().__init__(path, spec, options, resume=resume)
        self._pending: list[Episode] = []
        self._bytes = self._files = self.written = 0
        while self._episodes(self._files).exists():
            for row in read_rows(self._episodes(self._files)):
                for task in row["tasks"]:
                    self.tasks.setdefault(task, len(self.tasks))
                self.frames += int(row["length"])
                self.written += 1
            self._files += 1
        self._count = self.written

    def _episodes(self, number: int) -> Path:
        return self.path / f"meta/episodes/chunk-{number // CHUNK:03d}/file-{number % CHUNK:03d}.parquet"

    def write(self, episode: Episode) -> None:
        """Add an episode; a full file is written."""
        check_episode(episode, self.spec, f"episode {self._count + len(self._pending)}")
        self._pending.append(episode)
        self._bytes += decoded_bytes(episode)
        if self._bytes >= FILE_BYTES or len(self._pending) >= FILE_EPISODES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow.parquet as pq

        pending, self._pending, self._bytes = self._pending, [], 0  # a file that failed is not tried again on closing
        if not pending:
            return
        place = {"chunk_index": self._files // CHUNK, "file_index": self._files % CHUNK}
        tables: list[pa.Table] = []
        rows: list[dict[str, Any]] = []
        first = 0
        for number, episode in enumerate(pending, self._count):
            task, length = self.task(episode), episode.steps + 1
            table, stats = self.table(episode, number, task)
            tables.append(table)
            row: dict[str, Any] = {"episode_index": number, "tasks": [task], "length": length}
            row |= {f"data/{name}": value for name, value in place.items()}
            row |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + length}
            if self._video:
                row |= {f"videos/{CAMERA}/{name}": value for name, value in place.items()}
                row |= {f"videos/{CAMERA}/from_timestamp": first / self.fps}
                row |= {f"videos/{CAMERA}/to_timestamp": (first + length) / self.fps}
            row |= {f"stats/{name}/{key}": values for name, each in stats.items() for key, values in each.items()}
            row |= {f"meta/episodes/{name}": value for name, value in place.items()}
            rows.append({**row, METADATA: metadata_json(episode.metadata)})
            first += length
            self.frames += length
        if self._video:
            frames = np.concatenate([rgb(episode.pixels) for episode in pending if episode.pixels is not None])
            file = self.path / _V3_VIDEO.format(video_key=CAMERA, **place)
            write_video(file, frames, fps=float(self.fps), crf=self.options.crf, lossless=False)
        data = pa.concat_tables(tables).replace_schema_metadata(self.types())
        largest = max(table.num_rows for table in tables)
        write_atomic(
            self.path / _V3_DATA.format(**place),
            lambda temporary: pq.write_table(data, temporary, row_group_size=max(largest, 1000)),
        )
        described = pa.Table.from_pylist(rows)
        write_atomic(self._episodes(self._files), lambda temporary: pq.write_table(described, temporary))
        self._files += 1
        self._count += len(pending)

    @property
    def _video(self) -> bool:
        return self.spec.observation.pixels is not None and not self.lossless

    def _stats(self) -> list[Stats]:
        import pyarrow.parquet as pq

        found: list[Stats] = []
        for number in range(self._files):
            with parquet_errors(self._episodes(number)), pq.ParquetFile(self._episodes(number)) as opened:
                names = [name for name in opened.schema_arrow.names if name.startswith("stats/")]
                rows = opened.read(columns=names).to_pylist()
            for row in rows:
                stats: Stats = {}
                for name, values in row.items():
                    _, feature, key = name.split("/")
                    stats.setdefault(feature, {})[key] = values
                found.append(stats)
        return found

    def close(self) -> None:
        """Write whole episodes that wait, after an error elsewhere too."""
        self._flush()

    def finish(self) -> list[Note]:
        """Write the rest, and meta/."""
        self._flush()
        write_atomic(self.path / "meta" / "tasks.parquet", self._write_tasks)
        megabytes = {"data_files_size_in_mb": 100, "video_files_size_in_mb": 500}  # LeRobot's limits; ours are smaller
        paths = {"data_path": _V3_DATA, "video_path": _V3_VIDEO if self._video else None}
        self.describe(self._count, {**megabytes, **paths})
        return self.notes()

    def _write_tasks(self, temporary: Path) -> None:
        # As pandas writes a frame whose index are the tasks, which is how LeRobot reads them.
        import pyarrow.parquet as pq

        index = "__index_level_0__"
        described = {
            "index_columns": [index],
            "column_indexes": [
                {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
            ],
            "columns": [
                {
                    "name": "task_index",
                    "field_name": "task_index",
                    "pandas_type": "int64",
                    "numpy_type": "int64",
                    "metadata": None,
                },
                {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
            ],
            "pandas_version": "2.2.0",
        }
        columns = {"task_index": pa.array(list(self.tasks.values()), pa.int64())}
        table = pa.table({**columns, index: pa.array(list(self.tasks), pa.string())})
        pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(described)}), temporary)


def rgb(frames: np.ndarray) -> np.ndarray:
    """Return frames (N, H, W, 1 or 3) with three channels."""
    return np.repeat(frames, 3 // frames.shape[3], axis=3)


def _png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def _describe(column: np.ndarray) -> dict[str, list[Any]]:
    """Return the statistics of a column (N, n)."""
    wide = column.astype(np.float64)
    found = {"min": wide.min(axis=0), "max": wide.max(axis=0), "mean": wide.mean(axis=0), "std": wide.std(axis=0)}
    return {**{key: values.tolist() for key, values in found.items()}, "count": [len(column)]}


def _describe_pixels(frames: np.ndarray) -> dict[str, list[Any]]:
    """Return the statistics of each channel of frames (N, H, W, 3), in [0, 1]; exact, and one frame at a time."""
    counts = np.zeros((3, 256), np.int64)
    for frame in frames:
        counts += np.stack([np.bincount(frame[..., channel].reshape(-1), minlength=256) for channel in range(3)])
    values = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    there = [values[np.flatnonzero(channel)] for channel in counts]
    found = {"min": [each[0] for each in there], "max": [each[-1] for each in there], "mean": mean, "std": std}
    return {**{key: np.reshape(each, (3, 1, 1)).tolist() for key, each in found.items()}, "count": [len(frames)]}


def _together(stats: list[Stats]) -> Stats:
    """Return the statistics of all from those of parts; variances by the law of total variance."""
    found: Stats = {}
    for name in stats[0] if stats else []:
        parts = [each[name] for each in stats]
        low, high, mean, std = (
            np.array([part[key] for part in parts], np.float64) for key in ("min", "max", "mean", "std")
        )
        counts = np.array([part["count"][0] for part in parts], np.float64)
        share = (counts / counts.sum()).reshape(-1, *[1] * (mean.ndim - 1))
        middle = (share * mean).sum(axis=0)
        spread = np.sqrt((share * (std**2 + (mean - middle) ** 2)).sum(axis=0))
        together = {"min": low.min(axis=0), "max": high.max(axis=0), "mean": middle, "std": spread}
        found[name] = {key: values.tolist() for key, values in together.items()} | {"count": [int(counts.sum())]}
    return found


def _write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
