"""Remembers the newest version of each signed file, so that an older one cannot be put back unnoticed.

The record lies in the user's state (see `state_folder`), applies to all runs, and survives restarts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, StorageError
from worldloom.core.files import exclusive_lock, read_document, storage_errors, write_document
from worldloom.core.user_state import FOLDER, state_folder


class Seen(Config):
    """The version and the digest of a file."""

    version: int = Field(ge=1)
    digest: str


class _Record(Config):
    newest: dict[str, Seen] = Field(default_factory=dict)


class NewestVersions:
    """A record of newest versions; `contents` are the files in question, such as "rule sets", for messages."""

    def __init__(self, name: str, *, kind: str, contents: str) -> None:
        self._name, self._kind, self._contents = name, kind, contents

    @property
    def path(self) -> Path:
        """The file of the record."""
        return state_folder() / self._name

    def read(self) -> Mapping[str, Seen]:
        """Return the newest version of each file.

        Raises:
            StorageError: the record cannot be read, or is damaged.
        """
        path = self.path
        with storage_errors(path):
            if not path.exists():
                return {}
        again = f"Delete {path} to forget all versions, and check by hand that your {self._contents} are the newest"
        try:
            return _Record.parse(read_document(path, self._kind, remedy=again)).newest
        except ConfigError as error:
            raise StorageError(f"{path} is damaged: {error}. {again}") from None

    @contextmanager
    def changing(self) -> Iterator[dict[str, Seen]]:
        """Yield the newest versions, and store what the body of the `with` statement has made of them.

        A lock allows one process at a time. Nothing is stored if the body raises an error.

        Raises:
            StorageError: the record cannot be read or written.
        """
        path = self.path
        try:
            with exclusive_lock(path.with_name(f".{path.name}.lock"), None):
                newest = dict(self.read())
                yield newest
                write_document(path, self._kind, _Record(newest=newest).model_dump(mode="json"))
        except StorageError as error:
            raise StorageError(
                f"{error}. The folder {path.parent} stores the newest versions of {self._contents}; set {FOLDER} to "
                f"use another"
            ) from None
