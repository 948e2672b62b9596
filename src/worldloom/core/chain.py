"""An append-only log in which every entry holds the hash of the one before: what was written cannot be changed unseen.

A line is one entry as canonical JSON (sorted keys, no spaces, ASCII): its `index`, the `time` in seconds since 1970,
the `previous` hash, the `body`, and the `hash` (SHA-256) of the other four. A chain proves that no entry was changed,
removed or inserted. Truncation and a complete rewrite are detected only against a `ChainHead` kept elsewhere.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from worldloom.core.closing import Closing
from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import exclusive_lock, storage_errors
from worldloom.core.progress import SILENT, Progress

_log = logging.getLogger(__name__)
NOTHING = "0" * 64
"""The hash that the first entry of a chain follows."""

_DEEPEST = 32  # mappings and lists within one another


@dataclass(frozen=True, kw_only=True)
class ChainHead:
    """How long a chain was, and the hash of its last entry: to be kept elsewhere."""

    length: int
    hash: str


_EMPTY = ChainHead(length=0, hash=NOTHING)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a chain."""

    index: int
    time: float
    previous: str
    body: Mapping[str, Any]

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of everything else."""
        return hashlib.sha256(canonical(self._values()).encode("ascii")).hexdigest()

    @property
    def head(self) -> ChainHead:
        """The head of the chain that ends with this entry."""
        return ChainHead(length=self.index + 1, hash=self.hash)

    def line(self) -> str:
        """Return the entry as it is written, without the end of the line."""
        return canonical({**self._values(), "hash": self.hash})

    def _values(self) -> dict[str, Any]:
        return {"index": self.index, "time": self.time, "previous": self.previous, "body": dict(self.body)}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What verification found: all entries up to `head` are whole, or the first that is `broken`, and why."""

    head: ChainHead
    broken: int | None = None
    why: str = ""


def canonical(value: Any) -> str:
    """Return the one JSON text of a value.

    Raises:
        DataError: it holds values that JSON cannot, such as a number that is not finite, or is nested too deep.
            Parsers differ in the depth they accept, and a chain must be readable by all of them.
    """
    _check_depth(value, _DEEPEST)
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"an entry holds plain JSON values, and finite numbers; {error}") from None


def _check_depth(value: Any, left: int) -> None:
    if left < 0:
        raise DataError(f"an entry is nested at most {_DEEPEST} deep; write it flatter")
    if isinstance(value, Mapping):
        for part in value.values():
            _check_depth(part, left - 1)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_depth(part, left - 1)


