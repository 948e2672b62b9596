"""Episodic memory: an agent's past states on disk, found by similarity, time and outcome.

A directory contains `records.lance` (the table), `journal.sqlite` (memories not yet in the table) and `.lock` (held by
the writer). An append is a transaction of the journal. A flush commits the rows to the table, then deletes them from
the journal. Each memory is therefore always in at least one of the two; a reader counts a memory in both only once.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt8
from torch import Tensor

from worldloom.core.closing import Closing
from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import check_private, exclusive_lock, make_private, storage_errors
from worldloom.core.progress import SILENT, Progress
from worldloom.core.seams import WorldModel
from worldloom.core.types import ModelSpec, Observations
from worldloom.core.untrusted import table_files, try_files
from worldloom.data import MissingDataset, compress_frames, decode_frames, floats_of, resize, table_written
from worldloom.memory import forgetting
from worldloom.memory.journal import Journal
from worldloom.memory.records import COLUMNS, Memories, MemoryConfig, MemorySpec, Where, memory_errors

TABLE = "records.lance"  # the table in a memory's directory
_log = logging.getLogger(__name__)
_SMALL = 65_536  # rows; smaller fragments of the table are compacted
_FRAGMENTS = 32  # the table is compacted when it has more fragments
_READERS = timedelta(minutes=10)  # how long old versions are kept for readers
_EVERYTHING = Where()


@dataclass(frozen=True, kw_only=True, eq=False)
class Recalled:
    """The k memories nearest to each of Q queries, nearest first; unused places have id -1 and distance infinity."""

    ids: Int64[np.ndarray, "Q k"]
    distances: Float32[np.ndarray, "Q k"]  # Euclidean, in latent space


class EpisodicMemory(Closing):
    """Memories of one model in a directory: one process may write at a time, any number may read.

    A reader sees the memory as it was when the reader was opened or refreshed. This snapshot stays valid for at least
    ten minutes.

    Raises:
        StorageError: the directory has no memory, cannot be read or written, or another process is writing.
        DataError: a file is damaged, or has a different version of the format.
        CheckpointError: the latents are of another model.
    """

    def __init__(self, path: Path, spec: MemorySpec, *, writable: bool) -> None:
        self.path, self.spec, self.writable = path, spec, writable
        self._release = ExitStack()
        self._journal: Journal | None = None
        self._parts: list[Memories] = []
        self._open_journal()
        self._look()
        if writable:
            last = self._last("id")
            journal = self._writer()
            journal.clear(last)  # an interrupted flush had committed them to the table
            self._next = 1 + max([last, journal.counter("id") - 1, *self._pending.ids[-1:].tolist()])

    @classmethod
    def create(cls, path: Path | str, *, spec: ModelSpec, config: MemoryConfig | None = None) -> "EpisodicMemory":
        """Create an empty memory for latents of a model, and open it for writing."""
        import lance

        path = Path(path)
        if _exists(path):
            raise StorageError(f"{path} already contains a memory; open that memory, or choose another directory")
        make_private(path)
        with memory_errors(path, "write"):
            lance.write_dataset(MemorySpec.of(spec, config or MemoryConfig()).schema().empty_table(), path / TABLE)
            table_written(path / TABLE)
        return cls.open(path, spec=spec, writable=True)

    @classmethod
    def open(cls, path: Path | str, *, spec: ModelSpec | None, writable: bool = False) -> "EpisodicMemory":
        """Open a memory, and check that its latents come from the model of `spec`; None skips the check.

        Raises:
            StorageError: the memory does not exist, is open for writing elsewhere, or other users can read it.
            CheckpointError: the latents are of another model.
        """
        path = Path(path)
        try_files("lance", table_files(path / TABLE), table=path / TABLE)
        held = MemorySpec.read(open_records(path).schema, path)
        check_private(path)
        if spec is not None:
            held.check(spec, path)
        with ExitStack() as stack:
            if writable:
                stack.enter_context(write_lock(path))
            memory = cls(path, held, writable=writable)
            memory._release = stack.pop_all()
            return memory

    @classmethod
    def open_or_create(
        cls, path: Path | str, *, spec: ModelSpec, config: MemoryConfig | None = None
    ) -> "EpisodicMemory":
        """Open a memory for writing, or create it with `config`."""
        if _exists(Path(path)):
            return cls.open(path, spec=spec, writable=True)
        return cls.create(path, spec=spec, config=config)

    def close(self) -> None:
        """Commit the journal to the table, if this is the writer, and release the files."""
        try:
            if self.writable and self._journal is not None:
                self._commit()
                table_written(self.path / TABLE)
        finally:
            if self._journal is not None:
                self._journal.close()
                self._journal = None
            self._release.close()

    def __len__(self) -> int:
        return int(self._table.count_rows()) + self.pending

    @property
    def pending(self) -> int:
        """The number of memories that are in the journal only."""
        return sum(map(len, self._parts))

    @property
    def indexed(self) -> int:
        """The number of memories in the index."""
        return sum(int(index.num_rows_indexed) for index in self._table.describe_indices())

    def new_episodes(self, count: int) -> Int64[np.ndarray, "count"]:
        """Reserve episode numbers; no number is ever used twice, not even after a restart."""
        journal = self._writer()
        past = max(self._last("episode"), int(self._pending.episodes.max(initial=-1)))
        first = max(journal.counter("episode"), 1 + past)
        journal.advance("episode", first + count)
        return np.arange(first, first + count)

    def append(
        self,
        latents: Float[Tensor, "M D"],
        *,
        episodes: Int64[np.ndarray, "M"],
        steps: Int64[np.ndarray, "M"],
        actions: Float[Tensor, "M A"] | None = None,
        times: Float64[np.ndarray, "M"] | None = None,
        surprises: Float32[np.ndarray, "M"] | None = None,
        outcomes: Sequence[str] | None = None,
        observations: Observations | None = None,
    ) -> Int64[np.ndarray, "M"]:
        """Store memories, so that they survive the end of this process; return their ids. Columns: see `Memories`.

        `times` defaults to now. Observations are needed to show memories, or to encode them with another model.
        """
        journal, count = self._writer(), len(latents)
        if count == 0:
            return np.zeros(0, np.int64)
        if outcomes is not None and len(outcomes) != count:
            raise DataError(f"got {len(outcomes)} outcomes for {count} memories; pass one per memory ('' if unknown)")
        memories = Memories(
            ids=np.arange(self._next, self._next + count),
            times=np.full(count, time.time()) if times is None else times,
            episodes=episodes,
            steps=steps,
            latents=latents.detach().cpu().float().numpy(),
            actions=np.zeros((count, self.spec.block_size), np.float32)
            if actions is None
            else actions.detach().cpu().float().numpy(),
            surprises=np.full(count, np.nan, np.float32) if surprises is None else surprises,
            outcomes=np.array([""] * count if outcomes is None else list(outcomes), dtype=str),
        )
        self._check(memories)
        frames = vectors = None
        if observations is not None and self.spec.config.frames != "none":
            self.spec.observation.check(observations)
            if self.spec.frame_shape is not None and observations.pixels is not None:
                pixels = observations.pixels.cpu().numpy()
                frames = compress_frames(resize(pixels, self.spec.frame_shape[:2]))
            if self.spec.vector and observations.vector is not None:
                vectors = observations.vector.cpu().float().numpy()
        journal.append(memories, frames, vectors)
        self._next += count
        self._parts.append(memories)
        if self.pending >= self.spec.config.flush_every:
            self._commit()
            if len(self) > 1.1 * self.spec.config.capacity:
                self.flush()
        return memories.ids

    def flush(self) -> None:
        """Move the journal into the table, forget memories above the capacity, and maintain the table and its index.

        Call this method between episodes, because a flush takes from milliseconds to a few seconds.
        """
        self._commit()
        capacity = self.spec.config.capacity
        if len(self) > capacity:
            self.prune(int(0.9 * capacity))
        self._tend()

    def recall(self, latents: Float[Tensor, "Q D"], k: int, *, where: Where = _EVERYTHING) -> Recalled:
        """Return the `k` memories nearest to each latent, among the memories selected by `where`."""
        if latents.shape[1] != self.spec.latent_dim:
            raise DataError(
                f"expected latents of {self.spec.latent_dim} values, as in {self.path}; got {latents.shape[1]}. Encode "
                f"with the model of this memory"
            )
        queries = latents.detach().cpu().float().numpy()
        ids = np.full((len(queries), k), -1, np.int64)
        distances = np.full((len(queries), k), np.inf, np.float32)
        waiting = self._pending[where.holds(self._pending)]
        for row, query in enumerate(queries):
            found, gaps = self._search(query, k, where.sql())
            found = np.concatenate([found, waiting.ids])
            gaps = np.concatenate([gaps, np.linalg.norm(waiting.latents - query, axis=1)])
            best = np.argsort(gaps, kind="stable")[:k]
            ids[row, : len(best)], distances[row, : len(best)] = found[best], gaps[best]
        return Recalled(ids=ids, distances=distances)

    def read(self, where: Where = _EVERYTHING, *, newest: int | None = None) -> Memories:
        """Return the selected memories in the order of their ids, or only the last `newest` selected memories."""
        memories = self._gather(where.holds(self._pending), where.sql())
        memories = memories[np.argsort(memories.ids)]
        return memories if newest is None else memories[max(0, len(memories) - newest) :]

    def get(self, ids: Int64[np.ndarray, "M"]) -> Memories:
        """Return memories by their ids, in the given order.

        Raises:
            DataError: a memory does not exist, for example because it was forgotten.
        """
        memories = self._gather(np.isin(self._pending.ids, ids), _among(ids))
        return memories[self._places(ids, memories.ids)]

    def pictures(self, ids: Int64[np.ndarray, "M"]) -> UInt8[np.ndarray, "M H W C"]:
        """Return the frames or thumbnails of memories.

        Raises:
            DataError: no frames of these memories were stored.
        """
        shape = self.spec.frame_shape
        frames = None if shape is None else self._kept(ids)[0]
        if shape is None or frames is None or frames.null_count:
            raise DataError(
                f"{self.path} has no frames of these memories. Use a memory whose 'frames' are 'whole' or 'thumbnail', "
                f"and append observations with the memories"
            )
        pixels = np.empty((len(ids), *shape), np.uint8)
        decode_frames(frames, pixels)
        return pixels

    def observations(self, ids: Int64[np.ndarray, "M"]) -> Observations:
        """Return the observations of memories, at full size.

        Raises:
            DataError: the observations were not stored, or were stored only as thumbnails.
        """
        if self.spec.config.frames != "whole":
            raise DataError(
                f"{self.path} was created with frames={self.spec.config.frames!r}, but full-size observations are "
                f"needed. Create a new memory with frames='whole'"
            )
        vector = None
        if self.spec.vector:
            column = self._kept(ids)[1]
            if column is None or column.null_count:
                raise DataError(
                    f"{self.path} has no vectors of these memories; append memories with their observations"
                )
            vector = floats_of(column)[0]
        return Observations.from_numpy(None if self.spec.frame_shape is None else self.pictures(ids), vector)

    def refresh(self) -> bool:
        """Read the changes that other processes have written since the last read; return whether there were any."""
        before = self._table.version, self._pending.ids.tolist()
        if not self.writable:
            self._open_journal()
        self._look()
        return before != (self._table.version, self._pending.ids.tolist())

    def prune(self, keep: int, *, seed: int = 0, progress: Progress = SILENT) -> int:
        """Forget all but `keep` memories (see `worldloom.memory.forgetting`); return the number of forgotten ones."""
        self._writer()
        self._commit()
        memories = self.read()
        kept = forgetting.choose(memories, keep, np.random.default_rng(seed))
        gone = memories.ids[~kept]
        with memory_errors(self.path, "write"), progress.task("forgetting", len(gone), "memory") as task:
            for some in np.array_split(gone, -(-len(gone) // 100_000)) if len(gone) else ():
                self._table.delete(_among(some))
                task.advance(len(some))
        _log.info("forgot %d of %d memories in %s", len(gone), len(memories), self.path)
        return len(gone)

    def reencode(self, model: WorldModel, *, progress: Progress = SILENT, batch: int = 1024) -> None:
        """Encode all memories with another model and replace their latents, in one commit.

        Raises:
            DataError: full-size observations were not stored, or the model expects different observations or blocks.
        """
        import lance

        self._writer()
        self.flush()
        if model.spec.observation != self.spec.observation or model.spec.block_size != self.spec.block_size:
            raise DataError(
                f"{self.path} has observations {self.spec.observation} and blocks of {self.spec.block_size} values, "
                f"but the model expects {model.spec.observation} and blocks of {model.spec.block_size}. Choose a model "
                f"with the same observations and blocks"
            )
        spec = MemorySpec.of(model.spec, self.spec.config)
        ids = self.read().ids

        def batches() -> Iterator[pa.RecordBatch]:
            device = model.device
            with progress.task("encoding memories", len(ids), "memory") as task, torch.inference_mode():
                for some in np.array_split(ids, -(-len(ids) // batch)) if len(ids) else ():
                    latents = model.encode(self.observations(some).to(device)).float().cpu().numpy()
                    memories = replace(self.get(some), latents=latents)
                    yield from memories.arrow(spec, *self._kept(some)).to_batches()
                    task.advance(len(some))

        with memory_errors(self.path, "write"):
            rows = pa.RecordBatchReader.from_batches(spec.schema(), batches())
            lance.write_dataset(rows, self.path / TABLE, mode="overwrite")
        self.spec = spec
        self._look()
        self._tend()

    def stored_bytes(self) -> int:
        """Return the size of the directory in bytes."""
        with storage_errors(self.path):
            return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    @property
    def _pending(self) -> Memories:
        """All memories of the journal."""
        if len(self._parts) != 1:
            self._parts = [Memories.concatenate([_none(self.spec), *self._parts])]
        return self._parts[0]

    def _writer(self) -> Journal:
        if not self.writable or self._journal is None:
            raise StorageError(
                f"the memory {self.path} is closed or open for reading only; open the memory with writable=True"
            )
        return self._journal

    def _open_journal(self) -> None:
        path = self.path / "journal.sqlite"
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self.writable or path.exists():
            self._journal = Journal(path, writable=self.writable, durable=self.spec.config.durable)

    def _look(self) -> None:
        """Read the journal first and the table second, so that a memory moved in between counts once."""
        waiting = self._journal.read(self.spec) if self._journal is not None else _none(self.spec)
        self._table = open_records(self.path)
        self._parts = [waiting[waiting.ids > self._last("id")] if len(waiting) else waiting]

    def _gather(self, waiting: Bool[np.ndarray, "P"], condition: str | None) -> Memories:
        """Return the memories of the table that satisfy an SQL condition, then the `waiting` ones of the journal."""
        with memory_errors(self.path, "read"):
            held = Memories.of_table(self._table.to_table(columns=COLUMNS, filter=condition))
        return Memories.concatenate([held, self._pending[waiting]])

    def _last(self, column: str) -> int:
        """Return the largest number in a column of the table, or -1 if it is empty."""
        with memory_errors(self.path, "read"):
            return int(self._table.to_table(columns=[column])[column].to_numpy().max(initial=-1))

    def _check(self, memories: Memories) -> None:
        """Raise `DataError` if columns do not match the spec, before anything is stored."""
        sizes = (memories.latents.shape[1], memories.actions.shape[1])
        if sizes != (self.spec.latent_dim, self.spec.block_size):
            raise DataError(
                f"expected latents of {self.spec.latent_dim} values and action blocks of {self.spec.block_size}, as in "
                f"{self.path}; got {sizes[0]} and {sizes[1]}. Use the model of this memory"
            )
        for name in ("latents", "actions", "times"):
            if not np.isfinite(getattr(memories, name)).all():
                raise DataError(
                    f"the {name} of a memory are not finite; nothing was appended. Check how the {name} are computed"
                )

    def _commit(self) -> None:
        import lance

        journal = self._writer()
        if not self.pending:
            return
        rows = self._pending.arrow(self.spec, *self._kept(self._pending.ids))
        with memory_errors(self.path, "write"):
            self._table = lance.write_dataset(rows, self.path / TABLE, mode="append")
        journal.clear(int(self._pending.ids[-1]))
        self._parts = []

    def _tend(self) -> None:
        """Compact a table of many fragments, and delete its old versions. Rebuild the index if it lacks many rows."""
        with memory_errors(self.path, "write"):
            if len(self._table.get_fragments()) > _FRAGMENTS:
                self._table.optimize.compact_files(target_rows_per_fragment=_SMALL)
                self._table.cleanup_old_versions(_READERS)
            rows, indexed = int(self._table.count_rows()), self.indexed
            if rows < self.spec.config.index_from or rows - indexed < max(self.spec.config.index_from // 2, rows // 20):
                return
            # Rebuild it with a suitable number of cells: the square root of the number of memories, a common choice
            # for inverted files. Distances within cells stay exact.
            cells = round(float(rows) ** 0.5)
            self._table.create_index("latent", "IVF_FLAT", metric="l2", num_partitions=cells, replace=True)

    def _search(
        self, query: Float32[np.ndarray, "D"], k: int, condition: str | None
    ) -> tuple[Int64[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
        nearest = {"column": "latent", "q": query, "k": k, "nprobes": self.spec.config.probes, "metric": "l2"}
        with memory_errors(self.path, "read"):
            found = self._table.to_table(
                columns=["id", "_distance"], nearest=nearest, filter=condition, prefilter=condition is not None
            )
        squares = np.maximum(found["_distance"].to_numpy(), 0)
        return found["id"].to_numpy(), np.sqrt(squares, dtype=np.float32)

    def _kept(self, ids: Int64[np.ndarray, "M"]) -> tuple[pa.Array | None, pa.Array | None]:
        """Return the columns `pixels` and `vector` of memories, each None if the memory does not store it."""
        names = [name for name in ("pixels", "vector") if name in self.spec.schema().names]
        if not names:
            return None, None
        waiting = np.isin(ids, self._pending.ids)
        tables = []
        if waiting.any():
            assert self._journal is not None
            held, frames, vectors = self._journal.kept(self.spec)
            every = {"id": pa.array(held), "pixels": frames, "vector": vectors}
            tables.append(pa.table({name: every[name] for name in ("id", *names)}))
            moved = ids[waiting & ~np.isin(ids, held)]  # moved into the table by the writer since the last read
            with memory_errors(self.path, "read"):
                tables.append(open_records(self.path).to_table(columns=["id", *names], filter=_among(moved)))
        with memory_errors(self.path, "read"):
            tables.append(self._table.to_table(columns=["id", *names], filter=_among(ids[~waiting])))
        table = pa.concat_tables([each.cast(tables[0].schema) for each in tables])
        table = table.take(self._places(ids, table["id"].to_numpy())).combine_chunks()
        columns = {name: table[name].combine_chunks() for name in names}
        return columns.get("pixels"), columns.get("vector")

    def _places(self, ids: Int64[np.ndarray, "M"], among: Int64[np.ndarray, "N"]) -> Int64[np.ndarray, "M"]:
        """Return the position of each id in a column of ids."""
        order = np.argsort(among)
        places = np.searchsorted(among, ids, sorter=order)
        found = places < len(among)
        found[found] = among[order[places[found]]] == ids[found]
        if not found.all():
            raise DataError(
                f"{self.path} has no memory with id {int(ids[~found][0])}; that memory may have been forgotten. Use "
                f"ids from a new recall"
            )
        return order[places]


def _exists(path: Path) -> bool:
    """Return whether the table of a memory has a version; without one, its creation was interrupted."""
    return any((path / TABLE / "_versions").glob("*.manifest"))


def open_records(path: Path) -> Any:
    """Open the table of the memory at `path`."""
    import lance

    try:
        with memory_errors(path, "read"):
            return lance.dataset(path / TABLE)
    except MissingDataset:
        raise StorageError(f"there is no memory at {path}; check the path, or let an agent create one") from None


def write_lock(path: Path) -> AbstractContextManager[object]:
    """Lock the memory at `path` for one writer."""
    other = StorageError(
        f"another process writes to the memory {path}; wait until that process ends, open the memory for reading, or "
        f"choose another directory"
    )
    return exclusive_lock(path / ".lock", other)


def _none(spec: MemorySpec) -> Memories:
    return Memories.of_table(spec.schema().empty_table())


def _among(ids: Int64[np.ndarray, "M"]) -> str:
    return f"id IN ({', '.join(map(str, ids.tolist()))})" if len(ids) else "false"
