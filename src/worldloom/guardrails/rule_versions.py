"""Refuses a signed rule layer that is older than one the user has already read.

Layers are told apart by the signer's key, layer, owner and name.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from worldloom.core.chain import canonical
from worldloom.core.errors import DataError
from worldloom.guardrails.newest_versions import NewestVersions, Seen

_RECORD = NewestVersions("rule-versions.json", kind="worldloom rule versions", contents="rule sets")


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
        parts: Sequence[str],
        *,
        series: tuple[str, str, str, str],
        version: int,
    ) -> "SignedLayer":
        """Return the identity of a layer; `parts` are the digests of the pictures and runs that it names."""
        digests = [hashlib.sha256(content).hexdigest(), *parts]
        digest = hashlib.sha256(canonical(digests).encode("ascii")).hexdigest()
        return cls(path=str(path), series=series, version=version, digest=digest)

    @property
    def key(self) -> str:
        """The series as text."""
        return canonical(list(self.series))


def check_versions(layers: Sequence[SignedLayer], *, revert: bool = False) -> None:
    """Check that no layer is older than the newest one that the user has seen, and remember the new versions.

    With `revert`, the versions of these layers are accepted whatever was seen before, and count as the newest from now
    on. A layer without a version (0) is not remembered, and counts as older than every version.

    Raises:
        DataError: a layer is older, or has the same version but other content.
        StorageError: the user's state cannot be read or written.
    """
    if not revert and all(_is_known(layer, _RECORD.read()) for layer in layers):
        return  # the usual case: nothing to write, so the state may be read-only
    with _RECORD.changing() as newest:
        for layer in layers:
            if revert:
                newest.pop(layer.key, None)
            if not _is_known(layer, newest):
                newest[layer.key] = Seen(version=layer.version, digest=layer.digest)


def _is_known(layer: SignedLayer, newest: Mapping[str, Seen]) -> bool:
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
