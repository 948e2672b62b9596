"""Atomic writes: a reader gets the old file or the complete new file, never a part."""

import errno
import fcntl
import json
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from worldloom.core.errors import StorageError, WorldloomError
from worldloom.core.json_text import parse_json
from worldloom.core.text import one_line
from worldloom.core.untrusted import written

_LARGEST_JSON = 2**28  # bytes, far more than the results of the largest evaluation
_LONGEST_LINE = 2**26  # bytes, far more than the notes of a converted episode
_SAID = 300  # characters of the cause in a message


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path beside `path`, flush the file to the disk, and rename it to `path`.

    Raises:
        StorageError: the disk is full or the write failed, or `path` is a folder or a device; whatever is at `path` is
            unchanged.
    """
    with storage_errors(path):
        if path.exists() and not path.is_file():  # a rename would replace a device such as /dev/null
            what = "a folder" if path.is_dir() else "a device"
            raise StorageError(f"{path} is {what}, not a file; choose another path")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(descriptor)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
            written(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically as strict JSON (no NaN), indented."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def require_writable(*paths: Path | str) -> None:
    """Check that files or directories can be created at these paths. Call it before long work whose results go there.

    Nothing is created: the nearest existing parent of each path is checked. URIs are not checked.

    Raises:
        StorageError: a path is on a read-only disk, there is no permission to write, or a parent is a file.
    """
    for path in paths:
        if "://" in str(path):
            continue
        place = Path(path).absolute()
        while not place.is_dir():
            if place.is_file() and place != Path(path).absolute():
                raise StorageError(f"cannot write {path}, because {place} is a file. Choose another path")
            place = place.parent
        try:
            with storage_errors(path), tempfile.TemporaryFile(dir=place):
                pass
        except (StorageError, OSError) as error:
            raise StorageError(
                f"cannot write {path}: {place} is read-only or not yours to write ({error.__cause__ or error}). Change "
                f"the permissions, or choose another path"
            ) from error


def read_json(path: Path, *, strict: bool = True) -> Any:
    """Read JSON from `path`; see `parse_json` for the limits and for `strict`.

    Raises:
        StorageError: the file is missing, unreadable, too large or not valid JSON.
    """
    content = read_bytes(path, _LARGEST_JSON)
    try:
        return parse_json(content, strict=strict)
    except ValueError as error:
        raise StorageError(f"{path} is not valid JSON ({error}); restore the file from a copy, or delete it") from None


def read_bytes(path: Path, largest: int) -> bytes:
    """Read a file of at most `largest` bytes.

    Raises:
        StorageError: the file is missing, unreadable or larger.
    """
    with storage_errors(path), path.open("rb") as file:
        content = file.read(largest + 1)  # one byte above the limit, so that a larger file is refused
    if len(content) > largest:
        raise StorageError(f"{path} is larger than {largest} bytes, the limit for this kind of file; check the path")
    return content


def read_whole(path: Path) -> bytes:
    """Read a file of any size for which there is enough free memory.

    Raises:
        StorageError: the file is missing, unreadable or larger than the free memory.
    """
    with storage_errors(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > psutil.virtual_memory().available:
            raise StorageError(
                f"{path} has {size / 1e9:.1f} GB, more than the free memory; check the file, or close other programs"
            )
        return file.read(size)


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file with their newlines, one at a time, because a file may have any size.

    Raises:
        StorageError: the file is missing or unreadable, or a line is too long to be one of worldloom's.
    """
    with storage_errors(path), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
            if len(line) > _LONGEST_LINE:
                raise StorageError(
                    f"line {number} of {path} is longer than {_LONGEST_LINE} bytes, so the file is damaged; restore it "
                    f"from a copy"
                )
            yield line


def write_document(path: Path, kind: str, values: Mapping[str, Any], *, version: int = 1) -> None:
    """Write `values` as JSON, with two added keys: `kind`, and `format`, the version of the format."""
    write_json(path, {"kind": kind, "format": version, **values})


def read_document(
    path: Path,
    kind: str,
    *,
    version: int = 1,
    remedy: str = "Check the path, or use the version of worldloom that wrote the file",
) -> dict[str, Any]:
    """Return the values that `write_document` wrote, without `kind` and `format`; `remedy` ends the error message.

    Raises:
        StorageError: the file is missing or damaged, or has a different kind or format version.
    """
    values = read_json(path)
    found = (values.pop("kind", None), values.pop("format", None)) if isinstance(values, dict) else (None, None)
    if found != (kind, version):
        raise StorageError(
            f"{path} has kind {found[0]!r} and format {found[1]!r}; expected kind {kind!r} and format {version}. "
            f"{remedy}"
        )
    return dict(values)


