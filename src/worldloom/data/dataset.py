"""Datasets: episodes in one Lance table, with atomic appends of complete episodes and pinned versions."""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int, UInt8

from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.core.types import Episode
from worldloom.core.untrusted import table_files, try_files, written_table
from worldloom.data import layout
from worldloom.data.layout import Unanswered, floats_of, lance_errors
from worldloom.data.retries import each_with_timeout, with_retries, with_timeout
from worldloom.data.spec import DatasetSpec

_log = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
TIMEOUT = 60.0  # seconds; a chunk or a batch of rows needs far less
_UPLOAD = 1e6  # bytes per second; the timeout of an append grows with its size


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """All columns of a dataset except pixels, for N frames. `actions` is zero in the last row of each episode."""

    vector: Float32[np.ndarray, "N V"] | None
    actions: Float32[np.ndarray, "N A"]
    labels: dict[str, Float32[np.ndarray, "N _"]]

    def of(self, rows: slice) -> "Columns":
        """Return the columns of some rows."""
        return Columns(
            vector=None if self.vector is None else self.vector[rows],
            actions=self.actions[rows],
            labels={name: column[rows] for name, column in self.labels.items()},
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Checked:
    """All columns except pixels, checked. `digests` contains a digest per episode, and `frames` a digest per frame."""

    columns: Columns
    metadata: list[str]
    digests: list[str]
    frames: UInt8[np.ndarray, "N 16"] | None


class EpisodeDataset:
    """A dataset of episodes on any storage that Lance supports: a directory, or a URI such as s3://bucket/name.

    Opening pins a version; reopen the dataset to read what other processes append later. An append is one atomic commit
    of complete episodes, so a killed process never leaves a partial episode.

    All content that is read is checked against the digests that were stored with the episodes. Content that was changed
    after it was written raises `DataError`.

    `timeout` is the limit for each request to remote storage, in seconds. Opening and appending repeat requests that
    timed out for up to `retry_seconds`.
    """

    def __init__(
        self,
        path: str | Path,
        table: Any,
        storage_options: dict[str, str] | None,
        *,
        retry_seconds: float = RETRY_SECONDS,
        timeout: float = TIMEOUT,
    ) -> None:
        self.path = path
        self._location = str(path)
        self._storage_options = storage_options
        self.retry_seconds, self.timeout = retry_seconds, timeout
        self.spec, self.format_version = layout.spec_of(table.schema, self._location)
        self._reading = Lock()
        self._pin(table)

    @classmethod
    def create(
        cls, path: str | Path, spec: DatasetSpec, *, storage_options: dict[str, str] | None = None
    ) -> "EpisodeDataset":
        """Create an empty dataset.

        Raises:
            DataError: `path` already contains a dataset.
            StorageError: the storage cannot be written.
        """
        import lance

        where, empty = str(path), layout.table_schema(spec).empty_table()
        with lance_errors(where, "write"):
            table = with_timeout(
                lambda: lance.write_dataset(empty, where, storage_options=storage_options), where, TIMEOUT
            )
        table_written(path)
        return cls(path, table, storage_options)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        version: int | None = None,
        storage_options: dict[str, str] | None = None,
        retry_seconds: float = RETRY_SECONDS,
        timeout: float = TIMEOUT,
    ) -> "EpisodeDataset":
        """Open `version`, or the latest version if `version` is None.

        Raises:
            StorageError: `path` is not a dataset, or the storage cannot be read or does not answer.
            DataError: a file is missing or truncated, an episode is incomplete, the version does not exist, or the
                format version is not supported.
        """

        def attempt() -> "EpisodeDataset":
            table = open_table(path, version=version, storage_options=storage_options, timeout=timeout)
            return cls(path, table, storage_options, retry_seconds=retry_seconds, timeout=timeout)

        return with_retries(attempt, str(path), retry_seconds, doing="opened", retried=(Unanswered,))

    def _pin(self, table: Any) -> None:
        rows = self._whole(table, ["episode", "step"])  # opens every file, which detects truncated files
        numbers, steps = rows["episode"].to_numpy(), rows["step"].to_numpy().astype(np.int64)
        starts = np.flatnonzero(steps == 0)
        counts = np.diff(np.append(starts, len(steps)))
        begins_whole = len(steps) == 0 or steps[0] == 0
        if (
            not begins_whole
            or (counts < 2).any()
            or not np.array_equal(steps, np.arange(len(steps)) - np.repeat(starts, counts))
            or not np.array_equal(numbers, np.repeat(np.arange(len(starts)), counts))
        ):
            raise DataError(
                f"{self._location} has incomplete episodes; run 'worldloom data validate {self._location}' to list "
                f"them, and restore the dataset from a copy"
            )
        self._table, self.starts, self.lengths = table, starts, counts - 1
        self._contents: _Checked | None = None
        # Runs of rows (first, last) whose decoded frames were checked, with a digest of their compressed content.
        # Streaming reads the same runs again and again, and then checks only this digest.
        self._decoded: dict[tuple[int, int], bytes] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"EpisodeDataset({self._location!r}, version={self.version}, episodes={len(self)}, frames={self.frames})"

    @property
    def version(self) -> int:
        """The Lance version that is open."""
        return int(self._table.version)

    @property
    def frames(self) -> int:
        """The number of frames in all episodes."""
        return int(self.lengths.sum()) + len(self)

    def episode(self, index: int) -> Episode:
        """Return one episode, decoded.

        Raises:
            IndexError: the dataset has no episode with this index.
            DataError: a frame does not decode, a value is not finite, or the episode was changed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there is no episode {index}; the dataset has {len(self)} episodes, counted from 0")
        rows = np.arange(self.starts[index], self.starts[index] + self.lengths[index] + 1)
        table = self._take(rows)
        columns = decode_columns(table, self.spec)
        pixels = frames = None
        if self.spec.observation.pixels is not None:
            pixels = layout.empty_frames(len(rows), self.spec.observation.pixels, self._location)
            frames = None if self._episodes_only else layout.digests_of(table["frame_digest"])
            _decode(table["pixels"].combine_chunks(), pixels, rows, self._location, frames)
        metadata = table["metadata"][0].as_py()
        self._check(index, pixels if frames is None else frames, columns, metadata, table["digest"][0].as_py())
        return Episode(
            pixels=pixels,
            vector=columns.vector,
            actions=columns.actions[:-1],
            labels=columns.labels,
            metadata=json.loads(metadata),
        )

    def _check(
        self, index: int, frames: np.ndarray | None, columns: Columns, metadata: str | None, digest: str | None
    ) -> None:
        """Raise `DataError` if an episode does not match its digest."""
        arrays = layout.arrays_digest(frames, columns.vector, columns.actions[:-1], columns.labels)
        if metadata is None or layout.episode_digest(arrays, metadata) != digest:
            raise DataError(
                f"{self._location}: episode {index} was changed after it was written: its digest does not match. "
                f"Restore the dataset from a copy; 'worldloom data validate {self._location}' lists the damage"
            )

    def _checked(self) -> _Checked:
        """Read and check all columns except pixels on the first call, and return them.

        Raises:
            DataError: an episode was changed after it was written.
        """
        with self._reading:
            if self._contents is not None:
                return self._contents
            names = [field.name for field in self._table.schema if field.name not in ("episode", "step", "pixels")]
            table = self._whole(self._table, names)
            columns, frames = decode_columns(table, self.spec), None
            columns.actions[self.starts + self.lengths] = 0.0
            metadata, digests = (table[name].take(pa.array(self.starts)).to_pylist() for name in ("metadata", "digest"))
            if self._episodes_only:
                frames = self._digest_frames()
            else:
                frames = layout.digests_of(table["frame_digest"]) if "frame_digest" in names else None
                for index, digest in enumerate(digests):
                    rows = slice(self.starts[index], self.starts[index] + self.lengths[index] + 1)
                    part = None if frames is None else frames[rows]
                    self._check(index, part, columns.of(rows), metadata[index], digest)
            self._contents = _Checked(columns=columns, metadata=metadata, digests=digests, frames=frames)
            return self._contents

    @property
    def _episodes_only(self) -> bool:
        """Whether only whole episodes can be checked, because the dataset has no digests of frames."""
        return self.format_version == 1 and self.spec.observation.pixels is not None

    def _digest_frames(self) -> UInt8[np.ndarray, "N 16"]:
        """Read and check all episodes, and return the digests of their frames."""
        _log.warning(
            "%s has version 1 of the dataset format, so the check must read all of it; convert it with 'worldloom "
            "data convert %s NEW'",
            self._location,
            self._location,
        )
        parts = [np.zeros((0, layout.FRAME_DIGEST), np.uint8)]
        for index in range(len(self)):
            pixels = self.episode(index).pixels
            assert pixels is not None
            parts.append(layout.frame_digests(pixels))
        return np.concatenate(parts)

    def append(self, episodes: Iterable[Episode]) -> None:
        """Append complete episodes in one commit, and pin the new version. All episodes must fit into memory together.

        Raises:
            DataError: an episode does not match the spec, or another process appended since this dataset was opened.
            StorageError: the disk is full or the storage cannot be written; nothing is appended.
        """
        if self.format_version != layout.VERSION:
            raise DataError(
                f"{self._location} has version {self.format_version} of the dataset format, which is read but no "
                f"longer written. Convert it with 'worldloom data convert {self._location} NEW', and append to NEW"
            )

        def encode(number: int, episode: Any) -> pa.RecordBatch:
            if not isinstance(episode, Episode):
                raise DataError(
                    f"expected an Episode of worldloom.core.types; got {type(episode).__name__}. Convert the data"
                )
            layout.check_episode(episode, self.spec, f"episode {number}")
            return layout.episode_batch(episode, number, self.spec)

        with ThreadPoolExecutor(layout.threads()) as pool:
            batches = list(pool.map(encode, itertools.count(len(self)), episodes))
        if not batches:
            return
        size = sum(batch.nbytes for batch in batches)
        retry = partial(
            with_retries, where=self._location, seconds=self.retry_seconds, doing="written", retried=(Unanswered,)
        )
        added = retry(lambda: self._write(batches, self.timeout + size / _UPLOAD))
        table = retry(lambda: self._commit(added))
        table_written(self.path)
        self._pin(table)
        _log.debug("appended %d episodes to %s as version %d", len(batches), self._location, self.version)

    def _write(self, batches: list[pa.RecordBatch], timeout: float) -> list[Any]:
        """Write data files without adding them to the dataset, and return their Lance fragments."""
        import lance

        def write() -> Any:
            reader = pa.RecordBatchReader.from_batches(batches[0].schema, batches)
            return lance.fragment.write_fragments(
                reader, self._table, mode="append", storage_options=self._storage_options
            )

        with lance_errors(self._location, "write"):
            added: list[Any] = with_timeout(write, self._location, timeout)
        return added

    def _commit(self, added: list[Any]) -> Any:
        """Add the written files to the dataset, and return the new table. If storage does not answer, call it again."""
        import lance
        from lance.commit import CommitConflictError

        there = [fragment.metadata for fragment in self._table.get_fragments()]
        first = max((fragment.id for fragment in there), default=-1) + 1
        for number, fragment in enumerate(added, first):
            fragment.id = number
        # Lance rebases an Append onto another process's append, and both would then use the same episode numbers.
        # A Merge lists all fragments, so it conflicts with every other commit.
        operation = lance.LanceOperation.Merge([*there, *added], self._table.lance_schema)

        def commit() -> Any:
            return lance.LanceDataset.commit(
                self._table, operation, read_version=self.version, storage_options=self._storage_options
            )

        try:
            with lance_errors(self._location, "write"):
                try:
                    return with_timeout(commit, self._location, self.timeout)
                except CommitConflictError as error:
                    raise _Conflict from error
        except (_Conflict, Unanswered) as error:
            # The commit may have succeeded although no answer arrived; its random file names identify it.
            table = open_table(self.path, storage_options=self._storage_options, timeout=self.timeout)
            files = {file.path for fragment in table.get_fragments() for file in fragment.data_files()}
            if all(file.path in files for fragment in added for file in fragment.files):
                return table
            if isinstance(error, Unanswered):
                raise
            raise DataError(
                f"{self._location} was opened at version {self.version}, and another process has appended since then. "
                f"Use one writer at a time, and open the dataset again"
            ) from error

    def metadata(self) -> list[dict[str, Any]]:
        """Return the metadata of each episode."""
        return [json.loads(text) for text in self._checked().metadata]

    def fingerprint(self) -> str:
        """Return a digest of all observations, actions, labels and metadata, in order.

        The digest does not depend on how episodes were grouped into commits. It is computed from the stored digests of
        the episodes, without reading their content. `verify` reads all content and checks it against these digests.
        """
        spec = json.loads(self.spec.to_json())
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([spec["observation"], spec["action"], spec["labels"]], sort_keys=True).encode())
        contents = self._contents
        digests = self._first_rows("digest") if contents is None else contents.digests
        for text in digests:
            digest.update(str(text).encode())
        return digest.hexdigest()

    def verify(self, *, progress: Progress = SILENT) -> str:
        """Read everything, check it against the digests, and return the fingerprint.

        Raises:
            DataError: a frame does not decode, or an episode was changed after it was written.
        """
        self._checked()
        if self.spec.observation.pixels is not None:
            with progress.task("check", self.frames, "frames") as task:
                for part in self.scan_pixels():
                    task.advance(len(part))
        return self.fingerprint()

    def columns(self) -> Columns:
        """Return all columns except pixels, for all frames.

        Raises:
            DataError: an episode was changed after it was written.
        """
        return self._checked().columns

    def pixels(self, rows: Int[np.ndarray, "n"]) -> UInt8[np.ndarray, "n H W C"]:
        """Return the decoded frames of these rows; repeated rows are read only once.

        Frames are checked against their digests. If the same run of rows was checked before, only its compressed
        content is compared with the content of that time.

        Raises:
            DataError: a frame does not decode, or was changed after it was written.
        """
        unique, inverse = np.unique(rows, return_inverse=True)
        out = layout.empty_frames(len(unique), self._shape(), self._location)
        column = self._take(unique, ["pixels"])["pixels"].combine_chunks()
        run, digests = _run_of(unique), self._frame_digests()[unique]
        if run is None:
            _decode(column, out, unique, self._location, digests)
        else:
            digest = layout.compressed_digest(column)
            _decode(column, out, unique, self._location, None if self._decoded.get(run) == digest else digests)
            self._decoded[run] = digest
        return out if len(unique) == len(rows) and np.array_equal(unique, rows) else out[inverse]

    def scan_pixels(
        self, *, batch: int = 1024, out: UInt8[np.ndarray, "N H W C"] | None = None
    ) -> Iterator[UInt8[np.ndarray, "n H W C"]]:
        """Yield all decoded frames in order, at most `batch` at a time, as views of `out` if `out` is given.

        Raises:
            DataError: a frame does not decode, or was changed after it was written.
        """
        row, shape, digests = 0, self._shape(), self._frame_digests()
        with lance_errors(self._location, "read"):
            parts = self._table.to_batches(columns=["pixels"], batch_size=batch)
            for part in each_with_timeout(iter(parts), self._location, self.timeout):
                rows = np.arange(row, row + part.num_rows)
                part_out = None if out is None else out[row : row + len(rows)]
                pixels = layout.empty_frames(len(rows), shape, self._location) if part_out is None else part_out
                _decode(part["pixels"], pixels, rows, self._location, digests[rows])
                row += len(rows)
                yield pixels

    def versions(self) -> list[dict[str, Any]]:
        """Return the versions up to the open one, each with its number, time (ISO 8601) and number of frames."""
        with lance_errors(self._location, "read"):
            return [
                {
                    "version": entry["version"],
                    "time": entry["timestamp"].isoformat(timespec="seconds"),
                    "frames": int(entry["metadata"].get("total_rows", 0)),
                }
                for entry in self._table.versions()
                if entry["version"] <= self.version
            ]

    def stored_bytes(self) -> int:
        """Return the size of this version's data files in bytes."""
        with lance_errors(self._location, "read"):
            files = [file for fragment in self._table.get_fragments() for file in fragment.data_files()]
        return sum(file.file_size_bytes or 0 for file in files)

    def check_frames(self, pixels: UInt8[np.ndarray, "N H W C"], *, progress: Progress = SILENT) -> None:
        """Raise `DataError` unless `pixels`, for example from a cache, are the decoded frames of the dataset."""
        digests = self._frame_digests()
        with progress.task("check", len(pixels), "frames") as task:
            for first in range(0, len(pixels), 1024):
                part = layout.frame_digests(pixels[first : first + 1024])
                wrong = np.flatnonzero((part != digests[first : first + 1024]).any(axis=1))
                if len(wrong):
                    raise DataError(
                        f"frame {first + wrong[0]} of the given pixels is not the frame of {self._location} "
                        f"(the digests differ)"
                    )
                task.advance(len(part))

    def _frame_digests(self) -> UInt8[np.ndarray, "N 16"]:
        frames = self._checked().frames
        assert frames is not None, "the dataset has no pixels"
        return frames

    def _first_rows(self, column: str) -> list[str]:
        """Return a column's text in the first row of each episode."""
        texts: list[str] = self._whole(self._table, [column], filter="step = 0")[column].to_pylist()
        return texts

    def _take(self, rows: Int[np.ndarray, "n"], columns: list[str] | None = None) -> pa.Table:
        with lance_errors(self._location, "read"):
            return with_timeout(lambda: self._table.take(rows, columns=columns), self._location, self.timeout)

    def _whole(self, table: Any, columns: list[str], **options: Any) -> pa.Table:
        """Read complete columns; the timeout applies to each part, not to the total."""
        with lance_errors(self._location, "read"):
            if "://" not in self._location:
                return table.to_table(columns=columns, **options)
            scanner = with_timeout(lambda: table.scanner(columns=columns, **options), self._location, self.timeout)
            parts = list(each_with_timeout(iter(scanner.to_batches()), self._location, self.timeout))
            return pa.Table.from_batches(parts, scanner.projected_schema)

    def _shape(self) -> tuple[int, int, int]:
        if self.spec.observation.pixels is None:
            raise DataError(f"{self._location} has no pixels; read the vectors with columns()")
        return self.spec.observation.pixels


