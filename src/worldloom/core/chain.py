"""An append-only log in which every entry stores the hash of the previous one, so that changes are detected.

Each line is one entry as canonical JSON (sorted keys, no spaces, ASCII): its `index`, the `time` in seconds since 1970,
the `previous` hash, the `body`, and the `hash` (SHA-256) of the other four. `verify` detects entries that were changed,
removed or inserted. It detects truncation and a complete rewrite only if a `ChainHead` was stored elsewhere.
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
from worldloom.core.files import lock_file, storage_errors
from worldloom.core.progress import SILENT, Progress

_log = logging.getLogger(__name__)
_TRUNCATED, _BEGINNING = "is truncated", b'{"body":'
NOTHING = "0" * 64
"""The `previous` hash of the first entry of a chain."""

_LATEST = 1e11  # seconds since 1970, about the year 5000; later times cannot be shown
_LONGEST = 2**26  # bytes of an entry
_DEEPEST = 32  # levels of nested mappings and lists


@dataclass(frozen=True, kw_only=True)
class ChainHead:
    """The length of a chain and the hash of its last entry. Store the head elsewhere to detect truncation."""

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
        """The SHA-256 of the other fields, as hexadecimal digits."""
        return hashlib.sha256(canonical(self._values()).encode("ascii")).hexdigest()

    @property
    def head(self) -> ChainHead:
        """The head of the chain that ends with this entry."""
        return ChainHead(length=self.index + 1, hash=self.hash)

    def line(self) -> str:
        """Return the entry as a line of the file, without the newline."""
        return canonical({**self._values(), "hash": self.hash})

    def _values(self) -> dict[str, Any]:
        return {"index": self.index, "time": self.time, "previous": self.previous, "body": dict(self.body)}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of a verification.

    Attributes:
        head: the head of the chain up to its last valid entry.
        broken: the index of the first invalid entry; None if all entries are valid.
        why: the reason why that entry is invalid; empty if all entries are valid.
    """

    head: ChainHead
    broken: int | None = None
    why: str = ""


def canonical(value: Any) -> str:
    """Return the canonical JSON text of a value.

    Raises:
        DataError: JSON cannot represent a part of the value (for example, a number that is not finite), or the value
            is nested too deeply. The depth is limited because every JSON parser must be able to read a chain.
    """
    _check_depth(value, _DEEPEST)
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"an entry must contain only plain JSON values and finite numbers ({error}); correct the entry"
        ) from None


def _check_depth(value: Any, left: int) -> None:
    if left < 0:
        raise DataError(f"an entry is nested too deeply; use at most {_DEEPEST} levels of mappings and lists")
    if isinstance(value, Mapping):
        for part in value.values():
            _check_depth(part, left - 1)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_depth(part, left - 1)