class Chain(Closing):
    """A chain open for writing by one process; each entry is whole on the disk before `append` returns.

    Raises:
        StorageError: another process writes it, or the storage refuses.
        DataError: it does not verify; a tampered chain takes no more entries.
    """

    def __init__(self, path: Path | str, *, durable: bool = True) -> None:
        self.path, self._durable = Path(path), durable
        busy = StorageError(f"{path} is written by another process; end that one first, or choose another path")
        with ExitStack() as stack:
            stack.enter_context(exclusive_lock(self.path.with_name(f".{self.path.name}.lock"), busy))
            with storage_errors(self.path):
                self._cut_torn_end()
                verdict = verify(self.path) if self.path.exists() else Verdict(head=_EMPTY)
                if verdict.broken is not None:
                    raise DataError(
                        f"{self.path} does not verify: entry {verdict.broken} {verdict.why}. Keep it as evidence, and "
                        f"begin another chain"
                    )
                # Unbuffered: a buffer would keep bytes that the disk refused and write them before the next entry.
                self._file = stack.enter_context(self.path.open("ab", buffering=0))
            self.head = verdict.head
            self._release = stack.pop_all()

    def append(self, body: Mapping[str, Any]) -> Entry:
        """Write an entry and return it.

        Raises:
            DataError: the body is no plain JSON.
            StorageError: the disk is full or refuses; the chain is as it was.
        """
        entry = Entry(index=self.head.length, time=round(time.time(), 6), previous=self.head.hash, body=body)
        line = entry.line().encode("ascii") + b"\n"
        with storage_errors(self.path):
            before = os.fstat(self._file.fileno()).st_size
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
                if self._durable:
                    os.fsync(self._file.fileno())
            except OSError:
                os.ftruncate(self._file.fileno(), before)
                raise
        self.head = entry.head
        return entry

    def close(self) -> None:
        """Close the file and release its lock."""
        self._release.close()

    def _cut_torn_end(self) -> None:
        """Cut off an unfinished entry that a killed process left: it was never acknowledged."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            _log.warning(
                "%s: %d bytes of an entry that was never finished are cut off", self.path, len(content) - whole
            )
            os.truncate(self.path, whole)


class Tail:
    """Reads a chain while another process writes it: `new` gives the entries that were finished since the last time.

    A half-written last line is skipped until it is whole, and nothing is locked.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._offset, self._head = 0, _EMPTY

    def new(self) -> list[Entry]:
        """Return the new entries, each verified; none where there is no file yet.

        Raises:
            DataError: an entry does not verify, or entries that were read before are gone; read the chain again.
            StorageError: the storage refuses.
        """
        found: list[Entry] = []
        if not self.path.exists() and not self._offset:
            return found
        with storage_errors(self.path), self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:
                raise DataError(f"{self.path} is shorter than it was: entries that were read are gone. Read it anew")
            file.seek(self._offset)
            content = file.read()
        for line in content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]:
            entry, why = read_entry(line + b"\n", self._head)
            if entry is None:
                raise DataError(f"{self.path} does not verify: entry {self._head.length} {why}")
            found.append(entry)
            self._offset += len(line) + 1
            self._head = entry.head
        return found


def entries(path: Path | str, *, progress: Progress = SILENT) -> Iterator[Entry]:
    """Read the entries of a chain, each verified before it is given.

    Raises:
        StorageError: there is no such file.
        DataError: an entry does not verify; it is named.
    """
    with closing(_walk(Path(path), progress)) as walk:
        for index, (entry, why) in enumerate(walk):
            if entry is None:
                raise DataError(f"{path} does not verify: entry {index} {why}")
            yield entry


def verify(path: Path | str, *, kept: ChainHead | None = None, progress: Progress = SILENT) -> Verdict:
    """Check every entry, and detect truncation and rewriting against a `kept` head.

    Raises:
        StorageError: there is no such file.
    """
    head = _EMPTY
    for entry, why in _walk(Path(path), progress):
        if entry is None:
            return Verdict(head=head, broken=head.length, why=why)
        head = entry.head
        if kept is not None and kept.length == head.length and kept != head:
            return Verdict(head=head, broken=entry.index, why="is not the one that the kept head saw")
    if kept is not None and kept.length > head.length:
        why = f"and all after it are gone: the kept head saw {kept.length} entries"
        return Verdict(head=head, broken=head.length, why=why)
    return Verdict(head=head)


def _walk(path: Path, progress: Progress) -> Generator[tuple[Entry | None, str], None, None]:
    """Yield each entry, or, at the first that is broken, None and why."""
    head = _EMPTY
    with (
        storage_errors(path),
        path.open("rb") as file,
        progress.task(f"verify {path.name}", os.fstat(file.fileno()).st_size, "byte") as task,
    ):
        for line in file:
            entry, why = read_entry(line, head)
            task.advance(len(line))
            yield entry, why
            if entry is None:
                return
            head = entry.head


def read_entry(line: bytes, head: ChainHead) -> tuple[Entry | None, str]:
    """Read the line of the entry that follows `head`, or return None and what is wrong with it."""
    if not line.endswith(b"\n"):
        return None, "is not whole"
    try:
        values = json.loads(line.decode("ascii"))
        entry = Entry(index=values["index"], time=values["time"], previous=values["previous"], body=values["body"])
        same = entry.line().encode("ascii") + b"\n" == line
    except (ValueError, KeyError, TypeError, RecursionError, DataError):
        return None, "is no entry of a chain"
    if not same:
        return None, "was changed: its hash is another"
    if (entry.index, entry.previous) != (head.length, head.hash):
        return None, "does not follow the one before"
    return entry, ""
