"""Frames that are streamed from storage during training, in chunks that are prefetched and cached on the local disk."""

import heapq
import logging
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt8
from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import StorageError
from worldloom.core.progress import SILENT, Progress
from worldloom.data.cache import load_cache
from worldloom.data.chunks import ChunkCache
from worldloom.data.dataset import EpisodeDataset
from worldloom.data.frames import Frames
from worldloom.data.retries import with_retries

_log = logging.getLogger(__name__)


class DataConfig(Config):
    """Settings for reading the training data. They do not change the trained parameters.

    `mode`: "cache" decodes everything before training, "stream" reads during training, and "auto" streams only remote
    datasets. `cache_dir` (default: worldloom/chunks in XDG_CACHE_HOME or ~/.cache) is shared by processes and datasets,
    and contains at most `cache_gib` of chunks. With `cache_gib=0` there is no disk cache, and up to `memory_mib` of
    chunks is kept in memory instead. A chunk is `chunk_mib` of consecutive decoded frames. Failed reads are retried for
    `retry_seconds`.
    """

    mode: Literal["auto", "cache", "stream"] = "auto"
    cache_dir: str | None = None
    cache_gib: float = Field(default=50.0, ge=0)
    memory_mib: int = Field(default=256, ge=1)
    chunk_mib: float = Field(default=4.0, gt=0)
    threads: int = Field(default=8, ge=1, le=128)
    retry_seconds: float = Field(default=120.0, ge=0)


def load_frames(dataset: EpisodeDataset, config: DataConfig | None = None, *, progress: Progress = SILENT) -> Frames:
    """Open the frames of a dataset as `config` specifies.

    Raises:
        DataError, StorageError: see `load_cache` and `stream_frames`.
    """
    config = config or DataConfig()
    remote = "://" in str(dataset.path)
    if config.mode == "stream" or (config.mode == "auto" and remote):
        return stream_frames(dataset, config)
    directory = Path(config.cache_dir) if config.cache_dir is not None else (_default_directory() if remote else None)
    return load_cache(dataset, directory=directory, progress=progress)


def stream_frames(dataset: EpisodeDataset, config: DataConfig | None = None) -> Frames:
    """Return the frames of a dataset, read from storage on demand; `load_cache` gives the same training windows.

    Vectors, actions and labels are kept in memory. Prefetching starts at once with the first chunk, up to the budget
    of the disk cache; requested chunks have priority. `close` stops the prefetching.

    Raises:
        StorageError: the storage does not answer within `retry_seconds`.
        DataError: the dataset is damaged.
    """
    config = config or DataConfig()
    where, spec = str(dataset.path), dataset.spec
    columns = with_retries(dataset.columns, where, config.retry_seconds)
    fingerprint = with_retries(dataset.fingerprint, where, config.retry_seconds)
    return Frames(
        spec=spec,
        fingerprint=fingerprint,
        pixels=None if spec.observation.pixels is None else StreamedPixels(dataset, fingerprint, config),
        starts=dataset.starts,
        lengths=dataset.lengths,
        **vars(columns),
    )


