"""Signatures (Ed25519), which prove which key signed some content, as what kind, and that the content is unchanged.

Every signature belongs to a `Domain`, the kind of content that was signed. A signature is valid only in its domain, so
nobody can pass off a signed rule layer as a signed constitution.

The signature of a file is a JSON file beside it. This JSON file contains the signer's public key, the domain and the
signature of the file's content. If the file names other files, its parts, the JSON file also contains the digest of
each part, and the signature covers these digests too. A secret key is a PEM file that only its owner can read. A public
key is 64 hexadecimal digits.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from worldloom.core.chain import canonical
from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import check_private, read_document, read_json, storage_errors, sync_directory, write_document

_KIND = "worldloom signature"
_FORMAT = 2  # format 1 had no domains
_LARGEST = 2**26  # bytes of a signed file, which is read into memory before its signature is checked


class Domain(Enum):
    """What is signed. The value precedes the content in the signed bytes; no value is a prefix of another one."""

    RULE_LAYER = b"worldloom rule layer\n"
    WITH_PARTS = b"worldloom file with parts\n"
    MARGINS = b"worldloom margins\n"
    DATA_CARD = b"worldloom data card\n"
    CONSTITUTION = b"worldloom constitution\n"
    LEDGER_ENTRY = b"worldloom ledger entry\n"
    CHECKPOINT = b"worldloom ledger checkpoint\n"
    MESSAGE = b"WLWEAVE\x01"
    MASK_KEYS = b"worldloom secure aggregation\0"

    @property
    def title(self) -> str:
        """The name of the domain in files and messages."""
        return self.name.lower().replace("_", " ")


class SigningKey:
    """A secret key, read from a PEM file; `public` is the matching public key, 64 hexadecimal digits.

    Raises:
        StorageError: the file cannot be read, or other users can read it.
        DataError: the file does not contain an Ed25519 key.
    """

    def __init__(self, path: Path | str) -> None:
        self._secret = _secret(path)
        self.public = _public(self._secret)

    def sign(self, content: bytes, domain: Domain) -> str:
        """Return the signature of the content in a domain, 128 hexadecimal digits."""
        signature: bytes = self._secret.sign(domain.value + content)
        return signature.hex()


def verified(content: bytes, signature_hex: str, public_hex: str, domain: Domain) -> bool:
    """Return whether the key signed exactly this content in this domain.

    A malformed signature or key gives False.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not _is_hex(signature_hex, 64) or not _is_hex(public_hex, 32):
        return False
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex))
        key.verify(bytes.fromhex(signature_hex), domain.value + content)
    except (InvalidSignature, ValueError):
        return False
    return True


def make_key(path: Path | str) -> str:
    """Write a new secret key, readable only by its owner, and return its public key.

    Raises:
        StorageError: the file already exists, or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    secret = Ed25519PrivateKey.generate()
    text = secret.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_key(path, text)
    return _public(secret)


def write_key(path: Path | str, content: bytes, *, mode: int = 0o600) -> None:
    """Create a file atomically, with permissions `mode` from the start, so that no other user can open a secret.

    Raises:
        StorageError: the file already exists, or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            os.link(temporary, path)  # fails if the path exists; a rename would replace it
        except FileExistsError:
            raise StorageError(f"{path} already exists; keys are never overwritten. Choose another path") from None
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)


@dataclass(frozen=True, kw_only=True)
class SignedFile:
    """A verified file: its content, the public key of its signer, and the digests of its parts, by name."""

    content: bytes
    key: str
    parts: Mapping[str, str]


