"""Migrations from older versions of the memory's format, one version at a time; each is one commit of the table.

If you change the columns or their meaning, raise `records.VERSION` by one and add a migration to the new version.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from worldloom.core.errors import DataError
from worldloom.core.progress import SILENT, Progress
from worldloom.memory import records
from worldloom.memory.episodic import TABLE, open_records, write_lock

# Converts the rows of one version to the next; their schema contains the metadata of the next version.
Migration = Callable[[Any], pa.RecordBatchReader]

# Maps a version to the migration that starts from it.
MIGRATIONS: Mapping[int, Migration] = MappingProxyType({})


def migrate(
    path: Path | str, migrations: Mapping[int, Migration] = MIGRATIONS, *, progress: Progress = SILENT
) -> list[int]:
    """Convert a memory to the current version of the format; return the old, intermediate and new versions in order.

    Raises:
        DataError: the memory is newer than this version of worldloom, or too old for it.
        StorageError: the memory does not exist or cannot be written, or another process is writing to it.
    """
    import lance

    path = Path(path)
    versions = [_version(path)]
    with write_lock(path), progress.task("migrating", records.VERSION - versions[0], "version") as task:
        while versions[-1] != records.VERSION:
            step = migrations.get(versions[-1])
            if step is None:
                raise DataError(
                    f"{path} has version {versions[-1]} of the memory format; this version of worldloom cannot convert "
                    f"it to version {records.VERSION}. Use the version of worldloom that wrote the memory"
                )
            with records.memory_errors(path, "write"):
                lance.write_dataset(step(open_records(path)), path / TABLE, mode="overwrite")
            versions.append(_version(path))
            task.advance(versions[-1] - versions[-2])
    return versions


def _version(path: Path) -> int:
    metadata = open_records(path).schema.metadata or {}
    return records.format_version({key.decode(): value.decode() for key, value in metadata.items()}, path)
