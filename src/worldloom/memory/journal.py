"""The journal: appended memories that are not in the table yet, in SQLite with a write-ahead log."""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64

from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import check_private, storage_errors
from worldloom.data import float_lists
from worldloom.memory.records import Memories, MemorySpec

_TABLES = """
CREATE TABLE IF NOT EXISTS pending (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, episode INTEGER NOT NULL, step INTEGER NOT NULL,
    latent BLOB NOT NULL, action BLOB NOT NULL, surprise REAL, outcome TEXT NOT NULL, pixels BLOB, vector BLOB
);
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""


class Journal:
    """An SQLite file with the memories that are not in the table yet, and with counters for ids and episodes.

    Raises:
        DataError: the file is damaged.
        StorageError: the disk is full, the directory cannot be written, or other users can read the file.
    """

    def __init__(self, path: Path, *, writable: bool, durable: bool = False) -> None:
        self.path = path
        with self._errors():
            if path.exists():
                check_private(path)
            if writable:
                with storage_errors(path):
                    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite would let others read the file
                self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                self._check_schema(self._database)
                self._database.execute("PRAGMA journal_mode = WAL")
                # With NORMAL, an append survives the end of the process, but not a power cut.
                self._database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._database.executescript(_TABLES)
            else:
                self._database = self._open_to_read()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def append(self, memories: Memories, frames: pa.Array | None, vectors: Float32[np.ndarray, "M V"] | None) -> None:
        """Add rows atomically; after the call, they survive the end of the process."""
        rows = [
            (
                int(memories.ids[row]),
                float(memories.times[row]),
                int(memories.episodes[row]),
                int(memories.steps[row]),
                memories.latents[row].tobytes(),
                memories.actions[row].tobytes(),
                None if np.isnan(memories.surprises[row]) else float(memories.surprises[row]),
                str(memories.outcomes[row]),
                None if frames is None else frames[row].as_py(),
                None if vectors is None else vectors[row].tobytes(),
            )
            for row in range(len(memories))
        ]
        with self._transaction():
            self._database.executemany("INSERT INTO pending VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            self._count("id", int(memories.ids[-1]) + 1)

    def read(self, spec: MemorySpec) -> Memories:
        """Return the pending memories."""
        with self._errors():
            rows = self._database.execute(
                "SELECT id, time, episode, step, latent, action, surprise, outcome FROM pending ORDER BY id"
            ).fetchall()
        columns = list(zip(*rows, strict=True)) or [()] * 8
        return Memories(
            ids=np.array(columns[0], np.int64),
            times=np.array(columns[1], np.float64),
            episodes=np.array(columns[2], np.int64),
            steps=np.array(columns[3], np.int64),
            latents=_floats(columns[4], spec.latent_dim),
            actions=_floats(columns[5], spec.block_size),
            surprises=np.array([np.nan if each is None else each for each in columns[6]], np.float32),
            outcomes=np.array(columns[7], dtype=str),
        )

    def kept(self, spec: MemorySpec) -> tuple[Int64[np.ndarray, "M"], pa.Array, pa.Array | None]:
        """Return the ids, frames and vectors of the pending memories; missing frames and vectors are null."""
        with self._errors():
            rows = self._database.execute("SELECT id, pixels, vector FROM pending ORDER BY id").fetchall()
        ids = np.array([row[0] for row in rows], np.int64)
        frames = pa.array([row[1] for row in rows], pa.large_binary())
        if not spec.vector:
            return ids, frames, None
        zeros = bytes(4 * spec.vector)
        vectors = _floats([row[2] or zeros for row in rows], spec.vector)
        return ids, frames, float_lists(vectors, null=np.array([row[2] is None for row in rows], bool))

    def clear(self, last: int) -> None:
        """Delete the rows with ids up to `last`, after they were committed to the table."""
        with self._transaction():
            self._database.execute("DELETE FROM pending WHERE id <= ?", (last,))

    def counter(self, name: str) -> int:
        """Return the value of a counter, which is the next unused number; 0 for a new counter."""
        with self._errors():
            row = self._database.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
        return 0 if row is None else int(row[0])

    def advance(self, name: str, value: int) -> None:
        """Set the counter `name` to `value`."""
        with self._transaction():
            self._count(name, value)

    def _count(self, name: str, value: int) -> None:
        self._database.execute("INSERT OR REPLACE INTO counters VALUES (?, ?)", (name, value))

    def _open_to_read(self) -> sqlite3.Connection:
        where = f"file:{quote(str(self.path.resolve()))}?mode=ro"
        database = sqlite3.connect(where, uri=True, isolation_level=None, check_same_thread=False)
        try:
            self._check_schema(database)
            database.execute("SELECT count(*) FROM pending")
        except sqlite3.OperationalError:
            # In a read-only directory, SQLite cannot create the index of its log. It does not need one if the log is
            # empty, as it is after a writer has closed.
            database.close()
            log = self.path.with_name(f"{self.path.name}-wal")
            if log.exists() and log.stat().st_size:
                raise
            database = sqlite3.connect(f"{where}&immutable=1", uri=True, isolation_level=None, check_same_thread=False)
            self._check_schema(database)
        return database

    def _check_schema(self, database: sqlite3.Connection) -> None:
        """Refuse a file with views or triggers: they can run any SQL of its author, such as a query that never ends."""
        odd = database.execute("SELECT type, name FROM sqlite_master WHERE type NOT IN ('table', 'index')").fetchall()
        if odd:
            database.close()
            raise DataError(
                f"the memory's journal {self.path} has the {odd[0][0]} {odd[0][1][:50]!r}, which worldloom does not "
                f"write. Restore the file from a copy, or move it away"
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "full" in text:
                remedy = "free some space and append again: earlier appends are stored, but this append is not"
            elif "readonly" in text or "unable to open" in text:
                remedy = "make the directory writable, or copy the memory to a writable directory"
            else:
                remedy = "check the storage, then try again"
            raise StorageError(f"cannot use the memory's journal {self.path}: {text}; {remedy}") from error
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"the memory's journal {self.path} is damaged ({error}); restore the file from a copy, or move it "
                f"away. The table is not affected, but memories since the last flush are only in the journal"
            ) from error


def _floats(blobs: Sequence[bytes], size: int) -> Float32[np.ndarray, "M size"]:
    try:
        return np.frombuffer(b"".join(blobs), np.float32).reshape(len(blobs), size).copy()
    except ValueError:
        raise DataError(
            f"a row of the memory's journal does not have {size} values; restore the journal from a copy"
        ) from None