class StreamedPixels:
    """Frames indexed by row: `pixels[rows]` reads the chunks that contain these rows."""

    def __init__(self, dataset: EpisodeDataset, fingerprint: str, config: DataConfig) -> None:
        frame = dataset.spec.observation.pixels
        assert frame is not None
        self.shape: tuple[int, ...] = (dataset.frames, *frame)
        self.fetched = 0  # chunks read from storage
        self._dataset, self._config = dataset, config
        self._size = int(np.prod(frame))
        self._length = max(1, int(config.chunk_mib * 2**20) // self._size)  # rows per chunk
        self._chunks = -(-dataset.frames // self._length)
        self._disk = self._open_disk(fingerprint)
        self._memory: OrderedDict[int, UInt8[np.ndarray, "n bytes"]] = OrderedDict()
        self._held = max(1, config.memory_mib * 2**20 // (self._length * self._size))
        self._change = threading.Condition()
        self._queue: list[tuple[int, int]] = []  # priority (0: requested), chunk
        self._pending: dict[int, Future[UInt8[np.ndarray, "n bytes"]]] = {}
        self._closed = threading.Event()
        self._warned = False
        if self._disk is not None:
            # The position is the priority, after all requested chunks.
            chunks = list(range(min(self._chunks, self._fit())))
            self._queue = [(1 + place, chunk) for place, chunk in enumerate(self._ranks_apart(chunks))]
        self._threads = [
            threading.Thread(target=self._work, name=f"stream-{index}", daemon=True)
            for index in range(min(config.threads, max(self._chunks, 1)))
        ]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any, /) -> UInt8[np.ndarray, "*shape H W C"]:
        """Return the frames of these rows: an integer, an array of integers of any shape, or a slice.

        Raises:
            IndexError: a row does not exist.
            StorageError: the storage did not answer within `retry_seconds`.
            DataError: a frame did not decode in several attempts.
        """
        wanted = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        if wanted.size and not -len(self) <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} are out of range; there are {len(self)} rows")
        flat = wanted.reshape(-1).astype(np.int64)
        unique, inverse = np.unique(np.where(flat < 0, flat + len(self), flat), return_inverse=True)
        out = np.empty((len(unique), self._size), np.uint8)
        chunks, firsts = np.unique(unique // self._length, return_index=True)
        bounds = np.append(firsts, len(unique))
        missing = []
        for index, chunk in enumerate(chunks.tolist()):
            part = slice(bounds[index], bounds[index + 1])
            if not self._local(chunk, unique[part] - chunk * self._length, out[part]):
                missing.append((part, chunk))
        # Requested a few at a time, to limit the number of chunks in memory.
        ahead = 2 * len(self._threads)
        waiting = [self._ask(chunk) for _, chunk in missing[:ahead]]
        for index, (part, chunk) in enumerate(missing):
            content = waiting[index].result()
            out[part] = content[unique[part] - chunk * self._length]
            waiting[index] = Future()  # releases the chunk
            if index + ahead < len(missing):
                waiting.append(self._ask(missing[index + ahead][1]))
        same = len(unique) == len(flat) and np.array_equal(unique, flat)
        return (out if same else out[inverse.reshape(-1)]).reshape(*wanted.shape, *self.shape[1:])

    def expect(self, spans: Int64[np.ndarray, "S 2"]) -> None:
        """Prefetch the chunks with these spans of rows (first and last row of each); cancel earlier prefetching.

        Chunks that do not fit into the cache are left out, with a warning.
        """
        runs = [np.arange(first // self._length, last // self._length + 1) for first, last in spans.tolist()]
        chunks, places = np.unique(np.concatenate([np.zeros(0, np.int64), *runs]), return_index=True)
        chunks = chunks[np.argsort(places)]
        fit = self._fit()
        if len(chunks) > fit and not self._warned:
            self._warned = True
            _log.warning(
                "the next draws need %d chunks of %.3g MiB, but only %d fit into the cache, so chunks are read more "
                "than once. Raise data.cache_gib (or data.memory_mib without a disk cache), or lower "
                "training.pool_windows",
                len(chunks),
                self._length * self._size / 2**20,
                fit,
            )
        ahead = self._ranks_apart(chunks[:fit].tolist())
        with self._change:
            requested = [entry for entry in self._queue if entry[0] == 0]
            self._queue = requested + [(1 + place, chunk) for place, chunk in enumerate(ahead)]
            heapq.heapify(self._queue)
            self._change.notify_all()

    def close(self) -> None:
        """Stop the threads; a pending read raises `StorageError`."""
        with self._change:
            self._closed.set()
            self._change.notify_all()
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(
                        StorageError(f"{self._dataset.path} was closed during a read; open the dataset again")
                    )
            self._pending.clear()
        for thread in self._threads:
            thread.join()

    def _open_disk(self, fingerprint: str) -> ChunkCache | None:
        config = self._config
        if config.cache_gib == 0:
            return None
        directory = _default_directory() if config.cache_dir is None else Path(config.cache_dir).expanduser()
        try:
            return ChunkCache(directory, f"{fingerprint}-{self._length}", int(config.cache_gib * 2**30))
        except (StorageError, OSError) as error:
            _log.warning("the disk cache cannot be used: %s. Chunks are cached in memory, up to data.memory_mib", error)
            return None

    def _fit(self) -> int:
        """Return the number of chunks that fit into the cache; eviction on disk may leave an eighth of it empty."""
        disk = self._disk
        return self._held if disk is None else int(disk.budget * 7 / 8) // (self._length * self._size)

    def _ranks_apart(self, chunks: list[int]) -> list[int]:
        """Rotate the chunks by the local rank, so that ranks that share the cache begin with different chunks."""
        ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        first = len(chunks) * (int(os.environ.get("LOCAL_RANK", "0")) % ranks) // ranks
        return chunks[first:] + chunks[:first]

    def _local(self, chunk: int, rows: Int64[np.ndarray, "n"], out: UInt8[np.ndarray, "n bytes"]) -> bool:
        with self._change:
            held = self._memory.get(chunk)
            if held is not None:
                self._memory.move_to_end(chunk)
        if held is not None:
            out[:] = held[rows]
            return True
        return self._disk is not None and self._disk.read(chunk, rows, self._size, self._rows_of(chunk), out)

    def _rows_of(self, chunk: int) -> int:
        return min(self._length, len(self) - chunk * self._length)

    def _ask(self, chunk: int) -> "Future[UInt8[np.ndarray, 'n bytes']]":
        with self._change:
            if self._closed.is_set():
                raise StorageError(f"{self._dataset.path} is closed; open the dataset again")
            if chunk not in self._pending:
                self._pending[chunk] = Future()
                heapq.heappush(self._queue, (0, chunk))
                self._change.notify()
            return self._pending[chunk]

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._queue and not self._closed.is_set():
                    self._change.wait()
                if self._closed.is_set():
                    return
                priority, chunk = heapq.heappop(self._queue)
                if priority:
                    if (
                        chunk in self._pending
                        or chunk in self._memory
                        or (self._disk is not None and chunk in self._disk)
                    ):
                        continue
                    self._pending[chunk] = Future()
            self._bring(chunk)

    def _bring(self, chunk: int) -> None:
        """Fetch a chunk, cache it, and complete the pending read."""
        future = self._pending.get(chunk)
        content: UInt8[np.ndarray, "n bytes"] | None = None
        failure: Exception | None = None
        try:
            content = self._fetch(chunk)
            self._keep(chunk, content)
        except Exception as error:  # raised in the pending read; a failed prefetch is retried on request
            _log.debug("chunk %d: %s", chunk, error)
            failure = error
        with self._change:
            self._pending.pop(chunk, None)
            if future is None or future.done():  # closed meanwhile
                return
            if failure is not None:
                future.set_exception(failure)
            elif content is not None:
                future.set_result(content)

    def _fetch(self, chunk: int) -> UInt8[np.ndarray, "n bytes"]:
        first = chunk * self._length
        rows = np.arange(first, first + self._rows_of(chunk))
        where = f"rows {first} to {rows[-1]} of {self._dataset.path}"
        content = with_retries(
            lambda: self._dataset.pixels(rows), where, self._config.retry_seconds, stopped=self._closed
        )
        with self._change:
            self.fetched += 1
        return content.reshape(len(rows), -1)

    def _keep(self, chunk: int, content: UInt8[np.ndarray, "n bytes"]) -> None:
        disk = self._disk
        if disk is not None:
            try:
                disk.write(chunk, content.reshape(-1))
            except (StorageError, OSError) as error:
                _log.warning(
                    "the disk cache is disabled: %s. Chunks are cached in memory, up to data.memory_mib", error
                )
                with self._change:
                    self._disk = None
            else:
                return
        with self._change:
            self._memory[chunk] = content
            while len(self._memory) > self._held:
                self._memory.popitem(last=False)


def _default_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "worldloom" / "chunks"
