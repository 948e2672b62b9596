"""Writers of LeRobot datasets, versions 2.1 and 3.0; lerobot_layout.py describes the layout.

worldloom's spec is stored in `meta/worldloom.json`, which LeRobot ignores. Labels are features `label.NAME`. The last
row of an episode has a zero action. Pictures are stored as H.264 video in yuv444p or, if lossless, as PNG in the
Parquet files (dtype `image`).
"""

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.files import read_json, storage_errors, write_json, write_text
from worldloom.core.types import Episode
from worldloom.data import encode_picture, float_lists, metadata_json, to_rgb
from worldloom.formats.arrow import table_errors, write_parquet
from worldloom.formats.format import Sink, count_files, spec_values, with_last_action
from worldloom.formats.lerobot_layout import (
    ACTION,
    CAMERA,
    CHUNK,
    COUNTERS,
    INFO,
    LABEL,
    METADATA,
    OWN,
    V2_DATA,
    V2_VIDEO,
    V3_DATA,
    V3_VIDEO,
    VECTOR,
    read_rows,
)
from worldloom.formats.video import LOSSY_CODEC, write_video

Stats = dict[str, dict[str, Any]]  # feature -> min, max, mean, std, count, as lists


class LeRobotSink(Sink):
    """Base class of the sinks for both versions: features, rows, statistics and metadata files."""

    version: str

    layout = "LeRobot's layout"
    forbidden = "/"
    encoded, lossy_codec = True, LOSSY_CODEC

    def begin(self, *, resume: bool) -> int:
        """Prepare the path, and return the number of episodes that an earlier run wrote."""
        path, options = self.path, self.options
        if options.fps != int(options.fps):
            raise ConfigError(f"LeRobot needs an integer frame rate; got fps={options.fps}. Set fps to an integer")
        self.fps, self.lossless = int(options.fps), options.lossless
        self.video = self.spec.observation.pixels is not None and not options.lossless
        there = read_json(path / OWN) if (path / OWN).exists() else None
        wanted = {**spec_values(self.spec), "version": self.version, "write": options.model_dump(mode="json")}
        if there is None:
            if path.exists() and any(path.iterdir()):
                raise DataError(f"{path} already contains other files; choose another path")
            with storage_errors(path):
                path.mkdir(parents=True, exist_ok=True)
            write_json(path / OWN, wanted)
        elif there != wanted:
            raise DataError(
                f"{path} already contains data with other columns, settings or options than the data to write; choose "
                f"another path"
            )
        rows = self.resumed()
        tasks = [task for row in rows for task in row["tasks"]]
        self.tasks = {task: number for number, task in enumerate(dict.fromkeys(tasks))}
        self.frames = sum(int(row["length"]) for row in rows)
        return len(rows)

    @abstractmethod
    def resumed(self) -> list[dict[str, Any]]:
        """Return the entries of meta/episodes for the episodes that an earlier run wrote."""

    @abstractmethod
    def _stats(self) -> list[Stats]:
        """Return the statistics of each saved episode."""

    def features(self) -> dict[str, Any]:
        """Return the description of each column for info.json."""
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
        columns |= {LABEL + name: size for name, size in self.spec.labels.items()}
        found |= {name: {"dtype": "float32", "shape": [size], "names": None} for name, size in columns.items()}
        return found | {name: {"dtype": kind, "shape": [1], "names": None} for name, kind in COUNTERS.items()}

    def task(self, episode: Episode) -> str:
        """Return the task description of an episode, and number it if it is new."""
        tasks = episode.metadata.get("tasks")
        known = tasks[0] if isinstance(tasks, list) and tasks and isinstance(tasks[0], str) else self.options.task
        self.tasks.setdefault(known, len(self.tasks))
        return known

    def table(self, episode: Episode, number: int, task: str) -> tuple[pa.Table, Stats]:
        """Return the rows of an episode, and their statistics."""
        rows = episode.steps + 1
        numbers = {ACTION: with_last_action(episode)}
        if episode.vector is not None:
            numbers[VECTOR] = episode.vector
        numbers |= {LABEL + name: column for name, column in episode.labels.items()}
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
            lists = float_lists(column)
            columns[name] = lists.values if column.shape[1] == 1 else lists
        for name, column in counters.items():
            columns[name], stats[name] = pa.array(column), _describe(column[:, None])
        if episode.pixels is not None:
            frames = to_rgb(episode.pixels)
            stats[CAMERA] = _describe_pixels(frames)
            if self.lossless:
                columns[CAMERA] = pa.array(
                    [{"bytes": encode_picture(frame), "path": None} for frame in frames],
                    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
                )
        return pa.table(columns), stats

    def types(self) -> dict[str, str]:
        """Return metadata for Parquet files from which the `datasets` package recognises pictures."""
        found: dict[str, Any] = {}
        for name, feature in self.features().items():
            value = {"dtype": feature["dtype"], "_type": "Value"}
            if feature["dtype"] == "image":
                found[name] = {"_type": "Image"}
            elif feature["dtype"] != "video":
                size = feature["shape"][0]
                found[name] = value if size == 1 else {"feature": value, "length": size, "_type": "Sequence"}
        return {"huggingface": json.dumps({"info": {"features": found}})}

    def describe(self, info: dict[str, Any]) -> None:
        """Write meta/stats.json and, last, meta/info.json."""
        write_json(self.path / "meta" / "stats.json", _together(self._stats()))
        write_json(
            self.path / INFO,
            {
                "codebase_version": self.version,
                "robot_type": None,
                "total_episodes": self.saved,
                "total_frames": self.frames,
                "total_tasks": len(self.tasks),
                "chunks_size": CHUNK,
                "fps": self.fps,
                "splits": {"train": f"0:{self.saved}"},
                **info,
                "features": self.features(),
            },
        )

    def write_video(self, file: Path, episodes: list[Episode]) -> None:
        """Write one video with these episodes, one after the other."""
        frames = np.concatenate([to_rgb(episode.pixels) for episode in episodes if episode.pixels is not None])
        write_video(file, frames, fps=float(self.fps), crf=self.options.crf, lossless=False)