class _Conflict(Exception):
    """Another process committed the version that this commit expected to create."""


def open_table(
    path: str | Path,
    *,
    version: int | None = None,
    storage_options: dict[str, str] | None = None,
    timeout: float = TIMEOUT,
) -> Any:
    """Open the Lance table at `path`, by default its latest version.

    Local files of unknown origin are first read in a child process (see `worldloom.core.untrusted`); files on remote
    storage are not.

    Raises:
        StorageError: `path` is not a dataset, or the storage cannot be read or does not answer.
        DataError: the table is damaged, or `version` does not exist.
    """
    import lance

    where = str(path)
    if (local := _local(path)) is not None:
        try_files("lance", table_files(local), table=local, version=version)
    try:
        with lance_errors(where, "read"):
            table = with_timeout(
                lambda: lance.dataset(where, version=version, storage_options=storage_options), where, timeout
            )
            assert table.schema is not None  # parsed here, where its errors are converted
            return table
    except layout.MissingDataset:
        if version is None:
            raise
        latest = open_table(path, storage_options=storage_options).version
        raise DataError(
            f"{where} has no version {version}; expected 1 to {latest}. 'worldloom data inspect {where}' lists the "
            f"versions"
        ) from None


def table_written(path: str | Path) -> None:
    """Record that this process wrote to the Lance table at `path`, so that `open_table` trusts its new files."""
    if (local := _local(path)) is not None:
        written_table(local)


