"""Files of unknown origin: a child process reads them first, because a damaged file can crash the process reading it.

Libraries in native code can ask for too much memory, abort or crash on a damaged file, which no `except` catches. The
child (untrusted_child.py) reads each file with limits on memory and time. If the child ends early, `try_files` raises
an error that names the file. An ordinary exception in the child is ignored: reading the file in this process raises it
again, and the caller reports it. The child keeps running for further files, because importing the libraries takes
longer than reading most files.

A file is *tried* (read in the child) once. A file is *known*, and not tried, if this process wrote it, or if it was
tried before and its size, times and inode have not changed. The list of tried files is kept across processes, in
worldloom/tried in XDG_CACHE_HOME (default ~/.cache), a folder that you can delete at any time.
"""

import atexit
import hashlib
import io
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from worldloom.core.errors import DataError

_log = logging.getLogger(__name__)

Kind = Literal["lance", "hdf5", "video", "picture", "parquet"]
MEMORY = 8 * 2**30  # bytes of address space of the child, in addition to twice the largest file
_SECONDS, _RATE = 300.0, 2e6  # time limit: seconds, and bytes per second in addition
_LANCE = ("_deletions", "_indices", "_versions", "data")  # the folders of a Lance table that readers open
_CHECKS = b"4:"  # raise the number when the child checks more, so that files are tried again
_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_KNOWN, _MOST_LISTS = 100_000, 1000
_CHILD = Path(__file__).with_name("untrusted_child.py")
_FEW_THREADS = {
    "LANCE_CPU_THREADS": "2",
    "LANCE_IO_THREADS": "2",
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "RUST_BACKTRACE": "0",
    "TOKIO_WORKER_THREADS": "2",
}


class HarmfulFile(DataError):
    """A file that must not be opened, because it ended a child process; `file` is its path."""

    def __init__(self, file: str, why: str, remedy: str = "Restore the file from a copy") -> None:
        super().__init__(f"{file} is damaged, or was made to do harm: reading it in a child process {why}. {remedy}")
        self.file, self.why = file, why


Stamp = tuple[int, int, int, int]  # size, modification time, change time, inode
_known: OrderedDict[str, Stamp] = OrderedDict()
_lock = threading.Lock()


def try_files(kind: Kind, files: Iterable[Path], *, table: Path | None = None, version: int | None = None) -> None:
    """Read files in a child process, unless they are known.

    For kind "lance", `files` are those of the table in the directory `table`, which is read at `version`.

    Raises:
        HarmfulFile: the child ended early; the message names the file and the cause.
        DataError: a file is a pointer of Git LFS, a pipe or a device.
    """
    stamps = _stamps(files)
    if not _unknown(stamps):
        return
    for file in _unknown(stamps):
        refuse_pipe(Path(file))
        refuse_pointer(Path(file))
    root = table if table is not None else Path(os.path.commonpath(stamps))
    with _remembered(root) as list_file:
        unknown = _unknown(stamps)
        if not unknown:
            return
        sizes = [stamps[file][0] for file in unknown]
        memory, seconds = MEMORY + 2 * max(sizes), _SECONDS + sum(sizes) / _RATE
        request: dict[str, Any] = {"kind": kind, "files": unknown, "memory": memory, "seconds": seconds}
        if table is not None:
            request |= {"table": str(table.absolute()), "version": version, "known": sorted(set(stamps) - set(unknown))}
        _try(request)
        _remember(stamps)
        if list_file is not None:
            with suppress(OSError):
                _write(list_file, json.dumps(stamps))


def refuse_pipe(file: Path) -> None:
    """Raise `DataError` for a pipe, which a reader would wait for without end, or a device."""
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise DataError(f"{file} is a pipe or a device; expected a file. Check the path")


def refuse_pointer(file: Path) -> None:
    """Raise `DataError` if a file is the text that Git stores in place of a file that Git LFS has not fetched."""
    with suppress(OSError), file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise DataError(
                f"{file} is a pointer of Git LFS, not the file itself. Install git-lfs, and run 'git lfs pull' in the "
                f"repository that the file comes from"
            )


def table_files(table: Path) -> list[Path]:
    """Return the files of a Lance table that readers open."""
    folders = [entry for entry in _entries(table) if entry.is_dir() and entry.name in _LANCE]
    return sorted(Path(root) / name for folder in folders for root, _, names in os.walk(folder.path) for name in names)


def written(*files: Path) -> None:
    """Record files that this process has written, so that they are not tried."""
    _remember(_stamps(files))


def written_table(table: Path) -> None:
    """Record the new files of a Lance table to which this process has written."""
    written(*(file for file in table_files(table.absolute()) if str(file) not in _known))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _try(request: dict[str, Any]) -> None:
    try:
        said, code, errors = _child.ask(request)
    except OSError as error:
        _log.warning("files of unknown origin are read without a child process, which cannot start: %s", error)
        return
    if "done" in said:
        return
    file = said.get("file")
    if file is None and code > 0:  # the child did not start to read, for example because a module is missing
        _log.warning("files of unknown origin are read without a child process, which failed: %s", errors.strip())
        return
    refused = said.get("refused") or [_cause(code, errors, request)]
    raise HarmfulFile(str(file or request["files"][0]), *map(str, refused))