class Chain(Closing):
    """A chain that is open for writing by one process. If `durable`, each entry is on disk before `append` returns.

    The file itself is locked. While the chain is open, no other program may change, move or delete the file.

    Raises:
        StorageError: another process is writing the chain, or the file cannot be opened.
        DataError: the chain does not verify; nothing is appended to a tampered chain.
    """

    def __init__(self, path: Path | str, *, durable: bool = True) -> None:
        self.path, self._durable = Path(path), durable
        busy = StorageError(f"{path} is open in another process; end that process, or choose another path")
        with ExitStack() as stack:
            with storage_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Unbuffered: a buffer would keep bytes that the disk refused and write them before the next entry.
                self._file = stack.enter_context(self.path.open("ab", buffering=0))
            lock_file(self._file, self.path, busy)
            with storage_errors(self.path):
                verdict = verify(self.path)
                if verdict.why == _TRUNCATED:
                    verdict = Verdict(head=self._mend_end(verdict.head))
                if verdict.broken is not None:
                    raise DataError(
                        f"{self.path} does not verify: entry {verdict.broken} {verdict.why}. Keep the file as "
                        f"evidence, and choose another path"
                    )
                self._size = os.fstat(self._file.fileno()).st_size
            self.head = verdict.head
            self._release = stack.pop_all()

    def append(self, body: Mapping[str, Any]) -> Entry:
        """Write an entry and return it.

        Raises:
            DataError: JSON cannot represent the body, or the body is nested too deeply.
            StorageError: the disk is full or the write failed, so that the chain is unchanged; or the chain was closed,
                or another program deleted, moved or changed the file.
        """
        entry = Entry(index=self.head.length, time=round(time.time(), 6), previous=self.head.hash, body=body)
        line = entry.line().encode("ascii") + b"\n"
        self._check_place()
        with storage_errors(self.path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
                if self._durable:
                    os.fsync(self._file.fileno())
            except OSError:
                os.ftruncate(self._file.fileno(), self._size)
                raise
        self._size += len(line)
        self.head = entry.head
        return entry

    def close(self) -> None:
        """Close the file and release its lock."""
        self._release.close()

    def _check_place(self) -> None:
        """Check that the open file is still the file at the path, as this chain wrote it.

        Raises:
            StorageError: it is not.
        """
        if self._file.closed:
            raise StorageError(f"{self.path} was closed, so nothing more can be recorded; open it again")
        with storage_errors(self.path):
            ours = os.fstat(self._file.fileno())
            try:
                there = self.path.stat()
            except FileNotFoundError:
                there = None
        if there is None or not os.path.samestat(ours, there):
            raise StorageError(
                f"another program deleted, moved or replaced {self.path} while it was open, so nothing more can be "
                f"recorded there. Restore the file, or choose another path; let nothing rotate it while it is open"
            )
        if ours.st_size != self._size:
            raise StorageError(
                f"another program changed {self.path} while it was open: it has {ours.st_size} bytes; expected "
                f"{self._size}. Keep the file as evidence, and choose another path"
            )

    def _mend_end(self, head: ChainHead) -> ChainHead:
        """Remove an unfinished last entry, which a killed process left after valid entries; return the new head.

        Nothing is lost, because `append` had not returned for that entry. If only its newline is missing, it is kept.

        Raises:
            DataError: the end of the file is not the beginning of an entry, so the file may not be a chain.
        """
        with self.path.open("rb") as file:
            begin = max(0, os.fstat(file.fileno()).st_size - _LONGEST)  # the last entry is shorter than this
            file.seek(begin)
            end = file.read(_LONGEST)
        torn = end[end.rfind(b"\n") + 1 :]
        whole = begin + len(end) - len(torn)
        entry, _ = read_entry(torn + b"\n", head)
        if entry is not None:
            self._file.write(b"\n")
            return entry.head
        if not torn.startswith(_BEGINNING[: len(torn)]):
            raise DataError(
                f"{self.path} ends with {len(torn)} bytes that are not the beginning of an entry, so another program "
                f"wrote it. Choose another path"
            )
        _log.warning("%s: removed an unfinished last entry (%d bytes)", self.path, len(torn))
        os.ftruncate(self._file.fileno(), whole)
        return head


class Tail:
    """Reads a chain while another process writes it. Each call of `new` returns the entries added since the last call.

    An incomplete last line is skipped until it is complete. The file is not locked.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._offset, self._head = 0, _EMPTY

    def new(self) -> list[Entry]:
        """Return the new entries after their verification, or an empty list if the file does not exist yet.

        Raises:
            DataError: an entry does not verify, or entries that were read before have been removed.
            StorageError: the file cannot be read.
        """
        found: list[Entry] = []
        if not self.path.exists() and not self._offset:
            return found
        with storage_errors(self.path), self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:
                raise DataError(
                    f"{self.path} became shorter: entries that were already read have been removed. Restore the file "
                    f"from a copy"
                )
            file.seek(self._offset)
            while (line := file.readline(_LONGEST)).endswith(b"\n") or len(line) == _LONGEST:
                entry, why = read_entry(line, self._head)
                if entry is None:
                    raise DataError(
                        f"{self.path} does not verify: entry {self._head.length} {why}. Restore the file from a copy"
                    )
                found.append(entry)
                self._offset += len(line)
                self._head = entry.head
        return found


def entries(path: Path | str, *, progress: Progress = SILENT) -> Iterator[Entry]:
    """Yield the entries of a chain, each after its verification.

    Raises:
        StorageError: the file does not exist.
        DataError: an entry does not verify; the message gives its index.
    """
    with closing(_walk(Path(path), progress)) as walk:
        for index, (entry, why) in enumerate(walk):
            if entry is None:
                raise DataError(f"{path} does not verify: entry {index} {why}. Restore the file from a copy")
            yield entry


def verify(path: Path | str, *, kept: ChainHead | None = None, progress: Progress = SILENT) -> Verdict:
    """Verify every entry of a chain. With `kept`, an earlier head, also detect truncation and a complete rewrite.

    Raises:
        StorageError: the file does not exist.
    """
    head = _EMPTY
    for entry, why in _walk(Path(path), progress):
        if entry is None:
            return Verdict(head=head, broken=head.length, why=why)
        head = entry.head
        if kept is not None and kept.length == head.length and kept != head:
            return Verdict(head=head, broken=entry.index, why="differs from the entry that the kept head recorded")
    if kept is not None and kept.length > head.length:
        why = f"and all later entries are missing: the kept head recorded {kept.length} entries"
        return Verdict(head=head, broken=head.length, why=why)
    return Verdict(head=head)


def _walk(path: Path, progress: Progress) -> Generator[tuple[Entry | None, str], None, None]:
    """Yield (entry, ""), or, at the first invalid entry, (None, why)."""
    head = _EMPTY
    with (
        storage_errors(path),
        path.open("rb") as file,
        progress.task(f"verify {path.name}", os.fstat(file.fileno()).st_size, "byte") as task,
    ):
        while line := file.readline(_LONGEST):
            entry, why = read_entry(line, head)
            task.advance(len(line))
            yield entry, why
            if entry is None:
                return
            head = entry.head


def read_entry(line: bytes, head: ChainHead) -> tuple[Entry | None, str]:
    """Return (entry, "") for a line, or (None, why) if the line is not the entry that follows `head`."""
    entry, why = parse_entry(line)
    if entry is not None and (entry.index, entry.previous) != (head.length, head.hash):
        return None, "does not follow the previous entry"
    return entry, why


def parse_entry(line: bytes) -> tuple[Entry | None, str]:
    """Return (entry, "") for a line, or (None, why) if the line is not an entry of any chain."""
    if not line.endswith(b"\n"):
        return None, _TRUNCATED if len(line) < _LONGEST else f"is longer than {_LONGEST} bytes"
    try:
        values = json.loads(line.decode("ascii"))
        entry = Entry(index=values["index"], time=values["time"], previous=values["previous"], body=values["body"])
        if type(entry.index) is not int or type(entry.time) not in (int, float) or abs(entry.time) > _LATEST:
            return None, "is not an entry of a chain"
        same = entry.line().encode("ascii") + b"\n" == line
    except (ValueError, KeyError, TypeError, RecursionError, DataError):
        return None, "is not an entry of a chain"
    if not same:
        return None, "was changed: its hash does not match"
    return entry, ""