class LeRobotSinkV2(LeRobotSink):
    """A sink for version 2.1. The Parquet file of an episode is written last, and marks the episode as complete."""

    version = "v2.1"

    def resumed(self) -> list[dict[str, Any]]:
        """Return the lines of meta/episodes.jsonl, read from the metadata of the Parquet files."""
        count = count_files(lambda number: self._file(V2_DATA, number))
        self._lines = [self._described(number, "worldloom") for number in range(count)]
        return self._lines

    def _file(self, pattern: str, number: int) -> Path:
        names = {"episode_chunk": number // CHUNK, "episode_index": number, "video_key": CAMERA}
        return self.path / pattern.format(**names)

    def _described(self, number: int, key: str) -> dict[str, Any]:
        """Return the value of a key in the metadata of an episode's Parquet file."""
        file = self._file(V2_DATA, number)
        with table_errors(file, "Parquet"):
            found = (pq.read_schema(file).metadata or {}).get(key.encode())
        if found is None:
            raise DataError(f"{file} was not written by worldloom; choose another path")
        values: dict[str, Any] = json.loads(found)
        return values

    def save(self, episodes: list[Episode]) -> None:
        """Write the video of an episode, then the table."""
        (episode,), number = episodes, self.saved
        task = self.task(episode)
        table, stats = self.table(episode, number, task)
        line = {
            "episode_index": number,
            "tasks": [task],
            "length": episode.steps + 1,
            METADATA: metadata_json(episode.metadata),
        }
        if self.video:
            self.write_video(self._file(V2_VIDEO, number), episodes)
        described = {"worldloom": json.dumps(line), "stats": json.dumps(stats), **self.types()}
        write_parquet(self._file(V2_DATA, number), table.replace_schema_metadata(described))
        self._lines.append(line)
        self.frames += episode.steps + 1

    def _stats(self) -> list[Stats]:
        return [self._described(number, "stats") for number in range(self.saved)]

    def complete(self) -> None:
        """Write meta/."""
        meta, count = self.path / "meta", self.saved
        _write_lines(meta / "episodes.jsonl", self._lines)
        _write_lines(meta / "tasks.jsonl", [{"task_index": index, "task": task} for task, index in self.tasks.items()])
        stats = [{"episode_index": number, "stats": each} for number, each in enumerate(self._stats())]
        _write_lines(meta / "episodes_stats.jsonl", stats)
        more: dict[str, Any] = {"total_videos": count if self.video else 0, "total_chunks": -(-count // CHUNK)}
        self.describe({**more, "data_path": V2_DATA, "video_path": V2_VIDEO if self.video else None})


class LeRobotSinkV3(LeRobotSink):
    """A sink for version 3.0, with up to 64 MiB or 64 episodes per file.

    A file in meta/episodes is written last, and marks its episodes as complete.
    """

    version = "v3.0"
    most_bytes, most_episodes = 2**26, 64

    def resumed(self) -> list[dict[str, Any]]:
        """Return the rows of meta/episodes."""
        self._files = count_files(self._episodes)
        return [row for number in range(self._files) for row in read_rows(self._episodes(number))]

    def _episodes(self, number: int) -> Path:
        return self.path / f"meta/episodes/chunk-{number // CHUNK:03d}/file-{number % CHUNK:03d}.parquet"

    def save(self, episodes: list[Episode]) -> None:
        """Write the video and the table of these episodes, and last their file in meta/episodes."""
        place = {"chunk_index": self._files // CHUNK, "file_index": self._files % CHUNK}
        tables: list[pa.Table] = []
        rows: list[dict[str, Any]] = []
        first = 0
        for number, episode in enumerate(episodes, self.saved):
            task, length = self.task(episode), episode.steps + 1
            table, stats = self.table(episode, number, task)
            tables.append(table)
            row: dict[str, Any] = {"episode_index": number, "tasks": [task], "length": length}
            row |= {f"data/{name}": value for name, value in place.items()}
            row |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + length}
            if self.video:
                row |= {f"videos/{CAMERA}/{name}": value for name, value in place.items()}
                row |= {f"videos/{CAMERA}/from_timestamp": first / self.fps}
                row |= {f"videos/{CAMERA}/to_timestamp": (first + length) / self.fps}
            row |= {f"stats/{name}/{key}": values for name, each in stats.items() for key, values in each.items()}
            row |= {f"meta/episodes/{name}": value for name, value in place.items()}
            rows.append({**row, METADATA: metadata_json(episode.metadata)})
            first += length
            self.frames += length
        if self.video:
            self.write_video(self.path / V3_VIDEO.format(video_key=CAMERA, **place), episodes)
        data = pa.concat_tables(tables).replace_schema_metadata(self.types())
        largest = max(table.num_rows for table in tables)
        write_parquet(self.path / V3_DATA.format(**place), data, row_group_size=max(largest, 1000))
        write_parquet(self._episodes(self._files), pa.Table.from_pylist(rows))
        self._files += 1

    def _stats(self) -> list[Stats]:
        found: list[Stats] = []
        for row in (row for number in range(self._files) for row in read_rows(self._episodes(number), stats=True)):
            stats: Stats = {}
            for name, values in row.items():
                _, feature, key = name.split("/")
                stats.setdefault(feature, {})[key] = values
            found.append(stats)
        return found

    def complete(self) -> None:
        """Write the remaining files of meta/."""
        write_parquet(self.path / "meta" / "tasks.parquet", self._task_table())
        megabytes = {
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 500,
        }  # LeRobot's defaults
        self.describe({**megabytes, "data_path": V3_DATA, "video_path": V3_VIDEO if self.video else None})

    def _task_table(self) -> pa.Table:
        # The form of a pandas data frame with the tasks as index, which LeRobot expects.
        def column(name: str | None, field: str | None, pandas_type: str, numpy_type: str) -> dict[str, str | None]:
            types = {"pandas_type": pandas_type, "numpy_type": numpy_type}
            return {"name": name, "field_name": field, **types, "metadata": None}

        index = "__index_level_0__"
        described = {
            "index_columns": [index],
            "column_indexes": [column(None, None, "unicode", "object")],
            "columns": [
                column("task_index", "task_index", "int64", "int64"),
                column(None, index, "unicode", "object"),
            ],
            "pandas_version": "2.2.0",
        }
        columns = {"task_index": pa.array(list(self.tasks.values()), pa.int64())}
        table = pa.table({**columns, index: pa.array(list(self.tasks), pa.string())})
        return table.replace_schema_metadata({"pandas": json.dumps(described)})


def _describe(column: np.ndarray) -> dict[str, list[Any]]:
    """Return the statistics of a column (N, n)."""
    wide = column.astype(np.float64)
    found = {"min": wide.min(axis=0), "max": wide.max(axis=0), "mean": wide.mean(axis=0), "std": wide.std(axis=0)}
    return {**{key: values.tolist() for key, values in found.items()}, "count": [len(column)]}


def _describe_pixels(frames: np.ndarray) -> dict[str, list[Any]]:
    """Return the exact statistics of each channel of frames (N, H, W, 3), scaled to [0, 1]."""
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
    """Combine the statistics of parts; the variance follows from the law of total variance."""
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
