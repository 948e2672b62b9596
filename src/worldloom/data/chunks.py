"""A bounded cache of chunks (runs of consecutive decoded frames) on the local disk, shared by processes."""

import hashlib
import logging
import os
import tempfile
import threading
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from worldloom.core.files import exclusive_lock, storage_errors

_log = logging.getLogger(__name__)

_MAGIC = b"wlchunk1"
_HEADER = len(_MAGIC) + 16  # the magic, then blake2b of the content
_STALE_SECONDS = 3600.0  # temporary files older than this were left by a killed process
_LOOK = 64  # chunks written between two scans for chunks of other processes; the budget may be exceeded until a scan
_TOUCH_SECONDS = 60.0  # resolution of the time of last use


class ChunkCache:
    """A cache of one dataset's chunks in `directory`/`name`; all datasets in `directory` share `budget` bytes.

    Files are written atomically, and a process checks each file when it first opens it. A damaged file is deleted, and
    its chunk is fetched again. The least recently used chunks of all datasets are deleted first. Several processes can
    share the directory, and you can delete it at any time.

    Raises:
        StorageError: the directory cannot be created.
    """

    def __init__(self, directory: Path, name: str, budget: int) -> None:
        self.directory, self.budget = directory, budget
        self._folder = directory / name
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._checked: dict[int, tuple[int, float]] = {}  # chunk: inode, time at which its use was last recorded
        self._total, self._since = 0, 0
        self._writing = threading.Lock()
        self.evict()

    def path(self, chunk: int) -> Path:
        """Return the path of a chunk."""
        return self._folder / f"{chunk:08d}.chunk"

    def __contains__(self, chunk: int) -> bool:
        return self.path(chunk).exists()

    def read(
        self, chunk: int, rows: Int64[np.ndarray, "n"], size: int, length: int, out: UInt8[np.ndarray, "n bytes"]
    ) -> bool:
        """Read rows of a chunk into `out`; return False if the chunk is missing or damaged.

        The chunk has `length` rows of `size` bytes.
        """
        try:
            with self.path(chunk).open("rb", buffering=0) as file:
                return self._whole(chunk, file, size * length) and all(
                    os.preadv(file.fileno(), [out[index].data], _HEADER + int(row) * size) == size
                    for index, row in enumerate(rows)
                )
        except FileNotFoundError:
            self._checked.pop(chunk, None)
        except OSError as error:
            _log.warning("the cached chunk %s cannot be read (%s); fetching it again", self.path(chunk), error)
        return False

    def _whole(self, chunk: int, file: FileIO, size: int) -> bool:
        now, inode = time.monotonic(), os.fstat(file.fileno()).st_ino
        known, noted = self._checked.get(chunk, (-1, -_TOUCH_SECONDS))
        if known != inode:
            content = file.read()
            digest = hashlib.blake2b(memoryview(content)[_HEADER:], digest_size=16).digest()
            if len(content) != _HEADER + size or content[:_HEADER] != _MAGIC + digest:
                _log.warning("the cached chunk %s is damaged; fetching it again", self.path(chunk))
                self.path(chunk).unlink(missing_ok=True)
                return False
        if known != inode or now - noted >= _TOUCH_SECONDS:
            with suppress(OSError):  # if another process deletes the file, the open descriptor still works
                os.utime(self.path(chunk))
            self._checked[chunk] = inode, now
        return True

    def write(self, chunk: int, content: UInt8[np.ndarray, "bytes"]) -> None:
        """Store a chunk unless it exceeds the budget, and delete other chunks if the budget requires it.

        Raises:
            StorageError: the disk is full or cannot be written; the chunk is not stored.
        """
        path = self.path(chunk)
        if len(content) + _HEADER > self.budget:
            return
        digest = hashlib.blake2b(content.data, digest_size=16).digest()
        with self._writing, storage_errors(path):  # locked, so that chunks of other threads are counted
            self._total += len(content) + _HEADER
            self._since += 1
            if self._total > self.budget or self._since >= _LOOK:
                self.evict(len(content) + _HEADER)
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
            temporary = Path(name)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_MAGIC + digest)
                    file.write(content.data)
                # No flush to the disk: a file that a power cut damages does not match its digest.
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def evict(self, room: int = 0) -> None:
        """Delete the least recently used chunks until `room` more bytes fit, and files that killed processes left."""
        with exclusive_lock(self.directory / ".lock", None):
            found, total = [], room
            for file in self.directory.glob("*/*"):
                with suppress(FileNotFoundError):
                    stat = file.stat()
                    if file.suffix == ".chunk":
                        found.append((stat.st_mtime, stat.st_size, file))
                        total += stat.st_size
                    elif file.suffix == ".tmp" and time.time() - stat.st_mtime > _STALE_SECONDS:
                        file.unlink()
            found.sort()
            # Delete an eighth of the budget more than needed, so that not every chunk causes a directory scan.
            goal = self.budget - self.budget // 8 if total > self.budget else self.budget
            for _, size, file in found:
                if total <= goal:
                    break
                file.unlink(missing_ok=True)
                total -= size
            self._total, self._since = total, 0