def check_private(path: Path | str) -> None:
    """Check that no other user can use a file or folder that holds a secret or an owner's observations.

    Raises:
        StorageError: the path belongs to another user, other users have permissions, or the path does not exist.
    """
    with storage_errors(path):
        found = Path(path).stat()
    if found.st_uid != os.geteuid():
        raise StorageError(
            f"{path} belongs to the user with the number {found.st_uid}, who can read and change it; expected your own "
            f"number, {os.geteuid()}. Run worldloom as that user, or use a path of your own"
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise StorageError(
            f"other users may use {path} (its permissions are {mode:03o}); run: chmod -R go= {shlex.quote(str(path))}"
        )


def make_private(path: Path | str) -> None:
    """Create a folder that only its owner can use, or give an existing empty folder these permissions.

    Raises:
        StorageError: the folder cannot be created, belongs to another user, or has content that other users may use.
    """
    folder = Path(path)
    with storage_errors(path):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(folder.iterdir()) and folder.stat().st_uid == os.geteuid():
            folder.chmod(0o700)  # the permissions of a folder that somebody uses are not changed
    check_private(folder)


@contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Convert operating system errors on `path` to a `StorageError` whose message contains a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            remedy = "free some space and run the same command again. Files that are already complete are kept"
            raise StorageError(f"cannot write {path}, because the disk is full; {remedy}") from error
        if isinstance(error, FileNotFoundError):
            raise StorageError(f"{path} does not exist; check the path") from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise StorageError(
                f"no permission to use {path}; change the permissions, or choose another path"
            ) from error
        if isinstance(error, NotADirectoryError):
            raise StorageError(f"a parent of {path} is a file; expected a directory. Check the path") from error
        if isinstance(error, IsADirectoryError):
            raise StorageError(f"{path} is a directory; expected a file. Check the path") from error
        if isinstance(error, FileExistsError):
            raise StorageError(f"{path} already exists; choose another path or remove it") from error
        raise


@contextmanager
def reading(
    path: Path | str, error: type[WorldloomError] = StorageError, remedy: str = "restore the file from a copy"
) -> Iterator[None]:
    """Convert any exception of the block to an error of the type `error` that names the file.

    Use this around code that interprets a file's content: its values may not have the types or sizes that the code
    expects.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as cause:
        said = one_line(str(cause))
        said = said if len(said) <= _SAID else f"{said[:_SAID]}..."
        raise error(f"{path} is damaged ({type(cause).__name__}: {said}); {remedy}") from cause


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, and rename the folder to `path` when the body succeeds.

    `path` is therefore never an incomplete folder.

    Raises:
        StorageError: `path` already exists, or a read or write failed, here or in the body of the `with` statement.
    """
    if path.exists():
        raise StorageError(f"{path} already exists; choose another folder")
    begun = path.with_name(f".{path.name}.begun")
    with storage_errors(path):
        shutil.rmtree(begun, ignore_errors=True)  # left by a killed process
        begun.mkdir(parents=True)
        yield begun
        begun.rename(path)


def beside(path: Path, ending: str) -> Path:
    """Return the path next to `path` with its name plus `ending`; `.` and `..` have the names of their folders.

    Raises:
        StorageError: the path is the root folder, which has no name.
    """
    named = path if path.name not in ("", "..") else Path(os.path.normpath(path.absolute()))
    if not named.name:
        raise StorageError(f"{path} has no name, so that nothing can be written next to it; choose another path")
    return named.with_name(f"{named.name}{ending}")


@contextmanager
def exclusive_lock(path: Path, otherwise: Exception | None) -> Iterator[None]:
    """Lock `path` for this process. The kernel releases the lock when the process ends, even if it is killed.

    Users who share a folder can use each other's lock files. For `otherwise` and errors see `lock_file`.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_lock(path)
    with os.fdopen(descriptor, "rb") as file:
        lock_file(file, path, otherwise)
        yield


def lock_file(file: IO[bytes], path: Path, otherwise: Exception | None) -> None:
    """Lock an open file until it is closed.

    If another process has the lock, raise the exception `otherwise`; if `otherwise` is None, wait for the lock.

    Raises:
        StorageError: the file cannot be locked.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if otherwise is None else fcntl.LOCK_NB))
    except BlockingIOError:
        assert otherwise is not None
        raise otherwise from None
    except OSError as error:  # some network file systems have no locks
        raise StorageError(f"{path} cannot be locked ({error}); use a directory on a local disk") from error


def _open_lock(path: Path) -> int:
    """Open a lock file, which is created if necessary; return its descriptor."""
    with suppress(FileExistsError):
        created = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.fchmod(created, 0o644)  # whatever the umask: other users must be able to open the file
        os.close(created)
    try:
        return os.open(path, os.O_RDWR)  # network file systems lock only files that are open for writing
    except PermissionError:
        return os.open(path, os.O_RDONLY)  # the file of another user


def sync_directory(path: Path) -> None:
    """Flush the entries of a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
