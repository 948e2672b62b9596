"""Refuses a signed rule layer that is older than one the user has already read.

The newest version of each layer is stored in the user's state (see `state_folder`), for all runs, and survives
restarts. The signer's key, layer, owner and name identify a layer.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from worldloom.core.chain import canonical
from worldloom.core.config import Config
from worldloom.core.errors import ConfigError, DataError, StorageError
from worldloom.core.files import exclusive_lock, read_document, storage_errors, write_document
from worldloom.core.user_state import FOLDER, state_folder

_KIND = "worldloom rule versions"


@dataclass(frozen=True, kw_only=True)
class SignedLayer:
    """The identity of a verified layer: its path, the `series` that distinguishes it, its version and its digest."""

    path: str
    series: tuple[str, str, str, str]  # signer, layer, owner, name
    version: int
    digest: str

    @classmethod
    def of(
        cls,
        path: Path | str,
        content: bytes,
        files: Sequence[bytes],
        *,
        series: tuple[str, str, str, str],
        version: int,
    ) -> "SignedLayer":
        """Return the identity of a layer; `files` are the contents of its pictures."""
        digests = [hashlib.sha256(part).hexdigest() for part in (content, *files)]
        digest = hashlib.sha256(canonical(digests).encode("ascii")).hexdigest()
        return cls(path=str(path), series=series, version=version, digest=digest)

    @property
    def key(self) -> str:
        """The series as text."""
        return canonical(list(self.series))


class _Seen(Config):
    version: int = Field(ge=1)
    digest: str


class _Versions(Config):
    newest: dict[str, _Seen] = Field(default_factory=dict)


def check_versions(layers: Sequence[SignedLayer], *, revert: bool = False) -> None:
    """Check that no layer is older than the newest one that the user has seen, and remember the new versions.

    With `revert`, the versions of these layers are accepted whatever was seen before, and count as the newest from now
    on. A layer without a version (0) is not remembered, and counts as older than every version.

    Raises:
        DataError: a layer is older, or has the same version but other content.
        StorageError: the user's state cannot be read or written.
    """
    path = state_folder() / "rule-versions.json"
    if not revert and all(_is_known(layer, _read(path)) for layer in layers):
        return  # the usual case: nothing to write, so the state may be read-only
    try:
        with exclusive_lock(path.with_name(f".{path.name}.lock"), None):
            newest = dict(_read(path))
            for layer in layers:
                if revert:
                    newest.pop(layer.key, None)
                if not _is_known(layer, newest):
                    newest[layer.key] = _Seen(version=layer.version, digest=layer.digest)
            write_document(path, _KIND, _Versions(newest=newest).model_dump(mode="json"))
    except StorageError as error:
        raise StorageError(
            f"{error}. The folder {path.parent} stores the newest versions of rule sets; set {FOLDER} to use another"
        ) from None


def _is_known(layer: SignedLayer, newest: Mapping[str, _Seen]) -> bool:
    """Return whether the record already covers a layer; raise an error if the layer is not the newest one."""
    seen = newest.get(layer.key)
    if seen is None:
        return layer.version == 0
    if layer.version < seen.version:
        said = f"version {layer.version}" if layer.version else "no version"
        raise DataError(
            f"{layer.path} has {said}, but version {seen.version} of this rule layer was read before. Use the newest "
            f"version. To go back on purpose, run 'worldloom rules revert' with this file"
        )
    if layer.version == seen.version and layer.digest != seen.digest:
        raise DataError(
            f"{layer.path} has version {layer.version}, but differs from the version {seen.version} that was read "
            f"before. Ask the owner for a file with a higher version. To accept this one, run 'worldloom rules revert' "
            f"with this file"
        )
    return layer.version == seen.version


def _read(path: Path) -> Mapping[str, _Seen]:
    with storage_errors(path):
        if not path.exists():
            return {}
    again = f"Delete {path} to forget all versions, and check by hand that your rule sets are the newest"
    try:
        return _Versions.parse(read_document(path, _KIND, remedy=again)).newest
    except ConfigError as error:
        raise StorageError(f"{path} is damaged: {error}. {again}") from None