class _Child:
    """The child process, which starts with the first request and again after it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] = io.BytesIO()  # the error output of the process
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], int, str]:
        """Send a request; return the child's messages about it, the exit code and the error output."""
        with self._lock:
            try:
                if self._process is not None:
                    answer = self._answer(self._process, request)
                    if answer[0]:
                        return answer
                    self.end()  # the child says nothing if it had ended, because no request came for a while
                return self._answer(self._start(), request)
            except BaseException:  # the rest of the answer would be taken for that to the next request
                self.end()
                raise

    def _start(self) -> subprocess.Popen[bytes]:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it is open as long as the child
        environment = {**os.environ, **_FEW_THREADS, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],  # -P: the names of modules beside the child hide those of Python
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors.fileno(),  # a pipe could fill, and stop the child
            env=environment,
            start_new_session=True,  # a signal to the terminal's processes is for this one alone
        )
        return self._process

    def _answer(self, process: subprocess.Popen[bytes], request: dict[str, Any]) -> tuple[dict[str, Any], int, str]:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        said: dict[str, Any] = {}
        deadline = time.monotonic() + request["seconds"] + 30
        output, rest = process.stdout.fileno(), b""
        ready = select.poll()
        ready.register(output)
        while True:
            if not ready.poll(1000 * max(0.0, deadline - time.monotonic())):
                self.end()
                return said, -signal.SIGALRM, ""
            data = os.read(output, 65536)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                what, _, text = line.decode("ascii", errors="replace").partition(" ")
                if what not in ("file", "refused", "done", "ended"):  # what else a library may print is skipped
                    continue
                with suppress(ValueError, TypeError):
                    told = json.loads(text)
                    if what == "ended":
                        return said, int(told[0]), str(told[1])
                    said[what] = told
            if not data:
                code = process.wait()
                self._errors.seek(0)
                errors = self._errors.read(4000).decode(errors="replace")
                self.end()
                return said, code, errors

    def end(self) -> None:
        """End the child, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        self._errors.close()

    def leave(self) -> None:
        """Forget the child, in a fork of the process that started it: the child belongs to that process."""
        self._lock = threading.Lock()
        self._of_other, self._process, self._errors = (self._process, self._errors), None, io.BytesIO()


_child = _Child()
os.register_at_fork(after_in_child=_child.leave)
atexit.register(_child.end)


def _cause(code: int, errors: str, request: dict[str, Any]) -> str:
    if code == -signal.SIGALRM:
        return f"took more than {request['seconds']:.0f} s"
    asked = next((line.strip() for line in errors.splitlines() if line.startswith("memory allocation")), None)
    if code == -signal.SIGKILL:
        asked = "perhaps for lack of memory"
    name = signal.Signals(-code).name if -code in {each.value for each in signal.Signals} else f"exit code {code}"
    return f"ended that process with {name}" + (f" ({asked})" if asked else "")


def _stamps(files: Iterable[Path]) -> dict[str, Stamp]:
    """Return the stamp (size, times and inode) of each file that exists, by absolute path."""
    stamps: dict[str, Stamp] = {}
    for file in files:
        with suppress(OSError):
            stat = file.stat()
            stamps[str(file.absolute())] = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
    return stamps


def _unknown(stamps: dict[str, Stamp]) -> list[str]:
    return [file for file, stamp in stamps.items() if _known.get(file) != stamp]


def _remember(stamps: dict[str, Stamp]) -> None:
    with _lock:
        for file, stamp in stamps.items():
            _known[file] = stamp
            _known.move_to_end(file)
        while len(_known) > _MOST_KNOWN:
            _known.popitem(last=False)


@contextmanager
def _remembered(root: Path) -> Iterator[Path | None]:
    """Lock and read the list of tried files below `root`, and yield its path; yield None without a cache folder.

    The lock ensures that only one process tries these files.
    """
    import fcntl

    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "worldloom" / "tried"
    name = hashlib.blake2b(_CHECKS + os.fsencode(root.absolute()), digest_size=16).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{name}.lock").open("a")
    except OSError:  # without a cache, every process tries the files again
        yield None
        return
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / f"{name}.json"
        with suppress(OSError, ValueError, TypeError):
            _remember({str(file): tuple(stamp) for file, stamp in json.loads(path.read_bytes()).items()})
        yield path


def _write(path: Path, text: str) -> None:
    """Write a list, and delete old ones. An incomplete list does no harm, so nothing is flushed to the disk."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)
    lists = sorted(path.parent.iterdir(), key=lambda each: each.stat().st_mtime)
    for old in lists[: max(0, len(lists) - 2 * _MOST_LISTS)]:
        old.unlink(missing_ok=True)
