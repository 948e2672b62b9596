"""What the HDF5 formats share: opening with errors that help, and a writer that a kill cannot corrupt.

HDF5 files that are open when their process dies are often lost. So each episode is first written to a small file of
its own (PATH.parts/000000.h5), atomically, and the last step puts these together into one file.
"""

import importlib
import json
import shutil
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.core.errors import ConfigError, DataError
from worldloom.core.extras import require
from worldloom.core.files import storage_errors, write_atomic
from worldloom.core.types import Episode
from worldloom.data import DatasetSpec, check_episode, metadata_json
from worldloom.formats.format import Note, Sink

OWN = "worldloom"  # the attribute under which our own spec and metadata stand


def h5py() -> Any:
    """Return the h5py package.

    Raises:
        ConfigError: it is not installed.
    """
    with suppress(ImportError):  # where it is installed, it registers the filters of some published files
        importlib.import_module("hdf5plugin")
    return require("h5py", "hdf5")


@contextmanager
def hdf5_errors(path: Path) -> Iterator[None]:
    """Turn what HDF5 raises on `path` into this library's errors."""
    try:
        with storage_errors(path):
            yield
    except (OSError, KeyError, RuntimeError) as error:
        text = str(error).strip("'\"")
        if "filter" in text or "plugin" in text:
            raise ConfigError(
                f"{path} is compressed by a filter that is not here: run: pip install hdf5plugin"
            ) from error
        raise DataError(
            f"{path} is damaged or no whole HDF5 file ({text}): it may be half written or cut. Restore it from a copy"
        ) from error


def is_hdf5(path: Path) -> bool:
    """Return whether a file begins as HDF5 does."""
    if not path.is_file():
        return False
    with storage_errors(path), path.open("rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def is_image(shape: tuple[int, ...], dtype: Any) -> bool:
    """Return whether a column of this shape (N, ...) holds pictures with channels last."""
    return len(shape) == 4 and dtype == np.uint8 and shape[-1] in (1, 3, 4)


def own_attribute(holder: Any) -> dict[str, Any]:
    """Return what we wrote in the attributes of a group or file, or nothing."""
    text = holder.attrs.get(OWN)
    if text is None:
        return {}
    values: dict[str, Any] = json.loads(text)
    return values


class PartsSink(Sink):
    """Collects episodes as small files and, at the end, assembles one HDF5 file at `path`."""

    def __init__(self, path: Path, spec: DatasetSpec, *, resume: bool) -> None:
        self.path, self.spec = path, spec
        self.parts = path.with_name(f"{path.name}.parts")
        self._complete = False
        if not resume and (path.exists() or self.parts.exists()):
            raise DataError(f"{path} or {self.parts} is there already; choose another path, or delete them")
        if path.exists():
            with hdf5_errors(path), h5py().File(path, "r") as file:
                own = own_attribute(file)
            if own.get("spec") != json.loads(spec.to_json()):
                raise DataError(f"{path} holds something else; choose another path")
            self.written, self._complete = int(own["episodes"]), True
            self._clean()
            return
        with storage_errors(self.parts):
            self.parts.mkdir(parents=True, exist_ok=True)
        self.written = 0
        while self.part(self.written).exists():
            self.written += 1
        self._count = self.written

    def part(self, number: int) -> Path:
        """Return the path of an episode's file."""
        return self.parts / f"{number:06d}.h5"

    def write(self, episode: Episode) -> None:
        """Write the episode to its own file."""
        if self._complete:
            raise DataError(f"{self.path} is complete; choose another path for more")
        check_episode(episode, self.spec, f"episode {self._count}")

        def save(temporary: Path) -> None:
            with h5py().File(temporary, "w") as file:
                for name, array in {
                    "pixels": episode.pixels,
                    "vector": episode.vector,
                    "actions": episode.actions,
                    **{f"label/{name}": column for name, column in episode.labels.items()},
                }.items():
                    if array is not None:
                        file.create_dataset(name, data=array)
                # As a dataset, since an attribute holds 64 kB only.
                file.create_dataset("metadata", data=metadata_json(episode.metadata))

        with hdf5_errors(self.part(self._count)):
            write_atomic(self.part(self._count), save)
        self._count += 1

    def finish(self) -> list[Note]:
        """Assemble the file, and delete the parts."""
        if self._complete:
            return self.closing_notes()

        def save(temporary: Path) -> None:
            with h5py().File(temporary, "w", libver="latest") as file:
                self.assemble(file, self._count)
                file.attrs[OWN] = json.dumps({"spec": json.loads(self.spec.to_json()), "episodes": self._count})

        with hdf5_errors(self.path):
            write_atomic(self.path, save)
        self._complete = True
        self._clean()
        return self.closing_notes()

    def load(self, number: int) -> Episode:
        """Return an episode that was written."""
        with hdf5_errors(self.part(number)), h5py().File(self.part(number), "r") as file:
            labels = {name: file[f"label/{name}"][()] for name in self.spec.labels}
            return Episode(
                pixels=file["pixels"][()] if "pixels" in file else None,
                vector=file["vector"][()] if "vector" in file else None,
                actions=file["actions"][()],
                labels=labels,
                metadata=json.loads(file["metadata"].asstr()[()]),
            )

    @abstractmethod
    def assemble(self, file: Any, episodes: int) -> None:
        """Write the format's layout from the parts, one at a time."""

    def closing_notes(self) -> list[Note]:
        """Return what the format could not carry."""
        return []

    def _clean(self) -> None:
        # Renamed first, so that a kill while deleting leaves no parts that look like the beginning of a dataset.
        if self.parts.exists():
            doomed = self.parts.with_name(f".{self.parts.name}.deleted")
            shutil.rmtree(doomed, ignore_errors=True)
            self.parts.rename(doomed)
            shutil.rmtree(doomed)
