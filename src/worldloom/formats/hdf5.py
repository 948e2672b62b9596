"""Shared code of the HDF5 formats: helpful errors, and a writer whose files a kill cannot corrupt.

If a process dies while it writes an HDF5 file, the file is often lost. Each episode is therefore first written
atomically to its own small file (PATH.parts/000000.h5), and the last step assembles these files into one.
"""

import importlib
import json
import math
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.core.errors import ConfigError, DataError, one_line
from worldloom.core.extras import require
from worldloom.core.files import storage_errors, write_atomic
from worldloom.core.types import Episode
from worldloom.core.untrusted import try_files
from worldloom.data import metadata_json
from worldloom.formats.format import CLOCK, Sink, Source, count_files, spec_values

OWN = "worldloom"  # the attribute that contains worldloom's spec and metadata


def h5py() -> Any:
    """Return the h5py package.

    Raises:
        ConfigError: h5py is not installed.
    """
    with suppress(ImportError):  # optional; registers the compression filters of some published files
        importlib.import_module("hdf5plugin")
    return require("h5py", "hdf5")


@contextmanager
def hdf5_errors(path: Path) -> Iterator[None]:
    """Convert HDF5's errors on `path` to worldloom's errors."""
    try:
        with storage_errors(path):
            yield
    except (OSError, KeyError, RuntimeError) as error:
        text = one_line(error).strip("'\"")
        if "filter" in text or "plugin" in text:
            raise ConfigError(
                f"{path} is compressed with a filter that is not installed; run: pip install hdf5plugin"
            ) from error
        raise DataError(
            f"{path} is not a valid HDF5 file ({text}); it may be truncated. Restore the file from a copy"
        ) from error


@contextmanager
def opened_hdf5(path: Path) -> Iterator[Any]:
    """Open an HDF5 file for reading; HDF5's errors are converted, also inside the block."""
    try_files("hdf5", [path])
    with hdf5_errors(path), h5py().File(path, "r") as file:
        yield file