def _local(path: str | Path) -> Path | None:
    where = str(path).removeprefix("file://")
    return None if "://" in where else Path(where)


def decode_columns(table: pa.Table, spec: DatasetSpec) -> Columns:
    """Return all columns of these rows except pixels."""
    labels = table["label"].combine_chunks() if spec.labels else None
    return Columns(
        vector=floats_of(table["vector"])[0] if spec.observation.vector else None,
        actions=floats_of(table["action"])[0],
        labels={} if labels is None else {name: floats_of(labels.field(name))[0] for name in spec.labels},
    )


def _run_of(rows: Int[np.ndarray, "n"]) -> tuple[int, int] | None:
    """Return the first and last of these sorted rows if they are a run of several rows, else None."""
    if len(rows) < 2 or rows[-1] - rows[0] != len(rows) - 1:
        return None
    return int(rows[0]), int(rows[-1])


def _decode(
    frames: pa.Array,
    out: UInt8[np.ndarray, "n H W C"],
    rows: Int[np.ndarray, "n"],
    path: str,
    digests: UInt8[np.ndarray, "n 16"] | None,
) -> None:
    try:
        layout.decode_frames(frames, out, digests)
    except layout.BadFrame as error:
        raise DataError(
            f"{path}: the frame in row {rows[error.index]} {error.reason}. Restore the dataset from a copy; 'worldloom "
            f"data validate {path}' lists the damage"
        ) from error