def sign_file(path: Path | str, key: Path | str, domain: Domain, parts: Mapping[str, str] | None = None) -> Path:
    """Sign the current content of a file in a domain, and return the path of the signature.

    `parts` contains digests of what the file names, such as pictures; the signature covers the digests too.

    Raises:
        StorageError: a file cannot be read or written.
        DataError: the key is not an Ed25519 key, or the file has a signature of another domain.
    """
    signer, content, signature = SigningKey(key), _read(path), signature_path(path)
    found = read_json(signature) if signature.is_file() else None
    if isinstance(found, dict) and found.get("domain", domain.title) != domain.title:
        raise DataError(
            f"{path} is already signed as {found['domain']!r}, and signing it as {domain.title!r} would replace that "
            f"signature. Check the path, or delete {signature}"
        )
    values = {"key": signer.public, "domain": domain.title, "signature": signer.sign(*_covered(content, domain, parts))}
    write_document(signature, _KIND, values | ({"parts": dict(parts)} if parts else {}), version=_FORMAT)
    return signature


def signature_path(path: Path | str) -> Path:
    """Return the path of a file's signature."""
    return Path(path).with_name(f"{Path(path).name}.sig")


def read_signed(path: Path | str, trusted: Collection[str], domain: Domain) -> SignedFile:
    """Return the content of a file, its signer, which must be one of `trusted`, and the signed digests of its parts.

    The file is read only once, so the returned content is the verified content. The caller compares the parts with
    their digests.

    Raises:
        StorageError: the file or its signature is missing, or the signature has an old format.
        DataError: the signature is damaged, is of another domain or does not match the content, or the signer's key is
            not trusted.
    """
    where = signature_path(path)
    if not where.is_file():
        raise StorageError(f"{path} is not signed: {where} does not exist. Ask the owner to sign the file")
    again = f"Ask the owner of {path} to sign the file again"
    content, values = _read(path), read_document(where, _KIND, version=_FORMAT, remedy=again)
    try:
        key, signed_as, signature = values["key"], values["domain"], values["signature"]
        if not _is_hex(key, 32) or not _is_hex(signature, 64):
            raise ValueError("expected a key of 64 hexadecimal digits and a signature of 128")
        parts = dict(values.get("parts", {}))
        if not all(isinstance(digest, str) for digest in parts.values()):
            raise ValueError("expected a digest for each of the parts")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where} is not a signature ({error}); ask the owner of {path} to sign the file again"
        ) from None
    if signed_as != domain.title:
        raise DataError(
            f"{path} is signed as {signed_as!r}; expected {domain.title!r}. Check the path, or ask the owner to sign "
            f"the file as {domain.title!r}"
        )
    covered, within = _covered(content, domain, parts)
    if not verified(covered, signature, key, within):
        raise DataError(
            f"{path} does not match the signature of {key[:16]}...: one of the two files was changed or replaced. "
            f"Ask the owner for both files again"
        )
    if key.lower() not in {known.strip().lower() for known in trusted}:
        raise DataError(
            f"{path} is signed by {key}, which is not a trusted key; if this key belongs to the owner, add it to the "
            f"trusted keys"
        )
    return SignedFile(content=content, key=key.lower(), parts=parts)


def _covered(content: bytes, domain: Domain, parts: Mapping[str, str] | None) -> tuple[bytes, Domain]:
    """Return what is signed for a file, and in which domain.

    A file with parts has another domain than a file without, so that no content can imitate a list of parts.
    """
    if not parts:
        return content, domain
    stated = {"domain": domain.title, "sha256": hashlib.sha256(content).hexdigest(), "parts": dict(parts)}
    return canonical(stated).encode("ascii"), Domain.WITH_PARTS


def _read(path: Path | str) -> bytes:
    with storage_errors(path), Path(path).open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise DataError(
            f"{path} is larger than {_LARGEST} bytes; expected a rule set, a data card or a key. Check the path"
        )
    return content


def _is_hex(text: Any, size: int) -> bool:
    return isinstance(text, str) and re.fullmatch(f"[0-9a-fA-F]{{{2 * size}}}", text) is not None


def _secret(path: Path | str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        secret = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DataError(f"{path} is not a secret key ({error}); create one with 'worldloom rules key'") from None
    if not isinstance(secret, Ed25519PrivateKey):
        raise DataError(f"{path} is not an Ed25519 key; create one with 'worldloom rules key'")
    check_private(path)
    return secret


def _public(secret: Any) -> str:
    from cryptography.hazmat.primitives import serialization

    raw: bytes = secret.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return raw.hex()