def is_hdf5(path: Path) -> bool:
    """Return whether a file starts with the HDF5 signature."""
    if not path.is_file():
        return False
    with storage_errors(path), path.open("rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def width(column: Any) -> int:
    """Return the number of values in each row of a column."""
    return int(np.prod(column.shape[1:]))


def arrays(group: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the arrays with rows below a group, by path, and the kind of each other entry, by path.

    Other entries are scalars, empty datasets, text, rows of varying length, and dead links.
    """
    found: dict[str, Any] = {}
    odd: dict[str, str] = {}
    seen: set[Any] = set()

    def walk(parent: Any, prefix: str) -> None:
        for name in parent:
            path = f"{prefix}{name}"
            entry = entry_of(parent, name)
            if entry is None:
                odd[path] = "a dead link"
            elif isinstance(entry, h5py().Group):
                place = h5py().h5o.get_info(entry.id).addr
                if place not in seen:  # a link may lead back to a parent
                    seen.add(place)
                    walk(entry, f"{path}/")
            elif not isinstance(entry, h5py().Dataset):
                odd[path] = "not an array"
            elif entry.shape is None:
                odd[path] = "empty"
            elif entry.dtype.kind in "SU" or h5py().check_string_dtype(entry.dtype) is not None:
                odd[path] = "text"
            elif entry.dtype.kind == "O":
                odd[path] = "rows of varying length, or links"
            elif entry.shape == ():
                odd[path] = "a scalar"
            else:
                found[path] = entry

    walk(group, "")
    return found, odd


def entry_of(group: Any, name: str) -> Any:
    """Return an entry of a group, or None if the entry is missing or a dead link."""
    try:
        return group[name]
    except (KeyError, OSError, RuntimeError):
        return None


def unwritten(column: Any) -> str | None:
    """Return how much of an array was never written, as text; None if everything was written, or if it is not known.

    The text is a number of chunks, or "all values" for arrays without chunks. HDF5 reads the missing values as fill
    values.
    """
    if column.is_virtual or column.external or not column.size:
        return None
    if column.chunks is None:
        return None if column.id.get_storage_size() else "all values"
    chunks = math.prod(-(-size // chunk) for size, chunk in zip(column.shape, column.chunks, strict=True))
    missing = chunks - column.id.get_num_chunks()
    return f"{missing} of {chunks} chunks" if missing > 0 else None


def group_names(group: Any) -> list[str]:
    """Return the names of the groups in a group."""
    return [name for name in group if isinstance(entry_of(group, name), h5py().Group)]


def attributes(holder: Any) -> dict[str, Any]:
    """Return the attributes of a group or file as JSON values; an empty or unsupported one becomes None."""
    values = {}
    for name in holder.attrs:
        try:
            values[name] = json_or_text(holder.attrs[name])
        except (OSError, TypeError, ValueError, KeyError):
            values[name] = None
    return values


def whole_number(holder: Any, name: str) -> int | None:
    """Return an attribute that is a whole number, or None if the attribute is missing or something else."""
    value = attributes(holder).get(name)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return int(value) if isinstance(value, int | float) and abs(value) < 2**53 and value == int(value) else None


def own_attribute(holder: Any) -> dict[str, Any]:
    """Return the values that worldloom wrote to the attributes of a group or file, or {} if there are none."""
    text = holder.attrs.get(OWN)
    if text is None:
        return {}
    values: dict[str, Any] = json.loads(text)
    return values


def own_metadata(column: Any) -> dict[str, Any]:
    """Return an episode's metadata from the JSON text in a column that worldloom wrote."""
    values: dict[str, Any] = json.loads(column.asstr()[()])
    return values


def json_or_text(value: Any) -> Any:
    """Return an attribute as a JSON value: parsed if it is JSON, else as text, a number or a list.

    Numbers that are not finite become text, and other values that JSON does not have become None.
    """
    if isinstance(value, str | bytes):
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        try:
            return _plain(json.loads(text))
        except (json.JSONDecodeError, RecursionError):
            return text
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind != "V":
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return value if isinstance(value, str | bool | int | float) else None


class Hdf5Source(Source):
    """Base class of sources that read one HDF5 file: `main` is the path, and `file` is the open file."""

    refused = CLOCK
    roles: Sequence[str] = ("action", "choice", "observation", "label", "camera")
    reason = "this layout has no timestamps"
    file: Any = None

    def begin(self) -> None:
        """Open and describe the file."""
        try_files("hdf5", [self.main])
        with hdf5_errors(self.main):
            self.file = h5py().File(self.main, "r")
            self.describe_file()

    @property
    def main(self) -> Path:
        """The HDF5 file."""
        return self.path

    @abstractmethod
    def describe_file(self) -> None:
        """Choose the columns to read, and set `spec` and `fingerprint`."""

    def note_unwritten(self, group: Any, places: Iterable[str], where: str, index: int | None = None) -> None:
        """Add a note for each array of a group that was not completely written."""
        for place in places:
            if isinstance(column := entry_of(group, place), h5py().Dataset) and (share := unwritten(column)):
                self.note(
                    "info",
                    f"{where}/{place}: {share} were never written and are read as {column.fillvalue}. If the episode "
                    f"is shorter than its arrays, cut the arrays before converting.",
                    index,
                )

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


class PartsSink(Sink):
    """Base class of sinks that write each episode to a small file and finally assemble the HDF5 file `main`."""

    forbidden = "/"

    @property
    def main(self) -> Path:
        """The HDF5 file."""
        return self.path

    @property
    def parts(self) -> Path:
        """The directory of the small files."""
        return self.main.with_name(f"{self.main.name}.parts")

    def places(self) -> list[Path]:
        """Return the HDF5 file and the directory of the parts."""
        return [self.main, self.parts]

    def begin(self, *, resume: bool) -> int:
        """Return the number of episodes in the file, or in its parts if the file is missing."""
        self._complete = self.main.exists()
        if self._complete:
            with opened_hdf5(self.main) as file:
                own = own_attribute(file)
            if own.get("spec") != spec_values(self.spec)["spec"]:
                raise DataError(
                    f"{self.main} already contains data with other columns or settings than the data to write; choose "
                    f"another path"
                )
            self._clean()
            return int(own["episodes"])
        with storage_errors(self.parts):
            self.parts.mkdir(parents=True, exist_ok=True)
        return count_files(self.part)

    def part(self, number: int) -> Path:
        """Return the path of an episode's own file."""
        return self.parts / f"{number:06d}.h5"

    def write(self, episode: Episode) -> None:
        """Write the episode to its own file."""
        if self._complete:
            raise DataError(f"{self.main} is complete; choose another path for more episodes")
        super().write(episode)

    def save(self, episodes: list[Episode]) -> None:
        """Write one episode to its own file."""
        (episode,) = episodes
        columns = {"pixels": episode.pixels, "vector": episode.vector, "actions": episode.actions}
        columns |= {f"label/{name}": column for name, column in episode.labels.items()}

        def write(temporary: Path) -> None:
            with h5py().File(temporary, "w") as file:
                for name, array in columns.items():
                    if array is not None:
                        file.create_dataset(name, data=array)
                # As a dataset, because an attribute can store only 64 kB.
                file.create_dataset("metadata", data=metadata_json(episode.metadata))

        with hdf5_errors(self.part(self.saved)):
            write_atomic(self.part(self.saved), write)

    def complete(self) -> None:
        """Assemble the HDF5 file, and delete the parts."""
        if self._complete:
            return

        def write(temporary: Path) -> None:
            with h5py().File(temporary, "w", libver="latest") as file:
                self.assemble(file, map(self._load, range(self.saved)))
                file.attrs[OWN] = json.dumps({**spec_values(self.spec), "episodes": self.saved})

        with hdf5_errors(self.main):
            write_atomic(self.main, write)
        self._complete = True
        self._clean()

    @abstractmethod
    def assemble(self, file: Any, episodes: Iterator[Episode]) -> None:
        """Write the format's layout from the episodes, one at a time."""

    def close(self) -> None:
        """Save pending complete episodes; delete the directory of the parts if there are none."""
        super().close()
        with suppress(OSError):  # it has parts, or is deleted already
            self.parts.rmdir()

    def _load(self, number: int) -> Episode:
        with opened_hdf5(self.part(number)) as file:
            return Episode(
                pixels=file["pixels"][()] if "pixels" in file else None,
                vector=file["vector"][()] if "vector" in file else None,
                actions=file["actions"][()],
                labels={name: file[f"label/{name}"][()] for name in self.spec.labels},
                metadata=own_metadata(file["metadata"]),
            )

    def _clean(self) -> None:
        # Renamed first, so that after a kill the remaining parts do not look like the start of a dataset.
        if self.parts.exists():
            doomed = self.parts.with_name(f".{self.parts.name}.deleted")
            shutil.rmtree(doomed, ignore_errors=True)
            self.parts.rename(doomed)
            shutil.rmtree(doomed)
