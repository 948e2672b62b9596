"""What worldloom stores for a user, across all runs: the user's own key, and the versions of rule sets seen so far."""

import os
from pathlib import Path

from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import exclusive_lock, storage_errors
from worldloom.core.signing import SigningKey, make_key

FOLDER = "WORLDLOOM_STATE"
"""The environment variable that names another folder for the state, except the key; users may share this folder."""
_BASE = "XDG_STATE_HOME"


def state_folder() -> Path:
    """Return the folder of the records of newest versions.

    This is `$WORLDLOOM_STATE` if set, otherwise `$XDG_STATE_HOME/worldloom`, otherwise `~/.local/state/worldloom`.

    Raises:
        StorageError: none of these variables is set, and the user has no home directory.
    """
    chosen = os.environ.get(FOLDER)
    return Path(chosen) if chosen else _own_folder()


def _own_folder() -> Path:
    """Return the folder that belongs to the user alone, whatever `WORLDLOOM_STATE` is."""
    if base := os.environ.get(_BASE):
        return Path(base) / "worldloom"
    try:
        return Path.home() / ".local" / "state" / "worldloom"
    except RuntimeError:
        raise StorageError(f"the user has no home directory; set {_BASE} to a folder for the user's state") from None


def own_key() -> SigningKey:
    """Return the user's own key, which is created on first use.

    Raises:
        StorageError: the key cannot be read or written.
        DataError: the file does not contain a key.
    """
    path = _key_path()
    try:
        with exclusive_lock(path.with_name(f".{path.name}.lock"), None):  # two processes may begin at the same time
            if not os.path.lexists(path):
                make_key(path)
    except StorageError as error:
        raise StorageError(f"{error}. The folder {path.parent} stores your key; set {_BASE} to use another") from None
    return _read_key(path)


def own_public_key() -> str | None:
    """Return the public part of the user's own key, or None if the user has no key yet.

    Raises:
        StorageError: the key cannot be read.
        DataError: the file does not contain a key.
    """
    path = _key_path()
    with storage_errors(path):
        exists = os.path.lexists(path)
    return _read_key(path).public if exists else None


def _read_key(path: Path) -> SigningKey:
    try:
        if path.is_file():
            return SigningKey(path)
    except DataError:
        pass
    raise DataError(
        f"{path}, your own key, is damaged or not a file. Delete it; a new key is made when it is needed. Margins that "
        f"the old key signed must then be calibrated again"
    )


def _key_path() -> Path:
    return _own_folder() / "key.pem"
