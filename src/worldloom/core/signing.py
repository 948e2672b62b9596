"""Signatures of files (Ed25519), which show who signed a file and that it has not changed since.

A signature is a JSON file beside the signed file. It contains the signer's public key and the signature of the file's
content. A secret key is a PEM file that only its owner can read. A public key is 64 hexadecimal digits.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from worldloom.core.errors import DataError, StorageError
from worldloom.core.files import check_private, read_document, storage_errors, write_document

_KIND = "worldloom signature"
_LARGEST = 2**26  # bytes of a signed file, which is read into memory before its signature is checked


class SigningKey:
    """A secret key, read from a PEM file; `public` is the matching public key, 64 hexadecimal digits.

    Raises:
        StorageError: the file cannot be read, or other users can read it.
        DataError: the file does not contain an Ed25519 key.
    """

    def __init__(self, path: Path | str) -> None:
        self._secret = _secret(path)
        self.public = _public(self._secret)

    def sign(self, content: bytes) -> str:
        """Return the signature of the content, 128 hexadecimal digits."""
        signature: bytes = self._secret.sign(content)
        return signature.hex()


def verified(content: bytes, signature_hex: str, public_hex: str) -> bool:
    """Return whether the key signed exactly this content; False also if the signature or the key is malformed."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not _is_hex(signature_hex, 64) or not _is_hex(public_hex, 32):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex)).verify(bytes.fromhex(signature_hex), content)
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
    """Create a file with permissions `mode` from the start, so that no other user can open a secret.

    Raises:
        StorageError: the file already exists, or cannot be written.
    """
    with storage_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            raise StorageError(f"{path} already exists; keys are never overwritten. Choose another path") from None
        with os.fdopen(file, "wb") as opened:
            opened.write(content)


def sign_file(path: Path | str, key: Path | str) -> Path:
    """Sign the current content of a file, and return the path of the signature.

    Raises:
        StorageError: a file cannot be read or written.
        DataError: the key is not an Ed25519 key.
    """
    signer, content = SigningKey(key), _read(path)
    signature = signature_path(path)
    write_document(signature, _KIND, {"key": signer.public, "signature": signer.sign(content)})
    return signature


def signature_path(path: Path | str) -> Path:
    """Return the path of a file's signature."""
    return Path(path).with_name(f"{Path(path).name}.sig")


def read_signed(path: Path | str, trusted: Collection[str]) -> tuple[bytes, str]:
    """Return the content of a file and the public key of its signer, which must be one of `trusted`.

    The file is read only once, so the returned content is the verified content.

    Raises:
        StorageError: the file or its signature is missing.
        DataError: the signature is damaged or does not match the content, or the signer's key is not trusted.
    """
    where = signature_path(path)
    if not where.is_file():
        raise StorageError(f"{path} is not signed: {where} does not exist. Ask the owner to sign the file")
    content, values = _read(path), read_document(where, _KIND)
    try:
        key, signature = values["key"], values["signature"]
        if not _is_hex(key, 32) or not _is_hex(signature, 64):
            raise ValueError("expected a key of 64 hexadecimal digits and a signature of 128")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where} is not a signature ({error}); ask the owner of {path} to sign the file again"
        ) from None
    if not verified(content, signature, key):
        raise DataError(
            f"{path} does not match the signature of {key[:16]}...: one of the two files was changed or replaced. "
            f"Ask the owner for both files again"
        )
    if key.lower() not in {known.strip().lower() for known in trusted}:
        raise DataError(
            f"{path} is signed by {key}, which is not a trusted key; if this key belongs to the owner, add it to the "
            f"trusted keys"
        )
    return content, key.lower()


def _read(path: Path | str) -> bytes:
    with storage_errors(path), Path(path).open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise DataError(
            f"{path} is larger than {_LARGEST} bytes; expected a rule set, a picture or a key. Check the path"
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
